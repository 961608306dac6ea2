"""C6: a thousand objects of 100 KiB in a hundred directories, cold, in `find`'s order.

On loopback, where what counts is the work for each object, and 20 ms away, where it is the round
trips that a reader waits for.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import peers
from bench.measuring import Contender, MeasureFailed, Sense, Work
from bench.ours import stagefs
from bench.points import OURS, Lab, Measured
from bench.report import compare
from bench.servers import TREE_FILE_BYTES, S3Access, SshAccess

SSHFS, SSHFS_TUNED, RCLONE, S3FS = "sshfs", "sshfs tuned", "rclone mount", "s3fs"
SHARE = 1 / 3

Mounting = Callable[[], contextlib.AbstractContextManager[Path]]


def over_ssh(lab: Lab) -> Measured:
    measured = Measured()
    for place, access in (("", lab.servers.ssh), (", 20 ms away", lab.servers.far_ssh)):
        contenders = _ssh_contenders(lab, access)
        _race(lab, f"tree, ssh{place}", contenders, measured)
    return measured


def over_s3(lab: Lab) -> Measured:
    measured = Measured()
    for place, access in (("", lab.servers.s3_tree), (", 20 ms away", lab.servers.far_s3_tree)):
        contenders = _s3_contenders(lab, access)
        _race(lab, f"tree, S3{place}", contenders, measured)
    return measured


def _ssh_contenders(lab: Lab, access: SshAccess) -> dict[str, Mounting]:
    bench, top = lab.bench, lab.servers.tree

    @contextlib.contextmanager
    def ours() -> Iterator[Path]:
        environment = {"STAGEFS_SSH_CONFIG": str(access.tuned_config)}
        with stagefs(bench, environment=environment) as mount:
            yield mount.bind(access.url(top), "tree")

    return {
        OURS: ours,
        SSHFS_TUNED: lambda: peers.sshfs(bench, access, top, tuned=True),
        SSHFS: lambda: peers.sshfs(bench, access, top, tuned=False),
        RCLONE: lambda: peers.rclone(bench, peers.rclone_sftp(access), str(top)),
    }


def _s3_contenders(lab: Lab, access: S3Access) -> dict[str, Mounting]:
    bench, name = lab.bench, lab.servers.tree.name

    @contextlib.contextmanager
    def ours() -> Iterator[Path]:
        options = ("--set", f"remote.s3.endpoint={access.endpoint}")
        with stagefs(bench, environment=access.environment, options=options) as mount:
            yield mount.bind(access.url(name), "tree")

    return {
        OURS: ours,
        S3FS: lambda: peers.s3fs(bench, access),
        RCLONE: lambda: peers.rclone(bench, peers.rclone_s3(access), access.bucket),
    }


def _race(lab: Lab, what: str, mountings: dict[str, Mounting], measured: Measured) -> None:
    work = Work(lab.servers.tree_files, "files")
    contenders = [
        Contender(name, _reads_tree(lab, mounting), ours=name == OURS)
        for name, mounting in mountings.items()
    ]
    samples = lab.race(what, contenders, work, measured)
    for peer in mountings:
        if peer != OURS:
            measured.rows += compare(
                lab.point,
                what,
                samples,
                ours=OURS,
                peers=[peer],
                sense=Sense.TIME,
                bound=SHARE,
            )


def _reads_tree(lab: Lab, mounting: Mounting) -> Callable[[], float]:
    """Seconds by the reader's own clock; the mount is there before it runs."""
    program = lab.bench.program("read_tree.py")
    wanted = lab.servers.tree_files * TREE_FILE_BYTES

    def measure() -> float:
        with mounting() as point:
            seconds, total = lab.bench.run("python", program, point).split()
        if int(total) != wanted:
            raise MeasureFailed(f"{int(total)} bytes came of {wanted}")
        return float(seconds)

    return measure
