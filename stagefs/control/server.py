"""The daemon's HTTP API on a Unix socket: decodes, makes one call on ``Area``, encodes.

``serve`` runs until it is cancelled, in the daemon's nursery; each connection is a task of
hypercorn's trio worker, the application is starlette's.  A client that goes away, or stops
reading, cancels the operation that it asked for.  Only the daemon's own user, the user the
mount is for, and root are listened to: the socket is 0600 and its peer's credentials are
checked besides, because a socket can be inherited and a directory moved.
"""

import errno
import functools
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import cast

import msgspec
import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from hypercorn.utils import wrap_app
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from stagefs.control.api import (
    HEARTBEAT_S,
    METRICS_PATH,
    REQUEST_BYTES_MAX,
    Area,
    Failure,
    Line,
    Operation,
    Operations,
    Result,
    decode,
    encode,
)
from stagefs.errors import InvalidName, NotPermitted, StageFSError
from stagefs.staging.values import Progress

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 64
# News older than this are worth less than the newest: a slow client gets fewer lines.
_LINES_BUFFERED_MAX = 16
_KEEP_ALIVE_S = 60.0
_UCRED = struct.Struct("3i")  # pid, uid, gid: struct ucred, unix(7)

# The text format of Prometheus, https://prometheus.io/docs/instrumenting/exposition_formats/
METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_HTTP_STATUS = {
    errno.ENOENT: 404,
    errno.EEXIST: 409,
    errno.EBUSY: 409,
    errno.EACCES: 403,
    errno.EPERM: 403,
    errno.EINVAL: 400,
}


async def serve(
    area: Area,
    path: Path,
    *,
    users: Collection[int],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer at the socket ``path`` for the given user ids (root always).

    Started when the socket is there.  A socket left by a dead daemon is replaced.
    """
    # Starlette and hypercorn each have their own words for the same ASGI types.
    framework = cast("ASGIFramework", make_application(area))
    application = wrap_app(framework, REQUEST_BYTES_MAX, "asgi")
    config = Config()
    config.errorlog = logging.getLogger("hypercorn.error")
    config.accesslog = None
    config.keep_alive_timeout = _KEEP_ALIVE_S
    context = WorkerContext(None)
    allowed = frozenset({0, os.geteuid(), *users})
    streams: set[trio.SocketStream] = set()

    async def serve_connection(stream: trio.SocketStream) -> None:
        uid = peer_uid(stream.socket)
        if uid not in allowed or len(streams) >= CONNECTIONS_MAX:
            log.warning("refused a control connection of user %d", uid)
            await stream.aclose()
            return
        streams.add(stream)
        try:
            await TCPServer(application, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]
        finally:
            streams.discard(stream)

    listener = await _listener(path)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_close_when_cancelled, streams)
            await nursery.start(trio.serve_listeners, serve_connection, [listener])
            task_status.started()
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


async def _close_when_cancelled(streams: Collection[trio.SocketStream]) -> None:
    """A client that does not read would hold up our end for ever: hypercorn shields its sends."""
    try:
        await trio.sleep_forever()
    finally:
        for stream in streams:
            stream.socket.close()


async def _listener(path: Path) -> trio.SocketListener:
    """A listening socket at ``path``, 0600, that appears there in one step."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    made.unlink(missing_ok=True)
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await bind_unix(sock, made)
        made.chmod(0o600)
        sock.listen(CONNECTIONS_MAX)
        made.rename(path)
    except OSError:
        sock.close()
        made.unlink(missing_ok=True)
        raise
    return trio.SocketListener(sock)


async def bind_unix(sock: trio.socket.SocketType, path: Path) -> None:
    """Bind, also where the path is longer than sun_path (108 bytes): through its directory."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        await sock.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


def peer_uid(sock: trio.socket.SocketType) -> int:
    _pid, uid, _gid = _UCRED.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    return int(uid)


def make_application(area: Area) -> Starlette:
    """The ASGI application; its only state is ``area``."""
    routes = [
        Route(
            f"/v1/{operation.value.path}",
            _long(area, operation) if operation.value.long else _short(area, operation),
            methods=["GET", "POST"] if not operation.value.request.__struct_fields__ else ["POST"],
        )
        for operation in Operations
    ]

    async def metrics(_request: Request) -> Response:
        return Response(await area.metrics(), media_type=METRICS_MEDIA_TYPE)

    return Starlette(
        routes=[*routes, Route(METRICS_PATH, metrics, methods=["GET"])],
        exception_handlers={
            StageFSError: _refuse,
            HTTPException: _refuse_http,
            Exception: _fail_unexpectedly,
        },
    )


Endpoint = Callable[[Request], Awaitable[Response]]


def _short(area: Area, operation: Operations) -> Endpoint:
    call = getattr(area, operation.name.lower())

    async def endpoint(request: Request) -> Response:
        return _json(await call(await _decoded(request, operation.value)))

    return endpoint


def _long(area: Area, operation: Operations) -> Endpoint:
    call = getattr(area, operation.name.lower())

    async def endpoint(request: Request) -> Response:
        return _Stream(functools.partial(call, await _decoded(request, operation.value)))

    return endpoint


async def _decoded(request: Request, operation: Operation) -> msgspec.Struct:
    body = await request.body()
    try:
        return decode(body or b"{}", operation.request)
    except ValueError as exc:
        raise InvalidName(f"The request {operation.path} cannot be read: {exc}.") from exc


class _Stream(Response):
    """Runs a long operation while it sends what there is to tell, one JSON text a line."""

    media_type = "application/x-ndjson"

    def __init__(
        self, call: Callable[[Callable[[Progress], None]], Awaitable[msgspec.Struct]]
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        news, lines = trio.open_memory_channel[Line](_LINES_BUFFERED_MAX)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_at_disconnect, receive, nursery.cancel_scope)
            nursery.start_soon(self._run, news)
            await _send_lines(lines, send)
            nursery.cancel_scope.cancel()

    async def _run(self, news: trio.MemorySendChannel[Line]) -> None:
        newest = Progress("waiting", 0, None)

        def progress(value: Progress) -> None:
            nonlocal newest
            newest = value
            try:
                news.send_nowait(value)
            except trio.WouldBlock:
                return  # a slow client; the next line tells more

        async def beat() -> None:
            while True:
                await trio.sleep(HEARTBEAT_S)
                progress(newest)

        async with news:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(beat)
                last = await self._outcome(progress)
                nursery.cancel_scope.cancel()
            await news.send(last)

    async def _outcome(self, progress: Callable[[Progress], None]) -> Result | Failure:
        try:
            answer = await self._call(progress)
        except StageFSError as exc:
            log.log(exc.log_level, "%s", exc)
            return failure(exc)
        return Result(msgspec.to_builtins(answer))


async def _send_lines(lines: trio.MemoryReceiveChannel[Line], send: Send) -> None:
    async with lines:
        async for line in lines:
            body = encode(line) + b"\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _cancel_at_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def failure(error: StageFSError) -> Failure:
    name = errno.errorcode.get(error.errno, str(error.errno))
    return Failure(error=str(error), exit_code=error.exit_code, errno=name)


def _json(value: msgspec.Struct, status: int = 200) -> Response:
    return Response(encode(value), status, media_type="application/json")


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, StageFSError)
    log.log(error.log_level, "%s", error)
    return _json(failure(error), _HTTP_STATUS.get(error.errno, 500))


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = ", ".join(operation.value.path for operation in Operations)
    refusal = NotPermitted(f"There is no operation {request.url.path}: there are {known}.")
    return _json(failure(refusal), error.status_code)


async def _fail_unexpectedly(request: Request, error: Exception) -> Response:
    """The answer; starlette raises the error again and hypercorn's log keeps the traceback."""
    return _json(
        Failure(
            error=f"The daemon failed unexpectedly in {request.url.path} ({type(error).__name__}):"
            " its log has the traceback.",
            exit_code=1,
            errno="EIO",
        ),
        500,
    )
