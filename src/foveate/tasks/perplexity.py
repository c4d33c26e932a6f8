"""Perplexity with a bounded cache: how well the next tokens of a passage are predicted from what was kept of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foveate.errors import BadArgument
from foveate.tasks.base import Family, Kind, Sample, check_request, sample_random
from foveate.tasks.chat import encode, leading_ids, without_special
from foveate.tasks.corpora import Corpus
from foveate.tasks.corpora import corpus as open_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARS_PER_TOKEN = 8  # more than text takes; a piece that turns out too short is doubled
_MARGIN = 16  # tokens at the cut end of a piece that would be others in the whole text


@dataclass(frozen=True)
class Perplexity:
    """A passage of the corpus, cut in a context and its continuation; no question, no chat template.

    Attributes:
        targets: tokens of the continuation that are scored.
        buckets: with more than 1, sample after sample scores the same passage at the next of so many equally spaced
            positions, the last one first: the context ends there, so it is shorter than the length in all but one.
    """

    name: str = "perplexity"
    family: Family = "document"
    description: str = "the continuation of a passage of running text"
    source: str = "own: perplexity behind a bounded cache"
    targets: int = 64
    buckets: int = 1
    metric: str = "nats per token"
    kind: Kind = "perplexity"
    higher_is_better: bool = False
    chance: float | None = None

    def minimum(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The smallest `length` in tokens for which samples can be made: each context is as long as what is scored."""
        return 2 * self.targets * self.buckets

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        samples: int,
        seed: int = 0,
        corpus: Corpus | None = None,
    ) -> list[Sample]:
        """`samples` passages of `length` tokens, each from the start of a sentence, the tokenizer's BOS counted in.

        corpus=None: Python's documentation.

        Raises:
            BadArgument: the length is below `minimum`, or the corpus is shorter than one passage.
        """
        check_request(self, tokenizer, length, samples)
        corpus = corpus or open_corpus()
        head = leading_ids(tokenizer)
        wanted = length - len(head)
        choices = corpus.sentence_at(_latest_start(tokenizer, corpus, length, wanted)) + 1
        made = []
        for index in range(samples):
            passage, turn = divmod(index, self.buckets)
            start, _ = corpus.spans[sample_random(self.name, length, passage, seed).randrange(choices)]
            ids = (*head, *_first_tokens(tokenizer, corpus.text, start, wanted))
            ids = ids[: length * (self.buckets - turn) // self.buckets]
            made.append(
                Sample(
                    task=self.name,
                    length=length,
                    index=index,
                    seed=seed,
                    context_ids=ids[: -self.targets],
                    question_ids=(),
                    references=(),
                    depths=(),
                    evidence=(),
                    max_new_tokens=0,
                    target_ids=ids[-self.targets :],
                    bucket=f"position {self.buckets - turn}/{self.buckets}" if self.buckets > 1 else "",
                    intro=len(head),
                )
            )
        return made

    def position(self, index: int) -> float:
        """Where in its passage the targets of sample `index` end, as a share of the length, above 0 and up to 1."""
        return (self.buckets - index % self.buckets) / self.buckets

    def score(self, prediction: str | Sequence[float], sample: Sample) -> float:
        """Mean negative log-likelihood of the targets, in nats per token: lower is better, exp of it is the perplexity.

        Args:
            prediction: natural log-probability of each of `sample.target_ids`.

        Raises:
            BadArgument: the prediction is not one number per target.
        """
        if isinstance(prediction, str) or len(prediction) != len(sample.target_ids):
            given = "a text" if isinstance(prediction, str) else f"{len(prediction)} numbers"
            raise BadArgument("prediction", given, f"give {len(sample.target_ids)} log-probabilities, one per target")
        return -math.fsum(prediction) / len(prediction)

    def done(self, text: str, sample: Sample) -> bool:
        """True: nothing is generated."""
        return True


def _first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, start: int, count: int) -> list[int]:
    """`count` tokens from the character `start` on; the text is known to hold them."""
    chars = count * _CHARS_PER_TOKEN
    while True:
        ids = encode(tokenizer, without_special(tokenizer, text[start : start + chars])).ids
        if len(ids) >= count + _MARGIN or start + chars >= len(text):
            return ids[:count]
        chars *= 2


def _latest_start(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, length: int, count: int) -> int:
    """The last character from which on the corpus surely holds `count` tokens."""
    text = corpus.text
    chars = count * _CHARS_PER_TOKEN
    while True:
        first = max(0, len(text) - chars)
        piece = without_special(tokenizer, text[first:])
        encoded = encode(tokenizer, piece)
        spare = len(encoded.ids) - count - _MARGIN
        if spare >= 0:
            return first + encoded.starts[spare]  # special tokens taken out before it only move it to the left
        if first == 0:
            held = f"it holds {len(encoded.ids)} tokens, length={length} needs {count + _MARGIN}"
            raise BadArgument("corpus", corpus.name, f"{held}; give more text, or a smaller length")
        chars *= 2


PERPLEXITY_BY_POSITION = Perplexity(
    name="perplexity_positions",
    description="the continuation of one long passage at eight positions, an eighth of the length apart",
    source="own: perplexity by position",
    buckets=8,
)
"""Where in a long document prediction gets better or worse: scores are to be split by `Sample.bucket`."""
