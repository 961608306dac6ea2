"""What `stagefs doctor` finds on machines that lack something, and what it says to do."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from stagefs.cli import checks
from stagefs.cli.checks import Finding, Level
from stagefs.cli.main import stagefs
from stagefs.config import load_settings


def which_finds(**programs: Path) -> Callable[[str], str | None]:
    return lambda name: str(programs[name]) if name in programs else None


def status_of(directory: Path, **facts: str) -> Path:
    (directory / "status").write_text("".join(f"{name}:\t{text}\n" for name, text in facts.items()))
    return directory


def helper(directory: Path, mode: int) -> Path:
    path = directory / "fusermount3"
    path.write_bytes(b"")
    path.chmod(mode)
    return path


def test_missing_device(tmp_path: Path) -> None:
    found = checks.fuse_device(tmp_path / "fuse")
    assert found.level is Level.WRONG
    assert "modprobe fuse" in found.advice
    assert "--no-fuse" in found.advice


def test_device_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "fuse").write_bytes(b"")
    found = checks.fuse_device(tmp_path / "fuse")
    assert found.level is Level.WRONG
    assert "mknod" in found.advice


def test_no_fusermount(tmp_path: Path) -> None:
    found = checks.mounting(which_finds(), status_of(tmp_path, NoNewPrivs="0"), 1000)
    assert found.level is Level.WRONG
    assert "fuse3" in found.advice


def test_fusermount_that_cannot_become_root(tmp_path: Path) -> None:
    plain = which_finds(fusermount3=helper(tmp_path, 0o755))
    found = checks.mounting(plain, status_of(tmp_path, NoNewPrivs="0"), 1000)
    assert found.level is Level.WRONG
    assert "4755" in found.advice


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a file that is setuid root")
def test_session_without_new_privileges(tmp_path: Path) -> None:
    which = which_finds(fusermount3=helper(tmp_path, 0o4755))
    refused = checks.mounting(which, status_of(tmp_path, NoNewPrivs="1"), 1000)
    assert refused.level is Level.WRONG
    assert "no_new_privs" in refused.said
    assert checks.mounting(which, status_of(tmp_path, NoNewPrivs="0"), 1000).level is Level.GOOD


def test_root_of_a_container(tmp_path: Path) -> None:
    bare = checks.mounting(which_finds(), status_of(tmp_path, CapEff="00000000a80425fb"), 0)
    assert bare.level is Level.WRONG
    assert "--cap-add SYS_ADMIN" in bare.advice
    whole = checks.mounting(which_finds(), status_of(tmp_path, CapEff="000001ffffffffff"), 0)
    assert whole.level is Level.GOOD


def test_allow_other_needs_fuse_conf(tmp_path: Path) -> None:
    conf = tmp_path / "fuse.conf"
    conf.write_text("# user_allow_other\n")

    def found() -> list[Finding]:
        return list(
            checks.of_users(allow_other=True, fuse_conf=conf, which=which_finds(), uid=1000)
        )

    (refused,) = found()
    assert refused.level is Level.WRONG
    assert "user_allow_other" in refused.advice
    conf.write_text("user_allow_other\n")
    assert [one.level for one in found()] == [Level.GOOD]


def test_containers_need_allow_other(tmp_path: Path) -> None:
    which = which_finds(podman=tmp_path / "podman")
    (note,) = checks.of_users(allow_other=False, fuse_conf=tmp_path / "none", which=which, uid=1000)
    assert note.level is Level.NOTE
    assert "podman" in note.said
    assert "--allow-other" in note.advice
    assert "user_allow_other" in note.advice


def test_old_kernel_and_few_files_and_unset_clock() -> None:
    assert "ESTALE" in checks.kernel("6.1.0-18-amd64").said
    assert checks.kernel("6.12.3").level is Level.GOOD
    assert checks.open_files(256).level is Level.WARNING
    assert checks.clock(0.0, synchronized=True).level is Level.WRONG
    assert checks.clock(2e9, synchronized=False).level is Level.NOTE
    assert checks.clock(2e9, synchronized=True).level is Level.GOOD


def test_state_on_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "file_system_type", lambda _path: "nfs4")
    found = list(checks.of_disk(tmp_path / "mnt", tmp_path / "state", load_settings()))
    assert found[0].level is Level.WRONG
    assert "nfs4" in found[0].said
    assert "--state" in found[0].advice


def test_mountpoint_that_is_missing_or_full(tmp_path: Path) -> None:
    (missing,) = checks.of_mountpoint(tmp_path / "none")
    assert missing.level is Level.WRONG
    assert "mkdir" in missing.advice
    (tmp_path / "x").write_bytes(b"")
    (full,) = checks.of_mountpoint(tmp_path)
    assert full.level is Level.WRONG
    (tmp_path / "x").unlink()
    (good,) = checks.of_mountpoint(tmp_path)
    assert good.level is Level.GOOD


def test_wrong_setting_is_a_finding_and_the_rest_is_still_looked_at() -> None:
    done = CliRunner().invoke(stagefs, ["doctor", "--set", "cache.capactiy_bytes=1"])
    assert done.exit_code == 1
    assert "FAIL  settings: " in done.output
    assert "cache.capacity_bytes" in done.output
    assert "fuse: " in done.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_both_programs(shell: str) -> None:
    done = CliRunner().invoke(stagefs, ["completion", shell])
    assert done.exit_code == 0, done.output
    assert "_STAGEFS_COMPLETE" in done.output
    assert "_STAGEFS_CACHE_COMPLETE" in done.output
