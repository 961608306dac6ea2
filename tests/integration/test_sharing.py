"""Many tasks, one transfer; what nobody reads is never touched; a tail costs a tail (A2, A3)."""

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import Served, content, serving

MakeMount = Callable[..., Mounted]
MIB, GIB = 1 << 20, 1 << 30
TASKS = 16

# Reads a whole file and prints its CRC: fast enough that sixteen of them do not wait for the CPU.
READ_ALL = """
import sys, zlib
crc = 0
with open(sys.argv[1], "rb", buffering=0) as file:
    while piece := file.read(1 << 20):
        crc = zlib.crc32(piece, crc)
print(crc)
"""


def read_in_all_tasks(mount: Mounted, tasks: Sequence[str]) -> list[int]:
    readers = [
        mount.start("python", "-c", READ_ALL, f"MNT/tasks/{task}/input.dat") for task in tasks
    ]
    results = [reader.communicate(timeout=150) for reader in readers]
    for reader, (_, errors) in zip(readers, results, strict=True):
        assert reader.returncode == 0, errors.decode()
    return [int(output) for output, _ in results]


def import_catalog(mount: Mounted, entries: list[dict[str, object]]) -> None:
    catalog = mount.state.with_name("catalog.jsonl")
    catalog.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    mount.stagefs("import", catalog)


def sixteen_tasks(
    mount: Mounted, served: Served, data: bytes, figures: Callable[[str], None]
) -> None:
    url = served.put("input.dat", data)
    unread = served.put("unread.dat", b"nobody reads this")
    import_catalog(
        mount, [{"name": "unread.dat", "url": unread, "size": 17, "mtime": 1_700_000_000}]
    )
    mount.stage_in(url, "input.dat")
    tasks = [f"t{number}" for number in range(TASKS)]
    for task in tasks:
        inputs = ("input.dat=staging:///input.dat", "unread.dat=staging:///unread.dat")
        mount.stagefs("sandbox", "create", task, *(w for i in inputs for w in ("--in", i)))
    listed = mount.run("ls", "-l", "MNT/tasks/t0", "MNT/staging").stdout.decode()
    assert " 17 " in listed

    assert read_in_all_tasks(mount, tasks) == [zlib.crc32(data)] * TASKS
    mount.umount()
    sent = served.bytes_sent()
    figures(f"{sent / len(data):.4f} of {len(data) >> 20} MiB sent to {TASKS} readers")
    assert len(data) <= sent <= 1.01 * len(data), f"{sent} bytes sent for {len(data)}"
    assert served.requests_for("unread.dat") == 0, "an object nobody read was asked for"


def test_sixteen_readers_cost_one_transfer(
    identity: Identity,
    served: Served,
    new_mount: MakeMount,
    figures: Callable[[str], None],
) -> None:
    mount = new_mount(identity, environment=served.environment(identity))
    sixteen_tasks(mount, served, content(192 * MIB), figures)


def test_a_gibibyte_for_sixteen_readers(
    anybody: Identity,
    served: Served,
    new_mount: MakeMount,
    figures: Callable[[str], None],
) -> None:
    mount = new_mount(anybody, "--capacity", "2GiB", environment=served.environment(anybody))
    sixteen_tasks(mount, served, content(64 * MIB) * 16, figures)


def test_tail_of_a_large_object_costs_a_tail(
    identity: Identity,
    served: Served,
    new_mount: MakeMount,
    figures: Callable[[str], None],
) -> None:
    """Ten gibibytes, where the server need not hold them in memory."""
    tail = content(4096, "tail")
    mount = new_mount(identity, environment=served.environment(identity))
    url, size = served.put_large("large.dat", tail)
    mount.stage_in(url, "large.dat")
    assert int(mount.run("stat", "-c", "%s", "MNT/staging/large.dat").stdout) == size
    assert mount.run("tail", "-c", "4096", "MNT/staging/large.dat").stdout == tail
    mount.umount()
    figures(f"{served.bytes_sent() >> 10} KiB sent for the last 4 KiB of {size >> 20} MiB")
    assert 4096 <= served.bytes_sent() < 2 * MIB


def test_same_object_under_two_names_is_fetched_once(
    anybody: Identity, served: Served, new_mount: MakeMount
) -> None:
    data = content(8 * MIB)
    url = served.put("input.dat", data)
    mount = new_mount(anybody, environment=served.environment(anybody))
    mount.stage_in(url, "one")
    mount.stage_in(url, "two")
    mount.run("mkdir", "MNT/tasks/t")
    mount.run("ln", "-s", url, "MNT/tasks/t/three")
    for name in ("staging/one", "staging/two", "tasks/t/three"):
        assert mount.read(name) == data
    mount.umount()
    assert served.bytes_sent() == len(data)


def test_cache_of_one_protocol_is_not_anothers(
    anybody: Identity, new_mount: MakeMount, work: Path
) -> None:
    for scheme in ("http", "ssh"):
        (work / scheme).mkdir()
    with serving("http", work / "http") as web, serving("ssh", work / "ssh") as shell:
        mount = new_mount(anybody, environment=shell.environment(anybody))
        mount.stage_in(web.put("x", b"over http"), "web")
        mount.stage_in(shell.put("x", b"over ssh!"), "shell")
        assert mount.read("staging/web") == b"over http"
        assert mount.read("staging/shell") == b"over ssh!"
