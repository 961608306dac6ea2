"""stagefs run --no-fuse: real directories, the same cache, outputs uploaded before it returns."""

import os
from pathlib import Path

import pytest

from stagefs.cache.inspect import CacheDirectory
from tests.conftest import MakeMount
from tests.support import kernel
from tests.support.identity import Identity
from tests.support.mounted import sentence
from tests.support.served import HttpServed, Served, content
from tests.support.waiting import wait_until

SIZE_BYTES = 3 << 20


def _ended(state: Path) -> None:
    wait_until(lambda: not kernel.programs_naming(state), "the end of the daemon without a mount")


def test_inputs_are_files_and_outputs_are_there(
    identity: Identity, served: Served, work: Path
) -> None:
    data = content(SIZE_BYTES)
    url = served.put("in", data)
    out = identity.directory(work / "out")
    state = work / "top/state"
    identity.directory(work / "top")
    words = ("stagefs", "run", "--no-fuse", "--state", state, "--in", f"d/in={url}")
    program = "test -f d/in && test $(stat -c %h d/in) = 1 && wc -c < d/in > o && rm d/in"
    done = identity.run(
        *(*words, "--out", f"o={out}/", "--", "sh", "-c", program),
        environment=served.environment(identity),
    )
    assert done.returncode == 0
    assert (out / "o").read_text().strip() == str(SIZE_BYTES)
    assert not any(mount.point.is_relative_to(work) for mount in kernel.mounts(below=work))
    sent = served.bytes_sent()
    identity.run(
        *(*words, "--overwrite", "--out", f"o={out}/", "--", "sh", "-c", program),
        environment=served.environment(identity),
    )
    assert served.bytes_sent() - sent < SIZE_BYTES // 2, "the second run found it in the cache"
    _ended(state)
    assert os.listdir(state / "tmp") == []


def test_failure_keeps_the_directory(anybody: Identity, work: Path) -> None:
    top = anybody.directory(work / "top")
    words = ("stagefs", "run", "--no-fuse", "--state", top / "state", "--name", "t")
    program = ("--", "sh", "-c", "echo half > o; exit 3")
    done = anybody.run(*words, "--out", f"o={top}/out/", *program, check=False)
    assert done.returncode == 3
    kept = top / "state/tmp/t"
    assert done.stderr.decode() == (
        f"stagefs run: sh ended with exit code 3; its directory is kept: {kept}\n"
    )
    assert (kept / "o").read_text() == "half\n"
    assert not (top / "out").exists()
    _ended(top / "state")


def test_missing_inputs_and_outputs(anybody: Identity, web: HttpServed, work: Path) -> None:
    top = anybody.directory(work / "top")
    words = ("stagefs", "run", "--no-fuse", "--state", top / "state")
    done = anybody.run(*words, "--in", f"in={web.url('absent')}", "--", "true", check=False)
    assert "absent" in sentence(done)
    done = anybody.run(*words, "--out", f"o={top}/", "--", "true", check=False)
    assert b"Declared output is missing" in done.stderr
    assert done.returncode == 1
    _ended(top / "state")


def test_upload_that_fails_is_told_and_stays(anybody: Identity, work: Path) -> None:
    top = anybody.directory(work / "top")
    (top / "taken").write_text("something else")
    words = ("stagefs", "run", "--no-fuse", "--state", top / "state", "--out", f"o={top}/taken")
    done = anybody.run(*words, "--", "sh", "-c", "echo x > o", check=False)
    assert done.returncode == 1
    assert b"1 outputs are not uploaded" in done.stderr
    assert b"exists" in done.stderr
    assert (top / "taken").read_text() == "something else"
    _ended(top / "state")


def test_names_are_kept_in_the_state(anybody: Identity, web: HttpServed, work: Path) -> None:
    """staging:/// names of one run are inputs of the next."""
    top = anybody.directory(work / "top")
    words = ("stagefs", "run", "--no-fuse", "--state", top / "state")
    url = web.put("in", b"input\n")
    anybody.run(*words, "--in", f"i={url}", "--out", "*=staging:///r/", "--", "cp", "i", "o")
    shown = ("--in", "back=staging:///r/o", "--", "cat", "back")
    assert anybody.run(*words, *shown).stdout == b"input\n"
    done = anybody.run(*words, "--in", "i=staging:///r/i", "--", "true", check=False)
    assert "There is no staging:///r/i" in sentence(done), "inputs are no outputs of '*'"
    _ended(top / "state")


def test_several_share_one_daemon(anybody: Identity, web: HttpServed, work: Path) -> None:
    data = content(SIZE_BYTES)
    url = web.put("in", data)
    top = anybody.directory(work / "top")
    words = ("stagefs", "run", "--no-fuse", "--state", top / "state", "--in", f"in={url}")
    running = [
        anybody.start(*words, "--out", f"o{n}={top}/", "--", "sh", "-c", f"wc -c < in > o{n}")
        for n in range(5)
    ]
    for one in running:
        _output, errors = one.communicate(timeout=60)
        assert one.returncode == 0, os.fsdecode(errors)
    assert [int((top / f"o{n}").read_text()) for n in range(5)] == [SIZE_BYTES] * 5
    assert web.bytes_sent() < 1.1 * SIZE_BYTES
    _ended(top / "state")
    assert CacheDirectory(top / "state/cache").usage().entries == 1


def test_the_cache_of_a_mount_serves_too(
    anybody: Identity, web: HttpServed, new_mount: MakeMount, work: Path
) -> None:
    data = content(SIZE_BYTES)
    url = web.put("in", data)
    mount = new_mount(anybody)
    mount.stage_in(url, "in")
    mount.sha256("staging/in")
    sent = web.bytes_sent()
    done = mount.stagefs(
        *("run", "--no-fuse", "--in", "in=staging:///in", "--out", "o=staging:///o", "--"),
        *("sh", "-c", "pwd; wc -c < in > o"),
    )
    assert Path(os.fsdecode(done.stdout.strip())).parent == mount.state / "tmp"
    assert web.bytes_sent() == sent
    assert mount.read("staging/o").split() == [str(SIZE_BYTES).encode()]


@pytest.mark.parametrize("words", [("--state", "x"), ("--set", "log.level=debug")])
def test_options_that_need_no_fuse(anybody: Identity, words: tuple[str, ...]) -> None:
    done = anybody.run("stagefs", "run", *words, "--", "true", check=False)
    assert "are for --no-fuse" in sentence(done)
