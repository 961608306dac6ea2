"""What `stagefs doctor` asks of remotes: that they answer, and what their clocks say."""

import contextlib
import email.utils
import http.client
import json
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence

from stagefs.cli.checks import Finding, Level

PROBE_TIMEOUT_S = 60.0
DATE_TIMEOUT_S = 10.0
# Signed requests are refused by S3 when clocks differ by 15 minutes; certificates by less.
CLOCK_OFF_S_MAX = 300.0


def of_urls(urls: Sequence[str], settings: Sequence[str]) -> Iterator[Finding]:
    if not urls:
        yield Finding(
            "remotes",
            Level.NOTE,
            "none was named",
            "`stagefs doctor URL...` asks for each, with the credentials a mount would use.",
        )
    for url in urls:
        yield from _of_url(url, settings)


def _of_url(url: str, settings: Sequence[str]) -> Iterator[Finding]:
    scheme = url.partition(":")[0]
    shown = _bare(url)
    if scheme in ("ssh", "sftp") and shutil.which("ssh") is None:
        yield Finding(
            f"remote {shown}",
            Level.WARNING,
            "there is no ssh program here: paramiko is used, which is slower and reads less of"
            " ~/.ssh/config",
            "Install openssh-client.",
        )
    command = [sys.executable, "-m", "stagefs.remote.probing", json.dumps(list(settings)), url]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
        said = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        said = {"error": f"{shown} did not answer within {PROBE_TIMEOUT_S:g} s."}
    except ValueError:
        said = {"error": f"asking for {shown} ended unexpectedly: {done.stderr.strip()[-300:]}"}
    if "found" in said:
        yield Finding(f"remote {shown}", Level.GOOD, f"answers: {said['found']}")
    else:
        yield Finding(f"remote {shown}", Level.WRONG, said["error"], _advice(scheme))
    if scheme in ("http", "https"):
        yield from _clock(url)


def _advice(scheme: str) -> str:
    if scheme in ("ssh", "sftp"):
        return "See what `ssh HOST true` says: StageFS uses the same keys and known hosts."
    if scheme in ("s3", "gs", "az"):
        return "See that the credentials, the region and the endpoint are those of this bucket."
    return "See that the server runs, that this machine may reach it, and whom it lets in."


def _clock(url: str) -> Iterator[Finding]:
    """The server's Date beside our time."""
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=DATE_TIMEOUT_S)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("HEAD", "/")
        date = connection.getresponse().getheader("Date")
        if date is None or (there := email.utils.parsedate_tz(date)) is None:
            return
        off_s = time.time() - email.utils.mktime_tz(there)
        if abs(off_s) > CLOCK_OFF_S_MAX:
            yield Finding(
                "clock",
                Level.WRONG,
                f"{abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} {parts.hostname}",
                "Set the clock (chrony, ntpd): signatures and certificates are refused otherwise.",
            )
        else:
            yield Finding("clock", Level.GOOD, f"agrees with {parts.hostname}")


def _bare(url: str) -> str:
    """Without what may be a password."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"
