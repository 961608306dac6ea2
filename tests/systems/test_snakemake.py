"""Snakemake itself, with the storage plug-in in tools/snakemake, on a mount."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.nginx import Nginx
from tests.support.served import Served, content, serving
from tests.systems.conftest import PROGRAMS, System, installed

MakeMount = Callable[..., Mounted]
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("all_ended")]

DATA = content(300_000)  # one request brings it
WORKFLOW = """
storage:
    provider="stagefs",


SAMPLES = glob_wildcards(storage.stagefs("staging:///reads/{sample}.fq")).sample
assert sorted(SAMPLES) == ["a", "b"], SAMPLES


rule all:
    input:
        storage.stagefs("SSH/total"),


rule count:
    input:
        cold=storage.stagefs("URL"),
        reads=storage.stagefs("staging:///reads/{sample}.fq"),
    output:
        storage.stagefs("staging:///out/{sample}"),
        storage.stagefs("SSH/each/{sample}"),
    shell:
        "test -L {input.cold} && cat {input.cold} {input.reads} | wc -c > {output[0]};"
        " cp {output[0]} {output[1]}"


rule total:
    input:
        storage.stagefs(expand("staging:///out/{sample}", sample=SAMPLES)),
        storage.stagefs(expand("SSH/each/{sample}", sample=SAMPLES)),
    output:
        storage.stagefs("SSH/total"),
    shell:
        "cat {input} > {output}"
"""


@pytest.fixture
def ssh(work: Path) -> Iterator[Served]:
    (work / "ssh").mkdir()
    with serving("ssh", work / "ssh") as server:
        yield server


def runs(system: System, *words: str) -> str:
    return system.run("python", "-m", "snakemake", "--cores", "2", *words)


def test_workflow(
    identity: Identity, nginx: Nginx, ssh: Served, work: Path, new_mount: MakeMount
) -> None:
    (nginx.root / "cold.dat").write_bytes(DATA)
    mount = new_mount(identity, environment=ssh.environment(identity))
    for sample in ("a", "b"):
        mount.stage_in(ssh.put(f"{sample}.fq", sample.encode()), f"reads/{sample}.fq")
    snakemake = installed("snakemake", identity, work)
    snakemake.environment.update(mount.environment, STAGEFS_MOUNT=str(mount.point))
    text = WORKFLOW.replace("URL", nginx.url("cold.dat")).replace("SSH", ssh.url("stored"))
    (snakemake.directory / "Snakefile").write_text(text)
    said = runs(snakemake)
    counted = f"{len(DATA) + 1}\n".encode()
    assert ssh.get("stored/total") == counted * 4, said
    assert [asked.method for asked in nginx.asked()].count("GET") == 1, "fetched once for two jobs"
    assert mount.read("staging/out/a") == counted
    stored = [name for name in ssh.names() if name.startswith("stored/")]
    assert stored == ["stored/each/a", "stored/each/b", "stored/total"], "and nothing else"
    assert "Nothing to be done" in runs(snakemake)
    # A newer input makes the outputs anew, in place of what is at the remote.
    (nginx.root / "cold.dat").write_bytes(DATA[:1000])
    said = runs(snakemake)
    assert ssh.get("stored/total") == b"1001\n" * 4, said
    snakemake.wait_for_its_end()


def test_working_directory_in_the_mount(
    anybody: Identity, nginx: Nginx, work: Path, new_mount: MakeMount
) -> None:
    """Inputs are virtual links then."""
    (nginx.root / "cold.dat").write_bytes(DATA)
    mount = new_mount(anybody)
    snakemake = installed("snakemake", anybody, work)
    text = (
        'storage:\n    provider="stagefs",\n    mount="MNT",\n    keep_local=True,\n\n'
        'rule copy:\n    input: storage.stagefs("URL")\n'
        '    output: storage.stagefs("staging:///out/copied")\n'
        '    shell: "test ! -L {input} && cp {input} {output}"\n'
    )
    text = text.replace("MNT", str(mount.point)).replace("URL", nginx.url("cold.dat"))
    (snakemake.directory / "Snakefile").write_text(text)
    mount.run("mkdir", "MNT/here")
    file = str(snakemake.directory / "Snakefile")
    said = runs(snakemake, "--snakefile", file, "--directory", str(mount.point / "here"))
    assert mount.sha256("staging/out/copied") == hashlib.sha256(DATA).hexdigest(), said
    assert mount.xattr("staging/out/copied", "state") == "published"
    snakemake.wait_for_its_end()


@pytest.mark.parametrize("inside", [True, False], ids=["in the mount", "elsewhere"])
def test_each_question_of_the_interface(
    anybody: Identity, ssh: Served, work: Path, new_mount: MakeMount, inside: bool
) -> None:
    mount = new_mount(anybody, environment=ssh.environment(anybody))
    snakemake = installed("snakemake", anybody, work)
    snakemake.environment.update(mount.environment)
    local = mount.point / "local" if inside else snakemake.directory / "local"
    said = snakemake.run(
        *("python", PROGRAMS / "snakemake_storage.py", mount.point, local, f"{ssh.url('stored')}/")
    )
    answer = json.loads(said)
    assert answer["links"] == (2 if inside else 1), "published without a copy where that can be"
    assert answer["staged"] == [True, 14, 1_500_000_000.0, 0]
    assert answer["tree"] == ["staging:///out/a", "staging:///tree/sub/leaf"]
    assert answer["remote"] == [True, 8, 1_500_000_000.0, 0]
    assert answer["listed"] == [f"{ssh.url('stored')}/b c"]
    assert answer["read"] == "far away"
    assert answer["removed"] == [False, False]
    assert ssh.names() == []
    assert "read only" in answer["refused"]
    assert answer["valid"] == {"ssh://h/{x}": True, "x": False, "s3://b/../k": False}
    assert answer["suffix"] == "https/h/{x}/y?z=1"


def test_missing_inputs_are_told(
    anybody: Identity, nginx: Nginx, work: Path, new_mount: MakeMount
) -> None:
    mount = new_mount(anybody)
    snakemake = installed("snakemake", anybody, work)
    snakemake.environment.update(STAGEFS_MOUNT=str(mount.point))
    for query in (nginx.url("absent"), "staging:///absent"):
        (snakemake.directory / "Snakefile").write_text(
            f'rule all:\n    input: storage.stagefs("{query}")\n    shell: "cat {{input}}"\n'
        )
        done = snakemake.identity.run(
            *("python", "-m", "snakemake", "--cores", "1"),
            directory=snakemake.directory,
            environment=snakemake.environment,
            check=False,
        )
        said = (done.stdout + done.stderr).decode()
        assert done.returncode != 0
        assert "Missing input files" in said, said
        assert query in said, said
        assert "Traceback" not in said, said
    snakemake.wait_for_its_end()
