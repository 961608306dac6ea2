"""The file whose content a put sends: read at offsets, and compared with what was declared.

Blocking; used in worker threads and in engine processes.  A source is whole and does not
change, so readers need no lock.
"""

import os
from collections.abc import Callable

from stagefs.errors import ChecksumMismatch, NameExists, StateFailed
from stagefs.model import MIB, Checksum
from stagefs.remote.digest import Hasher, hasher


class Source:
    """``size_bytes`` bytes of a file, as the content of the object at ``url``."""

    def __init__(self, fd: int, *, url: str, size_bytes: int) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self.url = url

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes.  Raises ChecksumMismatch when the file is shorter than declared,
        and StateFailed when it cannot be read."""
        try:
            data = os.pread(self.fd, length, offset)
            while len(data) < length:
                more = os.pread(self.fd, length - len(data), offset + len(data))
                if not more:
                    raise shorter_source(self.url, self.size_bytes, offset + len(data))
                data += more
        except OSError as exc:
            raise StateFailed(
                f"The output for {self.url} cannot be read here ({exc.strerror}): "
                "check the disk of the outputs directory."
            ) from exc
        return data


class Proof:
    """Whether the bytes that pass, in order, are those that were declared."""

    def __init__(self, checksum: Checksum | None, *, url: str) -> None:
        self._checksum = checksum
        self._url = url
        self._state: Hasher | None = None if checksum is None else hasher(checksum.kind)

    def update(self, data: bytes | memoryview) -> None:
        if self._state is not None:
            self._state.update(data)

    def check(self) -> None:
        """All bytes have passed.  Raises ChecksumMismatch."""
        if self._checksum is None or self._state is None:
            return
        found = self._state.hexdigest()
        if found != self._checksum.digest:
            raise ChecksumMismatch(
                f"{self._url} was not written: its {self._checksum.kind} is {found}, declared was "
                f"{self._checksum.digest}; the local copy, or the copy that arrived, is damaged."
            )


def prove(source: Source, checksum: Checksum | None, *, at_each_step: Callable[[], None]) -> None:
    """That a source is what was declared, asked before any of it is sent.  Raises
    ChecksumMismatch."""
    if source.size_bytes:
        source.read(source.size_bytes - 1, 1)
    proof = Proof(checksum, url=source.url)
    if checksum is not None:
        for offset in range(0, source.size_bytes, MIB):
            proof.update(source.read(offset, min(MIB, source.size_bytes - offset)))
            at_each_step()
    proof.check()


def exists(url: str) -> NameExists:
    return NameExists(
        f"{url} exists and has other content: remove it, name another URL, or allow it to be "
        "replaced with --overwrite."
    )


def shorter_source(url: str, size_bytes: int, found_bytes: int) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"{url} was not written: its local copy ends after {found_bytes} bytes, "
        f"declared were {size_bytes}."
    )


def same_content(source: Source, fd: int, *, at_each_step: Callable[[], None]) -> bool:
    """Whether a file (of the same size) has the source's content.  Raises OSError for ``fd``."""
    offset = 0
    while offset < source.size_bytes:
        length = min(MIB, source.size_bytes - offset)
        theirs = os.pread(fd, length, offset)
        if not theirs or theirs != source.read(offset, len(theirs)):
            return False
        offset += len(theirs)
        at_each_step()
    return True
