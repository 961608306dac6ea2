"""ComputeDataService: places data units at pilot datas and compute units at pilots, by affinity.

Affinity is a path, data centre / machine; what shares more leading labels is nearer.  A data unit
goes to the nearest pilot data that can take it.  A compute unit goes to the nearest pilot; among
equals to the one that its input data is nearest to, by bytes; among those to the one with the
least to do.  Nothing near is no reason not to run, unless ``hard_affinity`` says so.

A thread looks at what waits; it ends with the program.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

from stagefs.errors import StageFSError
from stagefs.integrations.pilot_data.compute import (
    ComputeUnit,
    PilotCompute,
    PilotComputeService,
)
from stagefs.integrations.pilot_data.contents import Contents, refuse_unfit
from stagefs.integrations.pilot_data.data import DataUnit, PilotData, PilotDataService
from stagefs.integrations.pilot_data.execution import data_unit, processes
from stagefs.integrations.pilot_data.records import OTHER_URLS, PENDING, Mount, new_id, place_for
from stagefs.integrations.pilot_data.values import (
    FINAL,
    Affinity,
    PilotError,
    State,
    Words,
    positive,
)

POLL_S = 0.1


class ComputeDataService:
    """Where units are submitted.  ``cds_url`` is BigJob's and finds nothing again: data and compute
    units are found by their own URLs.  Raises PilotError."""

    def __init__(
        self, cds_url: str | None = None, *, mount: Mount = None, hard_affinity: bool = False
    ) -> None:
        self._place = place_for(mount)
        self.id = new_id("cds")
        self.url = cds_url or OTHER_URLS + self.id
        self.data_units: dict[str, DataUnit] = {}
        self.compute_units: dict[str, ComputeUnit] = {}
        self.pilot_data_services: list[PilotDataService] = []
        self.pilot_job_services: list[PilotComputeService] = []
        self._hard = hard_affinity
        self._waiting: list[ComputeUnit] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None

    # What there is

    def add_pilot_compute_service(self, pcs: PilotComputeService) -> None:
        self.pilot_job_services.append(pcs)

    def remove_pilot_compute_service(self, pcs: PilotComputeService) -> None:
        self.pilot_job_services.remove(pcs)

    def add_pilot_data_service(self, pds: PilotDataService) -> None:
        self.pilot_data_services.append(pds)

    def remove_pilot_data_service(self, pds: PilotDataService) -> None:
        self.pilot_data_services.remove(pds)

    def list_pilot_compute(self) -> list[PilotCompute]:
        return [pilot for service in self.pilot_job_services for pilot in service.list_pilots()]

    def list_pilot_data(self) -> list[PilotDataService]:
        return self.pilot_data_services

    def list_data_units(self) -> list[tuple[str, DataUnit]]:
        return [*self.data_units.items()]

    def get_data_unit(self, du_id: str) -> DataUnit | None:
        return self.data_units.get(du_id)

    def get_id(self) -> str:
        return self.id

    def get_url(self) -> str:
        return self.url

    def get_state(self) -> str:
        return State.Canceled if self._stopped else State.Running

    # Submitting

    def submit_data_unit(self, data_unit_description: Words) -> DataUnit:
        """A unit at the nearest pilot data, or at as many as ``number_of_replicas`` says; without
        any, its files are read from where they are.  What is wrong with it is its ``reason``."""
        unit = DataUnit(data_unit_description=data_unit_description, mount=self._place)
        self.data_units[unit.id] = unit
        if unit.get_state() in FINAL:
            return unit
        try:
            count = positive(data_unit_description, "number_of_replicas")
            for pilot in self._pilot_datas_for(unit.contents, unit.affinity)[:count]:
                unit.add_pilot_data(pilot)
        except StageFSError as exc:
            unit.contents.fail(str(exc))
        return unit

    def submit_compute_unit(self, compute_unit_description: Words) -> ComputeUnit:
        """Raises PilotError for a description that says nothing."""
        unit = ComputeUnit(compute_unit_description, self, mount=self._place)
        with self._changed:
            if self._stopped:
                raise PilotError(f"{self.url} was cancelled and takes no unit.")
            self.compute_units[unit.id] = unit
            self._waiting.append(unit)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._schedule, name=f"pilot-data {self.id}", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
        return unit

    def wait(self) -> None:
        """Until all compute units have ended and all data units are complete or have failed."""
        try:
            for unit in [*self.compute_units.values()]:
                unit.wait()
            for data in [*self.data_units.values()]:
                data.wait()
        except KeyboardInterrupt:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Units that no pilot has are cancelled; pilots go on with theirs."""
        with self._changed:
            self._stopped = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for unit in waiting:
            unit.cancel()

    # Placing data

    def _pilot_datas_for(self, unit: Contents, affinity: Affinity) -> list[PilotData]:
        """The nearest first, and of equals the one with the fewest units.  Raises PilotError when
        there are some, and none can take it."""
        pilots = [one for service in self.pilot_data_services for one in service.list_pilots()]
        fit: list[tuple[int, bool, int, int, PilotData]] = []
        refusals = []
        for pilot in pilots:
            there, record = pilot.record(), unit.record()
            try:
                moved = refuse_unfit(self._place, there, record, record.files)
            except PilotError as refusal:
                refusals.append(refusal)
                continue
            near = there.affinity.closeness(affinity)
            fit.append((-near, bool(moved), len(there.data_units), len(fit), pilot))
        if refusals and not fit:
            raise refusals[0]
        return [pilot for *_rank, pilot in sorted(fit, key=lambda one: one[:-1])]

    # Placing compute units

    def _schedule(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._stopped)
                if self._stopped:
                    return
                waiting = [*self._waiting]
            placed = [unit for unit in waiting if self._tried(unit)]
            with self._changed:
                self._waiting = [unit for unit in self._waiting if unit not in placed]
                if self._waiting and not placed:
                    self._changed.wait_for(lambda: self._stopped, POLL_S)

    def _tried(self, unit: ComputeUnit) -> bool:
        """Whether there is nothing more to do for it here."""
        if unit.get_state() in FINAL:
            return True
        try:
            inputs = [data_unit(self._place, url) for url in _inputs(unit)]
            if any(one.record().state() in (State.New, State.Pending) for one in inputs):
                return False
            pilot = self._pilot_for(unit, inputs)
            if pilot is None:
                return False
            if unit.compute_unit_description.get("replicate_input") and self._replicate(
                inputs, pilot.affinity
            ):
                return False
            pilot.take(unit)
        except StageFSError as exc:
            unit.ended(State.Failed, f"{unit.get_url()} failed: {exc}")
        return True

    def _pilot_for(self, unit: ComputeUnit, inputs: Sequence[Contents]) -> PilotCompute | None:
        """None: there is none yet.  Raises PilotError when the unit is too large for each."""
        pilots = [one for one in self.list_pilot_compute() if one.get_state() == State.Running]
        needed = processes(unit.compute_unit_description)
        large = [pilot for pilot in pilots if pilot.places >= needed]
        if pilots and not large:
            most = max(pilot.places for pilot in pilots)
            raise PilotError(f"It needs {needed} processes, and no pilot has more than {most}.")
        wanted = Affinity.of(unit.compute_unit_description)
        if self._hard and wanted.path:
            full = wanted.closeness(wanted)
            large = [pilot for pilot in large if pilot.affinity.closeness(wanted) == full]

        def rank(pilot: PilotCompute) -> tuple[int, int, int]:
            near = pilot.affinity.closeness(wanted)
            return near, self._input_near(pilot.affinity, inputs), -pilot.load

        return max(large, key=rank, default=None)

    def _input_near(self, affinity: Affinity, inputs: Iterable[Contents]) -> int:
        """Bytes, times the labels that the nearest of their replicas shares with that."""
        return sum(
            max(1, unit.record().size_bytes)
            * max((there.closeness(affinity) for there in _where(unit)), default=0)
            for unit in inputs
        )

    def _replicate(self, inputs: Sequence[Contents], affinity: Affinity) -> bool:
        """Bring inputs nearer where a pilot data is.  Whether one is on its way."""
        begun = False
        for unit in inputs:
            here = max((there.closeness(affinity) for there in _where(unit)), default=0)
            record = unit.record()
            nearer = [
                pilot
                for pilot in self._pilot_datas_for(unit, affinity)
                if pilot.affinity.closeness(affinity) > here
            ]
            tried = [pilot for pilot in nearer if pilot.id in record.replicas]
            if any(record.replicas[one.id].seen().state == PENDING for one in tried):
                begun = True
            elif nearer and not tried:
                unit.put(nearer[0].id)
                begun = True
        return begun


def _where(unit: Contents) -> list[Affinity]:
    """Where the unit is, as far as labels tell."""
    return [one.affinity for one in unit.complete_at()] or [Affinity.of(unit.record().description)]


def _inputs(unit: ComputeUnit) -> list[str]:
    declared: Any = unit.compute_unit_description.get("input_data") or []
    return [declared] if isinstance(declared, str) else [str(url) for url in declared]
