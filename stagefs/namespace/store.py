"""Namespace: the persistent tree of names that the mount shows.

It holds every name but those of ``.stagefs/``: the root with ``staging/`` and ``tasks/``, made
with the file, and what users make.  It knows nothing of content, remotes or requests.

Concurrency: all methods but ``checkpoint`` run in one thread (the trio thread) and never wait
for anything but the disk and, for at most some milliseconds, an import that writes in a process
of its own.  Each change is one transaction and one row of the change log.  Nodes and names
that were asked for are remembered in memory, ``known_max`` at most, and forgotten when they
change; ``refresh`` forgets all, after another process changed the file.

``operation`` is the number of a request that the kernel may send again when a daemon dies: it
is stored in the transaction of the change itself, so ``applied`` knows.

Errors: what each change raises is what the system call of that name does; StateFailed and
NoSpace when the disk fails.  Names are ``str`` with surrogateescape; InvalidName and
NameTooLong for those that can be none.
"""

from collections.abc import Sequence

import msgspec

from stagefs.model import Inode, ListedEntry
from stagefs.namespace import bound, contents, names, removal, sandbox_rows, templates, versions
from stagefs.namespace.node import Node, NodeKind, SandboxRow, StagedObject
from stagefs.namespace.replicas import Replicated


class Namespace(Replicated):
    """See the module's docstring.  ``uid`` and ``gid`` -1: whoever mounted."""

    # Changing names

    def make_directory(
        self,
        parent: Inode,
        name: str,
        mode: int = 0o755,
        *,
        uid: int = -1,
        gid: int = -1,
        sandbox: SandboxRow | None = None,
        operation: int | None = None,
    ) -> Node:
        """``sandbox``: it is one from the start (whatever inode the row says)."""
        with self._change("make_directory", operation) as edit:
            inode = names.make_directory(edit, parent, name, mode, uid=uid, gid=gid, row=sandbox)
        return self._named(parent, name, inode)

    def make_symlink(
        self,
        parent: Inode,
        name: str,
        target: str,
        *,
        uid: int = -1,
        gid: int = -1,
        operation: int | None = None,
    ) -> Node:
        with self._change("make_symlink", operation) as edit:
            inode = names.make_symlink(edit, parent, name, target, uid=uid, gid=gid)
        return self._named(parent, name, inode)

    def make_special(
        self,
        parent: Inode,
        name: str,
        kind: NodeKind,
        mode: int,
        *,
        rdev: int = 0,
        uid: int = -1,
        gid: int = -1,
        operation: int | None = None,
    ) -> Node:
        """``kind``: one of SPECIAL_KINDS; ``rdev`` is the number of a device."""
        with self._change("make_special", operation) as edit:
            inode = contents.make_special(
                edit, parent, name, kind, mode, rdev=rdev, uid=uid, gid=gid
            )
        return self._named(parent, name, inode)

    def link(
        self,
        inode: Inode,
        parent: Inode,
        name: str,
        *,
        publish: bool = False,
        operation: int | None = None,
    ) -> Node:
        """A further name of a file or symlink.  Raises NotPermitted for directories.

        ``publish``: a private file never changes from now on."""
        with self._change("link", operation) as edit:
            names.link(edit, inode, parent, name, publish=publish)
        return self._named(parent, name, inode)

    def link_directory(
        self, target: Inode, parent: Inode, name: str, *, operation: int | None = None
    ) -> Node:
        """A directory that shows ``target`` and keeps its own changes to itself."""
        with self._change("link_directory", operation) as edit:
            inode = names.link_directory(edit, target, parent, name)
        return self._named(parent, name, inode)

    def rename(
        self,
        parent: Inode,
        name: str,
        new_parent: Inode,
        new_name: str,
        flags: int = 0,
        *,
        publish: bool = False,
        operation: int | None = None,
    ) -> Node:
        """``flags``: RenameFlags.  A file or empty directory at the new name is replaced.

        ``publish``: what moves, and private files in it, never change from now on."""
        with self._change("rename", operation) as edit:
            inode = names.rename(edit, parent, name, new_parent, new_name, flags, publish=publish)
        return self.node(inode)

    def remove(self, parent: Inode, name: str, *, operation: int | None = None) -> Node:
        """Take away the name of a file or symlink; the node, whose ``nlink`` may be 0 now."""

        def change() -> Inode:
            with self._change("remove", operation) as edit:
                return names.remove(edit, parent, name)

        return self.node(self._making_room(change))

    def remove_directory(self, parent: Inode, name: str, *, operation: int | None = None) -> Node:
        def change() -> Inode:
            with self._change("remove_directory", operation) as edit:
                return names.remove_directory(edit, parent, name)

        return self.node(self._making_room(change))

    def remove_tree(self, parent: Inode, name: str, *, operation: int | None = None) -> Node:
        """Take away a name with all below it, at once; see ``purge`` for the rest of large ones.

        Raises Busy for a template of sandboxes that still exist.
        """

        def change() -> Inode:
            with self._change("remove_tree", operation) as edit:
                return removal.remove_tree(edit, parent, name)

        return self.node(self._making_room(change))

    def purge(self) -> bool:
        """One short step of removing what large trees left.  True when there is more."""
        with self._reading():
            if self._rows.one("SELECT 1 FROM doomed LIMIT 1") is None:
                return False

        def change() -> bool:
            with self._transaction() as edit:
                return removal.purge(edit)

        return self._making_room(change)

    def drop_unlinked(
        self, inodes: Sequence[Inode] | None = None, *, limit: int = removal.PURGE_ROWS
    ) -> list[Inode]:
        """Forget nodes whose last name is gone, when the kernel has forgotten them.

        None: any, for when a mount begins.  The inodes that were dropped.
        """

        def change() -> list[Inode]:
            with self._transaction() as edit:
                return removal.drop_unlinked(edit, None if inodes is None else list(inodes), limit)

        return self._making_room(change)

    def instantiate_template(
        self,
        template: Inode,
        parent: Inode,
        names: Sequence[str],
        *,
        sandbox: SandboxRow | None = None,
        operation: int | None = None,
    ) -> list[Node]:
        """A directory for each name, showing what is in the directory ``template``, which cannot
        change from now on.  Make templates in TEMPLATES_INODE, where no path leads.

        ``sandbox``: each is one from the start (whatever inode the row says)."""
        with self._change("instantiate_template", operation) as edit:
            inodes = templates.instantiate(edit, template, parent, names, sandbox)
            nodes = [edit.node(inode) for inode in inodes]
            # Nobody has looked into them yet: thousands would fill the memory for nothing.
            for inode in inodes:
                edit.changed(inode)
        return nodes

    def own_links(self, template: Inode) -> dict[Inode, int]:
        """How many names each file has in a template itself, where nobody sees them."""
        with self._reading():
            return templates.own_links(self._rows, template)

    # What names lead to

    def register(
        self, parent: Inode, name: str, staged: StagedObject, *, operation: int | None = None
    ) -> Node:
        with self._change("register", operation) as edit:
            inode = versions.register(edit, parent, name, staged)
        return self._named(parent, name, inode)

    def register_many(
        self,
        wanted: Sequence[tuple[Inode, str, StagedObject]],
        *,
        operation: int | None = None,
    ) -> list[Node]:
        """(directory, name, object) each; all of them or none."""
        with self._change("register_many", operation) as edit:
            inodes = versions.register_many(edit, wanted)
        return [self.node(inode) for inode in inodes]

    def replace(
        self, parent: Inode, name: str, staged: StagedObject, *, operation: int | None = None
    ) -> Node:
        """The name leads to a new node; other links of the old one keep it.  Raises NotFound."""
        with self._change("replace", operation) as edit:
            inode = versions.replace(edit, parent, name, staged)
        return self._named(parent, name, inode)

    def supersede(
        self, inode: Inode, staged: StagedObject, *, operation: int | None = None
    ) -> Node:
        """The remote has a newer version: names inside ``staging/`` lead to it at once, others
        find it as the old node's ``successor`` (see ``rebind_name``).  The new node."""
        with self._change("supersede", operation) as edit:
            new = versions.supersede(edit, inode, staged)
        return self.node(new)

    def rebind_name(
        self, parent: Inode, name: str, inode: Inode, *, operation: int | None = None
    ) -> Node:
        """One name moves to the newest version that follows ``inode``."""
        with self._change("rebind_name", operation) as edit:
            new = versions.rebind(edit, parent, name, inode)
        return self._named(parent, name, new)

    def set_validator(
        self,
        inode: Inode,
        validator: str,
        *,
        checked_ns: int,
        ranges: bool | None = None,
        operation: int | None = None,
    ) -> Node:
        """What the remote said at first contact."""
        with self._change("set_validator", operation) as edit:
            versions.set_validator(edit, inode, validator, checked_ns=checked_ns, ranges=ranges)
        return self.node(inode)

    def set_validators(self, told: Sequence[tuple[Inode, str]], *, checked_ns: int) -> None:
        """First contact with many small objects at once: (inode, validator) of each."""
        with self._change("set_validators", None) as edit:
            versions.set_validators(edit, told, checked_ns=checked_ns)
            nodes = [(self._known.nodes.get(inode), validator) for inode, validator in told]
        # Their readers wait, and come next: what was known of them is known still.
        for node, validator in nodes:
            if node is not None:
                self._known.add_node(
                    msgspec.structs.replace(node, validator=validator, checked_ns=checked_ns)
                )

    # What only this node has learnt is not in the change log.

    def touch_checked(self, inode: Inode, checked_ns: int) -> Node:
        """The remote confirmed the version at that time; 0: it must be asked again."""
        with self._transaction() as edit:
            edit.run("UPDATE nodes SET checked_ns = ? WHERE inode = ?", (checked_ns, inode))
            edit.changed(inode)
        return self.node(inode)

    def set_ranges_refused(self, inode: Inode) -> None:
        """The server sends whole objects only."""
        with self._transaction() as edit:
            edit.run("UPDATE nodes SET flags = flags | 1 WHERE inode = ?", (inode,))
            edit.changed(inode)

    # Local files, and attributes

    def create_file(
        self,
        parent: Inode,
        name: str,
        mode: int,
        *,
        uid: int = -1,
        gid: int = -1,
        operation: int | None = None,
    ) -> Node:
        """An empty private file.  Raises ReadOnly directly in a bound directory that is not
        writable."""
        with self._change("create_file", operation) as edit:
            inode = contents.create_file(edit, parent, name, mode, uid=uid, gid=gid)
        return self._named(parent, name, inode)

    def copy_up(
        self,
        parent: Inode,
        name: str,
        inode: Inode,
        *,
        keep_content: bool = True,
        live: Node | None = None,
        for_all: bool = False,
        operation: int | None = None,
    ) -> Node:
        """The name, which leads to the object or published file ``inode``, leads to a new private
        file from now on, which shows that one's content; without ``keep_content`` it is empty.
        ``for_all``: all other names do, too.

        ``live``: the shared file as it is, when its size and times are those of a real file.
        Raises NotFound when the name leads elsewhere.  The directory's times stay.
        """
        with self._change("copy_up", operation) as edit:
            copied = contents.copy_up(
                *(edit, parent, name, inode),
                keep_content=keep_content,
                live=live,
                for_all=for_all,
            )
        return self._named(parent, name, copied)

    def publish(self, inodes: Sequence[Inode], *, operation: int | None = None) -> None:
        """Private files of these never change from now on."""
        with self._change("publish", operation) as edit:
            contents.publish(edit, list(inodes))
            edit.log(Inode(0), inodes=list(inodes))

    def set_attributes(
        self,
        inode: Inode,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        base_bytes: int | None = None,
        size_bytes: int | None = None,
        operation: int | None = None,
    ) -> Node:
        """``base_bytes`` only ever becomes less.  It and ``size_bytes`` leave ``ctime_ns`` as it
        is: the real file has its own."""
        with self._change("set_attributes", operation) as edit:
            contents.set_attributes(
                edit,
                inode,
                mode=None if mode is None else mode & 0o7777,
                uid=uid,
                gid=gid,
                atime_ns=atime_ns,
                mtime_ns=mtime_ns,
                base_bytes=base_bytes,
                size_bytes=size_bytes,
            )
        return self.node(inode)

    def set_xattr(
        self, inode: Inode, name: bytes, value: bytes, *, operation: int | None = None
    ) -> None:
        with self._change("set_xattr", operation) as edit:
            contents.set_xattr(edit, inode, name, value)

    def remove_xattr(self, inode: Inode, name: bytes, *, operation: int | None = None) -> None:
        """Raises NoAttribute."""
        with self._change("remove_xattr", operation) as edit:
            contents.remove_xattr(edit, inode, name)

    # Sandboxes

    def put_sandbox(self, row: SandboxRow, *, operation: int | None = None) -> SandboxRow:
        """The directory ``row.inode`` is a sandbox, until it is removed; the row as it was kept,
        with its times."""
        with self._change("put_sandbox", operation) as edit:
            sandbox_rows.put(edit, row)
        return self._sandbox_row(row.inode)

    def commit_sandbox(
        self,
        inode: Inode,
        commit_id: str,
        record: str,
        *,
        state: str,
        publish: Sequence[Inode] = (),
        links: Sequence[tuple[Inode, str, Inode]] = (),
        replace: bool = False,
        operation: int | None = None,
    ) -> SandboxRow:
        """All of it or nothing: private files of ``publish`` never change from now on, ``links``
        (directory, name, file) are made, the sandbox gets its state, the record is kept.

        Raises NameExists for a name that is there (unless ``replace``), and for a commit that
        was made already.  Durable after ``sync``.
        """
        with self._change("commit_sandbox", operation) as edit:
            sandbox_rows.commit(
                edit,
                inode,
                commit_id,
                record,
                state=state,
                publish=publish,
                links=links,
                replace=replace,
            )
        return self._sandbox_row(inode)

    def _sandbox_row(self, inode: Inode) -> SandboxRow:
        row = self.sandbox(inode)
        assert row is not None, "it was stored just now"
        return row

    # Bound directories

    def bind(
        self,
        parent: Inode,
        name: str,
        url: str,
        ttl_s: float,
        *,
        mode: int = 0o755,
        writable: bool = False,
        overwrites: bool = False,
        deletes: bool = False,
        operation: int | None = None,
    ) -> Node:
        """``writable``: what is published in it and below is to be uploaded (``due_uploads``);
        ``overwrites`` in place of what is there, too; with ``deletes`` what is removed is to be
        removed there."""
        with self._change("bind", operation) as edit:
            inode = bound.bind(
                *(edit, parent, name, url, ttl_s),
                mode=mode,
                writable=writable,
                overwrites=overwrites,
                deletes=deletes,
            )
        return self._named(parent, name, inode)

    def merge_listing(
        self,
        directory: Inode,
        entries: Sequence[ListedEntry],
        *,
        now_ns: int,
        default_mode: int = 0o644,
    ) -> list[str]:
        """The remote's listing as of ``now_ns``; the known names that lead elsewhere now.

        Raises NotFound, NotADirectory when the directory is gone or not bound.
        """
        with self._change("merge_listing", None) as edit:
            return bound.merge_listing(
                edit, directory, entries, now_ns=now_ns, default_mode=default_mode
            )

    def add_found(self, directory: Inode, name: str, found: StagedObject | str) -> Node:
        """A name that the remote turned out to have: a file, or the URL of a directory.

        What a user made under that name stays.  Raises NotFound when a user removed the name.
        """
        with self._change("add_found", None) as edit:
            inode = bound.add_found(edit, directory, name, found)
        return self.node(inode)
