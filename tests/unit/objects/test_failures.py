"""How a failure reaches those who wait for what failed."""

import hashlib
import random

import pytest
import trio

from stagefs.config import ReadSettings
from stagefs.errors import (
    AccessDenied,
    ObjectMissing,
    RangesRefused,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import MIB, Checksum, ChecksumKind
from tests.unit.objects.conftest import MakeReading


@pytest.mark.parametrize("way", ["ranges", "whole", "checksum", "small"])
@pytest.mark.parametrize(
    "refusal", [AccessDenied("No."), ObjectMissing("Gone."), RemoteUnavailable("Away.")], ids=repr
)
async def test_a_failure_ends_every_read_that_waited_however_short_it_is_held(
    make_reading: MakeReading, way: str, refusal: StageFSError
) -> None:
    data = random.Random(1).randbytes(1000 if way == "small" else 3 * MIB)
    digest = hashlib.sha256(data).hexdigest()
    settings = ReadSettings(read_deadline_s=30.0, failure_hold_s=0.0)
    async with make_reading(settings=settings) as reading:
        checksum = Checksum(ChecksumKind.SHA256, digest) if way == "checksum" else None
        node = reading.stage("a", data, checksum=checksum, validator="revision:1")
        ended: list[None] = []

        async def read() -> None:
            with pytest.raises(type(refusal)):
                await reading.read(node)
            ended.append(None)

        asked = len(reading.remote.requests)
        refusals = [refusal] * 1000
        reading.remote.failures = [*([RangesRefused("")] if way == "whole" else []), *refusals]
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(read)
        assert len(ended) == 3
        assert len(reading.remote.requests) - asked <= 3
        reading.remote.failures = []
        assert await reading.read(node) == data
