"""What every remote promises (see ``stagefs.remote.base``), on a real server each.

No test knows which remote it runs on; what a protocol cannot express its Subject leaves out.
"""

import random
import threading
from pathlib import Path

import msgspec
import pytest
import trio

from stagefs.errors import (
    AccessDenied,
    ObjectChanged,
    ObjectMissing,
    RemoteError,
    StageFSError,
)
from stagefs.model import MIB, EntryKind, ListedEntry, Span, WholeObject
from stagefs.remote.base import WHOLE_OBJECT_BYTES_MAX, Remote
from stagefs.remote.url import join, last_name
from tests.contract.subjects import Subject
from tests.support.sinks import FileSink
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(60)


class Item(msgspec.Struct, frozen=True):
    url: str
    validator: str | None = None


def content(size_bytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


async def fetched(
    remote: Remote, url: str, span: Span, path: Path, *, validator: str | None = None
) -> bytes:
    """The bytes of a span through a sink that begins where the span does."""
    with FileSink(path, span.length, shift=span.start) as sink:
        await remote.fetch(url, span, sink=sink, validator=validator)
        assert sink.landed_bytes == span.length, "not every byte of the span landed"
        return sink.content()


async def listed(remote: Remote, url: str) -> dict[str, ListedEntry]:
    entries: dict[str, ListedEntry] = {}
    async for page in remote.list(url):
        for entry in page:
            assert entry.name not in entries, f"{entry.name!r} was listed twice"
            entries[entry.name] = entry
    return entries


async def test_stat_tells_size_and_version(subject: Subject) -> None:
    url = subject.put("object", b"twelve bytes")
    info = await subject.remote.stat(url)
    assert (info.url, info.size_bytes) == (url, 12)
    assert info.validator, "no validator"
    assert await subject.remote.stat(url) == info, "two stats of one version differ"


async def test_stat_tells_another_version(subject: Subject) -> None:
    before = await subject.remote.stat(subject.put("object", b"first version"))
    after = await subject.remote.stat(subject.put("object", b"other version"))
    assert before.size_bytes == after.size_bytes
    assert before.validator != after.validator


async def test_missing_object(subject: Subject, tmp_path: Path) -> None:
    subject.put("present", b"x")
    url = join(subject.directory, "absent")
    with pytest.raises(ObjectMissing):
        await subject.remote.stat(url)
    with pytest.raises(ObjectMissing):
        await fetched(subject.remote, url, Span(0, 1), tmp_path / "sink")


async def test_a_directory_is_no_object(subject: Subject) -> None:
    subject.put("directory/object", b"x")
    with pytest.raises(RemoteError) as caught:
        await subject.remote.stat(join(subject.directory, "directory"))
    if subject.directories_have_errors:
        assert not isinstance(caught.value, ObjectMissing)
        assert "directory" in str(caught.value)


async def test_forbidden_object(subject: Subject, tmp_path: Path) -> None:
    remote, url = subject.forbidden("secret", b"secret")
    with pytest.raises(AccessDenied) as caught:
        await fetched(remote, url, Span(0, 6), tmp_path / "sink")
    assert last_name(url) in str(caught.value)


@pytest.mark.parametrize(
    "span",
    [
        Span(0, 1),
        Span(0, 3 * MIB + 17),
        Span(5, 1000),
        Span(MIB - 1, 2),
        Span(MIB, MIB),
        Span(3 * MIB + 16, 1),
    ],
    ids=str,
)
async def test_fetch_of_a_span(subject: Subject, span: Span, tmp_path: Path) -> None:
    data = content(3 * MIB + 17)
    url = subject.put("object", data)
    info = await subject.remote.stat(url)
    got = await fetched(subject.remote, url, span, tmp_path / "sink", validator=info.validator)
    assert got == data[span.start : span.stop]


async def test_fetch_returns_what_stat_says(subject: Subject, tmp_path: Path) -> None:
    url = subject.put("object", b"0123456789")
    info = await subject.remote.stat(url)
    with FileSink(tmp_path / "sink", 4) as sink:
        found = await subject.remote.fetch(url, Span(0, 4), sink=sink, validator=None)
    assert (found.url, found.size_bytes, found.validator) == (url, 10, info.validator)


async def test_fetch_writes_nothing_outside_its_span(subject: Subject, tmp_path: Path) -> None:
    data = content(100_000)
    url = subject.put("object", data)
    with FileSink(tmp_path / "sink", 100_000) as sink:
        await subject.remote.fetch(url, Span(40_000, 20_000), sink=sink, validator=None)
        written = sink.content()
    untouched = b"\xa5" * 40_000
    assert written == untouched + data[40_000:60_000] + untouched


async def test_parallel_spans_of_one_object(subject: Subject, tmp_path: Path) -> None:
    data = content(8 * MIB)
    url = subject.put("object", data)
    info = await subject.remote.stat(url)
    parts: dict[int, bytes] = {}

    async def fetch(start: int) -> None:
        parts[start] = await fetched(
            subject.remote,
            url,
            Span(start, MIB),
            tmp_path / f"sink{start}",
            validator=info.validator,
        )

    async with trio.open_nursery() as nursery:
        for start in range(0, 8 * MIB, MIB):
            nursery.start_soon(fetch, start)
    assert b"".join(parts[start] for start in sorted(parts)) == data


async def test_empty_object(subject: Subject, tmp_path: Path) -> None:
    url = subject.put("empty", b"")
    info = await subject.remote.stat(url)
    assert info.size_bytes == 0
    got = await fetched(subject.remote, url, Span(0, 0), tmp_path / "s", validator=info.validator)
    assert got == b""


async def test_tail_of_a_large_object(subject: Subject, tmp_path: Path) -> None:
    url = subject.put_large("large", b"the very end")
    info = await subject.remote.stat(url)
    assert info.size_bytes == subject.large_bytes
    span = Span(info.size_bytes - 4096, 4096)
    got = await fetched(subject.remote, url, span, tmp_path / "s", validator=info.validator)
    assert got == bytes(4096 - 12) + b"the very end"


async def test_changed_object_is_noticed(subject: Subject, tmp_path: Path) -> None:
    url = subject.put("object", content(MIB, seed=1))
    info = await subject.remote.stat(url)
    subject.put("object", content(MIB, seed=2))
    with pytest.raises(ObjectChanged):
        await fetched(
            subject.remote, url, Span(0, MIB), tmp_path / "sink", validator=info.validator
        )


async def test_shorter_object_is_noticed(subject: Subject, tmp_path: Path) -> None:
    url = subject.put("object", b"short")
    for span in (Span(0, 6), Span(4, 100), Span(1000, 10)):
        with pytest.raises(ObjectChanged):
            await fetched(subject.remote, url, span, tmp_path / "sink")


async def test_no_fetch_mixes_versions(subject: Subject, tmp_path: Path) -> None:
    """The object is replaced while it is fetched: all of one version, or an error."""
    old, new = b"o" * 24 * MIB, b"n" * 24 * MIB
    url = subject.put("object", old)
    info = await subject.remote.stat(url)
    with FileSink(tmp_path / "sink", len(old)) as sink:

        async def replace() -> None:
            await sink.first_landed.wait()
            subject.put("object", new)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(replace)
            try:
                await subject.remote.fetch(
                    url, Span(0, len(old)), sink=sink, validator=info.validator
                )
            except ObjectChanged:
                nursery.cancel_scope.cancel()
            landed = sink.content()[: sink.landed_bytes]
    assert landed.count(b"o") == len(landed), "bytes of the new version landed under the old one"


async def test_cancelled_fetch_leaves_the_sink_alone(subject: Subject, tmp_path: Path) -> None:
    data = content(64 * MIB) if subject.large_bytes > 64 * MIB else content(16 * MIB)
    url = subject.put("object", data)
    with FileSink(tmp_path / "sink", len(data)) as sink:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await sink.first_landed.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(cancel)
            await subject.remote.fetch(url, Span(0, len(data)), sink=sink, validator=None)
            nursery.cancel_scope.cancel()
        after_cancel = sink.content()
        landed = sink.landed_bytes
        # Whatever still ran would show in what a second fetch, of other bytes, finds here.
        await trio.testing.wait_all_tasks_blocked()
        await subject.remote.stat(url)
        assert sink.content() == after_cancel, "bytes were written after the fetch was cancelled"
        assert sink.landed_bytes == landed, "bytes landed after the fetch was cancelled"
        assert after_cancel[:landed] == data[:landed]


async def test_no_thread_is_left_behind(subject: Subject, tmp_path: Path) -> None:
    url = subject.put("object", content(16 * MIB))
    for attempt in range(3):
        with FileSink(tmp_path / f"sink{attempt}", 16 * MIB) as sink, trio.move_on_after(60):
            async with trio.open_nursery() as nursery:

                async def cancel(sink: FileSink, scope: trio.CancelScope) -> None:
                    await sink.first_landed.wait()
                    scope.cancel()

                nursery.start_soon(cancel, sink, nursery.cancel_scope)
                await subject.remote.fetch(url, Span(0, 16 * MIB), sink=sink, validator=None)
                nursery.cancel_scope.cancel()
    await subject.remote.aclose()
    # A client that cannot be woken ends with the piece it is at.
    wait_until(lambda: not _busy_threads(), "the end of all threads that worked for a fetch")


def _busy_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("stagefs")]


async def test_list(subject: Subject) -> None:
    subject.put("one", b"1")
    subject.put("two", b"22")
    subject.put("below/three", b"333")
    entries = await listed(subject.remote, subject.directory)
    assert {name: entry.kind for name, entry in entries.items()} == {
        "one": EntryKind.FILE,
        "two": EntryKind.FILE,
        "below": EntryKind.DIRECTORY,
    }
    below = await listed(subject.remote, entries["below"].url)
    assert set(below) == {"three"}
    info = await subject.remote.stat(below["three"].url)
    assert info.size_bytes == 3


async def test_what_a_listing_tells_serves_for_fetching(subject: Subject, tmp_path: Path) -> None:
    subject.put("object", b"0123456789")
    entry = (await listed(subject.remote, subject.directory))["object"]
    if entry.info is None:
        pytest.skip("the listing tells names only")
    assert entry.info.size_bytes == 10
    got = await fetched(
        subject.remote, entry.url, Span(3, 4), tmp_path / "s", validator=entry.info.validator
    )
    assert got == b"3456"
    subject.put("object", b"9876543210")
    with pytest.raises(ObjectChanged):
        await fetched(
            subject.remote, entry.url, Span(3, 4), tmp_path / "s", validator=entry.info.validator
        )


async def test_list_in_pages(subject: Subject) -> None:
    names = {f"object{number:04}" for number in range(1200)}
    for name in names:
        subject.put(name, b"")
    sizes: list[int] = []
    seen: set[str] = set()
    async for page in subject.remote.list(subject.directory):
        sizes.append(len(page))
        seen |= {entry.name for entry in page}
    assert seen == names
    assert max(sizes) <= 1000, f"pages of {sizes} entries"


async def test_list_of_a_missing_directory(subject: Subject) -> None:
    subject.put("present", b"x")
    with pytest.raises(ObjectMissing):
        await listed(subject.remote, join(subject.directory, "absent"))


async def test_odd_names(subject: Subject, tmp_path: Path) -> None:
    for name in subject.odd_names:
        subject.put(name, name.encode("utf-8", "surrogateescape"))
    entries = await listed(subject.remote, subject.directory)
    assert set(entries) == set(subject.odd_names)
    for name, entry in entries.items():
        data = name.encode("utf-8", "surrogateescape")
        assert entry.url == join(subject.directory, name)
        assert last_name(entry.url) == name
        info = await subject.remote.stat(entry.url)
        assert info.size_bytes == len(data), name
        got = await fetched(
            subject.remote, entry.url, Span(0, len(data)), tmp_path / "sink", validator=None
        )
        assert got == data


async def test_batch_keeps_the_order(subject: Subject) -> None:
    items = [
        Item(subject.put(f"small{number}", f"content {number}".encode())) for number in range(50)
    ]
    results = await subject.remote.fetch_batch(items)
    for number, (item, result) in enumerate(zip(items, results, strict=True)):
        assert isinstance(result, WholeObject), result
        assert result.data == f"content {number}".encode()
        assert (result.info.url, result.info.size_bytes) == (item.url, len(result.data))


async def test_batch_tells_what_failed(subject: Subject) -> None:
    good = subject.put("good", b"good")
    known = await subject.remote.stat(good)
    empty = subject.put("empty", b"")
    large = subject.put("large", bytes(WHOLE_OBJECT_BYTES_MAX + 1))
    stale = subject.put("stale", b"old")
    stale_info = await subject.remote.stat(stale)
    subject.put("stale", b"new")
    results = await subject.remote.fetch_batch(
        [
            Item(join(subject.directory, "absent")),
            Item(good, known.validator),
            Item(large),
            Item(stale, stale_info.validator),
            Item(empty),
        ]
    )
    kinds = [type(result) for result in results]
    assert kinds == [ObjectMissing, WholeObject, ObjectChanged, ObjectChanged, WholeObject]
    assert isinstance(results[1], WholeObject)
    assert results[1].data == b"good"
    assert results[1].info.validator == known.validator


async def test_empty_batch(subject: Subject) -> None:
    assert await subject.remote.fetch_batch([]) == []


async def test_largest_object_of_a_batch(subject: Subject) -> None:
    data = content(WHOLE_OBJECT_BYTES_MAX)
    (result,) = await subject.remote.fetch_batch([Item(subject.put("object", data))])
    assert isinstance(result, WholeObject)
    assert result.data == data


async def test_close_is_idempotent(subject: Subject) -> None:
    await subject.remote.stat(subject.put("object", b"x"))
    await subject.remote.aclose()
    await subject.remote.aclose()


async def test_errors_are_one_sentence_on_the_object(subject: Subject) -> None:
    subject.put("present", b"x")
    url = join(subject.directory, "absent")
    with pytest.raises(StageFSError) as caught:
        await subject.remote.stat(url)
    message = str(caught.value)
    assert url in message
    assert "\n" not in message
