from collections.abc import Iterator
from pathlib import Path

import pytest

from stagefs.namespace.check import problems
from stagefs.namespace.store import Namespace


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "namespace.db"


@pytest.fixture
def namespace(database: Path) -> Iterator[Namespace]:
    """An open namespace; what a test leaves in it must be consistent."""
    opened = Namespace.open(database)
    yield opened
    opened.close()
    assert problems(database) == []
