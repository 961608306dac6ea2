"""Removing everything in a mount leaves every remote as it was (B9)."""

from collections.abc import Callable
from pathlib import Path

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.served import Served, content

MakeMount = Callable[..., Mounted]
FILES = {f"d{n % 3}/f{n}": content(5000 + n, "kept") for n in range(12)}


def publish(served: Served, work: Path, prefix: str) -> None:
    top = work / prefix
    for name, data in FILES.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(data)
    served.publish(top, prefix)


def digests(mount: Mounted, name: str) -> dict[str, str]:
    words = ("sha256sum", *FILES)
    lines = mount.run(*words, directory=mount.point / f"staging/{name}").stdout.decode()
    return {line[66:]: line[:64] for line in lines.splitlines()}


def test_rm_rf_of_everything(
    identity: Identity, served: Served, new_mount: MakeMount, work: Path
) -> None:
    environment = served.environment(identity)
    mount = new_mount(identity, environment=environment)
    for prefix in ("shown", "writable"):
        publish(served, work, prefix)
    lone = served.put("lone", b"lone")
    writable = () if served.scheme == "http" else ("--writable",)
    mount.stagefs("bind", served.url("shown/"), "staging:///shown")
    mount.stagefs("bind", served.url("writable/"), "staging:///writable", *writable)
    mount.stage_in(lone, "lone")
    links = ("--in", "lone=staging:///lone", "--in", "dir=staging:///writable")
    mount.stagefs("sandbox", "create", "t", *links)
    expected = {name: sha256(data) for name, data in FILES.items()}
    assert digests(mount, "shown") == digests(mount, "writable") == expected
    # Copies, removed and replaced names before it all goes.
    changes = 'cd "$1" && echo more >> lone && echo own > own && rm dir/d0/f0 && mv own dir/d1/f1'
    mount.run("sh", "-c", changes, "sh", "MNT/tasks/t")
    mount.run("rm", "MNT/staging/writable/d0/f3")
    # staging/ and tasks/ themselves stay, and rm says so.
    mount.run("sh", "-c", 'rm -rf "$1"/*', "sh", "MNT", check=False)
    assert mount.run("ls", "MNT/staging", "MNT/tasks").stdout.split() == [
        *(str(mount.point / name).encode() + b":" for name in ("staging", "tasks"))
    ]
    mount.umount()
    again = new_mount(identity, environment=environment)
    for prefix in ("shown", "writable"):
        again.stagefs("bind", served.url(f"{prefix}/"), f"staging:///{prefix}")
        assert digests(again, prefix) == expected
    again.stage_in(lone, "lone")
    assert again.read("staging/lone") == b"lone"
