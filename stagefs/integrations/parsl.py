"""Parsl on a mount: a staging provider whose files are the namespace's.

    from parsl.data_provider.data_manager import default_staging
    from stagefs.integrations.parsl import StageFSStaging, path

    staging = StageFSStaging("/tmp/pilot")        # the mountpoint
    executor = HighThroughputExecutor(..., storage_access=[staging, *default_staging])

* ``File("staging:///x")`` as an input is that entry of the namespace; so is ``File("https://...")``
  (http, s3, ssh, sftp too), which is registered when it is first used.  Nothing is transferred
  before a task reads it, and then once for all tasks of the node.
* ``File("staging:///x")`` as an output, or as ``stdout`` or ``stderr``, is written in a sandbox of
  its task.  When the task has succeeded, all its outputs become visible together, without a copy,
  and then its ``outputs[i]`` are done.  A failed task publishes nothing; its sandbox stays.
* ``@sandboxed`` below ``@bash_app`` runs each command in a sandbox of its own.
* ``cache=True`` knows inputs by URL and version: a new version runs the app again.
* ``path(file)`` is where the submitting program finds what a File means.

Workers must see the same mount, so they run on its node, with StageFS in their environment.

Concurrency: Parsl calls a provider in the thread that submits, and tells the end of a task in
threads of its own.  What waits for the daemon then runs in a few threads of the provider.
"""

import contextlib
import errno
import glob
import hashlib
import importlib
import inspect
import os
import pickle
import secrets
import shlex
import threading
import weakref
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from stagefs.control.client import Client, Refused
from stagefs.errors import NotFound, RemoteError, SetupError, StageFSError
from stagefs.remote.url import last_name, parse
from stagefs.staging.manifest import Output

TESTED_WITH = ("parsl 2026.10.26",)

SCHEMES = frozenset({"staging", "http", "https", "s3", "ssh", "sftp"})
# Where inputs that are named by another URL get their names.
URLS_DIRECTORY = "urls"
THREADS = 8
# What `sandboxed` adds to an app: a File, because only of Files a provider is asked.
SANDBOX_SCHEME = "stagefs-sandbox"
SANDBOX_KEYWORD = "stagefs_sandbox"
ERROR_ATTRIBUTE = "user.stagefs.error"

_App = Callable[..., Any]


class _File(Protocol):
    """What is used of Parsl's File."""

    url: str
    scheme: str
    local_path: str | None


class StageFSStaging:
    """A ``parsl.data_provider.staging.Staging`` for the mount at ``mountpoint``.

    ``schemes`` are the ones it claims.  ``eager`` fetches an input before its task starts, so that
    a fetch that fails, fails the staging and not the task.  ``strict`` fails tasks whose
    staging:/// input is not there when they are submitted.  ``overwrite`` lets outputs replace what
    is there under their names; who has linked that keeps it.

    May be shared by executors.  Raises NoDaemon when nothing is mounted there, SetupError without
    Parsl.
    """

    def __new__(cls, *_arguments: object, **_options: object) -> "StageFSStaging":
        # Parsl takes instances of its own class only, which is imported when one is made.
        made: StageFSStaging = object.__new__(_with_parsl(cls))
        return made

    def __init__(
        self,
        mountpoint: str | Path,
        *,
        schemes: Collection[str] = SCHEMES,
        eager: bool = False,
        strict: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.mountpoint = os.path.realpath(mountpoint)
        self.schemes = frozenset(schemes)
        self.eager = eager
        self.strict = strict
        self.overwrite = overwrite
        self._client = Client.of(self.mountpoint)
        self._client.status()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="stagefs")
        self._lock = threading.Lock()
        self._tasks: dict[Future[Any], _TaskOutputs] = {}
        self._registered: set[str] = set()
        _remember_by_version(self)

    def __repr__(self) -> str:
        return (
            f"StageFSStaging({self.mountpoint!r}, schemes={sorted(self.schemes)},"
            f" eager={self.eager}, strict={self.strict}, overwrite={self.overwrite})"
        )

    # What Parsl asks

    def can_stage_in(self, file: _File) -> bool:
        return file.scheme in self.schemes or file.scheme == SANDBOX_SCHEME

    def can_stage_out(self, file: _File) -> bool:
        return file.scheme == "staging" and "staging" in self.schemes

    def stage_in(
        self, dm: object, executor: str, file: _File, parent_fut: Future[Any] | None
    ) -> Future[Any] | None:
        """``parent_fut``: of the task that makes the file, and has not run yet.  Raises ValueError
        for a File that Parsl has cut."""
        del dm, executor
        if file.scheme == SANDBOX_SCHEME:
            return None
        name = self._name(file)
        file.local_path = self._local(name)
        try:
            if file.scheme != "staging":
                self._register(file.url, name)
            elif self.strict and parent_fut is None:
                self._refuse_missing(name)
        except StageFSError as exc:
            failed: Future[None] = Future()
            failed.set_exception(exc)
            return _data_future(failed, file)
        return _data_future(self._fetched(name, parent_fut), file) if self.eager else None

    def stage_out(
        self, dm: object, executor: str, file: _File, app_fu: Future[Any]
    ) -> Future[None]:
        """Raises ValueError for a File that Parsl has cut."""
        del dm, executor
        name = self._name(file)
        # Parsl names the outputs of a task one after the other, before it starts the task.
        with self._lock:
            task = self._tasks.get(app_fu)
            is_first = task is None
            if task is None:
                task = self._tasks[app_fu] = _TaskOutputs(self.mountpoint)
        if is_first:
            app_fu.add_done_callback(self._task_ended)
        done: Future[None] = Future()
        file.local_path = task.add(name, done, overwrite=self.overwrite)
        return done

    def replace_task(self, dm: object, executor: str, file: _File, func: _App) -> _App:
        """The task, run in a sandbox of its own, or told why it could not read its input."""
        del dm, executor
        if file.scheme == SANDBOX_SCHEME:
            return _in_sandbox(func, self.mountpoint)
        return _explained(func, self._local(self._name(file)), file.url)

    def replace_task_stage_out(self, dm: object, executor: str, file: _File, func: object) -> None:
        """Nothing is done in the task itself."""

    # What `cache=True` asks

    def key_of(self, file: _File) -> bytes | None:
        """What an input is: its URL and version.  None for a File that was not staged here."""
        if not (file.local_path or "").startswith(f"{self.mountpoint}/staging/"):
            return None
        try:
            found = self._client.stat(self._name(file))
        except Refused as exc:
            if exc.errno != errno.ENOENT:
                raise
            return pickle.dumps((file.url, None))
        # What tasks made has no remote's version; it is never changed in place.
        version = found.version or f"{found.inode}:{found.mtime_ns}:{found.size_bytes}"
        return pickle.dumps((file.url, version))

    # Names

    def path(self, file: _File) -> str:
        """Where this machine finds what a File means; an input that is named by URL is registered.
        Raises what the remote says of it."""
        name = self._name(file)
        if file.scheme != "staging":
            self._register(file.url, name)
        return self._local(name)

    def _name(self, file: _File) -> str:
        """The staging:/// name of a File.  Raises ValueError, InvalidUrl."""
        if file.scheme != "staging":
            # One name for everybody who has the URL, and another one for each URL.
            digest = hashlib.sha256(file.url.encode("utf-8", "surrogateescape")).hexdigest()[:16]
            return f"staging:///{URLS_DIRECTORY}/{digest}/{last_name(file.url)}"
        if "#" in file.url or "?" in file.url:
            raise ValueError(
                f"Parsl cuts File({file.url!r}) at '#' and '?': give the entry another name"
                " (`stagefs mv`)."
            )
        path = parse(file.url).path.rstrip("/")
        if not path:
            raise ValueError(f"File({file.url!r}) names no entry: write staging:///name.")
        return f"staging://{path}"

    def _local(self, name: str) -> str:
        return f"{self.mountpoint}/staging{parse(name).path}"

    def _register(self, url: str, name: str) -> None:
        with self._lock:
            if name in self._registered:
                return
        if not self._is_there(name):
            try:
                self._client.stage_in([url], name)
            except Refused as exc:
                # Somebody else was faster; the name belongs to this URL alone.
                if exc.errno != errno.EEXIST:
                    raise
        with self._lock:
            self._registered.add(name)

    def _is_there(self, name: str) -> bool:
        try:
            self._client.stat(name)
        except Refused as exc:
            if exc.errno == errno.ENOENT:
                return False
            raise
        return True

    def _refuse_missing(self, name: str) -> None:
        if not self._is_there(name):
            raise NotFound(
                f"{name} does not exist: stage it in first (`stagefs stage-in URL {name}`), or"
                " correct the name."
            )

    # What waits

    def _fetched(self, name: str, parent: Future[Any] | None) -> Future[None]:
        """Done when all of ``name`` is in the cache, after the task that makes it."""
        done: Future[None] = Future()

        def fetch_after(parent: Future[Any]) -> None:
            failure = parent.exception()
            if failure is not None:
                done.set_exception(failure)
            else:
                self._begin(lambda: self._client.cache_warm([name]), [done])

        if parent is None:
            self._begin(lambda: self._client.cache_warm([name]), [done])
        else:
            parent.add_done_callback(fetch_after)
        return done

    def _task_ended(self, app_fu: Future[Any]) -> None:
        with self._lock:
            task = self._tasks.pop(app_fu)
        failure = app_fu.exception()
        if failure is not None:
            self._begin(lambda: task.fail(self._client, failure), task.done)
        elif getattr(app_fu, "task_record", {}).get("from_memo"):
            self._begin(lambda: task.reuse(self._client), task.done)
        else:
            self._begin(lambda: task.commit(self._client), task.done)

    def _begin(self, work: Callable[[], object], futures: Collection[Future[None]]) -> None:
        """Do the work in a thread, and tell how it went."""

        def tell(over: Future[object]) -> None:
            failure = over.exception()
            for future in futures:
                if failure is None:
                    future.set_result(None)
                else:
                    future.set_exception(failure)

        self._threads.submit(work).add_done_callback(tell)


class _TaskOutputs:
    """The sandbox in which one task writes its outputs, each in a directory of its own there: two
    may have the same last name."""

    def __init__(self, mountpoint: str) -> None:
        self._sandbox = f"parsl-{secrets.token_hex(8)}"
        self._directory = f"{mountpoint}/tasks/{self._sandbox}"
        self._outputs: list[Output] = []
        self.done: list[Future[None]] = []

    def add(self, name: str, done: Future[None], *, overwrite: bool) -> str:
        """Where the task shall write what becomes ``name``."""
        inside = f"{len(self.done)}/{last_name(name)}"
        path = f"{self._directory}/{inside}"
        os.makedirs(os.path.dirname(path))
        self._outputs.append(Output(glob.escape(inside), name, overwrite=overwrite))
        self.done.append(done)
        return path

    def commit(self, client: Client) -> None:
        """All outputs, or none: a sandbox that cannot be committed is kept as failed."""
        try:
            client.sandbox_commit(self._sandbox, outputs=self._outputs)
        except Refused as refused:
            client.sandbox_fail(self._sandbox, str(refused))
            raise
        client.sandbox_remove(self._sandbox)

    def reuse(self, client: Client) -> None:
        """Nothing was run, because Parsl remembers the result.  Raises Refused when what was made
        then is not there any more."""
        client.sandbox_remove(self._sandbox)
        for output in self._outputs:
            client.stat(output.to)

    def fail(self, client: Client, failure: BaseException) -> None:
        """Keep what the task wrote.  Raises the failure."""
        client.sandbox_fail(self._sandbox, str(failure))
        raise failure


def sandboxed(function: _App) -> _App:
    """A bash app whose command runs in a sandbox of its own, an empty directory of the mount::

        @bash_app
        @sandboxed
        def simulate(inputs=(), outputs=()):
            return f"ln {inputs[0]} input.dat; simulator > log; cp result {outputs[0]}"

    The sandbox is removed when the command has succeeded, and kept as failed when it has not.
    Raises SetupError without Parsl.
    """
    place = _parsl("parsl.data_provider.files").File(f"{SANDBOX_SCHEME}:///")

    def commanded(*arguments: object, **options: object) -> object:
        directory = str(options.pop(SANDBOX_KEYWORD))
        command = function(*arguments, **options)
        if not isinstance(command, str):
            return command  # Parsl says what is wrong with it.
        return f"cd {shlex.quote(directory)} || exit\n{command}"

    signature = inspect.signature(function)
    added = inspect.Parameter(SANDBOX_KEYWORD, inspect.Parameter.KEYWORD_ONLY, default=place)
    parameters = [*signature.parameters.values()]
    takes_any = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    parameters.insert(len(parameters) - takes_any, added)
    # Parsl hands on the defaults that it reads here.
    commanded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return _named_as(function.__name__, commanded)


def path(file: _File) -> str:
    """Where the program that submits finds what a File means, by the provider that Parsl was
    loaded with.  Raises ValueError when none claims the File."""
    kernel = _parsl("parsl").dfk()
    for executor in kernel.executors.values():
        for provider in getattr(executor, "storage_access", None) or ():
            if isinstance(provider, StageFSStaging) and provider.can_stage_in(file):
                return provider.path(file)
    raise ValueError(f"No StageFSStaging of the executors claims {file.url}.")


# What runs in the worker.  Parsl sends these functions by value, with the module they belong to
# by name: they keep ``__module__``, else all of this module's state would be sent with them.


def _named_as(name: str, function: _App) -> _App:
    function.__name__ = name
    return function


def _memo_name(function: _App) -> str:
    """``cache=True`` knows functions by name and module, and what replaces them is of this one."""
    if function.__module__ == __name__:
        return function.__name__
    return f"{function.__module__}.{function.__name__}"


def _in_sandbox(function: _App, mountpoint: str) -> _App:
    def run(*arguments: object, **options: object) -> object:
        # Made here and not when the task is submitted: each try of a task gets one.
        name = f"parsl-{secrets.token_hex(8)}"
        directory = f"{mountpoint}/tasks/{name}"
        os.mkdir(directory)
        result = function(*arguments, **{**options, SANDBOX_KEYWORD: directory})
        client, failure = Client.of(mountpoint), _failure(result)
        if failure is None:
            client.sandbox_remove(name)
        else:
            client.sandbox_fail(name, str(failure))
        return result

    return _named_as(_memo_name(function), run)


def _explained(function: _App, local_path: str, url: str) -> _App:
    """The inputs of one task are collected in one function around it."""
    known: list[tuple[str, str]] | None = getattr(function, "stagefs_inputs", None)
    if known is not None:
        known.append((local_path, url))
        return function
    inputs = [(local_path, url)]

    def run(*arguments: object, **options: object) -> object:
        result = function(*arguments, **options)
        failure = _failure(result)
        return result if failure is None else _with_reason(result, failure, inputs)

    run.stagefs_inputs = inputs  # type: ignore[attr-defined]
    return _named_as(_memo_name(function), run)


def _failure(result: object) -> BaseException | None:
    """Parsl's apps return what they raise."""
    wrapper = _parsl("parsl.app.errors").RemoteExceptionWrapper
    return result.get_exception() if isinstance(result, wrapper) else None


def _with_reason(result: object, failure: BaseException, inputs: list[tuple[str, str]]) -> object:
    """The failure of a task, with the reason that StageFS has for it."""
    for local_path, url in inputs:
        with contextlib.suppress(OSError):
            reason = os.getxattr(local_path, ERROR_ATTRIBUTE).decode()
            told = RemoteError(f"The task could not read {url}: {reason} (it said: {failure})")
            told.__cause__ = failure
            return _parsl("parsl.app.errors").RemoteExceptionWrapper(
                RemoteError, told, failure.__traceback__
            )
    return result


# Parsl


_PROVIDERS: "weakref.WeakSet[StageFSStaging]" = weakref.WeakSet()


def _remember_by_version(provider: StageFSStaging) -> None:
    """Tell Parsl's memoization what the Files of this provider are."""
    memo = _parsl("parsl.dataflow.memoization").id_for_memo
    file_class = _parsl("parsl.data_provider.files").File
    _PROVIDERS.add(provider)
    before = memo.dispatch(file_class)
    if getattr(before, "stagefs", False):
        return

    def identity(file: _File, output_ref: bool = False) -> bytes:
        if file.scheme == SANDBOX_SCHEME:
            return SANDBOX_SCHEME.encode()
        for one in [*_PROVIDERS]:
            if output_ref and one.can_stage_out(file):
                return pickle.dumps(file.url)
            key = one.key_of(file)
            if key is not None:
                return key
        known: bytes = before(file, output_ref=output_ref)
        return known

    identity.stagefs = True  # type: ignore[attr-defined]
    memo.register(file_class)(identity)


def _parsl(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise SetupError(
            f"Parsl cannot be imported here ({exc}): install parsl into the environment of this"
            " program."
        ) from exc


def _with_parsl(cls: type[StageFSStaging]) -> type[StageFSStaging]:
    """The class as one of Parsl's."""
    staging = _parsl("parsl.data_provider.staging").Staging
    return type(cls.__name__, (cls, staging), {"__module__": cls.__module__})


def _data_future(future: Future[None], file: _File) -> Future[Any]:
    """``future`` as Parsl wants to see it."""
    data_future: Future[Any] = _parsl("parsl.app.futures").DataFuture(future, file, tid=-1)
    return data_future
