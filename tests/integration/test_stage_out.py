"""Outputs of real mounts on their way to real servers: queue, flush, umount, adoption."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sentence
from tests.support.served import Served, SharedGateway, content, serving, serving_s3
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
# What waits for a server comes back within seconds.
QUICK = "[stage_out]\nbackoff_s = 0.1\nbackoff_s_max = 0.5\n[remote]\nattempts = 1\n"


@pytest.fixture(params=["ssh", "s3"])
def server(request: pytest.FixtureRequest, served_directory: Path) -> Iterator[Served]:
    """A real server that takes outputs."""
    if request.param == "s3":
        gateway: SharedGateway = request.getfixturevalue("gateway")
        with serving_s3(served_directory, gateway) as bucket:
            yield bucket
    else:
        with serving(request.param, served_directory) as one:
            yield one


@pytest.fixture
def ssh(served_directory: Path) -> Iterator[Served]:
    with serving("ssh", served_directory) as one:
        yield one


@pytest.fixture
def place(identity: Identity, work: Path) -> Path:
    """A directory on this machine that outputs go to."""
    return identity.directory(work / "place")


def below(server: Served, directory: str) -> str:
    return f"{server.url(directory)}/"


def commit(mount: Mounted, name: str, target: str, files: dict[str, bytes]) -> None:
    """A sandbox whose outputs are ``files``, committed."""
    made = mount.identity.directory(mount.state.with_name(f"made-{name}"))
    for file, data in files.items():
        path = made / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    mount.stagefs("sandbox", "create", name, "--out", f"**={target}")
    mount.run("cp", "-r", f"{made}/.", f"MNT/tasks/{name}")
    mount.stagefs("sandbox", "commit", name)


def uploads(mount: Mounted) -> list[dict[str, object]]:
    found = json.loads(mount.stagefs("queue", "list", "--all", "--json").stdout)
    assert isinstance(found, list)
    return found


def states(mount: Mounted) -> list[object]:
    return [upload["state"] for upload in uploads(mount)]


def waits_for(mount: Mounted, reason: str) -> None:
    """Until an upload tells a failure with this word."""
    wait_until(
        lambda: any(reason in str(upload.get("reason")) for upload in uploads(mount)),
        f"an upload that failed with {reason!r}",
    )


def test_outputs_reach_the_server(identity: Identity, new_mount: MakeMount, server: Served) -> None:
    mount = new_mount(identity, environment=server.environment(identity))
    files = {
        "small.txt": b"hello\n",
        "deep/directory/blank in name": b"x" * 1000,
        "empty": b"",
    }
    assert mount.stagefs("flush").stdout == b"nothing waits to be uploaded\n"
    commit(mount, "t1", below(server, "run1"), files)
    said = mount.stagefs("flush").stdout.decode()
    assert said.startswith("uploaded ")
    assert {name: server.get(f"run1/{name}") for name in files} == files
    assert server.names() == sorted(f"run1/{name}" for name in files), "nothing else is there"
    assert states(mount) == ["done"] * 3
    # Now it is the daemon that has done all of it.
    assert mount.stagefs("flush").stdout == b"uploaded already: 3 outputs, 1006 B; nothing waits\n"
    status = json.loads(mount.stagefs("status", "--json").stdout)["queue"]
    assert (status["waiting"], status["failed"]) == (0, 0)
    assert not list(Path(status["directory"], "files").iterdir()), "files of what is done go"


def test_large_output_reaches_the_server(
    anybody: Identity, new_mount: MakeMount, server: Served
) -> None:
    mount = new_mount(anybody, environment=server.environment(anybody))
    data = content(48 << 20, "large")
    source = mount.state.with_name("large")
    source.write_bytes(data)
    mount.stagefs("sandbox", "create", "t1", "--out", f"large={server.url('large')}")
    mount.run("cp", source, "MNT/tasks/t1/large")
    mount.stagefs("sandbox", "commit", "t1")
    mount.stagefs("flush")
    assert server.get("large") == data


def test_umount_waits_for_the_queue(identity: Identity, new_mount: MakeMount, ssh: Served) -> None:
    mount = new_mount(identity, environment=ssh.environment(identity))
    files = {f"{number}": content(1 << 20, f"{number}") for number in range(8)}
    commit(mount, "t1", below(ssh, "run"), files)
    mount.umount()
    assert {name: ssh.get(f"run/{name}") for name in files} == files


def test_umount_says_what_is_left_and_force_keeps_it(
    identity: Identity, new_mount: MakeMount, ssh: Served
) -> None:
    ssh.put("run/taken", b"somebody else's")
    mount = new_mount(identity, environment=ssh.environment(identity))
    commit(mount, "t1", below(ssh, "run"), {"taken": b"mine", "free": b"mine"})
    said = sentence(mount.umount(check=False))
    assert "1 output (4 B) not uploaded (1 failed): upload " in said
    assert ssh.url("run/taken") in said
    assert "nothing was unmounted" in said
    assert "--force" in said
    assert mount.run("ls", "MNT/tasks").stdout.decode().split() == ["t1"], "it is mounted still"
    mount.stagefs("umount", "--force", mount.point)
    mount.mount()
    failed = [upload for upload in uploads(mount) if upload["state"] == "failed"]
    assert [upload["url"] for upload in failed] == [ssh.url("run/taken")]
    ssh.remove("run/taken")
    mount.stagefs("queue", "retry", str(failed[0]["id"]))
    mount.stagefs("flush")
    assert ssh.get("run/taken") == b"mine"


def test_umount_of_a_stopped_daemon_waits_for_no_queue(
    anybody: Identity, new_mount: MakeMount
) -> None:
    mount = new_mount(anybody)
    mount.rough_end = True
    daemon = mount.daemon()
    os.kill(daemon, signal.SIGSTOP)
    mount.stagefs("umount", "--lazy", mount.point)
    os.kill(daemon, signal.SIGCONT)


def test_failure_is_shown_and_cancelled(
    anybody: Identity, new_mount: MakeMount, ssh: Served
) -> None:
    ssh.put("run/taken", b"somebody else's")
    mount = new_mount(anybody, environment=ssh.environment(anybody))
    commit(mount, "t1", below(ssh, "run"), {"taken": b"mine"})
    said = sentence(mount.stagefs("flush", "--deadline", "60", check=False))
    assert "1 output (4 B) not uploaded (1 failed): upload 1: " in said
    assert ssh.url("run/taken") in said
    listed = mount.stagefs("queue", "list").stdout.decode()
    assert listed.split()[:3] == ["1", "failed", ssh.url("run/taken")]
    assert "exists" in listed
    assert sentence(mount.stagefs("queue", "cancel", check=False)).count("--all")
    assert mount.stagefs("queue", "cancel", "1").stdout == b"1 output cancelled\n"
    assert mount.stagefs("queue", "list").stdout == b""
    mount.stagefs("flush")
    assert ssh.get("run/taken") == b"somebody else's"
    said = sentence(mount.stagefs("queue", "retry", "99", check=False))
    assert "no upload 99" in said


def test_server_that_is_away_and_back(
    anybody: Identity, new_mount: MakeMount, server: Served
) -> None:
    settings = f"{QUICK}connect_timeout_s = 2\nprogress_timeout_s = 2\n"
    mount = new_mount(anybody, environment=server.environment(anybody), settings=settings)
    server.freeze()
    commit(mount, "t1", below(server, "run"), {"a": b"one", "b": b"two"})
    waits_for(mount, server.url("run"))
    said = sentence(mount.stagefs("flush", "--deadline", "1", check=False))
    assert "2 outputs (6 B) not uploaded (2 waiting): upload " in said
    assert set(states(mount)) <= {"queued", "uploading"}
    server.thaw()
    mount.stagefs("flush", "--deadline", "60")
    assert (server.get("run/a"), server.get("run/b")) == (b"one", b"two")
    assert server.names() == ["run/a", "run/b"], "no half object is left"


def test_permission_lost_and_given_back(
    all_identities: dict[str, Identity], new_mount: MakeMount, work: Path
) -> None:
    user = all_identities["user"]  # root may write anywhere
    closed = user.directory(work / "closed")
    closed.chmod(0o500)
    mount = new_mount(user, settings=QUICK)
    commit(mount, "t1", f"file://{closed}/", {"a": b"one"})
    said = sentence(mount.stagefs("flush", check=False))
    assert f"{closed}/a" in said
    closed.chmod(0o700)
    mount.stagefs("queue", "retry", "--all")
    mount.stagefs("flush")
    assert (closed / "a").read_bytes() == b"one"


def test_killed_daemon_goes_on_uploading(
    identity: Identity, new_mount: MakeMount, ssh: Served
) -> None:
    mount = new_mount(identity, environment=ssh.environment(identity), settings=QUICK)
    ssh.freeze()
    files = {f"{number}": content(3 << 20, f"{number}") for number in range(4)}
    commit(mount, "t1", below(ssh, "run"), files)
    mount.kill_daemon()
    mount.run("ls", "MNT")  # the next daemon answers
    ssh.thaw()
    for _ in range(3):
        mount.kill_daemon()
        mount.run("ls", "MNT")
    mount.stagefs("flush", "--deadline", "60")
    assert {name: ssh.get(f"run/{name}") for name in files} == files
    assert ssh.names() == sorted(f"run/{name}" for name in files), "a temporary file is left"


def test_next_mount_adopts_the_outputs_directory(
    identity: Identity, new_mount: MakeMount, ssh: Served, work: Path
) -> None:
    outputs = identity.directory(work / "durable")
    ssh.freeze()
    quick = f"{QUICK}connect_timeout_s = 2\nprogress_timeout_s = 2\n"
    environment = ssh.environment(identity)
    first = new_mount(identity, "--outputs", str(outputs), environment=environment, settings=quick)
    commit(first, "t1", below(ssh, "run"), {"a": b"one", "b": b"two"})
    second = new_mount(
        identity,
        "--outputs",
        str(outputs),
        environment=environment,
        settings=quick,
        mounted=False,
    )
    said = sentence(second.mount(check=False))
    assert f"outputs directory {outputs} is in use by process {first.daemon()}" in said
    first.kill_all()
    first.rough_end = True
    first.stagefs("umount", "--lazy", first.point, check=False)
    second.mount()
    assert len(uploads(second)) == 2
    ssh.thaw()
    second.stagefs("flush", "--deadline", "60")
    assert (ssh.get("run/a"), ssh.get("run/b")) == (b"one", b"two")


def test_outputs_to_a_directory_of_this_machine(
    identity: Identity, new_mount: MakeMount, place: Path
) -> None:
    mount = new_mount(identity)
    commit(mount, "t1", f"file://{place}/", {"a": b"one", "deep/b": b"two"})
    mount.umount()
    assert (place / "a").read_bytes() == b"one"
    assert (place / "deep/b").read_bytes() == b"two"
    assert (place / "a").stat().st_uid == identity.uid


def test_damaged_output_is_not_uploaded(
    anybody: Identity, new_mount: MakeMount, server: Served
) -> None:
    settings = f"{QUICK}connect_timeout_s = 2\nprogress_timeout_s = 2\n"
    mount = new_mount(anybody, environment=server.environment(anybody), settings=settings)
    server.freeze()
    commit(mount, "t1", below(server, "run"), {"a": content(100_000, "a")})
    (upload,) = uploads(mount)
    with Path(str(upload["file"])).open("r+b") as file:
        file.seek(50_000)
        file.write(b"damage")
    server.thaw()
    said = sentence(mount.stagefs("flush", "--deadline", "60", check=False))
    assert "(1 failed)" in said
    assert "declared was" in said
    assert server.names() == []
    mount.stagefs("queue", "cancel", "--all", "--discard")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a tmpfs")
def test_server_whose_disk_is_full(
    anybody: Identity, new_mount: MakeMount, ssh: Served, served_directory: Path
) -> None:
    disk = served_directory / "objects/disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
    try:
        (disk / "filler").write_bytes(bytes(1 << 20))
        mount = new_mount(anybody, environment=ssh.environment(anybody), settings=QUICK)
        data = content(3 << 19, "a")
        commit(mount, "t1", below(ssh, "disk"), {"a": data})
        waits_for(mount, ssh.url("disk/a"))
        # It is tried again and again meanwhile, and each attempt has a file while it lasts.
        wait_until(lambda: ssh.names() == ["disk/filler"], "half of it is left there")
        (disk / "filler").unlink()
        mount.stagefs("queue", "retry", "--all")
        mount.stagefs("flush", "--deadline", "60")
        assert ssh.get("disk/a") == data
        mount.umount()
    finally:
        # After a failure the server may still be writing there: that is not to be what is told.
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_mount_that_is_taken_away_uploads_first(
    identity: Identity, new_mount: MakeMount, ssh: Served
) -> None:
    mount = new_mount(identity, environment=ssh.environment(identity))
    files = {f"{number}": content(1 << 20, f"{number}") for number in range(8)}
    commit(mount, "t1", below(ssh, "run"), files)
    os.kill(mount.supervisor(), signal.SIGTERM)  # as a batch system does
    wait_until(lambda: not mount.programs(), "the end of the mount", deadline_s=40)
    assert {name: ssh.get(f"run/{name}") for name in files} == files
