"""The commands in bin/: found through any symbolic link, quick, and clear where they cannot run."""

from pathlib import Path

# Name -> module with a ``main``.  As [project.scripts] has them; a test compares.
COMMANDS = {
    "stagefs": "stagefs.cli.main",
    "stagefs-cache": "stagefs_cache",
    "mount.stagefs": "mount_stagefs",
}
# Where distributions keep their certificates; Debian's OpenSSL, which is in here, looks below
# /usr/lib/ssl only.
CERTIFICATES = (
    "/etc/pki/tls/cert.pem",  # RHEL, Fedora
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine, Arch
    "/etc/ssl/certs/ca-certificates.crt",
)
_LAUNCHER = """\
#!/bin/sh
# StageFS from its tarball: runs the Python beside it, wherever both lie.
here=$(readlink -f -- "$0") || exit
top=${{here%/bin/*}}
glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null) glibc=${{glibc#glibc }}
case $glibc in
  {major}.*) [ "${{glibc#*.}}" -ge {minor} ] 2>/dev/null || glibc= ;;
  *) glibc= ;;
esac
if [ -z "$glibc" ]; then
  echo "{name}: this build of StageFS needs glibc {major}.{minor} or later, which is not here:\
 install StageFS with pip instead." >&2
  exit 1
fi
if [ -z "${{SSL_CERT_FILE-}}${{SSL_CERT_DIR-}}" ] && [ ! -e /usr/lib/ssl/certs ]; then
  for file in {certificates}; do
    if [ -e "$file" ]; then export SSL_CERT_FILE="$file"; break; fi
  done
fi
exec "$top/python/{python}" "$top/python/lib/commands/{name}" "$@"
"""
_COMMAND = """\
from {module} import main

main()
"""


def write(top: Path, *, python: str, glibc: tuple[int, int]) -> None:
    (top / "bin").mkdir()
    commands = top / "python/lib/commands"
    commands.mkdir()
    for name, module in COMMANDS.items():
        launcher = top / "bin" / name
        major, minor = glibc
        launcher.write_text(
            _LAUNCHER.format(
                name=name,
                major=major,
                minor=minor,
                python=python,
                certificates=" ".join(CERTIFICATES),
            )
        )
        launcher.chmod(0o755)
        # A file and not `-m`: its name is what messages and `ps` show.
        (commands / name).write_text(_COMMAND.format(module=module))
