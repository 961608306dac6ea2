"""Asking a remote once, in a process of its own: what `stagefs doctor` runs for each URL.

    python -m stagefs.remote.probing SETTINGS URL

prints one JSON object: ``{"found": ...}`` or ``{"error": ...}``, with the sentence of the driver
that a mount would use.  SETTINGS is a JSON list of the assignments of a mount.  A process of
its own, because commands do not import an event loop.
"""

import json
import sys
from pathlib import Path

import trio

from stagefs.config import environment, settings_from
from stagefs.errors import AccessDenied, DeadlineExceeded, ObjectMissing, StageFSError
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.registry import Remotes
from stagefs.remote.settings import from_config

DEADLINE_S = 20.0


def main(arguments: list[str]) -> None:
    settings, url = arguments
    sys.stdout.write(json.dumps(trio.run(_answer, json.loads(settings), url)) + "\n")


async def _answer(assignments: list[str], url: str) -> dict[str, str]:
    try:
        with trio.fail_after(DEADLINE_S):
            return {"found": await _found(assignments, url)}
    except StageFSError as error:
        return {"error": str(error)}
    except trio.TooSlowError:
        return {"error": f"{_bare(url)} did not answer within {DEADLINE_S:g} s."}


async def _found(assignments: list[str], url: str) -> str:
    home = environment().get("HOME")
    remote_settings = from_config(
        settings_from(assignments).remote,
        environment=environment(),
        home=Path(home) if home else None,
    )
    remotes = Remotes(remote_settings, CredentialStore(None))
    try:
        remote = remotes.for_url(public := remotes.public(url))
        try:
            return f"an object of {(await remote.stat(public)).size_bytes} bytes"
        except (AccessDenied, DeadlineExceeded):
            raise
        except StageFSError as no_object:
            # A directory is as good; when it cannot be listed either, the first error tells more.
            try:
                async for page in remote.list(public):
                    return f"a directory with {len(page)} entries or more"
            except StageFSError:
                raise no_object from None
            if isinstance(no_object, ObjectMissing):
                raise
            return "an empty directory"
    finally:
        await remotes.aclose()


def _bare(url: str) -> str:
    """Without what may be a password."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


if __name__ == "__main__":
    main(sys.argv[1:])
