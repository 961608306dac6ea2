"""stagefs-cache on a bare directory: what it tends, and the drills it damages things for."""

import csv
import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from stagefs_cache import stagefs_cache

from stagefs.cache.history import Event, eviction_rate, read_events, write_events
from stagefs.cache.inspect import CacheDirectory, FoundDamage, Verifying
from stagefs.cache.kept_capacity import keep_capacity, kept_capacity
from stagefs.model import MIB
from tests.unit.cache.filling import object_id, opened, small, store


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "c"
    with opened(directory) as cache:
        store(cache, "whole", MIB)
        store(cache, "part", MIB, range(8))
        cache.store_small([small("small")])
        cache.pin([(object_id("part").key, "http://host/part")], owner="task 7")
    return directory


def test_documentation_names_every_command() -> None:
    text = (Path(__file__).parents[3] / "docs/ADMINISTRATION.md").read_text("utf-8")
    missing = [name for name in stagefs_cache.commands if f"`{name}" not in text]
    assert not missing


def run(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(stagefs_cache, [str(word) for word in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def urls(directory: Path, *options: str) -> list[str]:
    return [one["url"] for one in json.loads(run("list", directory, "--json", *options).output)]


def test_list_chooses_and_sorts(directory: Path) -> None:
    assert urls(directory, "--sort", "cached") == [
        "http://host/whole", "http://host/part", "http://host/small",
    ]  # fmt: skip
    assert urls(directory, "--glob", "*/p*") == ["http://host/part"]
    assert urls(directory, "--pinned") == ["http://host/part"]
    assert urls(directory, "--sort", "url", "--limit", "1") == ["http://host/part"]


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("remote", {"http://host": 3}),
        ("prefix", {"http://host/": 3}),
        ("task", {"task 7": 1, "(nobody)": 2}),
    ],
)
def test_usage_by(directory: Path, by: str, groups: dict[str, int]) -> None:
    found = json.loads(run("usage", directory, "--by", by, "--json").output)
    assert {one["group"]: one["entries"] for one in found} == groups
    assert sum(one["cached_bytes"] for one in found) == MIB + MIB // 2 + 100


def test_leases(directory: Path) -> None:
    assert "task 7  for ever" in run("leases", directory).output
    (lease,) = json.loads(run("leases", directory, "--json").output)
    assert lease["url"] == "http://host/part"


def test_export(directory: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run("export", directory, "--format", "csv").output)))
    assert {row["url"] for row in rows} == set(urls(directory))
    assert {int(row["cached_bytes"]) for row in rows} == {MIB, MIB // 2, 100}
    assert len(json.loads(run("export", directory).output)) == 3


def test_cleanup_takes_the_oldest_and_leaves_what_is_pinned(directory: Path) -> None:
    run("cleanup", directory, "--to", "0")
    assert urls(directory) == ["http://host/part"]
    happened = json.loads(run("history", directory, "--json").output)
    assert {one["url"] for one in happened} == {"http://host/whole", "http://host/small"}
    assert {one["what"] for one in happened} == {"evicted"}
    assert "2 entries evicted" in run("cleanup-rate", directory).output
    assert run("history", directory, "--last", "1").output.count("\n") == 1


def test_cleanup_is_refused_while_a_daemon_has_the_directory(directory: Path) -> None:
    with opened(directory):
        done = CliRunner().invoke(stagefs_cache, ["cleanup", str(directory), "--to", "0"])
    assert done.exit_code != 0
    assert len(urls(directory)) == 3


def test_rate_tells_thrash(tmp_path: Path) -> None:
    now = [Event(at, "evicted", "k", "u", 10) for at in (2e9, 2e9)]
    old = Event(1.0, "evicted", "k", "u", 10)
    write_events(tmp_path, [old, *now])
    rate = eviction_rate(read_events(tmp_path), minutes=1)
    assert (rate.entries, rate.size_bytes, rate.again) == (2, 20, 1)


def test_history_survives_damage(tmp_path: Path) -> None:
    write_events(tmp_path, [Event(1.0, "evicted", "a")])
    with (tmp_path / "history").open("ab") as file:
        file.write(b"no json\n")
    write_events(tmp_path, [Event(2.0, "evicted", "b")])
    assert [event.key for event in read_events(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("drill", "url"),
    [
        ("corrupt", "http://host/whole"),
        ("truncate", "http://host/whole"),
        ("drop-map", "http://host/whole"),
        ("corrupt", "http://host/small"),
        ("drop-map", "http://host/small"),
    ],
)
def test_drills_are_found_by_verify(directory: Path, drill: str, url: str) -> None:
    assert "--yes" in str(
        CliRunner().invoke(stagefs_cache, ["chaos", drill, url, "--dir", str(directory)]).exception
    )
    assert run("verify", directory)
    run("chaos", drill, url, "--dir", directory, "--yes")
    assert "damaged: " in run("verify", directory, code=1).output


def test_verify_repairs(directory: Path) -> None:
    run("chaos", "corrupt", "http://host/whole", "--dir", directory, "--yes")
    assert "1 entries repaired" in run("verify", directory, "--repair").output
    assert "0 damaged" in run("verify", directory).output
    (whole,) = (one for one in CacheDirectory(directory).entries() if one.url.endswith("whole"))
    assert whole.cached_bytes < MIB


def test_verify_goes_on_where_it_stopped(directory: Path) -> None:
    steps = [step for step in CacheDirectory(directory).verify() if isinstance(step, Verifying)]
    places = [step.after for step in steps if step.after]
    assert len(places) == 3
    for number, place in enumerate(places, start=1):
        rest = list(CacheDirectory(directory).verify(after=place))
        left = rest[-1] if rest else None
        assert not isinstance(left, FoundDamage)
        assert (left.entries if left else 0) == 3 - number


def test_verify_resumes_from_the_position_that_was_written(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stagefs.cli.cache_bare.POSITION_WRITTEN_S", -1.0)
    real, seen = CacheDirectory.verify, 0

    def stopped(self: CacheDirectory, *, after: str = "") -> object:
        nonlocal seen
        for step in real(self, after=after):
            yield step
            seen += isinstance(step, Verifying) and bool(step.after)
            if seen == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CacheDirectory, "verify", stopped)
        assert CliRunner().invoke(stagefs_cache, ["verify", str(directory)]).exit_code != 0
    after_first = json.loads((directory / "verify.position").read_bytes())
    assert after_first["entries"] == 2
    found = json.loads(run("verify", directory, "--resume", "--json").output)
    assert found["entries"] == 3
    assert not (directory / "verify.position").exists()


def test_consistency(directory: Path) -> None:
    assert "0 differences" in run("consistency", directory).output
    key = object_id("whole").key
    (directory / "objects" / key[:2] / key).unlink()
    done = run("consistency", directory, code=1)
    assert "is in the index, and has no file" in done.output


def test_kept_capacity_holds_for_its_configuration_only(tmp_path: Path) -> None:
    keep_capacity(tmp_path, 5, configured=None)
    assert kept_capacity(tmp_path, configured=None) == 5
    assert kept_capacity(tmp_path, configured=7) is None
    keep_capacity(tmp_path, None, configured=None)
    assert kept_capacity(tmp_path, configured=None) is None
