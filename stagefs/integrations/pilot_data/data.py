"""The data side of the Pilot-API: PilotDataService, PilotData, DataUnit.

A data unit is a directory of the namespace, ``staging:///pilot-data/du-...``, whose files are
there as soon as their URLs are known.  A pilot data is a place below a service URL; a unit that is
put there has its files below ``<service_url>/du-.../``, and they are replicas of those in the
namespace, with the pilot data's affinity (``contents``).

Objects only lead to what the mount keeps (``records``), so that several may stand for one unit.
Thread-safe.
"""

import os
from collections.abc import Sequence
from typing import Any

from stagefs.config import environment
from stagefs.errors import StageFSError
from stagefs.integrations.pilot_data.contents import Contents, known, told
from stagefs.integrations.pilot_data.records import (
    COMPLETE,
    OTHER_URLS,
    DataUnitRecord,
    Mount,
    PilotDataRecord,
    ServiceRecord,
    id_of,
    new_id,
    place_for,
)
from stagefs.integrations.pilot_data.stores import SECRETS, Store, store_of
from stagefs.integrations.pilot_data.values import (
    FINAL,
    MEGABYTE,
    Affinity,
    PilotError,
    State,
    Words,
    checked,
)
from stagefs.remote.access import Access
from stagefs.remote.url import parse, shown


class PilotDataService:
    """Makes pilot datas.  ``coordination_url`` is BigJob's: the mount does what its server did.
    ``mount``: the mountpoint, else STAGEFS_MOUNT, else the only one.  ``pds_url`` finds the pilot
    datas of another one again.  Raises PilotError."""

    def __init__(
        self,
        coordination_url: str | None = None,
        pds_url: str | None = None,
        *,
        mount: Mount = None,
    ) -> None:
        del coordination_url
        self._place = place_for(mount)
        self.id = new_id("pds") if pds_url is None else id_of(pds_url, "pds")
        self.url = OTHER_URLS + self.id
        if pds_url is None:
            self._place.write(ServiceRecord(self.id))
        else:
            known(pds_url, lambda: self._place.read(ServiceRecord, self.id))

    def create_pilot(self, pilot_data_description: Words) -> "PilotData":
        """Raises PilotError."""
        made = PilotData(self, pilot_data_description, mount=self._place)
        self._place.change(ServiceRecord, self.id, lambda one: one.pilots.append(made.id))
        return made

    def get_pilot(self, pd_id: str) -> "PilotData | None":
        return next((one for one in self.list_pilots() if pd_id in (one.id, one.url)), None)

    def list_pilots(self) -> "list[PilotData]":
        ids = self._place.read(ServiceRecord, self.id).pilots
        return [PilotData(pd_url=one, mount=self._place) for one in ids]

    def wait(self, timeout: float | None = None) -> None:
        """Until all data units of all its pilots are complete or have failed."""
        for pilot in self.list_pilots():
            pilot.wait(timeout)

    def cancel(self) -> None:
        """Its pilot datas take no further units.  What is there stays."""
        for pilot in self.list_pilots():
            pilot.cancel()

    def get_url(self) -> str:
        return self.url


class PilotData:
    """A place for data units.  ``pd_url`` finds one again.  Raises PilotError."""

    def __init__(
        self,
        pilot_data_service: PilotDataService | None = None,
        pilot_data_description: Words | None = None,
        pd_url: str | None = None,
        *,
        mount: Mount = None,
    ) -> None:
        self.pilot_data_service = pilot_data_service
        self._place = place_for(mount)
        if pd_url is None:
            record = self._made(checked(pilot_data_description, "service_url", "pilot data"))
        else:
            identity = id_of(pd_url, "pd")
            record = known(pd_url, lambda: self._place.read(PilotDataRecord, identity))
        self.id = record.id
        self.url = OTHER_URLS + record.id
        self.pilot_data_description = record.description
        self.service_url = record.service_url
        self.size = record.description.get("size")
        self.affinity = record.affinity

    def _made(self, description: Words) -> PilotDataRecord:
        store = store_of(description, environment())
        size = description.get("size")
        try:
            size_bytes = None if size is None else int(float(size) * MEGABYTE)
        except (TypeError, ValueError):
            raise PilotError(f"size is {size!r}: write it in megabytes.") from None
        self._refuse_other_service(store, str(description["service_url"]))
        if store.access != Access():
            told(store.base, lambda: self._place.client.remote_access(store.base, store.access))
        kept = {key: value for key, value in description.items() if key not in SECRETS}
        record = PilotDataRecord(new_id("pd"), kept, store.base, size_bytes)
        self._place.write(record)
        return record

    def _refuse_other_service(self, store: Store, service_url: str) -> None:
        """A bucket's name leads to one endpoint in a mount.  Raises PilotError."""
        host = parse(store.base).host_url
        if not host.startswith("s3:"):
            return
        for other in self._place.pilot_datas():
            is_used = other.state == State.Running or bool(other.data_units)
            if not is_used or parse(other.base).host_url != host:
                continue
            if store_of(other.description, environment()).access.endpoint != store.access.endpoint:
                raise PilotError(
                    f"{shown(service_url)} and {shown(other.service_url)} are buckets of one name"
                    " at two services, which one mount does not tell apart: use a mount for each."
                )

    def __repr__(self) -> str:
        return self.service_url

    def get_url(self) -> str:
        return self.url

    def get_state(self) -> str:
        return self.record().state

    def cancel(self) -> None:
        """Take no further units.  What is there stays."""

        def ended(record: PilotDataRecord) -> None:
            record.state = State.Canceled

        self._place.change(PilotDataRecord, self.id, ended)

    def wait(self, timeout: float | None = None) -> None:
        """Until each of its units is complete somewhere, or has failed.  Raises PilotError after
        ``timeout`` seconds."""
        for url in self.list_data_units():
            DataUnit(du_url=url, mount=self._place).wait(timeout)

    # Its units

    def list_data_units(self) -> list[str]:
        """Their URLs."""
        return [DataUnitRecord(one, {}).url for one in self.record().data_units]

    @property
    def data_unit_urls(self) -> list[str]:
        return self.list_data_units()

    def get_du(self, du_url: str) -> "DataUnit | None":
        if du_url not in self.list_data_units():
            return None
        return DataUnit(du_url=du_url, mount=self._place)

    def url_for_du(self, du: "DataUnit") -> str:
        """Below which its files are, unless they were below the service URL before."""
        return self.record().store.url_of(du.id)

    def submit_data_unit(
        self, data_unit_description: Words | None = None, data_unit: "DataUnit | None" = None
    ) -> "DataUnit":
        """A new unit, or one that is elsewhere too.  One whose files do not exist comes back as
        Failed, with its ``reason``.  Raises PilotError when it has no room here."""
        mount = self._place
        unit = data_unit or DataUnit(data_unit_description=data_unit_description, mount=mount)
        if unit.get_state() not in FINAL:
            try:
                unit.add_pilot_data(self)
            except PilotError as refused:
                if data_unit is None:
                    unit.contents.fail(str(refused))
                raise
        return unit

    def put_du(self, du: "DataUnit") -> None:
        """``du.add_pilot_data``, to the end.  Raises PilotError."""
        du.add_pilot_data(self)
        du.wait()
        replica = du.contents.record().replicas.get(self.id)
        if replica is None or replica.state != COMPLETE:
            reason = "" if replica is None else replica.reason
            raise PilotError(reason or f"{du.url} is not in {self.service_url}.")

    def copy_du(self, du: "DataUnit", pd_new: "PilotData") -> None:
        """Bring a unit to another pilot data, to the end.  Raises PilotError."""
        if du.get_url() not in self.list_data_units():
            raise PilotError(f"{du.url} is not in {self.service_url}: copy it from where it is.")
        pd_new.put_du(du)

    def remove_du(self, du: "DataUnit") -> None:
        """The unit is not read from here any more; its objects stay.  Raises PilotError when it is
        nowhere else."""
        du.contents.forget(self.record())

    def export_du(self, du: "DataUnit", target_url: str) -> None:
        """As ``du.export``."""
        du.export(target_url)

    def record(self) -> PilotDataRecord:
        """As it is kept."""
        return self._place.read(PilotDataRecord, self.id)


class DataUnit:
    """Files that belong together.  ``du_url`` finds one again.  Raises PilotError."""

    def __init__(
        self,
        pilot_data: PilotData | None = None,
        data_unit_description: Words | None = None,
        du_url: str | None = None,
        *,
        mount: Mount = None,
    ) -> None:
        self._place = place = place_for(mount)
        self.id = new_id("du") if du_url is None else id_of(du_url, "du")
        self.url = DataUnitRecord(self.id, {}).url
        self.contents = Contents(place, self.id)
        if du_url is None:
            self._make(dict(data_unit_description or {}))
        else:
            known(du_url, self.contents.record)
        if pilot_data is not None and self.get_state() not in FINAL:
            self.add_pilot_data(pilot_data)

    def _make(self, description: dict[str, Any]) -> None:
        urls = description.get("file_urls") or []
        if isinstance(urls, str) or not isinstance(urls, Sequence):
            raise PilotError(f"file_urls is {urls!r}: write a list of URLs and paths.")
        # As they are registered they lose what is secret in them.
        kept = {key: value for key, value in description.items() if key != "file_urls"}
        self._place.write(DataUnitRecord(self.id, kept))
        os.makedirs(self._place.local(self.url), exist_ok=True)
        try:
            self.contents.register(urls)
        except StageFSError as exc:
            self.contents.fail(str(exc))

    def __repr__(self) -> str:
        return self.url

    def get_url(self) -> str:
        return self.url

    @property
    def data_unit_description(self) -> dict[str, Any]:
        record = self.contents.record()
        urls = [file.source for file in record.files.values() if file.source]
        return {**record.description, "file_urls": urls}

    @property
    def affinity(self) -> Affinity:
        """That was asked for."""
        return Affinity.of(self.contents.record().description)

    def get_state(self) -> str:
        return self.contents.record().state()

    @property
    def reason(self) -> str:
        """Why it failed: a sentence with the URL."""
        return self.contents.record().why()

    def wait(self, timeout: float | None = None) -> None:
        """Until it is complete somewhere or has failed, and until all that this object began is
        over.  Raises PilotError after ``timeout`` seconds."""
        self.contents.wait(timeout)

    def cancel(self) -> None:
        """Give up what is on its way.  What is there stays, and the unit is not used any more."""
        self.contents.cancel()

    def add_files(self, file_url_list: Sequence[str] = ()) -> None:
        """More files, which all its pilot datas get.  Raises PilotError; then nothing is added."""
        files = self.contents.register(file_url_list)
        for pilot in self.contents.pilots():
            try:
                self.contents.put(pilot.id, files)
            except PilotError:
                self.contents.unregister(files)
                raise

    def list(self) -> dict[str, dict[str, Any]]:
        """``{name: {"pilot_data": [URL, ...], "local": where it came from}}``."""
        return self.contents.listed()

    def export(self, target_url: str) -> None:
        """Copy its files into a directory of this machine, or below a URL that can be written.  A
        file that is there is replaced in a directory, and refused at a URL.  Raises PilotError."""
        self.contents.export(target_url)

    def add_pilot_data(self, pilot_data: PilotData) -> None:
        """Bring all files there, in a thread; what lies there already is not moved.  Raises
        PilotError when that cannot be: no room, or a pilot data that is only read."""
        self.contents.put(pilot_data.id)

    def get_pilot_data(self) -> Sequence[PilotData]:
        """Where it is, or is being brought."""
        mount = self._place
        return [PilotData(pd_url=one.id, mount=mount) for one in self.contents.pilots()]

    def list_pilot_data(self) -> Sequence[str]:
        """Their URLs."""
        return [OTHER_URLS + one.id for one in self.contents.pilots()]
