"""Programs of Pilot-Data on a mount, with real servers (B1 to B9, D1, D3)."""

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from stagefs.control.api import SOCKET_NAME
from stagefs.control.client import Client
from tests.support import kernel
from tests.support.identity import CHECKOUT, Identity
from tests.support.mounted import Mounted, sha256
from tests.support.nginx import Nginx
from tests.support.rgw import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from tests.support.served import SharedGateway, SshServed, content
from tests.support.sshd import Sshd, running_sshd
from tests.support.waiting import wait_until
from tests.systems.conftest import PROGRAMS

MakeMount = Callable[..., Mounted]
pytestmark = pytest.mark.timeout(200)

TEXT = b"What pilots say\n"
PROGRAM = PROGRAMS / "pilot_data_tasks.py"
HEX = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


class Host:
    """A host with sshd, whose objects lie in a directory of its own."""

    def __init__(self, top: Path, server: Sshd) -> None:
        self.server = server
        self.served = SshServed(top, server)
        self.url = server.url_of(self.served.objects)


@pytest.fixture
def new_host(served_directory: Path) -> Iterator[Callable[[], Host]]:
    with contextlib.ExitStack() as stack:
        made: list[Host] = []

        def new() -> Host:
            top = served_directory / f"host{len(made)}"
            (top / "sshd").mkdir(parents=True)
            server = stack.enter_context(running_sshd(top / "sshd", counted=True))
            made.append(Host(top, server))
            return made[-1]

        yield new


def ssh_environment(identity: Identity, hosts: Sequence[Host]) -> dict[str, str]:
    """All hosts are 127.0.0.1: the key and the known hosts of each in one configuration."""
    own = Path(hosts[0].served.environment(identity)["STAGEFS_SSH_CONFIG"])
    known = own.parent / "known_hosts"
    keys = [own.parent / "id_client"]
    for host in hosts[1:]:
        other = Path(host.served.environment(identity)["STAGEFS_SSH_CONFIG"]).parent
        known.write_text(known.read_text() + (other / "known_hosts").read_text())
        keys.append(other / "id_client")
    more = "".join(f"Host *\n  IdentityFile {key}\n" for key in keys[1:])
    own.write_text(own.read_text() + more)
    return {"STAGEFS_SSH_CONFIG": str(own)}


class Flow:
    """Programs of one user on one mount, in an empty directory that has test.txt."""

    def __init__(self, mount: Mounted, directory: Path) -> None:
        self.mount = mount
        self.directory = directory
        self.client = Client(mount.state / SOCKET_NAME)
        self.said = ""
        self._children: list[subprocess.Popen[bytes]] = []
        self.put("test.txt", TEXT)

    def put(self, name: str, data: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(data)
        os.chown(path, self.mount.identity.uid, self.mount.identity.gid)
        return path

    def ask(self, case: str, *arguments: str, variables: Sequence[str] = ()) -> Any:
        """What the program found."""
        python = self.mount.identity.bin / "python"
        done = self.mount.run(
            "env", *variables, python, PROGRAM, case, *arguments, directory=self.directory
        )
        self.said = os.fsdecode(done.stderr)
        return self.answer()

    def answer(self) -> Any:
        return json.loads((self.directory / "answer.json").read_text())

    def start(self, case: str, *arguments: str) -> subprocess.Popen[bytes]:
        """The program, which waits for a line."""
        child = self.mount.start(
            "python", PROGRAM, case, *arguments, directory=self.directory, talks=True
        )
        self._children.append(child)
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line == b"ready\n", child.communicate()
        return child

    def go_on(self, child: subprocess.Popen[bytes]) -> Any:
        said, errors = child.communicate(b"\n", timeout=90)
        assert child.returncode == 0, said + errors
        return self.answer()

    def local(self, url: str) -> str:
        return f"MNT/staging/{url.removeprefix('staging:///')}"

    def names(self, url: str) -> list[str]:
        return os.fsdecode(self.mount.run("ls", self.local(url)).stdout).split()

    def status(self, path: str) -> tuple[int, int]:
        """Inode and number of links."""
        found = self.mount.run("stat", "-c", "%i %h", path).stdout.split()
        return int(found[0]), int(found[1])

    def end(self) -> None:
        """Programs of a test that failed; else nothing is left: no sandbox in use, no lease, no
        upload, no program."""
        for child in self._children:
            child.kill()
            child.communicate()
        client = self.client
        states = {str(one.state) for one in client.sandbox_list()}
        assert states <= {"committed", "failed"}, f"sandboxes that nobody ends: {states}"
        assert client.cache_usage().leases == 0
        uploads = {one.state for one in client.queue_list()}
        assert uploads <= {"done", "cancelled"}, f"uploads that nobody ends: {uploads}"
        assert not self.sleeping(), "programs of units are left"

    def sleeping(self) -> int:
        """How many units of the mount sleep now."""
        found = kernel.programs_of(self.mount.point)
        return sum(program.command[:1] == ["sleep"] for program in found)


MakeFlow = Callable[..., Flow]


@pytest.fixture
def new_flow(new_mount: MakeMount, work: Path) -> Iterator[MakeFlow]:
    made: list[Flow] = []

    def new(identity: Identity, **options: Any) -> Flow:
        mount = new_mount(identity, **options)
        made.append(Flow(mount, identity.directory(work / f"run{len(made)}")))
        return made[-1]

    yield new
    for flow in made:
        flow.end()


@pytest.fixture(scope="module")
def mount(session_directory: Path, all_identities: dict[str, Identity]) -> Iterator[Mounted]:
    """One for the tests that have no settings of their own."""
    identity = next(iter(all_identities.values()))
    top = identity.directory(session_directory / "pilot-data")
    made = Mounted(identity, identity.directory(top / "mnt"), top / "state", {}, ())
    try:
        made.mount()
        yield made
    finally:
        made.at_end()


@pytest.fixture
def flow(mount: Mounted, work: Path) -> Iterator[Flow]:
    one = Flow(mount, mount.identity.directory(work / "run"))
    yield one
    one.end()


def gets(nginx: Nginx) -> list[str]:
    return [asked.uri for asked in nginx.asked() if asked.method == "GET"]


def test_wiki_page(
    identity: Identity, new_flow: MakeFlow, new_host: Callable[[], Host], work: Path
) -> None:
    """B1, B2, B6 over ssh, B8's directories; the key comes from the description alone."""
    host = new_host()
    config = Path(host.served.environment(identity)["STAGEFS_SSH_CONFIG"])
    config.write_text(re.sub(r"(?m)^ *IdentityFile .*$", "", config.read_text()))
    key = str(config.parent / "id_client")
    flow = new_flow(identity, environment={"STAGEFS_SSH_CONFIG": str(config)})
    found = flow.ask("wiki", f"{host.url}/pilot-data/", key)
    assert found["unit"]["state"] == "Done", found["unit"]["reason"]
    assert found["data"]["state"] == "Running", found["data"]["reason"]
    # The output is in the data unit, and nowhere else.
    url, directory = found["data"]["url"], found["directory"]
    assert flow.names(url) == ["stderr.txt", "stdout.txt", "test.txt"]
    assert flow.mount.run("cat", f"{flow.local(url)}/stdout.txt").stdout == TEXT
    assert flow.mount.run("ls", directory).stdout == b"test.txt\n"
    # The input is one file in both places.
    assert flow.status(f"{directory}/test.txt") == flow.status(f"{flow.local(url)}/test.txt")
    assert flow.status(f"{directory}/test.txt")[1] == 2
    assert host.server.bytes_read_of("test.txt") == len(TEXT)
    # Where BigJob had them, at both ends.
    assert re.search(f"/bj-{HEX}/sj-{HEX}$", directory)
    (pilot,) = os.listdir(flow.directory / "work")
    assert directory.split("/")[-2] == pilot
    unit = url.rpartition("/")[2]
    served = [f"pilot-data/{unit}/{name}" for name in ("stderr.txt", "stdout.txt", "test.txt")]
    assert host.served.names() == served
    assert host.served.get(served[1]) == TEXT
    assert (flow.directory / "output/stdout.txt").read_bytes() == TEXT
    assert flow.mount.run("ls", flow.directory / "work" / pilot).returncode == 0
    records = flow.mount.run("sh", "-c", 'cat "$0"/.pilot-data/*.json', "MNT").stdout
    assert b"id_client" not in records


def test_shared_input_is_fetched_once(flow: Flow, nginx: Nginx) -> None:
    """B2: as many units as there are, one GET; and none for what nobody reads."""
    data = content(700_000)
    (nginx.root / "input.dat").write_bytes(data)
    (nginx.root / "unread.dat").write_bytes(data)
    found = flow.ask("shared", nginx.url("input.dat"), nginx.url("unread.dat"))
    assert [unit["state"] for unit in found["units"]] == ["Done"] * 4, found
    for number in range(4):
        path = f"{flow.local(found['out']['url'])}/digest.{number}"
        assert flow.mount.run("cat", path).stdout.split()[0].decode() == sha256(data)
    assert gets(nginx) == ["/plain/input.dat"]


def test_bucket(flow: Flow, gateway: SharedGateway) -> None:
    """B6 over S3: a walrus URL names the endpoint, and only the description has the keys."""
    rgw, name = gateway.fresh_bucket()
    address = rgw.endpoint.removeprefix("http://")
    _, other = gateway.fresh_bucket()
    found = flow.ask(
        "bucket",
        *(f"walrus://{address}/{name}/top", f"walrus://{address}/{other}"),
        variables=[f"PD_KEY={ACCESS_KEY_ID}", f"PD_SECRET={SECRET_ACCESS_KEY}"],
    )
    assert found["unit"]["state"] == "Done", found["unit"]["reason"]
    url = found["data"]["url"]
    assert flow.mount.run("cat", f"{flow.local(url)}/stdout").stdout == TEXT
    unit = url.rpartition("/")[2]
    store = rgw.bucket(name)
    listed = sorted(entry["path"] for page in store.list() for entry in page)
    assert listed == [f"top/{unit}/{one}" for one in ("stderr", "stdout", "test.txt")]
    assert bytes(store.get(f"top/{unit}/stdout").bytes()) == TEXT
    # D3: the URL and the reason.
    assert f"s3://{other}/{unit}/" in found["wrong"]
    assert "check the keys" in found["wrong"]
    assert SECRET_ACCESS_KEY not in found["wrong"] + flow.said
    # The keys are in one file that only its owner may read, and in nobody's command line.
    shown = [program.command for program in kernel.programs()]
    assert not [words for words in shown if any(SECRET_ACCESS_KEY in word for word in words)]
    state = flow.mount.state
    holders = [
        path
        for path in [*state.rglob("*"), *flow.directory.rglob("*")]
        if path.is_file() and SECRET_ACCESS_KEY.encode() in path.read_bytes()
    ]
    assert holders == [state / "credentials.json"]
    assert holders[0].stat().st_mode & 0o777 == 0o600
    assert found["data"]["state"] == "Running"


def test_lost_pilot_data(
    anybody: Identity, new_flow: MakeFlow, new_host: Callable[[], Host]
) -> None:
    """B3: of two replicas one is lost, and what they came from is gone."""
    hosts = [new_host(), new_host()]
    flow = new_flow(anybody, environment=ssh_environment(anybody, hosts))
    data = content(300_000)
    flow.put("test.txt", data)
    program = flow.start("replicated", *(f"{host.url}/pd" for host in hosts))
    (listed,) = hosts[0].served.names()
    assert hosts[1].served.names() == [listed]
    path = f"staging/pilot-data/{listed.removeprefix('pd/')}"
    assert flow.mount.xattr(path, "source") == f"{hosts[0].url}/{listed}"
    flow.client.cache_evict(path.replace("staging/", "staging:///", 1))
    assert flow.mount.xattr(path, "cached") == "0"
    hosts[0].server.stop()
    found = flow.go_on(program)
    assert found["unit"]["state"] == "Done", found["unit"]["reason"]
    assert found["digest"] == sha256(data)
    assert len(found["files"]["test.txt"]["pilot_data"]) == 2
    assert hosts[1].server.bytes_read_of("test.txt") >= len(data)


def test_affinity(flow: Flow) -> None:
    """B4: labels first, then the data; near is better than far, and far better than nowhere."""
    pilots = flow.directory / "pds"
    found = flow.ask("placed", str(pilots))
    assert found["went"] == {
        "here": "here",
        "there": "there",
        "nearby": "there",
        "against the data": "here",
        "free, data there": "there",
        "free, data here": "here",
        "nowhere": found["went"]["nowhere"],
    }
    assert found["states"] == ["Done"]
    assert found["places"] == [[f"file://{pilots}/mymachine-2"], [f"file://{pilots}/mymachine-1"]]
    assert found["replicas"] == 2


def test_missing_inputs(flow: Flow, nginx: Nginx) -> None:
    """B5, D3: nothing runs, and each reason names what is missing."""
    url = nginx.url("absent.dat")
    found = flow.ask("missing", url)
    assert not found["ran"]
    assert {unit["state"] for unit in found["units"].values()} == {"Failed"}
    assert found["absent"]["state"] == found["local"]["state"] == "Failed"
    for reason in (
        found["absent"]["reason"],
        found["units"]["absent"]["reason"],
        found["export"],
        flow.said,
    ):
        assert url in reason
        assert "HTTP 404" in reason
    assert "/absent/file" in found["units"]["local"]["reason"]
    assert "test.txt is not there any more" in found["units"]["gone"]["reason"]
    for what in ("unknown", "output"):
        assert "There is no data unit" in found["units"][what]["reason"]
        assert "du-nobody-knows" in found["units"][what]["reason"]


def test_refusals(flow: Flow, nginx: Nginx) -> None:
    """B7, B8's quota, D3."""
    flow.put("big.txt", bytes(1200))
    found = flow.ask("refusals", nginx.url(""))
    assert found["scheme"] == "No File Plugin found."
    assert "'service_url'" in found["nothing"]
    assert "s3://one-name/x and walrus://127.0.0.1:9/one-name are buckets" in found["bucket"]
    assert found["same"] == ""
    assert "pbs://host is no fork:// URL" in found["compute"]
    assert "which is not set here" in found["unset"]
    assert "which is only read" in found["reading"]
    assert str(flow.directory / "test.txt") in found["reading"]
    assert "du-nobody-knows cannot be found again" in found["unknown"]
    assert "needs 3 processes, and no pilot has more than 2" in found["processes"]["reason"]
    for said in (found["quota"], found["full"]["reason"]):
        assert f"has no room in file://{flow.directory}/pd: it has 1200 bytes, and" in said
        assert "of its 1000 (size 0.001 MB) are left" in said
    assert found["full"]["state"] == "Failed"
    # A task's outputs: all of them or none, and none is lost.
    assert found["output"]["state"] == "Failed"
    assert "has no room" in found["output"]["reason"]
    assert found["kept"] == ["large", "ok", "stderr", "stdout"]
    assert found["files"] == ["test.txt"]
    assert found["again"]["state"] == "Running", found["again"]["reason"]


def test_irods_collections_mounted_here(flow: Flow) -> None:
    """B8: an irods URL whose variable is set."""
    local = flow.mount.identity.directory(flow.directory / "vault")
    found = flow.ask("local_irods", variables=[f"OSG_DATA={local}"])
    assert found["data"]["state"] == "Running", found["data"]["reason"]
    unit = found["data"]["url"].rpartition("/")[2]
    assert (local / "osg" / unit / "test.txt").read_bytes() == TEXT


def test_data_is_read_from_afar_or_moved(
    anybody: Identity, new_flow: MakeFlow, new_host: Callable[[], Host]
) -> None:
    """B9: by the servers' own counts."""
    hosts = [new_host(), new_host()]
    settings = '[read]\naffinity = "us-east/mymachine-2"\n'
    flow = new_flow(anybody, settings=settings, environment=ssh_environment(anybody, hosts))
    lazy, asked = content(300_000, "lazy"), content(300_000, "asked")
    for name, data in (("lazy.txt", lazy), ("asked.txt", asked)):
        hosts[0].served.put(f"pd/{name}", data)
    found = flow.ask("moved", *(f"{host.url}/pd" for host in hosts))
    assert [unit["state"] for unit in found["units"]] == ["Done", "Done"], found
    assert found["digests"] == [sha256(lazy), sha256(asked)]
    # What was registered where it lies was not moved.
    here, there = hosts
    assert found["at"][0] == [f"{here.url}/pd/lazy.txt"]
    assert found["at"][1][0] == f"{here.url}/pd/asked.txt"
    assert found["at"][1][1].startswith(f"{there.url}/pd/du-")
    assert found["there"]
    assert here.server.bytes_read_of("lazy.txt") == len(lazy)
    assert there.server.bytes_read_of("lazy.txt") == 0
    assert [name.rpartition("/")[2] for name in there.served.names()] == ["asked.txt"]
    # Taken away again, it is where it was; there it has to stay.
    assert found["after"] == [f"{here.url}/pd/asked.txt"]
    assert "is complete nowhere but in" in found["nowhere"]


def test_directories_streams_and_failures(flow: Flow) -> None:
    outside = flow.mount.identity.directory(flow.directory / "outside")
    program = flow.start("working", str(outside))
    wait_until(lambda: flow.sleeping() == 2, "two units that sleep, and one that waits")
    found = flow.go_on(program)
    assert found["echoed"] == "Hello env arg1 2 $HOME\n"
    for name, unit in found["units"].items():
        assert unit["state"] == "Done", f"{name}: {unit['reason']}"
    assert found["streams"]["state"] == "Done", found["streams"]["reason"]
    assert found["made"] == sorted(
        [*(f"made.{name}" for name in found["units"]), ".made", "made.empty", "test.txt"]
    )
    assert "ended with exit code 3; its directory is kept" in found["failing"]["reason"]
    assert "made no absent.txt" in found["nothing"]["reason"]
    assert "/absent/program" in found["absent"]["reason"]
    assert "made.new exists" in found["twice"]["reason"]
    for name in ("failing", "nothing", "absent", "twice"):
        assert found[name]["state"] == "Failed"
    assert found["cancelled"] == ["Canceled"] * 3
    assert "made.outside" not in found["left"]
    assert found["there"] == ["stderr", "stdout", "test.txt"]


def test_another_program_finds_all_again(flow: Flow) -> None:
    """Also when everything was unmounted in between."""
    urls = flow.ask("begin", f"file://{flow.directory}/pd")
    flow.mount.umount()
    flow.mount.mount()
    assert flow.mount.run("ls", urls["directory"]).stdout == b"stderr\nstdout\n"
    found = flow.ask("find_again", json.dumps(urls))
    assert found["data"]["state"] == "Running", found["data"]["reason"]
    assert found["same"]
    assert found["labels"] == ["eu-de-south", "mymachine-1"]
    assert found["pilots"] == [f"file://{flow.directory}/{name}" for name in ("pd", "other")]
    assert len(found["at"]) == 2
    assert (flow.directory / "output/test.txt").read_bytes() == TEXT
    assert found["unit"]["state"] == "Done"
    assert found["units"] == [urls["unit"]]
    assert found["compute"] == "Done", "its program has ended"


def test_units_are_added_to_copied_exported_and_cancelled(flow: Flow) -> None:
    flow.put("more.txt", b"more")
    top = flow.mount.identity.directory(flow.directory / "pds")
    found = flow.ask("kept", str(top))
    assert found["files"] == {"test.txt": 2, "more.txt": 2}
    unit = found["data"]["url"].rpartition("/")[2]
    for place in (top / "first" / unit, top / "second" / unit, top / "url"):
        assert (place / "test.txt").read_bytes() == TEXT, place
        assert (place / "more.txt").read_bytes() == b"more", place
    assert (flow.directory / "exported/test.txt").read_bytes() == TEXT
    assert "/absent/file" in found["absent"]
    assert "copy it from where it is" in found["elsewhere"]
    assert found["data"]["state"] == "Canceled"
    assert found["cancelled"]["state"] == "Failed"
    assert f"{found['data']['url']} is Canceled" in found["cancelled"]["reason"]
    # Nothing near is no place for units with hard affinity.
    assert found["suits"]["state"] == "Done", found["suits"]["reason"]
    assert found["not_yet"] == "New"
    # What waits for a server that is away can be given up.
    assert found["stuck"] == ["Pending", "Canceled", "Canceled"]
    assert found["waits"]["state"] == "Canceled"
    assert "is Canceled and takes no data unit" in found["ended"]
    assert "was cancelled and takes no unit" in found["late"]


def test_page(flow: Flow, nginx: Nginx) -> None:
    """docs/PILOT-DATA.md's program, as it is printed there."""
    text = (CHECKOUT / "docs/PILOT-DATA.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "https://host/input.dat" in program
    data = content(300_000)
    (nginx.root / "input.dat").write_bytes(data)
    flow.put("page.py", program.replace("https://host/input.dat", nginx.url("input.dat")).encode())
    said = flow.mount.run("python", "page.py", directory=flow.directory).stdout.decode()
    assert said.split()[0] == "Done"
    digests = {path.read_text().split()[0] for path in (flow.directory / "results").glob("digest*")}
    assert digests == {sha256(data)}
    assert gets(nginx) == ["/plain/input.dat"]
