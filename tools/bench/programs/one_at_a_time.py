"""One object read over http, each mebibyte asked for when the one before has come.

What a client without read-ahead gets out of a server that is far away.  Arguments: a URL that
needs no further headers (one for S3 is signed), size in bytes.  One connection, kept; standard
library only.  Prints the seconds from the first request to the last byte, and the bytes.
"""

import http.client
import sys
import time
import urllib.parse

RANGE_BYTES = 1 << 20


def main(url: str, size: str) -> None:
    parts = urllib.parse.urlsplit(url)
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    server = http.client.HTTPConnection(parts.netloc)
    server.connect()  # it is there before the clock runs
    total = 0
    begun = time.monotonic()
    for start in range(0, int(size), RANGE_BYTES):
        stop = min(start + RANGE_BYTES, int(size))
        server.request("GET", target, headers={"Range": f"bytes={start}-{stop - 1}"})
        answer = server.getresponse()
        if answer.status != http.client.PARTIAL_CONTENT:
            sys.exit(f"the server answered {answer.status} {answer.reason}")
        total += len(answer.read())
    seconds = time.monotonic() - begun
    if total != int(size):
        sys.exit(f"{total} bytes came of {size}")
    print(seconds, total)


if __name__ == "__main__":
    main(*sys.argv[1:])
