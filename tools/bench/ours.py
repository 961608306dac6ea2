"""StageFS as a contender: mounted, used and unmounted through its command line only."""

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.measuring import MeasureFailed
from bench.workbench import Workbench
from tests.support import kernel

CAPACITY_FILES = 16
"""The cache may hold so many of the big file: eviction is not what is measured."""


class StageFS:
    """One mountpoint with one state directory.  Made by ``stagefs``, which also ends it."""

    def __init__(
        self,
        bench: Workbench,
        *,
        environment: Mapping[str, str] | None = None,
        options: tuple[str, ...] = (),
    ) -> None:
        self._bench = bench
        self.top = bench.fresh("stagefs")
        self.point = bench.identity.directory(self.top / "mnt")
        self.state = bench.identity.directory(self.top / "state")
        self.state.chmod(0o700)
        self._environment = {"STAGEFS_MOUNT": str(self.point), **(environment or {})}
        capacity = max(bench.amounts.size_bytes * CAPACITY_FILES, 1 << 30)
        self._options = ("--capacity", str(capacity), *options)

    def mount(self) -> float:
        """Seconds until the mount answered."""
        return self._command("mount", self.point, "--state", self.state, *self._options)[0]

    def umount(self) -> None:
        self._command("umount", self.point)

    def remount(self) -> float:
        """A new daemon and an empty kernel cache; the cache on disk stays."""
        self.umount()
        return self.mount()

    def stage_in(self, url: str, name: str, *options: str) -> Path:
        self._command("stage-in", *options, url, f"staging:///{name}")
        return self.point / "staging" / name

    def bind(self, url: str, name: str) -> Path:
        self._command("bind", url, f"staging:///{name}")
        return self.point / "staging" / name

    def import_catalog(self, catalog: Path, name: str) -> float:
        return self._command("import", catalog, "--prefix", f"staging:///{name}")[0]

    def begin_import(self, catalog: Path, name: str) -> subprocess.Popen[bytes]:
        return self._bench.start(
            *("stagefs", "import", catalog, "--prefix", f"staging:///{name}"),
            environment=self._environment,
        )

    def begin_fetch(self, urls: Sequence[str], directory: str) -> subprocess.Popen[bytes]:
        """Register the URLs in a directory and fetch them; ending the command ends the fetch."""
        with (self.top / "fetch.log").open("wb") as said:
            return self._bench.start(
                *("stagefs", "stage-in", "--wait", *urls, f"staging:///{directory}"),
                environment=self._environment,
                errors=said,
            )

    def fetch_words(self) -> str:
        """What the last ``begin_fetch`` complained of."""
        return (self.top / "fetch.log").read_text(errors="replace")[-300:].strip()

    def create_sandboxes(self, name: str, template: Path, count: int) -> float:
        words = ("sandbox", "create", name, "--template", template, "--count", str(count))
        return self._command(*words)[0]

    def keep_only(self, name: str) -> None:
        """Pin this name, and drop all else from the cache."""
        self._tend("pin", f"staging:///{name}")
        self._tend("evict", "--all")

    def _tend(self, *words: str) -> None:
        self._bench.run("stagefs-cache", *words, environment=self._environment)

    def counter(self, name: str) -> int:
        return int(self.status()["counters"][name])

    def status(self) -> dict[str, Any]:
        found = json.loads(self._command("status", "--json")[1])
        assert isinstance(found, dict)
        return found

    def daemon(self) -> int:
        return int(self.status()["pid"])

    def _command(self, *words: str | Path) -> tuple[float, bytes]:
        try:
            return self._bench.timed("stagefs", *words, environment=self._environment)
        except MeasureFailed as failure:
            raise MeasureFailed(f"{failure}{self._last_words()}") from failure

    def _last_words(self) -> str:
        log = self.state / "supervisor.log"
        lines = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []
        return f" (log: {' | '.join(lines)})" if lines else ""

    def at_end(self) -> None:
        """Whatever happened: unmounted, its programs ended, its files gone."""
        mount = kernel.mount_at(self.point)
        if mount is not None:
            with contextlib.suppress(MeasureFailed):
                self.umount()
        for left in kernel.end_all_below(self.top):
            self._bench.say(f"ended what StageFS left: {left}")
        self._bench.remove(self.top)


@contextlib.contextmanager
def stagefs(
    bench: Workbench,
    *,
    environment: Mapping[str, str] | None = None,
    options: tuple[str, ...] = (),
) -> Iterator[StageFS]:
    """A fresh mount with an empty cache."""
    ours = StageFS(bench, environment=environment, options=options)
    try:
        ours.mount()
        yield ours
    finally:
        ours.at_end()


class RequestCount:
    """How many requests a daemon has read from its device, by the kernel's own accounting.

    Each takes one read(2), which /proc/PID/io counts; so does whatever else the daemon reads,
    so an idle moment of equal length is counted beside it.
    """

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/io")

    def reads(self) -> int:
        found = re.search(r"^syscr: (\d+)$", self._path.read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])


class Memory:
    """What a process occupies, in bytes."""

    def __init__(self, pid: int) -> None:
        self._text = Path(f"/proc/{pid}/status").read_text()

    def _value(self, key: str) -> int:
        found = re.search(rf"^{key}:\s+(\d+) kB$", self._text, re.MULTILINE)
        assert found is not None, key
        return int(found[1]) << 10

    @property
    def resident_bytes(self) -> int:
        return self._value("VmRSS")

    @property
    def peak_bytes(self) -> int:
        return self._value("VmHWM")
