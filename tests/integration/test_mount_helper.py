"""mount(8) and fstab with mount.stagefs, units and maps: on a /sbin of the test's own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import kernel
from tests.support.identity import CHECKOUT, Identity
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root calls mount(8)")


AS_NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups"


def in_own_sbin(root: Identity, work: Path, script: str) -> subprocess.CompletedProcess[bytes]:
    """The script with mount.stagefs in /sbin, in a mount namespace of its own."""
    sbin = work / "sbin"
    shutil.copytree("/usr/sbin", sbin, symlinks=True)
    (sbin / "mount.stagefs").symlink_to(root.bin / "mount.stagefs")
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-ec"]
    return root.run(*words, f"mount --bind {sbin} /usr/sbin\n{script}", check=False)


def test_mount_and_umount_by_fstab(all_identities: dict[str, Identity], work: Path) -> None:
    root, user = all_identities["root"], all_identities["user"]
    ours, his = root.directory(work / "a"), user.directory(work / "b")
    his_state = user.directory(work / "sb")
    his_state.chmod(0o700)
    fstab = work / "fstab"
    fstab.write_text(
        f"stagefs {ours} stagefs noauto,allow_other,capacity=1GiB,state={work}/sa,"
        "read.read_deadline_s=33s 0 0\n"
        f"stagefs {his} stagefs _netdev,nofail,run_as=nobody,state={his_state} 0 0\n"
    )
    script = f"""
mount -T {fstab} {ours}
mount -T {fstab} -a
{AS_NOBODY} cat {ours}/.stagefs/config
{AS_NOBODY} ls {his}
ls {his} && exit 9
stagefs umount {ours}
umount {his}
"""
    done = in_own_sbin(root, work, script)
    assert done.returncode == 0, done.stderr.decode()
    assert b'"read_deadline_s": 33' in done.stdout, "others are let in, and options arrive"
    assert b"staging\n" in done.stdout
    assert b"Permission denied" in done.stderr, "a mount for a user is closed to root"
    for state in (work / "sa", his_state):
        wait_for_end(state)


def wait_for_end(state: Path) -> None:
    wait_until(lambda: not kernel.programs_naming(state), "the end of its programs")


def test_an_option_nobody_knows_is_one_sentence(
    all_identities: dict[str, Identity], work: Path
) -> None:
    root = all_identities["root"]
    point = root.directory(work / "a")
    done = in_own_sbin(root, work, f"mount -t stagefs stagefs {point} -o colour=blue")
    assert b"mount.stagefs does not know the option 'colour'" in done.stderr
    assert kernel.mount_at(point) is None


@pytest.mark.parametrize("unit", ["stagefs@.service", "stagefs-user@.service"])
def test_units_are_what_systemd_understands(work: Path, unit: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = (CHECKOUT / "mount/systemd" / unit).read_text()
    copy = work / unit
    copy.write_text(text.replace("/usr/bin/stagefs", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", *(["--user"] if "user" in unit else []), "verify", copy],
        capture_output=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(work), "HOME": str(work)},
    )
    said = [line for line in done.stderr.decode().splitlines() if unit in line]
    assert not said, said
    assert "Type=notify" in text
