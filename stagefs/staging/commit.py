"""Commit: the declared outputs of a sandbox become visible, and are queued, all or none.

Each step is durable before the next one begins:

1. match: which files; a missing one, or one that is open for writing, ends it here.  The files
   are made immutable in the same moment: a task that goes on writing gets copies of its own.
2. complete: what shows through from an input is copied; the files are synced.
3. keep: digests; files for remotes get a second name in the outputs directory.
4. prepare: the rows of the queue, of which nothing is uploaded yet.
5. commit: one transaction of the namespace gives the names and keeps the record: the point of no
   return.  It is synced.
6. activate: the queue uploads.

A daemon that dies before 5 leaves prepared rows, which the next one discards; after it, the
next one activates them (``settle``).  Directories for names in ``staging/`` are made before 5
and may stay, empty, when it fails.

Concurrency: trio thread; one commit of a sandbox at a time, and several sandboxes beside each
other.  A caller that goes away before 5 ends its commit; nothing ends it after that.
"""

import functools
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import trio

from stagefs.errors import (
    Busy,
    InvalidName,
    IsADirectory,
    NameExists,
    NotFound,
    NotPermitted,
    ReadOnly,
)
from stagefs.model import Checksum, ChecksumKind, Inode
from stagefs.namespace.node import ContentKind, Node, NodeKind
from stagefs.namespace.store import Namespace
from stagefs.outputs.queued import QueueItem
from stagefs.remote.url import parse
from stagefs.staging import values
from stagefs.staging.committed_files import digests, keep
from stagefs.staging.manifest import Manifest, Output, checked
from stagefs.staging.matching import NAMED_MAX, Match, Matching
from stagefs.staging.names import NameOperations, first_error
from stagefs.staging.sandbox_building import Building
from stagefs.staging.sandbox_leases import SandboxLeases
from stagefs.staging.sandboxes import Found, SandboxOperations, record_from
from stagefs.staging.stageout import StageOut
from stagefs.staging.tree import Tree, parse_place
from stagefs.staging.values import Progress, ProgressCallback, SandboxState
from stagefs.vfs.learning import Learning
from stagefs.vfs.workspace import Workspace

log = logging.getLogger(__name__)

FILES_AT_ONCE = 4
RECORDED = (ChecksumKind.XXH3, ChecksumKind.SHA256)


class _File(msgspec.Struct):
    """A matched file with its content, as the steps learn it.  ``inode`` is immutable."""

    match: Match
    inode: Inode
    size_bytes: int = 0
    checksums: list[Checksum] = []
    kept: str | None = None


class _Link(msgspec.Struct, frozen=True):
    """A name to be given in ``staging/``."""

    match: Match
    directory: Inode
    name: str
    inode: Inode


class Commits:
    def __init__(
        self,
        *,
        namespace: Namespace,
        tree: Tree,
        names: NameOperations,
        sandboxes: SandboxOperations,
        building: Building,
        leases: SandboxLeases,
        learning: Learning,
        workspace: Workspace,
        stage_out: StageOut,
        reached: Callable[[str], None] = lambda _step: None,
    ) -> None:
        """``reached`` is told each durable step when it is done."""
        self._namespace = namespace
        self._tree = tree
        self._names = names
        self._sandboxes = sandboxes
        self._building = building
        self._leases = leases
        self._learning = learning
        self._workspace = workspace
        self._stage_out = stage_out
        self._reached = reached

    async def settle(self) -> None:
        """Once, at the start of a daemon: end what an earlier one had begun."""
        for commit in await self._stage_out.unsettled():
            if self._namespace.commit_record(commit) is not None:
                await self._stage_out.activate(commit)
            else:
                await self._stage_out.discard(commit)

    async def commit(
        self, request: values.CommitSandbox, progress: ProgressCallback
    ) -> values.CommitRecord:
        found = await self._sandboxes.find(request.name)
        self._sandboxes.refuse_committing(found)
        if found.row.state == SandboxState.COMMITTED:
            return self._last_record(found)
        if found.row.state == SandboxState.FAILED:
            raise NotPermitted(
                f"The sandbox {found.name} has failed, so nothing of it is published: move what is"
                " of use into staging/, or make it again."
            )
        more = self._building.public(checked(Manifest(outputs=request.outputs))).outputs
        outputs = [output.of(found.place.name) for output in (*found.kept.manifest.outputs, *more)]
        inode = found.node.inode
        self._sandboxes.committing.add(inode)
        try:
            record = await self._commit(found, outputs, progress)
        finally:
            self._sandboxes.committing.discard(inode)
        self._learning.ended(inode)
        if not found.row.persistent:
            await self._leases.end(inode)
        return record

    def _last_record(self, found: Found) -> values.CommitRecord:
        """For a caller who did not get the answer."""
        rows = self._namespace.commits(f"/{'/'.join(found.place.parts)}")
        if not rows:
            raise NotPermitted(f"The sandbox {found.name} is committed already.")
        return record_from(rows[-1].record)

    async def _commit(
        self, found: Found, outputs: Sequence[Output], progress: ProgressCallback
    ) -> values.CommitRecord:
        commit = f"{time.time_ns():x}-{secrets.token_hex(4)}"
        matching = Matching(
            self._namespace, found.node, found.name, linked=found.kept.linked.values()
        )
        matches = await matching.find(outputs)
        self._refuse_twice(matches)
        files = self._made_immutable(found, matches)
        self._reached("match")
        directory = None
        try:
            await self._complete(files, progress)
            self._reached("complete")
            if any(not match.to_staging for match in matches):
                directory = await self._stage_out.make_directory_of(commit)
            items = await self._keep(files, directory, progress)
            self._reached("keep")
            if items:
                await self._stage_out.prepare(commit, items)
            self._reached("prepare")
            record = await self._point_of_no_return(found, commit, matches, files)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._give_up(commit, directory)
            raise
        with trio.CancelScope(shield=True):
            await self._workspace.sync_names()
            self._reached("commit")
            if items:
                await self._stage_out.activate(commit)
            self._reached("activate")
        return record

    async def _give_up(self, commit: str, directory: Path | None) -> None:
        if self._namespace.commit_record(commit) is not None:
            # Only our own mistakes come here: what is in the namespace was done.
            await self._stage_out.activate(commit)
        elif directory is not None:
            await self._stage_out.discard(commit)
            await trio.to_thread.run_sync(
                functools.partial(shutil.rmtree, directory, ignore_errors=True)
            )

    # 1. match

    def _refuse_twice(self, matches: Sequence[Match]) -> None:
        first: dict[str, Match] = {}
        for match in matches:
            other = first.setdefault(match.target, match)
            if other is not match and (other.path, other.output.to) != (
                match.path,
                match.output.to,
            ):
                raise InvalidName(
                    f"{other.name} and {match.name} would both become {match.target}: declare"
                    " another URL for one of them."
                )

    def _made_immutable(self, found: Found, matches: Sequence[Match]) -> list[_File]:
        """Raises Busy naming what is open for writing.  No await: what is closed now stays so."""
        files = [match for match in matches if match.node.kind is NodeKind.FILE]
        writers = self._workspace.writers
        busy = sorted({match.name for match in files if writers.count(match.node.inode)})
        if busy:
            more = f" and {len(busy) - NAMED_MAX} more" if len(busy) > NAMED_MAX else ""
            raise Busy(
                f"{', '.join(busy[:NAMED_MAX])}{more} of the sandbox {found.name} can still be"
                " written to by some process: end it, then commit again."
            )
        for match in files:
            self._make_own(match)
        made = [_File(match, self._inode(match)) for match in files]
        private = [
            file.inode
            for file in made
            if self._namespace.node(file.inode).content is ContentKind.PRIVATE
        ]
        if private:
            self._namespace.publish(private)
        return made

    def _make_own(self, match: Match) -> None:
        """An input that is to be uploaded as it is becomes a copy that can be completed."""
        node = match.node
        if match.to_staging or node.content is not ContentKind.OBJECT:
            return
        # The same input may go to several places.
        if self._inode(match) == node.inode:
            self._namespace.copy_up(match.directory, match.entry, node.inode)
            self._names.changed(match.directory, match.entry)

    def _inode(self, match: Match) -> Inode:
        if match.node.content is not ContentKind.OBJECT:
            return match.node.inode
        return self._namespace.lookup(match.directory, match.entry).inode

    # 2. complete

    async def _complete(self, files: Sequence[_File], progress: ProgressCallback) -> None:
        local = {file.inode for file in files if self._is_local(file.inode)}
        done: dict[Inode, int] = {}

        async def complete(inode: Inode) -> None:
            def copied(so_far: int) -> None:
                done[inode] = so_far
                progress(Progress("completing the outputs", sum(done.values()), None))

            await self._workspace.complete(self._namespace.node(inode), copied)

        await first_error([functools.partial(complete, inode) for inode in local], FILES_AT_ONCE)

    def _is_local(self, inode: Inode) -> bool:
        return self._namespace.node(inode).content is not ContentKind.OBJECT

    # 3. keep

    async def _keep(
        self, files: Sequence[_File], directory: Path | None, progress: ProgressCallback
    ) -> list[QueueItem]:
        done = 0

        def hashed(count: int) -> None:
            nonlocal done
            done += count
            progress(Progress("checking the outputs", done, None))

        async def work(number: int, file: _File) -> None:
            node = self._namespace.node(file.inode)
            if node.content is ContentKind.OBJECT:
                file.size_bytes = node.size_bytes
                return
            target = None
            if directory is not None and not file.match.to_staging:
                file.kept = str(number)
                target = directory / file.kept
            kinds = [*RECORDED]
            if target is not None and parse(file.match.target).scheme == "s3":
                kinds.append(ChecksumKind.MD5)
            fd = self._workspace.local.open_whole(node)

            def read() -> tuple[int, list[Checksum]]:
                found = digests(fd, kinds, lambda count: trio.from_thread.run_sync(hashed, count))
                if target is not None:
                    keep(fd, target)
                return found

            try:
                file.size_bytes, file.checksums = await trio.to_thread.run_sync(read)
            finally:
                os.close(fd)

        works = [functools.partial(work, number, file) for number, file in enumerate(files)]
        await first_error(works, FILES_AT_ONCE)
        return [self._item(file) for file in files if file.kept is not None]

    def _item(self, file: _File) -> QueueItem:
        assert file.kept is not None
        node = self._workspace.local.live(self._namespace.node(file.inode))
        return QueueItem(
            url=file.match.target,
            file=file.kept,
            size_bytes=file.size_bytes,
            checksums=tuple(file.checksums),
            mode=node.mode & 0o777,
            mtime_ns=node.mtime_ns,
            overwrite=file.match.output.overwrite,
            label=file.match.name,
        )

    # 5. commit

    async def _point_of_no_return(
        self, found: Found, commit: str, matches: Sequence[Match], files: Sequence[_File]
    ) -> values.CommitRecord:
        links = await self._links(matches, files)
        record = self._record(commit, found, matches, files)
        # From here to the end of the transaction nothing waits.
        missing = [link for link in links if self._is_new(link)]
        self._namespace.commit_sandbox(
            found.node.inode,
            commit,
            json.dumps(msgspec.to_builtins(record)),
            state=SandboxState.ACTIVE if found.row.persistent else SandboxState.COMMITTED,
            publish=[file.inode for file in files if self._is_local(file.inode)],
            links=[(link.directory, link.name, link.inode) for link in missing],
            replace=any(link.match.output.overwrite for link in missing),
        )
        for link in missing:
            self._names.changed(link.directory, link.name)
            self._names.attributes_changed(link.inode)
        self._workspace.names_went()
        return record

    async def _links(self, matches: Sequence[Match], files: Sequence[_File]) -> list[_Link]:
        """The names to be given, in directories that are there."""
        own = {id(file.match): file.inode for file in files}
        links = []
        for match in matches:
            if not match.to_staging:
                continue
            place = parse_place(match.target)
            if match.node.kind is NodeKind.DIRECTORY:
                await self._tree.make_directories(place)
                continue
            directory = await self._tree.make_directories(place.above)
            self._refuse_binding(directory, match)
            inode = own.get(id(match), match.node.inode)
            links.append(_Link(match, directory.inode, place.name, inode))
        return links

    def _refuse_binding(self, directory: Node, match: Match) -> None:
        if directory.bind_url is not None and not directory.writable:
            raise ReadOnly(
                f"{match.name} cannot become {match.target}: that directory shows"
                f" {directory.bind_url}; declare the URL itself, or another name."
            )

    def _is_new(self, link: _Link) -> bool:
        """Whether the name is still to be given.  Raises NameExists, IsADirectory."""
        try:
            there = self._namespace.lookup(link.directory, link.name)
        except NotFound:
            return True
        if there.inode == link.inode:
            return False
        if there.kind is NodeKind.DIRECTORY:
            raise IsADirectory(
                f"{link.match.target} is a directory, so {link.match.name} cannot be published"
                " there: end the URL with '/'."
            )
        if not link.match.output.overwrite:
            raise NameExists(
                f"{link.match.target} exists, so {link.match.name} is not published and nothing"
                " was committed: remove it, or commit with --overwrite."
            )
        return True

    def _record(
        self, commit: str, found: Found, matches: Sequence[Match], files: Sequence[_File]
    ) -> values.CommitRecord:
        contents = {id(file.match): file for file in files}
        outputs = []
        for match in matches:
            file = contents.get(id(match))
            kind = {NodeKind.DIRECTORY: "directory", NodeKind.SYMLINK: "symlink"}
            outputs.append(
                values.CommittedOutput(
                    name=match.name,
                    to=match.target,
                    kind="file" if file is not None else kind[match.node.kind],
                    size_bytes=file.size_bytes if file is not None else 0,
                    checksums=file.checksums if file is not None else [],
                    queued=file is not None and file.kept is not None,
                )
            )
        return values.CommitRecord(
            id=commit, sandbox=str(found.place), time_ns=time.time_ns(), outputs=outputs
        )
