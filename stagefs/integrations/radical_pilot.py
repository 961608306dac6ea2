"""RADICAL-Pilot on a mount: ``staging:///`` in staging directives, task directories in the mount.

    import radical.pilot as rp
    from stagefs.integrations import radical_pilot
    radical_pilot.install("/tmp/pilot")           # the mountpoint

From then on, in this program, for all sessions:

* ``staging:///x`` means that entry of the namespace, in ``Pilot.stage_in`` and ``stage_out`` and
  in the input and output staging of tasks, as a dictionary or as a string.  RADICAL-Pilot itself
  took the scheme away in 1.48 and silently reads it as ``/x``.
* ``Pilot.stage_in`` of an http, ssh or s3 URL to ``staging:///x`` registers it: nothing is
  transferred before a task reads it.
* A task without a ``sandbox`` gets one in the mount, ``tasks/<session>/<task>``, so that LINK (a
  hard link) can reach the namespace.
* What RADICAL-Pilot swallows raises: its copies ignore the exit code of ``cp``.
* ``Session.close`` ends the sandboxes that were made for the session's tasks: those of tasks that
  are DONE are committed, others failed; where the pilot's description says ``cleanup`` they go.
* A pilot that spans nodes is refused: its other nodes have no such mount.

Components and agent of RADICAL-Pilot run in processes of their own and are not touched: they get
directives that are rewritten to ``file://`` already.  Without all this, a pilot whose working
directory lies in the mount links and runs there too (see docs/RADICAL-PILOT.md).

Thread-safe as far as RADICAL-Pilot is.  What is kept here of tasks is written by ``submit_tasks``
and taken by ``Session.close``; single operations on a dictionary need no lock.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib
import logging
import math
import os
import shlex
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from stagefs.control.client import Client, Refused
from stagefs.errors import (
    InvalidUrl,
    NoDaemon,
    NotFound,
    NotSupported,
    RemoteError,
    SetupError,
    StageFSError,
)
from stagefs.remote.url import DECODED_SCHEMES, HTTP_SCHEMES, parse
from stagefs.staging.manifest import Manifest
from stagefs.staging.values import NameStat

TESTED_WITH = ("radical.pilot 1.103.2",)

log = logging.getLogger(__name__)

SCHEME = "staging:"
PREFIX = "staging:///"
# The schemes of RADICAL-Pilot that mean a file of this machine, or of the pilot's.
_REMOTE_SCHEMES = (HTTP_SCHEMES | DECODED_SCHEMES | {"s3"}) - {"file", "memory"}
# In the order in which RADICAL-Pilot looks for them.
_ARROWS = (">>", ">", "<<", "<")

Directive = str | dict[str, object]
"""What RADICAL-Pilot takes as one staging directive."""
Directives = Directive | Sequence[Directive] | None


class _Description(Protocol):
    """What is used of a TaskDescription."""

    uid: str
    sandbox: str
    input_staging: Directives
    output_staging: Directives


class _PilotDescription(Protocol):
    resource: str
    access_schema: str | None
    nodes: int
    backup_nodes: int
    cores: int
    gpus: int


class _ResourceConfig(Protocol):
    resource_manager: str
    cores_per_node: int
    gpus_per_node: int


class _Session(Protocol):
    uid: str

    def get_resource_config(self, resource: str, schema: str | None) -> _ResourceConfig: ...


class _Manager(Protocol):
    session: _Session


class _TaskManager(_Manager, Protocol):
    def list_tasks(self) -> list[str]: ...


class _Pilot(Protocol):
    uid: str
    description: dict[str, object]


class _Task(Protocol):
    uid: str
    state: str
    pilot: str | None
    exception: str | None
    exception_detail: str | None


@dataclasses.dataclass(frozen=True)
class _Submitted:
    """A task, the names it links, and the sandbox that was made for it, if one was."""

    task: _Task
    mountpoint: str
    inputs: list[str]
    sandbox: str | None


# By session, until it is closed; whatever was installed since.
_submitted: dict[str, list[_Submitted]] = {}
_known: "weakref.WeakKeyDictionary[_Task, _Submitted]" = weakref.WeakKeyDictionary()
# Pilots whose sandboxes RADICAL-Pilot itself removes, by session.
_cleaned: dict[str, set[str]] = {}


def install(mountpoint: str | Path, *, manifest: Manifest | None = None) -> None:
    """Serve ``staging:///`` from the mount, in all sessions of this program from now on.

    ``manifest`` is what the sandboxes of tasks are made with, such as
    ``Manifest(on_write=OnWrite.READ_ONLY)``.  Called again, the last mount counts.  Raises
    NoDaemon when nothing is mounted there, SetupError without RADICAL-Pilot.
    """
    try:
        pilot_package = importlib.import_module("radical.pilot")
    except ImportError as exc:
        raise SetupError(
            f"RADICAL-Pilot cannot be imported here ({exc}): install radical.pilot into the"
            " environment of this program."
        ) from exc
    area = _Area(os.path.realpath(mountpoint), manifest or Manifest(), pilot_package)
    area.client.status()
    task_manager, pilot, task = pilot_package.TaskManager, pilot_package.Pilot, pilot_package.Task
    pilot_manager, session = pilot_package.PilotManager, pilot_package.Session
    pilot_manager.submit_pilots = _wrapped(pilot_manager.submit_pilots, area.submit_pilots)
    session.close = _wrapped(session.close, area.close)
    task_manager.submit_tasks = _wrapped(task_manager.submit_tasks, area.submit_tasks)
    pilot.stage_in = _wrapped(pilot.stage_in, area.stage_in)
    pilot.stage_out = _wrapped(pilot.stage_out, area.stage_out)
    original = _original(task.exception.fget)
    reader = _wrapped(original, area.exception)
    task.exception = property(reader, doc=original.__doc__)


def _original(function: Callable[..., Any]) -> Callable[..., Any]:
    """RADICAL-Pilot's own, also when ``install`` was called before."""
    found: Callable[..., Any] = getattr(function, "stagefs_original", function)
    return found


def _wrapped(function: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """A method that calls ``replacement`` with RADICAL-Pilot's own method and its arguments."""
    original = _original(function)

    @functools.wraps(original)
    def method(*arguments: object, **options: object) -> object:
        return replacement(original, *arguments, **options)

    method.stagefs_original = original  # type: ignore[attr-defined]
    return method


class _Area:
    """One mount, and what becomes of directives on it."""

    def __init__(self, mountpoint: str, manifest: Manifest, pilot_package: ModuleType) -> None:
        self.mountpoint = mountpoint
        self.client = Client.of(mountpoint)
        self._manifest = manifest
        self._rp = pilot_package
        self._staging = os.path.join(mountpoint, "staging")

    # What replaces RADICAL-Pilot's methods

    def submit_pilots(
        self,
        original: Callable[..., _Pilot | list[_Pilot]],
        pilot_manager: _Manager,
        descriptions: _PilotDescription | list[_PilotDescription],
    ) -> _Pilot | list[_Pilot]:
        """Raises NotSupported, before anything is submitted, for a pilot that spans nodes."""
        for one in descriptions if isinstance(descriptions, list) else [descriptions]:
            nodes = _nodes(pilot_manager.session, one)
            if nodes > 1:
                raise NotSupported(
                    f"The pilot on {one.resource} would span {nodes} nodes, and {self.mountpoint}"
                    " is there on one only: ask for no more than one node has, or submit a pilot"
                    " with a mount of its own for each node."
                )
        made = original(pilot_manager, descriptions)
        session = str(pilot_manager.session.uid)
        for pilot in made if isinstance(made, list) else [made]:
            if pilot.description.get("cleanup"):
                _cleaned.setdefault(session, set()).add(str(pilot.uid))
        return made

    def close(self, original: Callable[..., object], session: _Session, **options: object) -> None:
        """The sandboxes of a session end with it.  One that cannot be ended is logged: the session
        is closed all the same."""
        uid = str(session.uid)
        original(session, **options)
        cleaned = _cleaned.pop(uid, set())
        mountpoints: set[str] = set()
        for one in _submitted.pop(uid, []):
            if one.sandbox is not None:
                mountpoints.add(one.mountpoint)
                with _logged(one.sandbox):
                    self._end(one, one.sandbox, remove=one.task.pilot in cleaned)
        for mountpoint in mountpoints:
            # A directory in tasks/ is a sandbox itself.
            with _logged(uid):
                try:
                    os.rmdir(f"{mountpoint}/tasks/{uid}")
                except OSError:
                    Client.of(mountpoint).sandbox_commit(uid)

    def _end(self, one: _Submitted, sandbox: str, *, remove: bool) -> None:
        client = Client.of(one.mountpoint)
        if remove:
            client.sandbox_remove(sandbox)
        elif one.task.state == self._rp.DONE:
            client.sandbox_commit(sandbox)
        else:
            client.sandbox_fail(sandbox, one.task.exception or str(one.task.state))

    def submit_tasks(
        self,
        original: Callable[..., object],
        task_manager: _TaskManager,
        descriptions: _Description | list[_Description],
    ) -> object:
        """Raises NotFound, before anything is submitted, for inputs whose absence a copy would
        pass over, and what their remotes say of inputs that a copy could not read."""
        there: set[str] = set()
        rewritten: list[tuple[_Description, list[Directive], list[Directive]]] = []
        linked: list[list[str]] = []
        wanted = descriptions if isinstance(descriptions, list) else [descriptions]
        for one in filter(None, wanted):
            self._refuse_missing(_listed(one.input_staging), there)
            inputs = [self._directive(each) for each in _listed(one.input_staging)]
            outputs = [self._directive(each) for each in _listed(one.output_staging)]
            rewritten.append((one, inputs, outputs))
            sources = (_ends(each)[0] for each in _listed(one.input_staging))
            linked.append([source for source in sources if _is_staging(source)])
        sandboxes: list[str | None] = []
        for one, inputs, outputs in rewritten:
            one.input_staging = inputs
            one.output_staging = outputs
            sandboxes.append(None if one.sandbox else self._sandbox(task_manager, one))
        made = original(task_manager, descriptions)
        tasks = made if isinstance(made, list) else [made]
        kept = _submitted.setdefault(str(task_manager.session.uid), [])
        for task, names, sandbox in zip(tasks, linked, sandboxes, strict=True):
            _known[task] = _Submitted(task, self.mountpoint, names, sandbox)
            kept.append(_known[task])
        return made

    def stage_in(
        self, original: Callable[..., list[str]], pilot: object, directives: Directives
    ) -> list[str]:
        """The targets, in the order of the directives.  Raises NotFound for a source whose absence
        RADICAL-Pilot's copy passes over."""
        wanted = _listed(directives)
        self._refuse_missing(wanted, set())
        targets: list[str] = []
        for directive in wanted:
            source, target = _ends(directive)
            if not _is_staging(target):
                targets += original(pilot, self._directive(directive))
            elif source.partition("://")[0].lower() in _REMOTE_SCHEMES:
                self.client.stage_in([source], target, replace=True)
                targets.append(self._file_url(target))
            else:
                before = self._stat(target)
                targets += original(pilot, self._directive(directive))
                self._refuse_unchanged(source, target, before)
        return targets

    def stage_out(
        self, original: Callable[..., list[str]], pilot: object, directives: Directives = None
    ) -> list[str]:
        """The targets, in the order of the directives."""
        wanted = _listed(directives)
        self._refuse_missing(wanted, set())
        return original(pilot, [self._directive(one) for one in wanted])

    def exception(self, original: Callable[..., str | None], task: _Task) -> str | None:
        """Why a task failed, with the name that was missing: RADICAL-Pilot's own text of an OSError
        names no file, only its traceback does, and that of a program that ended with an error says
        nothing at all."""
        why = original(task)
        if why is None:
            return None
        lines = [line for line in (task.exception_detail or "").splitlines() if self._names(line)]
        if lines:
            return lines[-1].strip().replace(f"{self._staging}/", PREFIX)
        return self._unreadable(task) or why

    def _unreadable(self, task: _Task) -> str | None:
        """Of the names that a task links, the one that could not be read, and why."""
        known = _known.get(task)
        if known is None:
            return None
        for name in known.inputs:
            # Who asks why a task failed must not fail himself.
            with contextlib.suppress(StageFSError):
                found = Client.of(known.mountpoint).stat(name)
                if found.last_error is not None:
                    return f"{name} ({found.url}) could not be read: {found.last_error}"
        return None

    def _names(self, line: str) -> bool:
        return f"{self._staging}/" in line

    # Directives

    def _directive(self, directive: Directive) -> Directive:
        """The same directive in words that RADICAL-Pilot knows."""
        if isinstance(directive, str):
            for arrow in _ARROWS:
                if arrow in directive:
                    left, right = directive.split(arrow, 1)
                    return f"{self._url(left.strip())} {arrow} {self._url(right.strip())}"
            return str(self._url(directive.strip()))
        copied = self._copies(directive)
        return {
            key: self._url(value, copied=copied) if key in {"source", "target"} else value
            for key, value in directive.items()
        }

    def _copies(self, directive: dict[str, object]) -> bool:
        action = directive.get("action", self._rp.TRANSFER)
        return action in (self._rp.COPY, self._rp.TRANSFER)

    def _url(self, url: object, *, copied: bool = True) -> object:
        return self._file_url(str(url), copied=copied) if _is_staging(url) else url

    def _file_url(self, name: str, *, copied: bool = False) -> str:
        """Raises InvalidUrl for a name that RADICAL-Pilot would read as another one."""
        path = f"{self._staging}{parse(name).path}"
        url = f"file://localhost{path}"
        if self._rp_path(url) != path:
            raise InvalidUrl(
                f"RADICAL-Pilot takes {name} for {self._rp_path(url)}, because it cuts paths at"
                " '?', '#' and more: give the file another name."
            )
        if copied and shlex.quote(path) != path:
            raise InvalidUrl(
                f"RADICAL-Pilot cannot copy {name}: it hands the name to `cp` without quoting it;"
                " LINK it, or give the file a name without blanks and special characters."
            )
        return url

    def _rp_path(self, url: str) -> str:
        return str(importlib.import_module("radical.utils").Url(url).path)

    # Names that are there or not

    def _stat(self, name: str) -> NameStat | None:
        try:
            return self.client.stat(name)
        except Refused as exc:
            if exc.errno == errno.ENOENT:
                return None
            raise

    def _refuse_missing(self, directives: Iterable[Directive], there: set[str]) -> None:
        """``there``: names that were found before; it grows.  A file that is copied is fetched
        before: a copy reads all of it, and RADICAL-Pilot does not see when it fails."""
        for directive in directives:
            name, _ = _ends(directive)
            copied = isinstance(directive, str) or self._copies(directive)
            if not copied or not _is_staging(name) or name in there:
                continue
            found = self._stat(name)
            if found is None:
                raise NotFound(
                    f"{name} does not exist, and RADICAL-Pilot would go on without it: stage it in"
                    " first, or correct the name."
                )
            if found.kind == "file" and found.url is not None:
                self._fetch(name)
            there.add(name)

    def _fetch(self, name: str) -> None:
        try:
            self.client.cache_warm([name])
        except Refused as exc:
            raise RemoteError(f"{name} cannot be copied: {exc}") from exc

    def _refuse_unchanged(self, source: str, target: str, before: NameStat | None) -> None:
        after = self._stat(target)
        if after is None or (after.kind == "file" and after == before):
            raise NotFound(
                f"{source} did not become {target}: RADICAL-Pilot copied nothing and says nothing;"
                " see that the source exists and can be read."
            )

    # Sandboxes

    def _sandbox(self, task_manager: _TaskManager, description: _Description) -> str:
        """Make the task's directory.  The task gets its name here, as it would a moment later."""
        session = str(task_manager.session.uid)
        if not description.uid:
            description.uid = self._free_uid(task_manager, session)
        path = f"/tasks/{session}/{description.uid}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(f"{self.mountpoint}/tasks/{session}")
        self.client.sandbox_create(path, self._manifest)
        description.sandbox = f"{self.mountpoint}{path}"
        return path

    def _free_uid(self, task_manager: _TaskManager, session: str) -> str:
        utils = importlib.import_module("radical.utils")
        taken = frozenset(task_manager.list_tasks())
        while True:
            uid = str(utils.generate_id("task.%(item_counter)06d", utils.ID_CUSTOM, ns=session))
            if uid not in taken:
                return uid


@contextlib.contextmanager
def _logged(sandbox: str) -> Iterator[None]:
    """A sandbox that cannot be ended.  Not one that somebody removed, or whose mount ended with the
    pilot that had made it."""
    try:
        yield
    except NoDaemon:
        pass
    except Refused as exc:
        if exc.errno != errno.ENOENT:
            log.warning("The sandbox %s stays as it is: %s", sandbox, exc)


def _nodes(session: _Session, description: _PilotDescription) -> int:
    """How many machines a pilot asks for, as RADICAL-Pilot reckons it."""
    if description.nodes:
        return description.nodes + (description.backup_nodes or 0)
    resource = session.get_resource_config(description.resource, description.access_schema)
    if resource.resource_manager == "FORK":
        return 1  # Its nodes are this machine, however many cores are asked for.
    wanted = [
        (description.cores or 0, resource.cores_per_node or 0),
        (description.gpus or 0, resource.gpus_per_node or 0),
    ]
    return max([1, *(math.ceil(asked / there) for asked, there in wanted if there)])


def _listed(directives: Directives) -> list[Directive]:
    if not directives:
        return []
    return [directives] if isinstance(directives, str | dict) else list(directives)


def _ends(directive: Directive) -> tuple[str, str]:
    """Source and target, the target empty where RADICAL-Pilot chooses it."""
    if isinstance(directive, dict):
        return str(directive.get("source", "")), str(directive.get("target", ""))
    for arrow in _ARROWS:
        if arrow in directive:
            left, right = (part.strip() for part in directive.split(arrow, 1))
            return (left, right) if ">" in arrow else (right, left)
    return directive.strip(), ""


def _is_staging(url: object) -> bool:
    return str(url).startswith(SCHEME)
