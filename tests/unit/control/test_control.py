"""Client and server of the control API against each other, over a real Unix socket."""

import contextlib
import functools
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import trio

from stagefs.control.api import Area
from stagefs.control.client import Client, Refused
from stagefs.control.server import serve
from stagefs.errors import NameExists, NoDaemon, NotFound
from stagefs.staging import values
from stagefs.staging.values import Progress, ProgressCallback

_T = TypeVar("_T")
NAME = values.NameStat(path="staging:///a", name="a", kind="file", inode=7, size_bytes=3)


class FakeArea:
    """Answers what a test looks at; everything else is missing on purpose."""

    def __init__(self) -> None:
        self.requests: list[object] = []
        self.warming = trio.Event()
        self.cancelled = trio.Event()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def missing(*_arguments: object) -> object:
            raise AssertionError(f"{name} was not to be called")

        return missing

    async def stat(self, request: values.OnePath) -> values.NameStat:
        self.requests.append(request)
        if request.path == "staging:///none":
            raise NotFound("There is no staging:///none.")
        return values.NameStat(path=request.path, name="x", kind="file", inode=1)

    async def list_names(self, request: values.ListNames) -> values.NamePage:
        start = int(request.after or 0)
        entries = [
            values.NameStat(path=f"p{n}", name=f"{n}", kind="file", inode=n)
            for n in range(start, min(start + 2, 5))
        ]
        return values.NamePage(entries, after=str(start + 2) if start + 2 < 5 else None)

    async def stage_in(
        self, request: values.StageIn, progress: ProgressCallback
    ) -> values.StagedIn:
        self.requests.append(request)
        progress(Progress("asking", 0, 2, unit="entries"))
        await trio.lowlevel.checkpoint()
        if not request.replace:
            raise NameExists("staging:///a exists: use --replace.")
        progress(Progress("asking", 2, 2, unit="entries"))
        return values.StagedIn([NAME])

    async def cache_warm(self, request: values.Warm, progress: ProgressCallback) -> values.Warmed:
        progress(Progress("fetching", 1, 100))
        self.warming.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()
        raise AssertionError

    async def cache_usage(self, request: values.Empty) -> values.CacheUsage:
        raise ZeroDivisionError


@contextlib.asynccontextmanager
async def serving(area: FakeArea, path: Path) -> AsyncIterator[Client]:
    async with trio.open_nursery() as nursery:
        await nursery.start(functools.partial(serve, cast("Area", area), path, users=[os.getuid()]))
        yield Client(path)
        nursery.cancel_scope.cancel()


async def in_thread(call: Callable[..., _T], *arguments: object, **keywords: object) -> _T:
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(
            functools.partial(call, *arguments, **keywords), abandon_on_cancel=True
        )


async def test_answer_comes_back_as_the_value_it_was(tmp_path: Path) -> None:
    area = FakeArea()
    async with serving(area, tmp_path / "control.sock") as client:
        found = await in_thread(client.stat, "staging:///b")
    assert found == values.NameStat(path="staging:///b", name="x", kind="file", inode=1)
    assert area.requests == [values.OnePath("staging:///b")]


async def test_name_that_is_not_utf8_survives_both_ways(tmp_path: Path) -> None:
    name = os.fsdecode(b"staging:///caf\xe9-\xff")
    async with serving(FakeArea(), tmp_path / "control.sock") as client:
        found = await in_thread(client.stat, name)
    assert os.fsencode(found.path) == b"staging:///caf\xe9-\xff"


async def test_refusal_keeps_sentence_exit_code_and_errno(tmp_path: Path) -> None:
    async with serving(FakeArea(), tmp_path / "control.sock") as client:
        with pytest.raises(Refused, match=r"^There is no staging:///none\.$") as caught:
            await in_thread(client.stat, "staging:///none")
    assert (caught.value.errno, caught.value.exit_code) == (NotFound.errno, NotFound.exit_code)


async def test_pages_are_followed_to_the_end(tmp_path: Path) -> None:
    async with serving(FakeArea(), tmp_path / "control.sock") as client:
        names = await in_thread(lambda: [entry.name for entry in client.list_names("/")])
    assert names == ["0", "1", "2", "3", "4"]


async def test_long_operation_tells_its_progress_and_its_answer(tmp_path: Path) -> None:
    seen: list[Progress] = []
    async with serving(FakeArea(), tmp_path / "control.sock") as client:
        entries = await in_thread(
            client.stage_in, ["file:///a"], "staging:///a", replace=True, progress=seen.append
        )
    assert entries == [NAME]
    assert [line.done for line in seen] == [0, 2]


async def test_long_operation_that_fails_ends_in_its_sentence(tmp_path: Path) -> None:
    async with serving(FakeArea(), tmp_path / "control.sock") as client:
        with pytest.raises(Refused, match="use --replace"):
            await in_thread(client.stage_in, ["file:///a"], "staging:///a")


async def test_client_that_leaves_cancels_what_it_asked_for(tmp_path: Path) -> None:
    area = FakeArea()

    def leave(_progress: Progress) -> None:
        raise KeyboardInterrupt

    async with serving(area, tmp_path / "control.sock") as client:
        with pytest.raises(KeyboardInterrupt):
            await in_thread(client.cache_warm, ["staging:///"], progress=leave)
        with trio.fail_after(20):
            await area.cancelled.wait()


async def test_client_that_does_not_read_does_not_hold_up_the_end(tmp_path: Path) -> None:
    area = FakeArea()
    path = tmp_path / "control.sock"
    with trio.fail_after(20):
        async with serving(area, path):
            stream = await trio.open_unix_socket(path)
            await stream.send_all(
                b'POST /v1/cache/warm HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n{"paths":[]}'
            )
            await area.warming.wait()
        await stream.aclose()
    assert area.cancelled.is_set()
    assert not path.exists()


async def test_failure_nobody_foresaw_is_an_answer_and_a_traceback_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(FakeArea(), tmp_path / "control.sock") as client:
        with pytest.raises(Refused, match="failed unexpectedly"):
            await in_thread(client.cache_usage)
        assert (await in_thread(client.stat, "staging:///b")).inode == 1
    assert any(
        record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records
    )


async def test_request_with_a_wrong_value_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with serving(FakeArea(), tmp_path / "control.sock") as client:
        with pytest.raises(Refused, match="Expected `str`, got `int`") as caught:
            await in_thread(client.stat, 7)
    assert caught.value.exit_code == 2


async def test_stale_socket_is_replaced_and_mode_is_private(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(FakeArea(), path) as client:
        assert path.stat().st_mode & 0o777 == 0o600
        assert (await in_thread(client.stat, "staging:///b")).inode == 1


async def test_socket_may_lie_deeper_than_an_address_is_long(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(deep / "control.sock")
    async with serving(FakeArea(), deep / "control.sock"):
        assert (await in_thread(Client(link).stat, "staging:///b")).inode == 1


def test_no_daemon_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(NoDaemon, match="No daemon answers at"):
        Client(tmp_path / "control.sock").status()


def test_socket_of_a_dead_daemon_is_a_sentence(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control.sock"))
    with pytest.raises(NoDaemon, match="No daemon answers at"):
        Client(tmp_path / "control.sock").status()
