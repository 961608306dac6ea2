"""Names through the API: stage in, bind, list, remove, move, sandboxes, import."""

import hashlib
import json
import os

import pytest
import trio

from stagefs.errors import (
    InvalidCatalog,
    InvalidManifest,
    InvalidName,
    InvalidUrl,
    IsADirectory,
    NameExists,
    NotADirectory,
    NotEmpty,
    NotFound,
    ObjectMissing,
    RemoteUnavailable,
)
from stagefs.model import Checksum, ChecksumKind
from stagefs.namespace.node import IMMUTABLE_CHECKED_NS, STAGING_INODE, TASKS_INODE
from stagefs.staging import values
from stagefs.staging.manifest import Manifest
from stagefs.staging.tree import parse_place
from stagefs.staging.values import Progress
from tests.unit.staging.conftest import Staging


async def test_stage_in_asks_once_and_fetches_nothing(staging: Staging) -> None:
    url = staging.remote.store("/data/a", b"12345")
    entry = await staging.stage_in(url, target="staging:///deep/er/a")
    assert (entry.path, entry.size_bytes, entry.state) == ("staging:///deep/er/a", 5, "remote")
    assert [request.kind for request in staging.remote.requests] == ["stat"]
    assert await staging.read("staging/deep/er/a") == b"12345"
    assert (await staging.stat("staging:///deep/er/a")).state == "cached"


async def test_several_urls_and_directories_as_target(staging: Staging) -> None:
    one, two = staging.remote.store("/one", b"1"), staging.remote.store("/two", b"2")
    await staging.stage_in(one, two, target="staging:///d")
    assert sorted(await staging.names("staging:///d")) == ["one", "two"]
    await staging.stage_in(one, target="staging:///e/")
    assert await staging.names("staging:///e") == ["one"]
    three = staging.remote.store("/three", b"3")
    await staging.stage_in(three, target="staging:///d")
    assert "three" in await staging.names("staging:///d")
    with pytest.raises(InvalidName, match="same name"):
        await staging.stage_in(one, one, target="staging:///f")
    assert staging.progress[-1] == Progress("asking the remotes", 1, 1, unit="objects")


async def test_one_url_that_fails_leaves_no_name(staging: Staging) -> None:
    good = staging.remote.store("/good", b"1")
    with pytest.raises(ObjectMissing, match="absent"):
        await staging.stage_in(good, staging.remote.url("/absent"), target="staging:///d")
    assert await staging.names("staging:///") == []


async def test_existing_name_is_kept_unless_it_is_to_be_replaced(staging: Staging) -> None:
    await staging.stage_in(staging.remote.store("/a", b"old"), target="staging:///a")
    await staging.area.sandbox_create(
        values.CreateSandbox("t", Manifest(inputs={"a": "staging:///a"})), staging.progress.append
    )
    newer = staging.remote.store("/b", b"newer")
    with pytest.raises(NameExists, match="--replace"):
        await staging.stage_in(newer, target="staging:///a")
    assert staging.asked("stat") == 1, "a remote was asked although the name was taken"
    staging.told.names.clear()
    await staging.stage_in(newer, target="staging:///a", replace=True)
    assert await staging.read("staging/a") == b"newer"
    assert await staging.read("tasks/t/a") == b"old"
    assert (STAGING_INODE, "a") in staging.told.names


async def test_replacing_by_the_same_version_keeps_the_inode(staging: Staging) -> None:
    url = staging.remote.store("/a", b"same")
    before = await staging.stage_in(url, target="staging:///a")
    after = await staging.stage_in(url, target="staging:///a", replace=True)
    assert after.inode == before.inode


async def test_same_version_twice_is_one_inode(staging: Staging) -> None:
    url = staging.remote.store("/a", b"same")
    one = await staging.stage_in(url, target="staging:///a")
    two = await staging.stage_in(url, target="staging:///b")
    assert (two.inode, two.links) == (one.inode, 2)


async def test_other_declared_checksum_is_another_object(staging: Staging) -> None:
    url = staging.remote.store("/a", b"data")
    digests = [hashlib.sha256(data).hexdigest() for data in (b"data", b"other")]
    for name, digest in zip(("right", "wrong"), digests, strict=True):
        request = values.StageIn(
            [url], f"staging:///{name}", checksum=Checksum(ChecksumKind.SHA256, digest)
        )
        await staging.area.stage_in(request, staging.progress.append)
    right, wrong = staging.node("staging/right"), staging.node("staging/wrong")
    assert right.object_id != wrong.object_id
    assert await staging.read("staging/right") == b"data"


async def test_immutable_is_never_asked_again(staging: Staging) -> None:
    url = staging.remote.store("/a", b"data")
    request = values.StageIn([url], "staging:///a", immutable=True)
    await staging.area.stage_in(request, staging.progress.append)
    assert staging.node("staging/a").checked_ns == IMMUTABLE_CHECKED_NS


async def test_staging_name_as_source_is_a_link(staging: Staging) -> None:
    one = await staging.stage_in(staging.remote.store("/a", b"data"), target="staging:///a")
    two = await staging.stage_in("staging:///a", target="staging:///b")
    assert two.inode == one.inode


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("staging:///../x", InvalidName),
        ("staging:///a/./x", InvalidName),
        ("staging://host/x", InvalidName),
        ("relative", InvalidName),
        ("/etc/x", NotFound),
        ("/x", NotFound),
        ("staging:///" + "n" * 256, InvalidName),
        ("staging:///a\0b", InvalidName),
    ],
)
async def test_targets_that_cannot_be(
    staging: Staging, target: str, error: type[Exception]
) -> None:
    url = staging.remote.store("/a", b"data")
    with pytest.raises(error):
        await staging.stage_in(url, target=target)
    assert await staging.names("/") == ["staging", "tasks"]
    assert await staging.names("staging:///") == []


async def test_file_is_no_directory(staging: Staging) -> None:
    url = staging.remote.store("/a", b"data")
    await staging.stage_in(url, target="staging:///a")
    with pytest.raises(NotADirectory, match=r"staging:///a is not a directory"):
        await staging.stage_in(url, target="staging:///a/b")
    await staging.stage_in(url, target="staging:///d/x")
    await staging.area.bind(values.Bind("memory://store/", "staging:///d/bound"))
    with pytest.raises(IsADirectory):
        await staging.area.bind(values.Bind("memory://store/", "staging:///d"))


async def test_unknown_schemes_are_refused_at_once(staging: Staging) -> None:
    with pytest.raises(InvalidUrl, match="gopher"):
        await staging.stage_in("gopher://host/x", target="staging:///a")
    with pytest.raises(InvalidUrl, match="gopher"):
        await staging.area.bind(values.Bind("gopher://host/x", "staging:///a"))


async def test_bound_directory_is_listed_when_looked_at(staging: Staging) -> None:
    staging.remote.store("/ref/a", b"a")
    staging.remote.store("/ref/sub/b", b"b")
    bound = await staging.area.bind(values.Bind(staging.remote.url("/ref"), "staging:///ref"))
    assert bound.bound
    assert staging.remote.requests == []
    assert sorted(await staging.names("staging:///ref")) == ["a", "sub"]
    assert (await staging.stat("staging:///ref/sub/b")).size_bytes == 1
    with pytest.raises(NotFound, match=r"There is no staging:///ref/none"):
        await staging.stat("staging:///ref/none")


async def test_listing_goes_on_where_a_page_ended(staging: Staging) -> None:
    url = staging.remote.store("/a", b"data")
    for number in range(7):
        await staging.stage_in(url, target=f"staging:///d/{number}")
    seen = []
    after = None
    while True:
        page = await staging.area.list_names(values.ListNames("staging:///d", after=after, limit=3))
        assert len(page.entries) <= 3
        seen += [entry.name for entry in page.entries]
        after = page.after
        if after is None:
            break
    assert seen == [str(number) for number in range(7)]
    with pytest.raises(InvalidName, match="continues no listing"):
        await staging.area.list_names(values.ListNames("staging:///d", after="x"))


async def test_names_that_are_not_utf8(staging: Staging) -> None:
    name = os.fsdecode(b"caf\xe9")
    url = staging.remote.store("/a", b"data")
    entry = await staging.stage_in(url, target=f"staging:///{name}")
    assert os.fsencode(entry.name) == b"caf\xe9"


async def test_remove_and_move(staging: Staging) -> None:
    url = staging.remote.store("/a", b"data")
    await staging.stage_in(url, target="staging:///d/a")
    with pytest.raises(NotEmpty, match="--recursive"):
        await staging.area.remove(values.RemoveName("staging:///d"), staging.progress.append)
    moved = await staging.area.move(values.MoveName("staging:///d/a", "staging:///b"))
    assert moved.path == "staging:///b"
    moved = await staging.area.move(values.MoveName("staging:///b", "staging:///d"))
    assert moved.path == "staging:///d/b"
    await staging.stage_in(url, target="staging:///c")
    with pytest.raises(NameExists):
        await staging.area.move(values.MoveName("staging:///c", "staging:///d/b"))
    await staging.area.remove(values.RemoveName("staging:///d", True), staging.progress.append)
    assert await staging.names("staging:///") == ["c"]
    for path in ("/", "staging:///", "/tasks"):
        with pytest.raises((InvalidName, Exception), match=r"unmount|part of every mount"):
            await staging.area.remove(values.RemoveName(path, True), staging.progress.append)


async def test_sandbox_links_names_urls_and_directories(staging: Staging) -> None:
    await staging.stage_in(staging.remote.store("/a", b"data"), target="staging:///d/a")
    other = staging.remote.store("/b", b"other")
    made = await staging.area.sandbox_create(
        values.CreateSandbox(
            "t1", Manifest(inputs={"in/a": "staging:///d/a", "b": other, "ref": "staging:///d"})
        ),
        staging.progress.append,
    )
    assert made.path == "/tasks/t1"
    assert staging.asked("fetch") == 0
    assert (await staging.stat("/tasks/t1/in/a")).inode == staging.node("staging/d/a").inode
    assert await staging.names("/tasks/t1/ref") == ["a"]
    assert await staging.read("tasks/t1/b") == b"other"
    assert [
        one.name for one in (await staging.area.sandbox_list(values.ListSandboxes())).sandboxes
    ] == ["t1"]
    await staging.area.sandbox_remove(values.OneSandbox("t1"), staging.progress.append)
    assert await staging.names("/tasks") == []
    assert await staging.read("staging/d/a") == b"data"
    assert (TASKS_INODE, "t1") in staging.told.names


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("t", {"a": "staging:///absent"}),
        ("t", {"a": "memory://store/absent"}),
        ("t", {"../a": "staging:///x"}),
        ("t", {"": "staging:///x"}),
        ("t", {"x/": "staging:///x"}),
        ("t", {"a": "staging:///x", "a/b": "staging:///x"}),
        ("../t", {}),
        ("a/b", {}),
        ("", {}),
    ],
)
async def test_sandbox_that_fails_leaves_nothing(
    staging: Staging, name: str, inputs: dict[str, str]
) -> None:
    await staging.stage_in(staging.remote.store("/x", b"data"), target="staging:///x")
    with pytest.raises((InvalidManifest, InvalidName, NotFound, ObjectMissing)):
        await staging.area.sandbox_create(
            values.CreateSandbox(name, Manifest(inputs=inputs)), staging.progress.append
        )
    assert await staging.names("/tasks") == []
    assert staging.node("staging/x").nlink == 1


async def test_sandbox_that_exists(staging: Staging) -> None:
    await staging.area.sandbox_create(values.CreateSandbox("t"), staging.progress.append)
    with pytest.raises(NameExists, match="The sandbox t exists"):
        await staging.area.sandbox_create(values.CreateSandbox("t"), staging.progress.append)


async def test_caller_that_goes_away_leaves_no_half_sandbox(staging: Staging) -> None:
    url = staging.remote.store("/x", b"data")
    staging.remote.gate = trio.Event()
    with trio.move_on_after(0.05) as scope:
        await staging.area.sandbox_create(
            values.CreateSandbox("t", Manifest(inputs={"x": url})), staging.progress.append
        )
    assert scope.cancelled_caught
    assert await staging.names("/tasks") == []


async def test_remote_that_is_down_is_its_own_sentence(staging: Staging) -> None:
    url = staging.remote.store("/x", b"data")
    staging.remote.failures.append(RemoteUnavailable("no connection to memory://store"))
    with pytest.raises(RemoteUnavailable, match="memory://store"):
        await staging.stage_in(url, target="staging:///x")


async def test_catalog_is_imported_by_a_process_of_its_own(staging: Staging) -> None:
    catalog = staging.directory / "catalog.jsonl"
    lines = [
        {"name": f"d/{n}", "url": f"memory://store/{n}", "size": n, "mtime": 5} for n in range(50)
    ]
    catalog.write_text("".join(json.dumps(line) + "\n" for line in lines))
    await staging.names("staging:///")
    request = values.ImportCatalog(str(catalog), prefix="staging:///run")
    with trio.fail_after(60):
        imported = await staging.area.import_catalog(request, staging.progress.append)
    assert (imported.entries, imported.unchanged) == (50, 0)
    assert len(await staging.names("staging:///run/d")) == 50
    assert staging.remote.requests == []
    assert (STAGING_INODE, "run") in staging.told.names
    catalog.write_text('{"name": "a", "url": "memory://store/a", "size": 1}\n{"name": ')
    with trio.fail_after(60), pytest.raises(InvalidCatalog, match=r"[Ll]ine 2") as caught:
        await staging.area.import_catalog(request, staging.progress.append)
    assert caught.value.exit_code == 2
    assert await staging.names("staging:///run") == ["d"]


def test_places_print_as_they_are_written() -> None:
    for path in ("staging:///a/b", "/tasks/t/x", "/", "staging:///"):
        assert str(parse_place(path)) == path
    assert str(parse_place("staging:///a//b/")) == "staging:///a/b"
    assert str(parse_place("/staging/a")) == "staging:///a"
