"""Catalogs: lists of names, URLs, sizes, times and checksums to import.  Parsing only.

Two formats, with the same columns:

* JSON lines: one object a line, ``{"name": "run1/a.fq", "url": "https://host/a.fq",
  "size": 1024, "mtime": 1700000000.5, "checksum": "sha256:..."}``.
* CSV with a header line that names the columns, in any order (a file whose name ends in
  ``.csv``, or that does not begin with ``{``).

``name`` is a relative path, taken literally: percent signs and backslashes are characters.
``size`` in bytes is required, so that nothing needs to be asked of a remote before a file
is read.  ``mtime`` is seconds since 1970 (with fraction) or ISO 8601 (UTC where it does not
say), 1970 where it is missing.  ``checksum`` is ``sha256:``, ``md5:`` or ``xxh3:`` and hex
digits; it is verified when the file was fetched.  Other columns are an error, for a
misspelt one would be lost.  Bytes that are not UTF-8 are allowed in names.

The first line that is wrong raises InvalidCatalog, which names it.  URLs must not hold
passwords, tokens or signatures: a catalog is no place for them, and they would expire.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import BinaryIO

import msgspec

from stagefs.errors import InvalidCatalog, InvalidName, InvalidUrl
from stagefs.namespace.node import NAME_BYTES_MAX, encoded_name
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.url import normalize, shown

COLUMNS = ("name", "url", "size", "mtime", "checksum")
LINE_BYTES_MAX = 1 << 20
PATH_BYTES_MAX = 4095
SIZE_BYTES_MAX = 1 << 62
# Beyond year 2100 a number is not seconds.
_MTIME_S_MAX = 4_200_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}|xxh3:[0-9a-f]{16}")
# As many digits as any size or time has: Python refuses to convert thousands of them.
_DIGITS = re.compile(r"[0-9]{1,30}")
_NUMBER = re.compile(r"-?[0-9]{1,30}(\.[0-9]*)?")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class CatalogEntry(msgspec.Struct, frozen=True, gc=False):
    """One line.  ``directory`` is the path before ``name``, empty at the top."""

    line: int
    directory: str
    name: bytes
    url: str
    size_bytes: int
    mtime_ns: int
    checksum: str | None

    @property
    def version(self) -> str:
        """See ObjectId."""
        return declared_version(self.size_bytes, self.mtime_ns, self.checksum)


def declared_version(size_bytes: int, mtime_ns: int, checksum: str | None) -> str:
    return checksum or f"declared:{size_bytes}:{mtime_ns}"


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    url: str
    size: int | None = None
    mtime: int | float | str | None = None
    checksum: str | None = None


def read_catalog(file: BinaryIO, file_name: str) -> Iterator[CatalogEntry]:
    """The entries in order.  Raises InvalidCatalog at the first line that is wrong."""
    file = _after_byte_order_mark(file)
    start = file.read(LINE_BYTES_MAX).lstrip()[:1]
    _after_byte_order_mark(file)
    is_csv = file_name.lower().endswith(".csv") or start not in (b"{", b"")
    lines = _csv_lines(file) if is_csv else _json_lines(file)
    check = _Checks()
    for number, line in lines:
        try:
            yield check.entry(number, line)
        except (InvalidName, InvalidUrl) as exc:
            raise InvalidCatalog(f"Line {number} of the catalog: {exc}") from exc


def _after_byte_order_mark(file: BinaryIO) -> BinaryIO:
    file.seek(0)
    if file.read(3) != _BYTE_ORDER_MARK:
        file.seek(0)
    return file


def _json_lines(file: BinaryIO) -> Iterator[tuple[int, _Line]]:
    decode: Callable[[bytes], _Line] = msgspec.json.Decoder(_Line).decode
    number = 0
    while raw := file.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(raw) > LINE_BYTES_MAX:
            raise InvalidCatalog(f"Line {number} of the catalog is longer than 1 MiB.")
        try:
            line = decode(raw)
        except msgspec.ValidationError as exc:
            raise InvalidCatalog(f"Line {number} of the catalog: {exc}.") from exc
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            if not raw.strip():
                continue
            line = _json_of_any_bytes(raw, number, exc)
        yield number, line


def _json_of_any_bytes(raw: bytes, number: int, cause: Exception) -> _Line:
    """Names that are not UTF-8: as raw bytes, or as the escapes that Python writes for them."""
    try:
        text = raw.decode("utf-8", "surrogateescape")
        return msgspec.convert(json.loads(text), _Line)
    except (ValueError, RecursionError) as exc:
        raise InvalidCatalog(f"Line {number} of the catalog is not JSON ({cause}).") from exc


def _csv_lines(file: BinaryIO) -> Iterator[tuple[int, _Line]]:
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(_bounded_lines(text), strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        _check_header(header)
        for row in reader:
            if not row:
                continue
            number = reader.line_num
            if len(row) != len(header):
                raise InvalidCatalog(
                    f"Line {number} of the catalog has {len(row)} fields, "
                    f"its header names {len(header)}."
                )
            yield number, _csv_line(dict(zip(header, row, strict=True)), number)
    except csv.Error as exc:
        raise InvalidCatalog(f"Line {reader.line_num} of the catalog is not CSV ({exc}).") from exc
    finally:
        text.detach()


def _bounded_lines(text: io.TextIOBase) -> Iterator[str]:
    """Lines with their ends.  A file without any must not become one line in memory."""
    number = 0
    while line := text.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(line) > LINE_BYTES_MAX:
            raise InvalidCatalog(f"Line {number} of the catalog is longer than 1 MiB.")
        yield line


def _check_header(header: list[str]) -> None:
    for column in header:
        if column not in COLUMNS:
            raise InvalidCatalog(
                f"Line 1 of the catalog: there is no column {column[:40]!r}; "
                f"columns are {', '.join(COLUMNS)}."
            )
    if len(set(header)) != len(header):
        raise InvalidCatalog("Line 1 of the catalog names a column twice.")
    for column in ("name", "url", "size"):
        if column not in header:
            raise InvalidCatalog(f"Line 1 of the catalog names no column {column!r}.")


def _csv_line(fields: dict[str, str], number: int) -> _Line:
    size = fields["size"].strip()
    if size and not _DIGITS.fullmatch(size):
        raise InvalidCatalog(f"Line {number} of the catalog: the size {size[:40]!r} is no number.")
    return _Line(
        name=fields["name"],
        url=fields["url"].strip(),
        size=int(size) if size else None,
        mtime=fields.get("mtime", "").strip() or None,
        checksum=fields.get("checksum", "").strip() or None,
    )


class _Checks:
    """Turns lines into entries.  Remembers the last directory: neighbours share it."""

    def __init__(self) -> None:
        self._directory = ""
        self._public = CredentialStore(None).public

    def entry(self, number: int, line: _Line) -> CatalogEntry:
        directory, _, base = line.name.rpartition("/")
        if directory != self._directory or (not directory and line.name.startswith("/")):
            self._check_directory(line.name, directory)
            self._directory = directory
        size_bytes = line.size
        if size_bytes is None:
            raise InvalidCatalog(
                f"Line {number} of the catalog gives no size for {line.name[:80]!r}: "
                "the size in bytes is needed, so that no remote has to be asked."
            )
        if not 0 <= size_bytes < SIZE_BYTES_MAX:
            raise InvalidCatalog(f"Line {number} of the catalog: {size_bytes} cannot be a size.")
        checksum = line.checksum
        if checksum is not None:
            checksum = checksum.lower()
            if not _CHECKSUM.fullmatch(checksum):
                raise InvalidCatalog(
                    f"Line {number} of the catalog: {line.checksum!r:.100} is no checksum: "
                    "write sha256:, md5: or xxh3: and its hex digits."
                )
        return CatalogEntry(
            line=number,
            directory=directory,
            name=encoded_name(base),
            url=self._checked_url(line.url, number),
            size_bytes=size_bytes,
            mtime_ns=0 if line.mtime is None else _mtime_ns(line.mtime, number),
            checksum=checksum,
        )

    @staticmethod
    def _check_directory(name: str, directory: str) -> None:
        if name.startswith("/"):
            raise InvalidName(f"the name {name[:80]!r} is an absolute path: make it relative.")
        for part in directory.split("/"):
            if part or directory:
                encoded_name(part)
        if len(directory.encode("utf-8", "surrogateescape")) > PATH_BYTES_MAX - NAME_BYTES_MAX:
            raise InvalidName(f"the name {name[:80]!r}... is longer than {PATH_BYTES_MAX} bytes.")

    def _checked_url(self, url: str, number: int) -> str:
        normal = normalize(url)
        if ("@" in normal or "?" in normal) and self._public(normal) != normal:
            raise InvalidCatalog(
                f"Line {number} of the catalog: the URL {shown(url)!r} holds a password, token or "
                "signature: leave it out and let the remote's own configuration provide it."
            )
        if normal.startswith("staging:"):
            raise InvalidCatalog(
                f"Line {number} of the catalog: {normal!r:.100} is a name in the mount, "
                "not the URL of a remote object."
            )
        return normal


def _mtime_ns(mtime: int | float | str, number: int) -> int:
    if isinstance(mtime, int):
        seconds, nanoseconds = mtime, 0
    elif isinstance(mtime, float):
        if not abs(mtime) <= _MTIME_S_MAX:  # so that NaN is refused too
            raise InvalidCatalog(f"Line {number} of the catalog: {mtime} is no time.")
        seconds, nanoseconds = 0, round(mtime * 1e9)
    elif _NUMBER.fullmatch(mtime):
        whole, _, fraction = mtime.partition(".")
        sign = -1 if whole.startswith("-") else 1
        seconds, nanoseconds = int(whole), sign * int((fraction + "000000000")[:9])
    else:
        seconds, nanoseconds = 0, _iso_ns(mtime, number)
    total = seconds * 1_000_000_000 + nanoseconds
    if abs(total) > _MTIME_S_MAX * 1_000_000_000:
        raise InvalidCatalog(
            f"Line {number} of the catalog: the time {mtime!r:.60} is not in seconds since 1970."
        )
    return total


def _iso_ns(text: str, number: int) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise InvalidCatalog(
            f"Line {number} of the catalog: {text!r:.60} is no time: "
            "write seconds since 1970, or ISO 8601."
        ) from exc
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000
