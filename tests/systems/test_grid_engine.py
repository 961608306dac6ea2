"""Grid Engine itself, from Debian's packages: its jobs are staged by `stagefs prolog` and `stagefs
epilog`, in a cell of one host on a private network, with a real sshd as the other host (G1 to G6).

The same machine has a second cell, all of which is an ordinary user's.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.identity import CHECKOUT, NOBODY, Identity
from tests.support.private_machine import PrivateMachine
from tests.support.served import content
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
# As the README puts it, for a queue or a cell without root.
OWNERS_HOOK = "/usr/local/lib/stagefs/owners/stagefs-hook"
OWNERS_QUEUE = "owners.q"
# Queues whose jobs a server that is away does not keep for long: so many attempts, or ever more.
TRYING = {"soon.q": 2, "ever.q": 20}
SETTLED_S = 60.0
QSTAT_PAUSE_S = 0.2


@dataclasses.dataclass
class Cluster:
    """A cell, and another host whose /data is ``data`` here."""

    machine: PrivateMachine
    cell: GridEngineCell
    sshd: Sshd
    data: Path
    home: Path
    # Whose prolog and epilog its jobs have, and where.
    name: str = "root"
    queue: str = "all.q"

    def submit(self, *words: str | Path, variables: str = "") -> str:
        """The job's number."""
        options = ["-v", variables] if variables else []
        said = self.as_user("qsub", "-terse", "-cwd", "-q", self.queue, *options, *words)
        return said.strip().partition(".")[0]

    def as_user(self, *words: str | Path) -> str:
        return self.machine.run(
            *words,
            uid=NOBODY,
            environment={**self.cell.environment, "HOME": str(self.home)},
            directory=self.home,
        )

    def drmaa(self, *jobs: Mapping[str, object]) -> Any:
        described = self.home / "jobs.json"
        described.write_text(json.dumps([{**job, "queue": self.queue} for job in jobs]))
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
            lambda: self.cell.state_of(job) is None,
            f"the end of job {job}",
            deadline_s=SETTLED_S,
            pause_s=QSTAT_PAUSE_S,
        )

    def wait_for_error(self, job: str) -> str:
        """The reason, once the job is in error."""
        wait_until(
            lambda: "E" in (self.cell.state_of(job) or ""),
            f"the state of error of job {job}",
            deadline_s=SETTLED_S,
            pause_s=QSTAT_PAUSE_S,
        )
        lines = self.as_user("qstat", "-j", job).splitlines()
        (reason,) = [line for line in lines if line.startswith("error reason")]
        return reason

    def why_aborted(self, job: str) -> str:
        """What is known of a job that should have run."""
        number = job.partition(".")[0]
        lines = [
            *self.cell.run("qacct", "-j", number, check=False).splitlines(),
            *self.cell.run("qstat", "-j", number, check=False).splitlines(),
        ]
        wanted = ("failed", "exit_status", "error reason")
        return ", ".join(line for line in lines if line.startswith(wanted))

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
        assert self.states("state") == []
        # That of an owner is the place of his mounts, too; and his cache is kept.
        left = [path for path in self.states("owners-state") if path.suffix != ".cache"]
        assert [path.name for path in left] in ([], ["jobs"])
        mounts = [name.name for path in left for name in path.iterdir()]
        assert [name for name in mounts if name != ".attempts"] == []

    def states(self, name: str) -> list[Path]:
        return sorted((self.machine.directory / name).glob("stagefs-*/*"))


@pytest.fixture(scope="module")
def cluster(session_directory: Path, all_identities: dict[str, Identity]) -> Iterator[Cluster]:
    top = session_directory / "grid-engine"
    for name in ("", "data", "home", "sshd", "state", "owners-state", "cell", "owners-cell"):
        (top / name).mkdir()
    for name in ("state", "owners-state"):
        (top / name).chmod(0o1777)
    shutil.chown(top / "home", NOBODY, NOBODY)
    machine = PrivateMachine("sgehost", top)
    try:
        with machine.in_network():
            server = running_sshd(top / "sshd", login=Login.mine(), counted=True)
            sshd = server.__enter__()
        shutil.chown(sshd.identity, NOBODY, NOBODY)
        # Where the README puts it: which of the shepherd's words are damaged depends on lengths.
        machine.run("mount", "-t", "tmpfs", "-o", "mode=755", "local", "/usr/local/lib")
        programs = all_identities["root"].bin
        cell = GridEngineCell(machine, top / "cell")
        install(machine, HOOK, programs, settings(top, sshd, "all.q"))
        kept = settings(top, sshd, OWNERS_QUEUE, state="owners-state", keep_s=3600)
        install(machine, OWNERS_HOOK, programs, kept)
        cell.add_queue(OWNERS_QUEUE, hooks(OWNERS_HOOK))
        for queue, attempts in TRYING.items():
            program = HOOK.replace("/stagefs/", f"/{queue}/")
            install(machine, program, programs, settings(top, sshd, queue, attempts=attempts))
            cell.add_queue(queue, hooks(f"root@{program}"))
        cell.hooks(**hooks(f"root@{HOOK}"))
        yield Cluster(machine, cell, sshd, top / "data", top / "home")
        server.__exit__(None, None, None)
    finally:
        machine.end()


def settings(
    top: Path, sshd: Sshd, name: str, *, state: str = "state", keep_s: int = 0, attempts: int = 0
) -> Path:
    """``attempts``: of a prolog, each of which waits only a moment for a server.  Else even opens
    wait: under load a login takes longer than they usually do."""
    batch, ssh = "", "[read]\nanswer_deadline_s = 60\n"
    if attempts:
        batch = f"attempts = {attempts}\nepilog_deadline_s = 10\n"
        ssh = "attempts = 1\nconnect_timeout_s = 2\n"
    path = top / f"{name}.conf"
    path.write_text(
        f'[state]\nbase = "{top}/{state}"\n'
        f'[remote.ssh]\nconfig = "{sshd.ssh_config}"\n{ssh}'
        f"[batch]\nwait_s = 0\ncache_keep_s = {keep_s}\n{batch}"
        f'[path_map]\n"sgehost:/data" = "{sshd.url_of(top / "data")}"\n'
    )
    return path


def install(machine: PrivateMachine, place: str, programs: Path, configuration: Path) -> None:
    """The script that is shipped, with the two things that an administrator writes into it."""
    text = (CHECKOUT / "mount/gridengine/stagefs-hook").read_text()
    for old, new in (
        ("stagefs=/usr/local/bin/stagefs", f"stagefs={programs}/stagefs"),
        ('--scheduler "$scheduler"', f'--scheduler "$scheduler" --config {configuration}'),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    edited = machine.directory / "stagefs-hook"
    edited.write_text(text)
    machine.run("install", "-D", "-m", "755", edited, place)


def hooks(program: str) -> dict[str, str]:
    return {phase: f"{program} {phase} grid-engine" for phase in ("prolog", "epilog")}


@pytest.fixture(scope="module")
def owners_cell(cluster: Cluster) -> GridEngineCell:
    """One that an ordinary user runs, with the same hosts around it."""
    top = cluster.machine.directory / "owners-cell"
    shutil.chown(top, NOBODY, NOBODY)
    cell = GridEngineCell(cluster.machine, top, user=NOBODY, ports=(6446, 6447))
    cell.hooks(**hooks(OWNERS_HOOK))
    return cell


@pytest.fixture
def everywhere(cluster: Cluster, owners_cell: GridEngineCell) -> list[Cluster]:
    """Prolog and epilog run as root; as the job's owner, from root's daemon; and from his own."""
    return [
        cluster,
        dataclasses.replace(cluster, name="owner", queue=OWNERS_QUEUE),
        dataclasses.replace(cluster, name="owners-cell", cell=owners_cell),
    ]


@pytest.fixture(autouse=True)
def clean(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.assert_nothing_is_left()
    assert cluster.cell.is_healthy()


def test_streams_that_drmaa_delegates(cluster: Cluster) -> None:
    data = cluster.data
    (data / "unread.txt").write_text("lazy\n")
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
        {"command": "/bin/true", "transfer": "i", "input": ":/data/unread.txt"},
    )
    why = [cluster.why_aborted(one["job"]) for one in ended if one["aborted"]]
    assert [(one["aborted"], one["exit_code"]) for one in ended] == [(False, 0)] * 6, "\n".join(why)
    assert "HELLO STAGING\n" in (data / "out/x.txt").read_text()
    assert (data / "out/x.err").read_text() == "on stderr\n"
    assert "BLANK IN NAME\n" in (data / "out put.txt").read_text()
    assert (data / "err put.txt").read_text() == "on stderr\n"
    for number in (1, 2, 3):
        joined = (data / f"bulk.{number}").read_text()
        assert f"BULK {number}\n" in joined
        assert "on stderr\n" in joined
    # Each stream was fetched once, by the job that read it.
    streams = ["in.txt", "in put.txt", "in.1", "in.2", "in.3"]
    sizes = [(data / name).stat().st_size for name in streams]
    assert [cluster.sshd.bytes_read_of(name) for name in streams] == sizes
    assert cluster.sshd.bytes_read_of("unread.txt") == 0


def test_streams_in_a_cell_of_the_jobs_owner(everywhere: list[Cluster]) -> None:
    own = everywhere[-1]
    (own.data / "own in.txt").write_text("hello owner\n")
    (ended,) = own.drmaa(
        {
            "command": str(own.script("upper.sh", UPPER)),
            "transfer": "ioe",
            "input": ":/data/own in.txt",
            "output": ":/data/own/out.txt",
            "error": ":/data/own/err.txt",
        }
    )
    assert (ended["aborted"], ended["exit_code"]) == (False, 0), own.why_aborted(ended["job"])
    assert "HELLO OWNER\n" in (own.data / "own/out.txt").read_text()
    assert (own.data / "own/err.txt").read_text() == "on stderr\n"
    assert own.sshd.bytes_read_of("own in.txt") == len("hello owner\n")


def test_an_array_fetches_its_shared_input_once(everywhere: list[Cluster]) -> None:
    data = content(3_000_000)
    digest = hashlib.sha256(data).hexdigest()
    script = '#!/bin/bash\ncd "$TMPDIR/stagefs" && sha256sum <in >"sum.$SGE_TASK_ID"\n'
    here = f'{everywhere[0].home}/"$JOB_NAME"-'
    all_there = f'[ "$(ls {here}* | wc -l)" = 3 ]'
    together = f'touch {here}"$SGE_TASK_ID"; until {all_there}; do sleep 0.1; done\n'
    jobs = []
    for one in everywhere:
        (one.data / f"shared-{one.name}").write_bytes(data)
        # Where the cache outlives the last job tasks need not be there at the same time.
        is_kept = one.name == "owner"
        jobs.append(
            one.submit(
                *("-t", "1-3", *(["-tc", "1"] if is_kept else []), "-N", f"array-{one.name}"),
                one.script(f"array-{one.name}.sh", script + ("" if is_kept else together)),
                variables=f"STAGEFS_IN=in={one.url(f'shared-{one.name}')},"
                f"STAGEFS_OUT=sum.*={one.url(f'sums-{one.name}/')}",
            )
        )
    for one, job in zip(everywhere, jobs, strict=True):
        one.wait_for_end(job)
        sums = {path.name: path.read_text() for path in (one.data / f"sums-{one.name}").iterdir()}
        said = [path.read_text() for path in one.home.glob(f"array-{one.name}.e{job}.*")]
        assert sums == {f"sum.{task}": f"{digest}  -\n" for task in (1, 2, 3)}, said
        assert one.sshd.bytes_read_of(f"shared-{one.name}") == len(data), one.name


def test_a_missing_input_is_the_jobs_error_and_not_the_queues(everywhere: list[Cluster]) -> None:
    cluster, _, owners_cell = everywhere
    url = cluster.url("absent")
    absent = {
        "command": "/bin/true",
        "transfer": "i",
        "input": ":/data/absent",
        "output": f":{cluster.home}/absent.out",
    }
    jobs = [
        one.submit("-b", "y", "/bin/true", variables=f"STAGEFS_IN=x={url}") for one in everywhere
    ]
    for one in (cluster, owners_cell):
        (ended,) = one.drmaa(absent)
        assert ended["aborted"]
        assert "failed" in one.why_aborted(ended["job"]), "qacct knows it"
    for one, job in zip(everywhere, jobs, strict=True):
        assert url in one.wait_for_error(job), one.name
        assert one.cell.is_healthy(), one.name
        one.as_user("qdel", job)
        one.wait_for_end(job)


def test_a_deleted_job_leaves_its_outputs_and_no_mount(everywhere: list[Cluster]) -> None:
    jobs = []
    for one in everywhere:
        (one.data / "part in").write_text("half\n")
        script = one.script(
            f"long-{one.name}.sh",
            '#!/bin/bash\ncd "$TMPDIR/stagefs"\ncat in >part.log\n'
            f"touch {one.home}/working-{one.name}\nsleep 600\n",
        )
        url, kept = one.url("part in"), one.url(f"kept-{one.name}/")
        jobs.append(one.submit(script, variables=f"STAGEFS_IN=in={url},STAGEFS_OUT=*.log={kept}"))
    for one in everywhere:
        working = one.home / f"working-{one.name}"
        wait_until(working.exists, "the job at work", deadline_s=SETTLED_S)
    # Both owners' jobs are of one user, with one state.
    assert len(everywhere[0].machine.staging_mounts()) == 2
    for one, job in zip(everywhere, jobs, strict=True):
        one.as_user("qdel", job)
    for one, job in zip(everywhere, jobs, strict=True):
        one.wait_for_end(job)
        part = one.data / f"kept-{one.name}/part.log"
        wait_until(part.exists, "its output", deadline_s=SETTLED_S)
        assert part.read_text() == "half\n"


def test_a_server_that_is_away_is_waited_for_and_not_for_ever(cluster: Cluster) -> None:
    """One job goes on trying until it is back, another one gives up."""
    (cluster.data / "late").write_text("late\n")
    variables = f"STAGEFS_IN=late={cluster.url('late')},STAGEFS_OUT=done={cluster.url('back/')}"
    script = cluster.script("late.sh", '#!/bin/bash\ncd "$TMPDIR/stagefs" && cp late done\n')
    attempts = Path(f"/proc/{cluster.machine.pid}/root/run/stagefs/.attempts")
    ever, soon = (dataclasses.replace(cluster, queue=queue) for queue in ("ever.q", "soon.q"))
    cluster.sshd.freeze()
    try:
        job = ever.submit(script, variables=variables)
        never = soon.submit(
            *("-b", "y", "/bin/true"), variables=f"STAGEFS_IN=x={cluster.url('never')}"
        )
        wait_until((attempts / f"{job}.0").exists, "a prolog that failed", deadline_s=SETTLED_S)
        reason = soon.wait_for_error(never)
    finally:
        cluster.sshd.thaw()
    assert f"tried {TRYING['soon.q']} times" in reason
    cluster.as_user("qdel", never)
    cluster.wait_for_end(job)
    assert (cluster.data / "back/done").read_text() == "late\n"
    cluster.wait_for_end(never)


def test_outputs_that_nobody_takes_are_kept_and_go_out_later(cluster: Cluster) -> None:
    cluster = dataclasses.replace(cluster, queue="soon.q")
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
    bare = cluster.script("bare.sh", '#!/bin/bash\n#$ -j y -o bare.out\nls -A "$TMPDIR"\n')
    cluster.wait_for_end(cluster.submit(bare))
    cluster.wait_for_end(job)
    assert (cluster.data / "by/out").read_text() == "listed\n"
    assert (cluster.home / "bare.out").read_text() == ""
