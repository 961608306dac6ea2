"""Sandboxes as objects: made from manifests, mirrors and templates; seen; ended."""

import subprocess
from pathlib import Path

import pytest

from stagefs.config import WorkspaceSettings
from stagefs.errors import (
    InvalidConfig,
    InvalidManifest,
    InvalidName,
    NameExists,
    NotFound,
    NotPermitted,
)
from stagefs.model import OnWrite
from stagefs.namespace.node import TASKS_INODE, TEMPLATES_INODE
from stagefs.staging import values
from stagefs.staging.manifest import LeaseLifetime, Manifest, Mirrored, Output
from stagefs.staging.values import InputState, SandboxState
from stagefs.staging.workers import Worker, worker_of
from stagefs.vfs.sandbox_roots import SandboxRoots
from tests.unit.staging.conftest import Staging, open_staging


async def _create_many(
    staging: Staging, name: str, count: int, manifest: Manifest
) -> list[values.Sandbox]:
    request = values.CreateSandboxes(name, count, manifest)
    return (await staging.area.sandbox_create_many(request, staging.progress.append)).sandboxes


async def _mirror(staging: Staging, *mirrored: Mirrored, manifest: Manifest | None = None) -> None:
    request = values.CreateSandbox("t", manifest or Manifest(), list(mirrored))
    await staging.area.sandbox_create(request, staging.progress.append)


async def _remove(staging: Staging, name: str) -> None:
    await staging.area.sandbox_remove(values.OneSandbox(name), staging.progress.append)


def _owners(staging: Staging) -> list[str]:
    assert staging.cache is not None
    return sorted({lease.owner.split(":")[0] for lease in staging.cache.leases()})


def _templates(staging: Staging) -> list[str]:
    return [name for _cookie, name, _node in staging.namespace.page(TEMPLATES_INODE, 0, 10)]


async def test_what_was_declared_is_kept_without_secrets(staging: Staging) -> None:
    staging.remote.store("/i", b"input")
    manifest = Manifest(
        inputs={"./i": "memory://me:secret@store/i"},
        outputs=[Output("o", "memory://me:secret@store/o")],
        on_write=OnWrite.READ_ONLY,
        record=True,
    )
    made = await staging.create("t", manifest)
    assert (made.state, made.on_write) == (SandboxState.ACTIVE, OnWrite.READ_ONLY)
    shown = await staging.show("t")
    assert "secret" not in repr(shown)
    assert [(one.name, one.state) for one in shown.inputs] == [("i", InputState.LINKED)]
    row = staging.namespace.sandbox_of(staging.node("tasks/t").inode)
    assert row is not None
    assert (row.on_write, row.record) == ("read-only", True)


async def test_what_became_of_inputs(staging: Staging) -> None:
    inputs = {name: staging.remote.store(f"/{name}", b"input") for name in "abcde"}
    await staging.create("t", Manifest(inputs=inputs))
    top = staging.node("tasks/t").inode
    staging.namespace.remove(top, "b")
    copy = staging.namespace.copy_up(top, "c", staging.node("tasks/t/c").inode)
    await staging.local.write(copy, 0, b"I")
    staging.namespace.remove(top, "d")
    staging.namespace.make_symlink(top, "d", "a")
    staging.namespace.remove(top, "e")
    await staging.write("tasks/t/e", b"new")
    shown = await staging.show("t")
    assert {one.name: one.state for one in shown.inputs} == {
        "a": InputState.LINKED,
        "b": InputState.REMOVED,
        "c": InputState.MODIFIED,
        "d": InputState.REPLACED,
        "e": InputState.MODIFIED,
    }
    assert shown.modified == ["c"]


async def test_sandbox_at_a_path(staging: Staging) -> None:
    staging.namespace.make_directory(staging.node("/").inode, "pilot")
    made = await staging.create("/pilot/t1")
    assert (made.name, made.path) == ("/pilot/t1", "/pilot/t1")
    assert (await staging.create("/tasks/t2")).name == "t2"
    page = await staging.area.sandbox_list(values.ListSandboxes())
    assert [one.name for one in page.sandboxes] == ["/pilot/t1", "t2"]
    for wrong in ("/x", "/staging/x", "a/b", "", "..", "/"):
        with pytest.raises(InvalidName):
            await staging.create(wrong)
    with pytest.raises(NotFound):
        await staging.create("/absent/t")
    staging.namespace.make_directory(staging.node("/pilot").inode, "plain")
    with pytest.raises(NotFound, match="/pilot/plain is no sandbox"):
        await staging.show("/pilot/plain")


async def test_mirrored_trees_are_links(staging: Staging, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("file", "tree/sub/deep", "tree/.dot", "tree/empty/x"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "tree/empty/x").unlink()
    (source / "tree/link").symlink_to("sub/deep")
    (source / "alias").symlink_to("file")
    (source / "file").chmod(0o640)
    await _mirror(
        staging,
        Mirrored(str(source / "file"), "file"),
        Mirrored(str(source / "alias"), "a/alias"),
        Mirrored(str(source / "tree"), "a/tree"),
    )
    assert await staging.names("/tasks/t/a/tree") == [".dot", "empty", "link", "sub"]
    assert await staging.read("tasks/t/a/tree/sub/deep") == b"tree/sub/deep"
    assert await staging.read("tasks/t/a/alias") == b"file"
    assert staging.node("tasks/t/a/tree/link").target == "sub/deep"
    file = staging.node("tasks/t/file")
    assert (file.mode, file.mtime_ns) == (0o640, (source / "file").stat().st_mtime_ns)
    assert file.object_id is not None
    assert file.object_id.url == f"file://{source}/file"


async def test_what_cannot_be_mirrored_is_said(staging: Staging, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="cannot be mirrored: there is no"):
        await _mirror(staging, Mirrored(str(tmp_path / "absent"), "x"))
    (tmp_path / "f").write_text("f")
    url = staging.remote.store("/f", b"f")
    mirrored = Mirrored(str(tmp_path / "f"), "f")
    with pytest.raises(InvalidManifest, match="would both be f in the sandbox"):
        await _mirror(staging, mirrored, manifest=Manifest(inputs={"f": url}))
    with pytest.raises(NameExists, match="f in the sandbox is a file"):
        await _mirror(staging, mirrored, manifest=Manifest(inputs={"f/below": url}))
    assert await staging.names("/tasks") == []
    assert _templates(staging) == []


async def test_mirrors_of_the_mount_itself_are_links(staging: Staging) -> None:
    """The path is never looked at from within: the mount could not answer."""
    url = staging.remote.store("/f", b"f")
    await staging.stage_in(url, target="staging:///d/f")
    await _mirror(staging, Mirrored("/mnt/staging/d", "d"), Mirrored("/mnt/staging/d/f", "f"))
    assert staging.node("tasks/t/f").inode == staging.node("staging/d/f").inode
    assert staging.node("tasks/t/d/f").inode == staging.node("staging/d/f").inode


async def test_persistent_sandbox_gets_its_inputs_again(staging: Staging) -> None:
    url = staging.remote.store("/i", b"input")
    manifest = Manifest(inputs={"i": url, "gone": url}, persistent=True)
    await staging.create("t", manifest)
    inode = staging.node("tasks/t").inode
    staging.namespace.remove(inode, "gone")
    copy = staging.namespace.copy_up(inode, "i", staging.node("tasks/t/i").inode)
    await staging.local.write(copy, 0, b"I")
    await staging.write("tasks/t/kept", b"kept")
    await staging.create("t", manifest)
    assert staging.node("tasks/t").inode == inode
    assert await staging.read("tasks/t/i") == b"input"
    assert await staging.read("tasks/t/gone") == b"input"
    assert await staging.read("tasks/t/kept") == b"kept"
    with pytest.raises(NameExists):
        await staging.create("t", Manifest(inputs={"i": url}))


async def test_many_from_one_template(staging: Staging) -> None:
    inputs = {f"d/{n}": staging.remote.store(f"/{n}", b"input") for n in range(5)}
    manifest = Manifest(inputs=inputs, outputs=[Output("o", "staging:///out/")])
    before = staging.namespace.statistics().changes
    made = await _create_many(staging, "t", 1000, manifest)
    changes = staging.namespace.statistics().changes - before
    assert [made[0].name, made[-1].name] == ["t.000000", "t.000999"]
    assert changes < 20, f"{changes} changes for a template with five links"
    assert await staging.read("tasks/t.000123/d/3") == b"input"
    assert (await staging.stat("/tasks/t.000123/d/3")).links == 1000
    shown = await staging.show("t.000123")
    assert shown.template
    assert shown.manifest.inputs == inputs
    assert shown.leases == 5
    assert {one.state for one in shown.inputs} == {InputState.LINKED}
    await staging.write("tasks/t.000123/o", b"o")
    await staging.commit("t.000123")
    assert (await staging.show("t.000123")).sandbox.state is SandboxState.COMMITTED
    assert (await staging.show("t.000124")).sandbox.state is SandboxState.ACTIVE
    assert _owners(staging) == ["sandbox"]


async def test_template_goes_with_its_last_sandbox(staging: Staging) -> None:
    url = staging.remote.store("/i", b"input")
    await _create_many(staging, "t", 3, Manifest(inputs={"i": url}))
    assert len(_templates(staging)) == 1
    for number in range(3):
        assert _owners(staging) == ["sandbox"]
        await _remove(staging, f"t.00000{number}")
    assert _templates(staging) == []
    assert _owners(staging) == []


async def test_many_are_all_or_none(staging: Staging) -> None:
    url = staging.remote.store("/i", b"input")
    await staging.create("t.000007")
    with pytest.raises(NameExists, match=r"The sandbox t\.000007 exists"):
        await _create_many(staging, "t", 10, Manifest(inputs={"i": url}))
    assert await staging.names("/tasks") == ["t.000007"]
    assert _templates(staging) == []
    assert _owners(staging) == []


async def test_list_goes_on(staging: Staging) -> None:
    await _create_many(staging, "t", 25, Manifest())
    seen: list[str] = []
    after: int | None = 0
    while after is not None:
        page = await staging.area.sandbox_list(values.ListSandboxes(after=after, limit=10))
        seen += [one.name for one in page.sandboxes]
        after = page.after
    assert seen == [f"t.{n:06}" for n in range(25)]


async def test_lifetimes_of_leases(tmp_path: Path) -> None:
    async with open_staging(tmp_path, capacity_bytes=1 << 20) as staging:
        url = staging.remote.store("/i", b"input")
        for lifetime in LeaseLifetime:
            await staging.create(lifetime, Manifest(inputs={"i": url}, lifetime=lifetime))
        assert _owners(staging) == ["admin", "pilot", "sandbox"]
        for lifetime in LeaseLifetime:
            await staging.area.sandbox_fail(values.FailSandbox(lifetime))
        assert _owners(staging) == ["admin", "pilot"]
    async with open_staging(tmp_path, capacity_bytes=1 << 20) as staging:
        await staging.area.begin(is_new_mount=False)
        assert _owners(staging) == ["admin", "pilot"]
    async with open_staging(tmp_path, capacity_bytes=1 << 20) as staging:
        await staging.area.begin(is_new_mount=True)
        assert _owners(staging) == ["admin"]
        assert staging.cache is not None
        assert staging.cache.unpin(None, owner="admin") == 1


async def test_leases_of_a_sandbox_survive_a_daemon(tmp_path: Path) -> None:
    async with open_staging(tmp_path, capacity_bytes=1 << 20) as staging:
        url = staging.remote.store("/i", b"input")
        await staging.create("t", Manifest(inputs={"i": url}))
    async with open_staging(tmp_path, capacity_bytes=1 << 20) as staging:
        await staging.area.begin(is_new_mount=True)
        assert (await staging.show("t")).leases == 1
        await _remove(staging, "t")
        assert _owners(staging) == []


async def test_linked_directories_are_leased_as_far_as_known(staging: Staging) -> None:
    for name in ("d/a", "d/sub/b"):
        await staging.stage_in(staging.remote.store(f"/{name}", b"x"), target=f"staging:///{name}")
    await staging.create("t", Manifest(inputs={"ref": "staging:///d"}))
    assert (await staging.show("t")).leases == 2


async def test_half_built_directories_are_swept(tmp_path: Path) -> None:
    async with open_staging(tmp_path, capacity_bytes=None) as staging:
        await _create_many(staging, "t", 2, Manifest())
        staging.namespace.make_directory(TEMPLATES_INODE, "new-0123")
        staging.namespace.make_directory(TASKS_INODE, "old")
    async with open_staging(tmp_path, capacity_bytes=None) as staging:
        await staging.area.begin(is_new_mount=True)
        assert len(_templates(staging)) == 1, "the template that sandboxes show stays"
        assert (await staging.show("t.000001")).sandbox.state is SandboxState.ACTIVE
        page = await staging.area.sandbox_list(values.ListSandboxes())
        assert "old" in [one.name for one in page.sandboxes]


def _ended_worker() -> Worker:
    with subprocess.Popen(["sleep", "60"]) as program:
        worker = worker_of(program.pid)
        program.kill()
    return worker


async def test_sandboxes_removed_at_the_end_of_a_mount_keep_none_from_beginning(
    tmp_path: Path,
) -> None:
    """The last sandboxes of a template, and one whose program has ended; the mount ends then."""
    worker = _ended_worker()
    async with open_staging(tmp_path, capacity_bytes=None) as staging:
        await _create_many(staging, "t", 2, Manifest())
        request = values.CreateSandbox("w", Manifest(), worker=worker)
        await staging.area.sandbox_create(request, staging.progress.append)
        for name in ("t.000000", "t.000001", "w"):
            staging.namespace.remove_directory(TASKS_INODE, name)
        assert len(_templates(staging)) == 1, "forgotten already: nothing is tried here"
    async with open_staging(tmp_path, capacity_bytes=None) as staging:
        await staging.area.begin(is_new_mount=True)
        page = await staging.area.sandbox_list(values.ListSandboxes())
        assert (page.sandboxes, _templates(staging)) == ([], [])


async def test_committed_sandboxes_do_not_fail(staging: Staging) -> None:
    await staging.create("t")
    await staging.commit("t")
    with pytest.raises(NotPermitted, match="is committed"):
        await staging.area.sandbox_fail(values.FailSandbox("t"))


async def test_roots(staging: Staging) -> None:
    settings = WorkspaceSettings(
        sandbox_roots="radical/*/unit.*, /scratch/**/t", on_write="read-only"
    )
    roots = SandboxRoots(staging.namespace, settings)
    top = staging.namespace.make_directory(staging.node("/").inode, "radical").inode
    session = staging.namespace.make_directory(top, "session").inode
    row = roots.row(session, "unit.7")
    assert row is not None
    assert (row.state, row.on_write) == ("active", "read-only")
    assert roots.row(session, "other") is None
    assert roots.row(top, "unit.7") is None
    assert roots.row(TASKS_INODE, "anything") is not None
    assert roots.row(staging.node("/").inode, "radical") is None
    with pytest.raises(InvalidConfig, match="out of the sandbox"):
        SandboxRoots(staging.namespace, WorkspaceSettings(sandbox_roots="../x"))
