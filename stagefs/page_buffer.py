"""Memory that the kernel copies files into, at the start of a page.

AMD's processors with "fast short rep mov" copy five times slower into memory that begins 1 to
31 bytes behind the place in its page that the source has in its own: 2.3 instead of 11 GiB/s out
of the page cache (measured, docs/BENCHMARKS.md).  That is where malloc puts what is large, 16
bytes into a page, and so ``bytearray``; ``bytes`` has another 32 bytes in front of its data.
"""

import mmap


def page_buffer(size: int) -> memoryview:
    """So many bytes, zeros at first, that are given back when nobody refers to the view."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
