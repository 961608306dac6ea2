"""Declared checksums: hashing a whole cached object, in a worker thread."""

import os

from stagefs.errors import ChecksumMismatch
from stagefs.model import MIB, Checksum, ChecksumKind
from stagefs.remote.digest import hasher


def mismatch(url: str, declared: Checksum, found: str) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"{url} does not have the content that was declared: its {declared.kind} is {found}, "
        f"declared was {declared.digest}; check the source, or stage it in again with --replace"
    )


def digest_of_file(fd: int, *, base: int, size_bytes: int, kind: ChecksumKind) -> str:
    """Hex digest of ``size_bytes`` bytes of ``fd`` from ``base``, fewer if it ends.  Blocking."""
    state = hasher(kind)
    done = 0
    while done < size_bytes:
        piece = os.pread(fd, min(MIB, size_bytes - done), base + done)
        if not piece:
            break
        state.update(piece)
        done += len(piece)
    return state.hexdigest()


def digest_of_bytes(data: bytes, kind: ChecksumKind) -> str:
    state = hasher(kind)
    state.update(data)
    return state.hexdigest()
