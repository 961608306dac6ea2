"""``ssh://`` and ``sftp://``: objects at hosts that one can log in to.

One instance serves one host, through an SFTP engine: a process of its own that drives the
system's OpenSSH client (or paramiko, where there is none or a password is needed) and writes
fetched bytes straight into the sink's file.  Here URLs become paths and orders, and reports
become values and errors.  Lives in the trio thread.

The validator is modification time and size, checked on the open handle after every mebibyte,
before its bytes are called landed.  SFTP version 3 tells times in whole seconds: a file that is
rewritten in place within a second and keeps its size cannot be told apart.
"""

import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

import msgspec
import trio

from stagefs.errors import (
    AccessDenied,
    CacheFailed,
    ChecksumMismatch,
    DeadlineExceeded,
    InvalidUrl,
    NoSpace,
    ObjectChanged,
    ObjectMissing,
    RemoteAway,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
    StateFailed,
)
from stagefs.model import Checksum, EntryKind, ListedEntry, ObjectInfo, Span, WholeObject
from stagefs.remote import sftp_caller
from stagefs.remote.base import WHOLE_OBJECT_BYTES_MAX, BatchItem, Results, Sink
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.sftp_caller import Engine, Exchange
from stagefs.remote.sftp_messages import (
    AnyOrder,
    AnyReport,
    Attributes,
    Connect,
    Failed,
    FailureKind,
    Fetch,
    FetchWhole,
    Found,
    ItemFailed,
    Landed,
    List,
    MorePages,
    Page,
    Put,
    Remove,
    Sent,
    SetTimes,
    Stat,
    Version,
    Whole,
)
from stagefs.remote.source import exists
from stagefs.remote.temporaries import NAMES_MAX, Leftovers, temporary_name, token_of
from stagefs.remote.threads import VersionSink
from stagefs.remote.url import HIDDEN, join, name_to_write, parse, quote_path

# So many items, and bytes of their paths, fit into one order.
ORDER_ITEMS_MAX = 256
ORDER_PATH_BYTES_MAX = 64 << 10

# So many leftovers are removed with one put.
STALE_MAX = 32

_ERRORS: dict[FailureKind, type[StageFSError]] = {
    FailureKind.MISSING: ObjectMissing,
    FailureKind.DENIED: AccessDenied,
    FailureKind.UNAVAILABLE: RemoteUnavailable,
    FailureKind.AWAY: RemoteAway,
    FailureKind.DEADLINE: DeadlineExceeded,
    FailureKind.CHANGED: ObjectChanged,
    FailureKind.REFUSED: RemoteError,
    FailureKind.SINK: CacheFailed,
    FailureKind.NO_SPACE: NoSpace,
    FailureKind.CHECKSUM: ChecksumMismatch,
    FailureKind.SOURCE: StateFailed,
}


class SshRemote:
    """The driver of ``ssh://`` and ``sftp://``, for one host."""

    def __init__(
        self, host_url: str, settings: RemoteSettings, credentials: CredentialStore
    ) -> None:
        self._host_url = host_url
        self._connect = _connect_order(host_url, settings, credentials)
        self._engine: Engine | None = None
        self._starting = trio.Lock()
        self._leftovers = Leftovers()
        # Directories that are being looked through, each by one put for all.
        self._looking: dict[str, trio.Event] = {}
        self._ops = itertools.count(1)
        self._closed = False

    async def connect(self) -> None:
        """Log in before anything is asked, so that the first question need not wait for it."""
        order = Stat(next(self._ops), b".")
        async with self._exchange(self._host_url, order) as exchange:
            report = await exchange.next()
            # The directory that a login begins in is no object: any answer will do.
            if isinstance(report, Failed) and report.kind is not FailureKind.REFUSED:
                raise _error(self._host_url, report)

    async def stat(self, url: str) -> ObjectInfo:
        order = Stat(next(self._ops), _path(url))
        async with self._exchange(url, order) as exchange:
            report = _checked(url, await exchange.next())
            assert isinstance(report, Found)
            return _described(url, report.attributes)

    async def list(self, url: str) -> AsyncGenerator[Sequence[ListedEntry], None]:
        order = List(next(self._ops), _path(url))
        prefix = join(url, "x")[:-1]
        async with self._exchange(url, order) as exchange:
            while True:
                report = _checked(url, await exchange.next())
                assert isinstance(report, Page)
                if report.entries:
                    yield [_listed(prefix, name, attributes) for name, attributes in report.entries]
                if report.last:
                    return
                await exchange.send(MorePages(order.op))

    async def fetch(self, url: str, span: Span, *, sink: Sink, validator: str | None) -> ObjectInfo:
        order = Fetch(next(self._ops), _path(url), span.start, span.length, sink.shift, validator)
        position = span.start
        async with self._exchange(url, order, sink.fd) as exchange:
            while True:
                match _checked(url, await exchange.next()):
                    case Landed(stop=stop):
                        sink.landed(Span(position, stop - position))
                        position = stop
                    case Version(attributes=attributes):
                        if isinstance(sink, VersionSink):
                            sink.found = _described(url, attributes)
                    case Found(attributes=attributes):
                        return _described(url, attributes)
                    case report:
                        raise AssertionError(f"{report} in answer to Fetch")

    async def fetch_batch(self, items: Sequence[BatchItem]) -> Results:
        results: dict[int, WholeObject | StageFSError] = {}
        async with trio.open_nursery() as nursery:
            for positions in _portions(items):
                nursery.start_soon(self._fetch_portion, items, positions, results)
        return [results[position] for position in range(len(items))]

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
        name, path = name_to_write(url), _path(url)
        token = token_of(url, source)
        # A second one for when the session breaks and the engine begins anew.
        temporaries = [temporary_name(name, token) for _ in range(2)]
        directory = path[: len(path) - len(path.rpartition(b"/")[2])]
        stale = await self._stale(url, token)
        order = Put(
            next(self._ops),
            path,
            size_bytes,
            overwrite,
            checksum,
            mode,
            [directory + _encoded(temporary) for temporary in temporaries],
            [directory + _encoded(one) for one in stale],
        )
        try:
            async with self._exchange(url, order, source) as exchange:
                while isinstance(report := await exchange.next(), Sent):
                    progress(report.bytes_taken)
                return _described(url, _stored(url, report))
        except BaseException:
            # They were removed if the server could be reached; the next try sees to it.
            self._leftovers.add(_directory_url(url), temporaries)
            raise

    async def delete(self, url: str) -> None:
        name_to_write(url)
        async with self._exchange(url, Remove(next(self._ops), _path(url))) as exchange:
            report = await exchange.next()
        if isinstance(report, Failed) and report.kind is not FailureKind.MISSING:
            raise _error(url, report, verb="removed")

    async def set_mtime(self, url: str, mtime_s: int) -> None:
        """Give an object its time of modification."""
        async with self._exchange(url, SetTimes(next(self._ops), _path(url), mtime_s)) as exchange:
            report = await exchange.next()
        if isinstance(report, Failed):
            raise _error(url, report, verb="given its time")

    async def aclose(self) -> None:
        self._closed = True
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.end()

    async def _stale(self, url: str, token: str) -> Sequence[str]:
        """What earlier tries left beside the object, in this process and in those before."""
        directory = _directory_url(url)
        if self._leftovers.unknown(directory):
            looked = self._looking.get(directory)
            if looked is None:
                looked = self._looking[directory] = trio.Event()
                try:
                    await self._look_through(directory)
                except StageFSError as exc:
                    # Yet to be made, or written to but not read.  What else it may be, the put
                    # itself will meet and tell.
                    if not exc.transient:
                        self._leftovers.looked_through(directory)
                finally:
                    del self._looking[directory]
                    looked.set()
            else:
                await looked.wait()
        return self._leftovers.take(directory, token)[:STALE_MAX]

    async def _look_through(self, directory: str) -> None:
        seen = 0
        async with contextlib.aclosing(self.list(directory)) as pages:
            async for page in pages:
                self._leftovers.add(directory, (entry.name for entry in page))
                seen += len(page)
                if seen > NAMES_MAX:
                    break
        self._leftovers.looked_through(directory)

    async def _fetch_portion(
        self,
        items: Sequence[BatchItem],
        positions: Sequence[int],
        results: dict[int, WholeObject | StageFSError],
    ) -> None:
        wanted = [(_path(items[position].url), items[position].validator) for position in positions]
        order = FetchWhole(next(self._ops), wanted, WHOLE_OBJECT_BYTES_MAX)
        try:
            async with self._exchange(items[positions[0]].url, order) as exchange:
                for _ in positions:
                    report = await exchange.next()
                    if isinstance(report, Failed):
                        for position in positions:
                            results.setdefault(position, _error(items[position].url, report))
                        return
                    assert isinstance(report, Whole | ItemFailed)
                    position = positions[report.index]
                    results[position] = _whole(items[position].url, report)
                exchange.over = True
        except (RemoteUnavailable, DeadlineExceeded) as exc:
            for position in positions:
                results.setdefault(position, exc)

    @contextlib.asynccontextmanager
    async def _exchange(
        self, url: str, order: AnyOrder, fd: int | None = None
    ) -> AsyncIterator[Exchange]:
        engine = self._engine
        if engine is None or engine.dead:
            engine = await self._started()
        async with engine.exchange(order.op, url, order, fd) as exchange:
            yield exchange

    async def _started(self) -> Engine:
        async with self._starting:
            self._refuse_closed()
            if self._engine is None or self._engine.dead:
                engine = await sftp_caller.start(self._connect)
                try:
                    self._refuse_closed()
                except RemoteUnavailable:
                    await engine.end()
                    raise
                self._engine = engine
            return self._engine

    def _refuse_closed(self) -> None:
        if self._closed:
            raise RemoteUnavailable(f"The connection to {self._connect.host} was closed.")


def _connect_order(
    host_url: str, settings: RemoteSettings, credentials: CredentialStore
) -> Connect:
    parts = parse(host_url)
    for part in (parts.host, parts.user or ""):
        if part.startswith("-"):
            raise InvalidUrl(f"{host_url} names no host: host and user cannot begin with '-'.")
    hidden = msgspec.structs.replace(parts, password=HIDDEN, path="/")
    password = None
    with contextlib.suppress(AccessDenied):
        password = parse(credentials.reveal(str(hidden))).password
    return Connect(
        op=0,
        host=parts.host.strip("[]"),
        port=parts.port,
        user=parts.user,
        password=password,
        config=settings.ssh.config,
        client=settings.ssh.client,
        program=settings.ssh.program,
        connections=settings.ssh.connections,
        ciphers=settings.ssh.ciphers,
        connect_timeout_s=settings.connect_timeout_s,
        answer_timeout_s=settings.answer_timeout_s,
        progress_timeout_s=settings.progress_timeout_s,
        keepalive_s=settings.ssh.keepalive_s,
        restart_s=settings.restart_s,
        key_file=credentials.access(host_url).key_file,
    )


def _path(url: str) -> bytes:
    """The path at the server.  Paths below ``/~/`` are relative to the login's home, where
    SFTP sessions begin."""
    path = parse(url).path
    if path == "/~":
        path = "."
    elif path.startswith("/~/"):
        path = path[3:] or "."
    return path.encode("utf-8", "surrogateescape")


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _directory_url(url: str) -> str:
    parts = parse(url)
    directory = parts.path.rstrip("/").rpartition("/")[0] or "/"
    return str(msgspec.structs.replace(parts, path=directory))


def _portions(items: Sequence[BatchItem]) -> list[list[int]]:
    portions: list[list[int]] = []
    used = ORDER_PATH_BYTES_MAX
    for position, item in enumerate(items):
        used += len(item.url) + 64
        if used > ORDER_PATH_BYTES_MAX or len(portions[-1]) >= ORDER_ITEMS_MAX:
            portions.append([])
            used = len(item.url) + 64
        portions[-1].append(position)
    return portions


def _described(url: str, attributes: Attributes) -> ObjectInfo:
    mtime_s, mode = attributes.mtime_s, attributes.mode
    return ObjectInfo(
        url=url,
        size_bytes=attributes.size,
        validator=attributes.validator,
        mtime_ns=None if mtime_s is None else mtime_s * 1_000_000_000,
        mode=None if mode is None else mode & 0o7777,
    )


def _listed(prefix: str, name: bytes, attributes: Attributes | None) -> ListedEntry:
    text = name.decode("utf-8", "surrogateescape")
    url = prefix + quote_path(text)
    if attributes is None:
        return ListedEntry(text, EntryKind.DIRECTORY, url)
    return ListedEntry(text, EntryKind.FILE, url, _described(url, attributes))


def _whole(url: str, report: Whole | ItemFailed) -> WholeObject | StageFSError:
    if isinstance(report, ItemFailed):
        return _error(url, report)
    return WholeObject(_described(url, report.attributes), report.data)


def _checked(url: str, report: AnyReport) -> AnyReport:
    if isinstance(report, Failed):
        raise _error(url, report)
    return report


def _stored(url: str, report: AnyReport) -> Attributes:
    """What a put ended in."""
    if isinstance(report, Failed):
        if report.kind is FailureKind.MISSING:
            raise RemoteUnavailable(f"{url} cannot be written: its directory was removed.")
        raise _error(url, report, verb="written")
    assert isinstance(report, Found)
    return report.attributes


def _error(url: str, report: Failed | ItemFailed, *, verb: str = "read") -> StageFSError:
    if report.kind is FailureKind.EXISTS:
        return exists(url)
    return _ERRORS[report.kind](f"{url} cannot be {verb}: {report.reason}.")
