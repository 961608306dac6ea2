"""One data unit's files, and how they come to be at pilot datas.

Names are made of URLs at once, and nothing is transferred for that.  To bring the unit to a pilot
data is an upload in a thread (``uploads``); what is not cached is fetched from wherever the unit
is.  At the first pilot data the names lead to its objects from then on, so that what they came
from may go; at each further one its objects become replicas.  What is below the pilot data's URL
already is registered there and not moved.

A unit that another program brings somewhere is found pending here, and looked at now and then.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from stagefs.errors import NotFound, StageFSError
from stagefs.integrations.pilot_data.records import (
    COMPLETE,
    FAILED,
    DataUnitRecord,
    File,
    PilotDataRecord,
    Place,
    Replica,
    own_worker,
)
from stagefs.integrations.pilot_data.stores import Store
from stagefs.integrations.pilot_data.uploads import upload, wait_for
from stagefs.integrations.pilot_data.values import PilotError, State
from stagefs.remote.url import LOCAL_SCHEMES, parse
from stagefs.staging.manifest import as_url

log = logging.getLogger("stagefs.pilot_data")

POLL_S = 0.1

_T = TypeVar("_T")


class Contents:
    """Of the unit ``identity``.  Thread-safe."""

    def __init__(self, place: Place, identity: str) -> None:
        self._place = place
        self.id = identity
        self._threads: list[threading.Thread] = []
        self._cancelled = threading.Event()

    def record(self) -> DataUnitRecord:
        """Raises NotFound."""
        return self._place.read(DataUnitRecord, self.id)

    def _change(self, change: Callable[[DataUnitRecord], object]) -> DataUnitRecord:
        return self._place.change(DataUnitRecord, self.id, change)

    # How it ends

    def wait(self, timeout_s: float | None) -> None:
        """See DataUnit.wait."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in [*self._threads]:
            thread.join(None if end_s is None else max(0.0, end_s - time.monotonic()))
        while self.record().state() in (State.New, State.Pending):
            if end_s is not None and time.monotonic() > end_s:
                raise PilotError(f"{self.record().url} was not complete within {timeout_s:g} s.")
            self._cancelled.wait(POLL_S)

    def cancel(self) -> None:
        self._cancelled.set()

        def ended(record: DataUnitRecord) -> None:
            record.ended = record.ended or State.Canceled

        self._change(ended)

    def fail(self, reason: str) -> None:
        log.error("%s", reason)

        def failed(record: DataUnitRecord) -> None:
            record.ended, record.reason = State.Failed, reason

        self._change(failed)

    # Its files

    def register(self, urls: Sequence[str]) -> dict[str, File]:
        """Make names of URLs; all of them, or none.  Raises PilotError."""
        if not urls:
            return {}
        sources = [as_url(str(url)) for url in urls]
        below = f"{self.record().url}/"
        client = self._place.client
        entries = told(", ".join(sources), lambda: client.stage_in(sources, below))
        files = {one.name: File(one.url or "", one.size_bytes) for one in entries}
        self._change(lambda record: record.files.update(files))
        return files

    def unregister(self, names: Iterable[str]) -> None:
        """Those that have no room."""
        for name in names:
            self._place.client.remove(f"{self.record().url}/{name}")

        def without(record: DataUnitRecord) -> None:
            for name in names:
                record.files.pop(name, None)

        self._change(without)

    def listed(self) -> dict[str, dict[str, Any]]:
        """See DataUnit.list."""
        record, whole = self.record(), self.complete_at()
        return {
            name: {
                "pilot_data": [self._url_at(pilot, record, name) for pilot in whole],
                "local": file.source or f"{record.url}/{name}",
            }
            for name, file in record.files.items()
        }

    def export(self, target_url: str) -> None:
        """See DataUnit.export."""
        self.wait(None)
        record = self.record()
        if record.state() != State.Running:
            why = f"it is {record.state()}. {record.why()}".strip()
            raise PilotError(f"{record.url} cannot be exported: {why}")
        target = as_url(str(target_url))
        parts = told(target, lambda: parse(target))
        sources = {name: f"{record.url}/{name}" for name in record.files}
        if parts.scheme not in LOCAL_SCHEMES:
            store = Store(target.rstrip("/") if parts.path.strip("/") else target)
            urls = {source: store.url_of(name) for name, source in sources.items()}
            told(target, lambda: upload(self._place.client, urls, self._cancelled))
            return
        try:
            os.makedirs(parts.path, exist_ok=True)
            for name, source in sources.items():
                copy(self._place.local(source), os.path.join(parts.path, name))
        except OSError as exc:
            raise PilotError(
                f"{record.url} cannot be exported to {target_url}: {exc.strerror}"
                f" ({exc.filename}); `stagefs why` tells why a file cannot be read."
            ) from exc

    # Its pilot datas

    def pilots(self) -> list[PilotDataRecord]:
        return [self._place.read(PilotDataRecord, one) for one in self.record().replicas]

    def complete_at(self) -> list[PilotDataRecord]:
        """Those where all of it is."""
        replicas = self.record().replicas
        return [one for one in self.pilots() if replicas[one.id].state == COMPLETE]

    def put(self, pilot_id: str, files: dict[str, File] | None = None) -> None:
        """Begin to bring ``files``, or all, to a pilot data.  Raises PilotError when that cannot
        be: no room, or a pilot data that is only read."""
        with self._place.locked():
            record = self.record()
            pilot = self._place.read(PilotDataRecord, pilot_id)
            wanted = record.files if files is None else files
            moved = refuse_unfit(self._place, pilot, record, wanted)
            record.replicas[pilot.id] = Replica(worker=own_worker())
            if self.id not in pilot.data_units:
                pilot.data_units.append(self.id)
                self._place.write(pilot)
            self._place.write(record)
        self._run(pilot, lambda: self._bring(pilot, wanted, moved))

    def sent(self, pilot: PilotDataRecord, commit: str) -> None:
        """A commit, which the record knows of, sends outputs of a task to the pilot data."""
        client = self._place.client
        self._run(pilot, lambda: wait_for(client, {commit}, self._cancelled))

    def _run(self, pilot: PilotDataRecord, work: Callable[[], None]) -> None:
        """Do the work in a thread and write down how it went."""

        def run() -> None:
            unit = self.record().url
            outcome = Replica(FAILED, f"{unit} is not in {pilot.service_url}: see the traceback.")
            try:
                work()
                outcome = Replica(COMPLETE)
            except (StageFSError, OSError) as exc:
                outcome = Replica(FAILED, f"{unit} is not in {pilot.service_url}: {exc}")
                log.error("%s", outcome.reason)
            finally:
                self._change(lambda record: record.replicas.update({pilot.id: outcome}))

        thread = threading.Thread(target=run, name=f"pilot-data {self.id}")
        self._threads = [*(one for one in self._threads if one.is_alive()), thread]
        thread.start()

    def _bring(
        self, pilot: PilotDataRecord, files: dict[str, File], moved: dict[str, File]
    ) -> None:
        client, store, affinity = self._place.client, pilot.store, pilot.affinity.path
        record = self.record()
        unit = record.url
        targets = {f"{unit}/{name}": store.url_of(self.id, name) for name in moved}
        if targets:
            upload(client, targets, self._cancelled)
        with self._place.locked():
            pilots = self.pilots()
            for name in files:
                path = f"{unit}/{name}"
                here = client.stat(path)
                if here.url is None:
                    continue  # A task's output: all of it is in the mount.
                url = self._url_at(pilot, record, name)
                is_new = all(here.url != self._url_at(one, record, name) for one in pilots)
                if is_new:
                    client.stage_in([url], path, replace=True)
                if affinity or (not is_new and url != here.url):
                    client.replica_add(path, url, affinity=affinity)

    def _url_at(self, pilot: PilotDataRecord, record: DataUnitRecord, name: str) -> str:
        source = record.files[name].source
        return source if pilot.store.has(source) else pilot.store.url_of(self.id, name)

    def forget(self, pilot: PilotDataRecord) -> None:
        """See PilotData.remove_du."""
        client = self._place.client
        with self._place.locked():
            record = self.record()
            if pilot.id not in record.replicas:
                return
            left = [one for one in self.complete_at() if one.id != pilot.id]
            if not left:
                raise PilotError(
                    f"{record.url} is complete nowhere but in {pilot.service_url}: add it to"
                    " another pilot data first."
                )
            for name in record.files:
                path, url = f"{record.url}/{name}", self._url_at(pilot, record, name)
                here = client.stat(path)
                if here.url == url:
                    self._lead_to(left, record, name)
                elif here.url is not None:
                    client.replica_remove(path, url)
            del record.replicas[pilot.id]
            self._place.write(record)

            def without(there: PilotDataRecord) -> None:
                there.data_units = [one for one in there.data_units if one != self.id]

            self._place.change(PilotDataRecord, pilot.id, without)

    def _lead_to(self, pilots: list[PilotDataRecord], record: DataUnitRecord, name: str) -> None:
        """The name leads to the first of these, and the others are its replicas."""
        path, client = f"{record.url}/{name}", self._place.client
        client.stage_in([self._url_at(pilots[0], record, name)], path, replace=True)
        for one in pilots:
            client.replica_add(path, self._url_at(one, record, name), affinity=one.affinity.path)


def refuse_unfit(
    place: Place, pilot: PilotDataRecord, unit: DataUnitRecord, files: dict[str, File]
) -> dict[str, File]:
    """Which of ``files`` must be moved to lie in the pilot data.  Raises PilotError when it cannot
    take the unit."""
    if pilot.state != State.Running:
        raise PilotError(f"{pilot.service_url} is {pilot.state} and takes no data unit.")
    store = pilot.store
    moved = {name: file for name, file in files.items() if not store.has(file.source)}
    if moved and not store.is_writable:
        name, file = next(iter(moved.items()))
        raise PilotError(
            f"{file.source or name} cannot be put into {pilot.service_url}, which is only read:"
            " name files that are below it."
        )
    if pilot.size_bytes is not None:
        others = (place.read(DataUnitRecord, one) for one in pilot.data_units if one != unit.id)
        left = max(0, pilot.size_bytes - sum(one.size_bytes for one in others))
        if unit.size_bytes > left:
            raise PilotError(
                f"{unit.url} has no room in {pilot.service_url}: it has {unit.size_bytes} bytes,"
                f" and {left} of its {pilot.size_bytes} (size {pilot.description['size']} MB)"
                " are left."
            )
    return moved


def copy(source: str, target: str) -> None:
    """A file, whole or not at all.  Raises OSError."""
    temporary = f"{target}.stagefs-{os.getpid()}-{threading.get_ident()}"
    try:
        shutil.copyfile(source, temporary)
        shutil.copymode(source, temporary)
        os.replace(temporary, target)
    except OSError:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise


def known(url: str, look: Callable[[], _T]) -> _T:
    """What is kept of a URL.  Raises PilotError when nothing is."""
    try:
        return look()
    except NotFound as exc:
        raise PilotError(f"{url} cannot be found again: {exc}") from exc


def told(url: str, ask: Callable[[], _T]) -> _T:
    """What is asked of the mount or a remote.  Raises PilotError, which names the URL."""
    try:
        return ask()
    except PilotError:
        raise
    except StageFSError as exc:
        said = str(exc)
        raise PilotError(said if url in said else f"{url}: {said}") from exc
