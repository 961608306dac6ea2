"""``python -m stagefs.copying --request-fd N``: one copy, as ``stagefs copy`` has asked for it.

Its exit code is 0 when all of it is durable at the destination; else that of the error, whose
sentence is on standard error, or 128 + n when signal n ended it.  Nothing half done is left.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path

import trio

from stagefs.config import Settings, environment, load_settings
from stagefs.copying.copy import Copy
from stagefs.copying.local_files import current_umask
from stagefs.copying.request import CopyRequest, received
from stagefs.copying.through_mount import ThroughMount
from stagefs.errors import StageFSError
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.registry import Remotes
from stagefs.remote.settings import from_config

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stagefs.copying", allow_abbrev=False)
    parser.add_argument("--request-fd", required=True, type=int)
    request = received(parser.parse_args(argv).request_fd)
    umask = current_umask()
    try:
        with _ssh_configured(request) as overrides:
            settings = load_settings(overrides={**request.settings, **overrides})
            return trio.run(_run, request, settings, umask)
    except StageFSError as error:
        _say(str(error))
        return error.exit_code


def _say(text: str) -> None:
    sys.stderr.write(f"stagefs: {text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _ssh_configured(request: CopyRequest) -> Iterator[dict[str, str]]:
    """The settings that make ssh heed the request's options before the user's configuration."""
    if not request.ssh_lines:
        yield {} if request.ssh_config is None else {"remote.ssh.config": request.ssh_config}
        return
    own = request.ssh_config or load_settings(overrides=request.settings).remote.ssh.config
    home = Path(environment().get("HOME") or "/")
    included = [own] if own else [str(home / ".ssh/config"), "/etc/ssh/ssh_config"]
    directory = tempfile.mkdtemp(prefix="stagefs-copy-")
    try:
        file = Path(directory, "ssh_config")
        lines = [*request.ssh_lines, *(f'Include "{path}"' for path in included)]
        file.write_text("".join(f"{line}\n" for line in lines), "utf-8", "surrogateescape")
        yield {"remote.ssh.config": str(file)}
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _run(request: CopyRequest, settings: Settings, umask: int) -> int:
    ended: list[int] = []
    home = environment().get("HOME")
    remotes = Remotes(
        from_config(settings.remote, environment=environment(), home=Path(home) if home else None),
        CredentialStore(None),
    )
    mount = None if request.mountpoint is None else ThroughMount(request.mountpoint)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, nursery.cancel_scope, ended)
            if request.removes:
                work = remotes.for_url(request.target.url).delete(request.target.url)
            else:
                work = Copy(request, remotes, mount, umask=umask, say=_say).run()
            failure = await _done(work)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await remotes.aclose()
            if mount is not None:
                await trio.to_thread.run_sync(mount.end)
    if ended:
        return 128 + ended[0]
    if failure is not None:
        raise failure
    return 0


async def _done(work: Awaitable[None]) -> StageFSError | None:
    try:
        await work
    except StageFSError as error:
        return error
    return None


async def _end_on_signal(scope: trio.CancelScope, ended: list[int]) -> None:
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async for number in signals:
            ended.append(number)
            scope.cancel()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Threads that wait for a mount's answer are not waited for.
    os._exit(code)
