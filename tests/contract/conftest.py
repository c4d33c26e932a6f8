"""Fixtures of the contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.interpreter import unchecked


@pytest.fixture(autouse=True, scope="package")
def quick_kernels() -> Iterator[None]:
    """Whether indices overflow is seen where kernels are tested by themselves (tests/attention)."""
    with unchecked():
        yield
