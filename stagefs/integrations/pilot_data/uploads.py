"""Bringing files of the mount to a pilot data: through the stage-out queue, which is durable,
verifies what arrived, and never replaces what is there.

Blocking; each call is one thread's.
"""

import glob
import os
import secrets
import threading
from collections.abc import Collection, Mapping

from stagefs.control.client import Client
from stagefs.integrations.pilot_data.values import PilotError
from stagefs.staging.manifest import Manifest, Output

# How often the queue is asked: soon for small files, seldom for those that take long.
FIRST_PAUSE_S, PAUSE_S_MAX = 0.05, 1.0
# Uploads in these states are not over, or ended without the object being there.
OPEN_STATES = ("prepared", "queued", "uploading", "failed", "cancelled")


def upload(client: Client, targets: Mapping[str, str], cancelled: threading.Event) -> None:
    """Bring each file (``staging:///`` name -> URL) where it is to be.  Raises StageFSError; then
    some may be there."""
    sandbox = f"pilot-data-{secrets.token_hex(8)}"
    names = {f"{number}": name for number, name in enumerate(targets)}
    outputs = [Output(glob.escape(short), targets[name]) for short, name in names.items()]
    client.sandbox_create(sandbox, Manifest(inputs=names, outputs=outputs), worker_pid=os.getpid())
    try:
        commit = client.sandbox_commit(sandbox).id
    except BaseException as failure:
        client.sandbox_fail(sandbox, str(failure))
        raise
    finally:
        client.sandbox_remove(sandbox)
    wait_for(client, {commit}, cancelled)


def wait_for(client: Client, commits: Collection[str], cancelled: threading.Event) -> None:
    """Until all uploads of these commits are done.  Raises PilotError naming one that failed; that
    and all others are given up then."""
    pause_s = FIRST_PAUSE_S
    while True:
        still = [one for one in client.queue_list(OPEN_STATES) if one.commit in commits]
        failed = [one for one in still if one.state in ("failed", "cancelled")]
        if failed or cancelled.is_set():
            given_up = [one.id for one in still if one.state != "cancelled"]
            if given_up:
                client.queue_cancel(given_up, discard=True)
        if failed:
            reason = failed[0].reason or f"the upload was {failed[0].state}"
            raise PilotError(f"{failed[0].url} was not written: {reason}")
        if not still:
            return
        if cancelled.is_set():
            raise PilotError(f"{still[0].url} was not written: the unit was cancelled.")
        cancelled.wait(pause_s)
        pause_s = min(pause_s * 2, PAUSE_S_MAX)
