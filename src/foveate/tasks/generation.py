"""Tasks whose answer is generated: a recipe drafts the prompts, one rule scores the answers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from foveate.errors import BadArgument
from foveate.tasks.base import Family, Kind, Sample, check_request, sample_random
from foveate.tasks.corpora import Corpus
from foveate.tasks.corpora import corpus as open_corpus
from foveate.tasks.haystack import Haystack
from foveate.tasks.prompt import Draft, Prompt, fit, least_length
from foveate.tasks.scoring import ALL, Rule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = 16  # drafts that the least length is measured on
_DRAWS = 8  # of a sample: near the least length one in many needs more than the drafts that were measured


@dataclass(frozen=True)
class Request:
    """What a recipe may use for one sample. length 0: the shortest draft there is.

    `index` and `seed` serve what is to be spread evenly over few samples; everything else is drawn from `rng`.
    """

    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    rng: random.Random
    length: int
    index: int = 0
    seed: int = 0


class Recipe(Protocol):
    """Makes the parts of one prompt."""

    def draft(self, request: Request) -> Draft:
        """Everything but the haystack."""
        ...

    def haystack(self, request: Request, draft: Draft) -> Haystack:
        """What the draft is filled with."""
        ...


@dataclass(frozen=True)
class GenerationTask:
    """A task of kind "generate".

    Attributes:
        recipe: makes the prompts.
        rule: scores an answer in 0..1, and says when it is settled.
    """

    name: str
    family: Family
    description: str
    recipe: Recipe
    source: str
    rule: Rule = ALL
    metric: str = "share of the answers found"
    chance: float = 0.0
    kind: Kind = "generate"
    higher_is_better: bool = True

    def minimum(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The smallest `length` in tokens for which samples can be made."""
        corpus = open_corpus()
        probes = (Request(tokenizer, corpus, sample_random(self.name, 0, index, 0), 0) for index in range(_PROBES))
        return least_length(tokenizer, [self.recipe.draft(probe) for probe in probes])

    def _drawn(
        self, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, length: int, index: int, seed: int
    ) -> tuple[Draft, Prompt]:
        """The first draft of a sample that fits into its length, and the prompt made of it."""
        refusals = []
        for draw in range(_DRAWS):
            name = self.name if draw == 0 else f"{self.name} {draw}"
            request = Request(tokenizer, corpus, sample_random(name, length, index, seed), length, index, seed)
            draft = self.recipe.draft(request)
            try:
                return draft, fit(tokenizer, draft, self.recipe.haystack(request, draft), length)
            except BadArgument as refusal:
                refusals.append(refusal)
        raise refusals[0]

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        samples: int,
        seed: int = 0,
        corpus: Corpus | None = None,
    ) -> list[Sample]:
        """`samples` samples of `length` tokens, the answer's reserve counted in. corpus=None: Python's documentation.

        Raises:
            BadArgument: the length is below `minimum`.
        """
        check_request(self, tokenizer, length, samples)
        corpus = corpus or open_corpus()
        made = []
        for index in range(samples):
            draft, prompt = self._drawn(tokenizer, corpus, length, index, seed)
            made.append(
                Sample(
                    task=self.name,
                    length=length,
                    index=index,
                    seed=seed,
                    context_ids=prompt.context_ids,
                    question_ids=prompt.question_ids,
                    references=tuple(itertools.chain(*(ask.references for ask in draft.asks))),
                    depths=prompt.depths,
                    evidence=prompt.evidence,
                    max_new_tokens=prompt.max_new_tokens,
                    choices=draft.choices,
                    bucket=draft.bucket,
                    intro=prompt.intro,
                    turns=prompt.turns,
                    conversation=draft.conversation,
                )
            )
        return made

    def score(self, prediction: str | Sequence[float], sample: Sample) -> float:
        """What the rule gives for the generated text, 0..1.

        Raises:
            BadArgument: the prediction is no text.
        """
        if not isinstance(prediction, str):
            raise BadArgument("prediction", type(prediction).__name__, f"{self.name} scores the generated text")
        return self.rule.score(prediction, sample)

    def done(self, text: str, sample: Sample) -> bool:
        """True once more text cannot change the score."""
        return self.rule.settled(text, sample)
