"""Attention kernels timed alone: beside a float32 truth, dense attention, other libraries and the floor."""

from foveate.bench.kernels.measure import FAMILIES, bench, run
from foveate.bench.kernels.sizes import Sizes

__all__ = ["FAMILIES", "Sizes", "bench", "run"]
