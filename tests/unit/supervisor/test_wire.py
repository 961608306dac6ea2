"""The messages that the supervisor reads and writes itself, byte by byte."""

import struct

import pytest

from stagefs.supervisor import wire

KERNEL_FLAGS = 0x73FFFFFB  # what Linux 6.18 offers
FLOCK_LOCKS, POSIX_LOCKS, READDIRPLUS_AUTO, AUTO_INVAL_DATA, WRITEBACK_CACHE = (
    1 << 10,
    1 << 1,
    1 << 14,
    1 << 12,
    1 << 16,
)


def kernel_init(*, major: int = 7, minor: int = 45, flags: int = KERNEL_FLAGS) -> bytes:
    body = struct.pack("=IIIII44x", major, minor, 131072, flags, 0x5FD)
    return struct.pack("=IIQQIIIHH", 40 + len(body), 26, 2, 0, 0, 0, 0, 0, 0) + body


def test_init_is_understood() -> None:
    init = wire.parse_init(kernel_init())
    assert (init.unique, init.minor, init.max_readahead) == (2, 45, 131072)
    assert init.can_resend


def test_an_old_kernel_cannot_resend() -> None:
    assert not wire.parse_init(kernel_init(flags=KERNEL_FLAGS & ~wire.INIT_EXT)).can_resend
    short = kernel_init(minor=31)[: 40 + 16]
    assert not wire.parse_init(short).can_resend


def test_another_protocol_or_request_is_refused() -> None:
    with pytest.raises(ValueError, match="protocol 8"):
        wire.parse_init(kernel_init(major=8))
    with pytest.raises(ValueError, match="opcode 1"):
        wire.parse_init(struct.pack("=IIQQIIIHH", 40, 1, 2, 0, 0, 0, 0, 0, 0))


def test_the_reply_asks_for_what_the_design_says() -> None:
    reply = wire.init_reply(wire.parse_init(kernel_init()))
    length, error, unique = struct.unpack_from("=IiQ", reply)
    assert (length, error, unique) == (len(reply), 0, 2)
    fields = struct.unpack_from("=IIIIHHIIHHII", reply, 16)
    major, minor, _, flags, background, congestion, max_write, gran, pages, _, flags2, _ = fields
    assert (major, minor) == (7, 38)
    assert (background, congestion) == (1000, 750)
    assert (max_write, gran, pages, flags2) == (1 << 20, 1, 256, 0)
    assert flags & wire.HANDLE_KILLPRIV_V2
    assert flags & wire.DO_READDIRPLUS
    unwanted = FLOCK_LOCKS | POSIX_LOCKS | READDIRPLUS_AUTO | AUTO_INVAL_DATA | WRITEBACK_CACHE
    assert not flags & unwanted
    assert not flags & ~KERNEL_FLAGS, "nothing that the kernel did not offer"


def test_the_replay_offers_only_what_the_kernel_was_told() -> None:
    init = wire.parse_init(kernel_init())
    replayed = wire.parse_init(wire.replayed_init(init))
    told = struct.unpack_from("=IIII", wire.init_reply(init), 16)[3]
    assert replayed.flags == told
    assert replayed.flags2 == 0
    assert replayed.unique == init.unique


def test_requests_that_are_sent_again_are_told_apart() -> None:
    head = struct.pack("=IIQQIIIHH", 40, 9, wire.RESENT_BIT | 6, 1, 0, 0, 77, 0, 0)
    request = wire.parse_request(head)
    assert request.resent
    assert (request.opcode, request.thread) == (9, 77)
