"""The programs that pages of docs/ show, as they are printed there."""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.identity import CHECKOUT, Identity
from tests.support.mounted import Mounted
from tests.support.nginx import Nginx
from tests.support.served import content
from tests.systems.conftest import System, installed

MakeMount = Callable[..., Mounted]
pytestmark = pytest.mark.timeout(400)

DATA = content(300_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def mount(anybody: Identity, new_mount: MakeMount, nginx: Nginx) -> Mounted:
    (nginx.root / "input.dat").write_bytes(DATA)
    return new_mount(anybody)


RunPage = Callable[[str, str], str]


@pytest.fixture
def run_page(mount: Mounted, nginx: Nginx, work: Path) -> Iterator[RunPage]:
    """``run_page(page, system)``: what the page's program printed, on this mount."""
    used: list[System] = []

    def run(page: str, name: str) -> str:
        text = (CHECKOUT / "docs" / page).read_text()
        (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert "/tmp/pilot" in program
        assert "https://host/input.dat" in program
        program = program.replace("/tmp/pilot", str(mount.point))
        program = program.replace("https://host/input.dat", nginx.url("input.dat"))
        system = installed(name, mount.identity, work)
        used.append(system)
        (system.directory / "program.py").write_text(program)
        return system.run("python", "program.py")

    yield run
    for system in used:
        system.wait_for_its_end()


def test_radical_pilot(run_page: RunPage, mount: Mounted, nginx: Nginx) -> None:
    run_page("RADICAL-PILOT.md", "radical.pilot")
    for number in range(8):
        assert mount.read(f"staging/digests/{number}").split()[0].decode() == DIGEST
    assert [asked.method for asked in nginx.asked()].count("GET") == 1


def test_parsl(run_page: RunPage, mount: Mounted, nginx: Nginx) -> None:
    mount.stage_in(nginx.url("input.dat"), "input.dat")
    printed = run_page("PARSL.md", "parsl").splitlines()
    assert printed[0] == str(len(DATA))
    assert [line.split()[0] for line in printed[1:5]] == [DIGEST] * 4
    assert mount.run("ls", "MNT/staging/digests").stdout.split() == [b"0", b"1", b"2", b"3", b"all"]
    assert [asked.method for asked in nginx.asked()].count("GET") == 1


def test_snakemake(mount: Mounted, nginx: Nginx, work: Path) -> None:
    page = (CHECKOUT / "docs/SNAKEMAKE.md").read_text()
    (workflow,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "/tmp/pilot" in workflow
    assert "https://host/input.dat" in workflow
    workflow = workflow.replace("/tmp/pilot", str(mount.point))
    workflow = workflow.replace("https://host/input.dat", nginx.url("input.dat"))
    snakemake = installed("snakemake", mount.identity, work)
    (snakemake.directory / "Snakefile").write_text(workflow)
    snakemake.run("snakemake", "--cores", "4")
    lines = mount.read("staging/digests/all").decode().splitlines()
    assert [line.split()[0] for line in lines] == [DIGEST] * 4
    assert [asked.method for asked in nginx.asked()].count("GET") == 1
    snakemake.wait_for_its_end()
