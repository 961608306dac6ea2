"""stagefs copy: scp's arguments on real servers, through mounts and without, beside scp itself."""

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeMount
from tests.support.faultproxy import fault_proxy
from tests.support.identity import Identity
from tests.support.mounted import sentence
from tests.support.served import (
    HttpServed,
    Served,
    SharedGateway,
    SshServed,
    content,
    serving,
    serving_s3,
)
from tests.support.waiting import wait_until

SIZE_BYTES = 3 << 20
# Other mounts of this user may be somebody else's business.
COPY = ("stagefs", "copy", "--no-mount")
OLD_S = 1_500_000_000


@pytest.fixture
def ssh(served_directory: Path) -> Iterator[SshServed]:
    with serving("ssh", served_directory) as one:
        assert isinstance(one, SshServed)
        yield one


@pytest.fixture(params=["ssh", "s3"])
def sink(request: pytest.FixtureRequest, served_directory: Path) -> Iterator[Served]:
    """A real server that takes files."""
    if request.param == "s3":
        gateway: SharedGateway = request.getfixturevalue("gateway")
        with serving_s3(served_directory, gateway) as bucket:
            yield bucket
    else:
        with serving(request.param, served_directory) as one:
            yield one


def own_file(identity: Identity, path: Path, data: bytes, mode: int = 0o640) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    os.utime(path, (OLD_S, OLD_S))
    os.chown(path, identity.uid, identity.gid)
    return path


def tree(top: Path, *, times: bool) -> dict[str, object]:
    """Everything below ``top`` as it would be compared by eye."""
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        status = path.stat()
        what = "directory" if path.is_dir() else path.read_bytes()
        mtime_s = int(status.st_mtime) if times and path.is_file() else None
        found[str(path.relative_to(top))] = (what, oct(stat.S_IMODE(status.st_mode)), mtime_s)
    return found


# Words of both programs: L is a directory of this machine, R the same at a host.  What OpenPBS
# calls (src/resmom/stage_func.c: -Brvp for PBS_SCP, -rp for rcp), what LSF calls, and the rules
# about directories.
ALIKE = [
    ("-Brvp", "R/in/script", "L/new"),
    ("-Brvp", "L/in/tree", "R/there"),
    ("-rp", "R/in/tree", "L/newtree"),
    ("-rp", "L/in/plain", "R/there/renamed"),
    ("-B", "-oStrictHostKeyChecking=yes", "R/in/script", r"R/in/blank\ name", "L/there"),
    ("-r", "-4", "-C", "-l", "100000", "R/in/[ps]*", "L/in/tree/deep", "L/in/script", "R/there"),
]
REFUSED = [
    ("-r", "R/in/absent", "L/new"),
    ("L/in/absent", "R/there"),
    ("R/in/tree", "L/new"),
    ("R/in/plain", "R/in/script", "L/absent"),
]


def furnish(identity: Identity, top: Path) -> None:
    identity.directory(top)
    for side in ("L", "R"):
        for name in (".", "in", "in/tree", "in/tree/deep", "there"):
            if not (top / side / name).exists():
                identity.directory(top / side / name)
        for name, mode in (("plain", 0o644), ("script", 0o751), ("blank name", 0o600)):
            own_file(identity, top / side / "in" / name, f"{side} {name}".encode(), mode)
        own_file(identity, top / side / "in/tree/deep/leaf", b"leaf", 0o604)
        own_file(identity, top / side / "there/plain", b"older and longer", 0o660)
        (top / side / "in/tree/link").symlink_to("deep/leaf")
        own_file(identity, top / side / "there/script", b"x", 0o666)


def placed(words: tuple[str, ...], top: Path) -> list[str]:
    return [word.replace("R/", f"staged:{top}/R/").replace("L/", f"{top}/L/") for word in words]


def test_as_scp(anybody: Identity, ssh: SshServed, work: Path) -> None:
    config = ("-F", ssh.environment(anybody)["STAGEFS_SSH_CONFIG"])
    for number, words in enumerate(ALIKE):
        ends = {}
        for program in (["scp"], COPY):
            top = work / f"{program[0]}-{number}"
            furnish(anybody, top)
            anybody.run(*program, *config, *placed(words, top))
            ends[program[0]] = tree(top, times="p" in words[0])
        assert ends["stagefs"] == ends["scp"], words


def test_refuses_what_scp_refuses(anybody: Identity, ssh: SshServed, work: Path) -> None:
    environment = ssh.environment(anybody)
    top = work / "top"
    furnish(anybody, top)
    before = tree(top, times=True)
    for words in REFUSED:
        config = ("-F", environment["STAGEFS_SSH_CONFIG"])
        done = anybody.run("scp", *config, *placed(words, top), check=False)
        assert done.returncode != 0, f"scp takes {words}"
        copied = (*COPY, *placed(words, top))
        refusal = sentence(anybody.run(*copied, environment=environment, check=False))
        assert "absent" in refusal or "-r" in refusal, refusal
    assert tree(top, times=True) == before


def test_in_through_a_mount_and_without(
    anybody: Identity, served: Served, new_mount: MakeMount, work: Path
) -> None:
    data = content(SIZE_BYTES)
    url = served.put("some input", data)
    here = anybody.directory(work / "here")
    environment = served.environment(anybody)
    anybody.run(*COPY, "-Brvp", url, here / "direct", environment=environment)
    assert (here / "direct").read_bytes() == data
    mount = new_mount(anybody, environment=environment)
    sent = served.bytes_sent()
    for number in range(3):
        mount.stagefs("copy", "-Brvp", url, here / f"{number}")
        assert (here / f"{number}").read_bytes() == data
    assert SIZE_BYTES <= served.bytes_sent() - sent < 1.5 * SIZE_BYTES, "fetched once per node"
    times = {int((here / name).stat().st_mtime) for name in os.listdir(here)}
    assert len(times) == 1, "-p keeps what the server says"
    assert sorted(os.listdir(here)) == ["0", "1", "2", "direct"]
    assert mount.json_of("stagefs", "sandbox", "list") == []
    assert mount.json_of("stagefs-cache", "usage")["leases"] == 0


def test_out_is_there_when_it_returns(
    identity: Identity, sink: Served, new_mount: MakeMount, work: Path
) -> None:
    environment = sink.environment(identity)
    top = identity.directory(work / "top")
    own_file(identity, top / "o", b"output\n")
    url = sink.url("run/o")
    identity.run(*COPY, "-rp", top / "o", url, environment=environment)
    assert sink.get("run/o") == b"output\n"
    own_file(identity, top / "o", b"again\n")
    mount = new_mount(identity, environment=environment)
    mount.stagefs("copy", "-Brvp", top / "o", url)
    assert sink.get("run/o") == b"again\n"
    # From a name of the mount, and to one whose directory is uploaded.
    mount.stagefs("copy", top / "o", "staging:///o")
    assert mount.xattr("staging/o", "state") == "published"
    mount.stagefs("copy", "staging:///o", sink.url("named"))
    assert sink.get("named") == b"again\n"
    mount.stagefs("bind", "--writable", sink.url("bound"), "staging:///bound")
    mount.stagefs("copy", "-p", top / "o", "staging:///bound/o")
    assert sink.get("bound/o") == b"again\n", "waited for"
    assert sink.names() == ["bound/o", "named", "run/o"], "nothing else is left there"


def test_from_server_to_server(anybody: Identity, ssh: SshServed, work: Path) -> None:
    """Several sources, one of them with a URL, to a directory of a server."""
    web_top = work / "web"
    web_top.mkdir()
    with serving("http", web_top) as web:
        url = web.put("in.dat", content(100_000))
        here = own_file(anybody, anybody.directory(work / "h") / "local", b"local")
        target = f"{ssh.url('d')}/"
        anybody.run(*(*COPY, "-v", url, here, target), environment=ssh.environment(anybody))
        assert ssh.get("d/in.dat") == content(100_000)
        assert ssh.get("d/local") == b"local"


def test_path_map_and_this_host(anybody: Identity, ssh: SshServed, work: Path) -> None:
    top = anybody.directory(work / "top")
    config = anybody.directory(work / "config")
    anybody.directory(config / "stagefs")
    mapped = ssh.put("home/me/a b", b"mapped")
    (config / "stagefs/stagefs.conf").write_text(
        f'[path_map]\n"submit:/home" = "{mapped.removesuffix("/me/a%20b")}"\n'
        f'"submit:/nfs" = "file://{top}"\n'
    )
    environment = {**ssh.environment(anybody), "XDG_CONFIG_HOME": str(config)}

    def copy(*words: str | Path) -> None:
        anybody.run(*COPY, "-Brvp", *words, environment=environment)

    copy(r"submit:/home/me/a\ b", top / "one")
    assert (top / "one").read_bytes() == b"mapped"
    copy(top / "one", "submit:/nfs/two")
    assert (top / "two").read_bytes() == b"mapped"
    copy(f"{os.uname().nodename}:{top}/two", r"submit:/home/me/x\ y")
    assert ssh.get("home/me/x y") == b"mapped"


def test_a_killed_or_broken_copy_leaves_what_was_there(
    anybody: Identity, web: HttpServed, work: Path
) -> None:
    url = web.put("large", content(32 << 20))
    top = anybody.directory(work / "top")
    kept = own_file(anybody, top / "o", b"before")
    port = int(url.split(":")[2].split("/")[0])
    with fault_proxy(port) as proxy:
        through = url.replace(f":{port}/", f":{proxy.port}/")
        proxy.stall(after_bytes=4 << 20, times=100)
        copying = anybody.start(*COPY, through, kept)
        proxy.wait_for_hit()
        assert _temporaries(top), "the copy was under way"
        copying.send_signal(signal.SIGTERM)
        copying.communicate(timeout=60)
        assert copying.returncode == 128 + signal.SIGTERM
        assert (kept.read_bytes(), os.listdir(top)) == (b"before", ["o"])

        copying = anybody.start(*COPY, through, kept)
        wait_until(lambda: proxy.hits >= 2 and bool(_temporaries(top)), "the second copy under way")
        copying.kill()
        copying.communicate(timeout=60)
        assert kept.read_bytes() == b"before"
        assert _temporaries(top), "kill -9 leaves its temporary file"
        proxy.release()
        anybody.run(*COPY, through, kept)
    assert kept.read_bytes() == content(32 << 20)
    assert os.listdir(top) == ["o"], "the next one removes it"


def _temporaries(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".o.stagefs-")]


def test_failures_are_one_sentence(
    anybody: Identity, web: HttpServed, new_mount: MakeMount, work: Path
) -> None:
    top = anybody.directory(work / "top")
    here = own_file(anybody, top / "here", b"x")
    mount = new_mount(anybody)
    missing = web.url("absent")
    closed = own_file(anybody, top / "closed", b"closed", 0o000)
    for words, expected in [
        (("--no-mount", missing, top / "o"), missing),
        ((missing, top / "o"), missing),
        ((here, web.url("o")), "read only"),
        (("--no-mount", "staging:///x", top / "o"), "--mount"),
        (("staging:///x", top / "o"), "staging/x"),
        ((top / "gone", top / "o"), "gone"),
        ((here, top / "no/such"), "no/such"),
        (("-P", "1", "127.0.0.1:/x", top / "o"), "127.0.0.1"),
        ((here,), "TARGET"),
    ]:
        assert expected in sentence(mount.stagefs("copy", *words, check=False)), words
    if anybody.uid:
        assert "closed" in sentence(mount.stagefs("copy", closed, top / "o", check=False))
    assert sorted(os.listdir(top)) == ["closed", "here"]
    assert mount.json_of("stagefs", "sandbox", "list") == []


def test_nothing_of_the_working_directory_is_imported(anybody: Identity, work: Path) -> None:
    top = anybody.directory(work / "top")
    own_file(anybody, top / "trio.py", b"raise SystemExit('imported')")
    anybody.run(*COPY, "trio.py", "copied", directory=top)
    assert (top / "copied").exists()
