"""Which sequence comes next: text, needle prompts and what the teacher writes, in given shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.convert.healing.needle_text import NeedleText
from foveate.convert.healing.recipe import Recipe
from foveate.convert.healing.sampling import Sampler
from foveate.convert.healing.text import TokenText
from foveate.errors import BadArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Place:
    """Where a sequence is from, and its number there."""

    source: str
    index: int


def place(number: int, generated: float, needles: float) -> Place:
    """Where sequence `number` of a process is from.

    Shares are spread evenly: of the first n sequences floor(n (generated + needles)) are not of the text, and as even
    a part of these is of each kind. Any sequence is found without the ones before it, so that a run can go on anywhere.
    """
    share = generated + needles
    before = _floor(number * share)
    if _floor((number + 1) * share) == before:
        return Place("text", number - before)
    asked = _floor(before * needles / share)
    if _floor((before + 1) * needles / share) > asked:
        return Place("needles", asked)
    return Place("generated", before - asked)


def _floor(x: float) -> int:
    """The whole part, of 2.9999999999999996 too where rounding made that of 3."""
    return int(x + 1e-9)


class Mixture:
    """The sequences of one process, by number.

    Args:
        rank, processes: each process takes its own part of the text, and draws needles and samples of its own.

    Raises:
        BadArgument: the text is too short for one sequence, or sequences are for a needle prompt.
    """

    def __init__(
        self,
        text: TokenText,
        recipe: Recipe,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.text, self.recipe, self.rank, self.processes = text, recipe, rank, processes
        text.sequences(recipe.length)
        seed = recipe.seed * 4096 + rank
        if recipe.needles:
            self._needles = NeedleText(tokenizer, text, recipe.length, seed)
            if self._needles.shortest > recipe.length:
                mend = f"a needle prompt takes at least {self._needles.shortest} tokens; give more, or needles=0"
                raise BadArgument("length", recipe.length, mend)
        if recipe.generated:
            self._sampler = Sampler(
                teacher, tokenizer, text, length=recipe.length, pool=recipe.pool, seed=f"{recipe.seed}/{rank}"
            )

    def batch(self, number: int, device: torch.device) -> tuple[Tensor, list[str]]:
        """Batch `number` of this process, token ids [batch, length], and where each sequence is from."""
        first = number * self.recipe.batch
        rows, sources = [], []
        for each in range(first, first + self.recipe.batch):
            at = place(each, self.recipe.generated, self.recipe.needles)
            rows.append(self._sequence(at))
            sources.append(at.source)
        if any(row.device != rows[0].device for row in rows):
            return torch.stack([row.to(device) for row in rows]), sources
        ids = torch.stack(rows)
        if device.type == "cuda" and ids.device.type == "cpu":
            ids = ids.pin_memory()  # so that the copy is not waited for
        return ids.to(device, non_blocking=True), sources

    def _sequence(self, at: Place) -> Tensor:
        length, seed = self.recipe.length, self.recipe.seed
        if at.source == "generated":
            return self._sampler.sequence(at.index)
        if at.source == "text":
            return self.text.sequence(at.index * self.processes + self.rank, length, seed)
        made = self._needles.sequence(at.index)
        if len(made) < length:  # what is left is text
            made += self.text.sequence(at.index * self.processes + self.rank, length, seed).tolist()
        return torch.tensor(made[:length])
