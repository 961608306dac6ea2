"""Real programs on staged files give what they give on a plain copy (A10)."""

import dataclasses
import random
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import Served, content

MakeMount = Callable[..., Mounted]
# On a machine that is busy with tests a server may take longer than 2 s to answer an open.
PATIENT = "[read]\nanswer_deadline_s = 30\n"


@dataclasses.dataclass
class Place:
    """The same directory twice: a plain copy, and served and bound in a mount."""

    served: Served
    mount: Mounted
    plain: Path
    staged: Path
    published: bool = False

    def publish(self) -> None:
        """What is in the plain directory now is what the server has; once."""
        if not self.published:
            self.published = True
            self.served.publish(self.plain, "data")
            self.mount.stagefs("bind", self.served.url("data/"), "staging:///data")
            self.mount.stagefs("sandbox", "create", "t", "--in", "data=staging:///data")

    def same(self, *command: str) -> bytes:
        """Run a command in both; returns what both printed."""
        self.publish()
        plain = self.mount.run(*command, directory=self.plain)
        staged = self.mount.run(*command, directory=self.staged)
        assert staged.stdout == plain.stdout
        assert plain.stdout, f"{command} prints nothing, so nothing was compared"
        return staged.stdout


@pytest.fixture
def place(identity: Identity, served: Served, new_mount: MakeMount, work: Path) -> Place:
    plain = work / "plain"
    plain.mkdir(mode=0o755)
    mount = new_mount(identity, environment=served.environment(identity), settings=PATIENT)
    return Place(served, mount, plain, mount.point / "tasks/t/data")


def test_sha256sum_and_cmp(place: Place) -> None:
    for number, size in enumerate((0, 1, 4095, 65_537, 1 << 20, 9_999_999)):
        (place.plain / f"f{number}").write_bytes(content(size))
    names = [f"f{number}" for number in range(6)]
    place.same("sha256sum", *names)
    for name in names:
        place.mount.run("cmp", place.plain / name, place.staged / name)


def test_sqlite(place: Place) -> None:
    rows = random.Random(1)
    with sqlite3.connect(place.plain / "reads.sqlite") as database:
        database.execute("CREATE TABLE reads (name TEXT PRIMARY KEY, position INT, bases TEXT)")
        database.executemany(
            "INSERT INTO reads VALUES (?, ?, ?)",
            ((f"r{n}", rows.randrange(10**9), "ACGT" * 25) for n in range(40_000)),
        )
        database.execute("CREATE INDEX by_position ON reads (position)")
    database.close()
    for query in (
        "SELECT count(*), sum(position) FROM reads",
        "SELECT name FROM reads WHERE position BETWEEN 5e8 AND 5.01e8 ORDER BY position",
        "SELECT position FROM reads WHERE name IN ('r7', 'r39999')",
        "PRAGMA integrity_check",
    ):
        place.same("sqlite3", "reads.sqlite", query)


def test_executed_binary_and_script(place: Place) -> None:
    shutil.copy("/usr/bin/sha256sum", place.plain / "digest")
    (place.plain / "script").write_text("#!/bin/sh\nexec ./digest digest\n")
    (place.plain / "script").chmod(0o755)
    place.same("./script")


def test_virtual_environment(place: Place) -> None:
    venv = place.plain / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    packages = Path(sysconfig.get_path("purelib"))
    target = next(venv.glob("lib/python3*/site-packages"))
    for name in ("click", "msgspec", "xxhash"):  # two of them with compiled modules
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(packages / name, target / name, ignore=ignored)
    code = (
        "import click, msgspec, xxhash, sys; print(click.Command.__doc__);"
        "print(msgspec.json.encode([1]), xxhash.xxh3_64_hexdigest(b'x'), sys.prefix[-5:])"
    )
    printed = place.same("venv/bin/python3", "-c", code)
    assert b"/venv" in printed


def test_numpy_memmap(place: Place) -> None:
    values = np.frombuffer(content(24 << 20), dtype=np.uint32)
    values.tofile(place.plain / "values.u32")
    code = (
        "import numpy as np; v = np.memmap('values.u32', dtype=np.uint32, mode='r');"
        "print(v[5_000_000], v[::40_961].sum(), v[-3:], v.sum())"
    )
    printed = place.same("python", "-c", code)
    assert str(values[5_000_000]).encode() in printed


def test_tar(place: Place) -> None:
    tree = place.plain / "tree"
    for number in range(60):
        path = tree / f"d{number % 7}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number * 1000, "tar"))
    subprocess.run(["tar", "-cf", "packed.tar", "tree"], cwd=place.plain, check=True)
    place.same("tar", "-xOf", "packed.tar", "tree/d3/f52")
    place.same("tar", "-tf", "packed.tar")
    plain_form = ("--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--mode=755")
    place.same("tar", "-cf", "-", *plain_form, "tree")


def test_samtools_with_random_access(place: Place) -> None:
    bases = random.Random(2)
    fasta = place.plain / "ref.fa"
    with fasta.open("w") as file:
        for name in ("chr1", "chr2"):
            file.write(f">{name}\n")
            file.writelines("".join(bases.choices("ACGT", k=60)) + "\n" for _ in range(20_000))
    subprocess.run(["samtools", "faidx", fasta], check=True)
    sam = ["@HD\tVN:1.6\tSO:coordinate", "@SQ\tSN:chr1\tLN:1200000"]
    sam += [
        f"r{n}\t0\tchr1\t{n * 30 + 1}\t60\t50M\t*\t0\t0\t{'ACGTA' * 10}\t{'I' * 50}"
        for n in range(30_000)
    ]
    bam = place.plain / "reads.bam"
    subprocess.run(
        ["samtools", "view", "-b", "-o", bam], input="\n".join(sam) + "\n", text=True, check=True
    )
    subprocess.run(["samtools", "index", bam], check=True)
    place.same("samtools", "faidx", "ref.fa", "chr2:900000-900200")
    place.same("samtools", "view", "reads.bam", "chr1:400000-400500")
    place.same("samtools", "idxstats", "reads.bam")


def test_hdf5(place: Place) -> None:
    values = place.plain / "values.txt"
    values.write_text("\n".join(str(number * number % 9973) for number in range(60_000)) + "\n")
    subprocess.run(
        ["h5import", values, "-d", "300,200", "-p", "table", "-t", "TEXTIN", "-s", "32",
         "-o", place.plain / "table.h5"],
        check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    place.same("h5dump", "-d", "/table", "-s", "250,10", "-c", "3,7", "table.h5")
    place.same("h5ls", "-rv", "table.h5")
