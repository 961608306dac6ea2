"""Shared libraries: which ones are needed besides glibc's, and how they are found anywhere.

Each is copied to python/lib/shared, and whoever needs one gets a path relative to itself
(``$ORIGIN``).  As DT_RPATH and not DT_RUNPATH: LD_LIBRARY_PATH, which environment modules on
clusters fill with libraries of all kinds, must not come before it; and it is not passed on to the
programs that StageFS starts, as an LD_LIBRARY_PATH of our own would be.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from relocatable import DistFailed

# glibc's own: these must be the machine's, because they go with its dynamic linker.
GLIBC = re.compile(
    r"(linux-vdso|ld-linux-x86-64|ld-linux-aarch64"
    r"|lib(c|m|dl|pthread|rt|resolv|util|anl|nss_\w+))\.so\.\d+"
)
_VERSION_NEEDED = re.compile(rb"GLIBC_(\d+)\.(\d+)")


def binaries(top: Path) -> list[Path]:
    found = []
    for path in sorted(top.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    found.append(path)
    return found


def bundle(home: Path) -> list[Path]:
    """Make every binary below ``home`` independent of the machine's libraries but glibc's.

    Returns where the bundled libraries came from."""
    shared = home / "lib/shared"
    shared.mkdir()
    sources: dict[str, Path] = {}
    for binary in binaries(home):
        loaded = _loaded(binary).items()
        sources |= {name: source for name, source in loaded if not source.is_relative_to(home)}
    for name, source in sources.items():
        shutil.copy(source, shared / name)
    for binary in binaries(home):
        binary.chmod(0o755)
        if sources.keys() & set(_patchelf("--print-needed", binary).split()):
            _let_find(binary, shared)
    return [sources[name].resolve() for name in sorted(sources)]


def strip(directory: Path) -> None:
    """Drop what debuggers read: it names directories of this build, and is most of the size."""
    for binary in binaries(directory):
        subprocess.run(["strip", "--strip-unneeded", str(binary)], check=True)


def glibc_needed(home: Path) -> tuple[int, int]:
    """The newest version of glibc's symbols that anything here asks for."""
    return max(
        (int(version[1]), int(version[2]))
        for binary in binaries(home)
        for version in _VERSION_NEEDED.finditer(binary.read_bytes())
    )


def _loaded(binary: Path) -> dict[str, Path]:
    """Name -> file of all that the dynamic linker would load for it here, but glibc's."""
    done = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False)
    found = {}
    for line in done.stdout.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if not arrow or GLIBC.fullmatch(name):
            continue
        if rest == "not found":
            raise DistFailed(f"{binary.name} needs {name}, which this machine lacks.")
        found[name] = Path(rest.rpartition(" (")[0])
    return found


def _let_find(binary: Path, shared: Path) -> None:
    own = [part for part in _patchelf("--print-rpath", binary).strip().split(":") if part]
    ours = os.path.join("$ORIGIN", os.path.relpath(shared, binary.parent))
    _patchelf("--force-rpath", "--set-rpath", ":".join([*own, ours]), binary)


def _patchelf(*words: str | Path) -> str:
    try:
        done = subprocess.run(
            ["patchelf", *map(str, words)], capture_output=True, text=True, check=True
        )
    except FileNotFoundError as exc:
        raise DistFailed("patchelf is missing: run `apt-get install patchelf` as root.") from exc
    except subprocess.CalledProcessError as exc:
        raise DistFailed(f"patchelf cannot change {words[-1]}: {exc.stderr.strip()}.") from exc
    return done.stdout
