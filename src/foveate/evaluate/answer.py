"""What a model says behind a prompt that a method holds: greedy answers, or the log-probabilities of a continuation.

A sample with several questions is asked them in one of two ways. Each of a copy of the cache that holds the context, so
that no answer sees another; or, as a conversation, one after the other on one cache, behind the model's own answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from foveate.evaluate.batch import Batch
from foveate.evaluate.recall import Evidence
from foveate.tasks import Sample, Task


@dataclass
class Answer:
    """One sample's outcome under one method.

    Args:
        prediction: the generated text, or the log-probabilities of the targets.
        score: the task's value.
        tokens: tokens decoded.
        kv_bytes: held per row once the prompt is over and the first decode step has settled.
        kv_bytes_prompt, kv_bytes_end: held per row right after the prompt, and when the row ended.
        evidence_held: share of the tokens with the evidence that layers and heads still hold when the answer begins.
        evidence_read: share of them that the query heads read in the first decode step; None where nobody can say.
        turns: of a sample with several questions, the outcome of each; `prediction` is then one text per turn, score
            and evidence are means over turns, tokens the sum, the bytes those of the first turn and at the end the most
            of any.
    """

    prediction: str | list[float] | list[str] = ""
    score: float = 0.0
    tokens: int = 0
    kv_bytes: int = 0
    kv_bytes_prompt: int = 0
    kv_bytes_end: int = 0
    evidence_held: float | None = None
    evidence_read: float | None = None
    turns: tuple[Answer, ...] = ()


def read_prompts(batch: Batch, samples: Sequence[Sample], question_seen: bool, *, part: str = "all") -> Tensor | None:
    """Read the prompts of the samples: contexts and questions as one piece, or, if the methods must not see the
    question while they compress, one after the other.

    Args:
        part: "context": what comes before the methods act; "rest": what comes after; "all": both.

    Returns:
        Logits [B, V] behind the prompt; None for a "rest" that is empty.
    """
    logits = None
    if part in ("all", "context"):
        rows = [s.context_ids + (s.question_ids if question_seen else ()) for s in samples]
        logits = batch.prompt(rows)
    if part in ("all", "rest") and not question_seen and samples[0].question_ids:
        logits = batch.prompt([s.question_ids for s in samples])
    return logits


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(given) if isinstance(given, list | tuple) else [given]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)


def answer(
    batch: Batch,
    logits: Tensor,
    samples: Sequence[Sample],
    task: Task,
    tokenizer: Any,
    read: Sequence[Sample] | None = None,
    unread: bool = False,
) -> list[Answer]:
    """Answer and score every question of every sample.

    Args:
        batch: holds the contexts; its rows are of no further use afterwards.
        logits: [B, V] behind what was read.
        read: what was read of the samples, if that is not all of them.
        unread: whether the (first) question of each sample is still to be read.
    """
    read = samples if read is None else read
    if samples[0].turns and not samples[0].conversation:
        return _ask_copies(batch, logits, samples, task, tokenizer, read, unread)
    if unread:
        rest = read_prompts(batch, read, False, part="rest")
        logits = logits if rest is None else rest
    if samples[0].turns:
        return _converse(batch, logits, samples, task, tokenizer, read)
    return _decode(batch, logits, samples, task, tokenizer, read)[0]


def _ask_copies(
    batch: Batch,
    logits: Tensor,
    samples: Sequence[Sample],
    task: Task,
    tokenizer: Any,
    read: Sequence[Sample],
    unread: bool,
) -> list[Answer]:
    """Ask each question of a copy of the cache.

    If the first one has been read, it stays in all copies, and the others are asked as the next turn of the chat behind
    it and its right answer.
    """
    turns: list[list[Answer]] = []
    for turn in range(len(samples[0].turns)):
        copy, behind = batch.fork(), logits
        if unread:
            behind = copy.prompt([sample.turns[turn].question_ids for sample in samples])
        elif turn:
            behind = copy.prompt([sample.turns[turn].later_ids for sample in samples])
        asked = [sample.at(turn) for sample in samples]
        turns.append(_decode(copy, behind, asked, task, tokenizer, [each.at(turn) for each in read])[0])
        batch.add(copy)
    return [_together(one) for one in zip(*turns, strict=True)]


def _converse(
    batch: Batch, logits: Tensor, samples: Sequence[Sample], task: Task, tokenizer: Any, read: Sequence[Sample]
) -> list[Answer]:
    """Ask the questions one after the other, each behind the answer to the one before.

    Every row goes on alone: answers end at different tokens, and what a row waits for the others with would be read by
    methods that act at each step.
    """
    answers = []
    for row, (sample, held) in enumerate(zip(samples, read, strict=True)):
        alone = batch.fork()
        alone.keep([row])
        behind = logits[row : row + 1]
        turns, said = [], ()
        for number, turn in enumerate(sample.turns):
            if number:
                behind = alone.prompt([[*said, *turn.question_ids]])
            (one,), (ids,) = _decode(alone, behind, [sample.at(number)], task, tokenizer, [held.at(number)])
            # The last token was chosen and not read; one that ends answers stands in the next question, if it is to.
            said = [token for token in ids[-1:] if token not in stop_tokens(batch.model, tokenizer)]
            turns.append(one)
        batch.add(alone)
        answers.append(_together(turns))
    return answers


def _together(turns: Sequence[Answer]) -> Answer:
    """The outcome of a sample from those of its turns."""
    return Answer(
        prediction=[str(one.prediction) for one in turns],
        score=fmean(one.score for one in turns),
        tokens=sum(one.tokens for one in turns),
        kv_bytes=turns[0].kv_bytes,
        kv_bytes_prompt=turns[0].kv_bytes_prompt,
        kv_bytes_end=max(one.kv_bytes_end for one in turns),
        evidence_held=_mean([one.evidence_held for one in turns]),
        evidence_read=_mean([one.evidence_read for one in turns]),
        turns=tuple(turns),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(fmean(known), 6) if known else None


def _decode(
    batch: Batch, logits: Tensor, samples: Sequence[Sample], task: Task, tokenizer: Any, read: Sequence[Sample]
) -> tuple[list[Answer], list[list[int]]]:
    """Decode every row to its end and score it; the tokens chosen come with the answers. Rows that are done leave the
    batch, all but the last ones."""
    answers = [Answer() for _ in samples]
    rows = list(range(len(samples)))
    settled = False
    held = batch.cache.nbytes // len(rows)
    for one in answers:
        one.kv_bytes = one.kv_bytes_prompt = held
    evidence = Evidence(samples, read)
    full = [layer.index for layer in batch.cache.owner.shape.layers if layer.kind == "full"]
    for one, share in zip(answers, evidence.held(batch.cache, full), strict=True):
        one.evidence_held = share
    writer = _Writer(samples, task, tokenizer, stop_tokens(batch.model, tokenizer))
    while True:
        tokens = writer.next(logits, rows)
        going = [i for i, row in enumerate(rows) if not writer.ended(row)]
        for i, row in enumerate(rows):
            if i not in going:
                answers[row].kv_bytes_end = held
        if not going:
            break
        if len(going) < len(rows):
            batch.keep(going)
            rows, tokens = [rows[i] for i in going], [tokens[i] for i in going]
        reads = evidence.watch(full) if evidence.known and not settled and len(rows) == len(samples) else None
        batch.cache.trace = reads
        logits = batch.step(tokens)
        batch.cache.trace = None
        if reads is not None:
            for one, share in zip(answers, reads.shares(), strict=True):
                one.evidence_read = share
        held = batch.cache.nbytes // len(rows)
        for row in rows:
            answers[row].tokens += 1
        if not settled:
            settled = True
            for row in rows:
                answers[row].kv_bytes = held
    for row, one in enumerate(answers):
        one.prediction = writer.prediction(row)
        one.score = task.score(one.prediction, samples[row])
    return answers, writer.ids


class _Writer:
    """Chooses each row's next token, greedily or from its targets, and says when the row has ended."""

    def __init__(self, samples: Sequence[Sample], task: Task, tokenizer: Any, stop: frozenset[int]) -> None:
        self.samples, self.task, self.tokenizer, self.stop = samples, task, tokenizer, stop
        self.given = task.kind == "perplexity"
        self.ids: list[list[int]] = [[] for _ in samples]
        self.logprobs: list[list[float]] = [[] for _ in samples]

    def next(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        if not self.given:
            tokens = logits.argmax(-1).tolist()
        else:
            tokens = [self.samples[row].target_ids[len(self.ids[row])] for row in rows]
            chosen = torch.tensor(tokens, device=logits.device).unsqueeze(1)
            found = logits.log_softmax(-1).gather(1, chosen).squeeze(1).tolist()
            for row, value in zip(rows, found, strict=True):
                self.logprobs[row].append(value)
        for row, token in zip(rows, tokens, strict=True):
            self.ids[row].append(token)
        return tokens

    def ended(self, row: int) -> bool:
        ids, sample = self.ids[row], self.samples[row]
        if self.given:
            return len(ids) == len(sample.target_ids)
        if ids[-1] in self.stop or len(ids) >= sample.max_new_tokens:
            return True
        return self.task.done(self.text(row), sample)

    def text(self, row: int) -> str:
        return self.tokenizer.decode(self.ids[row], skip_special_tokens=True)

    def prediction(self, row: int) -> str | list[float]:
        return self.logprobs[row] if self.given else self.text(row)


def outcome(sample: Sample, one: Answer) -> dict[str, Any]:
    """One sample of a record, as JSON values."""
    values = {f.name: getattr(one, f.name) for f in fields(one) if f.name != "turns"}
    if one.turns:
        values["turns"] = [float(turn.score) for turn in one.turns]
        values["turns_held"] = [turn.evidence_held for turn in one.turns]
        values["turns_read"] = [turn.evidence_read for turn in one.turns]
        values["turns_kv_bytes"] = [turn.kv_bytes for turn in one.turns]
    return {
        "index": sample.index,
        "depths": list(sample.depths),
        "references": list(sample.references),
        **values,
    }
