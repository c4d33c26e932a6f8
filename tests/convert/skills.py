"""Two skills that a tiny model learns in seconds, for conversions that merge what was trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


class Recall:
    """To say the token `back` places ago, which only attention can. The first token names the skill."""

    def __init__(self, back: int) -> None:
        self.back = back

    def batch(self, generator: torch.Generator, rows: int = 32) -> tuple[Tensor, Tensor]:
        ids = torch.randint(6, 22, (rows, 14), generator=generator)
        ids[:, 0] = self.back
        labels = ids.roll(self.back, 1)
        labels[:, : self.back + 1] = -100
        return ids, labels

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Nats per token; by chance it is log(16) = 2.8."""
        ids, labels = self.batch(torch.Generator().manual_seed(99), 64)
        return float(torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()))


def untrained() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=22,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    )


def trained(model: Any, skills: Sequence[Recall], steps: int, rate: float, seed: int) -> tuple[Any, torch.optim.AdamW]:
    """A trained copy, and the optimizer that trained it."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss: Any = 0.0
        for skill in skills:
            ids, labels = skill.batch(generator)
            loss = loss + torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), optimizer
