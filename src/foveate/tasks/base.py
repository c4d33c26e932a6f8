"""What every task is made of: the sample, the task protocol and the seed of one sample."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from foveate.errors import BadArgument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from foveate.tasks.corpora import Corpus

Kind = Literal["generate", "perplexity"]
Family = Literal["needle", "tracing", "aggregation", "qa", "recall", "reasoning", "state", "document"]
"""What a task probes. needle: a planted sentence is found again; tracing: a chain of references; aggregation: counts
over the whole text; qa: a question on passages; recall: many pairs held at once; reasoning: facts are combined;
state: a state is kept up to date; document: real text."""


@dataclass(frozen=True)
class Turn:
    """One of several questions about one context.

    Attributes:
        question_ids: what is read before its answer begins: behind the context; or, from the second turn of a
            conversation on, behind the answer before, its first tokens ending that answer's turn of the chat.
        references, depths, evidence, max_new_tokens: as in `Sample`, of this question alone.
        later_ids: the same question for a cache that has read the first one with the context: the first question's
            right answer, then this one as the next turn of the chat. Empty in the first turn and in conversations.
    """

    question_ids: tuple[int, ...]
    references: tuple[str, ...]
    depths: tuple[float, ...]
    evidence: tuple[tuple[int, int], ...]
    max_new_tokens: int
    later_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One prompt with all that is needed to run, score and analyse it.

    `context_ids + question_ids` is the whole prompt. A method that compresses with the question unseen is given
    `context_ids` alone; neither the question nor the key it asks for can be read from them.
    `len(context_ids) + len(question_ids) + len(target_ids) + max_new_tokens == length`.

    Attributes:
        task, length, index, seed: what the sample was made from; equal values give equal bytes (for one tokenizer,
            one corpus and one minor version of Python).
        context_ids: everything up to the question, head of the chat template included.
        question_ids: the question, the end of the chat turn and the first words of the answer; may be empty.
        references: the answers; in the needle family in the order of `depths` and `evidence`.
        depths: where each piece of evidence stands, 0 = first in the haystack, 1 = last, measured in tokens; empty
            where the evidence is all over the prompt.
        evidence: token spans [start, stop) in `context_ids`, and so in the whole prompt, of everything that must be
            read to answer: needles, links of a chain, each occurrence of a counted word, facts. Empty where nobody
            knows it, as in documents of the user's.
        max_new_tokens: what the length reserves for the answer.
        target_ids: perplexity: the continuation that is scored; empty for tasks that generate.
        choices: what a closed question can be answered with; empty for open ones.
        bucket: the part of the task that the sample belongs to, for reports that split scores; may be empty.
        intro: tokens of `context_ids` before the haystack: head of the chat template and instruction.
        turns: the questions, where there are several; equally many in all samples of a task. `question_ids` is then the
            first one's, `max_new_tokens` what the length reserves behind it for all answers and the later questions,
            and `references`, `depths` and `evidence` are those of all turns, one after the other.
        conversation: True: each turn follows the answer of the turn before, in one chat; False: each question is asked
            of the context alone.
    """

    task: str
    length: int
    index: int
    seed: int
    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    references: tuple[str, ...]
    depths: tuple[float, ...]
    evidence: tuple[tuple[int, int], ...]
    max_new_tokens: int
    target_ids: tuple[int, ...] = ()
    choices: tuple[str, ...] = ()
    bucket: str = ""
    intro: int = 0
    turns: tuple[Turn, ...] = ()
    conversation: bool = False

    def at(self, turn: int) -> Sample:
        """The sample as if its turn of this number, from 0, were its only question: what a turn is scored as."""
        one = self.turns[turn]
        return replace(
            self,
            question_ids=one.question_ids,
            references=one.references,
            depths=one.depths,
            evidence=one.evidence,
            max_new_tokens=one.max_new_tokens,
            turns=(),
            conversation=False,
        )


class Task(Protocol):
    """A family of samples and the rule that scores them.

    Attributes:
        name: as in `TASKS`.
        kind: "generate": the model writes an answer; "perplexity": the model scores `target_ids`.
        family: what the task probes.
        description: one line for lists and reports.
        source: where the definition is from.
        metric: name and unit of the score.
        higher_is_better: the direction of the score.
        chance: the expected score of the best guess that has read the question alone; None for losses.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def family(self) -> Family: ...
    @property
    def description(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def chance(self) -> float | None: ...

    def minimum(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The smallest `length` in tokens for which samples can be made."""
        ...

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
            BadArgument: the length is below `minimum`, or the corpus is too short for it.
        """
        ...

    def score(self, prediction: str | Sequence[float], sample: Sample) -> float:
        """The value of one sample.

        Args:
            prediction: kind "generate": the generated text, special tokens left out; kind "perplexity": the natural
                log-probability of each of `target_ids`.
        """
        ...

    def done(self, text: str, sample: Sample) -> bool:
        """True when no continuation of `text` can change the score, so that generation may stop."""
        ...


def sample_random(task: str, length: int, index: int, seed: int) -> random.Random:
    """The generator of one sample, from a stable hash: equal in every process, unlike Python's `hash`."""
    digest = hashlib.sha256(f"{task}/{length}/{index}/{seed}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def check_request(task: Task, tokenizer: PreTrainedTokenizerBase, length: int, samples: int) -> None:
    """Raises BadArgument unless `samples` samples of `length` tokens can be asked of the task."""
    if samples < 1:
        raise BadArgument("samples", samples, "give at least 1")
    minimum = task.minimum(tokenizer)
    if length < minimum:
        raise BadArgument("length", length, f"{task.name} needs at least {minimum} tokens with this tokenizer")
