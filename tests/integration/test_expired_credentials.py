"""Credentials that expire and are replaced while the mount lives, and that show nowhere."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.nginx import PASSWORD, TOKEN, USER, running_nginx
from tests.support.served import HttpServed, SharedGateway, serving_s3
from tests.support.token_front import token_front
from tests.support.waiting import wait_until
from tests.support.webdav import running_webdav

MakeMount = Callable[..., Mounted]
OLD_SECRET = "0ld-and-expired"
QUICK_QUEUE = "[stage_out]\nsettle_s = 0.05\nbackoff_s = 0.1\nbackoff_s_max = 0.5\n"


def private_file(mount: Mounted, name: str, text: str) -> Path:
    """Replaced in one step, as those do that renew credentials."""
    path = mount.point.parent / name
    fresh = path.with_name("fresh")
    fresh.write_text(text)
    fresh.chmod(0o600)
    os.chown(fresh, mount.identity.uid, mount.identity.gid)
    return fresh.rename(path)


def refusal(mount: Mounted, path: str) -> str:
    """What a task is told, and then what the user is told."""
    done = mount.run("cat", f"MNT/{path}", check=False)
    assert b"Permission denied" in done.stderr
    return mount.xattr(path, "error")


def read_again(mount: Mounted, path: str, data: bytes) -> None:
    """What was refused stays so for ``failure_hold_s``."""
    wait_until(lambda: mount.run("cat", f"MNT/{path}", check=False).stdout == data, f"{path}")


def shows_no_secret(mount: Mounted, *secrets: str, paths: tuple[str, ...]) -> None:
    """Errors of reads are in the log and the attributes; the API is what the commands show."""
    assert mount.programs()
    places = {
        "ps": "\n".join(" ".join(one.command) for one in mount.programs()).encode(),
        "status": mount.read(".stagefs/status") + mount.read(".stagefs/config"),
        "remote list": mount.stagefs("remote", "list", "--json").stdout,
        "metrics": mount.stagefs("metrics").stdout,
        "log": b"".join(path.read_bytes() for path in mount.state.glob("*.log")),
        "namespace": b"".join(path.read_bytes() for path in mount.state.glob("namespace.sqlite*")),
        "xattrs": b"".join(
            mount.run("getfattr", "-d", "-m", "-", f"MNT/{path}").stdout for path in paths
        ),
    }
    for place, text in places.items():
        for secret in secrets:
            assert secret.encode() not in text, f"a secret shows in {place}"


def test_a_password_of_netrc_is_replaced(
    anybody: Identity, new_mount: MakeMount, served_directory: Path
) -> None:
    with running_nginx(served_directory) as nginx:
        web = HttpServed(nginx)
        mount = new_mount(anybody, mounted=False)
        line = f"machine 127.0.0.1 login {USER} password "
        netrc = private_file(mount, "netrc", line + PASSWORD)
        mount.environment = {"NETRC": str(netrc)}
        mount.mount("--set", "read.failure_hold_s=0.2")
        for name in ("a", "b"):
            web.put(name, name.encode() * 100_000)
            mount.stage_in(web.private_url(name), name)
        assert mount.read("staging/a") == b"a" * 100_000
        private_file(mount, "netrc", line + OLD_SECRET)
        assert web.private_url("b") in refusal(mount, "staging/b")
        private_file(mount, "netrc", line + PASSWORD)
        read_again(mount, "staging/b", b"b" * 100_000)
        shows_no_secret(mount, PASSWORD, OLD_SECRET, paths=("staging/a", "staging/b"))


def test_a_refusal_ends_a_read_however_short_failures_are_held(
    anybody: Identity, new_mount: MakeMount, served_directory: Path
) -> None:
    with running_nginx(served_directory) as nginx:
        web = HttpServed(nginx)
        mount = new_mount(anybody, "--set", "read.failure_hold_s=0", mounted=False)
        netrc = private_file(mount, "netrc", f"machine 127.0.0.1 login {USER} password {PASSWORD}")
        mount.environment = {"NETRC": str(netrc)}
        mount.mount()
        for name in ("large", "small", "gone"):
            web.put(name, bytes(1000 if name == "small" else 1_000_000))
            mount.stage_in(web.private_url(name), name)
        web.remove("gone")
        private_file(mount, "netrc", f"machine 127.0.0.1 login {USER} password {OLD_SECRET}")
        for name in ("large", "small"):
            refusal(mount, f"staging/{name}")
        private_file(mount, "netrc", f"machine 127.0.0.1 login {USER} password {PASSWORD}")
        done = mount.run("cat", "MNT/staging/gone", check=False)
        assert b"No such file" in done.stderr
        # The kernel asks again for what its read-ahead did not get.
        refused = [asked.uri for asked in nginx.asked() if asked.status in (401, 404)]
        assert 3 <= len(refused) <= 12, refused
        assert mount.read("staging/large") == bytes(1_000_000)


def test_a_bearer_token_is_replaced(
    anybody: Identity, new_mount: MakeMount, served_directory: Path
) -> None:
    """Over https, found as the WLCG says, for what is read and what is listed."""
    with running_nginx(served_directory) as nginx:
        web = HttpServed(nginx)
        settings = (
            f"[read]\nfailure_hold_s = 0\n[remote.http]\ntoken_hosts = '127.0.0.1'\n"
            f"ca_file = '{nginx.ca_file}'\n"
        )
        mount = new_mount(anybody, settings=settings, mounted=False)
        token = private_file(mount, "token", TOKEN)
        mount.environment = {"BEARER_TOKEN_FILE": str(token)}
        mount.mount()
        for name in ("a", "b", "dir/small"):
            web.put(name, name.encode() * 100_000 if name != "dir/small" else b"small")
        for name in ("a", "b"):
            mount.stage_in(nginx.tls_url(name, location="bearer"), name)
        mount.stagefs("bind", nginx.tls_url("dir/", location="bearer"), "staging:///dir")
        assert mount.read("staging/a") == b"a" * 100_000
        private_file(mount, "token", OLD_SECRET)
        assert nginx.tls_url("b", location="bearer") in refusal(mount, "staging/b")
        listing = mount.run("ls", "MNT/staging/dir", check=False)
        assert b"Permission denied" in listing.stderr
        private_file(mount, "token", TOKEN)
        assert mount.read("staging/b") == b"b" * 100_000
        assert mount.read("staging/dir/small") == b"small"
        assert mount.run("ls", "MNT/staging/dir").stdout == b"small\n"
        sent = {asked.authorization for asked in nginx.asked() if "/bearer/" in asked.uri}
        assert sent == {f"Bearer {TOKEN}", f"Bearer {OLD_SECRET}"}
        shows_no_secret(mount, TOKEN, OLD_SECRET, paths=("staging/a", "staging/b"))


def test_an_upload_waits_for_a_bearer_token_that_is_renewed(
    anybody: Identity, new_mount: MakeMount, served_directory: Path
) -> None:
    with (
        running_webdav(served_directory) as dav,
        token_front(served_directory, dav.port) as port,
    ):
        settings = (
            f"{QUICK_QUEUE}[remote.http]\ntoken_hosts = '127.0.0.1'\n"
            f"ca_file = '{served_directory}/ca.pem'\n"
        )
        mount = new_mount(anybody, settings=settings, mounted=False)
        token = private_file(mount, "token", TOKEN)
        mount.environment = {"BEARER_TOKEN_FILE": str(token)}
        mount.mount()
        mount.stagefs("bind", f"webdavs://127.0.0.1:{port}/out", "staging:///out", "--writable")
        source = private_file(mount, "source", "a" * 100_000)
        mount.run("cp", source, "MNT/staging/out/first")
        mount.stagefs("flush", "--deadline", "60")
        assert (dav.root / "out/first").read_bytes() == b"a" * 100_000
        private_file(mount, "token", OLD_SECRET)
        mount.run("cp", source, "MNT/staging/out/second")

        def reasons() -> list[str]:
            return [one.get("reason", "") for one in mount.json_of("stagefs", "queue", "list")]

        wait_until(lambda: any("HTTP 401" in one for one in reasons()), "an upload that waits")
        assert mount.read("staging/out/second") == b"a" * 100_000
        assert not (dav.root / "out/second").exists()
        private_file(mount, "token", TOKEN)
        mount.stagefs("flush", "--deadline", "60")
        assert (dav.root / "out/second").read_bytes() == b"a" * 100_000
        shows_no_secret(mount, TOKEN, OLD_SECRET, paths=("staging/out/second",))


def test_keys_of_a_profile_are_replaced(
    anybody: Identity, new_mount: MakeMount, served_directory: Path, gateway: SharedGateway
) -> None:
    with serving_s3(served_directory, gateway) as s3:
        environment = dict(s3.environment(anybody))
        key, secret = (
            environment.pop(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        )
        mount = new_mount(anybody, mounted=False)

        def profile(secret: str) -> Path:
            lines = ["[default]", f"aws_access_key_id={key}", f"aws_secret_access_key={secret}"]
            return private_file(mount, "credentials", "\n".join(lines))

        mount.environment = {**environment, "AWS_SHARED_CREDENTIALS_FILE": str(profile(secret))}
        mount.mount("--set", "read.failure_hold_s=0.2")
        for name in ("a", "b"):
            mount.stage_in(s3.put(name, name.encode() * 100_000), name)
        mount.umount()
        profile(OLD_SECRET)
        mount.mount("--set", "read.failure_hold_s=0.2")
        assert s3.url("a") in refusal(mount, "staging/a")
        profile(secret)
        # At once, and not when the keys that were read have become old.
        read_again(mount, "staging/a", b"a" * 100_000)
        assert mount.read("staging/b") == b"b" * 100_000
        shows_no_secret(mount, secret, OLD_SECRET, paths=("staging/a", "staging/b"))


def test_an_upload_waits_for_a_session_token_that_is_renewed(
    anybody: Identity, new_mount: MakeMount, served_directory: Path, gateway: SharedGateway
) -> None:
    with serving_s3(served_directory, gateway) as s3:
        environment = dict(s3.environment(anybody))
        del environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
        mount = new_mount(anybody, settings=QUICK_QUEUE, mounted=False)

        def profile(keys: Mapping[str, str]) -> Path:
            lines = ["[default]", *(f"{name} = {value}" for name, value in keys.items())]
            return private_file(mount, "credentials", "\n".join(lines))

        first, expired, last = (s3.session_keys(duration_s) for duration_s in (3600, 1, 3600))
        mount.environment = {**environment, "AWS_SHARED_CREDENTIALS_FILE": str(profile(first))}
        mount.mount()
        s3.put("in/a", b"a" * 100_000)
        mount.stagefs("bind", s3.url("in"), "staging:///in")
        mount.stagefs("bind", s3.url("out"), "staging:///out", "--writable")
        assert mount.read("staging/in/a") == b"a" * 100_000
        mount.run("cp", "MNT/staging/in/a", "MNT/staging/out/first")
        mount.stagefs("flush", "--deadline", "60")
        assert s3.get("out/first") == b"a" * 100_000
        wait_until(lambda: not s3.takes(expired), "the gateway to refuse the token")
        profile(expired)
        mount.run("cp", "MNT/staging/in/a", "MNT/staging/out/second")

        def reasons() -> list[str]:
            return [one.get("reason", "") for one in mount.json_of("stagefs", "queue", "list")]

        wait_until(lambda: any(reasons()), "an upload that says why it waits")
        assert "may not be written" in reasons()[0] or "refuses" in reasons()[0]
        assert mount.read("staging/out/second") == b"a" * 100_000
        profile(last)
        mount.stagefs("flush", "--deadline", "60")
        assert s3.get("out/second") == b"a" * 100_000
        secrets = [
            keys[name]
            for keys in (first, expired, last)
            for name in ("aws_secret_access_key", "aws_session_token")
        ]
        shows_no_secret(mount, *secrets, paths=("staging/in/a", "staging/out/second"))
