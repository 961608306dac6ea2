"""Trees of this machine that appear in a sandbox: what is in them, looked at once.

As PyOpus mirrors them: a file that is named is followed when it is a symbolic link; inside a
directory symbolic links stay what they are.  Sockets, FIFOs and devices are left out.
Blocking: for a worker thread.
"""

import os
import stat

import msgspec

from stagefs.errors import AccessDenied, InvalidManifest, NotFound, StageFSError
from stagefs.model import ObjectInfo
from stagefs.remote.file import described
from stagefs.remote.url import quote_path

ENTRIES_MAX = 200_000


class MirroredEntry(msgspec.Struct, frozen=True, gc=False):
    """``parts``: where it is in its mirror, none for the top.  A file has ``info``, a symbolic link
    its ``target``, a directory neither."""

    parts: tuple[str, ...]
    mode: int
    info: ObjectInfo | None = None
    target: str | None = None


class MirroredTree(msgspec.Struct, frozen=True):
    """What is at ``path``; or, when that leads into the mount itself, ``inside``: the path there,
    of which nothing was looked at."""

    path: str
    entries: list[MirroredEntry]
    inside: str | None = None


def look(path: str, *, mountpoint: str) -> MirroredTree:
    """Raises NotFound, AccessDenied, InvalidManifest."""
    try:
        real = os.path.realpath(path)
        if f"{real}/".startswith(f"{mountpoint}/"):
            return MirroredTree(path, [], inside=real[len(mountpoint) :] or "/")
        status = os.stat(real)
        if not stat.S_ISDIR(status.st_mode):
            return MirroredTree(path, [_file((), real, status)])
        entries = [MirroredEntry((), stat.S_IMODE(status.st_mode))]
        _walk(real, (), entries)
    except OSError as exc:
        raise _translated(exc, path) from exc
    return MirroredTree(path, entries)


def _walk(directory: str, parts: tuple[str, ...], entries: list[MirroredEntry]) -> None:
    below = []
    with os.scandir(directory) as found:
        for entry in sorted(found, key=lambda one: one.name):
            status = entry.stat(follow_symlinks=False)
            here = (*parts, entry.name)
            if stat.S_ISDIR(status.st_mode):
                entries.append(MirroredEntry(here, stat.S_IMODE(status.st_mode)))
                below.append((entry.path, here))
            elif stat.S_ISLNK(status.st_mode):
                entries.append(MirroredEntry(here, 0o777, target=os.readlink(entry.path)))
            elif stat.S_ISREG(status.st_mode):
                entries.append(_file(here, entry.path, status))
    if len(entries) > ENTRIES_MAX:
        raise InvalidManifest(
            f"More than {ENTRIES_MAX} files would be mirrored with {directory}: bind the directory"
            " (`stagefs bind`) and link that."
        )
    for path, here in below:
        _walk(path, here, entries)


def _file(parts: tuple[str, ...], path: str, status: os.stat_result) -> MirroredEntry:
    info = described(f"file://{quote_path(path)}", status)
    return MirroredEntry(parts, stat.S_IMODE(status.st_mode), info=info)


def _translated(exc: OSError, path: str) -> StageFSError:
    named = exc.filename or path
    if isinstance(exc, FileNotFoundError):
        return NotFound(f"{path} cannot be mirrored: there is no {named}.")
    if isinstance(exc, PermissionError):
        return AccessDenied(
            f"{path} cannot be mirrored: {named} is closed to the user of the mount."
        )
    return InvalidManifest(f"{path} cannot be mirrored: {named}: {exc.strerror}.")
