"""Virtual links as programs see them."""

import json
from collections.abc import Callable

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import HttpServed

MakeMount = Callable[..., Mounted]


@pytest.fixture
def mount(identity: Identity, web: HttpServed, new_mount: MakeMount) -> Mounted:
    made = new_mount(identity)
    made.stage_in(web.put("input.dat", b"the input"), "input.dat")
    web.put("dir/one", b"one")
    made.stagefs("bind", web.url("dir/"), "staging:///dir")
    made.run("mkdir", "MNT/tasks/t")
    return made


def test_link_is_the_same_file(mount: Mounted) -> None:
    mount.run("ln", "MNT/staging/input.dat", "MNT/tasks/t/by-ln")
    mount.run("mkdir", "-p", "MNT/own/layout")
    mount.run("ln", "MNT/tasks/t/by-ln", "MNT/own/layout/again")
    mount.stagefs("sandbox", "create", "u", "--in", "x=staging:///input.dat")
    stats = mount.run(
        "stat",
        "-c",
        "%i %h %s",
        "MNT/staging/input.dat",
        "MNT/tasks/t/by-ln",
        "MNT/own/layout/again",
        "MNT/tasks/u/x",
    ).stdout.splitlines()
    assert len(set(stats)) == 1, stats
    assert stats[0].split()[1:] == [b"4", b"9"]
    mount.run("rm", "MNT/own/layout/again")
    assert mount.run("stat", "-c", "%h", "MNT/tasks/t/by-ln").stdout.strip() == b"3"


def test_url_target_makes_a_link_and_other_targets_a_symlink(
    mount: Mounted, web: HttpServed
) -> None:
    mount.run("ln", "-s", web.url("input.dat"), "MNT/tasks/t/linked")
    mount.run("ln", "-s", "staging:///input.dat", "MNT/tasks/t/staged")
    mount.run("ln", "-s", "../elsewhere", "MNT/tasks/t/plain")
    assert mount.run("stat", "-c", "%F", "MNT/tasks/t/linked").stdout.strip() == b"regular file"
    assert mount.run("stat", "-c", "%F", "MNT/tasks/t/staged").stdout.strip() == b"regular file"
    assert mount.run("readlink", "MNT/tasks/t/plain").stdout.strip() == b"../elsewhere"
    assert mount.read("tasks/t/linked") == mount.read("tasks/t/staged") == b"the input"


def test_link_to_what_is_not_there_fails_when_it_is_made(mount: Mounted, web: HttpServed) -> None:
    for target in (web.url("absent"), "staging:///absent"):
        done = mount.run("ln", "-s", target, "MNT/tasks/t/x", check=False)
        assert b"No such file or directory" in done.stderr
    done = mount.stagefs("sandbox", "create", "u", "--in", "x=staging:///absent", check=False)
    assert done.returncode != 0
    assert b"absent" in done.stderr
    assert mount.run("ls", "MNT/tasks").stdout.split() == [b"t"], "half a sandbox was left"


def test_directory_link_shows_the_subtree_with_an_inode_of_its_own(mount: Mounted) -> None:
    for task in ("u", "v"):
        mount.stagefs("sandbox", "create", task, "--in", "ref=staging:///dir")
        assert mount.read(f"tasks/{task}/ref/one") == b"one"
    paths = [f"MNT/{where}" for where in ("tasks/u/ref", "tasks/v/ref", "staging/dir")]
    directories = mount.run("stat", "-c", "%i", *paths).stdout.split()
    files = mount.run("stat", "-c", "%i", *(f"{path}/one" for path in paths)).stdout.split()
    assert len(set(directories)) == 3
    assert len(set(files)) == 1

    mount.run("rm", "MNT/tasks/u/ref/one")
    assert mount.run("ls", "MNT/tasks/u/ref").stdout == b""
    assert mount.read("tasks/v/ref/one") == b"one"
    assert mount.read("staging/dir/one") == b"one"


def test_sandboxes_are_listed_and_removed(mount: Mounted) -> None:
    mount.stagefs("sandbox", "create", "u", "--in", "a=staging:///input.dat")
    listed = json.loads(mount.stagefs("sandbox", "list", "--json").stdout)
    assert "u" in json.dumps(listed)
    mount.run("rm", "-r", "MNT/tasks/u")
    assert mount.read("staging/input.dat") == b"the input"
    assert mount.run("ls", "MNT/tasks").stdout.split() == [b"t"]
