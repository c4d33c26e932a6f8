"""Fixtures of all tests."""

from __future__ import annotations

import zlib

import pytest


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this test's own: inputs differ from test to test and stay what they are from run to run."""
    return zlib.crc32(request.node.nodeid.encode())
