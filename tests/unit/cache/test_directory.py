"""Whose directory it is, and who may have it."""

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from stagefs.cache.store import Cache
from stagefs.errors import NewerFormat, StateInUse, UnsuitableState
from stagefs.model import MIB
from tests.unit.cache.filling import CHUNK, opened, small, store


def test_everything_is_private(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "cache"
    before = os.umask(0)
    try:
        with opened(directory) as cache:
            store(cache, "a", 2 * CHUNK)
            cache.store_small([small("b")])
            cache.pin([("00" * 20, "http://host/x")], owner="me")
            cache.flush_index()
            for top, directories, files in os.walk(directory):
                assert stat.S_IMODE(os.stat(top).st_mode) == 0o700, top
                for name in files:
                    mode = stat.S_IMODE(os.stat(os.path.join(top, name)).st_mode)
                    assert mode == 0o600, f"{name} has mode {mode:o}"
                assert not [name for name in directories if os.path.islink(name)]
    finally:
        os.umask(before)


def test_a_second_daemon_is_told_who_has_it(tmp_path: Path) -> None:
    with opened(tmp_path / "c"):
        with pytest.raises(StateInUse) as refused, opened(tmp_path / "c"):
            pass
        message = str(refused.value)
        assert f"process {os.getpid()} on {socket.gethostname()}" in message
        lock = json.loads((tmp_path / "c" / "lock").read_text())
        assert set(lock) == {"host", "pid", "started"}
    with opened(tmp_path / "c"):
        pass


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path / "c"):
        pass
    (tmp_path / "c" / "version").write_text("stagefs cache format 2\n")
    (tmp_path / "c" / "new").write_text("something of that release")
    before = sorted(path.name for path in (tmp_path / "c").iterdir())
    with pytest.raises(NewerFormat, match="format 2"), opened(tmp_path / "c"):
        pass
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == before


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(UnsuitableState, match="not empty"), opened(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_fresh_file_system_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    with opened(tmp_path):
        pass


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("")
    with pytest.raises(UnsuitableState), opened(tmp_path / "c"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_somebody_elses_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    os.chown(tmp_path / "c", 12345, -1)
    with pytest.raises(UnsuitableState, match="belongs to user 12345"), opened(tmp_path / "c"):
        pass


def test_what_was_never_committed_is_cleared_away(tmp_path: Path) -> None:
    with opened(tmp_path / "c"):
        pass
    left = tmp_path / "c" / "incoming" / ("ab" * 20 + ".1")
    left.write_bytes(b"half a chunk")
    with opened(tmp_path / "c"):
        assert not left.exists()


def test_opening_does_not_look_at_the_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "c") as cache:
        for number in range(20):
            store(cache, f"o{number}", CHUNK)
    listed: list[str] = []
    real_listdir, real_scandir, real_open = os.listdir, os.scandir, os.open

    def note(path: object) -> str:
        listed.append(os.fspath(path) if isinstance(path, (str, os.PathLike)) else "")
        return listed[-1]

    monkeypatch.setattr(os, "listdir", lambda path=".": (note(path), real_listdir(path))[1])
    monkeypatch.setattr(os, "scandir", lambda path=".": (note(path), real_scandir(path))[1])
    monkeypatch.setattr(
        os, "open", lambda path, *args, **named: (note(path), real_open(path, *args, **named))[1]
    )
    cache = Cache.open(tmp_path / "c", capacity_bytes=MIB, chunk_bytes=CHUNK)
    cache.close()
    assert listed, "the spy saw nothing"
    assert not [path for path in listed if "/objects/" in path]
