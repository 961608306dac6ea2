"""Which mount a command means, and what a typed name means in it."""

import os
from pathlib import Path

import pytest

from stagefs.cli.finding import (
    FoundMount,
    Supervisor,
    Target,
    choose_mount,
    linked_socket,
    staging_mounts,
    supervisor_of,
)
from stagefs.control.client import Client
from stagefs.errors import InvalidName, NoDaemon

MOUNTINFO = """\
21 1 259:1 / / rw - ext4 /dev/root rw
40 21 0:50 / /mnt/a rw,nosuid - fuse.stagefs stagefs rw,user_id=1000,group_id=1000,max_read=0
41 21 0:51 / /mnt/b\\040c rw,nosuid - fuse.stagefs stagefs rw,user_id=0,group_id=0
42 21 0:52 / /mnt/ssh rw - fuse.sshfs host:/ rw,user_id=1000,group_id=1000
43 21 0:53 / /mnt/hidden rw - fuse.stagefs stagefs rw,user_id=0,group_id=0
44 43 0:54 / /mnt/hidden rw - tmpfs tmpfs rw
"""
A, B = FoundMount("/mnt/a", 1000), FoundMount("/mnt/b c", 0)


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGEFS_MOUNT", raising=False)


def test_mounts_of_this_machine() -> None:
    assert staging_mounts(MOUNTINFO) == [A, B]


def test_option_then_variable_then_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_mount("/mnt/b c/", [A, B], uid=0) == B
    assert choose_mount(None, [A, B], uid=1000) == A
    monkeypatch.setenv("STAGEFS_MOUNT", "/mnt/b c")
    assert choose_mount(None, [A, B], uid=1000) == B
    assert choose_mount("/mnt/a", [A, B], uid=1000) == A


def test_mount_may_be_named_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/mnt/a")
    assert choose_mount(str(tmp_path / "link"), [A, B], uid=0) == A


def test_what_is_not_clear_is_refused() -> None:
    with pytest.raises(InvalidName, match=r"Say --mount or STAGEFS_MOUNT.*/mnt/a, /mnt/b c"):
        choose_mount(None, [A, B], uid=0)
    with pytest.raises(NoDaemon, match="no StageFS mount of yours"):
        choose_mount(None, [A, B], uid=7)
    with pytest.raises(NoDaemon, match=r"/mnt/x is no StageFS mount: the only mount is /mnt/a"):
        choose_mount("/mnt/x", [A], uid=0)
    with pytest.raises(NoDaemon, match="there is none on this machine"):
        choose_mount("/mnt/x", [], uid=0)


def test_socket_is_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / ".stagefs").mkdir()
    (tmp_path / ".stagefs/control").symlink_to("/state/control.sock")
    assert linked_socket(str(tmp_path)) == Path("/state/control.sock")


def test_supervisor_is_found_by_its_command_line(tmp_path: Path) -> None:
    def run(pid: int, *words: str) -> None:
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_bytes("\0".join([*words, ""]).encode())

    (tmp_path / "self").mkdir()
    run(5, "vi", "stagefs.supervisor")
    run(6, "python", "-m", "stagefs.supervisor", "--mountpoint", "/mnt/b", "--state", "/wrong")
    run(7, "python", "-m", "stagefs.daemon", "--mountpoint", "/mnt/a", "--state", "/s")
    run(8, "python", "-m", "stagefs.supervisor", "--mountpoint", "/mnt/a", "--state", "/s")
    own = FoundMount("/mnt/a", os.geteuid())
    assert supervisor_of(own, tmp_path) == Supervisor(8, Path("/s"))
    assert supervisor_of(FoundMount("/mnt/c", os.geteuid()), tmp_path) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory away, which root may do")
def test_process_of_somebody_else_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "8").mkdir()
    words = ["python", "-m", "stagefs.supervisor", "--mountpoint", "/mnt/a", "--state", "/trap"]
    (tmp_path / "8/cmdline").write_bytes("\0".join([*words, ""]).encode())
    os.chown(tmp_path / "8", 4711, 4711)
    assert supervisor_of(FoundMount("/mnt/a", 1000), tmp_path) is None
    assert supervisor_of(FoundMount("/mnt/a", 4711), tmp_path) is not None


def test_mount_without_an_answer_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(NoDaemon, match=r"cannot be asked \(No such file or directory\)"):
        linked_socket(str(tmp_path))


def test_typed_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mountpoint = os.path.realpath(tmp_path)
    (tmp_path / "staging").mkdir()
    target = Target(mountpoint, Client(Path("/none")))
    assert target.path("staging:///a/../b") == "staging:///a/../b"
    assert target.path(f"{mountpoint}/staging/x") == "/staging/x"
    assert target.path(mountpoint) == "/"
    monkeypatch.chdir(tmp_path / "staging")
    assert target.path("x") == "/staging/x"
    (tmp_path / "alias").symlink_to(tmp_path / "staging")
    assert target.path(str(tmp_path / "alias" / "x")) == "/staging/x"
    assert target.path(str(tmp_path / "alias")) == "/alias"
    with pytest.raises(InvalidName, match=r"/etc/x is not in the mount"):
        target.path("/etc/x")
    with pytest.raises(InvalidName, match="is not in the mount"):
        target.path(f"{mountpoint}-other/x")
