"""One upload on its way: sending it, and how far it is.  Trio thread; no policy."""

import os
from collections.abc import Callable
from pathlib import Path

import trio

from stagefs.errors import NotFound, StateFailed
from stagefs.model import Checksum, ChecksumKind
from stagefs.outputs.queue_rows import host_of
from stagefs.outputs.queued import Outcome, QueueItem, Upload
from stagefs.remote.base import Remote
from stagefs.remote.url import parse

# Which declared checksum is the cheapest for a remote to prove; the first that there is.
_PROOFS = {"s3": (ChecksumKind.SHA256, ChecksumKind.MD5, ChecksumKind.XXH3)}
_PROOF = (ChecksumKind.XXH3, ChecksumKind.SHA256, ChecksumKind.MD5)


class UnderWay:
    """One upload from its begin until its outcome is durable."""

    def __init__(self, upload: Upload) -> None:
        self.upload = upload
        self.host = host_of(upload.item.url)
        self.scope = trio.CancelScope()
        self.sent_bytes = 0
        self.outcome: Outcome | None = None
        self.over = trio.Event()


async def send(one: UnderWay, remote_for: Callable[[str], Remote], file: Path) -> str:
    """One attempt; the validator of the object that is there now.  Raises StageFSError."""
    item = one.upload.item
    if item.removes:
        await remote_for(item.url).delete(item.url)
        return ""
    source = await trio.to_thread.run_sync(_open_source, file, item.url)

    def progress(sent_bytes: int) -> None:
        one.sent_bytes = sent_bytes

    try:
        info = await remote_for(item.url).put(
            item.url,
            source=source,
            size_bytes=item.size_bytes,
            overwrite=item.overwrite,
            checksum=_proof_of(item),
            mode=item.mode,
            progress=progress,
        )
    finally:
        os.close(source)
    return info.validator


def _open_source(path: Path, url: str) -> int:
    """Raises NotFound, StateFailed."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError as exc:
        raise NotFound(f"The file {path} for {url} is gone: nothing can be uploaded.") from exc
    except OSError as exc:
        raise StateFailed(
            f"The file {path} for {url} cannot be read ({exc.strerror}): check the disk of the"
            " outputs directory."
        ) from exc


def _proof_of(item: QueueItem) -> Checksum | None:
    known = {checksum.kind: checksum for checksum in item.checksums}
    order = _PROOFS.get(parse(item.url).scheme, _PROOF)
    return next((known[kind] for kind in order if kind in known), None)
