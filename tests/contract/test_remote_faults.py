"""What every remote does when the network or the server fails, through a proxy that breaks it.

Each test asserts that its fault struck.  The remote is wrapped as in the daemon, with short
limits.
"""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeAlias

import msgspec
import pytest
import trio

from stagefs.errors import DeadlineExceeded, ObjectChanged, RemoteUnavailable
from stagefs.model import MIB, Span, WholeObject
from stagefs.remote.base import Remote
from stagefs.remote.guard import GuardedRemote, MeasuredRemote
from stagefs.remote.health import Health
from stagefs.remote.limit import LimitedRemote
from stagefs.remote.retry import RetryingRemote
from stagefs.remote.settings import RemoteSettings
from tests.contract.subjects import (
    BUCKET,
    SETTINGS,
    AzSubject,
    HttpSubject,
    S3Subject,
    Subject,
    WebDavSubject,
    new_place,
)
from tests.contract.test_remote_contract import Item, content, listed
from tests.support.azurite import Azurite
from tests.support.faultproxy import FaultProxy, fault_proxy
from tests.support.nginx import Nginx
from tests.support.rgw import Rgw
from tests.support.sinks import FileSink
from tests.support.webdav import WebDav

pytestmark = pytest.mark.timeout(60)

SHORT = msgspec.structs.replace(
    SETTINGS, connect_timeout_s=0.5, answer_timeout_s=0.5, progress_timeout_s=0.5, attempts=3
)
# Generous against a busy machine, far below what a hang would take.
HANG_S = 20.0


MakeSubject: TypeAlias = Callable[[FaultProxy, RemoteSettings], Subject]


class Broken:
    """A remote behind a proxy, and hands on its server."""

    def __init__(self, proxy: FaultProxy, make: MakeSubject) -> None:
        self.proxy = proxy
        self._make = make
        self.subject = make(proxy, SHORT)
        self.made = [self.subject]

    @property
    def bare(self) -> Remote:
        return self.subject.remote

    def wrapped(self, settings: RemoteSettings = SHORT) -> Remote:
        health = Health(settings.concurrency * 2)
        limited = LimitedRemote(MeasuredRemote(self.bare, health), settings)
        return RetryingRemote(GuardedRemote(limited, health, settings), settings)

    def patient(self) -> Remote:
        """A driver that waits for ever."""
        settings = msgspec.structs.replace(SHORT, answer_timeout_s=1e5, progress_timeout_s=1e5)
        self.made.append(self._make(self.proxy, settings))
        return self.made[-1].remote


@pytest.fixture
def http_broken(nginx: Nginx) -> tuple[int, MakeSubject]:
    top = new_place()
    return nginx.port, lambda proxy, settings: HttpSubject(
        nginx, top, port=proxy.port, settings=settings
    )


@pytest.fixture
def s3_broken(rgw: Rgw) -> tuple[int, MakeSubject]:
    top = new_place()
    return rgw.port, lambda proxy, settings: S3Subject(
        rgw, BUCKET, top, port=proxy.port, settings=settings
    )


@pytest.fixture
def webdav_broken(webdav: WebDav) -> tuple[int, MakeSubject]:
    top = new_place()
    return webdav.port, lambda proxy, settings: WebDavSubject(
        webdav, top, port=proxy.port, settings=settings
    )


@pytest.fixture
def az_broken(azurite: Azurite) -> tuple[int, MakeSubject]:
    top = new_place()
    return azurite.port, lambda proxy, settings: AzSubject(
        azurite, BUCKET, top, port=proxy.port, settings=settings
    )


@pytest.fixture(params=["http", "s3", "webdav", "az"])
async def broken(request: pytest.FixtureRequest) -> AsyncIterator[Broken]:
    port, make = request.getfixturevalue(f"{request.param}_broken")
    with fault_proxy(port) as proxy:
        broken = Broken(proxy, make)
        yield broken
        for subject in broken.made:
            await subject.remote.aclose()


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_broken_transfer_goes_on_where_it_ended(
    broken: Broken, fault: str, tmp_path: Path
) -> None:
    data = content(8 * MIB)
    url = broken.subject.put("object", data)
    remote = broken.wrapped()
    info = await remote.stat(url)
    before = broken.proxy.bytes_down
    getattr(broken.proxy, fault)(after_bytes=5 * MIB)
    with FileSink(tmp_path / "sink", len(data)) as sink:
        await remote.fetch(url, Span(0, len(data)), sink=sink, validator=info.validator)
        assert sink.content() == data
        assert sink.landed_bytes == len(data)
    assert broken.proxy.hits == 1, "the fault did not strike"
    # What the connection had still held when it broke is lost, no more.
    assert broken.proxy.bytes_down - before < len(data) + 4 * MIB, "it began anew"


async def test_broken_transfer_of_an_unknown_version_goes_on(
    broken: Broken, tmp_path: Path
) -> None:
    data = content(8 * MIB)
    url = broken.subject.put("object", data)
    broken.proxy.cut(after_bytes=5 * MIB)
    with FileSink(tmp_path / "sink", len(data)) as sink:
        await broken.wrapped().fetch(url, Span(0, len(data)), sink=sink, validator=None)
        assert sink.content() == data
    assert broken.proxy.hits == 1, "the fault did not strike"


async def test_no_mixture_when_the_object_changes_during_a_break(
    broken: Broken, tmp_path: Path
) -> None:
    old, new = content(8 * MIB, seed=1), content(8 * MIB, seed=2)
    url = broken.subject.put("object", old)
    broken.proxy.stall(after_bytes=5 * MIB)
    with FileSink(tmp_path / "sink", len(old)) as sink:

        async def replace() -> None:
            await sink.first_landed.wait()
            broken.subject.put("object", new)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(replace)
            with pytest.raises(ObjectChanged):
                await broken.wrapped().fetch(url, Span(0, len(old)), sink=sink, validator=None)
        landed = sink.landed_bytes
        assert 0 < landed < len(old)
        assert sink.content()[:landed] == old[:landed]
    assert broken.proxy.hits == 1, "the fault did not strike"


@pytest.mark.parametrize("after_bytes", [0, 3 * MIB], ids=["before", "within"])
async def test_stall_ends_at_the_deadline(broken: Broken, after_bytes: int, tmp_path: Path) -> None:
    data = content(8 * MIB)
    url = broken.subject.put("object", data)
    broken.proxy.stall(after_bytes=after_bytes, times=100)
    with FileSink(tmp_path / "sink", len(data)) as sink, trio.fail_after(HANG_S):
        with pytest.raises(DeadlineExceeded) as caught:
            await broken.bare.fetch(url, Span(0, len(data)), sink=sink, validator=None)
        assert url in str(caught.value)
        assert broken.proxy.hits == 1, "the fault did not strike"
        landed, found = sink.landed_bytes, sink.content()
        assert found[:landed] == data[:landed]
        broken.proxy.release()
        await broken.bare.stat(url)
        assert sink.content() == found, "bytes were written after the fetch had failed"


async def test_stalled_transfer_is_tried_again(broken: Broken, tmp_path: Path) -> None:
    data = content(8 * MIB)
    url = broken.subject.put("object", data)
    broken.proxy.stall(after_bytes=3 * MIB)
    with FileSink(tmp_path / "sink", len(data)) as sink, trio.fail_after(HANG_S):
        await broken.wrapped().fetch(url, Span(0, len(data)), sink=sink, validator=None)
        assert sink.content() == data
    assert broken.proxy.hits == 1, "the fault did not strike"


async def test_stalled_transfer_can_be_cancelled(broken: Broken, tmp_path: Path) -> None:
    """At once, not at the deadline."""
    url = broken.subject.put("object", content(8 * MIB))
    broken.proxy.stall(after_bytes=5 * MIB, times=100)
    with FileSink(tmp_path / "sink", 8 * MIB) as sink:
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:

                async def fetch() -> None:
                    await broken.patient().fetch(url, Span(0, 8 * MIB), sink=sink, validator=None)

                nursery.start_soon(fetch)
                await sink.first_landed.wait()
                await trio.to_thread.run_sync(broken.proxy.wait_for_hit)
                nursery.cancel_scope.cancel()
        found = sink.content()
        broken.proxy.release()
        await broken.bare.stat(url)
        assert sink.content() == found, "bytes were written after the fetch was cancelled"


async def test_refused_connection(broken: Broken, tmp_path: Path) -> None:
    url = broken.subject.put("object", b"x")
    broken.proxy.refuse()
    with pytest.raises(RemoteUnavailable) as caught:
        await broken.bare.stat(url)
    assert url in str(caught.value)
    with FileSink(tmp_path / "sink", 1) as sink, pytest.raises(RemoteUnavailable):
        await broken.wrapped().fetch(url, Span(0, 1), sink=sink, validator=None)
    (result,) = await broken.wrapped().fetch_batch([Item(url)])
    assert isinstance(result, RemoteUnavailable)
    broken.proxy.accept_again()
    assert (await broken.bare.stat(url)).size_bytes == 1


@pytest.mark.parametrize("what", ["stat", "list", "batch"])
async def test_a_broken_question_is_asked_again(broken: Broken, what: str) -> None:
    url = broken.subject.put("object", b"content")
    remote = broken.wrapped()
    broken.proxy.cut(after_bytes=10)
    if what == "stat":
        assert (await remote.stat(url)).size_bytes == 7
    elif what == "list":
        assert set(await listed(remote, broken.subject.directory)) == {"object"}
    else:
        (result,) = await remote.fetch_batch([Item(url)])
        assert isinstance(result, WholeObject)
        assert result.data == b"content"
    assert broken.proxy.hits == 1, "the fault did not strike"


async def test_a_stat_does_not_queue_behind_stalled_transfers(
    broken: Broken, tmp_path: Path
) -> None:
    data = content(4 * MIB)
    stalled = broken.subject.put("stalled", data)
    other = broken.subject.put("other", b"12345")
    few = msgspec.structs.replace(SHORT, concurrency=2)
    remote = broken.wrapped(few)
    broken.proxy.stall(after_bytes=2 * MIB, times=2)
    sinks = [FileSink(tmp_path / f"sink{number}", len(data)) for number in range(6)]
    async with trio.open_nursery() as nursery:

        async def fetch(sink: FileSink) -> None:
            await remote.fetch(stalled, Span(0, len(data)), sink=sink, validator=None)

        for sink in sinks:
            nursery.start_soon(fetch, sink)
        await trio.to_thread.run_sync(broken.proxy.wait_for_hit)
        with trio.fail_after(HANG_S):
            assert (await remote.stat(other)).size_bytes == 5
        nursery.cancel_scope.cancel()
    for sink in sinks:
        sink.__exit__(None, None, None)
