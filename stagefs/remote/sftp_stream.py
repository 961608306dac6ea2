"""Splitting what an SFTP server sends into packets, and payload straight into files.

The bytes are read into one buffer.  Whole packets go to the receiver as views of it, and the
payload of a READ that has a sink is written to the file from there as it comes in, so each
byte is copied twice (pipe to buffer, buffer to page cache) and never by Python.  splice was
tried: the same CPU time over seven interleaved pairs of 1 GiB, and it works from pipes only.

Runs in the engine's only thread; reading never blocks, writing into a sink may (it is a local
file).
"""

import os
import struct
from typing import Protocol

from stagefs.page_buffer import page_buffer
from stagefs.remote.sftp_protocol import HEADER, PACKET_BYTES_MAX, Kind, ProtocolError

# Small enough to stay in a core's cache between the two copies, larger than any packet.
BUFFER_BYTES = 512 << 10
_DATA_HEADER = struct.Struct(">IBII")


class SinkFile:
    """A file that fetched bytes go into; the descriptor is this object's own.

    Byte ``n`` of the object goes to offset ``n - shift``.  After ``close``, and after a write
    that failed (``error``), bytes are dropped.
    """

    def __init__(self, fd: int, *, shift: int) -> None:
        self._fd = fd
        self._shift = shift
        self._open = True
        self.error: OSError | None = None

    def write(self, view: memoryview, offset: int) -> None:
        if not self._open or self.error is not None:
            return
        try:
            while view:
                written = os.pwrite(self._fd, view, offset - self._shift)
                offset += written
                view = view[written:]
        except OSError as exc:
            self.error = exc

    def close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._fd)


class Receiver(Protocol):
    def packet(self, kind: int, request: int, body: memoryview) -> None:
        """One whole packet.  ``body`` is valid during the call only."""
        ...

    def payload_target(self, request: int, length: int) -> tuple[SinkFile, int] | None:
        """Where the payload of this DATA packet goes (and the object's offset of its first
        byte); None: it is delivered as a packet."""
        ...

    def payload_ended(self, request: int, length: int) -> None: ...


class PacketStream:
    def __init__(self, fd: int, receiver: Receiver) -> None:
        self._fd = fd
        self._receiver = receiver
        self._view = page_buffer(BUFFER_BYTES)
        self._stop = 0  # bytes at the front of the buffer that are not consumed yet
        self._sink: SinkFile | None = None
        self._sink_offset = 0
        self._payload_left = 0
        self._payload = (0, 0)

    def pull(self) -> int:
        """Read once and deliver what is complete.  Returns the bytes read, 0 at the end of the
        stream.  Raises ProtocolError, BlockingIOError, OSError."""
        count = os.readv(self._fd, [self._view[self._stop :]])
        self._stop += count
        at = 0
        while (step := self._consume(at)) > 0:
            at += step
        if 0 < at < self._stop:
            self._view[: self._stop - at] = self._view[at : self._stop]
        self._stop -= at
        return count

    def _consume(self, at: int) -> int:
        """Take one packet or piece of payload from the buffer; how many bytes that used."""
        ready = self._stop - at
        if self._sink is not None:
            return self._consume_payload(self._sink, at, ready)
        if ready < HEADER.size:
            return 0
        header: tuple[int, int, int] = HEADER.unpack_from(self._view, at)
        length, kind, request = header
        if not 5 <= length <= PACKET_BYTES_MAX:
            raise ProtocolError(f"a packet of {length} bytes")
        if kind == Kind.DATA and ready >= _DATA_HEADER.size:
            payload = _DATA_HEADER.unpack_from(self._view, at)[3]
            if payload != length - 9:
                raise ProtocolError("a DATA packet whose lengths disagree")
            target = self._receiver.payload_target(request, payload) if payload else None
            if target is not None:
                self._sink, self._sink_offset = target
                self._payload_left = payload
                self._payload = (request, payload)
                return _DATA_HEADER.size
        if ready < 4 + length:
            return 0
        self._receiver.packet(kind, request, self._view[at + HEADER.size : at + 4 + length])
        return 4 + length

    def _consume_payload(self, sink: SinkFile, at: int, ready: int) -> int:
        taken = min(ready, self._payload_left)
        if taken:
            sink.write(self._view[at : at + taken], self._sink_offset)
            self._sink_offset += taken
            self._payload_left -= taken
        if not self._payload_left:
            self._sink = None
            self._receiver.payload_ended(*self._payload)
        return taken
