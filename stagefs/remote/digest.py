"""Digests of whole objects, in the kinds that users and catalogs declare.  Blocking."""

import hashlib
from typing import Protocol

import xxhash

from stagefs.model import ChecksumKind


class Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


def hasher(kind: ChecksumKind) -> Hasher:
    if kind is ChecksumKind.SHA256:
        return hashlib.sha256()
    if kind is ChecksumKind.MD5:
        return hashlib.md5(usedforsecurity=False)
    return xxhash.xxh3_64()
