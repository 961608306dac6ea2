"""The interface that every remote has, and nothing else.

A remote turns URLs into objects.  It knows neither cache nor namespace.  Every method is
called from the trio thread, may be cancelled at any time, and then leaves nothing behind:
no thread still writing into a sink, no child process, no half-read connection in a pool, and
no half object at the remote as long as that can be reached.
Implementations translate every foreign exception into ``stagefs.errors`` (``raise ... from``),
name the public URL in each message, and never a credential.

Deadlines: connect and first byte, and progress (a transfer that moves no byte for
``progress_timeout_s``) are the implementation's, from its configuration, and raise
DeadlineExceeded.  Retries, limits and circuits are wrappers with this same interface.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

from stagefs.errors import StageFSError
from stagefs.model import Checksum, ListedEntry, ObjectInfo, Span, WholeObject

# Objects up to this size may be fetched whole, in batches (``fetch_batch``): about what a link of
# 50 Mbit/s carries in a round trip of 20 ms, so that asking for more at a time gains little.
WHOLE_OBJECT_BYTES_MAX = 128 << 10
# A driver that reads one in pieces says after so many bytes that it goes on.
WHOLE_OBJECT_PIECE_BYTES = 64 << 10
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


@runtime_checkable
class WatchingSink(Protocol):
    """A sink that wants to see bytes while they are in memory, so that nobody has to read them
    back."""

    def passed(self, start: int, data: memoryview) -> None:
        """``data`` was written, as bytes ``start`` and following of the object.  Called by the
        one thread that may write; not every remote calls it, nor for every byte."""
        ...

    def between_pieces(self) -> None:
        """Called by that thread where it may be kept waiting for a moment (much less than a
        second), without holding anything up."""
        ...


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

    async def put(
        self,
        url: str,
        *,
        source: int,
        size_bytes: int,
        overwrite: bool,
        checksum: Checksum | None,
        mode: int | None,
        progress: Callable[[int], None],
    ) -> ObjectInfo:
        """Make the content of a file the object at ``url``, all of it at once or not at all.

        ``source`` is a readable descriptor of a whole file of ``size_bytes`` that does not
        change; it is read at offsets, by several readers at once, through a copy of its own, so
        the caller may close it when this returns or raises.  The object appears under its name
        only when every byte is there and its size was checked; its content is compared with
        ``checksum`` as far as the protocol makes that cheap, and with the source where it is
        small.  Directories above it are made.  ``mode`` is given to it where the remote has
        permission bits (None: as the remote makes files).

        Without ``overwrite`` an object that exists is never replaced, whoever made it and
        however late; one with the very content of the source counts as done, so that a put whose
        answer was lost can be repeated.  What earlier tries left at the remote is removed.

        ``progress`` is called in the trio thread with the number of bytes that were sent so
        far; it begins anew with each attempt.

        Raises NameExists, AccessDenied, NoSpace (where the remote tells), RemoteUnavailable,
        DeadlineExceeded, ChecksumMismatch (the source is not what was declared, or arrived
        damaged), StateFailed (the source cannot be read), InvalidUrl (the URL names no object),
        NotSupported (the protocol only reads, or cannot keep the promise about ``overwrite``),
        RemoteError.
        """
        ...

    async def delete(self, url: str) -> None:
        """Remove an object.  One that is not there is as good; directories stay.

        Raises AccessDenied, RemoteUnavailable, DeadlineExceeded, InvalidUrl (the URL names no
        object), NotSupported (the protocol only reads), RemoteError (a directory, among others).
        """
        ...

    async def aclose(self) -> None:
        """End connections and child processes.  Idempotent."""
        ...
