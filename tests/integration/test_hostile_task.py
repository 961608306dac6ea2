"""A task that means harm, on a mount that serves several users (E5): what it tries is refused and
logged, and nobody else notices.  On a mount of one user the kernel keeps all others out; what that
user's own tasks could do to each other is a matter of sandboxes (test_copy_up.py).
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sentence, sha256
from tests.support.served import HttpServed, content

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="several users on one mount need root")
MakeMount = Callable[..., Mounted]
MIB = 1 << 20
VICTIM = 1  # Debian's user daemon
DATA = content(3 * MIB)
SECRET = b"only root may read this\n"
OPEN_FILES = 2000

# Tries each of the calls that it is sent, a Python expression, and says how it ended.
ATTACKER = """
import json, os, socket, sys
def connected(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(path)
        one.settimeout(20)
        one.sendall(b"GET /v1/status HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        return one.recv(100).decode()
for line in sys.stdin:
    try:
        said = repr(eval(json.loads(line)))
    except OSError as error:
        said = error.__class__.__name__
    print(json.dumps(said), flush=True)
"""
# Opens as many files for writing as it may, says how many, and keeps them until it is told to end.
HOARDER = """
import os, resource, sys
top, most = sys.argv[1], int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
held = []
try:
    while True:
        held.append(os.open(f"{top}/f{len(held)}", os.O_RDWR | os.O_CREAT))
except OSError as error:
    print(len(held), error.errno, flush=True)
sys.stdin.read()
"""


@dataclasses.dataclass
class Shared:
    """Root's mount, which lets others in: a sandbox of the attacker, one of the victim."""

    mount: Mounted
    attacker: Identity
    victim: Identity
    evil: Path
    good: Path

    def tries(self, *calls: str) -> list[str]:
        """How each call of the attacker ended."""
        child = self.attacker.start("python", "-c", ATTACKER, directory=self.evil, talks=True)
        sent = "".join(json.dumps(call) + "\n" for call in calls)
        output, errors = child.communicate(sent.encode(), timeout=90)
        assert child.returncode == 0, errors.decode()
        return [json.loads(line) for line in output.splitlines()]

    def check_refused(self, *calls: str) -> None:
        ended = self.tries(*calls)
        through = [call for call, end in zip(calls, ended, strict=True) if end != "PermissionError"]
        assert not through, f"these were not refused: {list(zip(calls, ended, strict=True))}"

    def as_victim(self, *words: str | Path) -> bytes:
        return self.victim.run(*words, directory=self.good).stdout

    def log(self) -> str:
        return (self.mount.state / "stagefs.log").read_text()

    def check_victim_is_undisturbed(self) -> None:
        assert self.as_victim("sha256sum", "input.dat").split()[0].decode() == sha256(DATA)
        assert self.as_victim("cat", "secret") == b"the victim's\n"
        self.as_victim("sh", "-c", "echo more >new && cat new && rm new")


@pytest.fixture
def shared(
    all_identities: dict[str, Identity], web: HttpServed, new_mount: MakeMount, work: Path
) -> Shared:
    root, attacker = all_identities["root"], all_identities["user"]
    home = work / "home-victim"
    victim = dataclasses.replace(attacker, name="victim", uid=VICTIM, gid=VICTIM, home=home)
    victim.directory(home)
    mount = new_mount(root, "--allow-other")
    mount.stage_in(web.put("input.dat", DATA), "input.dat")
    places = []
    for name, user in (("evil", attacker), ("good", victim)):
        mount.stagefs("sandbox", "create", name, "--in", "input.dat=staging:///input.dat")
        place = mount.point / "tasks" / name
        mount.run("chown", f"{user.uid}:{user.gid}", place)
        places.append(place)
    mount.run("chmod", "0700", places[1])
    one = Shared(mount, attacker, victim, *places)
    one.as_victim("sh", "-c", "echo the victim\\'s >secret && chmod 644 secret")
    return one


def test_the_sandbox_of_another_user(shared: Shared) -> None:
    good = str(shared.good)
    shared.check_refused(
        f"open({good!r} + '/secret').read()",
        f"os.listdir({good!r})",
        f"os.stat({good!r} + '/secret')",
        f"open({good!r} + '/planted', 'w')",
        f"os.link({good!r} + '/secret', 'secret')",
        f"os.rename({good!r}, 'stolen')",
        f"os.rmdir({good!r})",
        f"os.chmod({good!r}, 0o777)",
        f"os.chown({good!r}, {shared.attacker.uid}, -1)",
        f"os.symlink('x', {str(shared.good.parent)!r} + '/planted')",
    )
    shared.check_victim_is_undisturbed()


def test_the_input_and_the_cache_cannot_be_poisoned(shared: Shared) -> None:
    mount = shared.mount
    staged = str(mount.point / "staging/input.dat")
    shared.check_victim_is_undisturbed()
    shared.tries("open('planted', 'w').write('poison')")
    refused = [
        f"{call.format(name=name)}"
        for name in (repr(staged), "'input.dat'")
        for call in (
            "os.open({name}, os.O_RDWR)",
            "os.truncate({name}, 5)",
            "os.chmod({name}, 0o666)",
            "os.utime({name}, (1, 1))",
            "os.setxattr({name}, 'user.stagefs.version', b'x')",
            "os.setxattr({name}, 'user.mine', b'x')",
        )
    ]
    shared.check_refused(
        *refused,
        f"os.unlink({staged!r})",
        f"os.rename({staged!r}, {staged!r} + '2')",
        f"os.rename('planted', {staged!r})",
        f"os.listdir({str(mount.state)!r})",
        f"os.listdir({str(mount.state / 'cache')!r})",
        f"open({str(mount.state / 'cache/index.sqlite')!r}, 'r+')",
        f"open('/proc/{mount.daemon()}/mem', 'r+b')",
        f"os.listdir('/proc/{mount.daemon()}/fd')",
    )
    shared.check_victim_is_undisturbed()
    mount.cache("verify")


def test_nobody_but_its_user_gets_the_daemons_rights_by_links(
    shared: Shared, web: HttpServed, work: Path
) -> None:
    """The daemon follows a URL with its own user's rights and credentials."""
    mount = shared.mount
    closed = work / "closed"
    closed.mkdir(mode=0o700)
    (closed / "open to all below").write_bytes(SECRET)
    (closed / "open to all below").chmod(0o644)
    mount.run("mkdir", "-m", "700", "MNT/staging/closed")
    mount.stage_in(web.put("x", SECRET), "closed/x")
    shared.check_refused(
        f"open({str(closed / 'open to all below')!r}).read()",
        f"open({str(mount.point / 'staging/closed/x')!r}).read()",
        f"os.symlink('file://{closed}/open%20to%20all%20below', 'a')",
        "os.symlink('staging:///closed/x', 'b')",
        "os.symlink('staging:///closed', 'c')",
        f"os.symlink({web.url('x')!r}, 'd')",
    )
    assert "refused user 65534 a link by URL (file)" in shared.log()
    assert shared.tries("sorted(os.listdir())") == ["['input.dat']"]
    # What he may read he may link.
    shared.tries(f"os.link({str(mount.point / 'staging/input.dat')!r}, 'mine')")
    assert shared.tries("sorted(os.listdir())")[0].count("input.dat") == 1
    shared.check_victim_is_undisturbed()


def test_symbolic_links_lead_out_with_the_tasks_own_rights_only(shared: Shared, work: Path) -> None:
    mount = shared.mount
    closed, target = work / "closed", work / "target"
    for path in (closed, target):
        path.mkdir(mode=0o700)
    (closed / "secret").write_bytes(SECRET)
    mount.run("rm", "-r", shared.evil)
    outputs = ("out*", "dir/*")
    wanted = [word for pattern in outputs for word in ("--out", f"{pattern}=file://{target}/")]
    mount.stagefs("sandbox", "create", "evil", *wanted)
    mount.run("chown", str(shared.attacker.uid), shared.evil)
    ended = shared.tries(
        f"os.symlink({str(closed / 'secret')!r}, 'out1')",
        "os.symlink('../good/secret', 'out2')",
        f"os.symlink({str(closed)!r}, 'dir')",
    )
    assert ended == ["None"] * 3
    shared.check_refused("open('out1').read()", "open('out2').read()", "os.listdir('dir')")
    # Now root, who may read all of these, commits the sandbox.
    said = sentence(mount.stagefs("sandbox", "commit", "evil", check=False))
    assert "out1" in said or "dir" in said or "out2" in said, said
    mount.stagefs("flush", check=False)
    leaked = [path for path in target.rglob("*") if path.is_file() and path.read_bytes()]
    assert not leaked
    shared.check_victim_is_undisturbed()


def test_open_files_of_one_user_do_not_use_up_those_of_others(shared: Shared) -> None:
    hoarder = shared.attacker.start(
        "python", "-c", HOARDER, shared.evil, str(OPEN_FILES), talks=True
    )
    try:
        assert hoarder.stdout is not None
        held, error = map(int, hoarder.stdout.readline().split())
        assert held > OPEN_FILES - 100
        assert error == 24, "EMFILE: his own limit, no other"
        shared.check_victim_is_undisturbed()
        # None of them is held open by the daemon, whose own limit is everybody's.
        assert len(os.listdir(f"/proc/{shared.mount.daemon()}/fd")) < OPEN_FILES / 4
    finally:
        hoarder.communicate()


def test_the_control_socket_of_another_user(shared: Shared) -> None:
    mount = shared.mount
    socket = mount.state / "control.sock"
    call = f"connected({str(socket)!r})"
    shared.check_refused(call)
    said = shared.attacker.run(
        "stagefs", "status", environment={"STAGEFS_MOUNT": str(mount.point)}, check=False
    )
    assert "belongs to another user" in sentence(said)
    # Somebody's mistake: now only the credentials of the peer are left to refuse him.
    mount.state.chmod(0o755)
    socket.chmod(0o666)
    (ended,) = shared.tries(call)
    assert ended in ("''", "ConnectionResetError", "BrokenPipeError"), ended
    assert "refused a control connection of user 65534" in shared.log()
    assert mount.json_of("stagefs", "status")["version"]
    shared.check_victim_is_undisturbed()
