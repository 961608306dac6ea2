"""One object read with obstore, eight ranges in flight, and thrown away.

What a Python program can get out of this S3 server at best.  Arguments: endpoint, bucket, key,
size in bytes.  Credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.  Prints the
seconds from the first request to the last byte.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import obstore
from obstore.store import S3Store

IN_FLIGHT = 8
RANGE_BYTES = 8 << 20


def main(endpoint: str, bucket: str, key: str, size: str) -> None:
    size_bytes = int(size)
    store = S3Store(
        bucket,
        endpoint=endpoint,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )

    def fetch(start: int) -> int:
        length = min(RANGE_BYTES, size_bytes - start)
        return len(obstore.get_range(store, key, start=start, length=length))

    fetch(0)  # the connection and the library's threads are there before the clock runs
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        begun = time.monotonic()
        total = sum(threads.map(fetch, range(0, size_bytes, RANGE_BYTES)))
        seconds = time.monotonic() - begun
    if total != size_bytes:
        sys.exit(f"{total} bytes came of {size_bytes}")
    print(seconds, total)


if __name__ == "__main__":
    main(*sys.argv[1:])
