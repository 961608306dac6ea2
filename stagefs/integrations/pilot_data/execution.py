"""One compute unit: its directory, its inputs, its process, its outputs.

The directory is a sandbox of the mount with a virtual link for each file of the unit's inputs:
nothing is copied or fetched before the process reads it.  When the process has succeeded, what
``output_data`` names moves into the data units, all of it or nothing, without a copy; for those
that are at pilot datas the same commit queues the uploads.  A unit that failed publishes nothing,
and its directory stays as it is.

Where ``working_directory`` is a directory that is there already and lies outside the mount, inputs
are copied into it, and outputs into the mount, as BigJob did.

Blocking; one thread for each unit.
"""

import contextlib
import errno
import fnmatch
import glob
import os
import signal
import stat
import string
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import msgspec

from stagefs.config import environment
from stagefs.control.client import Refused
from stagefs.errors import NotFound, StageFSError
from stagefs.integrations.pilot_data.contents import POLL_S, Contents, copy, refuse_unfit
from stagefs.integrations.pilot_data.records import (
    PENDING,
    DataUnitRecord,
    File,
    Place,
    Replica,
    id_of,
    own_worker,
)
from stagefs.integrations.pilot_data.values import PilotError, State, Words, positive
from stagefs.staging.manifest import Manifest, Output

STOP_GRACE_S = 5.0
CLOSING_PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Cancelled(Exception):
    """The unit was cancelled."""


class _Look(msgspec.Struct, frozen=True):
    """Tells a file that is as it was from one that was changed or made."""

    mode: int
    inode: int
    mtime_ns: int
    size_bytes: int


def _look(path: str) -> _Look:
    status = os.lstat(path)
    return _Look(status.st_mode, status.st_ino, status.st_mtime_ns, status.st_size)


class _Declared(msgspec.Struct, frozen=True):
    """What ``output_data`` says of one data unit."""

    unit: Contents
    patterns: Sequence[str]


class Execution:
    """Of one unit, once.  ``identity`` is sj-..., ``directory`` where BigJob would have it."""

    def __init__(self, place: Place, identity: str, description: Words, directory: str) -> None:
        self._place = place
        self._id = identity
        self._description = description
        self._sandbox = directory
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        # The inputs as they were put into the directory.
        self._placed: dict[str, _Look] = {}
        self.directory = directory
        self.sending: list[Contents] = []

    def cancel(self) -> None:
        """End the process, if it runs; it is not begun any more."""
        self._cancelled.set()
        with self._lock:
            child = self._child
            if child is None:
                return
            _signal(child, signal.SIGTERM)
        killer = threading.Timer(STOP_GRACE_S, self._kill, args=(child,))
        killer.daemon = True
        killer.start()

    def _kill(self, child: subprocess.Popen[bytes]) -> None:
        with self._lock:
            if self._child is child:
                _signal(child, signal.SIGKILL)

    def run(self) -> None:
        """To the end.  Raises StageFSError with the reason it failed, OSError, Cancelled."""
        inputs = self._inputs()
        outputs = self._outputs()
        self._refuse_cancelled()
        self._make_directory(inputs)
        try:
            self._execute()
            self._publish(outputs)
        except BaseException as failure:
            with contextlib.suppress(StageFSError):
                self._place.client.sandbox_fail(self._name, str(failure) or "cancelled")
            raise

    def _refuse_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    @property
    def _name(self) -> str:
        """The sandbox by its path in the mount."""
        return self._sandbox.removeprefix(self._place.mountpoint)

    # Inputs

    def _inputs(self) -> dict[str, str]:
        """Name in the directory -> name in the namespace.  Raises PilotError for one that is not
        there."""
        found: dict[str, str] = {}
        for url in _list(self._description.get("input_data")):
            unit = data_unit(self._place, url)
            record = self._settled(unit)
            if record.state() != State.Running:
                why = f": {record.why()}" if record.why() else ""
                raise PilotError(f"The input {url} is {record.state()}{why}")
            try:
                there = {one.name for one in self._place.client.list_names(record.url)}
            except StageFSError as exc:
                raise PilotError(f"The input {url} cannot be listed: {exc}") from exc
            gone = [name for name in record.files if name not in there]
            if gone:
                raise PilotError(f"The input {record.url}/{gone[0]} is not there any more.")
            for name in there:
                if name in found:
                    raise PilotError(
                        f"The inputs {found[name]} and {record.url}/{name} have one name: put them"
                        " into one directory under two."
                    )
                found[name] = f"{record.url}/{name}"
        return found

    def _settled(self, unit: Contents) -> DataUnitRecord:
        """As it is when it is not on its way any more.  Raises Cancelled."""
        while (record := unit.record()).state() in (State.New, State.Pending):
            self._cancelled.wait(POLL_S)
            self._refuse_cancelled()
        return record

    # The directory

    def _make_directory(self, inputs: dict[str, str]) -> None:
        """Raises StageFSError, OSError."""
        elsewhere = self._elsewhere()
        os.makedirs(os.path.dirname(self._sandbox), exist_ok=True)
        # Without a worker: what a unit leaves is its user's, and the next mount keeps it.
        self._place.client.sandbox_create(self._name, Manifest(inputs={} if elsewhere else inputs))
        if elsewhere:
            self.directory = elsewhere
            for name, source in inputs.items():
                self._put_in(self._place.local(source), f"{elsewhere}/{name}")
        for name in inputs:
            self._placed[name] = _look(f"{self.directory}/{name}")

    def _elsewhere(self) -> str:
        """The ``working_directory``, if it is there already.  One that is not becomes the sandbox,
        or leads to it from outside the mount."""
        wanted = self._description.get("working_directory")
        if not wanted:
            return ""
        path = os.path.join(os.path.dirname(self._sandbox), os.path.expanduser(str(wanted)))
        path = os.path.realpath(path)
        if os.path.isdir(path):
            return path
        if f"{path}/".startswith(f"{self._place.mountpoint}/"):
            self._sandbox = self.directory = path
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(self._sandbox, path)
            self.directory = path
        return ""

    def _put_in(self, source: str, target: str) -> None:
        """A link where both are in the mount, else a copy; in place of what is there, as several
        units may work in one directory."""
        if os.stat(source).st_dev != os.stat(os.path.dirname(target)).st_dev:
            copy(source, target)
        elif not (os.path.lexists(target) and os.path.samefile(source, target)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)
            os.link(source, target)

    # The process

    def _execute(self) -> None:
        """Raises PilotError when it fails, OSError when it cannot be begun, Cancelled."""
        values, own = self._variables()
        executable = os.path.expanduser(self._expanded(str(self._description["executable"]), own))
        words = [
            self._expanded(str(word), own) for word in _list(self._description.get("arguments"))
        ]
        with contextlib.ExitStack() as stack:
            stdin, stdout, stderr = self._streams(stack)
            with self._lock:
                self._refuse_cancelled()
                child = self._child = subprocess.Popen(
                    # BigJob's shell dropped empty words, which its examples have.
                    [executable, *filter(None, words)],
                    cwd=self.directory,
                    env=values,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
        code = child.wait()
        with self._lock:
            self._child = None
        self._refuse_cancelled()
        if code != 0:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise PilotError(f"{executable} {how}; its directory is kept: {self.directory}.")

    def _variables(self) -> tuple[dict[str, str], dict[str, str]]:
        """Those of the process, and which of them the description gave."""
        given = self._description.get("environment") or {}
        pairs = (
            given.items()
            if isinstance(given, Mapping)
            else (str(word).partition("=")[::2] for word in _list(given))
        )
        own = {str(name).strip(): str(value) for name, value in pairs}
        return {**environment(), **own, "STAGEFS_SANDBOX": self.directory}, own

    def _expanded(self, word: str, own: Mapping[str, str]) -> str:
        """With the description's own variables (``$NAME``, ``${NAME}``), and nothing else."""
        return string.Template(word).safe_substitute(own) if "$" in word and own else word

    def _streams(self, stack: contextlib.ExitStack) -> tuple[IO[bytes] | int, IO[bytes], IO[bytes]]:
        def opened(key: str, default: str) -> IO[bytes]:
            path = os.path.join(self.directory, str(self._description.get(key) or default))
            return stack.enter_context(open(path, "wb"))

        stdin: IO[bytes] | int = subprocess.DEVNULL
        if named := self._description.get("input"):
            path = os.path.join(self.directory, str(named))
            stdin = stack.enter_context(open(path, "rb"))  # noqa: SIM115  the stack's
        stdout = opened("output", "stdout")
        error, output = self._description.get("error"), self._description.get("output")
        same = (error or "stderr") == (output or "stdout")
        return stdin, stdout, stdout if same else opened("error", "stderr")

    # Outputs

    def _outputs(self) -> list[_Declared]:
        """Raises PilotError for a data unit that is not known."""
        declared = self._description.get("output_data") or []
        outputs = []
        for one in [declared] if isinstance(declared, Mapping) else declared:
            if not isinstance(one, Mapping):
                raise PilotError(
                    f"output_data holds {one!r}: write {{data unit's URL: [patterns]}}."
                )
            for url, patterns in one.items():
                unit = data_unit(self._place, str(url))
                record = unit.record()
                if record.ended:
                    raise PilotError(f"The data unit {url} is {record.ended} and takes no output.")
                outputs.append(_Declared(unit, [str(word) for word in _list(patterns)]))
        return outputs

    def _publish(self, outputs: Sequence[_Declared]) -> None:
        """Raises StageFSError, OSError; then nothing is published and nothing was moved."""
        moved = {id(one): list(self._matched(one.patterns)) for one in outputs}
        self._bring_in({name for names in moved.values() for name in names})
        wanted: list[Output] = []
        with contextlib.ExitStack() as undo:
            with self._place.locked():
                for one in outputs:
                    wanted += self._reserved(one.unit, moved[id(one)], undo)
            commit = self._committed(wanted)
            undo.pop_all()
        for one in outputs:
            for pilot in one.unit.pilots() if moved[id(one)] else []:
                one.unit.sent(pilot, commit)
                self.sending.append(one.unit)
        for name in {name for names in moved.values() for name in names}:
            for directory in {self.directory, self._sandbox}:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{directory}/{name}")

    def _committed(self, outputs: Sequence[Output]) -> str:
        """The commit's id.  The kernel tells the mount of the last close of a file a moment after
        the process has ended.  Raises StageFSError."""
        for pause_s in CLOSING_PAUSES_S:
            try:
                return self._place.client.sandbox_commit(self._name, outputs=outputs).id
            except Refused as refused:
                if refused.errno != errno.EBUSY:
                    raise
            self._cancelled.wait(pause_s)
        return self._place.client.sandbox_commit(self._name, outputs=outputs).id

    def _matched(self, patterns: Sequence[str]) -> Iterator[str]:
        """Files at the top of the directory, each once.  A pattern may match none; a name must be
        there.  A pattern leaves out inputs that are as they were put there.  Raises PilotError."""
        names = sorted(os.listdir(self.directory))
        taken = set()
        for pattern in patterns:
            is_pattern = "*" in pattern or "?" in pattern
            if not is_pattern and pattern not in names:
                raise PilotError(
                    f"{self._description['executable']} made no {pattern}, which output_data names;"
                    f" its directory is kept: {self.directory}."
                )
            for name in fnmatch.filter(names, pattern) if is_pattern else [pattern]:
                look = _look(f"{self.directory}/{name}")
                if not stat.S_ISREG(look.mode) or (is_pattern and look == self._placed.get(name)):
                    continue
                if name not in taken:
                    taken.add(name)
                    yield name

    def _bring_in(self, names: set[str]) -> None:
        """Where the directory is not the sandbox: what is committed is committed from that."""
        if not os.path.samefile(self.directory, self._sandbox):
            for name in names:
                self._put_in(f"{self.directory}/{name}", f"{self._sandbox}/{name}")

    def _reserved(
        self, unit: Contents, names: Sequence[str], undo: contextlib.ExitStack
    ) -> Iterator[Output]:
        """Where each file goes; the unit has them in its record from now on.  Raises PilotError."""
        before = unit.record()
        record = unit.record()
        for name in names:
            if name in record.files:
                raise PilotError(
                    f"{record.url}/{name} exists, so nothing of {self.directory} was published:"
                    " give the output another name, or another data unit."
                )
            size_bytes = os.stat(f"{self.directory}/{name}").st_size
            record.files[name] = File("", size_bytes)
        pilots = unit.pilots() if names else []
        for pilot in pilots:
            new = {name: record.files[name] for name in names}
            refuse_unfit(self._place, pilot, record, new)
            record.replicas[pilot.id] = Replica(PENDING, worker=own_worker())
        self._place.write(record)
        undo.callback(self._restore, before, list(names))
        for name in names:
            pattern = glob.escape(name)
            yield Output(pattern, f"{record.url}/{name}")
            for pilot in pilots:
                yield Output(pattern, pilot.store.url_of(unit.id, name))

    def _restore(self, before: DataUnitRecord, names: Sequence[str]) -> None:
        def without(record: DataUnitRecord) -> None:
            for name in names:
                record.files.pop(name, None)
            record.replicas = before.replicas

        self._place.change(DataUnitRecord, before.id, without)


def data_unit(place: Place, url: str) -> Contents:
    """Raises PilotError for one that is not known here."""
    unit = Contents(place, id_of(str(url), "du"))
    try:
        unit.record()
    except NotFound as exc:
        raise PilotError(f"There is no data unit {url}: {exc}") from exc
    return unit


def processes(description: Words) -> int:
    """How many places of a pilot the unit takes.  Raises PilotError."""
    key = "total_cpu_count" if "total_cpu_count" in description else "number_of_processes"
    return positive(description, key)


def _list(value: object) -> Sequence[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, Sequence):
        return value
    raise PilotError(f"{value!r} is no list.")


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    """To all of its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
