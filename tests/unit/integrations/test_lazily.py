"""Integrations where their systems are not installed, and what is said of versions."""

import subprocess
import sys
from pathlib import Path

import pytest

from stagefs.errors import SetupError
from stagefs.integrations import fsspec, parsl, pyopus, radical_pilot

CHECKOUT = Path(__file__).parents[3]
TESTED = {
    "RADICAL-PILOT.md": radical_pilot.TESTED_WITH,
    "PARSL.md": parsl.TESTED_WITH,
    "FSSPEC.md": fsspec.TESTED_WITH,
    "PYOPUS.md": pyopus.TESTED_WITH,
}


def test_importing_them_imports_no_system_and_no_event_loop() -> None:
    code = """
import sys
import stagefs.integrations.parsl, stagefs.integrations.pyopus, stagefs.integrations.radical_pilot
print([name for name in ("parsl", "pyopus", "radical", "trio") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "[]\n"


def test_fsspec_finds_its_file_system_without_an_event_loop() -> None:
    code = """
import sys, fsspec
assert not any(name.startswith("stagefs") for name in sys.modules)
print(fsspec.get_filesystem_class("staging").__module__, "trio" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "stagefs.integrations.fsspec False\n"


def test_without_the_system_a_sentence_says_so(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"install radical\.pilot"):
        radical_pilot.install(tmp_path)
    with pytest.raises(SetupError, match="install parsl"):
        parsl.StageFSStaging(tmp_path)
    with pytest.raises(SetupError, match="install pyopus"):
        pyopus.install()


@pytest.mark.parametrize("page", TESTED)
def test_versions_are_those_of_the_tests(page: str) -> None:
    installing = (CHECKOUT / "tools/test_systems.sh").read_text()
    text = (CHECKOUT / "docs" / page).read_text()
    for tested in TESTED[page]:
        assert tested.replace(" ", "==") in installing
        assert tested in text
