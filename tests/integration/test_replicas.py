"""Files with replicas over several protocols, on real servers and mounts."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stagefs.control.client import Client
from tests.support.identity import Identity
from tests.support.mounted import Mounted, sentence, sha256
from tests.support.nginx import Nginx, running_nginx
from tests.support.served import HttpServed, Served, SharedGateway, content, serving, serving_s3
from tests.support.throttle import running_throttle
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
Figures = Callable[[str], None]
MIB = 1 << 20
SLOW_BYTES_PER_S = 5_000_000


@pytest.fixture
def nginx(served_directory: Path) -> Iterator[Nginx]:
    """A test may end it."""
    with contextlib.suppress(ProcessLookupError), running_nginx(served_directory) as server:
        yield server


@pytest.fixture
def web(nginx: Nginx) -> HttpServed:
    return HttpServed(nginx)


@pytest.fixture
def ssh(work: Path) -> Iterator[Served]:
    directory = work / "ssh"
    directory.mkdir(mode=0o755)
    with serving("ssh", directory) as server:
        yield server


@pytest.fixture
def s3(work: Path, gateway: SharedGateway) -> Iterator[Served]:
    directory = work / "s3"
    directory.mkdir(mode=0o755)
    with serving_s3(directory, gateway) as server:
        yield server


def listed(mount: Mounted, name: str) -> list[dict[str, Any]]:
    return list(mount.json_of("stagefs", "replica", "list", f"staging:///{name}")["replicas"])


def next_daemon(mount: Mounted) -> None:
    killed = mount.kill_daemon()
    wait_until(
        lambda: bool(json.loads(mount.read(".stagefs/status"))["pid"] != killed), "the next daemon"
    )


def test_the_first_server_dies_in_the_middle_of_a_read(
    anybody: Identity,
    new_mount: MakeMount,
    web: HttpServed,
    nginx: Nginx,
    ssh: Served,
    figures: Figures,
) -> None:
    """C3, with 160 MiB; it waits until a good part of it has come from the first."""
    data = content(160 * MIB)
    mount = new_mount(anybody, "--capacity", "1GiB", environment=ssh.environment(anybody))
    mount.stage_in(web.put("large", data), "large")
    there = ssh.put("large", data)
    mount.stagefs("replica", "add", "staging:///large", there, "--affinity", "far")
    mount.stagefs("replica", "add", "staging:///large", web.url("large"), "--affinity", "near/m1")
    mount.umount()
    mount.mount("--set", "read.affinity=near/m1")
    code = (
        "import hashlib, sys\n"
        "digest = hashlib.sha256()\n"
        "with open(sys.argv[1], 'rb', buffering=0) as file:\n"
        "    digest.update(file.read(1 << 20))\n"
        "    print('begun', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    while piece := file.read(1 << 20):\n"
        "        digest.update(piece)\n"
        "print(digest.hexdigest())\n"
    )
    reader = mount.start("python", "-c", code, "MNT/staging/large", talks=True)
    assert reader.stdout is not None
    assert reader.stdin is not None
    try:
        assert reader.stdout.readline() == b"begun\n"
        before = ssh.bytes_sent()
        nginx.stop()
        killed_s = time.monotonic()
        reader.stdin.write(b"go on\n")
        reader.stdin.flush()
        digest = reader.stdout.readline().decode().strip()
        took_s = time.monotonic() - killed_s
    finally:
        reader.kill()
        reader.communicate()
    assert digest == sha256(data)
    figures(f"C3 with 160 MiB: the read ended {took_s:.1f} s after the first server died")
    first, other = listed(mount, "large")
    assert other["url"] == web.url("large")
    assert other["state"] == "failing"
    assert first["url"] == there
    mount.umount()  # closes handles, which the server counts
    assert ssh.bytes_sent() > before, "nothing came from the other server"


def test_most_comes_from_the_fast_one(
    anybody: Identity, new_mount: MakeMount, work: Path, nginx: Nginx, ssh: Served, figures: Figures
) -> None:
    """C4: the first serves 5 MB/s."""
    data = content(96 * MIB)
    web = HttpServed(nginx)
    url = web.put("large", data)
    mount = new_mount(anybody, "--capacity", "1GiB", environment=ssh.environment(anybody))
    with running_throttle(nginx.port, bytes_per_s=SLOW_BYTES_PER_S) as throttle:
        mount.stage_in(url.replace(f":{nginx.port}/", f":{throttle.port}/"), "large")
        mount.stagefs("replica", "add", "staging:///large", ssh.put("large", data))
        assert mount.sha256("staging/large") == sha256(data)
        mount.umount()
    slow, fast = web.bytes_sent(), ssh.bytes_sent()
    figures(f"C4: {fast / (slow + fast):.1%} of the bytes from the fast one")
    assert slow + fast >= len(data)
    assert fast >= 0.8 * (slow + fast), f"{slow} from the slow one, {fast} from the fast one"


def test_the_nearest_is_read_over_three_protocols_and_a_restart(
    anybody: Identity, new_mount: MakeMount, web: HttpServed, ssh: Served, s3: Served
) -> None:
    data = content(6 * MIB)
    environment = {**ssh.environment(anybody), **s3.environment(anybody)}
    mount = new_mount(anybody, "--set", "read.affinity=vienna/node7", environment=environment)
    mount.stage_in(web.put("f", data), "f")
    urls = {server.scheme: server.put("f", data) for server in (ssh, s3)}
    mount.stagefs("replica", "add", "staging:///f", urls["ssh"], "--affinity", "graz/node7")
    mount.stagefs("replica", "add", "staging:///f", urls["s3"], "--affinity", "vienna/node2")
    assert listed(mount, "f")[0]["url"] == urls["s3"]
    next_daemon(mount)
    assert [one["shared_parts"] for one in listed(mount, "f")] == [1, 0, 0]
    lines = f"{urls['ssh']} graz/node7\n{urls['s3']} vienna/node2"
    assert mount.xattr("staging/f", "replicas") == lines
    shown = mount.stagefs("stat", "staging:///f").stdout.decode().split()
    at = shown.index(urls["s3"])
    assert shown[at - 1 : at + 2] == ["replica", urls["s3"], "vienna/node2"]
    because = mount.stagefs("why", "staging:///f").stdout.decode()
    assert "This node is at vienna/node7. It has 3 replicas, asked in this order: s3://" in because

    sent = web.bytes_sent(), s3.bytes_sent()
    assert mount.sha256("staging/f") == sha256(data)
    # Half of it was read to compare the replicas.
    wait_until(lambda: s3.bytes_sent() - sent[1] >= 3 * MIB, "reading from the nearest")
    assert web.bytes_sent() == sent[0]
    assert mount.xattr("staging/f", "state") == "cached"

    # The same through Python.
    client = Client.of(mount.point) if anybody.uid == 0 else None
    if client is not None:
        left = client.replica_remove("staging:///f", urls["s3"])
        assert [one.url for one in left.replicas] == [web.url("f"), urls["ssh"]]
        assert client.stat("staging:///f").replicas == [f"{urls['ssh']} graz/node7"]
        added = client.replica_add("staging:///f", urls["s3"], affinity="vienna/node7", trust=True)
        assert added.replicas[0].shared_parts == 2
        assert client.replica_list("staging:///f") == added


def test_what_differs_is_refused_with_a_sentence(
    anybody: Identity, new_mount: MakeMount, web: HttpServed
) -> None:
    data = content(6 * MIB)
    mount = new_mount(anybody)
    mount.stage_in(web.put("f", data), "f")

    def refused(url: str, *options: str, name: str = "f") -> str:
        done = mount.stagefs("replica", "add", f"staging:///{name}", url, *options, check=False)
        return sentence(done)

    shorter = web.put("shorter", data[:-1])
    for options in ((), ("--trust",)):
        said = refused(shorter, *options)
        assert f"{shorter} has {len(data) - 1} bytes" in said
        assert f"{web.url('f')} has {len(data)}" in said
    other = web.put("other", data[: 3 * MIB] + b"!" + data[3 * MIB + 1 :])
    assert f"{other} differs from {web.url('f')}" in refused(other)
    assert "does not exist" in refused(web.url("nowhere")) or "404" in refused(web.url("nowhere"))
    assert "is a directory" in refused(shorter, name="")
    small = web.put("small", b"right")
    mount.stage_in(small, "small", "--sha256", sha256(b"right"))
    assert "sha256" in refused(web.put("wrong", b"wrong"), name="small")
    assert len(listed(mount, "f")) == 1
    done = mount.stagefs("replica", "remove", "staging:///f", other, check=False)
    assert "is no replica of" in sentence(done)
    done = mount.stagefs("replica", "remove", "staging:///f", web.url("f"), check=False)
    assert "--replace" in sentence(done)


def test_all_dead_is_one_error_that_names_them(
    anybody: Identity, new_mount: MakeMount, web: HttpServed, ssh: Served
) -> None:
    data = content(3 * MIB)
    mount = new_mount(anybody, environment=ssh.environment(anybody))
    for name, size in (("f", 3 * MIB), ("small", 1000)):
        mount.stage_in(web.put(name, data[:size]), name)
        # Comparing would bring some of it into the cache.
        there = ssh.put(name, data[:size])
        mount.stagefs("replica", "add", f"staging:///{name}", there, "--trust")
        web.remove(name)
        ssh.remove(name)
        done = mount.run("cat", f"MNT/staging/{name}", check=False)
        assert b"No such file or directory" in done.stderr
        said = mount.xattr(f"staging/{name}", "error")
        assert said.startswith(f"No replica of {web.url(name)} can be read: ")
        assert ssh.url(name) in said
        assert "\n" not in said


def test_a_replica_helps_when_its_first_is_gone_before_it_was_read(
    anybody: Identity, new_mount: MakeMount, web: HttpServed, ssh: Served
) -> None:
    """Also of a catalog's entry, which nobody was asked about, and of a small file."""
    data = content(3 * MIB)
    mount = new_mount(anybody, environment=ssh.environment(anybody))
    lines = []
    for name, size in (("f", 3 * MIB), ("small", 1000)):
        url = web.put(name, data[:size])
        lines.append(json.dumps({"name": name, "url": url, "size": size}))
    catalog = mount.identity.directory(mount.point.parent / "c") / "catalog.jsonl"
    catalog.write_text("\n".join(lines))
    catalog.chmod(0o644)
    mount.stagefs("import", catalog)
    for name, size in (("f", 3 * MIB), ("small", 1000)):
        mount.stagefs("replica", "add", f"staging:///{name}", ssh.put(name, data[:size]), "--trust")
        web.remove(name)
        assert mount.sha256(f"staging/{name}") == sha256(data[:size])
    next_daemon(mount)
    for name, size in (("f", 3 * MIB), ("small", 1000)):
        assert mount.sha256(f"staging/{name}") == sha256(data[:size])
