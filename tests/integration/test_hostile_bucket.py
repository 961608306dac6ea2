"""Keys of a bucket are any text: none of them leads outside, and no secret of S3 shows (A11)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import S3Served, SharedGateway, serving_s3

MakeMount = Callable[..., Mounted]
HOSTILE = (
    "..%2Fescape",
    "%2Fabsolute",
    "n" * 300,
    "back%5Cslash",
    "a%20b",
    "%C3%BC%25",
    "~",
    "...",
)
# What the client library cannot express: the directory then says so, and its objects can still be
# staged in by their names.
UNLISTABLE = ("new%0Aline", "sub//double", "sub/../../up")


@pytest.fixture
def bucket(served_directory: Path, gateway: SharedGateway) -> Iterator[S3Served]:
    with serving_s3(served_directory, gateway) as served:
        yield served


def taken(bucket: S3Served, key: str) -> bool:
    """Whether the gateway has an object under the key, which is written as it is in a URL."""
    try:
        bucket.put_raw(f"trap/{key}", b"hostile")
    except AssertionError:
        return False
    return True


def test_no_key_leads_outside(identity: Identity, bucket: S3Served, new_mount: MakeMount) -> None:
    environment = bucket.environment(identity)
    bucket.put("trap/good", b"good")
    hostile = [key for key in HOSTILE if taken(bucket, key)]
    assert len(hostile) > 3, "the gateway took no hostile keys, so nothing was tried"
    mount = new_mount(identity, environment=environment)
    mount.stagefs("bind", bucket.url("trap/"), "staging:///trap")
    found = mount.run("find", "MNT/staging", "-printf", "%P\\0").stdout.split(b"\0")
    top = [name for name in found if name]
    assert b"trap/good" in top
    assert all(name == b"trap" or name.startswith(b"trap/") for name in top), top
    for name in top:
        for part in name.split(b"/"):
            assert part not in {b"", b".", b".."}, name
            assert len(part) <= 255, name
    mount.run("sh", "-c", "cat MNT/staging/trap/* > /dev/null || true")
    assert mount.read("staging/trap/good") == b"good"
    mount.umount()
    outside = [path for path in mount.state.parent.rglob("*escape*") if path.is_file()]
    assert not outside


@pytest.mark.parametrize("key", UNLISTABLE)
def test_a_key_that_cannot_be_listed(
    anybody: Identity, bucket: S3Served, new_mount: MakeMount, key: str
) -> None:
    bucket.put("trap/good", b"good")
    assert taken(bucket, key), "the gateway does not take such a key"
    mount = new_mount(anybody, environment=bucket.environment(anybody))
    mount.stagefs("bind", bucket.url("trap/"), "staging:///trap")
    done = mount.run("find", "MNT/staging", "-printf", "%P\\0", check=False)
    names = {name for name in done.stdout.split(b"\0") if name}
    assert names <= {b"trap", b"trap/good", b"trap/sub"}, names
    if b"trap/good" not in names:
        log = (mount.state / "stagefs.log").read_text()
        assert "cannot be listed: a key in it holds" in log
    mount.stage_in(bucket.url("trap/good"), "good")
    assert mount.read("staging/good") == b"good"


def test_keys_and_signatures_show_nowhere(
    identity: Identity, bucket: S3Served, new_mount: MakeMount
) -> None:
    environment = {**bucket.environment(identity)}
    secret = environment["AWS_SECRET_ACCESS_KEY"]
    mount = new_mount(identity, "--set", "log.level=debug", environment=environment)
    shown = [mount.stagefs("stage-in", bucket.put("x", b"x" * 3_000_000), "staging:///x").stdout]
    mount.run("mkdir", "MNT/tasks/t")
    mount.run("ln", "MNT/staging/x", "MNT/tasks/t/x")
    assert len(mount.read("tasks/t/x")) == 3_000_000
    bucket.put("gone", b"gone")
    mount.stage_in(bucket.url("gone"), "gone")
    bucket.remove("gone")
    for command in (
        ("cat", "MNT/staging/gone"),
        ("getfattr", "-R", "-d", "-m", "-", "MNT/staging"),
        ("sh", "-c", f"cat {mount.point}/.stagefs/*"),
        ("stagefs", "status", "--json"),
        ("stagefs", "run", "--out", f"o={bucket.url('made/')}", "--", "sh", "-c", "echo 1 > o"),
        ("stagefs", "flush", "--deadline", "30"),
        ("stagefs", "queue", "list", "--json"),
        ("stagefs-cache", "list", "--json"),
    ):
        done = mount.run(*command, check=False)
        shown.append(done.stdout + done.stderr)
    shown.extend(" ".join(program.command).encode() for program in mount.programs())
    assert bucket.get("made/o") == b"1\n"
    mount.umount()
    kept = [path.read_bytes() for path in mount.state.rglob("*") if path.is_file()]
    text = b"\n".join((*shown, *kept))
    for word in (secret, "Signature=", "Authorization"):
        assert word.encode() not in text, f"{word} was shown"
    assert bucket.url("x").encode() in text, "nothing was shown, so nothing was tried"
