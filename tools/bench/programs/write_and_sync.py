"""Write a file and fsync it, again and again, until it is ended.

What a task does that saves its state often.  Arguments: the file, how many MiB each time.
"""

import os
import sys

MIB = 1 << 20


def main(path: str, mib: str) -> None:
    piece = os.urandom(MIB)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    while True:
        os.lseek(fd, 0, os.SEEK_SET)
        for _ in range(int(mib)):
            os.write(fd, piece)
        os.fsync(fd)


if __name__ == "__main__":
    main(*sys.argv[1:])
