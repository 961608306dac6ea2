"""The shared memory that outlives each daemon: a memfd, its header, the resent list.

The supervisor writes the header and the list, and only while no daemon lives; it reads
the count of answered requests.  The tables behind belong to the daemon
(``stagefs/fuse/operations_log.py``, which repeats these offsets; a test compares them).
All words are native unsigned 64-bit integers, so each is written in one store.
"""

import fcntl
import mmap
import os
import time
from collections.abc import Sequence
from typing import Self

from stagefs.supervisor.wire import Request

MAGIC = int.from_bytes(b"STAGEFS\x01", "little")
LAYOUT_VERSION = 1
MEMORY_BYTES = 1 << 20
W_MAGIC, W_VERSION, W_ANSWERED, W_NEXT_OPERATION = 0, 1, 2, 3
W_GENERATION, W_RESENT_MODE, W_RESENT_COUNT, W_STARTED_NS = 4, 5, 6, 7
W_CAN_RESEND = 8
RESENT_OFFSET = 4096
RESENT_MAX = 4096
NOTES_OFFSET = 40960
NOTES_MAX, NOTE_WORDS = 4096, 8
NOTE_FINISHED = 1 << 32
# How the requests of the dead daemon come back: there was none; each thread of the list
# repeats its request; or (kernels without RESEND) nobody knows which threads do.
RESENT_NONE, RESENT_LISTED, RESENT_UNKNOWN = 0, 1, 2


class SharedMemory:
    def __init__(self, *, can_resend: bool) -> None:
        self.fd = os.memfd_create("stagefs-shared", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, MEMORY_BYTES)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.words = memoryview(mmap.mmap(self.fd, MEMORY_BYTES)).cast("Q")
        self.words[W_VERSION] = LAYOUT_VERSION
        # Operation numbers are kept by the namespace for longer than a mount lives, so a
        # mount begins where the clock is: past every number that another mount has used.
        self.words[W_NEXT_OPERATION] = time.time_ns()
        self.words[W_CAN_RESEND] = can_resend
        self.words[W_MAGIC] = MAGIC

    @classmethod
    def adopted(cls, fd: int) -> Self:
        """The memory of another supervisor's mount.  Raises ValueError when it is of another kind.

        What it holds stays as it is: its daemons' notes are what the next daemon goes by.
        """
        this = cls.__new__(cls)
        if os.fstat(fd).st_size != MEMORY_BYTES:
            raise ValueError(f"its shared memory has {os.fstat(fd).st_size} bytes")
        this.fd = fd
        this.words = memoryview(mmap.mmap(fd, MEMORY_BYTES)).cast("Q")
        if this.words[W_MAGIC] != MAGIC or this.words[W_VERSION] != LAYOUT_VERSION:
            raise ValueError(f"its shared memory has layout {this.words[W_VERSION]}")
        return this

    @property
    def answered(self) -> int:
        return self.words[W_ANSWERED]

    def begin_generation(self, resent: Sequence[Request] | None, *, first: bool) -> None:
        """Say to the next daemon what the last one left.  ``resent`` is None for unknown."""
        words = self.words
        if first:
            mode, count = RESENT_NONE, 0
        elif resent is None or len(resent) > RESENT_MAX:
            mode, count = RESENT_UNKNOWN, 0
        else:
            mode, count = RESENT_LISTED, len(resent)
            start = RESENT_OFFSET // 8
            for place, request in enumerate(resent, start):
                words[place] = request.thread << 32 | request.opcode
        words[W_RESENT_MODE], words[W_RESENT_COUNT] = mode, count
        words[W_STARTED_NS] = time.monotonic_ns()
        if not first:
            words[W_GENERATION] += 1
