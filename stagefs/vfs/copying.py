"""Writes that meet a shared file: whose copy they go to.

A request to write names only the inode, which all links of the file share.  It is answered
with ESTALE; the kernel then walks the path again, so the same thread asks for (directory,
name), and now it is known which link is meant (DESIGN section 3).  What that name's place
says decides: a private copy, a refusal, or a new version for everybody.

``pending`` outlives the daemon: a kill between the ESTALE and the repeated lookup changes
nothing.  Concurrency: trio thread, never waits.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from stagefs.errors import NoOverwrite, ReadOnly, RepeatLookup, StageFSError
from stagefs.model import Inode, OnWrite
from stagefs.namespace.node import ContentKind, Node
from stagefs.namespace.store import Namespace

log = logging.getLogger(__name__)

# The kernel finds out about more names of a new version when they are opened.
NAMES_TOLD_MAX = 2000


class Pending(Protocol):
    """Threads that were told to walk again because they want to write."""

    def __bool__(self) -> bool: ...

    def put_copy_up(self, thread: int, inode: Inode) -> bool: ...

    def sent_back(self, thread: int) -> Inode | None: ...

    def wants_copy_up(self, thread: int, inode: Inode) -> bool: ...

    def drop(self, thread: int) -> None: ...

    def put_record(self, thread: int, inode: Inode) -> bool: ...

    def wants_record(self, thread: int, inode: Inode) -> bool: ...

    def asked_name(self, thread: int) -> bool: ...

    def grant(self, thread: int, inode: Inode, sandbox: Inode) -> None: ...

    def granted(self, thread: int, inode: Inode) -> Inode | None: ...


class Copying:
    def __init__(
        self,
        *,
        namespace: Namespace,
        pending: Pending,
        default: OnWrite,
        live: Callable[[Node], Node],
        links_changed: Callable[[Inode], None],
        name_changed: Callable[[Inode, str], None],
    ) -> None:
        """``live``: a published file with its size and times.  ``links_changed``: the kernel's
        idea of an inode's link count is out of date; ``name_changed``: that of a name in a
        directory is."""
        self._namespace = namespace
        self.pending = pending
        self._default = default
        self._live = live
        self._links_changed = links_changed
        self._name_changed = name_changed
        self.copied = 0

    def walk_again(self, node: Node, thread: int) -> StageFSError:
        """The error for a request that wants to write to a shared file."""
        if self.pending.put_copy_up(thread, node.inode):
            return RepeatLookup(f"inode {node.inode} is shared: the name is wanted")
        return ReadOnly(
            f"{self._path(node.inode)} cannot be copied for a writer in another PID namespace "
            "than the mount's: run the task in the mount's namespace, or copy the file first."
        )

    def refusal(self, inode: Inode, thread: int) -> ReadOnly | None:
        """What a thread gets that walked again and whose name may not be written to; to be asked
        before what is pending is dropped."""
        if not self.pending or self.pending.granted(thread, inode) is None:
            return None
        place = self._namespace.place(inode)
        if place is not None and self._namespace.node(place[0]).writable:
            return NoOverwrite(
                f"{self._path(inode)} exists at its remote, which was bound without --overwrite:"
                " write to another name."
            )
        return ReadOnly(
            f"{self._path(inode)} is an input of a read-only sandbox: write to another name."
        )

    def resolve(self, parent: Inode, name: str, node: Node, thread: int) -> Node:
        """The node that the name leads to from now on, for a thread that wants to write."""
        if node.content is not ContentKind.PRIVATE:
            policy = self._policy(parent, name)
            if policy is OnWrite.READ_ONLY:
                # An error here would make the kernel look up once more and then give up with
                # ESTALE: the request itself is refused when it comes again.
                self.pending.grant(thread, node.inode, Inode(0))
                return node
            shared = policy is OnWrite.SHARED and node.content is ContentKind.PUBLISHED
            made = self._namespace.copy_up(
                parent,
                name,
                node.inode,
                live=None if node.content is ContentKind.OBJECT else self._live(node),
                for_all=shared,
            )
            self.copied += 1
            self._links_changed(node.inode)
            if shared:
                for directory, other in self._namespace.shown(made.inode, NAMES_TOLD_MAX):
                    if (directory, other) != (parent, name):
                        self._name_changed(directory, other)
            node = made
        self.pending.drop(thread)
        return node

    def _policy(self, parent: Inode, name: str) -> OnWrite:
        directory = self._namespace.node(parent)
        if directory.writable:
            if not directory.overwrites and self._namespace.is_at_remote(parent, name):
                return OnWrite.READ_ONLY
            return OnWrite.SHARED if self._default is OnWrite.SHARED else OnWrite.COPY_UP
        sandbox = self._namespace.sandbox_of(parent)
        return self._default if sandbox is None else OnWrite(sandbox.on_write)

    def _path(self, inode: Inode) -> str:
        try:
            return self._namespace.path(inode)
        except StageFSError:
            return f"inode {inode}"
