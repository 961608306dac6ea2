"""pandas, Dask and zarr themselves, reading and writing ``staging://`` through a mount."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.identity import CHECKOUT, Identity
from tests.support.mounted import Mounted, sha256
from tests.support.nginx import Nginx
from tests.systems.conftest import PROGRAMS, System, installed

MakeMount = Callable[..., Mounted]
pytestmark = pytest.mark.timeout(400)

TABLES = 4
ROWS = 500


def rows(number: int) -> bytes:
    return b"number,text\n" + b"".join(b"%d,row\n" % (number * ROWS + row) for row in range(ROWS))


@pytest.fixture
def mount(identity: Identity, new_mount: MakeMount, nginx: Nginx) -> Mounted:
    made = new_mount(identity)
    for number in range(TABLES):
        (nginx.root / f"{number}.csv").write_bytes(rows(number))
        made.stage_in(nginx.url(f"{number}.csv"), f"rows/{number}.csv")
    return made


@pytest.fixture
def system(identity: Identity, work: Path, mount: Mounted) -> Iterator[System]:
    one = installed("fsspec", identity, work)
    environment = {**one.environment, "STAGEFS_MOUNT": str(mount.point)}
    yield dataclasses.replace(one, environment=environment)
    one.wait_for_its_end()


Ask = Callable[..., Any]


@pytest.fixture
def ask(system: System) -> Ask:
    """``ask(case, argument...)``: what a program found."""

    def run(case: str, *arguments: str | Path) -> Any:
        system.run("python", PROGRAMS / "fsspec_reads.py", case, *arguments, deadline_s=300)
        return json.loads((system.directory / "answer.json").read_text())

    return run


def gets(nginx: Nginx) -> list[str]:
    return sorted(asked.uri for asked in nginx.asked() if asked.method == "GET")


def test_pandas_reads_and_writes_tables(ask: Ask, mount: Mounted, nginx: Nginx) -> None:
    found = ask("table")
    assert found["sum"] == sum(range(ROWS))
    assert found["old_bytes"] == len(rows(0)), "an open file changed under its reader"
    assert found["again"] == found["squares"] == sum(n * n for n in range(1000))
    assert mount.xattr("staging/out/pandas/squares.parquet", "state") == "published"
    assert gets(nginx) == ["/plain/0.csv"]


@pytest.mark.parametrize("named", ["named", "found"])
def test_dask_workers_share_one_fetch(ask: Ask, mount: Mounted, nginx: Nginx, named: str) -> None:
    found = ask("many_tables", mount.point, named)
    assert found["workers"] == 2
    assert found["parts"] == TABLES
    assert found["sum"] == found["again"] == sum(range(TABLES * ROWS))
    assert gets(nginx) == [f"/plain/{number}.csv" for number in range(TABLES)]


def test_zarr_fetches_the_chunks_that_are_read(
    ask: Ask, system: System, mount: Mounted, nginx: Nginx
) -> None:
    code = (
        "import sys, numpy, zarr; zarr.create_array(sys.argv[1], shape=(400, 400),"
        " chunks=(100, 100), dtype='int32')[:] = numpy.arange(160_000).reshape(400, 400)"
    )
    system.run("python", "-c", code, system.directory / "cube")
    cube = system.directory / "cube"
    for path in sorted(one for one in cube.rglob("*") if one.is_file()):
        name = str(path.relative_to(cube)).replace("/", "-")
        (nginx.root / name).write_bytes(path.read_bytes())
        mount.stage_in(nginx.url(name), f"cube.zarr/{path.relative_to(cube)}")
    found = ask("array", mount.point)
    corner = sum(400 * row + column for row in range(100) for column in range(100))
    assert found == {"corner": corner, "doubled": 2 * corner, "attribute": "by a task"}
    # Sixteen chunks are there.
    assert gets(nginx) == ["/plain/c-0-0", "/plain/zarr.json"]


def test_names_are_those_of_the_namespace(ask: Ask, mount: Mounted) -> None:
    mount.run("rm", "-r", "MNT/staging/rows")
    found = ask("names", mount.point)
    odd = "/n/a b#1%20.txt"
    assert found["listed"] == [odd, "/n/deep", "/n/linked"]
    assert found["sizes"] == {"/n/deep/one": 3, "/n/deep/two": 2}
    assert found["globbed"] == ["/n/deep/one"]
    assert found["walked"] == [odd, "/n/deep/one", "/n/deep/two", "/n/linked"]
    assert found["used_bytes"] == 5
    assert (found["cut"], found["part"]) == ("content", "te")
    assert found["url"] == "staging:///n/deep/one"
    assert found["key_stays"]
    assert found["key_changes"]
    assert found["linked"] == "1", "what was linked changed with the name"
    assert found["local"] == f"{mount.point}/staging/n/deep/two"
    assert not found["escape"]
    assert found["chained"] == "22"
    assert not found["late"], "a transaction's file is there before its end"
    assert found["left"] == ["/moved/copy", "/moved/late", "/moved/put", odd]
    assert found["put"] == "22"
    assert mount.run("ls", f"MNT/staging{Path(odd).parent}").stdout == b"a b#1%20.txt\n"


def test_refusals_name_what_was_meant(ask: Ask, mount: Mounted, identity: Identity) -> None:
    empty = identity.directory(mount.point.parent / "empty")
    found = ask("refusals", mount.point, empty)
    assert found["missing"] == [
        "FileNotFoundError",
        "[Errno 2] No such file or directory: 'staging:///absent/name'",
    ]
    assert found["missing_table"][0] == "FileNotFoundError"
    assert "staging:///absent.csv" in found["missing_table"][1]
    assert found["host"][0] == "InvalidUrl"
    assert "write staging:///host/x" in found["host"][1]
    for what in ("read", "write", "exists"):
        assert found[what] is not None, f"{what}: nothing is mounted, and nobody says so"
        assert found[what][0] == "NoDaemon"
        assert f"{empty} is no StageFS mount" in found[what][1]
    assert found["full"][0] == "OSError"
    assert list(empty.iterdir()) == []


def test_page(system: System, mount: Mounted, nginx: Nginx) -> None:
    text = (CHECKOUT / "docs/FSSPEC.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (nginx.root / "table.csv").write_bytes(rows(0))
    mount.stage_in(nginx.url("table.csv"), "table.csv")
    (system.directory / "page.py").write_text(program)
    printed = system.run("python", "page.py").split()
    assert printed == [str(sum(range(ROWS))), str(ROWS), f"{mount.point}/staging/table.csv"]
    assert mount.sha256("staging/copies/table.csv") == sha256(rows(0))
