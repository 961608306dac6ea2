"""Slurm itself, from Debian's packages: `stagefs prolog`, `task-prolog` and `epilog` stage for its
jobs, with nginx and sshd as other hosts (L1 to L5).  slurmd is root's, slurmctld its own user's;
jobs are an ordinary user's.
"""

import dataclasses
import hashlib
import os
import pwd
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.identity import CHECKOUT, NOBODY, Identity
from tests.support.nginx import Nginx, running_nginx
from tests.support.private_machine import PrivateMachine
from tests.support.served import content
from tests.support.sshd import Login, Sshd, running_sshd
from tests.support.waiting import wait_until
from tests.systems.slurm_cell import SlurmCell

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="a private machine needs root"),
]
SHIPPED = CHECKOUT / "mount/slurm"
SLURM_USER = "slurm"
SETTLED_S = 60.0
SQUEUE_PAUSE_S = 0.1


@dataclasses.dataclass
class Cluster:
    """A cluster, and two other hosts: nginx, and sshd, whose /data is ``data`` here.  Jobs run on
    node1, unless they ask for the partition that has node2, too."""

    machine: PrivateMachine
    cell: SlurmCell
    nginx: Nginx
    sshd: Sshd
    data: Path
    home: Path

    def submit(
        self,
        script: str,
        *options: str,
        check: bool = True,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """The job's number; the script's output goes to JOB.out in ``home``."""
        path = self.home / "job.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        words = [
            "sbatch",
            "--parsable",
            "-o",
            "%A.%a.out" if "--array" in str(options) else "%j.out",
        ]
        return self.as_user(*words, *options, path, check=check, variables=variables).strip()

    def as_user(
        self,
        *words: str | Path,
        check: bool = True,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        return self.machine.run(
            *words,
            uid=NOBODY,
            environment={
                **self.cell.environment,
                "HOME": str(self.home),
                **(variables or {}),
            },
            directory=self.home,
            check=check,
        )

    def wait_for_end(self, job: str) -> str:
        """The job's state, when its epilog is over."""
        wait_until(
            lambda: self.cell.is_over(job),
            f"the end of job {job}",
            deadline_s=SETTLED_S,
            told=self.cell.log,
            pause_s=SQUEUE_PAUSE_S,
        )
        return self.cell.job(job).get("JobState", "")

    def output(self, job: str) -> str:
        return (self.home / f"{job}.out").read_text()

    def serve(self, name: str, data: bytes) -> str:
        """The URL of a new file at nginx."""
        (self.nginx.root / name).write_bytes(data)
        return self.nginx.url(name)

    def sent_bytes(self, name: str) -> int:
        return sum(one.sent_bytes for one in self.nginx.asked() if name in one.uri)

    def url(self, name: str) -> str:
        """Of a file at sshd."""
        return self.sshd.url_of(f"{self.data}/{name}")

    def reason(self, job: str) -> str:
        """For which it waits, as squeue shows it."""
        return self.cell.run("squeue", "-h", "-o", "%r", "-j", job)

    def states(self) -> list[Path]:
        """State directories that are kept, of mounts and of buffers."""
        found = self.machine.directory.glob("*state/stagefs-*/*")
        return [path for path in found if path.suffix != ".cache"]

    def assert_nothing_is_left(self) -> None:
        wait_until(
            lambda: not self.machine.programs("stagefs.supervisor"), "the end of all supervisors"
        )
        assert not self.machine.staging_mounts()
        assert not self.machine.programs("stagefs.daemon")
        run = Path(f"/proc/{self.machine.pid}/root/run/stagefs")
        assert not run.exists() or [path.name for path in run.iterdir()] == []
        told = [path.read_text() for path in self.home.glob("stagefs-*.err")]
        assert (self.states(), told) == ([], [])
        assert not list((self.machine.directory / "buffers").iterdir())


@pytest.fixture(scope="module")
def cluster(session_directory: Path, all_identities: dict[str, Identity]) -> Iterator[Cluster]:
    top = session_directory / "slurm"
    for name in ("", "data", "home", "sshd", "state", "node2-state", "nginx"):
        (top / name).mkdir()
    (top / "state").chmod(0o1777)
    (top / "node2-state").chmod(0o1777)
    shutil.chown(top / "home", NOBODY, NOBODY)
    machine = PrivateMachine("slurmhost", top)
    try:
        with machine.in_network():
            servers = running_nginx(top / "nginx"), running_sshd(top / "sshd", login=Login.mine())
            nginx, sshd = servers[0].__enter__(), servers[1].__enter__()
        shutil.chown(sshd.identity, NOBODY, NOBODY)
        programs = all_identities["root"].bin
        hooks = install(machine, top, programs, settings(top, sshd))
        (top / "buffers").mkdir(mode=0o755)
        allow_slurm(machine, programs)
        script = burst_buffer(f"/usr/bin/sudo -n {programs}/stagefs", top)
        cell = SlurmCell(
            machine,
            top,
            settings=hooks,
            plugins={"burst_buffer.lua": script},
            own_places={top / "state": top / "node2-state"},
            user=SLURM_USER,
        )
        yield Cluster(machine, cell, nginx, sshd, top / "data", top / "home")
        for server in servers:
            server.__exit__(None, None, None)
    finally:
        machine.end()


def settings(top: Path, sshd: Sshd) -> Path:
    path = top / "stagefs.conf"
    path.write_text(
        f'[state]\nbase = "{top}/state"\n'
        f'[remote.ssh]\nconfig = "{sshd.ssh_config}"\nattempts = 1\n'
        # On a machine that is busy a login takes longer than opens usually wait.
        "connect_timeout_s = 10\n[read]\nanswer_deadline_s = 60\n"
        "[stage_out]\ndrain_s = 1\nattempts = 1\n[batch]\nwait_s = 0\nepilog_deadline_s = 15\n"
        f'[path_map]\n"*:/data" = "{sshd.url_of(top / "data")}"\n'
    )
    return path


def install(
    machine: PrivateMachine, top: Path, programs: Path, configuration: Path, mounts: str = ""
) -> dict[str, str]:
    """The scripts that are shipped, with what an administrator writes into them; and the lines of
    slurm.conf that name them.  ``mounts``: in place of root's directory."""
    lines = {"PrologFlags": "Alloc", "BurstBufferType": "burst_buffer/lua"}
    if not mounts:
        # Where users find the program.
        machine.run("mount", "-t", "tmpfs", "-o", "mode=755", "local", "/usr/local/bin")
        machine.run("ln", "-s", programs / "stagefs", "/usr/local/bin/stagefs")
    for setting, name in (
        ("Prolog", "prolog.sh"),
        ("TaskProlog", "task_prolog.sh"),
        ("Epilog", "epilog.sh"),
    ):
        text = (SHIPPED / name).read_text()
        for old, new in (
            ("stagefs=/usr/local/bin/stagefs", f"stagefs={programs}/stagefs"),
            ("--scheduler slurm", f"--scheduler slurm --config {configuration}"),
        ):
            assert text.count(old) == 1
            text = text.replace(old, new)
        if mounts:
            text = re.sub(r"(?m)^mounts=.*$", f"mounts={mounts}", text)
        path = top / name
        path.write_text(text)
        path.chmod(0o755)
        lines[setting] = str(path)
    return lines


def allow_slurm(machine: PrivateMachine, programs: Path) -> None:
    """The line of sudoers that the README asks for where SlurmUser is not root."""
    (line,) = re.findall(r"(?m)^ *(\S+ ALL=.*)$", (SHIPPED / "README.md").read_text())
    assert line.startswith(f"{SLURM_USER} ")
    rule = machine.directory / "sudoers"
    rule.write_text(line.replace("/usr/local/bin/stagefs", f"{programs}/stagefs") + "\n")
    machine.run("mount", "-t", "tmpfs", "-o", "mode=755", "rules", "/etc/sudoers.d")
    machine.run("install", "-m", "440", rule, "/etc/sudoers.d/stagefs")


def burst_buffer(program: str, top: Path) -> str:
    """The script that is shipped, with what an administrator writes into it."""
    text = (SHIPPED / "burst_buffer.lua").read_text()
    for old, new in (
        ('program = "/usr/local/bin/stagefs"', f'program = "{program}"'),
        ('buffers = "/scratch/stagefs"', f'buffers = "{top}/buffers"'),
        ("quoted(buffers) ..", f'quoted(buffers) .. " --config {top}/stagefs.conf" ..'),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def owners_cell(cluster: Cluster, all_identities: dict[str, Identity]) -> SlurmCell:
    """One that is all an ordinary user's, as the README says it for him; without sudo."""
    top = cluster.machine.directory / "own"
    mounts = top / "state" / f"stagefs-{NOBODY}" / "jobs"
    for place in (top, top / "state", top / "buffers"):
        place.mkdir()
        os.chown(place, NOBODY, NOBODY)
    text = settings(cluster.machine.directory, cluster.sshd).read_text()
    text = text.replace(f"{cluster.machine.directory}/state", f"{top}/state")
    configuration = top / "stagefs.conf"
    configuration.write_text(text.replace("[batch]\n", f'[batch]\ndirectory = "{mounts}"\n'))
    me = pwd.getpwuid(NOBODY).pw_name
    programs = all_identities["root"].bin
    hooks = install(cluster.machine, top, programs, configuration, mounts=str(mounts))
    return SlurmCell(
        cluster.machine,
        top,
        settings=hooks,
        plugins={"burst_buffer.lua": burst_buffer(str(programs / "stagefs"), top)},
        own_places={},
        user=me,
        slurmd_user=me,
        ports=17101,
    )


@pytest.fixture
def own(cluster: Cluster, owners_cell: SlurmCell) -> Iterator[Cluster]:
    yield dataclasses.replace(cluster, cell=owners_cell)
    wait_until(lambda: owners_cell.states() == {"idle"}, "idle nodes", told=owners_cell.states)
    left = [path for path in owners_cell.top.glob("state/*/*") if path.suffix != ".cache"]
    assert [path.name for path in left] in ([], ["jobs"])
    assert [name for path in left for name in path.iterdir()] == []


def test_a_cluster_of_one_ordinary_user(own: Cluster) -> None:
    data = content(300_000, "own")
    job = own.submit(
        'cd "$STAGEFS_SANDBOX" && sha256sum <in >made',
        f"--comment=stagefs: in:in={own.serve('own.dat', data)} out:made={own.url('own-made')}",
    )
    failing = own.submit("true", f"--comment=stagefs: in:x={own.nginx.url('absent')}")
    assert own.wait_for_end(job) == "COMPLETED", own.output(job)
    assert (own.data / "own-made").read_text() == f"{hashlib.sha256(data).hexdigest()}  -\n"
    assert own.sent_bytes("own.dat") == len(data)
    assert own.wait_for_end(failing) == "FAILED"
    assert own.nginx.url("absent") in own.output(failing)


def test_a_prolog_whose_mounts_nobody_would_find_says_so(
    cluster: Cluster, all_identities: dict[str, Identity]
) -> None:
    """slurmd is not root's, and nothing was said about directories."""
    said = cluster.machine.run(
        *(all_identities["root"].bin / "stagefs", "prolog", "--scheduler", "slurm"),
        *("--config", cluster.machine.directory / "stagefs.conf"),
        uid=NOBODY,
        environment={
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_UID": str(NOBODY),
            "SLURM_JOB_COMMENT": "stagefs:",
        },
    )
    assert "name a directory of nobody's in batch.directory" in said
    place = cluster.machine.directory / f"state/stagefs-{NOBODY}"
    assert (place / "jobs/.failed/7").read_text() == said
    shutil.rmtree(place)


@pytest.fixture(autouse=True)
def clean(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.assert_nothing_is_left()
    # "Planned" is one that the scheduler has looked at for a job.
    wait_until(
        lambda: cluster.cell.states() == {"idle"},
        "idle nodes",
        told=cluster.cell.states,
        pause_s=SQUEUE_PAUSE_S,
    )


@pytest.mark.parametrize(("tasks", "count"), [("1-3", 3), ("1-2%1", 2)])
def test_an_array_fetches_its_shared_input_once(cluster: Cluster, tasks: str, count: int) -> None:
    """Side by side, and one after another."""
    data = content(3_000_000, tasks)
    name = f"shared-{count}.dat"
    url = cluster.serve(name, data)
    job = cluster.submit(
        'cat "$STAGEFS_SANDBOX/in.dat" | sha256sum\n'
        "srun -n1 bash -c 'sha256sum <\"$STAGEFS_MOUNT/tasks/job-$SLURM_JOB_ID/in.dat\"'",
        f"--array={tasks}",
        f"--comment=stagefs: in:in.dat={url}",
    )
    cluster.wait_for_end(job)
    expected = f"{hashlib.sha256(data).hexdigest()}  -\n" * 2
    said = [cluster.output(f"{job}.{number + 1}") for number in range(count)]
    assert said == [expected] * count, cluster.cell.log()
    assert cluster.sent_bytes(name) == len(data)


def test_a_job_of_two_nodes_has_a_mount_on_each(cluster: Cluster) -> None:
    data = content(500_000, "nodes")
    job = cluster.submit(
        "srun bash -c 'sha256sum <$STAGEFS_SANDBOX/in.dat; readlink /proc/self/ns/mnt;"
        ' hostname >"$STAGEFS_SANDBOX/at-$SLURM_NODEID"\'',
        "--partition=both",
        "--nodes=2",
        f"--comment=stagefs: in:in.dat={cluster.serve('nodes.dat', data)}"
        f" out:at-*={cluster.url('nodes/')}",
    )
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.output(job)
    digest = hashlib.sha256(data).hexdigest()
    lines = cluster.output(job).splitlines()
    assert lines.count(f"{digest}  -") == 2
    assert len(set(lines)) == 3, "both ran on one node"
    assert cluster.sent_bytes("nodes.dat") == 2 * len(data)
    assert sorted(path.name for path in (cluster.data / "nodes").iterdir()) == ["at-0", "at-1"]


def test_a_cancelled_job_leaves_its_outputs_and_no_mount(cluster: Cluster) -> None:
    url = cluster.serve("half", b"half\n")
    job = cluster.submit(
        'cd "$STAGEFS_SANDBOX" && cat in >part.log && touch ~/working && sleep 600',
        f"--comment=stagefs: in:in={url} out:*.log={cluster.url('kept/')}",
    )
    wait_until(
        (cluster.home / "working").exists,
        "the job at work",
        deadline_s=SETTLED_S,
        told=lambda: cluster.cell.log() + cluster.output(job),
    )
    assert len(cluster.machine.staging_mounts()) == 1
    cluster.as_user("scancel", job)
    assert cluster.wait_for_end(job) == "CANCELLED"
    assert (cluster.data / "kept/part.log").read_text() == "half\n"


def test_a_missing_input_fails_the_job_and_not_the_node(cluster: Cluster) -> None:
    absent = cluster.nginx.url("absent")
    job = cluster.submit("touch ~/has-run", f"--comment=stagefs: in:x={absent}")
    assert cluster.wait_for_end(job) == "FAILED"
    said = cluster.output(job)
    assert absent in said, cluster.cell.log()
    assert said.startswith("stagefs: ")
    assert cluster.cell.states() == {"idle"}
    assert not (cluster.home / "has-run").exists()


@pytest.mark.parametrize(
    ("comment", "variables", "expected"),
    [
        ("stagefs: ref.fa", {}, "write in:NAME=URL"),
        ("stagefs: manifest:absent.toml", {}, "absent.toml cannot be read"),
        ("nothing", {"STAGEFS_IN": "x=file:///etc/hosts"}, "submit it with --comment=stagefs:"),
        (
            "stagefs: in:x=file:///etc/hosts",
            {"STAGEFS_IN": "y=file:///etc/hosts"},
            "The input y is declared after",
        ),
    ],
)
def test_a_wrong_request_is_told_in_the_jobs_output(
    cluster: Cluster, comment: str, variables: dict[str, str], expected: str
) -> None:
    job = cluster.submit("echo ran", f"--comment={comment}", variables=variables)
    assert cluster.wait_for_end(job) == "FAILED"
    said = cluster.output(job)
    assert expected in said
    assert "ran" not in said.splitlines()


def test_a_request_in_the_environment(cluster: Cluster) -> None:
    (cluster.data / "a, b").write_text("one\n")
    (cluster.home / "near by").write_text("two\n")
    (cluster.home / "job.toml").write_text(
        f'[inputs]\nlisted = "{cluster.serve("listed", b"three")}"\n'
    )
    job = cluster.submit(
        'cd "$STAGEFS_SANDBOX" && srun -n2 true && cat "far, off" near listed >made.txt && ls',
        "--comment=stagefs:",
        "-n2",
        variables={
            "STAGEFS_MANIFEST": "job.toml",
            "STAGEFS_IN": f"far%2C%20off=/data/a%2C%20b near=file://{cluster.home}/near%20by",
            "STAGEFS_OUT": f"made.*={cluster.url('plain/')}",
        },
    )
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.output(job)
    assert (cluster.data / "plain/made.txt").read_text() == "one\ntwo\nthree"
    # Nothing of StageFS is in the job's own output.
    assert cluster.output(job).splitlines() == ["far, off", "listed", "made.txt", "near"]


def test_a_job_that_asks_for_nothing(cluster: Cluster) -> None:
    job = cluster.submit("env | grep STAGEFS; ls -d /run/stagefs/*; echo ran")
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.output(job)
    assert cluster.output(job).splitlines()[-1] == "ran"
    assert "STAGEFS" not in cluster.output(job)
    assert job not in cluster.output(job)


def test_outputs_that_nobody_takes_are_kept_and_go_out_with_the_next_job(cluster: Cluster) -> None:
    comment = f"--comment=stagefs: out:result*={cluster.url('late/')}"
    at_work, go = (cluster.home / name for name in ("keeping", "go"))
    job = cluster.submit(
        'echo precious >"$STAGEFS_SANDBOX/result.1"\n'
        f"touch {at_work}; until [ -e {go} ]; do sleep 0.1; done",
        comment,
    )
    wait_until(at_work.exists, "the job at work", deadline_s=SETTLED_S)
    cluster.sshd.freeze()
    try:
        go.touch()
        cluster.wait_for_end(job)
    finally:
        cluster.sshd.thaw()
    told = cluster.home / f"stagefs-{job}.err"
    reason = told.read_text()
    assert f"1 outputs of job {job} are not uploaded" in reason
    assert told.stat().st_uid == NOBODY
    told.unlink()
    assert not cluster.machine.staging_mounts()
    (kept,) = cluster.states()
    assert str(kept) in reason
    assert not (cluster.data / "late/result.1").exists()
    job = cluster.submit('echo new >"$STAGEFS_SANDBOX/result.2"', comment)
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.output(job)
    assert (cluster.data / "late/result.1").read_text() == "precious\n"
    assert (cluster.data / "late/result.2").read_text() == "new\n"


@pytest.mark.parametrize(
    ("directive", "reason"),
    [
        ("stagefs stage_in source=ssh://host/x", "destination=... is missing"),
        ("stagefs fetch source=ssh://host/x destination=x", "neither stage_in nor stage_out"),
        ("stagefs stage_in source=/x destination=x", "is not a URL"),
        ("stagefs stage_in source=ssh://host/x destination=../x", "is not a relative name"),
        ("stagefs stage_out source=x destination=http://host/x", "nothing can be written"),
        ("stagefs stage_in source=ssh://host/x destination=x size=3", "'size=3' is not"),
        ("stagefs stage_in source=ssh://host/a%20b destination=x", "write %% for one"),
        ("stage_in source=ssh://host/x destination=x", "write #BB_LUA stagefs stage_in"),
    ],
)
def test_a_wrong_burst_buffer_directive_is_refused_at_sbatch(
    cluster: Cluster, directive: str, reason: str
) -> None:
    said = cluster.submit(f"#BB_LUA {directive}\ntrue", check=False)
    assert reason in said
    assert not cluster.cell.run("squeue", "-h").strip()


def test_a_burst_buffer_is_staged_in_before_the_job_and_out_after_it(cluster: Cluster) -> None:
    (cluster.data / "a b").write_text("before\n")
    source = cluster.url("a b").replace("%", "%%")
    cluster.sshd.freeze()
    try:
        job = cluster.submit(
            f"#BB_LUA stagefs stage_in source={source} destination=sub/in.dat\n"
            f"#BB_LUA stagefs stage_out source=result-* destination={cluster.url('out/')}\n"
            f"#BB_LUA stagefs stage_out source=absent destination={cluster.url('absent')}\n"
            'cd "$STAGEFS_BB" && cat sub/in.dat >result-1 && echo two >result-2 && stat -c %U .\n'
            f"ls {cluster.data}/out 2>&1 || true"
        )
        wait_until(
            lambda: cluster.cell.job(job).get("Reason") == "BurstBufferStageIn",
            "the state of staging in",
            deadline_s=SETTLED_S,
            told=lambda: cluster.cell.job(job),
            pause_s=SQUEUE_PAUSE_S,
        )
    finally:
        cluster.sshd.thaw()
    cluster.wait_for_end(job)
    wait_until(
        lambda: not list((cluster.machine.directory / "buffers").iterdir()),
        "the end of the buffer",
        deadline_s=SETTLED_S,
        told=cluster.cell.log,
    )
    assert (cluster.data / "out/result-1").read_text() == "before\n"
    assert (cluster.data / "out/result-2").read_text() == "two\n"
    config = cluster.cell.run("scontrol", "show", "config")
    assert re.search(rf"(?m)^SlurmUser *= {SLURM_USER}\(", config), config
    owner, listed = cluster.output(job).splitlines()
    assert owner == "nobody"
    assert "No such file" in listed, "it was staged out before the end"
    assert cluster.cell.job(job)["JobState"] == "COMPLETED"


def test_a_burst_buffer_that_slurm_may_not_serve_is_refused(own: Cluster) -> None:
    """Of somebody else's job, by SlurmUser without sudo; his own job has one."""
    (own.data / "own in").write_text("own\n")
    source = own.url("own in").replace("%", "%%")
    stages_in = f"#BB_LUA stagefs stage_in source={source} destination=in\n"
    job = own.submit(
        f"{stages_in}#BB_LUA stagefs stage_out source=in destination={own.url('own-out')}\ntrue"
    )
    script = own.cell.top / "others.sh"
    script.write_text(f"#!/bin/bash\n{stages_in}true\n")
    others = own.machine.run(
        *("sbatch", "--parsable", script),
        uid=pwd.getpwnam(SLURM_USER).pw_uid,  # somebody else
        environment=own.cell.environment,
        directory=own.cell.top,
    ).strip()
    wait_until(
        lambda: "The buffer of slurm's job cannot be served by nobody" in own.reason(others),
        "the reason in squeue",
        deadline_s=SETTLED_S,
        told=lambda: own.reason(others),
        pause_s=SQUEUE_PAUSE_S,
    )
    own.cell.run("scancel", others)
    own.wait_for_end(others)
    own.wait_for_end(job)
    buffers = own.cell.top / "buffers"
    wait_until(
        lambda: not list(buffers.iterdir()),
        "the end of the buffers",
        deadline_s=SETTLED_S,
        told=own.cell.log,
    )
    assert (own.data / "own-out").read_text() == "own\n"


def test_what_cannot_be_staged_in_is_told_by_squeue(cluster: Cluster) -> None:
    url = cluster.url("absent-for-ever")
    job = cluster.submit(f"#BB_LUA stagefs stage_in source={url} destination=x\ntouch ~/has-begun")
    wait_until(
        lambda: url in cluster.cell.run("squeue", "-h", "-o", "%r", "-j", job),
        "the reason in squeue",
        deadline_s=SETTLED_S,
        told=lambda: cluster.cell.run("squeue", "-h", "-o", "%T %r", "-j", job),
        pause_s=SQUEUE_PAUSE_S,
    )
    cluster.as_user("scancel", job)
    cluster.wait_for_end(job)
    wait_until(
        lambda: not list((cluster.machine.directory / "buffers").iterdir()),
        "the end of the buffer",
        deadline_s=SETTLED_S,
        told=cluster.cell.log,
    )
    assert not (cluster.home / "has-begun").exists()


def test_what_cannot_be_staged_out_stays_in_its_buffer(cluster: Cluster) -> None:
    (cluster.data / "file").write_text("no directory\n")
    job = cluster.submit(
        f"#BB_LUA stagefs stage_out source=result destination={cluster.url('file/result')}\n"
        'echo precious >"$STAGEFS_BB/result"'
    )
    wait_until(
        lambda: "not uploaded" in cluster.cell.run("squeue", "-h", "-o", "%r", "-j", job),
        "the reason in squeue",
        deadline_s=SETTLED_S,
        told=lambda: cluster.cell.run("scontrol", "show", "job", job),
        pause_s=SQUEUE_PAUSE_S,
    )
    buffers = cluster.machine.directory / "buffers"
    assert (buffers / job / "result").read_text() == "precious\n"
    cluster.as_user("scancel", "--hurry", job)
    wait_until(lambda: not list(buffers.iterdir()), "the end of the buffer", deadline_s=SETTLED_S)


@pytest.fixture(scope="module")
def page(cluster: Cluster) -> list[str]:
    """The page's programs, with this test's host."""
    text = (CHECKOUT / "docs/SLURM.md").read_text()
    assert "ssh://host/data/" in text
    found = re.findall(r"```bash\n#!/bin/bash\n(.*?)```", text, re.DOTALL)
    return [one.replace("ssh://host/data/", cluster.url("")) for one in found]


def test_the_page(cluster: Cluster, page: list[str]) -> None:
    (cluster.data / "input.dat").write_bytes(b"page\n")
    job = cluster.submit(page[0])
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.output(job)
    digest = hashlib.sha256(b"page\n").hexdigest()
    assert (cluster.data / "sums/input.sum").read_text() == f"{digest}  input.dat\n"


def test_the_page_before_the_time_is_up(cluster: Cluster, page: list[str]) -> None:
    job = cluster.submit(page[1])
    private = Path(f"/proc/{cluster.machine.pid}/root/run/stagefs/{job}")
    wait_until(private.is_symlink, "the job's mount", deadline_s=SETTLED_S)
    state = f"$(readlink /run/stagefs/{job})/tasks/job-{job}/state-{job}"
    wait_until(
        lambda: cluster.as_user("sh", "-c", f"cat {state}", check=False).strip() == "1",
        "the job at work",
        deadline_s=SETTLED_S,
    )
    # What --signal=B:TERM@120 does when the time is nearly up.
    cluster.as_user("scancel", "--batch", "--signal=TERM", job)
    saved = cluster.data / f"states/state-{job}"
    wait_until(
        saved.exists,
        "the state at its host",
        deadline_s=SETTLED_S,
        told=lambda: cluster.output(job),
    )
    assert cluster.cell.job(job)["JobState"] == "RUNNING"
    cluster.as_user("scancel", job)
    cluster.wait_for_end(job)
    assert saved.read_text().strip().isdigit()
