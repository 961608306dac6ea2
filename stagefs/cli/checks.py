"""What `stagefs doctor` looks at on this machine.  Reads; changes nothing, mounts nothing.

Every finding that is no good one says what to do.  Paths of the system are parameters, so that
tests can show each finding.
"""

import ctypes
import enum
import os
import re
import resource
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from stagefs.cli.output import human
from stagefs.config import Settings
from stagefs.control.mounts import staging_mounts
from stagefs.errors import StageFSError
from stagefs.model import GIB
from stagefs.state_directory import (
    cache_limits,
    default_state_directory,
    file_system_type,
    is_network,
)

FUSE_DEVICE = (10, 229)  # Documentation/admin-guide/devices.txt
CAP_SYS_ADMIN = 21  # capabilities(7)
RESEND_KERNEL = (6, 9)
OPEN_FILES_MIN = 4096
CAPACITY_BYTES_MIN = 1 * GIB
# A clock before this was never set.
_CLOCK_MIN_S = 1_735_689_600  # 2025
_TIME_ERROR = 5  # adjtimex(2): nothing keeps the clock right
RUNTIMES = ("docker", "podman", "apptainer", "singularity", "charliecloud", "enroot")


class Level(enum.StrEnum):
    GOOD = "good"
    NOTE = "note"
    WARNING = "warning"
    WRONG = "wrong"


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """``said`` is what was found, ``advice`` what to do about it."""

    check: str
    level: Level
    said: str
    advice: str = ""


def of_machine(
    *,
    device: Path = Path("/dev/fuse"),
    proc: Path = Path("/proc/self"),
    which: Callable[[str], str | None] = shutil.which,
    uid: int | None = None,
) -> Iterator[Finding]:
    uid = os.geteuid() if uid is None else uid
    yield kernel(os.uname().release)
    yield fuse_device(device)
    yield mounting(which, proc, uid)
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield clock(time.time(), synchronized=_is_synchronized())


def kernel(release: str) -> Finding:
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None or (int(found[1]), int(found[2])) >= RESEND_KERNEL:
        return Finding("kernel", Level.GOOD, release)
    return Finding(
        "kernel",
        Level.NOTE,
        f"{release} does not repeat requests (6.9 does): when a daemon is restarted, an operation"
        " on an open file that is caught in flight may fail with ESTALE",
        "Nothing has to be done; docs/SEMANTICS.md says what tasks see.",
    )


def fuse_device(device: Path) -> Finding:
    if not device.exists():
        return Finding(
            "fuse",
            Level.WRONG,
            f"there is no {device}",
            "As root: `modprobe fuse`; in a container start it with `--device /dev/fuse`. Without"
            " FUSE `stagefs run --no-fuse` works.",
        )
    status = device.stat()
    number = (os.major(status.st_rdev), os.minor(status.st_rdev))
    if not stat.S_ISCHR(status.st_mode) or number != FUSE_DEVICE:
        return Finding(
            "fuse",
            Level.WRONG,
            f"{device} is not the FUSE device (10:229)",
            f"As root: `rm {device}; mknod -m 0666 {device} c 10 229`.",
        )
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Finding(
            "fuse",
            Level.WRONG,
            f"{device} cannot be opened: {error.strerror}",
            f"As root: `chmod 0666 {device}`; in a container allow it with `--device {device}`.",
        )
    return Finding("fuse", Level.GOOD, f"{device} can be opened")


def mounting(which: Callable[[str], str | None], proc: Path, uid: int) -> Finding:
    """As root by mount(2), else by fusermount3, which must become root for that."""
    facts = _facts(proc / "status")
    if uid == 0:
        if int(facts.get("CapEff", "0"), 16) >> CAP_SYS_ADMIN & 1:
            return Finding("mounting", Level.GOOD, "root may mount")
        return Finding(
            "mounting",
            Level.WRONG,
            "this root may not mount (no CAP_SYS_ADMIN): it is the root of a container",
            "Start the container with `--cap-add SYS_ADMIN --device /dev/fuse`, or mount outside of"
            " it and bind the mount in.",
        )
    program = which("fusermount3")
    if program is None:
        return Finding(
            "mounting", Level.WRONG, "there is no fusermount3", "Install the package fuse3."
        )
    status = os.stat(program)
    if status.st_uid != 0 or not status.st_mode & stat.S_ISUID:
        return Finding(
            "mounting",
            Level.WRONG,
            f"{program} is not setuid root, so that users cannot mount",
            f"As root: `chown root {program}; chmod 4755 {program}`.",
        )
    if facts.get("NoNewPrivs") == "1":
        return Finding(
            "mounting",
            Level.WRONG,
            f"{program} cannot become root: this session was started with no_new_privs",
            "Mount outside of the container or sandbox that this runs in.",
        )
    return Finding("mounting", Level.GOOD, f"{program} is setuid root")


def open_files(hard_max: int) -> Finding:
    if hard_max == resource.RLIM_INFINITY or hard_max >= OPEN_FILES_MIN:
        return Finding("open files", Level.GOOD, f"up to {_count(hard_max)}")
    return Finding(
        "open files",
        Level.WARNING,
        f"at most {hard_max} at a time, for all tasks of a mount together",
        f"Raise the hard limit (`ulimit -Hn`, limits.conf) to {OPEN_FILES_MIN} or more.",
    )


def _count(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else str(limit)


def clock(now_s: float, *, synchronized: bool) -> Finding:
    if now_s < _CLOCK_MIN_S:
        return Finding(
            "clock",
            Level.WRONG,
            f"it says {time.strftime('%Y-%m-%d', time.gmtime(now_s))}",
            "Set the clock: certificates and signatures are refused otherwise.",
        )
    if not synchronized:
        return Finding(
            "clock",
            Level.NOTE,
            "the kernel does not know of anything that keeps it right",
            "See that chrony or ntpd runs; S3 refuses requests of clocks that are minutes off.",
        )
    return Finding("clock", Level.GOOD, "is kept right")


def _is_synchronized() -> bool:
    # struct timex, all zero: asks only (adjtimex(2)).
    answer = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    return bool(answer != _TIME_ERROR)


def of_users(
    *,
    allow_other: bool,
    fuse_conf: Path = Path("/etc/fuse.conf"),
    which: Callable[[str], str | None] = shutil.which,
    uid: int | None = None,
) -> Iterator[Finding]:
    """Who may look into the mount, and that containers may be somebody else."""
    uid = os.geteuid() if uid is None else uid
    allowed = uid == 0 or _user_allow_other(fuse_conf)
    if allow_other and not allowed:
        yield Finding(
            "other users",
            Level.WRONG,
            f"--allow-other is refused: {fuse_conf} does not say user_allow_other",
            f"As root: `echo user_allow_other >> {fuse_conf}`; or mount as root with --user.",
        )
    elif allow_other:
        yield Finding("other users", Level.GOOD, "are let in (--allow-other)")
    runtimes = [name for name in RUNTIMES if which(name) is not None]
    if runtimes and not allow_other:
        named = ", ".join(runtimes)
        how = "" if allowed else f", which needs user_allow_other in {fuse_conf}"
        yield Finding(
            "containers",
            Level.NOTE,
            f"{named} found: a container whose processes are another user (also root) gets"
            " 'Permission denied' in a mount that is its owner's alone",
            f"Mount with --allow-other{how}, or let the container keep the user"
            " (docker --user, podman --userns=keep-id; apptainer does).",
        )


def _user_allow_other(path: Path) -> bool:
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def of_disk(mountpoint: Path, state: Path | None, settings: Settings) -> Iterator[Finding]:
    """Where state and cache would be, and whether there is room."""
    try:
        place = (
            state or default_state_directory(mountpoint, settings, uid=os.geteuid())
        ).absolute()
    except StageFSError as error:
        yield Finding("state", Level.WRONG, str(error), "Name a directory on a local disk.")
        return
    named = settings.cache.directory
    for what, directory in (("state", place), ("cache", Path(named) if named else None)):
        if directory is not None:
            yield from _place(what, directory)
    cache = Path(named) if named else place / "cache"
    limits = cache_limits(settings.cache, cache)
    if limits.capacity_bytes < CAPACITY_BYTES_MIN and settings.cache.capacity_bytes is None:
        yield Finding(
            "disk",
            Level.WARNING,
            f"the cache could only grow to {human(limits.capacity_bytes)}",
            f"Free space on the disk of {cache}, or name another with --cache.",
        )
    else:
        yield Finding("disk", Level.GOOD, f"the cache may grow to {human(limits.capacity_bytes)}")


def _place(what: str, directory: Path) -> Iterator[Finding]:
    kind = file_system_type(directory)
    above = directory
    while not above.exists():
        above = above.parent
    if is_network(kind):
        yield Finding(
            what,
            Level.WRONG,
            f"{directory} is on a network file system ({kind}), where databases and locks fail",
            f"Name a directory on a local disk with --{what}.",
        )
    elif not os.access(above, os.W_OK | os.X_OK):
        yield Finding(
            what, Level.WRONG, f"{above} is not writable", f"Name another place with --{what}."
        )
    else:
        yield Finding(what, Level.GOOD, f"{directory} ({kind})")


def of_mountpoint(mountpoint: Path) -> Iterator[Finding]:
    path = Path(os.path.abspath(mountpoint))
    if any(mount.mountpoint == str(path) for mount in staging_mounts()):
        yield Finding(
            "mountpoint",
            Level.NOTE,
            f"{path} is mounted already",
            f"`stagefs status --mount {path}` shows it.",
        )
        return
    try:
        entries = os.listdir(path)
    except OSError as error:
        yield Finding(
            "mountpoint",
            Level.WRONG,
            f"{path} cannot be used: {error.strerror}",
            f"`mkdir -p {path}`; after a crash `fusermount3 -uz {path}` clears a dead mount.",
        )
        return
    if os.geteuid() != 0 and not os.access(path, os.W_OK):
        yield Finding(
            "mountpoint",
            Level.WRONG,
            f"{path} is not writable for you, so that you may not mount there",
            "Take a directory of your own.",
        )
    elif entries:
        yield Finding(
            "mountpoint",
            Level.WRONG,
            f"{path} is not empty",
            "Take an empty directory: what is in it would be hidden.",
        )
    else:
        yield Finding("mountpoint", Level.GOOD, f"{path} is an empty directory")


def _facts(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}
    return {name: rest.strip() for name, _, rest in (line.partition(":") for line in lines)}
