"""Where state lies by default, and what is refused."""

import os
from pathlib import Path

import pytest

from stagefs.config import CacheSettings, Settings, StateSettings
from stagefs.errors import UnsuitableState
from stagefs.state_directory import (
    batch_job,
    cache_limits,
    default_state_directory,
    file_system_type,
    is_network,
    make_private_directory,
    mount_name,
    refuse_network,
)

MOUNTINFO = """\
21 1 259:1 / / rw - ext4 /dev/root rw
30 21 0:40 / /home rw - nfs4 server:/home rw
31 30 0:41 / /home/local rw - xfs /dev/sdb rw
32 21 0:42 / /scratch\\040disk rw - lustre mgs:/scratch rw
33 21 0:43 / /over rw - ext4 /dev/sdc rw
34 33 0:44 / /over rw - tmpfs tmpfs rw
35 21 0:45 / /sshfs rw - fuse.sshfs host:/ rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/tmp", "ext4"),
        ("/home/me/x", "nfs4"),
        ("/home/local/me", "xfs"),
        ("/homestead", "ext4"),
        ("/scratch disk/a", "lustre"),
        ("/over/b", "tmpfs"),
    ],
)
def test_type_of_the_file_system_a_path_is_on(path: str, kind: str) -> None:
    assert file_system_type(Path(path), MOUNTINFO) == kind


def test_which_file_systems_are_shared() -> None:
    assert all(map(is_network, ["nfs", "nfs4", "lustre", "gpfs", "cifs", "fuse.sshfs", "ceph"]))
    assert not any(map(is_network, ["ext4", "xfs", "tmpfs", "btrfs", "overlay", "fuseblk"]))


def test_network_file_system_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagefs.state_directory.file_system_type", lambda _path: "nfs4")
    with pytest.raises(UnsuitableState, match=r"/x is on a network file system \(nfs4\).*--state"):
        refuse_network(Path("/x"), what="state")


def test_job_scratch_comes_before_var_tmp(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "7", "TMPDIR": "/nowhere", "SLURM_TMPDIR": str(tmp_path)}
    chosen = default_state_directory(Path("/mnt/a"), Settings(), uid=1000, variables=job)
    assert chosen == tmp_path / "stagefs-1000" / mount_name(Path("/mnt/a"))


def test_tmpdir_counts_only_inside_a_job(tmp_path: Path) -> None:
    variables = {"TMPDIR": str(tmp_path)}
    outside = default_state_directory(Path("/mnt/a"), Settings(), uid=1, variables=variables)
    assert outside.parts[:3] == ("/", "var", "tmp")
    inside = default_state_directory(
        Path("/mnt/a"), Settings(), uid=1, variables={**variables, "PBS_JOBID": "1.x"}
    )
    assert inside.is_relative_to(tmp_path)


def test_home_directory_is_passed_over_unless_chosen(tmp_path: Path) -> None:
    variables = {"SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path)}
    (tmp_path / "tmp").mkdir()
    passed = default_state_directory(Path("/mnt/a"), Settings(), uid=1, variables=variables)
    assert passed.parts[:3] == ("/", "var", "tmp")
    chosen = Settings(state=StateSettings(base=str(tmp_path / "tmp")))
    kept = default_state_directory(Path("/mnt/a"), chosen, uid=1, variables=variables)
    assert kept.is_relative_to(tmp_path)


def test_no_place_at_all_names_each_and_why(tmp_path: Path) -> None:
    settings = Settings(state=StateSettings(base=str(tmp_path / "none")))
    with pytest.raises(UnsuitableState, match=r"/none is not a directory; name .* with --state"):
        default_state_directory(Path("/mnt/a"), settings, uid=1, variables={})


def test_mountpoints_of_the_same_name_do_not_share_a_directory() -> None:
    names = {mount_name(Path(path)) for path in ("/a/stage", "/b/stage", "/", "/a/st age")}
    assert len(names) == 4
    assert all("/" not in name and " " not in name for name in names)
    assert mount_name(Path("/a/stage")) == mount_name(Path("/a/b/../stage"))


@pytest.mark.parametrize(
    ("variables", "system", "directory"),
    [
        ({"SLURM_JOB_ID": "1", "TMPDIR": "/t"}, "slurm", "/t"),
        ({"JOB_ID": "1", "SGE_TASK_ID": "undefined", "TMPDIR": "/t"}, "gridengine", "/t"),
        ({"PBS_JOBID": "1"}, "pbs", None),
        ({"LSB_JOBID": "1"}, "lsf", None),
        ({"_CONDOR_JOB_AD": "/x", "_CONDOR_SCRATCH_DIR": "/s"}, "htcondor", "/s"),
    ],
)
def test_batch_jobs_are_known_by_their_variables(
    variables: dict[str, str], system: str, directory: str | None
) -> None:
    job = batch_job(variables)
    assert job is not None
    assert (job.system, job.directory) == (system, directory)


def test_no_job_outside_one() -> None:
    assert batch_job({"TMPDIR": "/t", "JOB_ID": "somebody's own"}) is None


def test_private_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "stagefs-0" / "mnt"
    make_private_directory(path, uid=os.geteuid())
    make_private_directory(path, uid=os.geteuid())
    assert path.stat().st_mode & 0o777 == 0o700
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_directory_prepared_by_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UnsuitableState, match="is not a directory"):
        make_private_directory(tmp_path / "link", uid=os.geteuid())
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UnsuitableState, match="open to others"):
        make_private_directory(tmp_path / "open", uid=os.geteuid())
    (tmp_path / "other").mkdir(mode=0o700)
    with pytest.raises(UnsuitableState, match="belongs to user"):
        make_private_directory(tmp_path / "other", uid=os.geteuid() + 1)


def test_capacity_is_a_share_of_free_and_cached_within_the_bound(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    free_bytes = disk.f_bavail * disk.f_frsize
    auto = cache_limits(CacheSettings(capacity_bytes_max=1 << 60), tmp_path / "not" / "yet")
    assert abs(auto.capacity_bytes - free_bytes / 2) < 1 << 30
    fuller = cache_limits(
        CacheSettings(capacity_bytes_max=1 << 60), tmp_path, cached_bytes=20 << 30
    )
    assert fuller.capacity_bytes - auto.capacity_bytes > 9 << 30
    bounded = cache_limits(CacheSettings(capacity_bytes_max=1 << 20), tmp_path)
    assert bounded.capacity_bytes == 1 << 20
    said = cache_limits(CacheSettings(capacity_bytes=100), tmp_path)
    assert said.capacity_bytes == 100
    assert 0 < said.free_floor_bytes <= 2 << 30
