"""Directories that show another one: how a name in them is found, and in which order.

An overlay directory has ``lower``, the inode of the directory it shows.  Its own rows in
``names`` override, a row with inode 0 hides.  Files and symlinks of the lower directory are
shown with their own inodes, so that all places share the kernel's page cache; a subdirectory
gets a node of its own in each place (a shared directory inode makes the kernel move the
dentry under a task's feet), made by ``Edit.show`` when it is first seen and marked SHOWN.

What happens when the lower directory changes:
* A name that vanishes there vanishes here, a new one appears here.
* A SHOWN subdirectory counts as the lower one's: it is there as long as the lower directory
  has the very same subdirectory under that name.  Once something below it was created,
  removed or renamed in this place (KEPT), it stays, and shows of the vanished one nothing.
* A lower directory that is removed leaves the overlay with its own names.
No directory is shown below itself: such an entry is left out, so that every walk ends.
(But not what a sandbox shows of its template's own directories, which end by themselves.)

Reading only.  Pages merge own and lower names by ``place``, which is unique in the whole
namespace: a SHOWN directory is listed at the place of the lower one's.
"""

import heapq
from collections.abc import Iterator

import msgspec

from stagefs.model import Inode
from stagefs.namespace.node import Node, NodeKind
from stagefs.namespace.rows import SHOWN, OwnName, Rows

_FETCH_ROWS = 256


class Entry(msgspec.Struct, frozen=True, gc=False):
    """What a name leads to.

    ``own``: a row of the directory says so.  Else the directory below has it; ``counted``
    then tells whether showing it counts in the node's ``nlink``, and a directory still has to
    get a node of its own.  ``flags`` are those of the own row.
    """

    node: Node
    place: int
    own: bool
    counted: bool
    flags: int = 0


def find(rows: Rows, directory: Node, name: bytes) -> Entry | None:
    """The visible entry of a name, without regard to loops (see ``loops``)."""
    own = rows.own(directory.inode, name)
    below: Entry | None = None
    if own is not None:
        if own.node is None:
            return None
        if own.flags & 7 != SHOWN:
            return Entry(own.node, own.place, own=True, counted=False, flags=own.flags)
        below = _find_below(rows, directory, name)
        if below is not None and own.node.lower == below.node.inode:
            return Entry(own.node, below.place, own=True, counted=False, flags=own.flags)
        # What it showed is gone, or is another one now.
        return below
    return _find_below(rows, directory, name)


def _find_below(rows: Rows, directory: Node, name: bytes) -> Entry | None:
    if not directory.lower:
        return None
    lower = rows.node(directory.lower)
    if lower is None:
        return None
    below = find(rows, lower, name)
    if below is None:
        return None
    return Entry(below.node, below.place, own=False, counted=directory.counted)


def loops(rows: Rows, directory: Inode, shown: Inode) -> bool:
    """Whether showing ``shown`` in ``directory`` would show a directory below itself."""
    candidates = set(rows.chain(shown))
    return any(
        candidates.intersection(rows.chain(ancestor)) for ancestor in rows.ancestors(directory)
    )


def view(rows: Rows, directory: Node, after: int) -> Iterator[tuple[int, bytes, Entry]]:
    """The visible names of an overlay directory from a place on, in the order of places."""
    if not directory.lower:
        yield from _own(rows, directory, after)
        return
    lower = rows.node(directory.lower)
    own = _own(rows, directory, after)
    if lower is None:
        yield from own
    elif not rows.has_names(directory.inode):
        yield from _through(view(rows, lower, after), directory)
    else:
        below = _not_hidden(rows, directory, view(rows, lower, after))
        yield from heapq.merge(own, below, key=_place)


def _place(item: tuple[int, bytes, Entry]) -> int:
    return item[0]


def _own(rows: Rows, directory: Node, after: int) -> Iterator[tuple[int, bytes, Entry]]:
    while True:
        page = rows.page_with_flags(directory.inode, after, _FETCH_ROWS)
        for place, name, flags, node in page:
            # SHOWN ones are listed where the lower directory lists them.
            if flags & 7 != SHOWN:
                yield place, name, Entry(node, place, own=True, counted=False, flags=flags)
        if len(page) < _FETCH_ROWS:
            return
        after = page[-1][0]


def _through(
    names: Iterator[tuple[int, bytes, Entry]], directory: Node
) -> Iterator[tuple[int, bytes, Entry]]:
    counted = directory.counted
    for place, name, entry in names:
        yield place, name, Entry(entry.node, place, own=False, counted=counted)


def _not_hidden(
    rows: Rows, directory: Node, names: Iterator[tuple[int, bytes, Entry]]
) -> Iterator[tuple[int, bytes, Entry]]:
    counted = directory.counted
    for place, name, entry in names:
        own: OwnName | None = rows.own(directory.inode, name)
        if own is None:
            yield place, name, Entry(entry.node, place, own=False, counted=counted)
        elif own.flags & 7 == SHOWN and own.node is not None:
            if own.node.lower == entry.node.inode:
                yield place, name, Entry(own.node, place, own=True, counted=False, flags=own.flags)
            else:
                yield place, name, Entry(entry.node, place, own=False, counted=counted)


def needs_node(entry: Entry) -> bool:
    """Whether it is another place's directory, which still has to get a node here."""
    return not entry.own and entry.node.kind is NodeKind.DIRECTORY


def is_empty(rows: Rows, directory: Node) -> bool:
    if not directory.lower:
        # A row with inode 0 joins no node.
        return not rows.page(directory.inode, 0, 1)
    return all(
        needs_node(entry) and _left_out(rows, directory, name, entry.node)
        for _, name, entry in view(rows, directory, 0)
    )


def _left_out(rows: Rows, directory: Node, name: bytes, shown: Node) -> bool:
    """Whether showing it would loop, here or in the directory that it is shown from."""
    while not (directory.counted and shown.frozen):
        if loops(rows, directory.inode, shown.inode):
            return True
        lower = rows.node(directory.lower)
        if lower is None or not lower.lower or rows.own(lower.inode, name) is not None:
            return False
        directory = lower
    return False
