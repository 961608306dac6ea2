"""PyOpus on a mount: what ``mirrorMap`` copies to each worker is linked there instead.

    from stagefs.integrations.pyopus import MPI as VM     # instead of pyopus.parallel.mpi

That import is all that changes.  Each task's local storage is a sandbox in the mount,
``pyopus-USER/PID_vmINDEX`` below PARALLEL_LOCAL_STORAGE where that lies in a mount, else below
the mountpoint (STAGEFS_MOUNT, or the only mount).  Sources may lie anywhere in
PARALLEL_MIRRORED_STORAGE: those of the namespace are linked, others are read through the
cache; writing to one makes a copy of the task's own.

A sandbox belongs to its worker, known by its start and the boot of the machine and not by its
number alone: persistent storage that an earlier program with that number left is not reused,
and what a worker that was killed left is removed by the next mount.

Concurrency: a worker runs one task at a time, in its main thread.
"""

import atexit
import contextlib
import errno
import functools
import importlib
import os
import re
from collections.abc import Callable
from typing import Any, Protocol

from stagefs.control.client import Client, Refused
from stagefs.control.mounts import FoundMount, choose_mount, staging_mounts
from stagefs.errors import NoDaemon, SetupError
from stagefs.model import OnWrite
from stagefs.staging.manifest import Manifest
from stagefs.staging.workers import worker_of

TESTED_WITH = ("pyopus 0.9",)


class _VirtualMachine(Protocol):
    """What is used of PyOpus's VirtualMachine."""

    debug: int
    mirrorList: list[tuple[int, str, str]] | None  # noqa: N815  PyOpus's names
    startupDirSuffix: str | None  # noqa: N815
    persistentStorage: bool  # noqa: N815

    def localStoragePath(self) -> str: ...  # noqa: N802


def __getattr__(name: str) -> Any:  # noqa: ANN401  a class of PyOpus, which has no types
    """``MPI``.  On a worker this never returns: importing PyOpus's own makes it wait for tasks."""
    if name != "MPI":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    install()
    return importlib.import_module("pyopus.parallel.mpi").MPI


def install() -> None:
    """Let mirrored tasks of this program work in sandboxes.  Must come before
    ``pyopus.parallel.mpi`` is imported.

    Raises SetupError without PyOpus, NoDaemon when nothing is mounted, InvalidName when it is not
    clear which mount is meant.
    """
    try:
        base = importlib.import_module("pyopus.parallel.base")
    except ImportError as exc:
        raise SetupError(
            f"PyOpus cannot be imported here ({exc}): install pyopus into the environment of this"
            " program."
        ) from exc
    machine = base.VirtualMachine
    original = getattr(machine.prepareEnvironment, "stagefs_original", machine.prepareEnvironment)
    storage = _LocalStorage(base)

    @functools.wraps(original)
    def prepare(one: _VirtualMachine) -> str | None:
        if one.mirrorList is None:
            unmirrored: str | None = original(one)
            return unmirrored
        return storage.prepare(one)

    prepare.stagefs_original = original  # type: ignore[attr-defined]
    machine.prepareEnvironment = prepare


class _LocalStorage:
    """The mount that tasks of this program work in.  ``_left`` is the task directory that PyOpus
    may still have to remove."""

    def __init__(self, base: Any) -> None:  # noqa: ANN401  a module of PyOpus
        self._base = base
        mount, top = _mount_for(os.path.realpath(base.ParallelLocalStorage))
        base.ParallelLocalStorage = top
        self._mountpoint = mount.mountpoint
        self._client = Client.of(self._mountpoint)
        self._client.status()
        self._left: str | None = None
        atexit.register(self._end)

    def prepare(self, machine: _VirtualMachine) -> str:
        """Make (or find, where it is persistent) the task's directory and go there; its path."""
        path = machine.localStoragePath()
        name = path.removeprefix(self._mountpoint)
        if not machine.persistentStorage:
            self._make(machine, path, name)
            self._left = path
        elif not self._is_own(name):
            self._make(machine, path, name)
        if machine.debug:
            self._base.DbgMsgOut("VM", f"Using local storage in '{path}', a sandbox.")
        os.chdir(path)
        if machine.startupDirSuffix is not None:
            os.chdir(machine.startupDirSuffix)
        return path

    def _make(self, machine: _VirtualMachine, path: str, name: str) -> None:
        manifest = Manifest(
            mirrors=self._mirrors(machine),
            on_write=OnWrite.COPY_UP,
            persistent=machine.persistentStorage,
        )
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._client.sandbox_create(name, manifest, worker_pid=os.getpid())

    def _mirrors(self, machine: _VirtualMachine) -> dict[str, str]:
        actual: Callable[[int, str], str] = self._base.translateToActualPath
        return {
            # To PyOpus '**' is '*'.
            re.sub(r"\*\*+", "*", actual(index, suffix)): target
            for index, suffix, target in machine.mirrorList or ()
        }

    def _is_own(self, name: str) -> bool:
        """Whether this very worker made it, for a task before."""
        try:
            return self._client.sandbox_show(name).worker == worker_of(os.getpid())
        except Refused as exc:
            if exc.errno == errno.ENOENT:
                return False
            raise

    def _end(self) -> None:
        """A task that raised ends its worker, and PyOpus leaves the directory."""
        if self._left is None:
            return
        # It is gone after a task that succeeded; the mount may be, too.
        with contextlib.suppress(Refused, NoDaemon, OSError):
            os.chdir(self._mountpoint)
            self._client.sandbox_remove(self._left.removeprefix(self._mountpoint))


def _mount_for(wanted: str) -> tuple[FoundMount, str]:
    """The mount, and the directory in it below which PyOpus makes its own.  Raises NoDaemon,
    InvalidName."""
    mounts = staging_mounts()
    for mount in mounts:
        if f"{wanted}/".startswith(f"{mount.mountpoint}/"):
            return mount, wanted
    found = choose_mount(None, mounts, uid=os.geteuid(), option="PARALLEL_LOCAL_STORAGE")
    return found, found.mountpoint
