"""Which files of a sandbox its declared outputs mean, and where each goes.

Looks only: nothing is changed, no remote is asked.  A wildcard leaves out what is an input as
it was linked, and what is neither file, directory nor symbolic link; a pattern without
wildcards means exactly what it names.  Trio thread, with checkpoints.
"""

from collections.abc import AsyncIterator, Collection, Iterator, Sequence

import msgspec
import trio

from stagefs.errors import InvalidName, NotFound, NotSupported, StageFSError
from stagefs.model import Inode
from stagefs.namespace.node import ContentKind, Node, NodeKind
from stagefs.namespace.store import Namespace
from stagefs.remote.url import join
from stagefs.staging.manifest import Output
from stagefs.staging.values import PAGE_ENTRIES_MAX

SYMLINKS_MAX = 40
NAMED_MAX = 5
_LISTED = (NodeKind.FILE, NodeKind.SYMLINK)


class Match(msgspec.Struct, frozen=True):
    """One file, symbolic link or empty directory, for one output.  ``entry`` of ``directory`` leads
    to the node; ``below`` is its path below what the pattern matched (empty: that itself)."""

    output: Output
    path: tuple[str, ...]
    below: tuple[str, ...]
    directory: Inode
    entry: str
    node: Node

    @property
    def name(self) -> str:
        return "/".join(self.path)

    @property
    def to_staging(self) -> bool:
        return self.output.to.startswith("staging:")

    @property
    def target(self) -> str:
        """The staging:/// name or the URL that this one goes to.  Raises InvalidUrl for a name
        that the URL's scheme cannot express."""
        parts = self.path if self.output.is_below else self.below
        to = self.output.to
        if self.to_staging:
            return "/".join([to.rstrip("/") if to != "staging:///" else "staging://", *parts])
        for part in parts:
            to = join(to, part)
        return to


class Matching:
    """One look at one sandbox.  ``linked``: the inodes that its inputs were linked to."""

    def __init__(
        self, namespace: Namespace, sandbox: Node, name: str, *, linked: Collection[int]
    ) -> None:
        self._namespace = namespace
        self._sandbox = sandbox
        self._name = name
        self._linked = frozenset(linked)

    async def find(self, outputs: Sequence[Output]) -> list[Match]:
        """Raises NotFound naming declared outputs that are missing; InvalidName when several files
        shall get one name, NotSupported for what cannot be committed."""
        found: dict[Output, list[Match]] = {output: [] for output in outputs}
        tops: dict[Output, set[tuple[str, ...]]] = {output: set() for output in outputs}
        async for match in self._walk(self._sandbox, (), outputs):
            tops[match.output].add(match.path[: len(match.path) - len(match.below)])
            found[match.output].append(match)
        missing = [
            output for output, matches in found.items() if not matches and not output.optional
        ]
        if missing:
            raise self._missing(missing)
        for output, matched in tops.items():
            if len(matched) > 1 and not output.is_below:
                names = ", ".join(sorted("/".join(path) for path in matched)[:NAMED_MAX])
                raise InvalidName(
                    f"{output.pattern} matches several files of the sandbox {self._name} ({names}),"
                    f" but {output.to} is one name: end it with '/'."
                )
        return [self._checked(match) for matches in found.values() for match in matches
                if self._is_wanted(match)]  # fmt: skip

    def _missing(self, missing: Sequence[Output]) -> StageFSError:
        # One pattern may go to several URLs.
        patterns = list(dict.fromkeys(output.pattern for output in missing))
        what = "output is" if len(patterns) == 1 else "outputs are"
        return NotFound(
            f"Declared {what} missing in the sandbox {self._name}: {', '.join(patterns)}; "
            "nothing was committed."
        )

    # Walking

    async def _walk(
        self, directory: Node, path: tuple[str, ...], outputs: Sequence[Output]
    ) -> AsyncIterator[Match]:
        globs = [(output, output.glob) for output in outputs]
        for name, node in self._entries(directory.inode):
            here = (*path, name)
            taken = [output for output, glob in globs if glob.matches(here)]
            for output in taken:
                async for match in self._matched(output, directory, here, node):
                    yield match
            if node.kind is NodeKind.DIRECTORY:
                # A directory that matched means all that is below it, once.
                deeper = [
                    output
                    for output, glob in globs
                    if output not in taken and glob.may_match_below(here)
                ]
                if deeper:
                    async for match in self._walk(node, here, deeper):
                        yield match
        await trio.lowlevel.checkpoint()

    async def _matched(
        self, output: Output, directory: Node, path: tuple[str, ...], node: Node
    ) -> AsyncIterator[Match]:
        is_literal = output.glob.is_literal
        if node.kind is not NodeKind.DIRECTORY:
            if is_literal or not self._is_input(directory, path[-1], node):
                yield Match(output, path, (), directory.inode, path[-1], node)
            return
        async for match in self._below(output, directory, path, node, len(path)):
            yield match

    async def _below(
        self,
        output: Output,
        above: Node,
        path: tuple[str, ...],
        directory: Node,
        depth: int,
    ) -> AsyncIterator[Match]:
        is_empty = True
        for name, node in self._entries(directory.inode):
            is_empty = False
            here = (*path, name)
            if node.kind is NodeKind.DIRECTORY:
                async for match in self._below(output, directory, here, node, depth):
                    yield match
            elif not self._is_input(directory, name, node):
                yield Match(output, here, here[depth:], directory.inode, name, node)
        if is_empty and not directory.lower:
            yield Match(output, path, path[depth:], above.inode, path[-1], directory)
        await trio.lowlevel.checkpoint()

    def _entries(self, directory: Inode) -> Iterator[tuple[str, Node]]:
        after = 0
        while page := self._namespace.page(directory, after, PAGE_ENTRIES_MAX):
            after = page[-1][0]
            yield from ((name, node) for _cookie, name, node in page)

    def _is_input(self, directory: Node, name: str, node: Node) -> bool:
        """Whether a file is only linked here, and not the task's own."""
        if node.kind is not NodeKind.FILE or node.content is ContentKind.PRIVATE:
            return False
        if node.content is ContentKind.OBJECT or node.inode in self._linked:
            return True
        if not directory.lower:
            return False
        try:
            return self._namespace.lookup(directory.lower, name).inode == node.inode
        except NotFound:
            return False

    # What is found

    def _is_wanted(self, match: Match) -> bool:
        """Wildcards leave out what cannot go where they say."""
        is_literal = match.output.glob.is_literal and not match.below
        if match.node.kind is NodeKind.DIRECTORY:
            return match.to_staging
        if match.node.kind not in _LISTED:
            return is_literal
        if match.node.kind is NodeKind.SYMLINK and not match.to_staging:
            return is_literal or self._followed(match) is not None
        return True

    def _checked(self, match: Match) -> Match:
        """With the file behind a symbolic link, where links cannot go."""
        if match.node.kind is NodeKind.DIRECTORY:
            return match
        if match.node.kind not in _LISTED:
            raise NotSupported(
                f"{match.name} of the sandbox {self._name} is a FIFO, socket or device and cannot"
                " be committed: leave it out."
            )
        if match.node.kind is NodeKind.FILE or match.to_staging:
            return match
        behind = self._followed(match)
        if behind is None:
            raise NotSupported(
                f"{match.name} of the sandbox {self._name} is a symbolic link that leads to no file"
                f" of the sandbox, so there is nothing to upload to {match.output.to}."
            )
        directory, entry, node = behind
        return msgspec.structs.replace(match, directory=directory, entry=entry, node=node)

    def _followed(self, match: Match) -> tuple[Inode, str, Node] | None:
        """The directory, name and file that a symbolic link leads to, inside the sandbox."""
        path = list(match.path)
        for _ in range(SYMLINKS_MAX):
            found = self._resolved(path)
            if found is None:
                return None
            directory, node = found
            if node.kind is NodeKind.FILE:
                return directory, path[-1], node
            if node.kind is not NodeKind.SYMLINK or (node.target or "/").startswith("/"):
                return None
            path = path[:-1]
            for part in (node.target or "").split("/"):
                if part == "..":
                    if not path:
                        return None
                    path.pop()
                elif part not in {"", "."}:
                    path.append(part)
        return None

    def _resolved(self, path: Sequence[str]) -> tuple[Inode, Node] | None:
        directory = node = self._sandbox
        for part in path:
            if node.kind is not NodeKind.DIRECTORY:
                return None
            directory = node
            try:
                node = self._namespace.lookup(directory.inode, part)
            except NotFound:
                return None
        return directory.inode, node
