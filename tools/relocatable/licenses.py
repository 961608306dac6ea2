"""CONTENTS and LICENSES: what is in the tarball, at which version, under which terms."""

import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from relocatable import DistFailed

_LICENSE_WORDS = ("license", "licence", "copying", "notice", "authors")
_HEAD = """\
What this tarball holds besides StageFS itself (Apache-2.0, see LICENSE).  The terms of each part
are below LICENSES: for Debian's packages the copyright file that Debian ships, for Python packages
the files that their authors ship.  Debian's archive of snapshots has the sources of its packages,
the Python Package Index those of the others.

"""


def write(
    top: Path,
    *,
    distributions: Sequence[tuple[str, str]],
    packages: Path,
    debian_files: Iterable[Path],
    own: Path,
) -> None:
    """Raises DistFailed when the terms of a part cannot be found."""
    shutil.copy(own, top / "LICENSE")
    lines = [f"debian  {name} {version}" for name, version in _debian(top, debian_files)]
    for one in importlib.metadata.distributions(path=[str(packages)]):
        if one.name != "stagefs":
            lines.append(f"python  {one.name} {one.version} ({_terms(one)})")
            target = top / "LICENSES/python" / f"{one.name}-{one.version}"
            _copy_of(one, packages=packages, target=target)
    assert len(distributions) == sum(line.startswith("python") for line in lines) + 1
    (top / "CONTENTS").write_text(_HEAD + "".join(f"{line}\n" for line in sorted(lines)))


def _debian(top: Path, files: Iterable[Path]) -> list[tuple[str, str]]:
    found = []
    for name in sorted({_owner(path) for path in files}):
        words = ["dpkg-query", "-W", "-f=${Version}\n", name]
        version = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        found.append((name, version.splitlines()[0]))
        target = top / "LICENSES/debian" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path("/usr/share/doc", name, "copyright"), target)
    return found


def _owner(path: Path) -> str:
    """Debian's package; /lib is /usr/lib for the file system, not for dpkg."""
    names = [str(path)]
    if path.is_relative_to("/usr"):
        names.append(str(Path("/", path.relative_to("/usr"))))
    for name in names:
        done = subprocess.run(
            ["dpkg-query", "-S", name], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return done.stdout.split(":")[0].split(",")[0]
    raise DistFailed(f"No package of Debian's owns {path}, so its license is not known.")


def _terms(one: importlib.metadata.Distribution) -> str:
    told = one.metadata
    for value in (told["License-Expression"], told["License"]):
        if value and "\n" not in value and value != "UNKNOWN":
            return str(value)
    classes = told.get_all("Classifier") or []
    known = [line.rpartition(" :: ")[2] for line in classes if line.startswith("License ::")]
    return ", ".join(known) or "see its files"


def _copy_of(one: importlib.metadata.Distribution, *, packages: Path, target: Path) -> None:
    files = [
        file
        for file in one.files or ()
        if ".dist-info" in file.parts[0]
        and any(word in file.name.lower() for word in _LICENSE_WORDS)
    ]
    target.mkdir(parents=True)
    for file in files:
        shutil.copy(packages / file, target / file.name)
    if not files:  # its metadata names the terms
        shutil.copy(packages / _info(one) / "METADATA", target / "METADATA")


def _info(one: importlib.metadata.Distribution) -> str:
    return next(file.parts[0] for file in one.files or () if file.name == "METADATA")
