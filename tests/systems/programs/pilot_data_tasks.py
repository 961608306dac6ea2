"""One Pilot-Data program; what it found goes to answer.json.

python pilot_data_tasks.py CASE ARGUMENT...

Descriptions are BigJob's, as its wiki and its examples have them.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from stagefs.config import environment
from stagefs.integrations.pilot_data import (
    ComputeDataService,
    ComputeUnit,
    DataUnit,
    PilotCompute,
    PilotComputeService,
    PilotData,
    PilotDataService,
    PilotError,
    State,
)

COORDINATION_URL = "redis://localhost:6379"
HERE = {"affinity_datacenter_label": "eu-de-south", "affinity_machine_label": "mymachine-1"}
THERE = {"affinity_datacenter_label": "us-east", "affinity_machine_label": "mymachine-2"}


class Flow:
    """The services, and one compute pilot unless ``pilots`` says which."""

    def __init__(self, pilots: list[dict[str, Any]] | None = None, places: int = 2) -> None:
        self.computes = PilotComputeService(coordination_url=COORDINATION_URL)
        self.datas = PilotDataService(coordination_url=COORDINATION_URL)
        self.service = ComputeDataService()
        self.service.add_pilot_compute_service(self.computes)
        self.service.add_pilot_data_service(self.datas)
        self.pilots = [
            self.computes.create_pilot(
                {"service_url": "fork://localhost", "number_of_processes": places, **labels}
            )
            for labels in pilots or [HERE]
        ]

    def run(self, executable: str, *arguments: str, **more: object) -> ComputeUnit:
        description = {"executable": executable, "arguments": list(arguments), **more}
        return self.service.submit_compute_unit(description)

    def end(self) -> None:
        self.service.cancel()
        self.datas.cancel()
        self.computes.cancel()


def told(unit: ComputeUnit | DataUnit) -> dict[str, Any]:
    return {"state": unit.get_state(), "reason": unit.reason, "url": unit.get_url()}


def wait_for_line() -> None:
    """While the test does something."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()


def refused(work: Callable[[], object]) -> str:
    try:
        work()
    except PilotError as error:
        return str(error)
    return ""


def wiki(service_url: str, userkey: str) -> dict[str, Any]:
    """The example of the wiki page, but for the import and the address of the server."""
    pilot_compute_service = PilotComputeService(coordination_url=COORDINATION_URL)
    pilot_compute_description = {
        "service_url": "fork://localhost",
        "number_of_processes": 1,
        "working_directory": os.getcwd() + "/work/",
        "affinity_datacenter_label": "eu-de-south",
        "affinity_machine_label": "mymachine-1",
    }
    pilot_compute_service.create_pilot(pilot_compute_description=pilot_compute_description)
    pilot_data_service = PilotDataService(coordination_url=COORDINATION_URL)
    pilot_data_description = {
        "service_url": service_url,
        "size": 100,
        "affinity_datacenter_label": "eu-de-south",
        "affinity_machine_label": "mymachine-1",
        "userkey": userkey,
    }
    pilot_data_service.create_pilot(pilot_data_description=pilot_data_description)
    compute_data_service = ComputeDataService()
    compute_data_service.add_pilot_compute_service(pilot_compute_service)
    compute_data_service.add_pilot_data_service(pilot_data_service)
    data_unit_description = {
        "file_urls": [os.path.join(os.getcwd(), "test.txt")],
        "affinity_datacenter_label": "eu-de-south",
        "affinity_machine_label": "mymachine-1",
    }
    data_unit = compute_data_service.submit_data_unit(data_unit_description)
    compute_unit_description = {
        "executable": "/bin/cat",
        "arguments": ["test.txt"],
        "number_of_processes": 1,
        "output": "stdout.txt",
        "error": "stderr.txt",
        "input_data": [data_unit.get_url()],
        "output_data": [{data_unit.get_url(): ["std*"]}],
        "affinity_datacenter_label": "eu-de-south",
        "affinity_machine_label": "mymachine-1",
    }
    compute_unit = compute_data_service.submit_compute_unit(compute_unit_description)
    compute_data_service.wait()
    data_unit.export(os.path.join(os.getcwd(), "output"))
    compute_data_service.cancel()
    pilot_data_service.cancel()
    pilot_compute_service.cancel()
    return {
        "unit": told(compute_unit),
        "data": told(data_unit),
        "directory": compute_unit.get_local_working_directory(),
        "files": data_unit.list(),
    }


def shared(url: str, unread: str) -> dict[str, Any]:
    """Units that read one cold object, through a description without a pilot data."""
    flow = Flow(places=4)
    data = flow.service.submit_data_unit({"file_urls": [url, unread]})
    name = url.rpartition("/")[2]
    out = flow.service.submit_data_unit({"file_urls": []})
    units = [
        flow.run(
            "sha256sum",
            name,
            output=f"digest.{number}",
            input_data=[data.get_url()],
            output_data=[{out.get_url(): ["digest.?"]}],
        )
        for number in range(4)
    ]
    flow.service.wait()
    flow.end()
    return {"units": [told(unit) for unit in units], "data": told(data), "out": told(out)}


def bucket(service_url: str, wrong_url: str) -> dict[str, Any]:
    """A pilot data in a bucket, whose keys are known to nobody else."""
    key, secret = environment()["PD_KEY"], environment()["PD_SECRET"]
    flow = Flow()
    keys = {"access_key_id": key, "secret_access_key": secret, "region": "default"}
    pilot = flow.datas.create_pilot({"service_url": service_url, **keys})
    data = pilot.submit_data_unit({"file_urls": [os.path.abspath("test.txt")]})
    data.wait(60)
    unit = flow.run(
        "/bin/cat",
        "test.txt",
        input_data=[data.get_url()],
        output_data=[{data.get_url(): ["std*"]}],
    )
    flow.service.wait()
    wrong = flow.datas.create_pilot(
        {"service_url": wrong_url, **keys, "secret_access_key": f"{secret}-wrong"}
    )
    lost = refused(lambda: wrong.put_du(data))
    flow.end()
    return {"unit": told(unit), "data": told(data), "files": data.list(), "wrong": lost}


def replicated(first_url: str, second_url: str) -> dict[str, Any]:
    """A unit at two pilot datas; says so and waits for a line, meanwhile one may be lost."""
    flow = Flow()
    first = flow.datas.create_pilot({"service_url": first_url, **HERE})
    second = flow.datas.create_pilot({"service_url": second_url, **THERE})
    data = first.submit_data_unit({"file_urls": [os.path.abspath("test.txt")]})
    data.wait(60)
    os.unlink("test.txt")
    second.submit_data_unit(data_unit=data)
    data.wait(60)
    files = data.list()
    wait_for_line()
    unit = flow.run("sha256sum", "test.txt", input_data=[data.get_url()])
    flow.service.wait()
    with open(f"{unit.get_local_working_directory()}/stdout") as file:
        digest = file.read().split()[0]
    flow.end()
    return {"unit": told(unit), "data": told(data), "files": files, "digest": digest}


def placed(directory: str) -> dict[str, Any]:
    """Which pilot units go to, by affinity and by data."""
    flow = Flow([HERE, THERE])
    here, there = (pilot.get_url() for pilot in flow.pilots)
    for labels in (HERE, THERE):
        name = labels["affinity_machine_label"]
        flow.datas.create_pilot({"service_url": f"file://{directory}/{name}", **labels})
    data = [
        flow.service.submit_data_unit({"file_urls": [os.path.abspath("test.txt")], **labels})
        for labels in (THERE, HERE)
    ]
    flow.service.wait()
    at_there, at_here = (unit.get_url() for unit in data)
    nearby = {**THERE, "affinity_machine_label": "another"}
    asked: dict[str, dict[str, Any]] = {
        "here": HERE,
        "there": THERE,
        "nearby": nearby,
        "against the data": {**HERE, "input_data": [at_there]},
        "free, data there": {"input_data": [at_there]},
        "free, data here": {"input_data": [at_here]},
        "nowhere": {"affinity_datacenter_label": "mars"},
    }
    units = {name: flow.run("true", **more) for name, more in asked.items()}
    flow.service.wait()
    names = {here: "here", there: "there"}
    went = {name: names[unit.get_url().rpartition("/")[0]] for name, unit in units.items()}
    states = {unit.get_state() for unit in units.values()}
    places = [[pilot.service_url for pilot in unit.get_pilot_data()] for unit in data]
    both = flow.service.submit_data_unit(
        {"file_urls": [os.path.abspath("test.txt")], "number_of_replicas": 2}
    )
    both.wait(60)
    count = len(both.list()["test.txt"]["pilot_data"])
    flow.end()
    return {"went": went, "states": sorted(states), "places": places, "replicas": count}


def missing(url: str) -> dict[str, Any]:
    """Inputs that are not there."""
    flow = Flow()
    absent = flow.service.submit_data_unit({"file_urls": [url]})
    pilot = flow.datas.create_pilot({"service_url": f"file://{os.getcwd()}/pd"})
    local = pilot.submit_data_unit({"file_urls": ["/absent/file"]})
    gone = flow.service.submit_data_unit({"file_urls": [os.path.abspath("test.txt")]})
    gone.wait(60)
    name = gone.get_url().removeprefix("staging:///")
    os.unlink(f"{environment()['STAGEFS_MOUNT']}/staging/{name}/test.txt")
    unknown = "staging:///pilot-data/du-nobody-knows"
    mark = os.path.abspath("it-ran")
    units = {
        what: flow.run("touch", mark, input_data=[input_url])
        for what, input_url in {
            "absent": absent.get_url(),
            "local": local.get_url(),
            "gone": gone.get_url(),
            "unknown": unknown,
        }.items()
    }
    units["output"] = flow.run("touch", mark, output_data=[{unknown: ["*"]}])
    flow.service.wait()
    flow.end()
    return {
        "units": {what: told(unit) for what, unit in units.items()},
        "absent": told(absent),
        "local": told(local),
        "ran": os.path.exists(mark),
        "export": refused(lambda: absent.export("output")),
    }


def refusals(http_url: str) -> dict[str, Any]:
    """What cannot be, each with its sentence."""
    flow = Flow()
    here = f"file://{os.getcwd()}/pd"
    small = flow.datas.create_pilot({"service_url": here, "size": "0.001"})
    big = os.path.abspath("big.txt")
    description = {"file_urls": [big]}
    text = os.path.abspath("test.txt")
    flow.datas.create_pilot({"service_url": "walrus://127.0.0.1:9/one-name"})
    found = {
        "bucket": refused(lambda: flow.datas.create_pilot({"service_url": "s3://one-name/x"})),
        "same": refused(
            lambda: flow.datas.create_pilot({"service_url": "walrus://127.0.0.1:9/one-name/x"})
        ),
        "scheme": refused(lambda: flow.datas.create_pilot({"service_url": "go://host/x"})),
        "nothing": refused(lambda: flow.datas.create_pilot({})),
        "compute": refused(lambda: flow.computes.create_pilot({"service_url": "pbs://host"})),
        "quota": refused(lambda: small.submit_data_unit(description)),
        "unset": refused(
            lambda: flow.datas.create_pilot({"service_url": "irods://host/${PD_UNSET}/x"})
        ),
        "reading": refused(
            lambda: flow.datas.create_pilot({"service_url": http_url}).submit_data_unit(
                {"file_urls": [text]}
            )
        ),
        "unknown": refused(lambda: DataUnit(du_url="staging:///pilot-data/du-nobody-knows")),
    }
    large = flow.run("true", number_of_processes=3)
    fits = small.submit_data_unit({"file_urls": [text]})
    fits.wait(60)
    flow.service.remove_pilot_data_service(flow.datas)
    full = PilotDataService()
    full.create_pilot({"service_url": here, "size": "0.001"})
    flow.service.add_pilot_data_service(full)
    waits = flow.service.submit_data_unit(description)
    out = ["-c", "head -c 2000 /dev/zero > large; echo small > ok"]
    unit = flow.run("sh", *out, output_data={fits.get_url(): ["ok", "large"]})
    flow.service.wait()
    kept = sorted(os.listdir(unit.get_local_working_directory()))
    # A quota that is left again takes units.
    again = PilotData(pd_url=small.get_url()).submit_data_unit({"file_urls": [text]})
    again.wait(60)
    flow.end()
    return {
        **found,
        "processes": told(large),
        "full": told(waits),
        "output": told(unit),
        "kept": kept,
        "files": sorted(fits.list()),
        "again": told(again),
    }


def local_irods() -> dict[str, Any]:
    """An irods URL whose collections are mounted here."""
    flow = Flow()
    pilot = flow.datas.create_pilot(
        {"service_url": "irods://gw68/${OSG_DATA}/osg/?vo=osg&resource-group=group"}
    )
    data = pilot.submit_data_unit({"file_urls": [os.path.abspath("test.txt")]})
    data.wait(60)
    flow.end()
    return {"data": told(data), "files": data.list()}


def moved(here_url: str, there_url: str) -> dict[str, Any]:
    """Units that run where their data is not: read from there, or brought near when asked."""
    flow = Flow([THERE])
    here = flow.datas.create_pilot({"service_url": here_url, **HERE})
    there = flow.datas.create_pilot({"service_url": there_url, **THERE})
    lazy = here.submit_data_unit({"file_urls": [f"{here_url}/lazy.txt"]})
    asked = here.submit_data_unit({"file_urls": [f"{here_url}/asked.txt"]})
    lazy.wait(60)
    asked.wait(60)
    units = [
        flow.run("sha256sum", "lazy.txt", input_data=[lazy.get_url()]),
        flow.run("sha256sum", "asked.txt", input_data=[asked.get_url()], replicate_input=True),
    ]
    flow.service.wait()
    digests = []
    for unit in units:
        with open(f"{unit.get_local_working_directory()}/stdout") as file:
            digests.append(file.read().split()[0])
    at = [next(iter(one.list().values()))["pilot_data"] for one in (lazy, asked)]
    units_there = there.list_data_units()
    there.remove_du(asked)
    after = next(iter(asked.list().values()))["pilot_data"]
    nowhere = refused(lambda: here.remove_du(asked))
    flow.end()
    return {
        "units": [told(unit) for unit in units],
        "digests": digests,
        "at": at,
        "there": units_there == [asked.get_url()],
        "after": after,
        "nowhere": nowhere,
    }


def working(outside: str) -> dict[str, Any]:
    """Directories, variables, streams, failures and cancelling."""
    flow = Flow()
    mount = environment()["STAGEFS_MOUNT"]
    text = os.path.abspath("test.txt")
    data = flow.service.submit_data_unit({"file_urls": [text]})
    out = flow.service.submit_data_unit({"file_urls": []})
    into = {"input_data": [data.get_url()], "output_data": [{out.get_url(): ["made*"]}]}
    os.mkdir(f"{mount}/there")
    words = flow.run(
        "/bin/echo",
        *("Hello", "$ENV1", "${ENV2}", "", "$HOME"),
        environment=["ENV1=env arg1", "ENV2=2"],
        output="echoed",
    )
    units = {
        name: flow.run("sh", "-c", f"cat test.txt > made.{name}", working_directory=place, **into)
        for name, place in {
            "relative": "below/it",
            "inside": f"{mount}/there",
            "new": f"{outside}/new",
            "outside": outside,
        }.items()
    }
    streams = flow.run("cat", input="test.txt", output="both", error="both", **into)
    failing = flow.run("sh", "-c", "echo half > made.half; exit 3", **into)
    nothing = flow.run("true", output_data=[{out.get_url(): ["absent.txt"]}])
    absent = flow.run("/absent/program")
    flow.service.wait()
    twice = flow.run("sh", "-c", "echo again > made.new", **into)
    inputs = flow.run(
        "sh",
        "-c",
        "echo changed >> test.txt; touch made.empty .made; rm stdout stderr",
        input_data=[data.get_url()],
        output_data=[{out.get_url(): ["*"]}],
    )
    sleeping = flow.run("sh", "-c", "sleep 600 & wait")
    queued = [flow.run("sleep", "600") for _ in range(2)]
    twice.wait()
    inputs.wait()
    wait_for_line()
    flow.end()
    with open(f"{words.get_local_working_directory()}/echoed") as file:
        echoed = file.read()
    return {
        "echoed": echoed,
        "units": {name: told(unit) for name, unit in units.items()},
        "streams": told(streams),
        "failing": told(failing),
        "nothing": told(nothing),
        "absent": told(absent),
        "twice": told(twice),
        "inputs": told(inputs),
        "cancelled": [one.get_state() for one in [sleeping, *queued]],
        "made": sorted(out.list()),
        "left": sorted(os.listdir(outside)),
        "there": sorted(os.listdir(f"{mount}/there")),
    }


def begin(service_url: str) -> dict[str, Any]:
    """What another program shall find again."""
    flow = Flow()
    pilot = flow.datas.create_pilot({"service_url": service_url, "size": 1, **HERE})
    data = pilot.submit_data_unit({"file_urls": [os.path.abspath("test.txt")], **HERE})
    unit = flow.run("true")
    flow.service.wait()
    data.wait(60)
    return {
        "data": data.get_url(),
        "pilot": pilot.get_url(),
        "service": flow.datas.get_url(),
        "compute": flow.pilots[0].get_url(),
        "unit": unit.get_url(),
        "directory": unit.get_local_working_directory(),
    }


def find_again(urls: str) -> dict[str, Any]:
    known = json.loads(urls)
    data = DataUnit(du_url=known["data"])
    pilot = PilotData(pd_url=known["pilot"])
    compute = PilotCompute(pilot_url=known["compute"])
    service = PilotDataService(pds_url=known["service"])
    other = service.create_pilot({"service_url": f"file://{os.getcwd()}/other", **THERE})
    data.add_pilot_data(other)
    data.wait(60)
    data.export("output")
    unit = ComputeUnit(cu_url=known["unit"])
    got = pilot.get_du(known["data"])
    return {
        "data": told(data),
        "same": got is not None and got.get_url() == data.get_url(),
        "labels": list(pilot.affinity),
        "pilots": [one.service_url for one in service.list_pilots()],
        "at": data.list()["test.txt"]["pilot_data"],
        "unit": told(unit),
        "compute": compute.get_state(),
        "units": [one.get_url() for one in compute.list_compute_units()],
        "states": [State.New, State.Unknown],
    }


def kept(directory: str) -> dict[str, Any]:
    """Adding, copying, exporting and cancelling, and units that wait for their affinity."""
    flow = Flow()
    first, second = (
        flow.datas.create_pilot({"service_url": f"file://{directory}/{name}"})
        for name in ("first", "second")
    )
    data = first.submit_data_unit({"file_urls": [os.path.abspath("test.txt")]})
    data.wait(60)
    os.unlink("test.txt")
    first.copy_du(data, second)
    data.add_files([os.path.abspath("more.txt")])
    data.wait(60)
    first.export_du(data, "exported")
    first.export_du(data, f"file://{directory}/url")
    absent = refused(lambda: data.add_files(["/absent/file"]))
    elsewhere = refused(lambda: second.copy_du(DataUnit(), first))
    data.cancel()
    cancelled = flow.run("true", input_data=[data.get_url()])
    away = flow.datas.create_pilot({"service_url": "ssh://127.0.0.1:9/nobody"})
    stuck = away.submit_data_unit({"file_urls": [os.path.abspath("more.txt")]})
    for_ever = flow.pilots[0].submit_compute_unit(
        {"executable": "true", "input_data": [stuck.get_url()]}
    )
    hard = ComputeDataService(hard_affinity=True)
    hard.add_pilot_compute_service(flow.computes)
    suits = hard.submit_compute_unit({"executable": "true", **HERE})
    waits = hard.submit_compute_unit({"executable": "true", **THERE})
    suits.wait(60)
    flow.service.wait()
    not_yet = waits.get_state()
    hard.cancel()
    pending = stuck.get_state()
    flow.end()
    stuck.cancel()
    stuck.wait(60)
    return {
        "stuck": [pending, for_ever.get_state(), stuck.get_state()],
        "files": {name: len(one["pilot_data"]) for name, one in data.list().items()},
        "absent": absent,
        "elsewhere": elsewhere,
        "data": told(data),
        "cancelled": told(cancelled),
        "suits": told(suits),
        "not_yet": not_yet,
        "waits": told(waits),
        "ended": refused(lambda: first.submit_data_unit({"file_urls": []})),
        "late": refused(lambda: hard.submit_compute_unit({"executable": "true"})),
    }


if __name__ == "__main__":
    answer = globals()[sys.argv[1]](*sys.argv[2:])
    with open("answer.json", "w") as file:
        json.dump(answer, file)
