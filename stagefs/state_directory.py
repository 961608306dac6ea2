"""Where a mount keeps its state and cache, and how much of that disk it may fill.

Everything StageFS keeps lies on a node-local disk unless somebody said otherwise, and never
on a network file system: SQLite's WAL and our locks do not work there.  Here the directory
is chosen, checked and made; nobody writes into it here.  All functions are synchronous and
quick (stat, statvfs, one read of /proc/self/mountinfo), and keep no state.
"""

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from stagefs.config import CacheSettings, Settings, environment
from stagefs.errors import UnsuitableState
from stagefs.model import GIB, MIB

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "9p", "afs", "beegfs", "beegfs_nodev", "ceph", "cifs", "coda", "cvmfs2", "davfs", "dvs",
        "fhgfs", "gfs2", "glusterfs", "gpfs", "kafs", "lustre", "ncpfs", "nfs", "nfs4", "nfsd",
        "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "wekafs", "virtiofs",
    }
)  # fmt: skip
LOCAL_FUSE = frozenset({"fuseblk", "fuse.fuse-overlayfs", "fuse.bindfs", "fuse.mergerfs"})

_FREE_FLOOR_SHARE = 0.02
_FREE_FLOOR_BYTES_MAX = 2 * GIB
_ESCAPE = re.compile(r"\\([0-7]{3})")


class BatchJob(msgspec.Struct, frozen=True):
    """The batch job that this environment belongs to.  ``directory`` is its own scratch space."""

    system: str
    name: str
    directory: str | None


def batch_job(variables: Mapping[str, str] | None = None) -> BatchJob | None:
    """Slurm, Grid Engine, PBS, LSF or HTCondor, by the variables they set."""
    variables = environment() if variables is None else variables
    scratch = variables.get("TMPDIR") or None
    if name := variables.get("SLURM_JOB_ID"):
        return BatchJob("slurm", name, variables.get("SLURM_TMPDIR") or scratch)
    if (name := variables.get("JOB_ID")) and variables.get("SGE_TASK_ID"):
        return BatchJob("gridengine", name, scratch)
    if name := variables.get("PBS_JOBID"):
        return BatchJob("pbs", name, scratch)
    if name := variables.get("LSB_JOBID"):
        return BatchJob("lsf", name, scratch)
    if name := variables.get("_CONDOR_JOB_AD"):
        return BatchJob("htcondor", name, variables.get("_CONDOR_SCRATCH_DIR") or scratch)
    return None


def file_system_type(path: Path, mountinfo: str | None = None) -> str:
    """The type of the file system that ``path`` (or its nearest existing parent) is on."""
    if mountinfo is None:
        mountinfo = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    target = os.path.realpath(path)
    best, kind = "", "unknown"
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        mountpoint = unescape(before.split(" ")[4])
        inside = mountpoint == "/" or f"{target}/".startswith(f"{mountpoint}/")
        # The last of several mounts on one place is the one that is seen.
        if inside and len(mountpoint) >= len(best):
            best, kind = mountpoint, after.split(" ")[0]
    return kind


def unescape(field: str) -> str:
    r"""A field of /proc/self/mountinfo, where blanks and the like are written ``\040``."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)


def is_network(kind: str) -> bool:
    """True where SQLite's WAL and our locks cannot be trusted."""
    return kind in NETWORK_FILE_SYSTEMS or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)


def refuse_network(path: Path, *, what: str) -> None:
    """Raises UnsuitableState when ``path`` is on a network file system."""
    kind = file_system_type(path)
    if is_network(kind):
        raise UnsuitableState(
            f"The {what} directory {path} is on a network file system ({kind}), where its"
            f" database and locks do not work: name one on a local disk with --{what}."
        )


@contextlib.contextmanager
def acting_as(name: str, uid: int, gid: int) -> Iterator[None]:
    """As root: with the rights and groups of a user, and so following no link that he could not.
    Anybody else goes on as himself.  (The supervisor, which imports nothing, has its own.)"""
    if os.geteuid() != 0 or uid == 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups(os.getgrouplist(name, gid))
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def default_state_directory(
    mountpoint: Path,
    settings: Settings,
    *,
    uid: int,
    variables: Mapping[str, str] | None = None,
) -> Path:
    """``<base>/stagefs-<uid>/<name>`` for a mountpoint.  The same mountpoint, the same place.

    Raises UnsuitableState when no base is a writable local directory.
    """
    variables = environment() if variables is None else variables
    bases = [settings.state.base] if settings.state.base else _bases(variables)
    refused = []
    for base in bases:
        why = _unfit(Path(base), variables, chosen=settings.state.base is not None)
        if why is None:
            return Path(base) / f"stagefs-{uid}" / mount_name(mountpoint)
        refused.append(f"{base} {why}")
    raise UnsuitableState(
        f"No place for the state of {mountpoint}: {', '.join(refused)};"
        " name a directory on a local disk with --state."
    )


def mount_name(mountpoint: Path) -> str:
    """A directory name that tells the mountpoint and differs for every one of them."""
    real = os.path.realpath(mountpoint)
    digest = hashlib.blake2b(os.fsencode(real), digest_size=4).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(real)).strip("-.")[:40]
    return f"{readable or 'root'}-{digest}"


def _bases(variables: Mapping[str, str]) -> list[str]:
    job = batch_job(variables)
    return [base for base in (job.directory if job else None, "/var/tmp") if base]  # noqa: S108


def _unfit(base: Path, variables: Mapping[str, str], *, chosen: bool) -> str | None:
    if not base.is_dir():
        return "is not a directory"
    if not os.access(base, os.W_OK | os.X_OK):
        return "is not writable"
    kind = file_system_type(base)
    if is_network(kind):
        return f"is on a network file system ({kind})"
    home = variables.get("HOME")
    if not chosen and home and home != "/" and base.resolve().is_relative_to(Path(home).resolve()):
        return "is in the home directory"
    return None


def make_private_directory(path: Path, *, uid: int) -> None:
    """Make ``path`` (0700, owned by ``uid``), or accept it when it is that already.

    In a directory that everybody may write, somebody else may have made it first, or put a
    symbolic link there.  Missing parents are made the same way.  Raises UnsuitableState.
    """
    if not path.parent.exists():
        make_private_directory(path.parent, uid=uid)
    try:
        path.mkdir(mode=0o700)
        if os.geteuid() != uid:
            os.chown(path, uid, -1)
    except FileExistsError:
        pass
    except OSError as exc:
        raise UnsuitableState(f"Cannot make the directory {path}: {exc.strerror}.") from exc
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UnsuitableState(f"{path} is not a directory: remove it or name another place.")
    if status.st_uid != uid:
        raise UnsuitableState(
            f"{path} belongs to user {status.st_uid}, not to {uid}: name another place."
        )
    if status.st_mode & 0o077:
        raise UnsuitableState(
            f"{path} is open to others (mode {status.st_mode & 0o777:04o}): chmod 0700 it, or name"
            " another place."
        )


class CacheLimits(msgspec.Struct, frozen=True):
    """What the cache may hold, and what must stay free on its disk."""

    capacity_bytes: int
    free_floor_bytes: int


def cache_limits(settings: CacheSettings, directory: Path, *, cached_bytes: int = 0) -> CacheLimits:
    """The limits of a cache in ``directory`` (or its nearest existing parent).

    ``cached_bytes`` is what it holds already, so that a full cache does not shrink at a restart.
    """
    while not directory.exists():
        directory = directory.parent
    disk = os.statvfs(directory)
    free_bytes = disk.f_bavail * disk.f_frsize
    capacity_bytes = settings.capacity_bytes
    if capacity_bytes is None:
        share_bytes = int((free_bytes + cached_bytes) * settings.capacity_share)
        capacity_bytes = min(share_bytes, settings.capacity_bytes_max) // MIB * MIB
    floor_bytes = settings.free_floor_bytes
    if floor_bytes is None:
        disk_bytes = disk.f_blocks * disk.f_frsize
        floor_bytes = min(int(disk_bytes * _FREE_FLOOR_SHARE), _FREE_FLOOR_BYTES_MAX)
    return CacheLimits(capacity_bytes=capacity_bytes, free_floor_bytes=floor_bytes)
