"""The interface that every remote has, and nothing else.

A remote turns URLs into objects.  It knows neither cache nor namespace.  Every method is
called from the trio thread, may be cancelled at any time, and then leaves nothing behind:
no thread still writing into a sink, no child process, no half-read connection in a pool.
Implementations translate every foreign exception into ``stagefs.errors`` (``raise ... from``),
name the public URL in each message, and never a credential.

Deadlines: connect and first byte, and progress (a transfer that moves no byte for
``progress_timeout_s``) are the implementation's, from its configuration, and raise
DeadlineExceeded.  Retries, limits and circuits are wrappers with this same interface.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol, TypeAlias

from stagefs.errors import StageFSError
from stagefs.model import ListedEntry, ObjectInfo, Span, WholeObject

# Objects up to this size may be fetched whole, in batches (``fetch_batch``).
WHOLE_OBJECT_BYTES_MAX = 64 << 10
# By a name, because inside the classes below ``list`` is a method.
Results: TypeAlias = list[WholeObject | StageFSError]


class Sink(Protocol):
    """Where a fetch puts its bytes: byte ``n`` of the object goes to ``fd`` at ``n - shift``.

    ``landed`` is called in the trio thread, with rising, adjoining spans that start at the
    span's start; each call says that these bytes are in the file.  Calls come at least
    every mebibyte and need not come more often.
    """

    @property
    def fd(self) -> int: ...

    @property
    def shift(self) -> int: ...

    def landed(self, span: Span) -> None: ...


class BatchItem(Protocol):
    """One object of ``fetch_batch``: its URL, and the validator it must have (None: any)."""

    @property
    def url(self) -> str: ...

    @property
    def validator(self) -> str | None: ...


class Remote(Protocol):
    """One protocol's driver (for ssh: one host's)."""

    async def stat(self, url: str) -> ObjectInfo:
        """Size and validator of an object.

        Raises ObjectMissing, AccessDenied, RemoteUnavailable, DeadlineExceeded, RemoteError;
        RemoteError too when the URL names a directory.
        """
        ...

    def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        """The entries of a remote directory, in pages.  Raises NotSupported where the protocol
        cannot list.  Names that cannot be file names (empty, ``.``, ``..``, with ``/`` or NUL,
        over 255 bytes) are left out; symbolic links are followed by the server or left out."""
        ...

    async def fetch(self, url: str, span: Span, *, sink: Sink, validator: str | None) -> ObjectInfo:
        """Write exactly ``span`` into ``sink`` and return what the object was.

        ``span`` lies within the object (the caller knows its size).  With a ``validator`` the
        bytes are of that version, or ObjectChanged is raised; where the protocol cannot ask for
        a version, the implementation compares before and after.  Raises RangesRefused when the
        server answers a range with the whole and ``span`` is not the whole object; ObjectChanged
        too when the object is shorter than the span.
        """
        ...

    async def fetch_batch(self, items: Sequence[BatchItem]) -> Results:
        """Fetch small objects (each at most WHOLE_OBJECT_BYTES_MAX) whole, pipelined; one
        result or error for each item, in order.  A larger object gives ObjectChanged."""
        ...

    async def aclose(self) -> None:
        """End connections and child processes.  Idempotent."""
        ...
