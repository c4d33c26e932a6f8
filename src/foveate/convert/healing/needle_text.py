"""Needle prompts with their answers as text to train on, so that a healed model finds again what is far back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from foveate.convert.healing.text import TokenText
from foveate.tasks.corpora import Corpus
from foveate.tasks.needles import NEEDLE_TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_APART = 1 << 61
"""Added to every seed: evaluations count theirs from 0."""

_CORPUS = 200_000  # tokens of training text that haystacks are cut from


class NeedleText:
    """Prompts of RULER's needle tasks with their answers.

    Haystacks are cut from the text that is trained on; keys and values come from seeds that no evaluation uses.

    Args:
        text: what is trained on.
        length: tokens of a sequence.
        seed: equal seeds give equal sequences.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: TokenText, length: int, seed: int) -> None:
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self._least = {task.name: task.minimum(tokenizer) for task in NEEDLE_TASKS}
        self._corpus = Corpus("training text", str(tokenizer.decode(text.train[:_CORPUS], skip_special_tokens=True)))

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sequence that holds a prompt."""
        return min(self._least.values())

    def sequence(self, index: int) -> list[int]:
        """Token ids of sequence `index`: prompts with answers until no more fit. May end before the length does.

        The first prompt takes all of the sequence, half or a quarter of it, and so on with what is left.
        """
        rng = random.Random(f"needles/{self.seed}/{index}")
        made: list[int] = []
        for number in range(self.length):
            room = self.length - len(made)
            fitting = [task for task in NEEDLE_TASKS if self._least[task.name] <= room]
            if not fitting:
                break
            task = rng.choice(fitting)
            wanted = max(self._least[task.name], room // rng.choice((1, 2, 4)))
            seed = _APART + (self.seed << 24) + (index << 8) + number
            (sample,) = task.generate(self.tokenizer, wanted, 1, seed, self._corpus)
            made += [*sample.context_ids, *sample.question_ids, *self._answer(", ".join(sample.references))]
        return made[: self.length]

    def _answer(self, words: str) -> Iterator[int]:
        yield from self.tokenizer(f" {words}.", add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[misc]
        if self.tokenizer.eos_token_id is not None:
            yield int(self.tokenizer.eos_token_id)  # type: ignore[call-overload]
