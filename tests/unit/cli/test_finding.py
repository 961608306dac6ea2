"""Which mount a command means, and what a typed name means in it."""

import os
from pathlib import Path

import pytest

from stagefs.cli.finding import (
    Supervisor,
    Target,
    linked_socket,
    supervisor_of,
)
from stagefs.control.client import Client
from stagefs.control.mounts import FoundMount
from stagefs.errors import InvalidName, NoDaemon


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
