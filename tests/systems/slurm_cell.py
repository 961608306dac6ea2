"""A Slurm cluster on a private machine, from Debian's unmodified packages: munged, slurmctld and
two slurmd.  As on a real cluster slurmctld is its own user's and slurmd is root's, or everything
is the one user's whose jobs they are; else jobs are an ordinary user's.

The second node has mounts and a /run of its own.
"""

import contextlib
import os
import pwd
import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.support.private_machine import PrivateMachine
from tests.support.waiting import wait_until

NODES = ("node1", "node2")
DIRECTORIES = ("ctld", "spool", "log", "munge")
CONFIGURATION = """ClusterName=stagefs
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={top}/munge.sock
CredType=cred/munge
SlurmUser={user}
SlurmdUser={slurmd_user}
StateSaveLocation={top}/ctld
SlurmdSpoolDir={top}/spool/%n
SlurmctldPidFile={top}/slurmctld.pid
SlurmdPidFile={top}/slurmd.%n.pid
SlurmctldLogFile={top}/log/slurmctld.log
SlurmdLogFile={top}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=2
{nodes}
PartitionName=one Nodes=node1 Default=YES MaxTime=INFINITE State=UP
PartitionName=both Nodes=ALL MaxTime=INFINITE State=UP
"""


class SlurmCell:
    """``settings`` are further lines of slurm.conf; ``plugins`` are files beside it; ``user`` is
    SlurmUser.  ``own_places``: directories for which the second node has another one; without any
    there is no second node.  ``top`` is a directory of ``slurmd_user``'s; ``ports`` is the first of
    three."""

    def __init__(
        self,
        machine: PrivateMachine,
        top: Path,
        *,
        settings: Mapping[str, str],
        plugins: Mapping[str, str],
        own_places: Mapping[Path, Path],
        user: str,
        slurmd_user: str = "root",
        ports: int = 17001,
    ) -> None:
        self._machine = machine
        self.top = top
        self._own_places = own_places
        self._uid = pwd.getpwnam(slurmd_user).pw_uid
        nodes = NODES if own_places else NODES[:1]
        self.environment = {"SLURM_CONF": str(self.top / "slurm.conf")}
        for name in DIRECTORIES:
            (self.top / name).mkdir(mode=0o755)
            shutil.chown(self.top / name, slurmd_user)
        for name in ("ctld", "log"):
            shutil.chown(self.top / name, user)
        lines = [
            f"NodeName={node} NodeHostname={machine.name} NodeAddr=127.0.0.1 Port={port}"
            " CPUs=4 State=UNKNOWN"
            for port, node in enumerate(nodes, ports + 1)
        ]
        text = CONFIGURATION.format(
            top=self.top,
            name=machine.name,
            nodes="\n".join(lines),
            user=user,
            slurmd_user=slurmd_user,
            port=ports,
        )
        text += "".join(f"{name}={value}\n" for name, value in settings.items())
        (self.top / "slurm.conf").write_text(text)
        for name, content in plugins.items():
            (self.top / name).write_text(content)
        self._start()

    def _start(self) -> None:
        key = self.top / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        os.chown(key, self._uid, -1)
        (self.top / "munge").chmod(0o700)
        names = ("key-file=munge/key", "socket=munge.sock", "pid-file=munge/pid",
                 "log-file=munge/log", "seed-file=munge/seed")  # fmt: skip
        options = [f"--{name.replace('=', f'={self.top}/')}" for name in names]
        self.run("munged", "--force", *options)
        self.run("slurmctld")
        wait_until(self._answers, "an answer of slurmctld", deadline_s=60)
        self.run("slurmd", "-N", NODES[0])
        if self._own_places:
            self._start_second()
        wait_until(lambda: self.states() == {"idle"}, "idle nodes", deadline_s=60)

    def _start_second(self) -> None:
        own = "".join(
            f" mount --bind {other} {place};" for place, other in self._own_places.items()
        )
        script = f"mount -t tmpfs -o mode=755 run /run;{own} exec slurmd -N {NODES[1]}"
        self.run("unshare", "--mount", "sh", "-ec", script)

    def run(self, *command: str | Path, check: bool = True) -> str:
        """A command of Slurm as its administrator's."""
        return self._machine.run(
            *command,
            uid=self._uid,
            environment=self.environment,
            directory=self.top,
            check=check,
        )

    def _answers(self) -> bool:
        with contextlib.suppress(AssertionError):
            return "UP" in self.run("scontrol", "ping")
        return False

    def states(self) -> set[str]:
        """Of the nodes, each with the reason for which it is out of service."""
        said = self.run("sinfo", "-h", "-N", "-o", "%t %E").splitlines()
        return {line.removesuffix(" none") for line in said}

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def is_over(self, job: str) -> bool:
        """It has ended, and its epilog has, too (an array: all of its tasks)."""
        listed = self.run("squeue", "-h", "-o", "%A %F").split()
        return job not in listed

    def log(self) -> str:
        return "\n".join(
            path.read_text("utf-8", "replace") for path in (self.top / "log").iterdir()
        )
