"""Which mount is meant."""

from pathlib import Path

import pytest

from stagefs.control.mounts import FoundMount, choose_mount, staging_mounts
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
    with pytest.raises(InvalidName, match=r"Say mount= or"):
        choose_mount(None, [A, B], uid=0, option="mount=")
    with pytest.raises(NoDaemon, match="no StageFS mount of yours"):
        choose_mount(None, [A, B], uid=7)
    with pytest.raises(NoDaemon, match=r"/mnt/x is no StageFS mount: the only mount is /mnt/a"):
        choose_mount("/mnt/x", [A], uid=0)
    with pytest.raises(NoDaemon, match="there is none on this machine"):
        choose_mount("/mnt/x", [], uid=0)
