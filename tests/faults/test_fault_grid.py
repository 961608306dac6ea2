"""C2: what fails on the way to a server, and what a task is told; the expected result of each cell
was written down before it ran.

On one mount for each protocol, through a proxy that breaks connections and, for HTTP, one that
lies in answers.  ``first`` is the fetch that a read waits for, ``ahead`` one that runs ahead of
the reader, ``upload`` a file of a writable binding.  Expected is ``bytes`` (the right ones, as if
nothing had been), or the error of a read; after every error the next read has the right bytes.
Meanwhile another file of the same server is read, and in the end no fetch is left and no
connection more than a healthy mount has.

Cells that are tried elsewhere: object changed in mid-read (test_damage, all three: ESTALE, then the
new version); 403 after expiry (test_expired_credentials); TLS failure (contract/test_http; for ssh
its host key: unit/remote_ssh/test_faults); uploads that are refused, cut at byte N or forbidden,
flipped bits (test_upload_faults; contract/test_put_faults also stalls and lost answers).
Left out, because the same code of the same client is tried over http: black hole, trickle and slow
header before a read over s3 (black hole and slow header are tried in its uploads).
Cells that do not exist: whatever is said in HTTP, over ssh; uploads over http, which only reads.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.lying_proxy import Kind as Lie
from tests.support.mounted import Mounted, sha256
from tests.support.proxied import Proxied, proxied
from tests.support.served import SharedGateway, content
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
SIZE_BYTES, AHEAD_SIZE_BYTES = 4 * MIB, 24 * MIB
FIRST, AHEAD = 100_000, 3 * MIB
# A login over ssh takes seconds on a busy machine.
SILENCE_S, LOGIN_S, READ_DEADLINE_S, HANG_S = 2.0, 5.0, 15.0, 60.0
SETTINGS = (
    f"[remote.ssh]\nconnect_timeout_s = {LOGIN_S}\nrestart_s = {SILENCE_S}\n"
    f"[remote]\nconnect_timeout_s = {SILENCE_S}\nprogress_timeout_s = {SILENCE_S}\nattempts = 3\n"
    f"[read]\nread_deadline_s = {READ_DEADLINE_S}\nfailure_hold_s = 0.05\n"
    "[stage_out]\nsettle_s = 0.05\nbackoff_s = 0.1\nbackoff_s_max = 0.5\n"
)
# The sum of what was read, or the name of the error.
READ = """
import errno, hashlib, sys
digest = hashlib.sha256()
try:
    with open(sys.argv[1], "rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
except OSError as error:
    print(errno.errorcode[error.errno])
else:
    print(digest.hexdigest())
"""


@dataclasses.dataclass(frozen=True)
class Cell:
    fault: str
    work: str
    expected: str
    schemes: tuple[str, ...] = ("http", "s3", "ssh")

    @property
    def name(self) -> str:
        return f"{self.fault}-{self.work}"


HTTP, UPLOADING, SSH = ("http", "s3"), ("s3", "ssh"), ("ssh",)
CELLS = (
    Cell("stall", "upload", "bytes", UPLOADING),
    Cell("swallowed", "upload", "bytes", UPLOADING),
    Cell("reset-at-once", "upload", "bytes", UPLOADING),
    Cell("restart", "upload", "bytes", UPLOADING),
    Cell("503", "upload", "bytes", ("s3",)),
    Cell("slow-header", "upload", "bytes", ("s3",)),
    Cell("refused", "first", "EIO"),
    Cell("swallowed", "first", "ETIMEDOUT", ("http", "ssh")),
    Cell("reset-at-once", "first", "bytes"),
    Cell("cut", "first", "bytes"),
    Cell("cut", "ahead", "bytes"),
    Cell("stall", "first", "bytes"),
    Cell("stall", "ahead", "bytes"),
    Cell("restart", "first", "bytes"),
    Cell("restart", "ahead", "bytes"),
    # It ends at the deadline, or sooner on another connection: that depends on what is known of
    # the server's rate by then.
    Cell("trickle", "first", "bytes or ETIMEDOUT", ("http", "ssh")),
    Cell("flip", "first", "EIO", HTTP),
    Cell("flip", "first", "bytes", SSH),
    Cell("short", "first", "bytes", HTTP),
    Cell("shifted", "first", "EIO", HTTP),
    Cell("reset-in-header", "first", "bytes", HTTP),
    Cell("slow-header", "first", "bytes", ("http",)),
    Cell("429", "first", "bytes", HTTP),
    Cell("503", "first", "bytes", HTTP),
    Cell("403", "first", "EACCES", ("http",)),
    Cell("403", "first", "bytes", ("s3",)),  # signed anew, once
)
STATUS = {"403": "403 Forbidden", "429": "429 Too Many", "503": "503 Slow Down"}
LIES: dict[str, Lie] = {
    "short": "short",
    "shifted": "shifted",
    "reset-in-header": "reset",
    "slow-header": "trickle",
}
BREAKS = ("cut", "trickle", "flip")
# As many as there are places for transfers, lookups and batches of one remote.
CONNECTIONS_MAX = 32


class Grid:
    """One mount, its server, and the cells of the protocol."""

    def __init__(self, mount: Mounted, server: Proxied) -> None:
        self._mount = mount
        self._server = server
        self._proxy = server.proxy
        self.cells = [cell for cell in CELLS if server.scheme in cell.schemes]

    def prepare(self) -> None:
        mount, server = self._mount, self._server
        if any(cell.work == "upload" for cell in self.cells):
            mount.stagefs("bind", server.url("out"), "staging:///out", "--writable")
            mount.run("ls", "MNT/staging/out")  # and it is listed, for a minute
        urls = [server.put(f"other/{cell.name}", cell.name.encode()) for cell in self.cells]
        mount.run("mkdir", "MNT/staging/other", "MNT/staging/grid")
        mount.stagefs("stage-in", *urls, "staging:///other/")
        read = [cell for cell in self.cells if cell.work != "upload"]
        urls = [server.put(f"grid/{cell.name}", of(cell)) for cell in read]
        mount.stagefs("stage-in", *urls, "staging:///grid/")
        for cell in read:
            if cell.fault == "flip":
                url = server.put(f"proved/{cell.name}", of(cell))
                mount.run("rm", f"MNT/staging/grid/{cell.name}")
                mount.stage_in(url, f"grid/{cell.name}", "--sha256", sha256(of(cell)))
        (mount.point.parent / "source").write_bytes(b"cached")
        mount.run("cp", mount.point.parent / "source", "MNT/staging/local")

    def perform(self, cell: Cell) -> str:
        """What came of it."""
        self._break(cell)
        return self._upload(cell) if cell.work == "upload" else self._read(cell)

    def _break(self, cell: Cell) -> None:
        after_bytes = AHEAD if cell.work == "ahead" else FIRST
        upwards = cell.work == "upload"
        proxy, fault = self._proxy, cell.fault
        if fault == "refused":
            proxy.refuse()
            proxy.hang_up()
        elif fault == "swallowed":
            proxy.swallow()
            proxy.hang_up()
        elif fault == "reset-at-once":
            proxy.reset(after_bytes=10)
        elif fault in ("restart", "stall"):
            proxy.stall(after_bytes=after_bytes, upwards=upwards)
        elif fault in BREAKS:
            getattr(proxy, fault)(after_bytes=after_bytes, upwards=upwards)
        else:
            liar, method = self._server.liar, "PUT" if upwards else "GET"
            assert liar is not None
            if fault in STATUS:
                header = "" if fault == "403" else "Retry-After: 1"
                liar.answer(STATUS[fault], header, name=cell.name, method=method)
            else:
                liar.lie(LIES[fault], name=cell.name, method=method)

    def _was_hit(self, cell: Cell) -> None:
        liar = self._server.liar
        if cell.fault == "swallowed":
            wait_until(lambda: self._proxy.unanswered() > 0, "a connection that nobody answers")
        elif cell.fault in LIES or cell.fault in STATUS:
            wait_until(lambda: liar is not None and liar.hits > 0, "the lie")
        elif cell.fault != "refused":  # of which a socket tells nobody
            self._proxy.wait_for_hit()

    def _heal(self, cell: Cell) -> None:
        if cell.fault in ("refused", "swallowed"):
            self._proxy.accept_again()
        self._proxy.release()

    def _restart(self) -> None:
        self._proxy.refuse()
        self._proxy.hang_up()
        self._proxy.release()
        self._proxy.accept_again()

    def _read(self, cell: Cell) -> str:
        path = f"MNT/staging/grid/{cell.name}"
        reader = self._mount.start("python", "-c", READ, path, talks=True)
        try:
            self._was_hit(cell)
            assert self._mount.read("staging/local") == b"cached", "a file of nobody's is disturbed"
            if cell.fault == "restart":
                self._restart()
            if cell.fault not in ("refused", "swallowed"):
                other = self._mount.read(f"staging/other/{cell.name}")
                assert other == cell.name.encode(), "another file of the server is disturbed"
            output, _ = reader.communicate(timeout=HANG_S)
        finally:
            reader.kill()
            reader.communicate()
            self._heal(cell)
        found = output.decode().strip()
        if found == sha256(of(cell)):
            return "bytes"

        def is_right_now() -> bool:
            done = self._mount.run("python", "-c", READ, path)
            return done.stdout.decode().strip() == sha256(of(cell))

        wait_until(is_right_now, f"{cell.name}: the right bytes after {found}", deadline_s=HANG_S)
        return found

    def _upload(self, cell: Cell) -> str:
        source = self._mount.point.parent / "source"
        source.write_bytes(of(cell))
        self._mount.run("cp", source, f"MNT/staging/out/{cell.name}")
        self._was_hit(cell)
        assert self._mount.read(f"staging/out/{cell.name}") == of(cell), "the local copy is gone"
        if cell.fault == "restart":
            self._restart()
        elif cell.fault == "swallowed":
            self._heal(cell)

        def is_there() -> bool:
            try:
                return self._server.served.get(f"out/{cell.name}") == of(cell)
            except FileNotFoundError:
                return False

        wait_until(is_there, f"{cell.name} at the server", deadline_s=HANG_S)
        self._heal(cell)
        return "bytes"

    def leaves_nothing(self) -> bool:
        """No fetch, no upload, and as many connections as a healthy mount may keep."""
        status = json.loads(self._mount.read(".stagefs/status"))
        left = status["transfers"], status["waiting_reads"], status["counters"]["in_flight_bytes"]
        return left == ([], 0, 0) and self._proxy.open_connections <= CONNECTIONS_MAX


def of(cell: Cell) -> bytes:
    return content(AHEAD_SIZE_BYTES if cell.work == "ahead" else SIZE_BYTES, cell.name)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("scheme", ["http", "s3", "ssh"])
def test_grid(
    scheme: str,
    anybody: Identity,
    new_mount: MakeMount,
    served_directory: Path,
    gateway: SharedGateway,
) -> None:
    with proxied(scheme, served_directory, gateway) as server:
        mount = new_mount(anybody, settings=SETTINGS, environment=server.environment(anybody))
        grid = Grid(mount, server)
        grid.prepare()
        wrong = []
        for cell in grid.cells:
            found = grid.perform(cell)
            if found not in cell.expected.split(" or "):
                wrong.append(f"{cell.name}: {found}, not {cell.expected}")
        assert not wrong, (mount.state / "stagefs.log").read_text()
        wait_until(grid.leaves_nothing, "the end of all fetches")
        mount.umount()
        wait_until(lambda: not server.proxy.open_connections, "the end of all connections")
