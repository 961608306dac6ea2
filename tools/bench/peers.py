"""The peers that mount something: each a context manager that yields its mountpoint.

All run in the foreground as children, as the measuring user, with nothing in their caches, and
are unmounted and ended when the block is left.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.measuring import MeasureFailed
from bench.servers import FAST_CIPHER, S3Access, SshAccess
from bench.workbench import END_TIMEOUT_S, Workbench, end, installed
from tests.support import kernel
from tests.support.waiting import wait_until

SSHFS_TUNED = ("-o", f"Ciphers={FAST_CIPHER}", "-o", "kernel_cache", "-o", "max_conns=4")


@contextlib.contextmanager
def _mounted(
    bench: Workbench,
    top: Path,
    *command: str | Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """A program that mounts ``top/mnt`` and stays.  ``top`` is removed at the end."""
    point = top / "mnt"
    log = top / "log"
    with log.open("wb") as said:
        child = bench.start(*command, environment=environment, output=said, errors=said)
    try:
        wait_until(
            lambda: kernel.mount_at(point) is not None or child.poll() is not None,
            f"the mount of {command[0]}",
        )
        if kernel.mount_at(point) is None:
            words = log.read_text(errors="replace").strip().splitlines()
            raise MeasureFailed(f"{command[0]} did not mount: {' '.join(words[-3:])}")
        yield point
    finally:
        mount = kernel.mount_at(point)
        if mount is not None:
            bench.identity.run("fusermount3", "-u", point, check=False)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: child.poll() is not None, "its end", deadline_s=END_TIMEOUT_S)
        left = kernel.mount_at(point)
        if left is not None:
            kernel.detach(left)
        end(child)
        bench.remove(top)


def _place(bench: Workbench, name: str) -> Path:
    top = bench.fresh(name)
    bench.identity.directory(top / "mnt")
    return top


@contextlib.contextmanager
def sshfs(bench: Workbench, access: SshAccess, directory: Path, *, tuned: bool) -> Iterator[Path]:
    program = installed("sshfs")
    top = _place(bench, "sshfs")
    options = SSHFS_TUNED if tuned else ()
    source = f"{access.host}:{directory}"
    command = (program, source, top / "mnt", "-f", "-F", access.config, *options)
    with _mounted(bench, top, *command) as point:
        yield point


@contextlib.contextmanager
def rclone(bench: Workbench, section: Mapping[str, str], path: str) -> Iterator[Path]:
    """``section`` is the remote as rclone's configuration wants it."""
    program = installed("rclone")
    top = _place(bench, "rclone")
    config = top / "rclone.conf"
    lines = "".join(f"{key} = {value}\n" for key, value in section.items())
    config.write_text(f"[peer]\n{lines}")
    config.chmod(0o644)
    command = (program, "mount", f"peer:{path}", top / "mnt", "--config", config)
    options = ("--vfs-cache-mode", "full", "--cache-dir", top / "cache", "--read-only")
    with _mounted(bench, top, *command, *options) as point:
        yield point


def rclone_sftp(access: SshAccess) -> dict[str, str]:
    return {
        "type": "sftp",
        "host": "127.0.0.1",
        "port": str(access.port),
        "user": access.user,
        "key_file": str(access.key),
        "known_hosts_file": str(access.known_hosts),
        "shell_type": "none",
    }


def rclone_s3(access: S3Access) -> dict[str, str]:
    return {
        "type": "s3",
        "provider": "Ceph",
        "endpoint": access.endpoint,
        "access_key_id": access.key_id,
        "secret_access_key": access.secret,
    }


@contextlib.contextmanager
def s3fs(bench: Workbench, access: S3Access) -> Iterator[Path]:
    program = installed("s3fs")
    top = _place(bench, "s3fs")
    password = top / "password"
    password.write_text(f"{access.key_id}:{access.secret}\n")
    password.chmod(0o600)
    os.chown(password, bench.identity.uid, bench.identity.gid)
    options = f"url={access.endpoint},use_path_request_style,passwd_file={password}"
    command = (program, access.bucket, top / "mnt", "-f", "-o", options)
    with _mounted(bench, top, *command) as point:
        yield point


@contextlib.contextmanager
def bindfs(bench: Workbench, directory: Path) -> Iterator[Path]:
    program = installed("bindfs")
    top = _place(bench, "bindfs")
    # By default it wants allow_other, which an ordinary user may not have.
    command = (program, "-f", "--no-allow-other", directory, top / "mnt")
    with _mounted(bench, top, *command) as point:
        yield point


@contextlib.contextmanager
def inline_mount(bench: Workbench, directory: Path) -> Iterator[Path]:
    """The bare pyfuse3 mount of ``programs/inline_mount.py``."""
    top = _place(bench, "inline")
    program = bench.program("inline_mount.py")
    with _mounted(bench, top, "python", program, directory, top / "mnt") as point:
        yield point
