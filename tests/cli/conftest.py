from __future__ import annotations

from pathlib import Path

import pytest
from tests.evaluate.small import saved


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model."""
    return saved(tmp_path_factory.mktemp("small") / "small")
