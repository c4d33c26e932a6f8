"""Samples read side by side through one cache, one row each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.cache import FoveateCache
from foveate.engine.binding import Binding
from foveate.models.shape import ModelShape

AT_ONCE = {"cpu": (8, 8192), "cuda": (64, 65536)}
"""By device: the most rows, and the most prompt tokens, that are read side by side. Decoding several short rows at once
is what makes a CPU run bearable, and a GPU busy."""


def rows_at_once(length: int, device: str = "cpu") -> int:
    """How many samples of this length share a batch. Only the length and the kind of device decide, so that a resumed
    run makes the same batches: in bf16 the company of a row changes its last bits."""
    rows, tokens = AT_ONCE.get(device, AT_ONCE["cpu"])
    return max(1, min(rows, tokens // length))


class Batch:
    """Rows of tokens that a model reads through one cache, left-padded where their lengths differ.

    Attributes:
        cache: what holds them; `cache.meter` counts the pairs that are read.
        seen: tokens of each row so far.
        skipped: tokens of each row's prompt that were left out before it was read.
        dense: causal pairs of the whole rows, by phase, as `cache.meter` counts the pairs read.
    """

    def __init__(
        self, model: Any, cache: FoveateCache, rows: int, shape: ModelShape, skipped: Sequence[int] | None = None
    ) -> None:
        self.model, self.cache, self.shape = model, cache, shape
        self.seen = [0] * rows
        self.skipped = [0] * rows if skipped is None else list(skipped)
        self.dense: Counter[str] = Counter()
        self._mask = torch.ones(rows, 0, dtype=torch.int64, device=model.device)

    def prompt(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read a piece of prompt, after which the methods of the cache act. Returns logits [B, V] behind each row."""
        self.cache.expect(max(map(len, rows)))
        return self._read(rows, "prompt")

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Decode one token of every row. Returns the logits [B, V] of the next."""
        return self._read([[token] for token in tokens], "decode")

    def fork(self, binding: Binding | None = None) -> Batch:
        """A copy of the rows: under the same methods, or under others if the prompt was read densely. What it reads is
        counted from here on."""
        new = Batch(self.model, self.cache.fork(binding), len(self.seen), self.shape)
        new.seen, new.skipped, new._mask = list(self.seen), list(self.skipped), self._mask
        if self.cache.meter is not None:
            new.cache.meter = {}
        return new

    def add(self, fork: Batch) -> None:
        """Count the pairs that a fork read, too."""
        self.dense.update(fork.dense)
        if self.cache.meter is not None:
            for phase, pairs in (fork.cache.meter or {}).items():
                self.cache.meter[phase] = self.cache.meter.get(phase, 0.0) + pairs

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.cache.batch_select_indices(torch.tensor(rows, dtype=torch.int64))
        self.seen = [self.seen[row] for row in rows]
        self.skipped = [self.skipped[row] for row in rows]
        self._mask = self._mask[list(rows)]

    def rewind(self, steps: int) -> None:
        """Forget the last decode steps."""
        self.cache.crop(-steps)
        self.seen = [n - steps for n in self.seen]
        self._mask = self._mask[:, :-steps]

    def _read(self, rows: Sequence[Sequence[int]], phase: str) -> Tensor:
        width = max(map(len, rows))
        device = self._mask.device
        ids = torch.tensor([[row[0]] * (width - len(row)) + list(row) for row in rows], device=device)
        counts = torch.tensor([len(row) for row in rows], device=device).unsqueeze(1)
        place = torch.arange(width, device=device) - (width - counts)
        self._mask = torch.cat([self._mask, (place >= 0).long()], dim=1)
        padded = bool((counts != width).any())
        positions = torch.tensor(self.seen, device=device).unsqueeze(1) + place.clamp_min(0)
        out = self.model(
            input_ids=ids,
            attention_mask=self._mask if padded else None,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for row, tokens in enumerate(rows):
            # what was left out stood in the first piece of the prompt
            start = self.seen[row] + self.skipped[row] if self.seen[row] else 0
            self.seen[row] += len(tokens)
            self.dense[phase] += causal_pairs(self.shape, start, self.seen[row] + self.skipped[row])
        return out.logits[:, -1].float()


def causal_pairs(shape: ModelShape, start: int, stop: int) -> int:
    """Query-key pairs that the dense model computes for the queries at positions start..stop-1: all layers and query
    heads, the model's own windows respected."""

    def up_to(position: int, window: int | None) -> int:
        """Sum over queries 0..position-1 of the keys each sees."""
        if window is None or position <= window:
            return position * (position + 1) // 2
        return window * (window + 1) // 2 + (position - window) * window

    layers = (layer for layer in shape.layers if layer.kind != "other")
    return sum(layer.num_heads * (up_to(stop, layer.window) - up_to(start, layer.window)) for layer in layers)
