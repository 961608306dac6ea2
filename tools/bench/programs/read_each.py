"""List a directory, and open, read and close every file of it, in the order of their names.

Prints the seconds that took and the bytes that came.  Standard library only: this is what a
task does with many small inputs.
"""

import os
import sys
import time


def main(directory: str) -> None:
    total = 0
    begun = time.monotonic()
    for name in sorted(os.listdir(directory)):
        fd = os.open(f"{directory}/{name}", os.O_RDONLY)
        try:
            while piece := os.read(fd, 1 << 16):
                total += len(piece)
        finally:
            os.close(fd)
    print(time.monotonic() - begun, total)


if __name__ == "__main__":
    main(sys.argv[1])
