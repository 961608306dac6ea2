"""Files from the other kinds of servers, read through a mount; and how those servers fare."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.ftp_server import Ftp, running_ftp
from tests.support.identity import Identity
from tests.support.mounted import Mounted, sentence, sha256
from tests.support.ports import free_ports
from tests.support.served import content
from tests.support.webdav import WebDav, running_webdav

MakeMount = Callable[..., Mounted]
MIB = 1 << 20


@pytest.fixture(scope="module")
def webdav(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDav]:
    with running_webdav(tmp_path_factory.mktemp("webdav")) as server:
        yield server


@pytest.fixture(scope="module")
def ftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ftp]:
    with running_ftp(tmp_path_factory.mktemp("ftp")) as server:
        yield server


def test_reading_and_listing(
    identity: Identity, new_mount: MakeMount, webdav: WebDav, ftp: Ftp
) -> None:
    mount = new_mount(identity)
    data = content(3 * MIB)
    for name, root, url in (
        ("webdav", webdav.root, webdav.url),
        ("ftp", ftp.root, f"fsspec+ftp://127.0.0.1:{ftp.port}"),
    ):
        place = Path(root) / identity.name
        place.mkdir()
        (place / "a b").write_bytes(data)
        mount.stage_in(f"{url}/{identity.name}/a%20b", name)
        assert mount.sha256(f"staging/{name}") == sha256(data)
        mount.stagefs("bind", f"{url}/{identity.name}", f"staging:///all-{name}")
        assert mount.run("ls", f"MNT/staging/all-{name}").stdout == b"a b\n"
    remotes = {one["url"]: one for one in mount.json_of("stagefs", "remote", "list")}
    for url in (webdav.url, f"fsspec+ftp://127.0.0.1:{ftp.port}"):
        assert remotes[url]["state"] == "well"
        assert remotes[url]["fetched_bytes"] >= 3 * MIB
        assert "reason" not in remotes[url]


def test_a_server_that_is_away_is_told_of(identity: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(identity)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    mount.run("ln", "-s", f"{url}/x", "MNT/tasks/x", check=False)
    mount.stagefs("bind", f"{url}/d/", "staging:///d", check=False)
    (remote,) = mount.json_of("stagefs", "remote", "list")
    assert (remote["url"], remote["state"]) == (url, "failing")
    assert remote["errors"] == remote["attempts"] > 0
    said = mount.stagefs("remote", "list").stdout.decode()
    assert said.startswith(f"failing {url}  -, 0 B fetched, ")
    assert "Connection refused" in said


def test_a_name_without_programs_is_refused(identity: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(identity)
    done = mount.stagefs("stage-in", "command://tape/x", "staging:///x", check=False)
    assert "[remote.command] programs" in sentence(done)
    done = mount.stagefs("stage-in", "nobody://h/x", "staging:///x", check=False)
    assert "fsspec+<protocol>" in sentence(done)
    mount.stagefs("stage-in", "--replace", "irods://h/zone/x", "staging:///y", check=False)
    assert mount.daemon(), "the daemon did not survive what it was given"
