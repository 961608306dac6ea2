"""mount.stagefs: from mount(8)'s words to ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mount_stagefs import arguments, translate

from stagefs.errors import InvalidConfig

HELPER = Path(__file__).parents[3] / "mount/mount_stagefs.py"


def test_options_become_those_of_the_command() -> None:
    options = "rw,noauto,_netdev,x-systemd.automount,allow_other,state=/s,capacity=10GiB,run_as=me"
    assert translate(options, sloppy=False) == [
        "--allow-other",
        "--state",
        "/s",
        "--capacity",
        "10GiB",
        "--user",
        "me",
    ]


def test_settings_by_their_dotted_names() -> None:
    assert translate("remote.ssh.config=/x=y", sloppy=False) == ["--set", "remote.ssh.config=/x=y"]


def test_unknown_option_is_refused_unless_sloppy() -> None:
    with pytest.raises(InvalidConfig, match="does not know the option 'capcity'"):
        translate("capcity=1GiB", sloppy=False)
    assert translate("capcity=1GiB", sloppy=True) == []


def test_as_mount_calls_it() -> None:
    words = arguments(["stagefs", "/mnt", "-n", "-v", "-o", "rw,state=/s", "-o", "lifetime=job"])
    assert words == ["mount", "--state", "/s", "--lifetime", "job", "--", "/mnt"]
    assert arguments(["stagefs", "/mnt", "-f"]) is None
    for wrong in (["/mnt"], ["a", "b", "c"], ["a", "b", "-q"]):
        with pytest.raises(InvalidConfig, match=r"mount\.stagefs"):
            arguments(wrong)


def test_refusal_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, HELPER, "stagefs", tmp_path, "-o", "colour=blue"],
        capture_output=True,
        check=False,
        env={"PATH": os.defpath},
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"mount.stagefs: ")
    assert done.stderr.count(b"\n") == 1
