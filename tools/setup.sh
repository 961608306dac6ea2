#!/usr/bin/env bash
# `make setup`: Debian packages, then the virtual environment .venv in the checkout.
#
# Re-running takes a fraction of a second when nothing changed.  Outside the checkout nothing is
# touched but what vagrant/provision/debian.sh says it mends.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

fits() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate
  # The system's Python first: any user can run it, which one below a home directory does not promise.
  for candidate in "${PYTHON:-}" /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
    [ -n "$candidate" ] || continue
    command -v "$candidate" >/dev/null || continue
    if fits "$candidate" && "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

vagrant/provision/debian.sh

# Two targets started at once must not build one environment between them.
exec 9<pyproject.toml
flock 9

stamp=.venv/stagefs-setup
wanted="$PWD $(sha256sum <pyproject.toml)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x .venv/bin/stagefs ] && fits .venv/bin/python; then
  exit 0
fi

if ! fits .venv/bin/python; then
  if ! python=$(find_python); then
    say "no Python 3.11 or later with the venv module was found; install Debian's python3-venv, or name one: make setup PYTHON=/path/to/python3."
    exit 1
  fi
  say "making .venv with $python"
  rm -rf .venv
  "$python" -m venv .venv
fi

say "installing StageFS and its development tools into .venv"
# Dependency groups need pip 25.1; Debian 12 brings 23.0.
.venv/bin/python -m pip --version | awk '{exit !($2+0 >= 25.1)}' ||
  .venv/bin/python -m pip install -qq --upgrade pip
.venv/bin/python -m pip install -qq --editable . --group dev
printf '%s\n' "$wanted" >"$stamp"
