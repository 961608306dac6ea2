"""The command stagefs-cache on a bare directory, run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stagefs.cache.inspect import EntryDetail, EntrySummary
from stagefs.cli.chunk_maps import chunk_map
from stagefs.model import MIB
from tests.unit.cache.filling import CHUNK, flip, object_file, object_id, opened, small, store


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import stagefs_cache; stagefs_cache.main()", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[3] / "tools",
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "c"
    with opened(directory) as cache:
        store(cache, "whole", MIB)
        store(cache, "part", MIB, range(8))
        cache.store_small([small("small")])
        cache.pin([(object_id("part").key, "http://host/part")], owner="task 7")
    return directory


def test_list(directory: Path) -> None:
    done = run("list", directory)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    (part,) = [line for line in lines if "http://host/part" in line]
    assert "512 KiB" in part
    assert " P " in part


def test_list_as_json(directory: Path) -> None:
    listed = json.loads(run("list", "--json", directory).stdout)
    assert {each["url"] for each in listed} == {
        "http://host/whole",
        "http://host/part",
        "http://host/small",
    }


def test_usage(directory: Path) -> None:
    assert "entries    3" in run("usage", directory).stdout
    usage = json.loads(run("usage", "--json", directory).stdout)
    assert usage["entries"] == 3
    assert usage["cached_bytes"] == MIB + MIB // 2 + 100


def test_show(directory: Path) -> None:
    shown = run("show", "--dir", directory, "http://host/part").stdout
    assert "8 of 16, 64 KiB each" in shown
    assert "########........" in shown
    assert "by task 7" in shown
    (detail,) = json.loads(run("show", "--dir", directory, "--json", object_id("part").key).stdout)
    assert detail["present"] == [[0, 8]]


def test_verify(directory: Path) -> None:
    done = run("verify", directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 entries" in done.stdout
    assert "0 damaged" in done.stdout


def test_verify_exits_1_on_damage(directory: Path) -> None:
    flip(object_file(directory, "whole"), 3 * CHUNK)
    done = run("verify", directory)
    assert done.returncode == 1
    assert "chunk 3 (http://host/whole)" in done.stdout
    as_json = run("verify", "--json", directory)
    assert as_json.returncode == 1
    (damage,) = json.loads(as_json.stdout)["damaged"]
    assert (damage["chunk"], damage["url"]) == (3, "http://host/whole")


@pytest.mark.parametrize(
    "arguments",
    [("list", "/nonexistent"), ("usage", "/proc"), ("verify", "/dev/null")],
)
def test_a_wrong_directory_is_one_sentence(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert arguments[1] in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_entry_is_one_sentence(directory: Path) -> None:
    done = run("show", "--dir", directory, "http://host/none")
    assert done.returncode == 2
    assert "nothing is cached of http://host/none" in done.stderr


@pytest.mark.parametrize(
    ("chunks", "present", "drawn"),
    [
        (4, [(0, 4)], "####"),
        (4, [(1, 2)], ".##."),
        (0, [], ""),
        (1000, [(0, 1000)], "#" * 10),
        (1000, [(0, 1)], "+" + "." * 9),
        (1000, [(999, 1)], "." * 9 + "+"),
        (1000, [(50, 100)], "++" + "." * 8),
        (7, [(6, 1)], "......#"),
        (15, [(0, 15)], "#" * 10),
        (15, [(3, 1)], "..+" + "." * 7),
    ],
)
def test_the_chunk_map(chunks: int, present: list[tuple[int, int]], drawn: str) -> None:
    entry = EntrySummary("k", "u", "v", chunks, 0, 0, 0, pinned=False, place="p")
    detail = EntryDetail(entry, "v", None, None, 1, chunks, present, [])
    assert chunk_map(detail, 10) == drawn
