"""The StageFS mounts of this machine, and which one is meant.

Named, else by STAGEFS_MOUNT, else the only StageFS mount of this user.  They are found in
/proc/self/mountinfo, without touching the mount: one whose daemon is stopped answers nobody.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stagefs.config import environment
from stagefs.errors import InvalidName, NoDaemon
from stagefs.state_directory import unescape

FILE_SYSTEM_TYPE = "fuse.stagefs"


class FoundMount(msgspec.Struct, frozen=True):
    """One StageFS mount.  ``uid`` is the user it is for."""

    mountpoint: str
    uid: int


def staging_mounts(mountinfo: str | None = None) -> list[FoundMount]:
    if mountinfo is None:
        mountinfo = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    found: dict[str, FoundMount] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _source, options = after.split(" ", 2)
        mountpoint = unescape(before.split(" ")[4])
        found.pop(mountpoint, None)  # something mounted over it hides it
        if kind == FILE_SYSTEM_TYPE:
            uids = [word[8:] for word in options.split(",") if word.startswith("user_id=")]
            found[mountpoint] = FoundMount(mountpoint, int(uids[0]) if uids else 0)
    return list(found.values())


def choose_mount(
    named: str | None, mounts: list[FoundMount], *, uid: int, option: str = "--mount"
) -> FoundMount:
    """Raises NoDaemon when there is none, InvalidName when it is not clear which one is meant;
    ``option`` is what the caller's user names one with."""
    wanted = named or environment().get("STAGEFS_MOUNT") or None
    if wanted is not None:
        by_mountpoint = {mount.mountpoint: mount for mount in mounts}
        for path in _spellings(wanted):
            if path in by_mountpoint:
                return by_mountpoint[path]
        raise NoDaemon(
            f"{wanted} is no StageFS mount: {_known(mounts)}, and `stagefs mount {wanted}` makes"
            " one there."
        )
    own = [mount for mount in mounts if uid in (0, mount.uid)]
    if not own:
        raise NoDaemon("There is no StageFS mount of yours here: `stagefs mount MNT` makes one.")
    if len(own) > 1:
        raise InvalidName(f"Which mount is meant? Say {option} or STAGEFS_MOUNT: {_known(own)}.")
    return own[0]


def _spellings(wanted: str) -> Iterator[str]:
    """What the kernel may call it.  Only the last one asks the mount itself, whose daemon may not
    answer: then nothing could end this program, either.
    """
    path = os.path.abspath(wanted)
    yield path
    parent, name = os.path.split(path)
    yield os.path.join(os.path.realpath(parent), name)
    yield os.path.realpath(path)


def _known(mounts: list[FoundMount]) -> str:
    if not mounts:
        return "there is none on this machine"
    verb = "mounts are" if len(mounts) > 1 else "the only mount is"
    return f"{verb} {', '.join(mount.mountpoint for mount in mounts)}"
