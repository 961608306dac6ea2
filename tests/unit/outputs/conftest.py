from pathlib import Path

import pytest

from tests.unit.outputs.local_rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "scratch")
