"""The small cluster of vagrant/, provisioned by the scripts that are there: a storage host, two
nodes of Slurm and one of Grid Engine, each with StageFS mounted by systemd (E6).

The hosts are this machine's namespaces, with systemd in each, in place of virtual machines.
"""

import hashlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.identity import CHECKOUT, SYSTEM_PATH, CommandFailed
from tests.support.waiting import wait_until
from tests.systems.cluster_hosts import Host, running_hosts

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="hosts need root"),
]
PROVISION = CHECKOUT / "vagrant/provision"
VAGRANTFILE = CHECKOUT / "vagrant/Vagrantfile"
UNIT = "stagefs@scratch-stage"
STAGE = "/scratch/stage"
USER = "pilot"
SIZE_BYTES = 3_000_000
SETTLED_S = 90.0
PROVISIONED_S = 240.0


class Cluster:
    def __init__(self, hosts: dict[str, Host], addresses: dict[str, str]) -> None:
        self.hosts = hosts
        self.addresses = addresses

    def user(self, host: str, script: str) -> str:
        """What a script of the job user's said in his login on a host."""
        return self.hosts[host].as_user(USER, script)

    def serve(self, name: str) -> str:
        """The SHA-256 of a new file in /srv/data on the storage host."""
        data = random.Random(name).randbytes(SIZE_BYTES)
        self.hosts["storage"].write(f"/srv/data/{name}", data)
        return hashlib.sha256(data).hexdigest()

    def sent(self, name: str) -> dict[str, int]:
        """How many bytes of a file nginx has sent to each address."""
        found: dict[str, int] = {}
        for line in self.hosts["storage"].run("cat", "/var/log/nginx/access.log").splitlines():
            said = re.match(rf'(\S+) .*"GET /{re.escape(name)} HTTP/1.1" 20\d (\d+)', line)
            if said:
                found[said[1]] = found.get(said[1], 0) + int(said[2])
        return found

    def submit(self, host: str, command: str, script: str) -> str:
        """What the batch system said to a script of the job user's."""
        self.hosts[host].write("/tmp/job.sh", f"#!/bin/bash\n{script}\n".encode())
        return self.user(host, f"{command} /tmp/job.sh").strip()

    def wait_for(self, host: str, script: str, wanted: str) -> None:
        """Until root's script says so on a host."""
        said = ""

        def holds() -> bool:
            nonlocal said
            said = self.hosts[host].run("bash", "-c", script, check=False).strip()
            return said == wanted

        wait_until(holds, f"{wanted!r} from {script!r}", deadline_s=SETTLED_S, told=lambda: said)


def addresses_of_the_cluster() -> dict[str, str]:
    """As the scripts have them."""
    text = (PROVISION / "cluster.sh").read_text()
    found = re.search(r"^declare -A address=\((.*?)\)$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return dict(re.findall(r"\[(\w+)\]=([\d.]+)", found[1]))


def roles_of_the_cluster() -> dict[str, list[str]]:
    """The scripts that Vagrant runs on each host, in turn."""
    text = VAGRANTFILE.read_text()
    lines = re.findall(r'^  "(\w+)" => \["([\d.]+)", \d+, \[(.*)\]\],$', text, re.MULTILINE)
    assert {name: address for name, address, _ in lines} == addresses_of_the_cluster()
    return {name: re.findall(r'"([^"]+)"', scripts) for name, _, scripts in lines}


def provision(host: Host, scripts: list[str], source: Path) -> None:
    for script in scripts:
        name, *words = script.split()
        words = [str(source) if word == "$tarball" else word for word in words]
        try:
            host.run(PROVISION / name, *words, deadline_s=PROVISIONED_S)
        except CommandFailed as exc:
            raise CommandFailed(f"{host.name}: {exc}\n{host.journal()}") from exc


@pytest.fixture(scope="module")
def tarball() -> Path:
    """One host has what users install, the others this checkout's StageFS."""
    found = sorted((CHECKOUT / ".venvs/dist").glob("stagefs-*-linux-*.tar.gz"))
    assert len(found) == 1, "no tarball in .venvs/dist: run the tests with `make test-systems`"
    return found[0]


@pytest.fixture(scope="module")
def cluster(session_directory: Path, tarball: Path) -> Iterator[Cluster]:
    top = session_directory / "cluster"
    top.mkdir(mode=0o755)
    secrets = top / "secrets"
    subprocess.run([PROVISION / "secrets.sh", secrets], check=True, env={"PATH": SYSTEM_PATH})
    addresses, roles = addresses_of_the_cluster(), roles_of_the_cluster()
    with running_hosts(addresses, top) as hosts:
        for host in hosts.values():
            host.run("install", "-d", "-m", "700", "/etc/stagefs-cluster")
            for path in secrets.iterdir():
                host.write(f"/etc/stagefs-cluster/{path.name}", path.read_bytes())
        with ThreadPoolExecutor() as pool:
            sources = {"grid": tarball}
            started = [
                pool.submit(provision, host, roles[name], sources.get(name, CHECKOUT / ".venv"))
                for name, host in hosts.items()
            ]
            for one in started:
                one.result()
        yield Cluster(hosts, addresses)


def test_a_slurm_job_reads_a_staged_file_on_two_nodes(cluster: Cluster) -> None:
    """Through the mount that systemd made on each of them, and through the job's own sandbox; its
    outputs go to S3."""
    digests = {name: cluster.serve(name) for name in ("staged", "seen", "declared")}
    nodes = ("node1", "node2")
    for node in nodes:
        cluster.user(node, "stagefs stage-in http://storage/staged staging:///staged")
    cluster.wait_for("node1", "sinfo -h -N -o %t | sort -u", "idle")
    job = cluster.submit(
        "node1",
        "sbatch --parsable -N2 -o job.out"
        " --comment='stagefs: in:in.dat=http://storage/declared out:at-*=s3://stage/out/'",
        f"srun --label sha256sum {STAGE}/staging/staged {STAGE}/staging/data/seen"
        ' "$STAGEFS_SANDBOX/in.dat"\n'
        """srun bash -c 'hostname >"$STAGEFS_SANDBOX/at-$(hostname)"'""",
    )
    cluster.wait_for("node1", f"squeue -h -j {job}", "")
    said = cluster.user("node1", "cat job.out")
    for digest in digests.values():
        assert len(re.findall(rf"^[01]: {digest} ", said, re.MULTILINE)) == 2, said
    own = [cluster.addresses[node] for node in nodes]
    assert cluster.sent("staged") == dict.fromkeys(own, SIZE_BYTES), "one copy for each node"
    assert cluster.sent("declared") == dict.fromkeys(own, SIZE_BYTES)
    # The outputs that each node uploaded, by a node of the other batch system.
    assert cluster.user("grid", f"cat {STAGE}/staging/bucket/out/at-*") == "node1\nnode2\n"
    for node in nodes:
        mounts = cluster.hosts[node].run("findmnt", "-n", "-t", "fuse.stagefs", "-o", "TARGET")
        assert mounts.split() == [STAGE], "the job's own mount is gone, and systemd's is there"


def test_a_grid_engine_job_reads_a_staged_file(cluster: Cluster) -> None:
    digest = cluster.serve("for-grid")
    said = cluster.submit(
        "grid",
        "qsub -terse -j y -o $HOME/grid.out -v STAGEFS_IN=in.dat=http://storage/for-grid",
        f'sha256sum <{STAGE}/staging/data/for-grid\nsha256sum <"$TMPDIR/stagefs/in.dat"',
    )
    assert said.isdigit(), said
    cluster.wait_for("grid", "qstat -u '*'", "")
    assert cluster.user("grid", "cat grid.out") == f"{digest}  -\n" * 2


def test_systemd_looks_after_the_mount(cluster: Cluster) -> None:
    """It is upgraded under a reader, comes back when its supervisor is killed, and is unmounted."""
    host, name = cluster.hosts["node2"], f"{STAGE}/staging/watched"
    digest = cluster.serve("watched")
    cluster.user("node2", "stagefs stage-in ssh://storage/srv/data/watched staging:///watched")
    before = host.run("systemctl", "show", "-P", "MainPID", UNIT)
    # Half of it before the upgrade, the other half after it, through one descriptor.
    read = (
        f"exec 3<{name}; {{ head -c 1000000 <&3; systemctl reload {UNIT} >&2; cat <&3; }}"
        " | sha256sum"
    )
    assert host.run("bash", "-ec", read).split()[0] == digest
    after = host.run("systemctl", "show", "-P", "MainPID", UNIT)
    assert before != after, "nothing was upgraded"

    host.run("systemctl", "kill", "--signal=KILL", UNIT)
    # It takes the kernel and systemd a moment to see that they are dead.
    seen = f"systemctl show -P NRestarts {UNIT}; systemctl is-active {UNIT}; cat {name} | sha256sum"
    cluster.wait_for("node2", seen, f"1\nactive\n{digest}  -")

    host.run("systemctl", "stop", UNIT)
    assert host.run("findmnt", "-n", "-t", "fuse.stagefs", check=False) == ""
    assert "stagefs.daemon" not in host.run("ps", "-A", "-o", "args")
    # And everything again, on a host that has it: nothing is lost.
    provision(host, roles_of_the_cluster()["node2"], CHECKOUT / ".venv")
    assert host.run("sha256sum", name).split()[0] == digest
    assert host.run("systemctl", "--failed", "--plain", "--no-legend") == ""


def test_a_users_own_systemd_mounts(cluster: Cluster) -> None:
    host, unit = cluster.hosts["node1"], "stagefs-user@home-pilot-stage"
    digest = cluster.serve("own")
    text = (CHECKOUT / "mount/systemd/stagefs-user@.service").read_bytes()
    host.write("/etc/systemd/user/stagefs-user@.service", text)
    uid = cluster.user("node1", "id -u").strip()
    # As logging in does.
    host.run("systemctl", "start", f"user@{uid}.service")
    own = f"export XDG_RUNTIME_DIR=/run/user/{uid}; systemctl --user"
    cluster.user("node1", f"mkdir stage; {own} start {unit}")
    script = (
        "stagefs stage-in http://storage/own staging:///own --mount ~/stage"
        " && sha256sum ~/stage/staging/own"
    )
    assert digest in cluster.user("node1", script)
    assert f"{unit}.service" in cluster.user("node1", f"{own} --plain list-units 'stagefs*'")
    cluster.user("node1", f"{own} stop {unit}")
    mounts = host.run("findmnt", "-n", "-t", "fuse.stagefs", "-o", "TARGET")
    assert mounts.split() == [STAGE], "root's mount is another"


def test_vagrant_takes_the_file(tmp_path: Path) -> None:
    for name in ("vagrant", "mount"):
        shutil.copytree(CHECKOUT / name, tmp_path / name)
    done = subprocess.run(
        # Which virtual machines there are is not its matter.
        ["vagrant", "validate", "--ignore-provider"],
        cwd=tmp_path / "vagrant",
        env={"PATH": SYSTEM_PATH, "HOME": str(tmp_path), "LANG": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "validated successfully" in done.stdout, done.stdout + done.stderr
