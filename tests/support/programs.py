"""Programs as an administrator would write them for ``command://``: a shell script around a
directory.  What is named ``secret...`` it refuses."""

from pathlib import Path

_SCRIPT = r"""#!/bin/sh
# mover OPERATION PATH [OFFSET LENGTH | OVERWRITE]
operation=$1 path=$2
case "${path##*/}" in secret*) echo "not for you" >&2; exit 77 ;; esac
case $operation in
stat)
    [ -e "$path" ] || exit 66
    [ -d "$path" ] && { echo directory; exit; }
    find "$path" -maxdepth 0 -printf '%s %T@-%i\n' ;;
get)
    [ -e "$path" ] || exit 66
    tail -c +$(($3 + 1)) -- "$path" | head -c "$4" ;;
list)
    [ -d "$path" ] || exit 66
    find "$path" -mindepth 1 -maxdepth 1 -type d -printf 'd\t%f\0' -o \
        -printf 'f %s %T@-%i\t%f\0' ;;
put)
    [ -d "$path" ] && { echo "it is a directory" >&2; exit 1; }
    mkdir -p -- "${path%/*}" || exit 77
    new="${path%/*}/.put.$$"
    trap 'rm -f -- "$new"' EXIT
    cat >"$new" || exit 75
    [ "$(stat -c %s -- "$new")" = "$4" ] || exit 75
    if [ "$3" = 1 ]; then mv -fT -- "$new" "$path"; else ln -T -- "$new" "$path" || exit 73; fi ;;
delete)
    rm -f -- "$path" ;;
esac
"""

_TABLE = """
[{name}]
stat = ["{script}", "stat", "{{path}}"]
get = ["{script}", "get", "{{path}}", "{{offset}}", "{{length}}"]
list = ["{script}", "list", "{{path}}"]
put = ["{script}", "put", "{{path}}", "{{overwrite}}", "{{size}}"]
delete = ["{script}", "delete", "{{path}}"]
"""


def written_programs(top: Path, name: str) -> Path:
    """The file for ``[remote.command] programs``, with one table."""
    script = top / "mover"
    script.write_text(_SCRIPT)
    script.chmod(0o755)
    table = top / "programs.toml"
    table.write_text(_TABLE.format(name=name, script=script))
    table.chmod(0o644)
    return table
