"""What happened to a cache, for who asks later: evictions, damage, changes of the capacity.

``history`` in the cache directory, one JSON object a line, and ``history.1`` before it; each at
most HISTORY_BYTES_MAX.  For people, not for the cache: nothing is decided by it, it may be
deleted at any time, and a line that cannot be written is not missed.

Concurrency: any thread writes (one write per call, O_APPEND); readers need no daemon.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from stagefs.cache.layout import open_file

HISTORY_BYTES_MAX = 4 << 20
_NAME, _EARLIER = "history", "history.1"


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """``at`` is seconds since 1970, ``what`` a word: evicted, damaged, capacity.  ``by``: who asked
    for it, empty for the cache itself."""

    at: float
    what: str
    key: str = ""
    url: str = ""
    size_bytes: int = 0
    by: str = ""


def write_events(directory: Path, events: Iterable[Event]) -> None:
    """Blocking; never raises for the disk's sake."""
    text = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
    if not text:
        return
    path = directory / _NAME
    with contextlib.suppress(OSError):
        fd = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(fd, text)
            is_full = os.fstat(fd).st_size > HISTORY_BYTES_MAX
        finally:
            os.close(fd)
        if is_full:
            os.replace(path, directory / _EARLIER)


def read_events(directory: Path) -> Iterator[Event]:
    """The oldest first.  Lines that cannot be read are left out."""
    decoder = msgspec.json.Decoder(Event)
    for name in (_EARLIER, _NAME):
        try:
            lines = (directory / name).read_bytes().splitlines()
        except OSError:
            continue
        for line in lines:
            with contextlib.suppress(msgspec.DecodeError):
                yield decoder.decode(line)


class EvictionRate(msgspec.Struct, frozen=True):
    """Evictions of the last ``minutes``.  ``again``: entries evicted more than once meanwhile, so
    that they were fetched in between: the sign of a capacity that is too small."""

    minutes: float
    entries: int
    size_bytes: int
    again: int


def eviction_rate(events: Iterable[Event], *, minutes: float) -> EvictionRate:
    since = time.time() - minutes * 60
    times: dict[str, int] = {}
    size_bytes = 0
    for event in events:
        if event.what == "evicted" and event.at >= since:
            times[event.key] = times.get(event.key, 0) + 1
            size_bytes += event.size_bytes
    again = sum(count > 1 for count in times.values())
    return EvictionRate(minutes, sum(times.values()), size_bytes, again)
