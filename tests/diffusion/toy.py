"""A language of copies for small denoisers: random symbols, then the same once more."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.diffusion import DiffusionShape, MaskedDiffusion, masked_loss

SYMBOLS, HALF = 12, 24


def copies(count: int, generator: torch.Generator) -> Tensor:
    """int [count, 2 * HALF]."""
    symbols = torch.randint(0, SYMBOLS, (count, HALF), generator=generator)
    return torch.cat([symbols, symbols], dim=1)


def trained(steps: int = 200) -> MaskedDiffusion:
    """A model that has learned to copy."""
    model = MaskedDiffusion(DiffusionShape(vocab_size=SYMBOLS, heads=4, kv_heads=2, layers=2), seed=1)
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        masked_loss(model, copies(32, generator), HALF, generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
