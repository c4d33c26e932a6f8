"""Kernels for Hopper that nothing here can run: they compile, and what they are made for is in the machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_products_run_beside_exponentials(tmp_path: Path) -> None:
    own = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-m", "tests.attention.hopper"], capture_output=True, text=True, env=own)
    assert ran.returncode == 0, ran.stderr
    wide, slim, latent = (json.loads(line) for line in ran.stdout.splitlines())
    for found, dim in ((wide, 128), (slim, 64)):
        # Two groups of warps with scores of a first step, and with a step and a change of tiles whose scores and
        # values are under way together. A compiler that doubts the order ends a group with every product.
        assert (found["groups"], found["waits"]) == (10, 10)
        assert found["products"] == 2 * (3 * dim // 16 + 2 * 128 // 16)
        # All exponentials of 64 x 128 scores lie in front of the wait for the values.
        assert len(found["exponentials"]) == 4
        assert min(found["exponentials"]) >= 64
    assert latent["groups"] * 2 < latent["products"]
