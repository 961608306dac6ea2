"""Sandboxes on real mounts: what tasks read, write, publish and leave."""

import json
import os
import shutil
from pathlib import Path

from tests.conftest import MakeMount
from tests.support.identity import Identity
from tests.support.mounted import sentence
from tests.support.served import HttpServed, Served, content
from tests.support.waiting import wait_until

SIZE_BYTES = 3 << 20


def test_task_reads_writes_and_is_committed(
    identity: Identity, served: Served, new_mount: MakeMount
) -> None:
    data = content(SIZE_BYTES)
    url = served.put("input", data)
    mount = new_mount(identity, environment=served.environment(identity))
    outputs = ("--out", "std*=staging:///runs/7/", "--out", "in=staging:///changed")
    mount.stagefs("sandbox", "create", "t", "--in", f"in={url}", *outputs)
    mount.run("sh", "-c", "wc -c < in > stdout; echo more >> in", directory=mount.point / "tasks/t")
    shown = mount.json_of("stagefs", "sandbox", "show", "t")
    assert [(one["name"], one["state"]) for one in shown["inputs"]] == [("in", "modified")]
    mount.stagefs("sandbox", "commit", "t")
    assert mount.read("staging/runs/7/stdout").split() == [str(SIZE_BYTES).encode()]
    assert mount.read("staging/changed") == data + b"more\n"
    assert mount.json_of("stagefs", "sandbox", "show", "t")["sandbox"]["state"] == "committed"
    # What was published never changes: another write makes a copy.
    mount.run("sh", "-c", "echo again >> stdout", directory=mount.point / "tasks/t")
    assert mount.read("staging/runs/7/stdout").split() == [str(SIZE_BYTES).encode()]
    mount.stagefs("sandbox", "remove", "t")
    assert mount.read("staging/changed") == data + b"more\n"


def test_outputs_reach_every_remote_that_can_be_written_to(
    identity: Identity, served: Served, new_mount: MakeMount
) -> None:
    if served.scheme == "http":
        url = served.put("in", b"")
        mount = new_mount(identity, environment=served.environment(identity))
        done = mount.stagefs("sandbox", "create", "t", "--out", f"*={url}/", check=False)
        assert "nothing can be written to an http server" in sentence(done)
        return
    identity_can_write(served, identity)
    mount = new_mount(identity, environment=served.environment(identity))
    target = f"{served.url('results')}/"
    mount.stagefs("sandbox", "create", "t", "--out", f"out={target}", "--out", "log=staging:///log")
    mount.run(
        *("sh", "-c", "mkdir -p out/d; head -c 3000000 /dev/zero > out/d/zeros; date > log"),
        directory=mount.point / "tasks/t",
    )
    mount.stagefs("sandbox", "commit", "t")
    mount.stagefs("flush", "--deadline", "60")
    mount.stage_in(served.url("results/out/d/zeros"), "back")
    assert mount.read("staging/back") == bytes(3_000_000)


def identity_can_write(served: Served, identity: Identity) -> None:
    """Servers of files write as whoever runs them; their directory is the test's."""
    objects = getattr(served, "objects", None)
    if objects is not None:
        os.chown(objects, identity.uid, identity.gid)


def test_open_writers_are_named(anybody: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(anybody)
    mount.stagefs("sandbox", "create", "t", "--out", "*=staging:///runs/")
    program = "exec 3> log; echo begun; read x; echo last >&3; exec 3>&-; echo ended; read x"
    writer = mount.start("sh", "-c", program, directory=mount.point / "tasks/t", talks=True)
    assert writer.stdout is not None
    assert writer.stdin is not None
    assert writer.stdout.readline() == b"begun\n"
    done = mount.stagefs("sandbox", "commit", "t", check=False)
    assert "log of the sandbox t can still be written to" in sentence(done)
    writer.stdin.write(b"\n")
    writer.stdin.flush()
    assert writer.stdout.readline() == b"ended\n"
    mount.stagefs("sandbox", "commit", "t")
    assert mount.read("staging/runs/log") == b"last\n"
    writer.communicate(b"\n", timeout=20)


def test_plain_mkdir_makes_sandboxes(anybody: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(
        anybody, settings='[workspace]\nsandbox_roots = "pilot/*/unit.*"\non_write = "read-only"\n'
    )
    mount.run("mkdir", "-p", "MNT/tasks/t1", "MNT/pilot/s1/unit.7/below", "MNT/pilot/s1/other")
    listed = mount.json_of("stagefs", "sandbox", "list")
    assert [(one["name"], one["on_write"]) for one in listed] == [
        ("t1", "read-only"),
        ("/pilot/s1/unit.7", "read-only"),
    ]
    mount.run("sh", "-c", "echo x > MNT/o".replace("MNT", str(mount.point / "pilot/s1/unit.7")))
    mount.stagefs("sandbox", "commit", mount.point / "pilot/s1/unit.7", "--out", "o=staging:///o")
    assert mount.read("staging/o") == b"x\n"
    mount.run("rm", "-r", "MNT/tasks/t1", "MNT/pilot/s1")
    assert mount.json_of("stagefs", "sandbox", "list") == []


def test_policies_of_writing(anybody: Identity, web: HttpServed, new_mount: MakeMount) -> None:
    url = web.put("in", b"input")
    mount = new_mount(anybody)
    for policy in ("copy-up", "read-only"):
        options = ("--in", f"in={url}", "--on-write", policy)
        mount.stagefs("sandbox", "create", policy, *options)
    mount.run("sh", "-c", "echo x >> in", directory=mount.point / "tasks/copy-up")
    for program in ("echo x >> in", "echo x > in", "chmod 700 in", "touch in", "truncate -s 0 in"):
        done = mount.run(
            "sh", "-c", program, directory=mount.point / "tasks/read-only", check=False
        )
        assert b"Read-only file system" in done.stderr, program
        assert mount.read("tasks/read-only/in") == b"input"
    assert mount.read("tasks/copy-up/in") == b"inputx\n"
    assert mount.read("tasks/read-only/in") == b"input"


def test_mirror_of_a_tree_equals_it(anybody: Identity, new_mount: MakeMount, work: Path) -> None:
    source = anybody.directory(work / "source")
    for name in ("file", "dummydir/one", "dummydir/sub/two", ".hidden"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "dummydir/link").symlink_to("sub/two")
    (source / "dummydir/empty").mkdir()
    expected = work / "expected"
    shutil.copytree(source, expected, symlinks=True, ignore=lambda *_: [".hidden"])
    shutil.copytree(source / "dummydir", expected / "sub/deep", symlinks=True)
    # What a pattern matches itself is followed, as shutil.copy does.
    (expected / "sub/deep/link").unlink()
    shutil.copy(source / "dummydir/link", expected / "sub/deep/link")
    mount = new_mount(anybody)
    mirrors = ("--mirror", f"{source}/*=.", "--mirror", f"{source}/dummydir/*=sub/deep")
    mount.stagefs("sandbox", "create", "t", *mirrors)
    mount.run("diff", "-r", "--no-dereference", expected, "MNT/tasks/t")
    mount.run("sh", "-c", "echo changed >> file", directory=mount.point / "tasks/t")
    assert (source / "file").read_text() == "file"


def test_many_sandboxes_of_one_template(
    anybody: Identity, web: HttpServed, new_mount: MakeMount, work: Path
) -> None:
    for number in range(20):
        web.put(f"d/{number}", content(1000, str(number)))
    inputs = {f"d/{number}": web.url(f"d/{number}") for number in range(20)}
    (work / "template.json").write_text(
        json.dumps({"inputs": inputs, "outputs": {"o": "staging:///out/"}})
    )
    mount = new_mount(anybody)
    mount.stagefs(
        *("sandbox", "create", "t", "--template", work / "template.json", "--count", "500")
    )
    assert mount.read("tasks/t.000499/d/7") == content(1000, "7")
    links = ("stat", "-c", "%h", "MNT/tasks/t.000007/d/7", "MNT/tasks/t.000007/d/8")
    assert mount.run(*links).stdout.split() == [b"500", b"500"]
    mount.run("sh", "-c", "echo x >> d/7; rm d/8", directory=mount.point / "tasks/t.000001")
    assert mount.run(*links).stdout.split() == [b"499", b"499"]
    mount.kill_daemon()
    assert mount.run(*links).stdout.split() == [b"499", b"499"]
    assert mount.read("tasks/t.000002/d/7") == content(1000, "7")
    assert mount.json_of("stagefs", "sandbox", "show", "t.000001")["modified"] == ["d/7"]
    before = web.requests_for("d/9")
    mount.run("cat", *(f"MNT/tasks/t.{n:06}/d/9" for n in range(100)))
    assert web.requests_for("d/9") - before <= 1


def test_leases_end_with_rm_of_the_directory(
    anybody: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    mount = new_mount(anybody)
    mount.stagefs("sandbox", "create", "t", "--in", f"in={web.put('in', b'input')}")
    assert mount.json_of("stagefs-cache", "usage")["leases"] == 1
    mount.run("rm", "-r", "MNT/tasks/t")
    wait_until(
        lambda: mount.json_of("stagefs-cache", "usage")["leases"] == 0, "the end of the lease"
    )


def test_what_tasks_link_is_leased_until_their_sandbox_ends(
    identity: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    settings = "[workspace]\nsandbox_roots = 'pilot/*/*'\n"
    mount = new_mount(identity, settings=settings)
    data = content(SIZE_BYTES)
    mount.stage_in(web.put("in", data), "in")
    mount.stage_in(web.put("other", data[::-1]), "other")
    mount.run("mkdir", "-p", "MNT/pilot/session/unit/deep")
    mount.run("ln", "MNT/staging/in", "MNT/pilot/session/unit/deep/in")
    mount.sha256("staging/in")
    mount.sha256("staging/other")

    def leases() -> int:
        return int(mount.json_of("stagefs", "sandbox", "show", "MNT/pilot/session/unit")["leases"])

    wait_until(lambda: leases() == 1, "the lease of what link(2) brought")
    mount.kill_daemon()
    mount.run("rm", "MNT/pilot/session/unit/deep/in")
    mount.cache("cleanup", "--to", "0")
    entries = {one["url"]: one for one in mount.json_of("stagefs-cache", "list")}
    assert entries[web.url("in")]["cached_bytes"] == SIZE_BYTES, "kept for its sandbox"
    assert web.url("other") not in entries, "nobody keeps that"
    assert leases() == 1
    # Across mounts, too.
    mount.umount()
    mount.mount()
    assert leases() == 1
    mount.run("rm", "-r", "MNT/pilot")
    wait_until(
        lambda: mount.json_of("stagefs-cache", "usage")["leases"] == 0, "the end of the lease"
    )


def test_sandboxes_survive_the_daemon_and_the_mount(
    anybody: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    mount = new_mount(anybody)
    url = web.put("in", b"input")
    mount.stagefs("sandbox", "create", "t", "--in", f"in={url}", "--out", "o=staging:///o")
    mount.run("sh", "-c", "echo made > o", directory=mount.point / "tasks/t")
    mount.kill_daemon()
    assert mount.read("tasks/t/o") == b"made\n"
    mount.umount()
    mount.mount()
    mount.stagefs("sandbox", "commit", "t")
    assert mount.read("staging/o") == b"made\n"


def test_python_interface(anybody: Identity, web: HttpServed, new_mount: MakeMount) -> None:
    """docs/PYTHON.md's examples, on a real mount."""
    mount = new_mount(anybody)
    document = Path(__file__).parents[2] / "docs/PYTHON.md"
    examples = [block.split("```")[0] for block in document.read_text().split("```python\n")[1:]]
    assert len(examples) > 3
    web.put("ref.fa", b">x\nACGT\n")
    web.put("copy/ref.fa", b">x\nACGT\n")
    program = "\n".join(examples).replace("https://host/", web.url(""))
    program = program.replace("/mnt/pilot", str(mount.point))
    mount.python(program)


def test_record_of_what_was_read(anybody: Identity, web: HttpServed, new_mount: MakeMount) -> None:
    data = content(SIZE_BYTES)
    inputs = {name: web.put(name, data + name.encode()) for name in ("a", "b", "never")}
    mount = new_mount(anybody)
    words = [word for name, url in inputs.items() for word in ("--in", f"{name}={url}")]
    mount.stagefs("sandbox", "create", "t", "--record", *words)
    mount.stagefs("sandbox", "create", "other", *words)
    mount.run("head", "-c", "10", "MNT/tasks/t/a")
    mount.run("sh", "-c", "cat b b | wc -c", directory=mount.point / "tasks/t")
    mount.run("cat", "MNT/tasks/other/a", "MNT/tasks/other/never")
    reads = mount.json_of("stagefs", "sandbox", "show", "t", "--hashes")["reads"]
    objects = {one["name"]: one for one in reads["objects"]}
    assert set(objects) == {"a", "b"}
    assert objects["b"]["url"] == inputs["b"]
    assert objects["b"]["version"].startswith("etag:")
    assert objects["b"]["opens"] == 2
    assert objects["b"]["served_bytes"] >= SIZE_BYTES + 1
    # What read-ahead had brought already was cached when it was asked for.
    assert 0 < objects["b"]["fetched_bytes"] <= objects["b"]["served_bytes"]
    assert set(objects["b"]["chunk_hashes"]) == {"0", "1", "2", "3"}
    assert reads["never_opened"] == ["never"]
    assert reads["blocked_s"] > 0
    assert "page cache" in reads["note"]
    assert mount.json_of("stagefs", "sandbox", "show", "other")["reads"] is None
