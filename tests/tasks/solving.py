"""What every generator is tested with: a solver that reads the prompt by the rules, and one that reads nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from foveate.tasks import Sample, Task

SAMPLES = 60

Oracle = Callable[[str, str], str]
"""(context, question) -> answer."""
Blind = Callable[[random.Random, str, Sample], str]
"""(random numbers, question, sample of which only `choices` is looked at) -> answer."""


def text(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def parts(tokenizer: Any, sample: Sample) -> tuple[str, str]:
    """Context and question."""
    return text(tokenizer, sample.context_ids), text(tokenizer, sample.question_ids)


def pieces(tokenizer: Any, sample: Sample) -> list[str]:
    """The evidence, read off the whole prompt."""
    prompt = sample.context_ids + sample.question_ids
    return [text(tokenizer, prompt[start:stop]).strip() for start, stop in sample.evidence]


def check_oracle(task: Task, tokenizer: Any, samples: list[Sample], oracle: Oracle) -> None:
    """The oracle gets everything, of prompts of the exact length."""
    for sample in samples:
        used = len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens
        assert used == sample.length
        answer = oracle(*parts(tokenizer, sample))
        assert task.score(answer, sample) == 1.0, (answer, sample.references)


def check_blind(task: Task, tokenizer: Any, samples: list[Sample], blind: Blind, seed: int) -> None:
    """Guesses score at the chance level, within four standard errors and the hundredth that open answers may have."""
    rng = random.Random(seed)
    scores = [task.score(blind(rng, parts(tokenizer, sample)[1], sample), sample) for sample in samples]
    chance = task.chance
    assert chance is not None
    assert abs(sum(scores) / len(scores) - chance) <= 0.01 + 4 * math.sqrt(chance * (1 - chance) / len(scores))


def check_nothing_without_evidence(tokenizer: Any, samples: list[Sample], oracle: Oracle, task: Task) -> None:
    """Nothing but the evidence gives the answer away: without it the oracle does no better than by chance."""
    scores = []
    for sample in samples:
        kept = list(sample.context_ids)
        for start, stop in sorted(sample.evidence, reverse=True):
            del kept[start:stop]
        scores.append(task.score(oracle(text(tokenizer, tuple(kept)), parts(tokenizer, sample)[1]), sample))
    chance = task.chance
    assert chance is not None
    assert sum(scores) / len(scores) <= chance + 4 * math.sqrt(chance * (1 - chance) / len(scores))
