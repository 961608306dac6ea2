"""Commit: outputs become visible and are queued all together, or nothing happens."""

import hashlib
from pathlib import Path

import pytest
import trio
import trio.testing

from stagefs.errors import (
    Busy,
    InvalidName,
    IsADirectory,
    NameExists,
    NotFound,
    NotPermitted,
    NotSupported,
    ReadOnly,
)
from stagefs.model import MIB, Checksum, ChecksumKind
from stagefs.namespace.node import ContentKind
from stagefs.outputs.queued import UploadState
from stagefs.staging import values
from stagefs.staging.manifest import Manifest, Output
from stagefs.staging.values import SandboxState
from tests.unit.staging.conftest import Staging

LARGE = bytes(range(256)) * (3 * MIB // 256)


def _outputs(*pairs: tuple[str, str], optional: bool = False) -> Manifest:
    return Manifest(outputs=[Output(pattern, to, optional=optional) for pattern, to in pairs])


def _waiting_files(staging: Staging) -> list[Path]:
    return [path for path in (staging.directory / "outputs/files").rglob("*") if path.is_file()]


async def _nothing_was_done(staging: Staging, name: str = "t") -> None:
    assert (await staging.show(name)).sandbox.state is SandboxState.ACTIVE
    assert (await staging.show(name)).commits == []
    assert await staging.stage_out.uploads() == []
    assert _waiting_files(staging) == []


async def test_outputs_are_names_without_a_copy(staging: Staging) -> None:
    await staging.create("t", _outputs(("std*", "staging:///runs/7/"), ("r", "staging:///r7")))
    made = await staging.write("tasks/t/stdout", b"said")
    await staging.write("tasks/t/stderr", b"")
    await staging.write("tasks/t/r", LARGE)
    await staging.write("tasks/t/other", b"not declared")
    record = await staging.commit("t")
    assert staging.node("staging/runs/7/stdout").inode == made.inode
    assert staging.node("staging/runs/7/stdout").nlink == 2
    assert await staging.read("staging/r7") == LARGE
    assert await staging.names("staging:///runs/7") == ["stdout", "stderr"]
    assert {(one.name, one.to, one.size_bytes) for one in record.outputs} == {
        ("stdout", "staging:///runs/7/stdout", 4),
        ("stderr", "staging:///runs/7/stderr", 0),
        ("r", "staging:///r7", len(LARGE)),
    }
    checksums = {checksum.kind: checksum.digest for checksum in record.outputs[-1].checksums}
    assert checksums[ChecksumKind.SHA256] == hashlib.sha256(LARGE).hexdigest()
    assert (await staging.show("t")).commits == [record]
    assert (await staging.show("t")).sandbox.state is SandboxState.COMMITTED
    assert staging.reached == ["match", "complete", "keep", "prepare", "commit", "activate"]


async def test_committed_files_never_change(staging: Staging) -> None:
    await staging.create("t", _outputs(("o", "staging:///o")))
    await staging.write("tasks/t/o", b"first")
    await staging.commit("t")
    assert staging.node("tasks/t/o").content is ContentKind.PUBLISHED


async def test_missing_outputs_are_named_and_nothing_is_done(staging: Staging) -> None:
    manifest = Manifest(
        outputs=[
            Output("std*", "staging:///runs/7/"),
            Output("a/*.dat", "staging:///runs/7/"),
            Output("b", "memory://store/b"),
            Output("b", "staging:///b/"),
            Output("c", "staging:///c", optional=True),
        ]
    )
    await staging.create("t", manifest)
    await staging.write("tasks/t/stdout", b"said")
    with pytest.raises(NotFound, match=r"outputs are missing in the sandbox t: a/\*\.dat, b;"):
        await staging.commit("t")
    await _nothing_was_done(staging)
    assert await staging.names("staging:///") == []
    await staging.write("tasks/t/a/1.dat", b"1")
    await staging.write("tasks/t/b", b"2")
    assert len((await staging.commit("t")).outputs) == 4


async def test_what_is_open_for_writing_is_named(staging: Staging) -> None:
    await staging.create("t", _outputs(("*", "staging:///runs/")))
    node = await staging.write("tasks/t/log", b"...")
    await staging.write("tasks/t/done", b"...")
    staging.writers.open.add(node.inode)
    with pytest.raises(Busy, match=r"^log of the sandbox t"):
        await staging.commit("t")
    await _nothing_was_done(staging)
    staging.writers.open.clear()
    assert len((await staging.commit("t")).outputs) == 2


async def test_outputs_for_remotes_are_uploaded(staging: Staging) -> None:
    await staging.create(
        "t", _outputs(("out", "memory://store/runs/"), ("log", "memory://store/seven.log"))
    )
    await staging.write("tasks/t/out/deep/a b", LARGE)
    await staging.write("tasks/t/log", b"said")
    record = await staging.commit("t")
    assert all(one.queued for one in record.outputs)
    await staging.flush()
    assert staging.remote.content("/runs/out/deep/a b") == LARGE
    assert staging.remote.content("/seven.log") == b"said"
    assert _waiting_files(staging) == []
    done = await staging.stage_out.uploads()
    assert {upload.state for upload in done} == {UploadState.DONE}
    digests = {str(Checksum(ChecksumKind.SHA256, hashlib.sha256(b"said").hexdigest()))}
    log = next(upload for upload in done if upload.item.label == "log")
    assert digests <= {str(checksum) for checksum in log.item.checksums}


async def test_one_output_may_go_to_two_places(staging: Staging) -> None:
    await staging.create("t", _outputs(("o", "staging:///o"), ("o", "memory://store/o")))
    await staging.write("tasks/t/o", b"data")
    await staging.commit("t")
    await staging.flush()
    assert await staging.read("staging/o") == b"data"
    assert staging.remote.content("/o") == b"data"


async def test_name_that_is_taken_undoes_all(staging: Staging) -> None:
    url = staging.remote.store("/x", b"there before")
    await staging.stage_in(url, target="staging:///runs/b")
    manifest = _outputs(("a", "memory://store/a"), ("b", "staging:///runs/"))
    await staging.create("t", manifest)
    await staging.write("tasks/t/a", b"a")
    await staging.write("tasks/t/b", b"b")
    with pytest.raises(NameExists, match="staging:///runs/b exists, so b is not published"):
        await staging.commit("t")
    await _nothing_was_done(staging)
    assert await staging.read("staging/runs/b") == b"there before"
    replacing = Output("b", "staging:///runs/", overwrite=True)
    await staging.create("u", Manifest(outputs=[replacing]))
    await staging.write("tasks/u/b", b"new")
    await staging.commit("u")
    assert await staging.read("staging/runs/b") == b"new"


async def test_directory_at_the_target_is_said(staging: Staging) -> None:
    await staging.stage_in(staging.remote.store("/x", b"x"), target="staging:///runs/x")
    await staging.create("t", _outputs(("o", "staging:///runs")))
    await staging.write("tasks/t/o", b"o")
    with pytest.raises(IsADirectory, match="end the URL with '/'"):
        await staging.commit("t")
    await _nothing_was_done(staging)


async def test_bound_directory_at_the_target_is_said(staging: Staging) -> None:
    staging.remote.store("/d/x", b"x")
    await staging.area.bind(values.Bind("memory://store/d", "staging:///d"))
    await staging.create("t", _outputs(("o", "staging:///d/")))
    await staging.write("tasks/t/o", b"o")
    with pytest.raises(ReadOnly, match="memory://store/d"):
        await staging.commit("t")
    await _nothing_was_done(staging)


async def test_committing_again_gives_the_same_record(staging: Staging) -> None:
    await staging.create("t", _outputs(("o", "staging:///o")))
    await staging.write("tasks/t/o", b"o")
    record = await staging.commit("t")
    assert await staging.commit("t") == record


async def test_failed_sandboxes_are_not_committed(staging: Staging) -> None:
    await staging.create("t", _outputs(("o", "staging:///o")))
    await staging.write("tasks/t/o", b"o")
    await staging.area.sandbox_fail(values.FailSandbox("t", "exit code 3"))
    with pytest.raises(NotPermitted, match="has failed"):
        await staging.commit("t")
    shown = await staging.show("t")
    assert (shown.sandbox.state, shown.reason) == (SandboxState.FAILED, "exit code 3")
    assert await staging.read("tasks/t/o") == b"o"


async def test_persistent_sandboxes_are_committed_again(staging: Staging) -> None:
    await staging.create("t", Manifest(outputs=[Output("*", "staging:///o/")], persistent=True))
    await staging.write("tasks/t/a", b"a")
    await staging.commit("t")
    assert (await staging.show("t")).sandbox.state is SandboxState.ACTIVE
    await staging.write("tasks/t/b", b"b")
    await staging.commit("t")
    assert await staging.names("staging:///o") == ["a", "b"]
    assert len((await staging.show("t")).commits) == 2


async def test_wildcards_leave_inputs_out(staging: Staging) -> None:
    staging_input = staging.remote.store("/i", b"input")
    await staging.stage_in(staging_input, target="staging:///dir/i")
    await staging.create("first", _outputs(("p", "staging:///p")))
    await staging.write("tasks/first/p", b"published")
    await staging.commit("first")
    inputs = {"i": staging_input, "p": "staging:///p", "ref": "staging:///dir"}
    manifest = Manifest(inputs=inputs, outputs=[Output("**", "staging:///out/")])
    await staging.create("t", manifest)
    await staging.write("tasks/t/o", b"o")
    # A task that changes its own copy of an input made an output of it.
    copy = staging.namespace.copy_up(
        staging.node("tasks/t/ref").inode, "i", staging.node("staging/dir/i").inode
    )
    await staging.local.write(copy, 0, b"I")
    record = await staging.commit("t")
    assert sorted(one.name for one in record.outputs) == ["o", "ref/i"]
    assert await staging.read("staging/out/ref/i") == b"Input"
    assert await staging.read("staging/dir/i") == b"input"


async def test_named_inputs_go_on(staging: Staging) -> None:
    url = staging.remote.store("/i", LARGE)
    outputs = [Output("i", "memory://store/copy"), Output("i", "staging:///i")]
    await staging.create("t", Manifest(inputs={"i": url}, outputs=outputs))
    await staging.commit("t")
    await staging.flush()
    assert staging.remote.content("/copy") == LARGE
    assert await staging.read("staging/i") == LARGE


async def test_changed_inputs_are_whole_without_their_remote(cacheless: Staging) -> None:
    url = cacheless.remote.store("/i", LARGE)
    manifest = Manifest(inputs={"i": url}, outputs=[Output("i", "staging:///changed")])
    await cacheless.create("t", manifest)
    node = cacheless.node("tasks/t/i")
    copy = cacheless.namespace.copy_up(cacheless.node("tasks/t").inode, "i", node.inode)
    await cacheless.local.write(copy, MIB + 5, b"changed")
    assert (await cacheless.show("t")).modified == ["i"]
    await cacheless.commit("t")
    cacheless.remote.remove("/i")
    wanted = LARGE[: MIB + 5] + b"changed" + LARGE[MIB + 12 :]
    assert await cacheless.read("staging/changed") == wanted


async def test_trees_links_and_empty_directories(staging: Staging) -> None:
    outputs = [Output("tree", "staging:///runs/7/tree"), Output("tree", "memory://store/t/")]
    await staging.create("t", Manifest(outputs=outputs))
    await staging.write("tasks/t/tree/deep/a", b"a")
    tree = staging.node("tasks/t/tree").inode
    staging.namespace.make_directory(tree, "empty")
    staging.namespace.make_symlink(tree, "alias", "deep/a")
    staging.namespace.make_symlink(tree, "outside", "/etc/passwd")
    staging.namespace.make_symlink(tree, "up", "../../../../etc/passwd")
    await staging.commit("t")
    await staging.flush()
    assert sorted(await staging.names("staging:///runs/7/tree")) == [
        *("alias", "deep", "empty", "outside", "up")
    ]
    assert staging.node("staging/runs/7/tree/alias").target == "deep/a"
    uploaded = {
        path: staging.remote.content(path)
        for path in staging.remote.paths()
        if path.startswith("/t/")
    }
    assert uploaded == {"/t/tree/alias": b"a", "/t/tree/deep/a": b"a"}


async def test_symlink_to_nowhere_cannot_be_uploaded(staging: Staging) -> None:
    await staging.create("t", _outputs(("l", "memory://store/l")))
    staging.namespace.make_symlink(staging.node("tasks/t").inode, "l", "absent")
    with pytest.raises(NotSupported, match="leads to no file of the sandbox"):
        await staging.commit("t")
    await _nothing_was_done(staging)


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ((("*", "staging:///one"),), r"\* matches several files .*a, b"),
        ((("a", "staging:///x"), ("b", "staging:///x")), "would both become staging:///x"),
        ((("a", "memory://store/x"), ("b", "memory://store/x")), "would both become"),
    ],
)
async def test_two_files_for_one_name(
    staging: Staging, outputs: tuple[tuple[str, str], ...], words: str
) -> None:
    await staging.create("t", _outputs(*outputs))
    await staging.write("tasks/t/a", b"a")
    await staging.write("tasks/t/b", b"b")
    with pytest.raises(InvalidName, match=words):
        await staging.commit("t")
    await _nothing_was_done(staging)


async def test_pattern_for_one_name_takes_its_one_match(staging: Staging) -> None:
    await staging.create("t", _outputs(("result-*.h5", "staging:///h5")))
    await staging.write("tasks/t/result-7.h5", b"7")
    await staging.commit("t")
    assert await staging.read("staging/h5") == b"7"


async def test_name_of_the_sandbox_in_urls(staging: Staging) -> None:
    manifest = _outputs(("o", "staging:///runs/{name}/"), ("o", "memory://store/{name}.out"))
    request = values.CreateSandboxes("t", 2, manifest)
    await staging.area.sandbox_create_many(request, staging.progress.append)
    await staging.create("a b", manifest)
    for name in ("t.000000", "t.000001", "a b"):
        await staging.write(f"tasks/{name}/o", name.encode())
        await staging.commit(name)
        assert await staging.read(f"staging/runs/{name}/o") == name.encode()
    await staging.flush()
    assert staging.remote.paths() == ["/t.000000.out", "/t.000001.out", "/a b.out"]


async def test_further_outputs_at_commit(staging: Staging) -> None:
    await staging.create("t")
    await staging.write("tasks/t/o", b"o")
    await staging.commit("t", Output("o", "staging:///late"))
    assert await staging.read("staging/late") == b"o"


async def test_caller_that_goes_away_leaves_nothing(staging: Staging) -> None:
    url = staging.remote.store("/i", LARGE)
    manifest = Manifest(
        inputs={"i": url}, outputs=[Output("i", "memory://store/c"), Output("o", "staging:///o")]
    )
    await staging.create("t", manifest)
    await staging.write("tasks/t/o", b"o")
    staging.remote.gate = trio.Event()
    with trio.move_on_after(0.05) as scope:
        await staging.commit("t")
    assert scope.cancelled_caught
    await _nothing_was_done(staging)
    staging.remote.gate.set()
    await staging.commit("t")
    assert await staging.read("staging/o") == b"o"


async def test_two_commits_of_one_sandbox(staging: Staging) -> None:
    url = staging.remote.store("/i", LARGE)
    manifest = Manifest(inputs={"i": url}, outputs=[Output("i", "memory://store/c")])
    await staging.create("t", manifest)
    staging.remote.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(staging.commit, "t")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (await staging.show("t")).sandbox.state is SandboxState.COMMITTING
        for refused in (staging.commit("t"), staging.area.sandbox_fail(values.FailSandbox("t"))):
            with pytest.raises(Busy, match="is being committed"):
                await refused
        staging.remote.gate.set()
    assert (await staging.show("t")).sandbox.state is SandboxState.COMMITTED


async def test_leases_end_with_the_sandbox(staging: Staging) -> None:
    url = staging.remote.store("/i", b"input")
    assert staging.cache is not None
    for name in ("a", "b", "c", "d"):
        manifest = Manifest(inputs={"i": url}, outputs=[Output("o", f"staging:///{name}")])
        await staging.create(name, manifest)
        await staging.write(f"tasks/{name}/o", b"o")
    assert len(staging.cache.leases()) == 4
    await staging.commit("a")
    await staging.area.sandbox_fail(values.FailSandbox("b"))
    await staging.area.sandbox_remove(values.OneSandbox("c"), staging.progress.append)
    assert [lease.owner.rpartition(":")[2] for lease in staging.cache.leases()] == ["d"]
    # As `rm -r` in the mount does it.
    staging.namespace.remove_tree(staging.node("tasks").inode, "d")
    await staging.area.keep_house()
    assert staging.cache.leases() == []
