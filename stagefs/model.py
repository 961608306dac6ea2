"""The values that cross seams between modules: frozen, typed, without behaviour that does I/O."""

import enum
import functools
import hashlib
from typing import NewType

import msgspec

Inode = NewType("Inode", int)
Handle = NewType("Handle", int)
ChunkIndex = NewType("ChunkIndex", int)

ROOT_INODE = Inode(1)
CHUNK_BYTES = 1 << 20
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Span(msgspec.Struct, frozen=True, order=True):
    """Bytes ``start`` to ``start + length`` (exclusive) of an object."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


class ChecksumKind(enum.StrEnum):
    SHA256 = "sha256"
    MD5 = "md5"
    XXH3 = "xxh3"  # xxh3-64, sixteen hex digits, big endian as the xxhsum tool prints it


class Checksum(msgspec.Struct, frozen=True):
    """The digest of a whole object, as a user or a catalog declared it.  ``digest`` is hex in
    lower case.
    """

    kind: ChecksumKind
    digest: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.digest}"


class OnWrite(enum.StrEnum):
    """What writing to a linked file does.  Kept on disk: words stay."""

    COPY_UP = "copy-up"
    READ_ONLY = "read-only"
    SHARED = "shared"


# Asked for several times on an object's way into the cache; about a megabyte.
@functools.lru_cache(maxsize=4096)
def _key(url: str, version: str) -> str:
    text = f"{url}\0{version}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=20).hexdigest()


class ObjectId(msgspec.Struct, frozen=True):
    """(URL, version): names immutable bytes.  The URL is the public one, without credentials.

    ``version`` is what fixed the content when the name was registered: what the remote
    said (its validator: ``etag:...``, ``mtime:<ns>:<size>``), a declared checksum, or
    ``declared:<size>:<mtime ns>`` from a catalog that knows no better.
    """

    url: str
    version: str

    @property
    def key(self) -> str:
        """40 hex digits: the name of the cache entry."""
        return _key(self.url, self.version)


class ObjectInfo(msgspec.Struct, frozen=True):
    """What a remote says of an object, at one moment.

    ``validator`` fixes the content as far as the protocol can: equal validators, equal
    bytes.  ``mode`` is the permission bits where the protocol has them.
    ``ranges`` is False when the server is known to send whole objects only.
    """

    url: str
    size_bytes: int
    validator: str
    mtime_ns: int | None = None
    mode: int | None = None
    ranges: bool = True


class EntryKind(enum.StrEnum):
    FILE = "file"
    DIRECTORY = "directory"


class ListedEntry(msgspec.Struct, frozen=True):
    """One name in a remote directory.  ``name`` is a single path component, already decoded
    (``surrogateescape`` for bytes that are not UTF-8).  ``info`` is None for directories, and
    for files of which the listing tells no exact size."""

    name: str
    kind: EntryKind
    url: str
    info: ObjectInfo | None = None


class WholeObject(msgspec.Struct, frozen=True):
    """A small object fetched in one piece."""

    info: ObjectInfo
    data: bytes
