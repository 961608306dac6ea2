import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from relocatable import launchers

from tests.support.identity import CHECKOUT


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A tree whose Python is a program that says how it was called."""
    top = tmp_path / "of the site" / "stagefs-1"
    (top / "python/lib").mkdir(parents=True)
    python = top / "python/python3.11"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$SSL_CERT_FILE" "$0" "$@"\n')
    python.chmod(0o755)
    launchers.write(top, python="python3.11", glibc=(2, 36))
    return top


def fake(directory: Path, name: str, says: str) -> None:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\necho {says}\n")
    path.chmod(0o755)


def called(program: Path, *words: str, path: str = os.defpath) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *words],
        env={"PATH": path, "SSL_CERT_FILE": "/given"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_command_of_the_wheel_has_a_launcher() -> None:
    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {name: f"{module}:main" for name, module in launchers.COMMANDS.items()} == scripts


@pytest.mark.parametrize("glibc", ["2.36", "2.41"])
def test_it_is_found_through_links_and_hands_on_every_word(
    top: Path, tmp_path: Path, glibc: str
) -> None:
    fake(tmp_path / "bin", "getconf", f"glibc {glibc}")
    link = tmp_path / "stagefs"
    link.symlink_to(top / "bin/stagefs")
    done = called(link, "a b", "*", "", path=f"{tmp_path / 'bin'}:{os.defpath}")
    command = str(top / "python/lib/commands/stagefs")
    said = ["/given", str(top / "python/python3.11"), command, "a b", "*", ""]
    assert done.stdout.split("\n")[:-1] == said, done.stderr


@pytest.mark.parametrize("glibc", ["glibc 2.35", "glibc 2.9", "glibc 3.0", "unheard-of", ""])
def test_too_old_a_machine_is_told_in_one_sentence(top: Path, tmp_path: Path, glibc: str) -> None:
    fake(tmp_path / "bin", "getconf", glibc)
    done = called(top / "bin/stagefs-cache", path=f"{tmp_path / 'bin'}:{os.defpath}")
    assert done.returncode == 1
    assert done.stderr == (
        "stagefs-cache: this build of StageFS needs glibc 2.36 or later, which is not here:"
        " install StageFS with pip instead.\n"
    )
    assert not done.stdout
