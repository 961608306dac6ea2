"""`make dist`: one tarball that runs wherever fusermount3 and a new enough glibc are.

It holds Debian's own Python (the files of its packages, nothing else of the machine), StageFS with
everything it imports, at the versions of .venv, which the suite ran with, and every shared library
that all of these need but those of glibc.  Nothing in it knows where it lies:

    stagefs-VERSION/
      bin/         stagefs, stagefs-cache, mount.stagefs: launchers in sh
      python/      python3.11 and, below lib, its library, the packages, the shared libraries
      share/       stagefs.conf, units, examples
      LICENSES/    of each part; CONTENTS lists them with versions

Built twice from one checkout on one machine it is the same, byte for byte.
"""

import argparse
import compileall
import importlib.metadata
import platform
import py_compile
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from relocatable import DistFailed, archive, launchers, libraries, licenses, python_home
from stagefs import __version__

CHECKOUT = Path(__file__).parents[2]
# fsspec and irods: nobody can install an extra into it.
EXTRAS = "fsspec,irods"


def say(text: str) -> None:
    sys.stderr.write(f"dist: {text}\n")


def install_packages(target: Path) -> list[tuple[str, str]]:
    """StageFS and what it needs into ``target``; names and versions.

    The versions are those of this environment.  pyfuse3 has no wheel and is compiled here."""
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch, "constraints")
        installed = importlib.metadata.distributions()
        constraints.write_text(
            "".join(f"{one.name}=={one.version}\n" for one in installed if one.name != "stagefs")
        )
        words = [sys.executable, "-m", "pip", "install", "-qq", "--no-compile"]
        words += ["--disable-pip-version-check", "--target", str(target)]
        words += ["--constraint", str(constraints), f"{CHECKOUT}[{EXTRAS}]"]
        done = subprocess.run(words, cwd=scratch, check=False)
    if done.returncode:
        raise DistFailed("pip could not install StageFS; its messages above say why.")
    found = importlib.metadata.distributions(path=[str(target)])
    return sorted((one.name, one.version) for one in found)


def drop_traces(packages: Path) -> None:
    """What tells of this machine, or is of use to pip only.  Commands have launchers instead."""
    for name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
        for path in packages.glob(f"*.dist-info/{name}"):
            path.unlink()
    shutil.rmtree(packages / "bin")


def compile_all(top: Path) -> None:
    """The files cannot change, so no time stamp is compared; names in them are relative."""
    whole = compileall.compile_dir(
        top / "python/lib",
        maxlevels=50,
        quiet=1,
        stripdir=str(top),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    if not whole:
        raise DistFailed("Some modules could not be compiled; the messages above say which.")


def build(top: Path) -> None:
    home = python_home.Home.of_this_machine()
    say(f"Python {home.version} of {', '.join(home.packages)}")
    home.copy_to(top / "python")
    packages = top / "python/lib/packages"
    say("StageFS and the packages that it needs")
    distributions = install_packages(packages)
    shutil.move(packages / "share", top / "share")
    libraries.strip(packages / "pyfuse3")  # compiled here
    bundled = libraries.bundle(top / "python")
    say(f"{len(bundled)} shared libraries")
    licenses.write(
        top,
        distributions=distributions,
        packages=packages,
        debian_files=[*home.originals, *bundled],
        own=CHECKOUT / "LICENSE",
    )
    drop_traces(packages)
    compile_all(top)
    launchers.write(top, python=home.name, glibc=libraries.glibc_needed(top / "python"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="make dist", description="Build the tarball.")
    parser.add_argument("--into", type=Path, default=CHECKOUT / "dist", help="directory")
    into: Path = parser.parse_args().into
    into.mkdir(exist_ok=True)
    system = f"{platform.system().lower()}-{platform.machine()}"
    target = into / f"stagefs-{__version__}-{system}.tar.gz"
    with tempfile.TemporaryDirectory(prefix="stagefs-dist.") as scratch:
        top = Path(scratch, f"stagefs-{__version__}")
        try:
            build(top)
            archive.write(top, target, when=archive.time_of(CHECKOUT))
        except DistFailed as exc:
            sys.exit(f"dist: {exc}")
    say(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
