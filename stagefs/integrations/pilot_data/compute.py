"""The compute side of the Pilot-API, on this machine: PilotComputeService, PilotCompute,
ComputeUnit.

A pilot has ``number_of_processes`` places (times ``processes_per_node``) and a directory
``bj-...`` in the mount, in which each unit has its own, ``sj-...``.  Units run as processes of
the program that submitted them, as many at a time as there are places, in the order in which they
came; a program that ends waits for them.  Thread-safe.
"""

import collections
import datetime
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

from stagefs.errors import StageFSError
from stagefs.integrations.pilot_data.contents import known
from stagefs.integrations.pilot_data.execution import Cancelled, Execution, processes
from stagefs.integrations.pilot_data.records import (
    OTHER_URLS,
    ComputeUnitRecord,
    Mount,
    PilotRecord,
    Place,
    ServiceRecord,
    id_of,
    new_id,
    own_worker,
    place_for,
)
from stagefs.integrations.pilot_data.values import (
    FINAL,
    Affinity,
    PilotError,
    State,
    Words,
    checked,
    positive,
)

log = logging.getLogger("stagefs.pilot_data")

SERVICE = "fork:"
POLL_S = 0.1


class PilotComputeService:
    """Makes compute pilots.  ``coordination_url`` is BigJob's: the mount does what its server did.
    ``pcs_url`` finds the pilots of another one again.  Raises PilotError."""

    def __init__(
        self,
        coordination_url: str | None = None,
        pcs_url: str | None = None,
        *,
        mount: Mount = None,
    ) -> None:
        del coordination_url
        self._place = place_for(mount)
        self.id = new_id("pcs") if pcs_url is None else id_of(pcs_url, "pcs")
        self.url = OTHER_URLS + self.id
        self.pilot_computes: list[PilotCompute] = []
        if pcs_url is None:
            self._place.write(ServiceRecord(self.id))
        else:
            kept = known(pcs_url, lambda: self._place.read(ServiceRecord, self.id))
            mount = self._place
            self.pilot_computes += [PilotCompute(pilot_url=one, mount=mount) for one in kept.pilots]

    def create_pilot(self, pilot_compute_description: Words) -> "PilotCompute":
        """Raises PilotError."""
        made = PilotCompute(
            self,
            pilot_compute_description=pilot_compute_description,
            mount=self._place,
        )
        self._place.change(ServiceRecord, self.id, lambda one: one.pilots.append(made.id))
        self.pilot_computes.append(made)
        return made

    def list_pilots(self) -> "list[PilotCompute]":
        return self.pilot_computes

    def wait(self) -> None:
        """Until all units of all its pilots have ended."""
        for pilot in self.pilot_computes:
            pilot.wait()

    def cancel(self) -> None:
        """End its pilots and all that runs in them."""
        for pilot in self.pilot_computes:
            pilot.cancel()

    def get_url(self) -> str:
        return self.url


class PilotCompute:
    """Places for compute units.  ``pilot_url`` finds one again: what runs in it can be looked at,
    and further units run in the program that submits them.  Raises PilotError."""

    def __init__(
        self,
        pilot_compute_service: PilotComputeService | None = None,
        bigjob_object: object = None,
        pilot_compute_description: Words | None = None,
        pilot_url: str | None = None,
        *,
        mount: Mount = None,
    ) -> None:
        del bigjob_object
        self.pilot_compute_service = pilot_compute_service
        self._place = place_for(mount)
        if pilot_url is None:
            description = checked(pilot_compute_description, "service_url", "compute pilot")
            record = _made(self._place, description)
        else:
            identity = id_of(pilot_url.partition("/sj-")[0], "bj")
            record = known(pilot_url, lambda: self._place.read(PilotRecord, identity))
        self.id = record.id
        self.url = OTHER_URLS + record.id
        self.pilot_compute_description = record.description
        self.affinity = Affinity.of(record.description)
        self.places = _places(record.description)
        self._free = self.places
        self._changed = threading.Condition()
        self._waiting: collections.deque[ComputeUnit] = collections.deque()
        self._running: list[ComputeUnit] = []

    def __repr__(self) -> str:
        return self.url

    def get_url(self) -> str:
        return self.url

    def get_state(self) -> str:
        return self._record().state_now()

    def get_details(self) -> dict[str, Any]:
        record = self._record()
        return {**record.description, "state": record.state_now(), "directory": record.shown}

    @property
    def working_directory(self) -> str:
        """``.../bj-...``"""
        return self._record().shown

    def get_free_nodes(self) -> int:
        with self._changed:
            return self._free

    @property
    def load(self) -> int:
        """Places that are taken or waited for, in this program."""
        with self._changed:
            units = [*self._waiting, *self._running]
        return sum(processes(one.compute_unit_description) for one in units)

    def list_compute_units(self) -> "list[ComputeUnit]":
        mount = self._place
        return [ComputeUnit(cu_url=one, mount=mount) for one in self._record().units]

    def submit_compute_unit(self, compute_unit_description: Words) -> "ComputeUnit":
        """Raises PilotError."""
        unit = ComputeUnit(compute_unit_description, mount=self._place)
        self.take(unit)
        return unit

    def take(self, unit: "ComputeUnit") -> None:
        """Run the unit when it is its turn.  Raises PilotError."""
        needed = processes(unit.compute_unit_description)
        if needed > self.places:
            raise PilotError(
                f"{self.url} has {self.places} processes, and the unit needs {needed}: ask for more"
                " with number_of_processes of the pilot."
            )
        if self.get_state() != State.Running:
            raise PilotError(f"{self.url} is {self.get_state()} and takes no unit.")
        record = self._place.change(PilotRecord, self.id, lambda one: one.units.append(unit.id))
        unit.given_to(self.url, f"{record.directory}/{unit.id}")
        with self._changed:
            self._waiting.append(unit)
            self._begin()

    def _begin(self) -> None:
        """As many as have room, in their order; who calls it holds the lock."""
        while self._waiting:
            needed = processes(self._waiting[0].compute_unit_description)
            if needed > self._free:
                return
            unit = self._waiting.popleft()
            self._free -= needed
            self._running.append(unit)
            # Not a daemon: a program that ends waits for what it submitted.
            threading.Thread(
                target=self._run, args=(unit, needed), name=f"pilot-data {unit.id}"
            ).start()

    def _run(self, unit: "ComputeUnit", needed: int) -> None:
        try:
            unit.execute()
        finally:
            with self._changed:
                self._running.remove(unit)
                self._free += needed
                self._begin()
                self._changed.notify_all()

    def wait(self) -> None:
        """Until all units that this object took have ended."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._running)

    def cancel(self) -> None:
        """End it, and all that runs in it."""

        def ended(record: PilotRecord) -> None:
            record.state = State.Canceled if record.state == State.Running else record.state

        self._place.change(PilotRecord, self.id, ended)
        with self._changed:
            waiting = [*self._waiting]
            self._waiting.clear()
            units = [*waiting, *self._running]
        for unit in units:
            unit.cancel()
        self.wait()

    def _record(self) -> PilotRecord:
        return self._place.read(PilotRecord, self.id)


class ComputeUnit:
    """A program and its data.  ``cu_url`` finds one again, to look at.  Raises PilotError."""

    def __init__(
        self,
        compute_unit_description: Words | None = None,
        compute_data_service: object = None,
        cu_url: str | None = None,
        *,
        mount: Mount = None,
    ) -> None:
        del compute_data_service
        self._place = place_for(mount)
        self._execution: Execution | None = None
        self._lock = threading.Lock()
        if cu_url is None:
            description = checked(compute_unit_description, "executable", "compute unit")
            processes(description)
            # BigJob's name of a unit that runs; its directory is called so.
            self.id = new_id("sj")
            self._place.write(
                ComputeUnitRecord(
                    self.id,
                    _plain(description),
                    worker=own_worker(),
                    details={State.New: _now()},
                )
            )
        else:
            self.id = id_of(cu_url, "sj")
        record = known(cu_url or self.id, self._record)
        self.compute_unit_description = record.description

    def __repr__(self) -> str:
        return self.get_url()

    def get_id(self) -> str:
        return self.id

    def get_url(self) -> str:
        pilot = self._record().pilot
        return f"{pilot}/{self.id}" if pilot else OTHER_URLS + self.id

    def get_state(self) -> str:
        return self._record().state_now()

    @property
    def reason(self) -> str:
        """Why it failed: a sentence with the name and the reason."""
        return self._record().reason

    def get_details(self) -> dict[str, Any]:
        """The description, the state, and when it came into each."""
        record = self._record()
        return {
            **record.description,
            "state": record.state_now(),
            "reason": record.reason,
            "times": record.details,
        }

    def get_local_working_directory(self) -> str:
        """``.../bj-.../sj-...``, or its ``working_directory``."""
        return self._record().directory

    def wait(self, timeout: float | None = None) -> None:
        """Until it has ended, and what it made for pilot datas is there.  Raises PilotError after
        ``timeout`` seconds."""
        waited = threading.Event()
        for _ in range(1 << 62 if timeout is None else int(timeout / POLL_S) + 1):
            if self._record().state_now() in {*FINAL, State.Unknown}:
                for unit in [] if self._execution is None else self._execution.sending:
                    unit.wait(timeout)
                return
            waited.wait(POLL_S)
        raise PilotError(f"{self.get_url()} did not end within {timeout} s.")

    def cancel(self) -> None:
        """End it, in the program that it runs in."""
        with self._lock:
            if self._execution is not None:
                self._execution.cancel()
                return
        if self.get_state() not in FINAL:
            self.ended(State.Canceled)

    # What pilots and services do with it

    def given_to(self, pilot_url: str, directory: str) -> None:
        """It will run in that directory."""

        def pending(record: ComputeUnitRecord) -> None:
            record.pilot, record.directory = pilot_url, directory
            record.worker = own_worker()

        self._place.change(ComputeUnitRecord, self.id, pending)
        self.enter(State.Pending)

    def execute(self) -> None:
        """Run it to the end; how it went is its state."""
        record = self._record()
        with self._lock:
            if record.state in FINAL:
                return
            execution = self._execution = Execution(
                self._place, self.id, record.description, record.directory
            )
        self.enter(State.Running)
        try:
            execution.run()
        except Cancelled:
            self.ended(State.Canceled)
        except (StageFSError, OSError) as exc:
            self.ended(State.Failed, f"{self.get_url()} failed: {exc}")
        except BaseException as exc:
            self.ended(State.Failed, f"{self.get_url()} failed unexpectedly: {exc!r}")
            raise
        else:
            self.ended(State.Done)
        finally:
            directory = execution.directory
            self._place.change(
                ComputeUnitRecord, self.id, lambda one: setattr(one, "directory", directory)
            )

    def enter(self, state: str) -> None:
        def entered(record: ComputeUnitRecord) -> None:
            record.state = state
            record.details[state] = _now()

        self._place.change(ComputeUnitRecord, self.id, entered)

    def ended(self, state: str, reason: str = "") -> None:
        if reason:
            log.error("%s", reason)

            def told(record: ComputeUnitRecord) -> None:
                record.reason = reason

            self._place.change(ComputeUnitRecord, self.id, told)
        self.enter(state)

    def _record(self) -> ComputeUnitRecord:
        return self._place.read(ComputeUnitRecord, self.id)


def _made(place: Place, description: Words) -> PilotRecord:
    """A new pilot.  Raises PilotError."""
    url = str(description["service_url"])
    if not url.startswith(SERVICE):
        raise PilotError(
            f"{url} is no fork:// URL: start the program where its units shall run, in a batch job"
            " for instance, and write fork://localhost."
        )
    _places(description)
    identity = new_id("bj")
    wanted = str(description.get("working_directory") or place.mountpoint)
    top = os.path.realpath(os.path.expanduser(wanted))
    directory = shown = f"{top}/{identity}"
    try:
        if not f"{top}/".startswith(f"{place.mountpoint}/"):
            # Links need the mount: the directory lies there, and can be found where it is wanted.
            directory = f"{place.mountpoint}/{identity}"
            os.makedirs(top, exist_ok=True)
            os.symlink(directory, shown)
        os.makedirs(directory, exist_ok=True)
    except OSError as exc:
        raise PilotError(f"{shown} cannot be made: {exc.strerror}.") from exc
    record = PilotRecord(identity, _plain(description), directory, shown, worker=own_worker())
    place.write(record)
    return record


def _places(description: Words) -> int:
    """Raises PilotError."""
    # BigJob's own word for one.
    per_node = {key: value for key, value in description.items() if value not in (None, "None")}
    return positive(description, "number_of_processes") * positive(per_node, "processes_per_node")


def _plain(description: Words) -> dict[str, Any]:
    """As JSON keeps it."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {str(key): plain(inner) for key, inner in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [plain(inner) for inner in value]
        return value if isinstance(value, str | int | float | bool | None) else str(value)

    return {str(key): plain(value) for key, value in description.items()}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()
