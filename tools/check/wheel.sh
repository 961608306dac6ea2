#!/usr/bin/env bash
# Builds the wheel in a temporary directory and looks at what is in it: only the package and the
# two commands that live outside it, nothing called tools, mount or tests at the top.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

.venv/bin/python -m build --wheel --outdir "$out" . >"$out/build.log" 2>&1 || {
  cat "$out/build.log" >&2
  exit 1
}
# W009: several top-level modules are meant: the commands stagefs-cache and mount.stagefs are one file each.
.venv/bin/check-wheel-contents --ignore W009 "$out"/*.whl

.venv/bin/python - "$out"/*.whl <<'PYTHON'
import pathlib
import sys
import zipfile

ALLOWED_AT_TOP = {"stagefs", "stagefs_cache.py", "mount_stagefs.py"}

names = zipfile.ZipFile(sys.argv[1]).namelist()
strangers = sorted(
    {name.split("/")[0] for name in names if ".dist-info" not in name.split("/")[0] and ".data" not in name.split("/")[0]}
    - ALLOWED_AT_TOP
)
missing = sorted(
    str(path)
    for path in pathlib.Path("stagefs").rglob("*")
    if path.suffix in {".py", ".sql", ".html", ".css", ".js", ".typed"} and "__pycache__" not in path.parts and str(path) not in names
)
if strangers or missing:
    sys.exit(f"The wheel holds strangers {strangers} at its top and lacks {missing}; mend [tool.hatch.build.targets.wheel].")
print(f"wheel: {len(names)} files, all expected")
PYTHON

# The Snakemake plug-in is a distribution of its own.
mkdir "$out/snakemake"
.venv/bin/python -m build --wheel --outdir "$out/snakemake" tools/snakemake >"$out/build.log" 2>&1 || {
  cat "$out/build.log" >&2
  exit 1
}
.venv/bin/check-wheel-contents --package tools/snakemake/snakemake_storage_plugin_stagefs "$out"/snakemake/*.whl
