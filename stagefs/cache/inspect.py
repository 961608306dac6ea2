"""Looking into a cache directory without a daemon, or beside one: list, usage, show, verify.

Never writes.  Uses the index when there is a whole one, else the files themselves; ``verify``
always reads the files, because they are the truth.  A daemon may be at work meanwhile: what
vanishes while it is looked at is left out and is no damage.

Concurrency: blocking, no shared state.  Light to import: no event loop, no network.
"""

import contextlib
import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path

import msgspec

from stagefs.cache import layout
from stagefs.cache.directory import check_format, read_owner
from stagefs.cache.file_system import allocated_bytes
from stagefs.cache.hashing import slot_of
from stagefs.cache.index import IndexRow, has_whole_index, read_rows
from stagefs.cache.journal import keys_noted
from stagefs.cache.leases import Lease, read_leases
from stagefs.cache.packed import read_head, scan
from stagefs.cache.rebuild import (
    ObjectMap,
    object_files,
    opened,
    read_object,
    read_open_object,
    rows_of_objects,
    rows_of_segment,
    segment_files,
)
from stagefs.errors import DamagedEntry, InvalidName, UnsuitableState

_KEY = re.compile(r"[0-9a-f]{40}")


class EntrySummary(msgspec.Struct, frozen=True):
    """What the cache holds of one object.  ``place`` is its file below the cache directory, with
    the offset of the record for a packed one; ``used_ns`` counts from 1970."""

    key: str
    url: str
    version: str
    size_bytes: int
    cached_bytes: int
    disk_bytes: int
    used_ns: int
    pinned: bool
    place: str


class ShownLease(msgspec.Struct, frozen=True):
    """Seconds since 1970; ``expires`` None: a pin without an end."""

    owner: str
    since: float
    expires: float | None


class EntryDetail(msgspec.Struct, frozen=True):
    """One entry with its chunk map: ``present`` is runs of (first chunk, count)."""

    entry: EntrySummary
    validator: str
    mtime_ns: int | None
    checksum: str | None
    chunk_bytes: int
    chunk_count: int
    present: list[tuple[int, int]]
    leases: list[ShownLease]


class DirectoryUsage(msgspec.Struct, frozen=True):
    """``used_bytes`` is what everything in the directory takes on disk, ``cached_bytes`` the bytes
    of objects in it.  ``daemon`` names who has it open, if anybody."""

    directory: str
    entries: int
    cached_bytes: int
    used_bytes: int
    pinned_bytes: int
    segments: int
    leases: int
    disk_free_bytes: int
    index_complete: bool
    daemon: str | None


class Verifying(msgspec.Struct, frozen=True):
    """How far ``verify`` is: bytes of chunks read, of all that are present, and entries done.
    ``after``: a verify that begins behind it goes on here; empty in the middle of an entry."""

    entries: int
    done_bytes: int
    total_bytes: int
    after: str = ""


class FoundDamage(msgspec.Struct, frozen=True):
    """``chunk`` is None when the whole file or a stretch of a segment is meant."""

    path: str
    reason: str
    key: str | None = None
    url: str | None = None
    chunk: int | None = None


class CacheDirectory:
    def __init__(self, directory: Path) -> None:
        """Raises UnsuitableState, NewerFormat."""
        self._paths = layout.Paths(directory)
        try:
            tag = self._paths.tag.read_bytes()
            check_format(directory)
            os.listdir(directory)
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise _not_a_cache(directory) from exc
        except OSError as exc:
            raise UnsuitableState(
                f"the cache directory {directory} cannot be read: {exc.strerror}"
            ) from exc
        if not tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55"):
            raise _not_a_cache(directory)
        if not self._paths.version.exists():
            raise _not_a_cache(directory)

    # Listing.

    def entries(self) -> Iterator[EntrySummary]:
        """All entries, the most recently used first where the index tells."""
        pinned = {lease.key for lease in read_leases(self._paths.leases)}
        for row in self._rows():
            yield _summary(row, pinned)

    def _rows(self, *, url: bytes | None = None) -> Iterator[IndexRow]:
        indexed = read_rows(self._paths.index, url=url)
        if indexed is None:
            yield from self._rows_of_files(url)
            return
        newer = self._noted_rows(url)
        for row in indexed:
            yield newer.pop(row.key, row)
        yield from newer.values()

    def _noted_rows(self, url: bytes | None) -> dict[bytes, IndexRow]:
        """Entries that the index has still to catch up with, from their files."""
        rows = {}
        with contextlib.suppress(OSError):
            for key in keys_noted(self._paths.directory):
                with contextlib.suppress(OSError, DamagedEntry):
                    row = read_object(Path(self._paths.object_file(key)), key).row(key)
                    if url in (None, row.url):
                        rows[row.key] = row
        return rows

    def _rows_of_files(self, url: bytes | None) -> Iterator[IndexRow]:
        for row in rows_of_objects(self._paths):
            if isinstance(row, IndexRow) and url in (None, row.url):
                yield row
        seen: set[bytes] = set()
        for number, path in sorted(segment_files(self._paths), reverse=True):
            for found in reversed(list(rows_of_segment(path, number))):
                if isinstance(found, IndexRow) and found.key not in seen:
                    seen.add(found.key)
                    if url in (None, found.url):
                        yield found

    def usage(self) -> DirectoryUsage:
        pinned = {lease.key for lease in read_leases(self._paths.leases)}
        entries = cached_bytes = disk_bytes = pinned_bytes = 0
        for row in self._rows():
            entries += 1
            cached_bytes += row.cached_bytes
            disk_bytes += 0 if row.segment else row.disk_bytes
            if pinned and row.key.hex() in pinned:
                pinned_bytes += row.disk_bytes
        segments = [path for _, path in segment_files(self._paths)]
        system = os.statvfs(self._paths.directory)
        return DirectoryUsage(
            directory=str(self._paths.directory),
            entries=entries,
            cached_bytes=cached_bytes,
            used_bytes=disk_bytes + _disk_bytes(segments) + self._overhead_bytes(),
            pinned_bytes=pinned_bytes,
            segments=len(segments),
            leases=len(pinned),
            disk_free_bytes=system.f_bavail * system.f_frsize,
            index_complete=has_whole_index(self._paths.index),
            daemon=self._daemon(),
        )

    def _overhead_bytes(self) -> int:
        top = [path for path in self._paths.directory.iterdir() if not path.is_symlink()]
        fans = [path for path in self._paths.objects.iterdir() if path.is_dir()]
        return _disk_bytes([self._paths.directory, *top, *fans])

    def _daemon(self) -> str | None:
        """Who holds the lock.  Asked of /proc/locks: to try the lock, even for a moment, could
        turn away a daemon that starts just then."""
        try:
            inode = self._paths.lock.stat().st_ino
            locks = Path("/proc/locks").read_text("ascii").splitlines()
        except OSError:
            return None
        if not any("FLOCK" in line and f":{inode} " in line for line in locks):
            return None
        owner = read_owner(self._paths)
        return "unknown" if owner is None else f"process {owner.pid} on {owner.host}"

    # One entry.

    def show(self, subject: str) -> list[EntryDetail]:
        """The entry with this key, or all of this URL (one per version).  Raises InvalidName."""
        leases = read_leases(self._paths.leases)
        if _KEY.fullmatch(subject):
            rows = [row for row in self._rows() if row.key.hex() == subject]
        else:
            rows = list(self._rows(url=subject.encode("utf-8", "surrogateescape")))
        details = [detail for row in rows if (detail := self._detail(row, leases)) is not None]
        if not details:
            raise InvalidName(
                f"nothing is cached of {subject}: name a key or a URL that"
                f" `stagefs-cache list {self._paths.directory}` shows"
            )
        return details

    def _detail(self, row: IndexRow, leases: list[Lease]) -> EntryDetail | None:
        key = row.key.hex()
        own = [lease for lease in leases if lease.key == key]
        try:
            header, present = self._map_of(row)
        except (OSError, DamagedEntry):
            return None
        return EntryDetail(
            entry=_summary(row, {lease.key for lease in own}),
            validator=layout.validator_text(header),
            mtime_ns=header.mtime_ns,
            checksum=None if header.checksum is None else str(header.checksum),
            chunk_bytes=header.chunk_bytes,
            chunk_count=header.chunk_count,
            present=_runs(present),
            leases=[ShownLease(each.owner, each.since, each.expires) for each in own],
        )

    def _map_of(self, row: IndexRow) -> tuple[layout.EntryHeader, bytearray]:
        key = row.key.hex()
        if not row.segment:
            found = read_object(Path(self._paths.object_file(key)), key)
            return found.header, found.present
        with opened(self._paths.segment_file(row.segment)) as fd:
            record = layout.decode_record(read_head(fd, row.offset), row.offset)
        if record is None or record.header.object_id.key != key:
            raise DamagedEntry("the record is damaged")
        return record.header, bytearray(bool(record.data_hash) for _ in range(bool(row.size_bytes)))

    # Verifying.

    def verify(self, *, after: str = "") -> Generator[Verifying | FoundDamage, None, None]:
        """Hash everything that is present and compare; reads the whole cache, or what comes after
        ``Verifying.after`` of an earlier call.  Progress comes after each chunk and each segment,
        and once at the end."""
        total_bytes = sum(row.cached_bytes for row in self._rows())
        entries = done_bytes = 0
        for step in self._verify_steps(after):
            if isinstance(step, FoundDamage):
                yield step
                continue
            finished, read_bytes, reached = step
            entries += finished
            done_bytes += read_bytes
            yield Verifying(entries, done_bytes, max(total_bytes, done_bytes), reached)

    def _verify_steps(self, after: str) -> "Iterator[FoundDamage | tuple[int, int, str]]":
        """Damage, or (entries finished, bytes read, place).  Objects in the order of their keys,
        then segments, whose places begin with ``s``: behind every key."""
        for key, path in object_files(self._paths):
            if key <= after:
                continue
            try:
                with opened(path) as fd:
                    yield from _verify_object(fd, path, key)
            except FileNotFoundError:
                continue
            except OSError as exc:
                yield FoundDamage(str(path), f"cannot be read: {exc.strerror}", key)
        for number, path in segment_files(self._paths):
            if (place := f"s{number:06d}") <= after:
                continue
            try:
                with opened(path) as fd:
                    yield from _verify_segment(fd, path, place)
            except FileNotFoundError:
                continue
            except OSError as exc:
                yield FoundDamage(str(path), f"cannot be read: {exc.strerror}")


def _verify_object(fd: int, path: Path, key: str) -> "Iterator[FoundDamage | tuple[int, int, str]]":
    try:
        found = read_open_object(fd, key)
    except DamagedEntry as exc:
        yield FoundDamage(str(path), str(exc), key)
        return
    header = found.header
    for chunk, slot in enumerate(memoryview(found.slots).cast("Q")):
        if slot:
            start = chunk * header.chunk_bytes
            length = min(header.chunk_bytes, header.size_bytes - start)
            if not _is_right(fd, start, length, slot) and _still(fd, found, chunk, slot):
                url = header.object_id.url
                yield FoundDamage(str(path), "the chunk is not what was fetched", key, url, chunk)
            yield 0, length, ""
    yield 1, 0, key


def _is_right(fd: int, start: int, length: int, slot: int) -> bool:
    try:
        return slot_of(fd, start, length) == slot
    except OSError:
        return False


def _still(fd: int, found: ObjectMap, chunk: int, slot: int) -> bool:
    """Whether the slot is what it was: a daemon that evicts a chunk clears it first."""
    place = found.slots_offset + chunk * layout.SLOT.size
    return os.pread(fd, layout.SLOT.size, place) == layout.SLOT.pack(slot)


def _verify_segment(
    fd: int, path: Path, place: str
) -> "Iterator[FoundDamage | tuple[int, int, str]]":
    entries = read_bytes = 0
    for record in scan(fd):
        if record is None:
            yield FoundDamage(str(path), "a stretch of the segment is damaged")
        elif record.live and record.data_hash:
            entries += 1
            read_bytes += record.data_bytes
            if not _is_right(fd, record.data_offset, record.data_bytes, record.data_hash):
                object_id = record.header.object_id
                reason = "the record is not what was fetched"
                yield FoundDamage(str(path), reason, object_id.key, object_id.url, 0)
    yield entries, read_bytes, place


def _not_a_cache(directory: Path) -> UnsuitableState:
    return UnsuitableState(
        f"{directory} is not a cache directory of StageFS: name the one that holds CACHEDIR.TAG"
        " and version (`stagefs mount` says where it is)"
    )


def _summary(row: IndexRow, pinned: set[str]) -> EntrySummary:
    key = row.key.hex()
    place = f"objects/{key[:2]}/{key}"
    if row.segment:
        place = f"segments/{row.segment:06d}@{row.offset}"
    return EntrySummary(
        key=key,
        url=row.url.decode("utf-8", "surrogateescape"),
        version=row.version.decode("utf-8", "surrogateescape"),
        size_bytes=row.size_bytes,
        cached_bytes=row.cached_bytes,
        disk_bytes=row.disk_bytes,
        used_ns=row.used_at * 1_000_000,
        pinned=key in pinned,
        place=place,
    )


def _runs(present: bytearray) -> list[tuple[int, int]]:
    runs = []
    first = present.find(1)
    while first >= 0:
        stop = present.find(0, first)
        stop = len(present) if stop < 0 else stop
        runs.append((first, stop - first))
        first = present.find(1, stop)
    return runs


def _disk_bytes(paths: list[Path]) -> int:
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            total += allocated_bytes(path.lstat())
    return total
