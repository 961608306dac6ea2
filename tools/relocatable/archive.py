"""The tarball itself: sorted, everything root's, all times those of the last commit."""

import gzip
import os
import subprocess
import tarfile
from pathlib import Path

from relocatable import DistFailed


def time_of(checkout: Path) -> int:
    """Seconds since 1970 of the last commit."""
    done = subprocess.run(
        ["git", "-C", str(checkout), "log", "-1", "--format=%ct"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DistFailed(
            f"git cannot tell the time of the last commit in {checkout}, which all files in the"
            f" tarball get: {done.stderr.strip()}."
        )
    return int(done.stdout)


def write(top: Path, target: Path, *, when: int) -> None:
    """All of ``top``, under its own name.  ``target`` appears only when it is whole."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        entry.mtime = when
        entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
        return entry

    partial = target.with_name(f".{target.name}.partial")
    with (
        partial.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=when) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in [top, *sorted(top.rglob("*"))]:
            tar.add(path, path.relative_to(top.parent), recursive=False, filter=plain)
    os.replace(partial, target)
