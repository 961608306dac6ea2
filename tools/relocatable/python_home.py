"""Debian's Python, taken from its packages, such that it runs from any directory.

A file ``python3.11._pth`` beside the executable (read by CPython's getpath.py since 3.11) names the
search path relative to it, and makes every process of this Python an isolated one: neither
PYTHONPATH and PYTHONHOME nor packages in the user's home directory reach it, also not in the
daemons that it starts with ``sys.executable``.
"""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

from relocatable import DistFailed

# Nothing here asks for these.  Some would bring licenses that oblige who passes them on (readline's
# GPL, Berkeley DB's AGPL), or libraries for nothing.
UNUSED_MODULES = ("_crypt", "_curses", "_curses_panel", "_dbm", "nis", "ossaudiodev", "readline")
UNUSED_DIRECTORIES = ("ensurepip", "lib2to3", "pydoc_data", "test", "turtledemo", "venv")
CONFIGURATION = re.compile(r"config-\d+\.\d+-.*")  # what extensions are compiled with


@dataclasses.dataclass(frozen=True)
class Home:
    """The system's executable and library, and Debian's packages that own them."""

    name: str
    executable: Path
    library: Path
    packages: tuple[str, ...]
    originals: tuple[Path, ...]

    @property
    def version(self) -> str:
        return ".".join(map(str, sys.version_info[:3]))

    @classmethod
    def of_this_machine(cls) -> "Home":
        """Raises DistFailed where this interpreter is not from Debian's packages."""
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        executable, library = Path("/usr/bin", name), Path("/usr/lib", name)
        packages = (f"{name}-minimal", f"lib{name}-minimal", f"lib{name}-stdlib")
        if Path(sys.executable).resolve() != executable:
            raise DistFailed(
                f"The environment's Python is {Path(sys.executable).resolve()}, and only Debian's"
                f" own can be packed: run `make clean setup PYTHON=/usr/bin/python3`."
            )
        try:
            listed = subprocess.run(
                ["dpkg-query", "--listfiles", *packages], capture_output=True, text=True, check=True
            ).stdout
        except (OSError, subprocess.CalledProcessError) as exc:
            raise DistFailed(
                f"dpkg-query cannot list {', '.join(packages)}, whose files make up the tarball's"
                " Python: `make dist` needs a Debian machine."
            ) from exc
        files = sorted({Path(line) for line in listed.splitlines() if line.startswith("/")})
        files = [path for path in files if path.is_file() and _is_used(path, library)]
        return cls(name, executable, library, packages, (executable, *files))

    def copy_to(self, home: Path) -> None:
        library = home / "lib" / self.name
        library.mkdir(parents=True)
        shutil.copy(self.executable, home / self.name)
        for path in self.originals[1:]:
            target = library / path.relative_to(self.library)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        lines = (f"lib/{self.name}", f"lib/{self.name}/lib-dynload", "lib/packages")
        (home / f"{self.name}._pth").write_text("".join(f"{line}\n" for line in lines))


def _is_used(path: Path, library: Path) -> bool:
    if library not in path.parents or path.suffix == ".pyc":
        return False
    inner = path.relative_to(library)
    if inner.name in ("EXTERNALLY-MANAGED", "sitecustomize.py"):
        return False  # they speak of the machine's Python
    if inner.parts[0] == "lib-dynload":
        return inner.name.split(".")[0] not in UNUSED_MODULES
    return inner.parts[0] not in UNUSED_DIRECTORIES and not CONFIGURATION.match(inner.parts[0])
