"""Run a command, with its standard output; then print the seconds it took and the highest resident
memory of it or a child of its, in bytes, on standard error.

A program of its own, because the kernel counts the memory of whoever starts a command as the
command's: this one is small.  Standard library only.
"""

import resource
import subprocess
import sys
import time


def main(*words: str) -> int:
    begun = time.monotonic()
    done = subprocess.run(words, check=False)
    seconds = time.monotonic() - begun
    print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10, file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
