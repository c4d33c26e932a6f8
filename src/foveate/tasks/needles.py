"""RULER's needle family (arXiv 2404.06654, section 3 and appendix B): sentences with a key and a value, hidden in text.

Structure, needle sentence, insertion depths, reserve and scoring are RULER's; the wording around the needles, the text
of the haystack and the word lists are our own, so scores compare within this library only.
"""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from foveate.errors import BadArgument
from foveate.tasks.base import Kind, Sample, check_request, sample_random
from foveate.tasks.corpora import Corpus
from foveate.tasks.corpora import corpus as open_corpus
from foveate.tasks.prompt import Draft, Haystack, Insert, fit, least_length, without_special
from foveate.tasks.scoring import all_found, found_share
from foveate.tasks.words import draw_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = 40  # RULER: needles in running text stand at 40 equally spaced depths, drawn without replacement
_TOKENS_PER_NEEDLE = 8  # no tokenizer writes a needle with fewer; how many distractors can be asked for

Hay = Literal["noise", "text", "needles"]
Token = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Needles:
    """One task of the family.

    Attributes:
        haystack: "noise": five fixed sentences, repeated; "text": running text of the corpus; "needles": sentences of
            the needle's own form with other keys.
        key, value: what keys and values look like: "adjective-noun" words, 7-digit numbers, version-4 UUIDs.
        keys, values: needles are placed for `keys` keys with `values` values each.
        queries: how many of the keys are asked for, all their values being wanted.
        reserve: tokens kept free for the answer.
    """

    name: str
    description: str
    haystack: Hay
    key: Token = "words"
    value: Token = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    reserve: int = 128
    category: str = "retrieval"
    kind: Kind = "generate"
    metric: str = "share of the values found"
    higher_is_better: bool = True

    def minimum(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The smallest `length` in tokens for which samples can be made."""
        drafts = [self._draft(sample_random(self.name, 0, index, 0), open_corpus()) for index in range(16)]
        return least_length(tokenizer, drafts)

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
        return [self._sample(tokenizer, length, index, seed, corpus or open_corpus()) for index in range(samples)]

    def score(self, prediction: str | Sequence[float], sample: Sample) -> float:
        """The share of the wanted values that the text holds, 0..1."""
        return found_share(prediction, sample.references)

    def done(self, text: str, sample: Sample) -> bool:
        """True once every wanted value was written; the score cannot change any more."""
        return all_found(text, sample.references)

    def _sample(
        self, tokenizer: PreTrainedTokenizerBase, length: int, index: int, seed: int, corpus: Corpus
    ) -> Sample:
        rng = sample_random(self.name, length, index, seed)
        draft = self._draft(rng, corpus)
        fitted = fit(tokenizer, draft, self._filler(tokenizer, rng, draft, length, corpus), length)
        return Sample(
            self.name,
            length,
            index,
            seed,
            fitted.context_ids,
            fitted.question_ids,
            draft.references,
            fitted.depths,
            fitted.evidence,
            fitted.max_new_tokens,
        )

    def _draft(self, rng: random.Random, corpus: Corpus) -> Draft:
        absent_from = corpus.text if self.haystack == "text" else ""
        keys = _draw(rng, self.key, self.keys, absent_from)
        values = _draw(rng, self.value, self.keys * self.values, absent_from)
        needles = [(keys[number // self.values], value) for number, value in enumerate(values)]
        asked = keys[: self.queries]
        if self.haystack == "text":
            places = [step / (_DEPTHS - 1) for step in rng.sample(range(_DEPTHS), len(needles))]
        else:
            places = [rng.random() for _ in needles]
        references = tuple(value for key, value in needles if key in asked)
        question, prefix = _ask(self.value, asked, len(references) > 1)
        return Draft(
            intro=_INTRO.format(kind=self.value),
            inserts=tuple(
                Insert(needle_sentence(self.value, key, value), place, key in asked)
                for (key, value), place in zip(needles, places, strict=True)
            ),
            question=question,
            prefix=prefix,
            references=references,
            reserve=self.reserve,
        )

    def _filler(
        self, tokenizer: PreTrainedTokenizerBase, rng: random.Random, draft: Draft, length: int, corpus: Corpus
    ) -> Haystack:
        if self.haystack == "noise":
            return Haystack(itertools.repeat(NOISE), "\n")
        if self.haystack == "text":
            return Haystack(running_text(tokenizer, corpus, rng), " ")
        return Haystack(self._distractors(rng, draft, length), "\n", tuple(f"{NOISE} {NOISE} {NOISE} {NOISE}".split()))

    def _distractors(self, rng: random.Random, draft: Draft, length: int) -> Iterator[str]:
        """Needle sentences with keys and values of their own."""
        number = length // _TOKENS_PER_NEEDLE + 128
        taken = " ".join(insert.text for insert in draft.inserts)
        keys = _draw(rng, self.key, number, taken)
        values = _draw(rng, self.value, number, taken)
        return (needle_sentence(self.value, key, value) for key, value in zip(keys, values, strict=True))


def needle_sentence(kind: Token, key: str, value: str) -> str:
    """RULER's needle, word for word: models are evaluated on this form."""
    return f"One of the special magic {kind} for {key} is: {value}."


def running_text(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, rng: random.Random) -> Iterator[str]:
    """The sentences of the corpus from a random one on, again from the first after the last, without end."""
    sentences = list(without_special(tokenizer, iter(corpus.sentences)))
    if not sentences:
        raise BadArgument("corpus", corpus.name, "every sentence spells a special token of the tokenizer; give another")
    start = rng.randrange(len(sentences))
    return itertools.islice(itertools.cycle(sentences), start, None)


_INTRO = (
    "Several special magic {kind} are hidden in the following text. Memorize them: "
    "afterwards you will be quizzed about these {kind}."
)


def _ask(kind: Token, keys: Sequence[str], several: bool) -> tuple[str, str]:
    """The question and the first words of its answer."""
    names = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    if several:
        about = f"special magic {kind} for {names}"
        return f"Which {about} does the text above mention? Give all of them.", f"The {about} in the text above are:"
    about = f"special magic {kind[:-1]} for {names}"
    return f"Which {about} does the text above mention?", f"The {about} in the text above is:"


def _draw(rng: random.Random, kind: Token, count: int, absent_from: str) -> list[str]:
    """Different keys or values of a kind, none of which occurs in `absent_from` or is part of another."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        if kind == "words":
            fresh = draw_keys(rng, count)
        elif kind == "numbers":
            fresh = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]
        else:
            fresh = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]
        drawn.update(dict.fromkeys(text for text in fresh if text not in absent_from))
    return list(drawn)[:count]


NEEDLE_TASKS = (
    Needles("niah_single_1", "one number, in repeated noise sentences", "noise"),
    Needles("niah_single_2", "one number, in running text", "text"),
    Needles("niah_single_3", "one UUID, in running text", "text", value="uuids"),
    Needles("niah_multikey_1", "one number of four keys, in running text", "text", keys=4),
    Needles("niah_multikey_2", "one number among needles with other keys", "needles"),
    Needles("niah_multikey_3", "one UUID by its UUID key, among needles with other keys", "needles", "uuids", "uuids"),
    Needles("niah_multivalue", "four numbers of one key, in running text", "text", values=4),
    Needles("niah_multiquery", "the numbers of four keys, in running text", "text", keys=4, queries=4),
)
