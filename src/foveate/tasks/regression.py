"""In-context linear regression (arXiv 2208.01066, section 3), as tensors for layers that are trained on it.

A sequence is x1, y1, x2, y2, ... with y = w·x; at each x the model predicts its y from the pairs before. Baselines
that see the same pairs stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.errors import BadArgument


@dataclass(frozen=True)
class Functions:
    """Points of random functions: x [B, k, d], y [B, k]; double precision."""

    x: Tensor
    y: Tensor

    def sequence(self) -> Tensor:
        """x1, y1, x2, y2, ... as vectors [B, 2k, d], a y in the first coordinate; predictions are read at the x, which
        stand at the even positions."""
        batch, points, width = self.x.shape
        joined = torch.zeros(batch, 2 * points, width, dtype=self.x.dtype)
        joined[:, ::2], joined[:, 1::2, 0] = self.x, self.y
        return joined


@dataclass(frozen=True)
class Regression:
    """x ~ N(0, I), w ~ N(0, I), y = w·x + noise.

    Args:
        width: d.
        points: k.
        kind: "linear"; "sparse": w has three entries that are not 0; "quadratic": y = w·x², divided by sqrt(3).
        noise: standard deviation of what is added to y.

    Raises:
        BadArgument: a size is below 1, or the width below the entries that are not 0.
    """

    width: int = 20
    points: int = 40
    kind: Literal["linear", "sparse", "quadratic"] = "linear"
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.points < 1:
            raise BadArgument("points", self.points, "give at least 1")
        least = 3 if self.kind == "sparse" else 1
        if self.width < least:
            raise BadArgument("width", self.width, f"give at least {least}")

    def generate(self, samples: int, seed: int) -> Functions:
        """`samples` functions, each with its points; equal seeds give equal ones."""
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        x, w = normal(samples, self.points, self.width), normal(samples, self.width)
        if self.kind == "sparse":
            ranks = torch.rand(samples, self.width, generator=rng).argsort(1)
            w = w * torch.zeros_like(w).scatter_(1, ranks[:, :3], 1.0)
        features = x.square() / 3**0.5 if self.kind == "quadratic" else x
        y = (features * w.unsqueeze(1)).sum(-1)
        return Functions(x, y + self.noise * normal(samples, self.points) if self.noise else y)


def error_by_examples(predictions: Tensor, functions: Functions) -> Tensor:
    """Mean squared error of predictions [B, k] divided by d, by the number of pairs seen before: [k].

    Predicting 0 gives about 1 everywhere (chance); least squares gives 0 from d noiseless pairs on.
    """
    return (predictions - functions.y).square().mean(0) / functions.x.shape[-1]


def least_squares(functions: Functions, ridge: float = 0.0) -> Tensor:
    """Predictions [B, k] of the least-squares fit to the pairs before each point (of least norm where it is free), or
    of ridge regression."""
    x, y = functions.x, functions.y
    found = torch.zeros_like(y)
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    for seen in range(1, y.shape[1]):
        before, answers = x[:, :seen], y[:, :seen].unsqueeze(-1)
        if ridge:
            across = before.transpose(1, 2)
            w = torch.linalg.solve(across @ before + ridge * eye, across @ answers)
        else:
            w = torch.linalg.pinv(before) @ answers
        found[:, seen] = (x[:, seen].unsqueeze(1) @ w).flatten()
    return found


def nearest(functions: Functions, neighbours: int = 3) -> Tensor:
    """Predictions [B, k]: the mean y of the nearest points before; 0 for the first."""
    x, y = functions.x, functions.y
    found = torch.zeros_like(y)
    for seen in range(1, y.shape[1]):
        distance = (x[:, :seen] - x[:, seen : seen + 1]).square().sum(-1)
        closest = distance.topk(min(neighbours, seen), dim=1, largest=False).indices
        found[:, seen] = y[:, :seen].gather(1, closest).mean(1)
    return found


def averaging(functions: Functions) -> Tensor:
    """Predictions [B, k] with w estimated as the mean of y x over the pairs before; 0 for the first."""
    x, y = functions.x, functions.y
    sums = (x * y.unsqueeze(-1)).cumsum(1)
    counts = torch.arange(1, y.shape[1], dtype=x.dtype).view(1, -1, 1)
    found = torch.zeros_like(y)
    found[:, 1:] = (x[:, 1:] * sums[:, :-1] / counts).sum(-1)
    return found
