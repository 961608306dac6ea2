"""Service URLs, affinity and descriptions of Pilot-Data, as BigJob's pages have them."""

import pytest

from stagefs.integrations.pilot_data import ComputeUnitDescription, PilotError, State
from stagefs.integrations.pilot_data.records import (
    COMPLETE,
    FAILED,
    PENDING,
    DataUnitRecord,
    Replica,
    id_of,
)
from stagefs.integrations.pilot_data.stores import SECRETS, Store, store_of
from stagefs.integrations.pilot_data.values import Affinity
from stagefs.remote.access import Access
from stagefs.staging.workers import Worker

VARIABLES = {"OSG_DATA": "/data/osg"}
DU = "du-54aaba6c-32ec-11e1-a4e5-00264a13ca4c"


@pytest.mark.parametrize(
    ("service_url", "base"),
    [
        ("ssh://localhost/tmp/pilot-data/", "ssh://localhost/tmp/pilot-data"),
        ("ssh://ada@host:2222/a%20b", "ssh://ada@host:2222/a%20b"),
        ("ssh://localhost", "ssh://localhost/~"),
        ("s3://bucket", "s3://bucket/"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("file:///tmp/pd/", "file:///tmp/pd"),
        ("file:/tmp/pd", "file:///tmp/pd"),
        ("file://localhost/tmp/pd", "file:///tmp/pd"),
        ("http://host", "http://host/"),
        ("https://host/data/", "https://host/data"),
        ("walrus://10.0.0.1/bucket", "s3://bucket/"),
        ("walrus://10.0.0.1:8773/services/Walrus/bucket/x", "s3://bucket/x"),
        ("irods://gw68/zone/home/?vo=osg&resource-group=group", "irods://gw68/zone/home"),
        ("irods://gw68/${OSG_DATA}/osg/irods/ada/?vo=osg", "file:///data/osg/osg/irods/ada"),
    ],
)
def test_where_a_service_url_leads(service_url: str, base: str) -> None:
    store = store_of({"service_url": service_url}, VARIABLES)
    assert store.base == base
    assert store.url_of(DU, "x y").startswith(base.rstrip("/") + f"/{DU}/x")
    assert store.has(store.url_of(DU, "x"))
    assert not store.has(f"{base.rstrip('/')}-other/x")


@pytest.mark.parametrize(
    ("description", "access"),
    [
        ({"service_url": "ssh://h/x", "userkey": "/k"}, Access(key_file="/k")),
        (
            {
                "service_url": "s3://b",
                "access_key_id": "K",
                "secret_access_key": "S",
                "region": "eu",
            },
            Access(access_key_id="K", secret_access_key="S", region="eu"),
        ),
        (
            {"service_url": "walrus://h:7480/b", "access_key_id": "K", "secret_access_key": "S"},
            Access(access_key_id="K", secret_access_key="S", endpoint="http://h:7480"),
        ),
        (
            {"service_url": "walrus://h/b"},
            Access(endpoint="http://h:8773/services/Walrus"),
        ),
        (
            {"service_url": "irods://h/z/?vo=osg&resource-group=osgGridFtpGroup"},
            Access(resource="osgGridFtpGroup", application="stagefs vo=osg"),
        ),
        ({"service_url": "file:///x", "userkey": "/k"}, Access()),
    ],
)
def test_what_reaches_it(description: dict[str, str], access: Access) -> None:
    assert store_of(description, {}).access == access


@pytest.mark.parametrize("scheme", ["go", "gsissh", "staging", "", "no scheme"])
def test_unknown_schemes(scheme: str) -> None:
    with pytest.raises(PilotError) as refused:
        store_of({"service_url": f"{scheme}://host/x"}, {})
    assert str(refused.value) == refused.value.value == "No File Plugin found."


@pytest.mark.parametrize(
    ("service_url", "reason"),
    [
        ("ssh://ada:S3cr3t@h/x", "has a password in it"),
        ("https://h/x?token=S3cr3t", "a pilot data is a directory"),
        ("walrus://h:7480", "names no bucket"),
        ("irods://h/${UNSET}/x", "is not set here"),
        ("s3:///x", "is no place for a pilot data"),
    ],
)
def test_places_that_are_none(service_url: str, reason: str) -> None:
    with pytest.raises(PilotError, match=reason) as refused:
        store_of({"service_url": service_url}, {})
    assert "S3cr3t" not in str(refused.value)


def test_what_is_only_read() -> None:
    writable = {"ssh://h/x", "s3://b/x", "gs://b/x", "file:///x"}
    for base in (*writable, "http://h/x", "https://h/x", "irods://h/x"):
        assert Store(base).is_writable == (base in writable)
    assert {"userkey", "access_key_id", "secret_access_key"} == SECRETS


def test_affinity_is_a_path() -> None:
    def at(datacenter: str, machine: str = "") -> Affinity:
        return Affinity.of(
            {"affinity_datacenter_label": datacenter, "affinity_machine_label": machine}
        )

    here = at("eu-de-south", "mymachine-1")
    assert here.path == "eu-de-south/mymachine-1"
    assert here.closeness(at("eu-de-south", "mymachine-1")) == 2
    assert here.closeness(at("eu-de-south", "mymachine-2")) == 1
    assert here.closeness(at("us-east", "mymachine-1")) == 0, "a machine of another data centre"
    assert at("").closeness(at("")) == 0, "nothing was said of either"
    assert at("", "m").closeness(at("", "m")) == 1
    assert at("eu").path == "eu"


def test_descriptions_are_dictionaries_with_attributes() -> None:
    described = ComputeUnitDescription()
    described.executable = "/bin/date"
    assert described == {"executable": "/bin/date"}
    assert described.executable == "/bin/date"
    with pytest.raises(AttributeError):
        _ = described.arguments


@pytest.mark.parametrize(
    ("url", "prefix", "identity"),
    [
        (f"staging:///pilot-data/{DU}", "du", DU),
        (f"redis://localhost/bigdata:{DU}", "du", DU),
        ("pilot-data:///bj-1/sj-2", "sj", "sj-2"),
        (DU, "du", DU),
    ],
)
def test_urls_are_found_again(url: str, prefix: str, identity: str) -> None:
    assert id_of(url, prefix) == identity


def test_urls_of_other_things() -> None:
    for url in ("staging:///pilot-data/", "staging:///x/../../etc", ""):
        with pytest.raises(PilotError, match="is no URL of a du-"):
            id_of(url, "du")


def test_a_data_unit_runs_when_one_replica_is_complete() -> None:
    ended = Worker(pid=1, start_ticks=0, boot_id="another", pid_namespace="x")
    unit = DataUnitRecord(DU, {})
    assert unit.state() == State.Running, "each of its URLs answered"
    unit.replicas = {"pd-1": Replica(PENDING), "pd-2": Replica(FAILED, "no room")}
    assert unit.state() == State.Pending
    unit.replicas["pd-2"] = Replica(COMPLETE)
    assert unit.state() == State.Running
    unit.replicas = {"pd-1": Replica(PENDING, worker=ended), "pd-2": Replica(FAILED, "no room")}
    assert unit.state() == State.Failed
    assert unit.why() == "the program that brought it there ended before it was whole; no room"
    unit.ended = State.Canceled
    assert unit.state() == State.Canceled
