"""Which paths of a sandbox an output's pattern means.

As in a shell: ``*``, ``?`` and ``[...]`` stand for characters of one component, a leading dot
must be written, and ``**`` as a whole component stands for any number of directories, none
included.  A directory that matches means everything below it.  Pure functions on components,
the same for sandboxes in the mount and for real directories.
"""

import fnmatch
import functools
import re
from collections.abc import Sequence

import msgspec

ANY_DEPTH = "**"
COMPONENTS_MAX = 100
_WILD = re.compile(r"[*?\[]")


class Glob(msgspec.Struct, frozen=True):
    """A pattern taken apart.  ``parse`` makes one."""

    components: tuple[str, ...]

    @property
    def is_literal(self) -> bool:
        """Whether it can mean one path only."""
        return not any(map(_WILD.search, self.components))

    def matches(self, path: Sequence[str]) -> bool:
        """Whether the pattern means this very path, given as components from the sandbox."""
        return _matches(self.components, tuple(path), whole=True)

    def may_match_below(self, directory: Sequence[str]) -> bool:
        """Whether a path below this directory can match: False prunes a walk."""
        return _matches(self.components, tuple(directory), whole=False)

    def __str__(self) -> str:
        return "/".join(self.components)


def _is_no_text(text: str) -> bool:
    """Half a surrogate pair, which no name has: JSON can write it."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return True
    return False


def parse(text: str) -> Glob:
    """Raises ValueError with the end of a sentence for what can match nothing in a sandbox."""
    if not text:
        raise ValueError("the pattern is empty")
    if text.startswith("/"):
        raise ValueError("the pattern begins with '/', but it is relative to the sandbox")
    if "\0" in text:
        raise ValueError("the pattern holds a NUL")
    if not text.isascii() and _is_no_text(text):
        raise ValueError("the pattern holds characters that are no text")
    components = tuple(part for part in text.split("/") if part not in {"", "."})
    if components[-1:] == (ANY_DEPTH,):
        components += ("*",)  # what is below, at any depth
    if not components:
        raise ValueError("the pattern names the sandbox itself; write '*' for what is in it")
    if ".." in components:
        raise ValueError("the pattern leads out of the sandbox with '..'")
    if len(components) > COMPONENTS_MAX:
        raise ValueError(f"the pattern has more than {COMPONENTS_MAX} components")
    return Glob(components)


def _matches(pattern: tuple[str, ...], path: tuple[str, ...], *, whole: bool) -> bool:
    """``whole`` False: whether something below ``path`` can match."""
    # Positions in the pattern that the components so far can have led to: each component is
    # looked at once for each of them, so many ** cost no more than their number.
    reached = _past_depths(pattern, {0})
    for component in path:
        following = set()
        for position in reached:
            if position == len(pattern):
                continue
            if pattern[position] == ANY_DEPTH:
                if not component.startswith("."):
                    following.add(position)
            elif _component_matches(pattern[position], component):
                following.add(position + 1)
        reached = _past_depths(pattern, following)
    end = len(pattern)
    return end in reached if whole else any(position < end for position in reached)


def _past_depths(pattern: tuple[str, ...], positions: set[int]) -> set[int]:
    """``**`` stands for no directory, too."""
    found = set(positions)
    for position in positions:
        step = position
        while step < len(pattern) and pattern[step] == ANY_DEPTH:
            step += 1
            found.add(step)
    return found


def _component_matches(pattern: str, component: str) -> bool:
    if component.startswith(".") and not pattern.startswith("."):
        return False
    return _compiled(pattern).match(component) is not None


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))
