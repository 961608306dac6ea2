"""A Grid Engine cell of one host, from Debian's unmodified packages, on a private machine.

Its administrator and its jobs' user are ordinary accounts; the daemons run as root, as on a real
cluster, or as the one user who has a cell of his own.  ``hooks`` makes it call a prolog and an
epilog for every job.
"""

import contextlib
import pwd
from pathlib import Path

from tests.support.private_machine import PrivateMachine
from tests.support.waiting import wait_until

PROGRAMS = Path("/usr/lib/gridengine")
SHARED = Path("/usr/share/gridengine")
ADMINISTRATOR = "sgeadmin"
DIRECTORIES = (
    "root/bin",
    "root/utilbin",
    "root/lib",
    "root/default/common",
    "spool/qmaster/job_scripts",
    "spool/db",
    "spool/execd",
)
# Of the jobs.  As long as Grid Engine's own /tmp, which is not this machine's alone.
SCRATCH = "/mnt"
HOST = """hostname {name}
load_scaling NONE
complex_values NONE
user_lists NONE
xuser_lists NONE
projects NONE
xprojects NONE
usage_scaling NONE
report_variables NONE
"""
ACCOUNTING = (
    "accounting=true reporting=false accounting_flush_time=00:00:00 flush_time=00:00:01"
    " joblog=false sharelog=00:00:00"
)


class GridEngineCell:
    """``top`` is a directory of its own.  ``user``: who runs it, and whose jobs alone it can run,
    unless that is root.  Two on one machine need different ``ports``, of qmaster and execd."""

    def __init__(
        self,
        machine: PrivateMachine,
        top: Path,
        *,
        user: int = 0,
        ports: tuple[int, int] = (6444, 6445),
    ) -> None:
        self._machine = machine
        self._top = top
        self._user = user
        self._administrator = pwd.getpwuid(user).pw_name if user else ADMINISTRATOR
        self._root = self._top / "root"
        self._queues = 0
        self.environment = {
            "SGE_ROOT": str(self._root),
            "SGE_CELL": "default",
            "SGE_QMASTER_PORT": str(ports[0]),
            "SGE_EXECD_PORT": str(ports[1]),
            # Answers of qconf are not wrapped.
            "SGE_SINGLE_LINE": "1",
        }
        self._make_directories()
        self._start_master()
        self._start_execution()

    def run(self, *command: str | Path, check: bool = True) -> str:
        """A command of Grid Engine as its administrator's host."""
        return self._machine.run(
            *command,
            uid=self._user,
            environment=self.environment,
            directory=self._top,
            check=check,
        )

    def _make_directories(self) -> None:
        for name in DIRECTORIES:
            (self._top / name).mkdir(parents=True)
        if not self._machine.is_mounted(SCRATCH):
            self._machine.run("mount", "-t", "tmpfs", "-o", "mode=1777", "scratch", SCRATCH)
        (self._root / "util").symlink_to(SHARED / "util")
        for name in ("bin", "utilbin", "lib"):
            (self._root / name / "lx-amd64").symlink_to(PROGRAMS)
        common = self._root / "default/common"
        text = (SHARED / "default-bootstrap").read_text()
        text = text.replace("/var/spool/gridengine/spooldb", str(self._top / "spool/db"))
        text = text.replace("/var/spool/gridengine/qmaster", str(self._top / "spool/qmaster"))
        text = text.replace("/usr/sbin", str(PROGRAMS))
        (common / "bootstrap").write_text(_changed(text, {"admin_user": self._administrator}))
        (common / "act_qmaster").write_text(f"{self._machine.name}\n")
        self._machine.run("chown", "-R", f"{self._administrator}:", self._root, self._top / "spool")

    def _start_master(self) -> None:
        script = SHARED.parent / "gridengine/scripts/init_cluster"
        self._machine.run(
            *(script, self._root, "default", self._top / "spool/db", self._administrator),
            uid=pwd.getpwnam(self._administrator).pw_uid,
            directory=self._top,
        )
        self.run("sge_qmaster")
        wait_until(self._answers, "an answer of qmaster", deadline_s=60)
        self.run("qconf", "-as", self._machine.name)

    def _answers(self) -> bool:
        with contextlib.suppress(AssertionError):
            self.run("qconf", "-sh")
            return True
        return False

    def _start_execution(self) -> None:
        self._configured("-Ae", HOST.format(name=self._machine.name))
        self.configure(
            {
                "execd_spool_dir": str(self._top / "spool/execd"),
                "load_report_time": "00:00:02",
                "loglevel": "log_info",
                "reporting_params": ACCOUNTING,
            }
        )
        self.run("sge_execd")
        quick = {"schedule_interval": "0:0:1", "flush_submit_sec": "1", "flush_finish_sec": "1"}
        self._configured("-Msconf", _changed(self.run("qconf", "-ssconf"), quick))
        self.add_queue("all.q", {})
        wait_until(self.is_healthy, "a queue that takes jobs", deadline_s=60)

    def add_queue(self, name: str, values: dict[str, str]) -> None:
        queue = {
            "qname": name,
            "hostlist": self._machine.name,
            "slots": "4",
            "shell": "/bin/bash",
            "load_thresholds": "NONE",
            "shell_start_mode": "unix_behavior",
            "pe_list": "NONE",
            "tmpdir": SCRATCH,
            **values,
        }
        self._configured("-Aq", _changed(self.run("qconf", "-sq"), queue))
        self._queues += 1

    def is_healthy(self) -> bool:
        """Each queue instance is there and in no state of error or alarm."""
        lines = [line for line in self.run("qstat", "-f").splitlines() if ".q@" in line]
        ready = [line for line in lines if len(line.split()) == 5 and "lx-amd64" in line]
        return len(ready) == len(lines) == self._queues

    def configure(self, values: dict[str, str]) -> None:
        """Settings of the global configuration."""
        path = self._top / "global"
        path.write_text(_changed(self.run("qconf", "-sconf", "global"), values))
        self.run("qconf", "-Mconf", path)

    def _configured(self, option: str, text: str) -> None:
        path = self._top / "configured"
        path.write_text(text)
        self.run("qconf", option, path)

    def hooks(self, *, prolog: str, epilog: str) -> None:
        """Returns when the execution daemon has heard of them."""
        wanted = {"prolog": prolog, "epilog": epilog, "delegated_file_staging": "true"}
        self.configure(wanted)
        messages = self._top / "spool/execd" / self._machine.name / "messages"

        def heard() -> bool:
            lines = messages.read_text().splitlines()
            said = {
                name: next((line for line in reversed(lines) if f"for {name}" in line), "")
                for name in ("prolog", "epilog")
            }
            return all(f'"{wanted[name]}"' in line for name, line in said.items())

        wait_until(heard, "the execution daemon's new configuration", deadline_s=60)

    def state_of(self, job: str) -> str | None:
        """As qstat shows it; None when the job is gone."""
        for line in self.run("qstat", "-u", "*").splitlines():
            words = line.split()
            if words[:1] == [job]:
                return words[4]
        return None


def _changed(text: str, values: dict[str, str]) -> str:
    """``name value`` lines with other values; what was not there comes at the end."""
    left = dict(values)
    lines = []
    for line in text.splitlines():
        name = line.split(None, 1)[0] if line.strip() else ""
        lines.append(f"{name} {left.pop(name)}" if name in left else line)
    return "\n".join([*lines, *(f"{name} {value}" for name, value in left.items())]) + "\n"
