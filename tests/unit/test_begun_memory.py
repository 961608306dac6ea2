"""Buffers for requests come from memory that was touched before: see ``core.prepare_limits``."""

import subprocess
import sys

# As libfuse takes them, a buffer for each request that is in work; sizes in bytes.
BUFFERS = """
import ctypes, re, sys
from pathlib import Path
from stagefs.core import prepare_limits

def faults():
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[7])

if sys.argv[1] == "prepared":
    prepare_limits()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
before = faults()
for _ in range(16):
    ctypes.memset(libc.malloc(ctypes.c_size_t((1 << 20) + 4096)), 1, 1 << 20)
print(faults() - before)
"""


def page_faults(how: str) -> int:
    command = [sys.executable, "-c", BUFFERS, how]
    return int(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)


def test_requests_are_read_into_memory_that_is_there() -> None:
    assert page_faults("as it is") > 1000, "the measure shows nothing"
    assert page_faults("prepared") < 100
