"""Generating by denoising: all answer tokens are hidden at first, and each step shows those that are surest."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from foveate.attention import Selection
from foveate.diffusion.model import MaskedDiffusion
from foveate.errors import BadArgument


class Moment(NamedTuple):
    """Where a generation stands.

    Args:
        step: number of the denoising step, from 0.
        steps: how many there are.
        prompt: how many first tokens are the prompt; those behind it are being generated.
    """

    step: int
    steps: int
    prompt: int


class DiffusionMethod(Protocol):
    """A method that decides what a bidirectional model reads at each step. It holds no state itself."""

    def select(self, q: Tensor, k: Tensor, at: Moment, mine: dict[str, Tensor]) -> Selection:
        """The pairs that the queries q [B, H, N, D] read of the keys k [B, Hk, N, D].

        `mine` is the layer's own, empty when a generation starts and kept until it ends.
        """
        ...


@torch.no_grad()
def denoise(
    model: MaskedDiffusion,
    prompt: Tensor,
    length: int,
    steps: int,
    *,
    method: DiffusionMethod | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Generate `length` tokens behind each prompt.

    At each step the model guesses all hidden tokens; an even share of them, those whose guess is the most likely, is
    shown and stays. Nothing is cached between steps. Source: 2502.09992 (LLaDA), section 2.4.

    Args:
        prompt: int [B, P]; rows of one length, P may be 0.
        length: tokens to generate.
        steps: from 1 (all at once) to `length` (one token a step).
        method: what is read at each step; None: everything.
        temperature: of the guesses; 0 takes the likeliest token.
        seed: of the guesses.

    Returns:
        int [B, P + length], prompt and answer.

    Raises:
        BadArgument: no token to generate, more steps than tokens, or a temperature below 0.
    """
    if length < 1:
        raise BadArgument("length", length, "give at least 1 token to generate")
    if not 1 <= steps <= length:
        raise BadArgument("steps", steps, f"give 1 to {length}: each step shows at least one of {length} tokens")
    if temperature < 0:
        raise BadArgument("temperature", temperature, "give 0 (the likeliest token) or more")
    batch, known = prompt.shape
    ids = torch.cat([prompt, prompt.new_full((batch, length), model.shape.mask_id)], dim=1)
    generator = torch.Generator(ids.device).manual_seed(seed)
    mine: list[dict[str, Tensor]] = [{} for _ in range(model.shape.layers)]
    for step in range(steps):
        at = Moment(step, steps, known)

        def read(layer: int, q: Tensor, k: Tensor, at: Moment = at) -> Selection:
            assert method is not None
            return method.select(q, k, at, mine[layer])

        logits = model(ids, None if method is None else read).float()
        guess = logits.argmax(-1)
        if temperature > 0:
            drawn = torch.multinomial((logits / temperature).softmax(-1).flatten(0, 1), 1, generator=generator)
            guess = drawn.view_as(ids)
        sure = logits.softmax(-1).gather(-1, guess.unsqueeze(-1)).squeeze(-1)
        sure = sure.masked_fill(ids != model.shape.mask_id, -torch.inf)
        count = length // steps + (step < length % steps)
        shown = sure.argsort(dim=-1, descending=True, stable=True)[:, :count]
        ids = ids.scatter(1, shown, guess.gather(1, shown))
    return ids
