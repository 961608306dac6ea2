"""``command://NAME/path``: objects that an administrator's own programs get, tell of and put.

Sites have their own movers.  A TOML file (``[remote.command] programs``) names, for each NAME, the
programs as lists of words; they are run without a shell, with nothing but these words
replaced: ``{url}``, ``{path}``, ``{offset}``, ``{length}``, ``{version}``, ``{size}``,
``{overwrite}`` (0 or 1).

* ``stat`` prints ``SIZE VERSION`` (VERSION: any text without blanks that another content changes)
  or ``directory``;
* ``get`` writes ``length`` bytes from ``offset`` to its output;
* ``list`` prints, for each entry, ``f SIZE VERSION<tab>NAME<NUL>`` or ``d<tab>NAME<NUL>``;
* ``put`` reads ``size`` bytes from its input and makes them the object, all at once; with
  ``overwrite`` 0 it must not replace another;
* ``delete`` removes an object.

Exit codes are those of sysexits.h: 66 no such object, 73 it exists, 77 not permitted, 75 and
69 try again; any other but 0 is an error, shown with the last line of standard error.
Programs run in worker threads of their calls, each in a session of its own that is killed when
nobody waits any more.
"""

import contextlib
import os
import signal
import stat
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import trio

from stagefs.errors import (
    AccessDenied,
    InvalidUrl,
    NameExists,
    NotSupported,
    ObjectMissing,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import MIB, Checksum, EntryKind, ListedEntry, ObjectInfo, Span
from stagefs.remote.blocking import BlockingRemote
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.source import Source, exists, prove
from stagefs.remote.threads import Call, SourceCall
from stagefs.remote.url import is_file_name, join, name_to_write, parse

SMALL_ANSWER_BYTES_MAX = 4 << 10
LIST_BYTES_MAX = 64 << 20
STEP_BYTES = 64 << 10


class Programs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table of the file."""

    stat: tuple[str, ...]
    get: tuple[str, ...]
    list: tuple[str, ...] = ()
    put: tuple[str, ...] = ()
    delete: tuple[str, ...] = ()


class CommandRemote(BlockingRemote):
    """The driver of ``command://`` for one name."""

    def __init__(
        self, host_url: str, settings: RemoteSettings, credentials: CredentialStore
    ) -> None:
        del credentials  # the programs have their own
        super().__init__(settings)
        self._programs = read_programs(settings.command.programs, parse(host_url).host)
        self._put_threads = trio.CapacityLimiter(settings.concurrency * 2)

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
        del mode  # the programs decide
        name_to_write(url)

        def work(call: SourceCall[ObjectInfo]) -> ObjectInfo:
            local = Source(call.source, url=url, size_bytes=size_bytes)
            prove(local, checksum, at_each_step=call.moved)
            return self._put(call, local, overwrite=overwrite)

        call = SourceCall(
            work,
            url=url,
            source=source,
            progress=progress,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._settings.progress_timeout_s,
        )
        return await call.run(self._put_threads)

    async def delete(self, url: str) -> None:
        name_to_write(url)

        def work(call: Call[None]) -> None:
            with contextlib.suppress(ObjectMissing):
                # Programs may take a directory for something that can be removed.
                self._head(call, url)
                self._run(call, "delete", url)

        await self._call(work, url).run(self._put_threads)

    async def aclose(self) -> None:
        """No program outlives its call."""

    # In worker threads.

    def _head(self, call: Call[Any], url: str) -> ObjectInfo:
        said = self._run(call, "stat", url, bytes_max=SMALL_ANSWER_BYTES_MAX).split()
        if said == [b"directory"]:
            raise RemoteError(f"{url} is a directory: name a file, or bind the directory.")
        info = _described(url, said)
        if info is None:
            raise RemoteError(
                f"The stat program for {url} printed neither SIZE and VERSION nor 'directory'."
            )
        return info

    def _entries(self, call: Call[Any], url: str) -> Iterator[ListedEntry]:
        for record in self._run(call, "list", url, bytes_max=LIST_BYTES_MAX).split(b"\0"):
            if not record:
                continue
            head, tab, raw = record.partition(b"\t")
            kind, *rest = head.split()
            name = raw.decode("utf-8", "surrogateescape")
            if not tab or kind not in {b"f", b"d"}:
                raise RemoteError(
                    f"The list program for {url} printed something else than entries."
                )
            if not is_file_name(name):
                continue
            child = join(url, name)
            if kind == b"d":
                yield ListedEntry(name, EntryKind.DIRECTORY, child)
            else:
                yield ListedEntry(name, EntryKind.FILE, child, _described(child, rest))

    def _read(self, call: Call[Any], info: ObjectInfo, span: Span) -> bytes:
        words = {
            "offset": str(span.start),
            "length": str(span.length),
            "version": info.validator.partition(":")[2],
        }
        return self._run(call, "get", info.url, words, bytes_max=span.length)

    def _put(self, call: SourceCall[Any], local: Source, *, overwrite: bool) -> ObjectInfo:
        url = local.url
        found = self._found(call, url)
        if found is None or overwrite:
            words = {"size": str(local.size_bytes), "overwrite": str(int(overwrite))}
            call.moved_anew()
            try:
                self._run(call, "put", url, words, source=local)
            except NameExists:
                found = self._head(call, url)
            else:
                return self._written(call, local)
        if found.size_bytes != local.size_bytes or not self._equals(call, local, found):
            raise exists(url)
        return found

    def _written(self, call: Call[Any], local: Source) -> ObjectInfo:
        info = self._head(call, local.url)
        if info.size_bytes != local.size_bytes:
            raise RemoteError(
                f"{local.url} has {info.size_bytes} bytes after its put program was given "
                f"{local.size_bytes}: the program is at fault."
            )
        return info

    def _found(self, call: Call[Any], url: str) -> ObjectInfo | None:
        try:
            return self._head(call, url)
        except ObjectMissing:
            return None

    def _equals(self, call: SourceCall[Any], local: Source, found: ObjectInfo) -> bool:
        for offset in range(0, local.size_bytes, MIB):
            length = min(MIB, local.size_bytes - offset)
            if self._same(call, found, Span(offset, length)) != local.read(offset, length):
                return False
            call.moved()
        return True

    def _run(
        self,
        call: Call[Any],
        kind: str,
        url: str,
        words: dict[str, str] | None = None,
        *,
        bytes_max: int = SMALL_ANSWER_BYTES_MAX,
        source: Source | None = None,
    ) -> bytes:
        """What a program printed; it got ``source`` as its input."""
        program: tuple[str, ...] = getattr(self._programs, kind)
        if not program:
            raise NotSupported(f"{url}: no {kind} program is configured for {parse(url).host}.")
        values = {"url": url, "path": parse(url).path, **(words or {})}
        arguments = [os.fsencode(replaced(word, values)) for word in program]
        with tempfile.TemporaryFile() as errors:
            try:
                child = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL if source is None else subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as exc:
                raise RemoteError(
                    f"The {kind} program for {url}, {program[0]}, cannot be run ({exc.strerror})."
                ) from exc
            with _ended(child):
                call.interruptible(lambda: _kill(child))
                if source is not None and isinstance(call, SourceCall):
                    _feed(call, child, source)
                output = _output(call, child, bytes_max)
                code = child.wait()
            if code:
                raise _failed(kind, url, code, _last_line(errors))
        return output


def read_programs(path: str | None, name: str) -> Programs:
    """The programs of one name.  Raises InvalidUrl when there are none, RemoteError when the file
    is not as it should be."""
    if path is None:
        raise InvalidUrl(
            f"command://{name}/ has no programs: name a file of them in [remote.command] programs."
        )
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            # Whoever may write it may run anything as us.
            if status.st_uid not in {0, os.geteuid()} or stat.S_IMODE(status.st_mode) & 0o022:
                raise RemoteError(
                    f"The programs in {path} are not trusted: the file must belong to root or to "
                    "you, and nobody else may write it."
                )
            table = tomllib.load(file).get(name)
    except OSError as exc:
        raise RemoteError(
            f"The programs in {path} cannot be read ({exc.strerror}): mend [remote.command] "
            "programs."
        ) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise RemoteError(f"The file of programs {path} is not TOML: {exc}.") from exc
    if table is None:
        raise InvalidUrl(f"command://{name}/ has no programs: {path} has no table [{name}].")
    try:
        return msgspec.convert(table, Programs)
    except msgspec.ValidationError as exc:
        raise RemoteError(f"The programs of [{name}] in {path} are not usable: {exc}.") from exc


def replaced(word: str, values: dict[str, str]) -> str:
    """A word of a program with its names in braces replaced, once: what comes in by a path is
    never replaced again."""
    parts = word.split("{")
    done = parts[0]
    for part in parts[1:]:
        key, brace, rest = part.partition("}")
        done += values[key] + rest if brace and key in values else "{" + part
    return done


def _described(url: str, words: list[bytes]) -> ObjectInfo | None:
    if len(words) != 2 or not words[0].isdigit():
        return None
    size_bytes, version = int(words[0]), words[1].decode("utf-8", "replace")
    return ObjectInfo(url=url, size_bytes=size_bytes, validator=f"version:{version}")


def _kill(child: "subprocess.Popen[bytes]") -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    return True


@contextlib.contextmanager
def _ended(child: "subprocess.Popen[bytes]") -> Iterator[None]:
    try:
        yield
    finally:
        if child.poll() is None:
            _kill(child)
            child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _feed(call: SourceCall[Any], child: "subprocess.Popen[bytes]", source: Source) -> None:
    assert child.stdin is not None
    # A program that ends before it has read everything says why with its exit code.
    with contextlib.suppress(BrokenPipeError):
        for offset in range(0, source.size_bytes, STEP_BYTES):
            piece = source.read(offset, min(STEP_BYTES, source.size_bytes - offset))
            child.stdin.write(piece)
            call.moved(len(piece))
        child.stdin.close()


def _output(call: Call[Any], child: "subprocess.Popen[bytes]", bytes_max: int) -> bytes:
    """One byte more than allowed is kept, so that too much can be seen."""
    assert child.stdout is not None
    output = bytearray()
    while piece := os.read(child.stdout.fileno(), STEP_BYTES):
        output += piece
        call.answered()
        if len(output) > bytes_max:
            _kill(child)
            break
        call.checkpoint()
    return bytes(output[: bytes_max + 1])


def _last_line(errors: BinaryIO) -> str:
    end = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, end - 1000))
    lines = errors.read().decode("utf-8", "replace").split("\n")
    line = next((one.strip() for one in reversed(lines) if one.strip()), "")
    return "".join(character if character.isprintable() else "?" for character in line[:200])


def _failed(kind: str, url: str, code: int, said: str) -> StageFSError:
    why = f": {said}" if said else ""
    match code:
        case 66:
            return ObjectMissing(f"{url} does not exist{why}.")
        case 73:
            return NameExists(f"{url} exists{why}.")
        case 77:
            return AccessDenied(f"The {kind} program may not serve {url}{why}.")
        case 69 | 75:
            return RemoteUnavailable(f"The {kind} program cannot serve {url} now{why}.")
        case _ if code < 0:
            return RemoteUnavailable(
                f"The {kind} program for {url} was ended by signal {-code}{why}."
            )
        case _:
            return RemoteError(f"The {kind} program for {url} ended with code {code}{why}.")
