"""Grid Engine itself, from Debian's packages: its jobs are staged by `stagefs prolog` and `stagefs
epilog`, in a cell of one host on a private network, with a real sshd as the other host (G1 to G6).
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.identity import CHECKOUT, NOBODY, Identity
from tests.support.private_machine import PrivateMachine
from tests.support.sshd import Login, Sshd, running_sshd
from tests.support.waiting import wait_until
from tests.systems.conftest import PROGRAMS
from tests.systems.grid_engine_cell import GridEngineCell

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="a private machine needs root"),
]
DRMAA = CHECKOUT / ".venvs/grid-engine/bin/python"
DRMAA_VARIABLES = {
    "DRMAA_LIBRARY_PATH": "/usr/lib/gridengine-drmaa/lib/libdrmaa.so.1.0",
    # Debian's libdrmaa needs it before anything else.
    "LD_PRELOAD": "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2",
}
UPPER = "#!/bin/bash\necho out in $TMPDIR; echo on stderr >&2; tr a-z A-Z\n"
HOOK = "/usr/local/lib/stagefs/stagefs-hook"
SETTLED_S = 60.0
ATTEMPTS = 2


@dataclasses.dataclass
class Cluster:
    """A cell, and another host whose /data is ``data`` here."""

    machine: PrivateMachine
    cell: GridEngineCell
    sshd: Sshd
    data: Path
    home: Path

    def submit(self, *words: str | Path, variables: str = "") -> str:
        options = ["-v", variables] if variables else []
        return self.as_user("qsub", "-terse", "-cwd", *options, *words).strip()

    def as_user(self, *words: str | Path) -> str:
        return self.machine.run(
            *words,
            uid=NOBODY,
            environment={**self.cell.environment, "HOME": str(self.home)},
            directory=self.home,
        )

    def drmaa(self, *jobs: dict[str, object]) -> Any:
        described = self.home / "jobs.json"
        described.write_text(json.dumps(jobs))
        words = f"exec {DRMAA} {PROGRAMS / 'drmaa_jobs.py'} <{described}"
        said = self.machine.run(
            "sh",
            "-c",
            words,
            uid=NOBODY,
            environment={**self.cell.environment, **DRMAA_VARIABLES, "HOME": str(self.home)},
            directory=self.home,
            deadline_s=200,
        )
        return json.loads(said.splitlines()[-1])

    def script(self, name: str, text: str) -> Path:
        path = self.home / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def wait_for_end(self, job: str) -> None:
        wait_until(
            lambda: self.cell.state_of(job) is None, f"the end of job {job}", deadline_s=SETTLED_S
        )

    def wait_for_error(self, job: str) -> str:
        """The reason, once the job is in error."""
        wait_until(
            lambda: "E" in (self.cell.state_of(job) or ""),
            f"the state of error of job {job}",
            deadline_s=SETTLED_S,
        )
        lines = self.as_user("qstat", "-j", job).splitlines()
        (reason,) = [line for line in lines if line.startswith("error reason")]
        return reason

    def why_aborted(self, job: str) -> str:
        """What is known of a job that should have run."""
        number = job.partition(".")[0]
        lines = self.cell.run("qacct", "-j", number, check=False).splitlines()
        return ", ".join(line for line in lines if line.startswith(("failed", "exit_status")))

    def url(self, name: str) -> str:
        return self.sshd.url_of(f"{self.data}/{name}")

    def assert_nothing_is_left(self) -> None:
        wait_until(
            lambda: not self.machine.programs("stagefs.supervisor"), "the end of all supervisors"
        )
        assert not self.machine.staging_mounts()
        assert not self.machine.programs("stagefs.daemon")
        run = Path(f"/proc/{self.machine.pid}/root/run/stagefs")
        if run.exists():
            assert [path.name for path in run.iterdir() if path.name != ".attempts"] == []
        states = self.machine.directory / "state"
        assert [str(path) for path in states.glob("stagefs-*/*")] == []


@pytest.fixture(scope="module")
def cluster(session_directory: Path, all_identities: dict[str, Identity]) -> Iterator[Cluster]:
    top = session_directory / "cell"
    for name in ("", "data", "home", "sshd", "state"):
        (top / name).mkdir()
    (top / "state").chmod(0o1777)
    shutil.chown(top / "home", NOBODY, NOBODY)
    machine = PrivateMachine("sgehost", top)
    try:
        with machine.in_network():
            server = running_sshd(top / "sshd", login=Login.mine())
            sshd = server.__enter__()
        shutil.chown(sshd.identity, NOBODY, NOBODY)
        cell = GridEngineCell(machine)
        cell.hooks(**hooks(machine, all_identities["root"].bin, settings(top, sshd)))
        yield Cluster(machine, cell, sshd, top / "data", top / "home")
        server.__exit__(None, None, None)
    finally:
        machine.end()


def settings(top: Path, sshd: Sshd) -> Path:
    path = top / "stagefs.conf"
    path.write_text(
        f'[state]\nbase = "{top}/state"\n'
        f'[remote.ssh]\nconfig = "{sshd.ssh_config}"\nattempts = 1\n'
        "connect_timeout_s = 2\n"
        f"[batch]\nwait_s = 0\nattempts = {ATTEMPTS}\nepilog_deadline_s = 10\n"
        # So that nothing at all is left after each test.
        "cache_keep_s = 0\n"
        f'[path_map]\n"sgehost:/data" = "{sshd.url_of(top / "data")}"\n'
    )
    return path


def hooks(machine: PrivateMachine, programs: Path, configuration: Path) -> dict[str, str]:
    """The script that is shipped, with the two things that an administrator writes into it."""
    text = (CHECKOUT / "mount/gridengine/stagefs-hook").read_text()
    for old, new in (
        ("stagefs=/usr/local/bin/stagefs", f"stagefs={programs}/stagefs"),
        ('--scheduler "$2"', f'--scheduler "$2" --config {configuration}'),
    ):
        assert old in text
        text = text.replace(old, new)
    edited = machine.directory / "stagefs-hook"
    edited.write_text(text)
    # Where the README puts it: which of the shepherd's words are damaged depends on lengths.
    machine.run("mount", "-t", "tmpfs", "-o", "mode=755", "local", "/usr/local/lib")
    machine.run("install", "-D", "-m", "755", edited, HOOK)
    return {phase: f"root@{HOOK} {phase} grid-engine" for phase in ("prolog", "epilog")}


@pytest.fixture(autouse=True)
def clean(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.assert_nothing_is_left()
    assert cluster.cell.is_healthy()


def test_streams_that_drmaa_delegates(cluster: Cluster) -> None:
    data = cluster.data
    (data / "in.txt").write_text("hello staging\n")
    (data / "in put.txt").write_text("blank in name\n")
    for number in (1, 2, 3):
        (data / f"in.{number}").write_text(f"bulk {number}\n")
    command = str(cluster.script("upper.sh", UPPER))
    ended = cluster.drmaa(
        {
            "command": command,
            "transfer": "ioe",
            "input": ":/data/in.txt",
            "output": ":/data/out/x.txt",
            "error": ":/data/out/x.err",
        },
        {
            "command": command,
            "transfer": "ioe",
            "input": ":/data/in put.txt",
            "output": ":/data/out put.txt",
            "error": ":/data/err put.txt",
        },
        {
            "command": command,
            "transfer": "io",
            "input": ":/data/in.{index}",
            "output": ":/data/bulk.{index}",
            "join": True,
            "bulk": 3,
        },
    )
    why = [cluster.why_aborted(one["job"]) for one in ended if one["aborted"]]
    assert [(one["aborted"], one["exit_code"]) for one in ended] == [(False, 0)] * 5, why
    assert "HELLO STAGING\n" in (data / "out/x.txt").read_text()
    assert (data / "out/x.err").read_text() == "on stderr\n"
    assert "BLANK IN NAME\n" in (data / "out put.txt").read_text()
    assert (data / "err put.txt").read_text() == "on stderr\n"
    for number in (1, 2, 3):
        joined = (data / f"bulk.{number}").read_text()
        assert f"BULK {number}\n" in joined
        assert "on stderr\n" in joined


def test_a_missing_input_is_the_jobs_error_and_not_the_queues(cluster: Cluster) -> None:
    ended = cluster.drmaa(
        {
            "command": "/bin/true",
            "transfer": "i",
            "input": ":/data/absent",
            "output": f":{cluster.home}/absent.out",
        }
    )
    assert ended[0]["aborted"]
    job = cluster.submit("-b", "y", "/bin/true", variables=f"STAGEFS_IN=x={cluster.url('absent')}")
    reason = cluster.wait_for_error(job)
    assert cluster.url("absent") in reason
    assert cluster.cell.is_healthy()
    cluster.as_user("qdel", job)
    cluster.wait_for_end(job)


def test_a_deleted_job_leaves_its_outputs_and_no_mount(cluster: Cluster) -> None:
    (cluster.data / "part in").write_text("half\n")
    script = cluster.script(
        "long.sh",
        '#!/bin/bash\ncd "$TMPDIR/stagefs"\ncat in >part.log\n'
        f"touch {cluster.home}/working\nsleep 600\n",
    )
    url = cluster.url("part in")
    job = cluster.submit(
        script, variables=f"STAGEFS_IN=in={url},STAGEFS_OUT=*.log={cluster.url('kept/')}"
    )
    wait_until((cluster.home / "working").exists, "the job at work", deadline_s=SETTLED_S)
    assert len(cluster.machine.staging_mounts()) == 1
    cluster.as_user("qdel", job)
    cluster.wait_for_end(job)
    wait_until((cluster.data / "kept/part.log").exists, "its output", deadline_s=SETTLED_S)
    assert (cluster.data / "kept/part.log").read_text() == "half\n"


def test_a_server_that_is_away_is_waited_for_and_not_for_ever(cluster: Cluster) -> None:
    (cluster.data / "late").write_text("late\n")
    variables = f"STAGEFS_IN=late={cluster.url('late')},STAGEFS_OUT=done={cluster.url('back/')}"
    script = cluster.script("late.sh", '#!/bin/bash\ncd "$TMPDIR/stagefs" && cp late done\n')
    attempts = Path(f"/proc/{cluster.machine.pid}/root/run/stagefs/.attempts")
    cluster.sshd.freeze()
    try:
        job = cluster.submit(script, variables=variables)
        wait_until((attempts / f"{job}.0").exists, "a prolog that failed", deadline_s=SETTLED_S)
    finally:
        cluster.sshd.thaw()
    cluster.wait_for_end(job)
    assert (cluster.data / "back/done").read_text() == "late\n"


def test_a_server_that_stays_away_puts_the_job_into_error(cluster: Cluster) -> None:
    cluster.sshd.freeze()
    try:
        url = cluster.url("never")
        job = cluster.submit("-b", "y", "/bin/true", variables=f"STAGEFS_IN=x={url}")
        reason = cluster.wait_for_error(job)
    finally:
        cluster.sshd.thaw()
    assert f"tried {ATTEMPTS} times" in reason
    cluster.as_user("qdel", job)
    cluster.wait_for_end(job)


def test_outputs_that_nobody_takes_are_kept_and_go_out_later(cluster: Cluster) -> None:
    frozen, go, again = (cluster.home / name for name in ("at-work", "go", "again"))
    script = cluster.script(
        "keep.sh",
        '#!/bin/bash\ncd "$TMPDIR/stagefs"\n'
        f"if [ -e {go} ]; then touch {again}; exit 0; fi\n"
        f"echo precious >result; touch {frozen}\n"
        f"until [ -e {go} ]; do sleep 0.1; done\n",
    )
    job = cluster.submit(script, variables=f"STAGEFS_OUT=result={cluster.url('kept/')}")
    wait_until(frozen.exists, "the job at work", deadline_s=SETTLED_S)
    cluster.sshd.freeze()
    try:
        go.touch()
        reason = cluster.wait_for_error(job)
    finally:
        cluster.sshd.thaw()
    assert "1 outputs of job" in reason
    (kept,) = (cluster.machine.directory / "state").glob("stagefs-*/*")
    assert str(kept) in reason
    assert not cluster.machine.staging_mounts()
    assert not (cluster.data / "kept/result").exists()
    # The prolog of the next run brings them away first.
    cluster.cell.run("qmod", "-cj", job, check=False)  # it ends with 1 when it has done so
    cluster.wait_for_end(job)
    assert (cluster.data / "kept/result").read_text() == "precious\n"
    assert again.exists()


def test_the_page(cluster: Cluster) -> None:
    text = (CHECKOUT / "docs/GRID-ENGINE.md").read_text()
    (program,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert "ssh://host/data/" in program
    program = program.replace("ssh://host/data/", cluster.url(""))
    (cluster.data / "input.dat").write_bytes(b"page\n")
    cluster.wait_for_end(cluster.submit(cluster.script("sum.sh", program)))
    digest = hashlib.sha256(b"page\n").hexdigest()
    assert (cluster.data / "sums/input.sum").read_text() == f"{digest}  input.dat\n"


def test_plain_qsub_with_names_that_hold_blanks_and_commas(cluster: Cluster) -> None:
    (cluster.data / "a, b").write_text("one\n")
    (cluster.home / "near by").write_text("two\n")
    remote = cluster.url("a, b").replace(",", "%2C")
    script = cluster.script(
        "plain.sh",
        "#!/bin/bash\n#$ -j y -o plain.out\n"
        'cd "$TMPDIR/stagefs" && cat "far, off" near absolute >made.txt && ls\n',
    )
    inputs = f"far%2C%20off={remote} near=near%20by absolute=/data/a%2C%20b"
    outputs = f"made.*={cluster.url('plain/')} made.txt=staged%20out/copy"
    job = cluster.submit(script, variables=f"STAGEFS_IN={inputs},STAGEFS_OUT={outputs}")
    cluster.wait_for_end(job)
    expected = "one\ntwo\none\n"
    assert (cluster.data / "plain/made.txt").read_text() == expected
    assert (cluster.home / "staged out/copy").read_text() == expected
    # Nothing of StageFS is in the job's own output.
    assert (cluster.home / "plain.out").read_text().split("\n") == [
        "absolute",
        "far, off",
        "made.txt",
        "near",
        "",
    ]


def test_a_manifest_and_a_job_that_asks_for_nothing(cluster: Cluster) -> None:
    (cluster.data / "listed").write_text("listed\n")
    (cluster.home / "job.toml").write_text(
        f'[inputs]\nin = "{cluster.url("listed")}"\n[outputs]\nout = "{cluster.url("by/")}"\n'
    )
    script = cluster.script("manifest.sh", '#!/bin/bash\ncd "$TMPDIR/stagefs" && cp in out\n')
    job = cluster.submit(script, variables="STAGEFS_MANIFEST=job.toml")
    cluster.wait_for_end(job)
    assert (cluster.data / "by/out").read_text() == "listed\n"
    bare = cluster.script("bare.sh", '#!/bin/bash\n#$ -j y -o bare.out\nls -A "$TMPDIR"\n')
    cluster.wait_for_end(cluster.submit(bare))
    assert (cluster.home / "bare.out").read_text() == ""
