"""Pins and leases: kept over restarts, ended by time or by hand, never in the index."""

from pathlib import Path

import pytest

from stagefs.cache.leases import Leases, read_leases
from stagefs.errors import CacheFailed
from tests.unit.cache.filling import Clock, opened

A, B = "aa" * 20, "bb" * 20


def test_leases_outlive_the_daemon_and_the_index(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path / "c", clock=clock) as cache:
        cache.pin([(A, "http://host/a\udcff"), (B, "http://host/b")], owner="task 1")
        cache.pin([(A, "http://host/a\udcff")], owner="task 2", expires=clock.now + 100)
    (tmp_path / "c" / "index.sqlite").unlink()
    with opened(tmp_path / "c", clock=clock) as cache:
        assert [(lease.key, lease.owner) for lease in cache.leases()] == [
            (A, "task 1"),
            (A, "task 2"),
            (B, "task 1"),
        ]
        assert cache.leases_of(A)[0].url == "http://host/a\udcff"
        assert cache.usage().leases == 3


def test_a_lease_ends_with_its_time(tmp_path: Path) -> None:
    clock = Clock()
    leases = Leases(tmp_path / "leases.sqlite", clock=clock)
    leases.pin([(A, "url")], owner="me", expires=clock.now + 10)
    assert leases.covers(A)
    clock.advance(10)
    assert not leases.covers(A)
    assert leases.of(A) == []
    assert leases.list() == []
    assert leases.expire() == 1
    assert leases.expire() == 0
    leases.close()


def test_an_owners_lease_is_renewed_not_doubled(tmp_path: Path) -> None:
    clock = Clock()
    leases = Leases(tmp_path / "leases.sqlite", clock=clock)
    leases.pin([(A, "url")], owner="me", expires=clock.now + 10)
    leases.pin([(A, "url")], owner="me", expires=clock.now + 1000)
    clock.advance(100)
    assert len(leases.list()) == 1
    leases.close()


@pytest.mark.parametrize(
    ("keys", "owner", "left"),
    [
        ([A], None, [(B, "x"), (B, "y")]),
        ([A], "x", [(A, "y"), (B, "x"), (B, "y")]),
        (None, "x", [(A, "y"), (B, "y")]),
        (None, None, []),
        (["cc" * 20], None, [(A, "x"), (A, "y"), (B, "x"), (B, "y")]),
    ],
)
def test_unpin(
    tmp_path: Path, keys: list[str] | None, owner: str | None, left: list[tuple[str, str]]
) -> None:
    path = tmp_path / "leases.sqlite"
    leases = Leases(path)
    for name in ("x", "y"):
        leases.pin([(A, "url"), (B, "url")], owner=name)
    assert leases.unpin(keys, owner=owner) == 4 - len(left)
    assert [(lease.key, lease.owner) for lease in leases.list()] == left
    leases.close()
    assert sorted((lease.key, lease.owner) for lease in read_leases(path)) == left


def test_a_damaged_file_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "leases.sqlite"
    path.write_bytes(b"no database at all" * 1000)
    leases = Leases(path)
    leases.pin([(A, "url")], owner="me")
    leases.close()
    assert "pins and leases are lost" in caplog.text
    assert (tmp_path / "leases.damaged").exists()
    assert len(read_leases(path)) == 1


def test_a_place_that_cannot_be_written_is_a_failed_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheFailed):
        Leases(tmp_path / "nowhere" / "leases.sqlite")


def test_an_owner_whose_name_is_no_utf8(tmp_path: Path) -> None:
    path, owner = tmp_path / "leases.sqlite", "task:7:caf\udce9"
    Leases(path).pin([(A, "url")], owner=owner)
    kept = Leases(path)
    assert [lease.owner for lease in kept.list()] == [owner]
    kept.pin([(A, "url")], owner=owner)
    assert kept.unpin(None, owner=owner) == 1
    assert read_leases(path) == []
