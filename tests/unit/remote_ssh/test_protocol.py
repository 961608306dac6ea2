"""SFTP packets as bytes, and the stream that takes them apart."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagefs.remote import sftp_protocol as protocol
from stagefs.remote.sftp_protocol import Attributes, Kind, ProtocolError
from stagefs.remote.sftp_stream import BUFFER_BYTES, PacketStream, SinkFile


def text(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def packet(kind: int, request: int, body: bytes) -> bytes:
    return text(bytes([kind]) + struct.pack(">I", request) + body)


def data_packet(request: int, payload: bytes) -> bytes:
    return packet(Kind.DATA, request, text(payload))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (protocol.initialize(), "0000000501 00000003"),
        (protocol.open_for_reading(7, b"/a"), "0000001303 00000007 000000022f61 00000001 00000000"),
        (protocol.on_path(Kind.STAT, 8, b"/a"), "0000000b11 00000008 000000022f61"),
        (protocol.on_handle(Kind.CLOSE, 9, b"h"), "0000000a04 00000009 0000000168"),
        (
            protocol.read(10, b"h", 2**40, 5),
            "0000001605 0000000a 0000000168 0000010000000000 00000005",
        ),
        (protocol.extended(11, b"x"), "0000000ac8 0000000b 0000000178"),
    ],
)
def test_requests_are_as_the_draft_says(made: bytes, expected: str) -> None:
    assert made == bytes.fromhex(expected)


@pytest.mark.parametrize(
    ("flags", "body", "expected"),
    [
        (0, b"", Attributes(None, None, None)),
        (1, struct.pack(">Q", 2**40), Attributes(2**40, None, None)),
        (0xF, struct.pack(">QIIIII", 5, 1, 2, 0o100644, 3, 4), Attributes(5, 0o100644, 4)),
        (0xD, struct.pack(">QIII", 5, 0o100644, 3, 4), Attributes(5, 0o100644, 4)),
        (0x8000000F, struct.pack(">QIIIII", 5, 1, 2, 3, 4, 6), Attributes(5, 3, 6)),
    ],
)
def test_attributes(flags: int, body: bytes, expected: Attributes) -> None:
    extension = struct.pack(">I", 1) + text(b"name") + text(b"value") if flags >> 31 else b""
    whole = struct.pack(">I", flags) + body + extension
    assert protocol.attributes(memoryview(whole)) == (expected, len(whole))
    for cut in range(len(whole)):
        with pytest.raises(ProtocolError):
            protocol.attributes(memoryview(whole[:cut]))


def test_versions_differ_with_time_and_size() -> None:
    assert Attributes(5, 0, 7).validator == "mtime:7:5"
    assert Attributes(5, 0, 7).validator != Attributes(7, 0, 5).validator


def test_limits() -> None:
    said = struct.pack(">QQQQ", 262144, 261120, 100000, 1019)
    assert protocol.limits(memoryview(said)) == (261120, 1019, 100000)
    assert protocol.limits(memoryview(bytes(32))) == (255 << 10, 0, 255 << 10)
    small = protocol.limits(memoryview(struct.pack(">QQQQ", 34000, 0, 0, 0)))
    assert (small.read_bytes, small.write_bytes) == (32976, 32976)
    with pytest.raises(ProtocolError):
        protocol.limits(memoryview(said[:31]))


def test_space() -> None:
    units = (512, 4096, 1000, 20, 10, 50, 5, 4, 1, 0, 255)
    assert protocol.space(memoryview(struct.pack(">11Q", *units))) == (40960, 4, False)
    read_only = (512, 4096, 1000, 20, 10, 0, 0, 0, 1, 1, 255)
    assert protocol.space(memoryview(struct.pack(">11Q", *read_only))) == (40960, 1, True)
    with pytest.raises(ProtocolError):
        protocol.space(memoryview(bytes(87)))


@given(st.binary(max_size=200))
def test_no_answer_makes_a_parser_fail_otherwise(body: bytes) -> None:
    view = memoryview(body)
    for parse in (
        protocol.status,
        protocol.string,
        protocol.names,
        protocol.extensions,
        protocol.attributes,
        protocol.limits,
        protocol.space,
    ):
        try:
            parse(view)
        except ProtocolError:
            continue


class Recorder:
    """Takes packets; the payload of requests below 100 goes to a file."""

    def __init__(self, sink: SinkFile) -> None:
        self.sink = sink
        self.seen: list[tuple[int, int, bytes]] = []

    def packet(self, kind: int, request: int, body: memoryview) -> None:
        self.seen.append((kind, request, bytes(body)))

    def payload_target(self, request: int, length: int) -> tuple[SinkFile, int] | None:
        return (self.sink, 1000 * request) if request < 100 else None

    def payload_ended(self, request: int, length: int) -> None:
        self.seen.append((-1, request, b"%d" % length))


class Pipe:
    def __init__(self, path: Path) -> None:
        self.out, self.into = os.pipe()
        self.path = path
        self.sink = SinkFile(os.open(path, os.O_RDWR | os.O_CREAT), shift=1000)
        self.recorder = Recorder(self.sink)
        self.stream = PacketStream(self.out, self.recorder)

    def give(self, data: bytes) -> None:
        os.write(self.into, data)
        assert self.stream.pull() == len(data)

    def close(self) -> None:
        os.close(self.out)
        os.close(self.into)
        self.sink.close()


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Pipe]:
    made = Pipe(tmp_path / "sink")
    yield made
    made.close()


ANSWERS = (
    packet(Kind.STATUS, 500, struct.pack(">I", 0))
    + data_packet(1, b"first" * 7)
    + data_packet(101, b"to memory")
    + data_packet(2, b"second")
    + data_packet(3, b"")
    + packet(Kind.HANDLE, 501, text(b"handle"))
)
SEEN = [
    (Kind.STATUS, 500, struct.pack(">I", 0)),
    (-1, 1, b"35"),
    (Kind.DATA, 101, text(b"to memory")),
    (-1, 2, b"6"),
    (Kind.DATA, 3, text(b"")),
    (Kind.HANDLE, 501, text(b"handle")),
]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 13, 14, 64, 10000])
def test_packets_may_come_in_any_pieces(pipe: Pipe, piece: int) -> None:
    for at in range(0, len(ANSWERS), piece):
        pipe.give(ANSWERS[at : at + piece])
    assert pipe.recorder.seen == SEEN
    written = pipe.path.read_bytes()
    assert written[:35] == b"first" * 7
    assert written[1000:] == b"second"


def test_a_closed_sink_swallows_the_rest_of_a_payload(pipe: Pipe) -> None:
    whole = data_packet(1, b"x" * 100)
    pipe.give(whole[:50])
    pipe.sink.close()
    pipe.give(whole[50:] + data_packet(2, b"more"))
    assert pipe.recorder.seen == [(-1, 1, b"100"), (-1, 2, b"4")]
    assert len(pipe.path.read_bytes()) == 50 - 13


def test_a_failing_sink_keeps_its_error(pipe: Pipe) -> None:
    pipe.recorder.sink = SinkFile(os.open("/dev/full", os.O_WRONLY), shift=0)
    pipe.give(data_packet(1, b"x" * 100))
    error = pipe.recorder.sink.error
    assert error is not None
    assert "No space" in str(error)
    pipe.recorder.sink.close()


@pytest.mark.parametrize(
    "nonsense",
    [
        b"Welcome to this machine\n",
        struct.pack(">IBI", 4, 101, 1),
        struct.pack(">IBI", (256 << 10) + 1, 103, 1),
        struct.pack(">IBII", 100, Kind.DATA, 1, 92),
    ],
)
def test_nonsense_is_noticed(pipe: Pipe, nonsense: bytes) -> None:
    with pytest.raises(ProtocolError):
        pipe.give(nonsense)


@given(st.binary(max_size=2000))
def test_no_bytes_make_the_stream_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    pipe = Pipe(tmp_path_factory.mktemp("any") / "sink")
    try:
        if data:
            pipe.give(data)
    except ProtocolError:
        return
    finally:
        pipe.close()


def test_the_buffer_holds_the_largest_packet() -> None:
    assert protocol.PACKET_BYTES_MAX + protocol.HEADER.size <= BUFFER_BYTES
