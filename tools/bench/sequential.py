"""A4, cold: one big file read once from end to end, over ssh, S3 and http."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from bench import peers
from bench.measuring import Contender, Work
from bench.ours import stagefs
from bench.points import OURS, Lab, Measured
from bench.report import compare
from bench.servers import SshAccess

Mounting = Callable[[], contextlib.AbstractContextManager[Path]]

SSHFS, SSHFS_TUNED, RCLONE = "sshfs", "sshfs tuned", "rclone mount"
OURS_DEFAULT = "StageFS, OpenSSH's default cipher"
SSH_CAT, SCP = "ssh cat (aes128-gcm)", "scp"
S3FS, OBSTORE = "s3fs", "obstore, 8 ranges"


def _reads_through(lab: Lab, mounting: Mounting) -> Callable[[], float]:
    """Mount the directory of the big file, read the file, unmount."""

    def measure() -> float:
        with mounting() as point:
            return lab.bench.copy_time(point / lab.servers.big.name)

    return measure


def reads_staged(
    lab: Lab,
    url: str,
    *,
    environment: Mapping[str, str] | None = None,
    options: tuple[str, ...] = (),
) -> Callable[[], float]:
    """Mount StageFS with an empty cache, register the file, read it."""

    def measure() -> float:
        with stagefs(lab.bench, environment=environment, options=options) as ours:
            return lab.bench.copy_time(ours.stage_in(url, lab.servers.big.name))

    return measure


def over_ssh(lab: Lab) -> Measured:
    measured, bench, servers = Measured(), lab.bench, lab.servers
    work = Work(servers.size_bytes)
    access = servers.ssh
    url = access.url(servers.big)
    section = peers.rclone_sftp(access)
    contenders = [
        Contender(
            OURS,
            reads_staged(lab, url, environment={"STAGEFS_SSH_CONFIG": str(access.tuned_config)}),
            ours=True,
        ),
        Contender(
            SSHFS_TUNED,
            _reads_through(lab, lambda: peers.sshfs(bench, access, servers.data, tuned=True)),
        ),
        Contender(SSH_CAT, lambda: ssh_cat(lab, lab.servers.ssh, lab.servers.ssh_master)),
        Contender(
            RCLONE, _reads_through(lab, lambda: peers.rclone(bench, section, str(servers.data)))
        ),
        Contender(
            OURS_DEFAULT,
            reads_staged(lab, url, environment={"STAGEFS_SSH_CONFIG": str(access.config)}),
            ours=True,
        ),
        Contender(
            SSHFS,
            _reads_through(lab, lambda: peers.sshfs(bench, access, servers.data, tuned=False)),
        ),
        Contender(SCP, lambda: _scp(lab)),
    ]
    samples = lab.race("cold", contenders, work, measured)
    mounts = [name for name in (SSHFS_TUNED, RCLONE) if samples.has(name)]
    what = "cold read, ssh"
    measured.rows += [
        *(compare(lab.point, what, samples, ours=OURS, peers=mounts, bound=1.15) if mounts else []),
        *compare(lab.point, what, samples, ours=OURS, peers=[SSH_CAT], bound=0.6),
        *compare(lab.point, what, samples, ours=OURS, peers=[RCLONE]),
        *compare(lab.point, what, samples, ours=OURS, peers=[SCP]),
        *compare(lab.point, f"{what}, default cipher", samples, ours=OURS_DEFAULT, peers=[SSHFS]),
    ]
    return measured


def ssh_cat(lab: Lab, access: SshAccess, master: Path) -> float:
    """Bytes through one ssh connection and nothing else.

    The connection is open already; the login's shell is timed on its own and taken off.
    """
    ssh = ("ssh", "-F", access.tuned_config, "-S", master, access.host)

    def cat(path: Path) -> float:
        command = f"exec cat '{path}'"
        return lab.bench.timed("sh", "-c", 'exec "$@" >/dev/null', "sh", *ssh, command)[0]

    return cat(lab.servers.big) - cat(Path("/dev/null"))


def _scp(lab: Lab) -> float:
    access = lab.servers.ssh
    target = lab.bench.fresh("scp")
    source = f"{access.host}:{lab.servers.big}"
    try:
        return lab.bench.timed("scp", "-q", "-F", access.config, source, target / "copy")[0]
    finally:
        lab.bench.remove(target)


def over_http(lab: Lab) -> Measured:
    measured, bench, servers = Measured(), lab.bench, lab.servers
    work = Work(servers.size_bytes)
    url = servers.http_url(servers.big)
    section = {"type": "http", "url": servers.http_directory()}
    contenders = [
        Contender(OURS, reads_staged(lab, url), ours=True),
        Contender(RCLONE, _reads_through(lab, lambda: peers.rclone(bench, section, ""))),
    ]
    samples = lab.race("cold", contenders, work, measured)
    what = "cold read, http"
    measured.rows += compare(lab.point, what, samples, ours=OURS, peers=[RCLONE], bound=1.5)
    return measured


def over_s3(lab: Lab) -> Measured:
    measured, bench, servers = Measured(), lab.bench, lab.servers
    work = Work(servers.size_bytes)
    access = servers.s3
    section = peers.rclone_s3(access)
    contenders = [
        Contender(
            OURS,
            reads_staged(
                lab,
                access.url(servers.big.name),
                environment=access.environment,
                options=("--set", f"remote.s3.endpoint={access.endpoint}"),
            ),
            ours=True,
        ),
        Contender(OBSTORE, lambda: _obstore(lab)),
        Contender(S3FS, _reads_through(lab, lambda: peers.s3fs(bench, access))),
        Contender(RCLONE, _reads_through(lab, lambda: peers.rclone(bench, section, access.bucket))),
    ]
    samples = lab.race("cold", contenders, work, measured)
    what = "cold read, S3"
    measured.rows += [
        *compare(lab.point, what, samples, ours=OURS, peers=[OBSTORE], bound=0.55),
        *compare(lab.point, what, samples, ours=OURS, peers=[S3FS], bound=1.3),
        *compare(lab.point, what, samples, ours=OURS, peers=[RCLONE], bound=2.0),
    ]
    return measured


def _obstore(lab: Lab) -> float:
    """By the program's own clock: its start is not counted."""
    access = lab.servers.s3
    program = lab.bench.program("parallel_ranges.py")
    facts = (access.endpoint, access.bucket, lab.servers.big.name, str(lab.servers.size_bytes))
    return float(
        lab.bench.run("python", program, *facts, environment=access.environment).split()[0]
    )
