"""How far a result is from the truth, as one number: relative root mean square, NaN and infinities checked first."""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
"""Relative RMS that rounding alone explains, by the dtype of the inputs."""


def relative_rms(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| over all finite numbers; NaN anywhere and infinities in other places fail at once."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    got, want = got.double(), want.double()
    assert not want.isnan().any(), "the truth holds NaN"
    assert not got.isnan().any(), f"{int(got.isnan().sum())} of {got.numel()} numbers are NaN"
    unbounded = want.isinf()
    assert torch.equal(got.isinf(), unbounded), "infinite in other places"
    assert torch.equal(got[unbounded], want[unbounded]), "infinities of other sign"
    got, want = got[~unbounded], want[~unbounded]
    if want.numel() == 0:
        return 0.0
    error, size = (got - want).square().mean().sqrt(), want.square().mean().sqrt()
    return float(error / size) if size > 0 else float(error)


def assert_close(got: Tensor, want: Tensor, limit: float) -> None:
    """Fails with the number when `relative_rms` is above the limit."""
    error = relative_rms(got, want)
    assert error <= limit, f"relative RMS {error:.3e} above {limit:.1e}"
