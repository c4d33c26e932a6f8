"""Fixtures of all tests."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import settings

# An example that is slow on a busy machine is not wrong.
settings.register_profile("foveate", deadline=None)
settings.load_profile("foveate")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this test's own: inputs differ from test to test and stay what they are from run to run."""
    return zlib.crc32(request.node.nodeid.encode())
