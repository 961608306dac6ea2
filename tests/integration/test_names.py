"""The namespace by command and by hand: stage-in, bind, import, ls, stat, rm, mv."""

import csv
import hashlib
import json
from collections.abc import Callable

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sentence
from tests.support.served import HttpServed, Served, content

MakeMount = Callable[..., Mounted]


def test_stage_in_registers_and_says_so(
    identity: Identity, served: Served, new_mount: MakeMount
) -> None:
    data = content(300_000)
    url = served.put("input.dat", data)
    mount = new_mount(identity, environment=served.environment(identity))
    said = mount.stagefs("stage-in", url, "staging:///deep/er/input.dat").stdout.decode()
    assert "registered, 293 KiB, fetched on first read" in said
    assert mount.xattr("staging/deep/er/input.dat", "cached") == "0"
    assert mount.read("staging/deep/er/input.dat") == data
    assert mount.xattr("staging/deep/er/input.dat", "source") == url
    assert mount.xattr("staging/deep/er/input.dat", "state") == "cached"


def test_wait_fetches(identity: Identity, served: Served, new_mount: MakeMount) -> None:
    data = content(3 << 20)
    mount = new_mount(identity, environment=served.environment(identity))
    url = served.put("input.dat", data)
    mount.stagefs("stage-in", "--wait", url, "staging:///input.dat")
    assert mount.xattr("staging/input.dat", "state") == "cached"


def test_declared_checksum(identity: Identity, served: Served, new_mount: MakeMount) -> None:
    data = content(2_500_000)
    url = served.put("input.dat", data)
    mount = new_mount(identity, environment=served.environment(identity))
    right, wrong = hashlib.sha256(data).hexdigest(), hashlib.sha256(b"").hexdigest()
    mount.stage_in(url, "right", "--sha256", right)
    assert mount.read("staging/right") == data

    mount.stage_in(url, "wrong", "--sha256", wrong)
    done = mount.run("cat", "MNT/staging/wrong", check=False)
    assert b"Input/output error" in done.stderr
    assert done.stdout == b"", "bytes were served before the checksum was proved"
    assert "sha256" in mount.xattr("staging/wrong", "error")
    said = sentence(
        mount.stagefs(
            "stage-in", "--wait", "--sha256", wrong, url, "staging:///waited", check=False
        )
    )
    assert url in said


def test_name_that_exists(identity: Identity, web: HttpServed, new_mount: MakeMount) -> None:
    mount = new_mount(identity)
    one, two = web.put("one", b"one"), web.put("two", b"two")
    mount.stage_in(one, "x")
    said = sentence(mount.stagefs("stage-in", two, "staging:///x", check=False))
    assert "--replace" in said
    mount.run("mkdir", "MNT/tasks/t")
    mount.run("ln", "MNT/staging/x", "MNT/tasks/t/x")
    mount.stage_in(two, "x", "--replace")
    assert mount.read("staging/x") == b"two"
    assert mount.read("tasks/t/x") == b"one"


def test_refusals_are_sentences(identity: Identity, web: HttpServed, new_mount: MakeMount) -> None:
    mount = new_mount(identity)
    url = web.put("x", b"x")
    absent = sentence(mount.stagefs("stage-in", web.url("absent"), "staging:///a", check=False))
    assert web.url("absent") in absent
    assert "gopher" in sentence(
        mount.stagefs("stage-in", "gopher://host/x", "staging:///a", check=False)
    )
    assert "http" in sentence(
        mount.stagefs("stage-in", "http://127.0.0.1:9/x", "staging:///a", check=False)
    )
    sentence(mount.stagefs("stage-in", url, "staging:///../../etc/x", check=False))
    sentence(mount.stagefs("stage-in", "--sha256", "xyz", url, "staging:///a", check=False))
    assert mount.run("ls", "MNT/staging").stdout == b""


def test_catalogs(identity: Identity, web: HttpServed, new_mount: MakeMount) -> None:
    mount = new_mount(identity)
    urls = {name: web.put(name, name.encode()) for name in ("a", "b", "c")}
    lines = mount.state.with_name("catalog.jsonl")
    digest = hashlib.sha256(b"a").hexdigest()
    lines.write_text(
        json.dumps({"name": "dir/a", "url": urls["a"], "size": 1, "checksum": f"sha256:{digest}"})
        + "\n"
        + json.dumps({"name": "dir/b", "url": urls["b"], "size": 1, "mtime": 1_700_000_000})
        + "\n"
    )
    mount.stagefs("import", lines)
    table = mount.state.with_name("catalog.csv")
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "url", "size", "mtime", "checksum"])
        writer.writerow(["dir/c", urls["c"], "1", "1700000000", ""])
    mount.stagefs("import", table)
    assert web.requests_for("a") == web.requests_for("b") == web.requests_for("c") == 0

    assert mount.run("ls", "MNT/staging/dir").stdout.split() == [b"a", b"b", b"c"]
    assert mount.run("stat", "-c", "%Y", "MNT/staging/dir/b").stdout.strip() == b"1700000000"
    for name in urls:
        assert mount.read(f"staging/dir/{name}") == name.encode()


def test_malformed_catalog_names_the_line(
    identity: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    mount = new_mount(identity)
    catalog = mount.state.with_name("bad.jsonl")
    good = json.dumps({"name": "a", "url": web.url("a"), "size": 1})
    for bad in (
        '{"name": "b", "url": ',
        json.dumps({"name": "b", "size": 1}),
        json.dumps({"name": "../b", "url": web.url("b"), "size": 1}),
        json.dumps({"name": "b", "url": "gopher://host/b", "size": 1}),
        json.dumps({"name": "b", "url": web.url("b"), "size": -1}),
    ):
        catalog.write_text(f"{good}\n{bad}\n")
        said = sentence(mount.stagefs("import", catalog, check=False))
        assert "line 2" in said.lower(), said
        assert mount.run("ls", "MNT/staging").stdout == b"", "half a catalog was imported"


def test_catalog_that_lied_about_a_size(
    anybody: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    mount = new_mount(anybody)
    catalog = mount.state.with_name("catalog.jsonl")
    url = web.put("a", b"twelve bytes")
    catalog.write_text(json.dumps({"name": "a", "url": url, "size": 5}) + "\n")
    mount.stagefs("import", catalog)
    done = mount.run("cat", "MNT/staging/a", check=False)
    assert done.returncode != 0
    assert done.stdout == b""
    assert url in mount.xattr("staging/a", "error")


def test_bound_directory(identity: Identity, served: Served, new_mount: MakeMount) -> None:
    mount = new_mount(identity, environment=served.environment(identity))
    served.put("ref/human.fa", b"human")
    served.put("ref/sub/mouse.fa", b"mouse")
    mount.stagefs("bind", served.url("ref/"), "staging:///ref", "--ttl", "1h")
    assert mount.run("ls", "MNT/staging/ref").stdout.split() == [b"human.fa", b"sub"]
    assert mount.read("staging/ref/sub/mouse.fa") == b"mouse"
    mount.run("mkdir", "MNT/tasks/t")
    mount.run("ln", "-s", "staging:///ref", "MNT/tasks/t/ref")
    assert mount.read("tasks/t/ref/human.fa") == b"human"
    assert mount.run("cat", "MNT/staging/ref/absent", check=False).returncode != 0


def test_by_hand(identity: Identity, web: HttpServed, new_mount: MakeMount) -> None:
    mount = new_mount(identity)
    url = web.put("x", b"by hand")
    mount.run("mkdir", "-p", "MNT/staging/a/b")
    mount.run("ln", "-s", url, "MNT/staging/a/b/x")
    assert mount.read("staging/a/b/x") == b"by hand"
    mount.run("mv", "MNT/staging/a/b/x", "MNT/staging/y")
    mount.run("mv", "MNT/staging/a", "MNT/staging/c")
    assert mount.read("staging/y") == b"by hand"
    names = [entry["name"] for entry in mount.json_of("stagefs", "ls")]
    assert sorted(names) == ["c", "y"]
    mount.run("rm", "-r", "MNT/staging/c", "MNT/staging/y")
    assert mount.run("ls", "MNT/staging").stdout == b""
    assert web.objects.joinpath("x").read_bytes() == b"by hand", "a remote object was touched"


def test_by_command(identity: Identity, web: HttpServed, new_mount: MakeMount) -> None:
    mount = new_mount(identity)
    mount.stage_in(web.put("x", b"12345"), "x")
    mount.stagefs("mv", "staging:///x", "staging:///y")
    found = mount.json_of("stagefs", "stat", "staging:///y")
    assert (found["size_bytes"], found["kind"], found["url"]) == (5, "file", web.url("x"))
    mount.run("mkdir", "MNT/staging/d")
    sentence(mount.stagefs("rm", "staging:///absent", check=False))
    mount.stagefs("rm", "staging:///y")
    mount.stagefs("rm", "-r", "staging:///d")
    assert mount.run("ls", "MNT/staging").stdout == b""


def test_names_survive_kill_and_mount(
    identity: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    mount = new_mount(identity)
    mount.stage_in(web.put("x", b"x"), "x")
    mount.run("mkdir", "MNT/tasks/t")
    mount.run("ln", "MNT/staging/x", "MNT/tasks/t/x")
    mount.rough_end = True
    mount.kill_all()
    mount.mount()
    assert mount.read("tasks/t/x") == b"x"
    assert mount.run("stat", "-c", "%h", "MNT/staging/x").stdout.strip() == b"2"
