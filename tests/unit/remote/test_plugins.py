"""Remotes that other packages bring: a package is laid out on disk, and a new process uses it."""

import subprocess
import sys
from pathlib import Path

_USE = """
import sys
import trio
from stagefs.errors import StageFSError
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.registry import Remotes
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.url import check_writable, normalize

async def main():
    remotes = Remotes(RemoteSettings(), CredentialStore(None))
    for url in sys.argv[1:]:
        try:
            print(normalize(url), (await remotes.for_url(url).stat(url)).size_bytes)
            check_writable(url)
        except StageFSError as error:
            print(type(error).__name__, error)
    await remotes.aclose()

trio.run(main)
"""

_DRIVER = """
from stagefs.remote.memory import MemoryRemote

def made(host_url, settings, credentials):
    remote = MemoryRemote(host_url)
    remote.store("/a b", b"seven..")
    return remote

broken = "not a driver"
"""


def _used(tmp_path: Path, *urls: str) -> list[str]:
    (tmp_path / "tapes.py").write_text(_DRIVER)
    about = tmp_path / "tapes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tapes\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[stagefs.remotes]\n"
        "tape = tapes:made\nbad = tapes:broken\nworse = nothing_there:made\nhttp = tapes:made\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", _USE, *urls],
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3]}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return result.stdout.splitlines()


def test_a_package_serves_its_scheme(tmp_path: Path) -> None:
    assert _used(tmp_path, "tape://Robot/a b") == ["tape://robot/a%20b 7"]


def test_a_package_that_does_not_work_is_told_of(tmp_path: Path) -> None:
    bad, worse, unknown = _used(tmp_path, "bad://h/x", "worse://h/x", "nobody://h/x")
    assert bad.startswith("RemoteError The remote for bad URLs (tapes:broken) is no driver")
    assert worse.startswith("RemoteError The remote for worse URLs (nothing_there:made) cannot")
    assert unknown.startswith("InvalidUrl The scheme 'nobody'")
    assert "tape" in unknown, "the known schemes name those of packages too"


def test_own_schemes_cannot_be_taken(tmp_path: Path) -> None:
    (answer,) = _used(tmp_path, "http://127.0.0.1:9/a b")
    assert answer.startswith("RemoteUnavailable"), "the package's driver served an http URL"
