"""Making, finding and removing the mount: as root by mount(2), else through fusermount3.

Every way to fail is a ``Refused`` with one sentence.  Not for the FUSE protocol.
"""

import array
import ctypes
import errno
import os
import shutil
import socket
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from stagefs.supervisor.children import NO_ANSWER, run_in_child

FS_TYPE = "fuse.stagefs"
SOURCE = "stagefs"
DEVICE = "/dev/fuse"
MS_NOSUID, MS_NODEV = 2, 4
MNT_DETACH = 2
ANSWER_TIMEOUT_S = 5.0
FUSERMOUNT_TIMEOUT_S = 30.0


class Refused(Exception):
    """The mount cannot be made or removed; the message is the sentence for the user."""

    def __init__(self, sentence: str, exit_code: int = 2) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Mounted:
    """One line of /proc/self/mountinfo."""

    mountpoint: str
    device: str  # "0:53": the part after the colon names the FUSE connection
    fs_type: str
    uid: int  # of the user it is for: the only one whom a mount without allow_other answers

    @property
    def connection(self) -> int:
        return int(self.device.partition(":")[2])


@dataclass(frozen=True)
class Owner:
    """Whom the mount is for: the user and group that its options and its daemon get."""

    uid: int
    gid: int


def mounted_at(mountpoint: str) -> Mounted | None:
    """The topmost mount at exactly this path."""
    found = None
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if _unescaped(fields[4]) == mountpoint:
            kind, _, options = after.split(" ", 2)
            user = dict(option.partition("=")[::2] for option in options.split(",")).get("user_id")
            found = Mounted(mountpoint, fields[2], kind, int(user or 0))
    return found


def _unescaped(field: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field


def clear_stale(mountpoint: str) -> bool:
    """Detach a StageFS mount whose supervisor is gone.  True when there was one.

    Raises Refused when a mount is there that answers, or that cannot be removed.
    """
    mounted = mounted_at(mountpoint)
    if mounted is None or mounted.fs_type != FS_TYPE:
        return False
    answer = run_in_child(lambda: ask(mounted), timeout_s=ANSWER_TIMEOUT_S)
    if answer != errno.ENOTCONN:
        how = "but does not answer" if answer == NO_ANSWER else "and answers"
        raise Refused(
            f"{mountpoint} is already mounted by StageFS {how}: "
            f"use it, or end it with 'stagefs umount {mountpoint}'."
        )
    unmount(mountpoint, lazy=True)
    return True


def ask(mounted: Mounted) -> None:
    """Make one request that no cache of the kernel answers.  In a child: it may block."""
    if os.geteuid() == 0 and mounted.uid != 0:
        os.setuid(mounted.uid)
    os.statvfs(mounted.mountpoint)


def check_mountpoint(mountpoint: str) -> None:
    try:
        mode = os.stat(mountpoint).st_mode
        if not stat.S_ISDIR(mode):
            raise Refused(
                f"Cannot mount on {mountpoint}: it is not a directory; name an empty directory."
            )
        with os.scandir(mountpoint) as entries:
            if next(entries, None) is not None:
                raise Refused(
                    f"Cannot mount on {mountpoint}: the directory is not empty, and its files "
                    "would be hidden; name an empty directory."
                )
    except FileNotFoundError:
        raise Refused(
            f"Cannot mount on {mountpoint}: there is no such directory; make it first."
        ) from None
    except OSError as exc:
        raise Refused(f"Cannot mount on {mountpoint}: {exc.strerror}.") from exc


def check_device() -> None:
    if not os.path.exists(DEVICE):
        raise Refused(
            f"Cannot mount: {DEVICE} is missing; load the kernel module (modprobe fuse), or give "
            "the container that device."
        )


def mount(mountpoint: str, *, allow_other: bool, owner: Owner) -> int:
    """Mount, and return the device with the kernel's INIT waiting in it."""
    check_device()
    if os.geteuid() == 0:
        return _mount_as_root(mountpoint, allow_other=allow_other, owner=owner)
    return _mount_as_user(mountpoint, allow_other=allow_other)


def _mount_as_root(mountpoint: str, *, allow_other: bool, owner: Owner) -> int:
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise Refused(f"Cannot mount: {DEVICE} cannot be opened: {exc.strerror}.") from exc
    options = (
        f"fd={device},rootmode=40000,user_id={owner.uid},group_id={owner.gid},default_permissions"
    )
    if allow_other:
        options += ",allow_other"
    # The directory that was checked is the one mounted on, whatever its path means by now.
    place = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mount(
        SOURCE.encode(),
        f"/proc/self/fd/{place}".encode(),
        FS_TYPE.encode(),
        MS_NOSUID | MS_NODEV,
        options.encode(),
    )
    code = ctypes.get_errno()
    os.close(place)
    if failed:
        os.close(device)
        raise Refused(
            f"Cannot mount on {mountpoint}: mount(2) says {os.strerror(code)}"
            + ("; in a container this needs CAP_SYS_ADMIN." if code == errno.EPERM else ".")
        )
    return device


def _mount_as_user(mountpoint: str, *, allow_other: bool) -> int:
    command = _fusermount()
    options = f"fsname={SOURCE},subtype=stagefs,nosuid,nodev,default_permissions"
    if allow_other:
        options += ",allow_other"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            fd = theirs.fileno()
            # fusermount3 takes the name of the socket from this variable and nowhere else.
            environment = {"_FUSE_COMMFD": str(fd), "PATH": os.defpath}
            try:
                done = subprocess.run(
                    [command, "-o", options, "--", mountpoint],
                    env=environment,
                    pass_fds=[fd],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=FUSERMOUNT_TIMEOUT_S,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise Refused(
                    f"Cannot mount on {mountpoint}: {command} did not end within "
                    f"{FUSERMOUNT_TIMEOUT_S:.0f} s."
                ) from None
        if done.returncode:
            raise _fusermount_refused(mountpoint, done.stderr.decode(errors="replace"))
        return _received_device(ours)


def _received_device(sock: socket.socket) -> int:
    _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            device = array.array("i", data)[0]
            os.set_inheritable(device, False)
            return device
    raise Refused("Cannot mount: fusermount3 handed over no device.")


def _fusermount() -> str:
    command = shutil.which("fusermount3")
    if command is None:
        raise Refused(
            "Cannot mount: fusermount3 is missing, and only root mounts without it; install the "
            "package fuse3."
        )
    return command


def _fusermount_refused(mountpoint: str, said: str) -> Refused:
    said = " ".join(said.replace("fusermount3:", "").split())
    if "allow_other" in said:
        return Refused(
            "Cannot mount with --allow-other: /etc/fuse.conf does not permit it to ordinary "
            "users; add the line user_allow_other there, or mount without --allow-other."
        )
    if DEVICE in said and not os.access(DEVICE, os.R_OK | os.W_OK):
        return Refused(
            f"Cannot mount: {DEVICE} is forbidden to this user; its mode must be 0666 "
            "(or this user be in its group)."
        )
    return Refused(f"Cannot mount on {mountpoint}: fusermount3 says: {said}.")


def unmount(mountpoint: str, *, lazy: bool, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Raises Refused with the reason (busy, not permitted, or no answer from the kernel)."""
    if os.geteuid() == 0:
        code = run_in_child(lambda: _umount2(mountpoint, lazy=lazy), timeout_s=timeout_s)
        if code:
            raise Refused(f"Cannot unmount {mountpoint}: {os.strerror(code)}.", exit_code=1)
        return
    command = [_fusermount(), "-uz" if lazy else "-u", "--", mountpoint]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"Cannot unmount {mountpoint}: no answer.", exit_code=1) from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise Refused(f"Cannot unmount {mountpoint}: {said}", exit_code=1)


def _umount2(mountpoint: str, *, lazy: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), MNT_DETACH if lazy else 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def raise_read_ahead(device: str, kib: int) -> bool:
    """Let the kernel read ahead further than its 128 KiB.  Only root may; False when not."""
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(f"{kib}\n", encoding="ascii")
    except OSError:
        return False
    return True
