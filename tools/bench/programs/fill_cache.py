"""Fill a cache directory as a daemon does: objects of 10 MiB of which the last 4 KiB are cached.

Arguments: the directory, how many objects.  100,000 of them are a TiB of sparse files that takes
0.8 GiB of disk.
"""

import os
import sys
from pathlib import Path

from stagefs.cache.store import Cache
from stagefs.model import GIB, ObjectId

CHUNK_BYTES = 64 << 10
FULL_CHUNKS = 160
CACHED_BYTES = 4 << 10
# Files stay open until the index has heard of them.
NOTED_EVERY = 500


def main(directory: str, count: str) -> None:
    cache = Cache.open(
        Path(directory), capacity_bytes=1024 * GIB, chunk_bytes=CHUNK_BYTES, free_floor_bytes=GIB
    )
    start = FULL_CHUNKS * CHUNK_BYTES
    for number in range(int(count)):
        url = f"http://127.0.0.1:9/set-{number % 100:02d}/reads-{number:06d}.fastq.gz"
        entry = cache.create(
            ObjectId(url, f"etag:{number}"),
            size_bytes=start + CACHED_BYTES,
            validator=f"etag:{number}",
            mtime_ns=number,
            checksum=None,
        )
        cache.hold(entry)
        os.pwrite(entry.fd, number.to_bytes(8) * (CACHED_BYTES // 8), entry.base + start)
        entry.commit(FULL_CHUNKS)
        cache.drop(entry)
        if number % NOTED_EVERY == 0:
            cache.flush_index()
    cache.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
