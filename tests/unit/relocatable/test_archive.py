import gzip
import os
import tarfile
from pathlib import Path

from relocatable import archive


def tree(top: Path, names: list[str], *, mode: int) -> Path:
    for name in names:
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        path.chmod(mode)
        os.utime(path, (mode, mode))
    return top


def test_order_times_owners_and_modes_of_the_machine_do_not_show(tmp_path: Path) -> None:
    first = tree(tmp_path / "1/stagefs", ["b", "a", "d/e"], mode=0o600)
    second = tree(tmp_path / "2/stagefs", ["d/e", "a", "b"], mode=0o664)
    for top in (first, second):
        archive.write(top, top.with_suffix(".tar.gz"), when=1_700_000_000)
    packed = [top.with_suffix(".tar.gz").read_bytes() for top in (first, second)]
    assert packed[0] == packed[1]


def test_programs_stay_programs_and_nothing_partial_is_left(tmp_path: Path) -> None:
    top = tree(tmp_path / "stagefs", ["run"], mode=0o700)
    tree(top, ["data"], mode=0o600)
    archive.write(top, tmp_path / "x.tar.gz", when=7)
    with gzip.open(tmp_path / "x.tar.gz") as raw, tarfile.open(fileobj=raw) as tar:
        seen = {entry.name: (entry.mode, entry.uid, entry.mtime) for entry in tar}
    assert seen == {
        "stagefs": (0o755, 0, 7),
        "stagefs/data": (0o644, 0, 7),
        "stagefs/run": (0o755, 0, 7),
    }
    assert not list(tmp_path.glob(".*"))
