"""A commit and its uploads to ``file://``, killed one durable step later each time.

    python -m tests.unit.staging.out_child DIRECTORY

As ``tests.unit.outputs.queue_child``, whose steps it uses; those of the driver of ``file://`` in
its worker threads are counted, too.  Run N has DIRECTORY/N/outputs and DIRECTORY/N/remote; the
file DIRECTORY/N/committed stands for the namespace's transaction, after which a commit is made.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import trio

from stagefs.config import StageOutSettings
from stagefs.model import Checksum, ChecksumKind
from stagefs.outputs.queue import Queue
from stagefs.outputs.queued import QueueItem
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.registry import Remotes
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.url import quote_path
from stagefs.staging.stageout import StageOut
from tests.unit.outputs.queue_child import run_all
from tests.unit.outputs.queue_rig import OWNER

# Name -> content; `deep` needs a directory, `old` exists and is replaced.
CONTENTS = {"small": b"small\n", "deep/er": b"0123456789" * 1000, "old": b"new content\n"}
OLD = b"what was there before"


def prepared(directory: Path) -> None:
    """What is there before the daemon begins."""
    (directory / "remote").mkdir(parents=True)
    (directory / "remote/old").write_bytes(OLD)


def items_in(queue: Queue, commit: str, remote: Path) -> list[QueueItem]:
    files = queue.make_directory_of(commit)
    items = []
    for number, (name, data) in enumerate(CONTENTS.items()):
        (files / f"{number}").write_bytes(data)
        items.append(
            QueueItem(
                url=f"file://{quote_path(str(remote / name))}",
                file=f"{number}",
                size_bytes=len(data),
                checksums=(Checksum(ChecksumKind.XXH3, digest(data)),),
                overwrite=name == "old",
                label=name,
            )
        )
    return items


def digest(data: bytes) -> str:
    import xxhash  # noqa: PLC0415 - only this

    return xxhash.xxh3_64_hexdigest(data)


def new_stage_out(queue: Queue) -> tuple[StageOut, Remotes]:
    remotes = Remotes(RemoteSettings(attempts=1), CredentialStore(None))
    settings = StageOutSettings(concurrency=2, backoff_s=0.01)
    return StageOut(queue, remote_for=remotes.for_url, settings=settings), remotes


async def upload_all(directory: Path, tell: Callable[[str], None]) -> None:
    queue = Queue.open(directory / "outputs", owner=OWNER, origin="here")
    out, remotes = new_stage_out(queue)
    async with out.running():
        items = items_in(queue, "c1", directory / "remote")
        await out.prepare("c1", items)
        (directory / "committed").touch()
        await out.activate("c1")
        tell("acknowledged")
        while out.busy:
            await out.moved()
        tell("uploaded")
    await remotes.aclose()
    queue.close()


def scenario(directory: Path, tell: Callable[[str], None]) -> None:
    trio.run(upload_all, directory, tell)


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), scenario, prepared)
