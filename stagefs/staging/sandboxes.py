"""Sandboxes as objects: create, list, show, fail, remove.  Commit is ``commit``'s.

A directory is a sandbox when the namespace has a row for it: made by the API, by ``mkdir`` in
``tasks/`` or below a sandbox root.  The row's text (``Kept``) is ours: the manifest, and what
its inputs led to when they were linked; sandboxes from one template share their template's.

Life: active -> committed, or failed; a persistent one is active again after its commit.
Concurrency: trio thread.
"""

import json
import logging
import re
from collections.abc import Iterator

import msgspec
import trio

from stagefs.config import WorkspaceSettings
from stagefs.errors import Busy, InvalidName, NameExists, NotADirectory, NotFound, NotPermitted
from stagefs.model import Inode, OnWrite
from stagefs.namespace.node import (
    TASKS_INODE,
    TEMPLATES_INODE,
    ContentKind,
    Node,
    NodeKind,
    RenameFlags,
    SandboxRow,
)
from stagefs.namespace.store import Namespace
from stagefs.staging import values
from stagefs.staging.manifest import LeaseLifetime, Manifest, checked
from stagefs.staging.names import NameOperations
from stagefs.staging.sandbox_building import Building, Built
from stagefs.staging.sandbox_leases import SandboxLeases
from stagefs.staging.tree import STAGING, Place, Tree, parse_place
from stagefs.staging.values import InputState, ProgressCallback, SandboxState
from stagefs.staging.workers import Worker, has_ended
from stagefs.vfs.learning import Learning

log = logging.getLogger(__name__)

TASKS = "tasks"
TEMPLATE_STATE = "template"
COUNT_DIGITS = 6
# Names of modified files that ``show`` tells at most.
MODIFIED_MAX = 1000
# Sandboxes of earlier daemons whose tasks are read ahead of: reading a million texts takes long.
WATCHED_AGAIN_MAX = 1000
_LOOKED_AT_ONCE = 100
_PLAIN = re.compile(r"[^/]+")


class Kept(msgspec.Struct, frozen=True, omit_defaults=True):
    """The text of a row.  ``template``: the directory whose row has manifest and ``linked``."""

    manifest: Manifest = Manifest()
    linked: dict[str, int] = {}
    template: int = 0
    reason: str | None = None
    worker: Worker | None = None

    def text(self) -> str:
        return json.dumps(msgspec.to_builtins(self))

    @classmethod
    def read(cls, text: str) -> "Kept":
        return msgspec.convert(json.loads(text), cls) if text else cls()


class Found(msgspec.Struct, frozen=True):
    """A sandbox that somebody named."""

    place: Place
    node: Node
    row: SandboxRow
    kept: Kept

    @property
    def name(self) -> str:
        return name_of(self.place)


class SandboxOperations:
    def __init__(
        self,
        *,
        namespace: Namespace,
        names: NameOperations,
        tree: Tree,
        building: Building,
        leases: SandboxLeases,
        learning: Learning,
        hidden_links: dict[Inode, int],
        settings: WorkspaceSettings,
    ) -> None:
        """``hidden_links`` is kept: how many of a file's links are in templates, where nobody sees
        them."""
        self._namespace = namespace
        self._names = names
        self._tree = tree
        self._building = building
        self._leases = leases
        self._learning = learning
        self._on_write = OnWrite(settings.on_write)
        # Commits under way; the next daemon knows of none.
        self.committing: set[Inode] = set()
        self._edits_seen = -1
        self._hidden_links = hidden_links
        self._templates = {
            row.inode for row in namespace.sandboxes() if row.state == TEMPLATE_STATE
        }
        for template in self._templates:
            self._count_hidden(template, 1)

    # Making

    async def create(
        self, request: values.CreateSandbox, progress: ProgressCallback
    ) -> values.Sandbox:
        manifest = self._building.public(checked(request.manifest))
        place = parse_sandbox(request.name)
        parent = await self._tree.directory(place.above)
        there = await self._tree.find(place)
        if there is not None and request.worker is not None:
            there = await self._kept_for(request.worker, self._found(place, there))
        if there is not None and not (manifest.persistent and self._is_persistent(there)):
            raise NameExists(f"The sandbox {request.name} exists: remove it, or take another name.")
        parts = await self._building.find(checked(request.manifest), request.mirrored, progress)
        if there is not None:
            built = await self._building.fill(
                there.inode, place.name, parts, progress, replace=True
            )
            self._put(built, manifest, worker=request.worker)
        else:
            built = await self._building.build(parts, progress)
            try:
                self._put(built, manifest, worker=request.worker)
                self._namespace.rename(
                    TEMPLATES_INODE, built.name, parent.inode, place.name, RenameFlags.NOREPLACE
                )
            except BaseException:
                self._building.drop(built.name)
                raise
            self._names.changed(parent.inode, place.name)
        self._watch(built)
        await self._leases.hold(built.directory, place.name, manifest.lifetime, built.files)
        return self._described(self._found(place, self._namespace.node(built.directory)))

    async def _kept_for(self, worker: Worker, found: Found) -> Node | None:
        """The sandbox, if it is this worker's or nobody's.  One whose worker has ended is removed.

        Raises Busy when its worker is another one that runs."""
        before = found.kept.worker
        if before in (None, worker):
            return found.node
        if not has_ended(before):
            raise Busy(
                f"The sandbox {found.name} belongs to the program {before.pid}, which is running:"
                " take another name, or wait for its end."
            )
        await self.remove(values.OneSandbox(found.name))
        return None

    def _is_persistent(self, node: Node) -> bool:
        row = self._namespace.sandbox(node.inode)
        return row is not None and row.persistent and node.inode not in self.committing

    def _put(
        self,
        built: Built,
        manifest: Manifest,
        *,
        state: str = SandboxState.ACTIVE,
        worker: Worker | None = None,
    ) -> None:
        kept = Kept(manifest=manifest, linked=built.linked, worker=worker)
        self._namespace.put_sandbox(self._row(manifest, kept, state, built.directory))

    def _row(self, manifest: Manifest, kept: Kept, state: str, inode: Inode) -> SandboxRow:
        return SandboxRow(
            inode=inode,
            state=state,
            on_write=str(manifest.on_write or self._on_write),
            record=manifest.record,
            persistent=manifest.persistent,
            lifetime=str(manifest.lifetime),
            manifest=kept.text(),
        )

    async def create_many(
        self, request: values.CreateSandboxes, progress: ProgressCallback
    ) -> values.Sandboxes:
        """All of them, or none: one change of the namespace, whatever the number."""
        manifest = self._building.public(checked(request.manifest))
        places = numbered(request.name, request.count)
        parent = await self._tree.directory(places[0].above)
        for place in places:
            if await self._tree.find(place) is not None:
                raise NameExists(f"The sandbox {name_of(place)} exists: take another name.")
        parts = await self._building.find(checked(request.manifest), request.mirrored, progress)
        template = await self._building.build(parts, progress)
        try:
            self._put(template, manifest, state=TEMPLATE_STATE)
            self._templates.add(template.directory)
            kept = Kept(template=template.directory)
            row = self._row(manifest, kept, SandboxState.ACTIVE, Inode(0))
            nodes = self._namespace.instantiate_template(
                template.directory,
                parent.inode,
                [place.name for place in places],
                sandbox=row,
            )
        except BaseException:
            self._building.drop(template.name)
            raise
        self._count_hidden(template.directory, 1)
        for node in template.files:
            self._names.attributes_changed(node.inode)
        self._names.many_changed(parent.inode, [place.name for place in places])
        self._watch(template)
        await self._leases.hold(template.directory, request.name, manifest.lifetime, template.files)
        return values.Sandboxes(
            [
                self._described(Found(place, node, row, kept))
                for place, node in zip(places, nodes, strict=True)
            ]
        )

    def _watch(self, built: Built) -> None:
        links = {name: Inode(inode) for name, inode in built.linked.items()}
        self._learning.watch(built.directory, links)

    async def watch_again(self) -> None:
        """Once per daemon: the youngest sandboxes and templates of earlier ones go on, but what
        their tasks had used before is not known any more."""
        for row in self._namespace.sandboxes()[-WATCHED_AGAIN_MAX:]:
            await trio.lowlevel.checkpoint()
            if row.state in (SandboxState.ACTIVE, TEMPLATE_STATE) and '"linked"' in row.manifest:
                linked = Kept.read(row.manifest).linked
                links = {name: Inode(inode) for name, inode in linked.items()}
                self._learning.watch(row.inode, links, is_whole=False)

    def _count_hidden(self, template: Inode, times: int) -> None:
        for inode, count in self._namespace.own_links(template).items():
            left = self._hidden_links.pop(inode, 0) + times * count
            if left > 0:
                self._hidden_links[inode] = left

    # Looking

    async def find(self, name: str) -> Found:
        """Raises NotFound, NotADirectory, InvalidName."""
        place = parse_sandbox(name)
        node = await self._tree.node(place)
        if node.kind is not NodeKind.DIRECTORY:
            raise NotADirectory(f"{place} is not a directory, so it is no sandbox.")
        return self._found(place, node)

    def _found(self, place: Place, node: Node) -> Found:
        row = self._namespace.sandbox(node.inode)
        if row is None:
            if place.parts[:-1] != (TASKS,):
                raise NotFound(
                    f"{place} is no sandbox: those in tasks/ are, those below [workspace]"
                    " sandbox_roots, and those that `stagefs sandbox create` makes."
                )
            row = self._row(Manifest(), Kept(), SandboxState.ACTIVE, node.inode)
        return Found(place, node, row, self._whole(Kept.read(row.manifest)))

    def _whole(self, kept: Kept) -> Kept:
        """With what the template's row has."""
        if not kept.template:
            return kept
        row = self._namespace.sandbox(Inode(kept.template))
        shared = Kept.read(row.manifest) if row is not None else Kept()
        return msgspec.structs.replace(kept, manifest=shared.manifest, linked=shared.linked)

    def _described(self, found: Found) -> values.Sandbox:
        row = found.row
        state = SandboxState(row.state)
        if found.node.inode in self.committing:
            state = SandboxState.COMMITTING
        return values.Sandbox(
            name=found.name,
            path=str(found.place),
            state=state,
            on_write=OnWrite(row.on_write),
            persistent=row.persistent,
            created_ns=row.created_ns or found.node.ctime_ns,
            changed_ns=row.changed_ns or found.node.ctime_ns,
        )

    async def listed(self, request: values.ListSandboxes) -> values.SandboxPage:
        """In the order of their inodes, which is that of their making."""
        limit = max(1, min(request.limit, values.PAGE_ENTRIES_MAX))
        rows = [
            row
            for row in self._namespace.sandboxes()
            if row.inode > request.after and row.state != TEMPLATE_STATE
        ]
        found = []
        for row in rows[:limit]:
            if self._namespace.is_removed(row.inode):
                continue
            place = parse_place(self._namespace.path(row.inode))
            found.append(
                self._described(Found(place, self._namespace.node(row.inode), row, Kept()))
            )
        more = rows[limit - 1].inode if len(rows) > limit else None
        return values.SandboxPage(found, after=more)

    async def show(self, found: Found) -> values.SandboxDetails:
        inputs = [
            values.SandboxInput(name, url, await self._input_state(found, name))
            for name, url in found.kept.manifest.inputs.items()
        ]
        return values.SandboxDetails(
            sandbox=self._described(found),
            manifest=found.kept.manifest,
            lifetime=LeaseLifetime(found.row.lifetime or LeaseLifetime.TASK),
            inputs=inputs,
            modified=await self._modified(found),
            commits=[
                record_from(row.record)
                for row in self._namespace.commits(f"/{'/'.join(found.place.parts)}")
            ],
            leases=self._leases.count(Inode(found.kept.template) or found.node.inode),
            reason=found.kept.reason,
            template=bool(found.kept.template),
            worker=found.kept.worker,
        )

    async def _input_state(self, found: Found, name: str) -> InputState:
        try:
            node = await self._tree.node(Place((*found.place.parts, *name.split("/")), False))
        except (NotFound, NotADirectory):
            return InputState.REMOVED
        linked = found.kept.linked.get(name)
        if linked in (node.inode, node.lower or None) and node.content is not ContentKind.PRIVATE:
            return InputState.LINKED
        if node.kind is not NodeKind.FILE:
            shown = self._namespace.node(node.lower) if node.lower else None
            is_input = shown is not None and linked in (shown.inode, shown.lower)
            return InputState.LINKED if is_input else InputState.REPLACED
        if node.content is ContentKind.OBJECT:
            # The name moved on to a newer version, or leads to another link.
            before = self._namespace.newest(Inode(linked)) if linked else None
            is_newer = before is not None and before.inode == node.inode
            return InputState.LINKED if is_newer else InputState.REPLACED
        return InputState.MODIFIED

    async def _modified(self, found: Found) -> list[str]:
        """Files that the task has a copy of its own of, as paths in the sandbox."""
        top = f"{self._namespace.path(found.node.inode)}/"
        modified = []
        for inode in self._namespace.private_files(found.node.inode):
            node = self._namespace.node(inode)
            if node.object_id is not None or node.lower:
                modified.append(self._namespace.path(inode).removeprefix(top))
                await trio.lowlevel.checkpoint()
            if len(modified) >= MODIFIED_MAX:
                break
        return sorted(modified)

    # Ending

    async def fail(self, request: values.FailSandbox) -> values.Sandbox:
        found = await self.find(request.name)
        self.refuse_committing(found)
        if found.row.state == SandboxState.COMMITTED:
            raise NotPermitted(
                f"The sandbox {found.name} is committed: its outputs are published and cannot be"
                " taken back; remove them by their names."
            )
        kept = msgspec.structs.replace(Kept.read(found.row.manifest), reason=request.reason)
        self._namespace.put_sandbox(
            msgspec.structs.replace(found.row, state=SandboxState.FAILED, manifest=kept.text())
        )
        self._learning.ended(found.node.inode)
        await self._leases.end(found.node.inode)
        return self._described(self._found(found.place, found.node))

    def refuse_committing(self, found: Found) -> None:
        if found.node.inode in self.committing:
            raise Busy(f"The sandbox {found.name} is being committed: wait for the end of that.")

    async def remove(self, request: values.OneSandbox) -> values.Removed:
        found = await self.find(request.name)
        self.refuse_committing(found)
        place = f"/{'/'.join(found.place.parts)}"
        removed = await self._names.remove(values.RemoveName(path=place, recursive=True))
        self._learning.ended(found.node.inode)
        await self._leases.end(found.node.inode)
        await self.keep_house()
        return removed

    async def keep_house(self) -> None:
        """End the leases of sandboxes that were removed by ``rm -r``, and forget templates whose
        last sandbox is gone.  Cheap when no name has changed since."""
        if self._edits_seen == self._namespace.edits:
            return
        self._edits_seen = self._namespace.edits
        for template in [*self._templates]:
            if not self._namespace.overlays(template):
                self._templates.discard(template)
                self._count_hidden(template, -1)
                self._drop_template(template)
        over = []
        for count, inode in enumerate({*self._leases.held, *self._learning.sandboxes}):
            row = self._namespace.sandbox(inode)
            if row is None or row.state not in (SandboxState.ACTIVE, TEMPLATE_STATE):
                over.append(inode)
            if count % _LOOKED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        for inode in over:
            self._learning.ended(inode)
            await self._leases.end(inode)

    def _drop_template(self, template: Inode) -> None:
        if self._namespace.is_removed(template):  # ``sweep`` was faster
            return
        self._building.drop(self._namespace.path(template).rpartition("/")[2])

    async def begin_mount(self) -> None:
        """What an earlier mount left: half built directories, leases of its pilot, sandboxes whose
        worker has ended."""
        self._building.sweep()
        for node in self._tasks():
            if self._namespace.sandbox(node.inode) is None:  # of a mount before there were rows
                self._namespace.put_sandbox(
                    self._row(Manifest(), Kept(), SandboxState.ACTIVE, node.inode)
                )
        await self._leases.begin_mount()
        await self._collect()
        await self.keep_house()

    async def _collect(self) -> None:
        """Remove the sandboxes whose workers have ended, but those that failed: they are kept to
        be looked at."""
        for row in [*self._namespace.sandboxes()]:
            # Most have none; reading a million texts would keep the mount waiting.
            if '"worker"' not in row.manifest or row.state == SandboxState.FAILED:
                continue
            worker = Kept.read(row.manifest).worker
            gone = self._namespace.is_removed(row.inode)
            if worker is not None and not gone and has_ended(worker):
                path = self._namespace.path(row.inode)
                log.info("%s is removed: its program %d has ended", path, worker.pid)
                await self.remove(values.OneSandbox(path))

    def _tasks(self) -> Iterator[Node]:
        after = 0
        while page := self._namespace.page(TASKS_INODE, after, values.PAGE_ENTRIES_MAX):
            after = page[-1][0]
            yield from (node for _, _, node in page if node.kind is NodeKind.DIRECTORY)


def parse_sandbox(name: str) -> Place:
    """A name in ``tasks/``, or the path of a directory in the mount.  Raises InvalidName."""
    place = parse_place(name if name.startswith("/") else f"/{TASKS}/{name}")
    is_plain = name.startswith("/") or _PLAIN.fullmatch(name)
    if not is_plain or len(place.parts) < 2 or place.parts[0] == STAGING:
        raise InvalidName(
            f"{name!r} cannot be a sandbox: write one component, for tasks/NAME, or the path of a"
            " directory in the mount that is not in staging/."
        )
    return Place(place.parts, is_directory=False)


def name_of(place: Place) -> str:
    in_tasks = len(place.parts) == 2 and place.parts[0] == TASKS
    return place.parts[1] if in_tasks else str(place)


def numbered(name: str, count: int) -> list[Place]:
    top = parse_sandbox(name)
    return [top.above.below(f"{top.name}.{number:0{COUNT_DIGITS}}") for number in range(count)]


def record_from(text: str) -> values.CommitRecord:
    return msgspec.convert(json.loads(text), values.CommitRecord)
