"""The fixture that makes supervised mounts, for the conftest of the folders that use it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fuse_mounts import SupervisedMount
from tests.support.identity import Identity

NewSupervised = Callable[..., SupervisedMount]
SMALL = bytes(range(256)) * 64


@pytest.fixture
def new_supervised(work: Path) -> Iterator[NewSupervised]:
    """``new_supervised(identity, content=b"...")``: directories and content, not yet mounted."""
    made: list[SupervisedMount] = []

    def new(identity: Identity, *, content: bytes = SMALL) -> SupervisedMount:
        mount = SupervisedMount(identity, identity.directory(work / f"s{len(made)}"), content)
        made.append(mount)
        return mount

    yield new
    for mount in made:
        mount.at_end()
