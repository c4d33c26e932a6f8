"""The reader that gives a model the passages of a context which answer the question."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from foveate.errors import BadArgument, Infeasible
from foveate.methods.budget import Budget
from foveate.models.shape import ModelShape
from foveate.retrieval import embed
from foveate.retrieval.bm25 import BM25
from foveate.retrieval.index import Index, in_turn, parts, search
from foveate.retrieval.passages import cut
from foveate.tasks import Sample

Make = Callable[[Sequence[str]], Index]


def _embedded(device: Any) -> Make:
    model = embed.embedder(str(device))
    return lambda texts: embed.Embedded.of(texts, model)


RETRIEVERS: dict[str, Callable[[Any], Make]] = {"bm25": lambda device: BM25.of, embed.NAME: _embedded}
"""What makes an index of texts, by name, given the model's device."""


@dataclass(frozen=True)
class Retrieval:
    """Reads the instruction, the best passages in the order of the text, and the question; nothing else.

    The context is cut into passages, indexed and searched with the question, which retrieval so always sees. A prompt
    without a question is searched with its own last passage. What is read is a prompt of its own, its positions counted
    anew, and at most the budget's share of the whole one. Deep-research systems, query-rewriting pipelines and trees of
    scenes retrieve from far larger stores and with language models in the loop; this is the part they share.

    Args:
        k: passages read at most; None: as many as the budget has room for.
        retriever: "bm25" (words) or "minilm" (a small embedding model, 84 MB, fetched once).
        passage: tokens of a passage at most.
        decompose: search with each part of the question, and take their best in turn.
        fanout: 0: a flat index. Else passages lie in a tree of sections of this many, see `beam`.
        beam: sections of each level that are opened.
        budget: the share of the dense cache that the prompt may fill.
    """

    id: ClassVar[str] = "retrieval"
    name: ClassVar[str] = "Retrieval"
    paper: ClassVar[str] = "Robertson and Zaragoza 2009 (BM25); Reimers and Gurevych, arXiv:1908.10084 (embeddings)"
    slots: ClassVar[frozenset[str]] = frozenset({"prompt"})
    budgeted: ClassVar[bool] = True
    whole: ClassVar[bool] = False
    facts: ClassVar[dict[str, Any]] = {"sees": "question"}

    k: int | None = None
    retriever: str = "bm25"
    passage: int = 64
    decompose: bool = False
    fanout: int = 0
    beam: int = 2
    budget: Budget | float | int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget.of(self.budget))
        if self.retriever not in RETRIEVERS:
            raise BadArgument("retriever", self.retriever, f"give one of {', '.join(RETRIEVERS)}")
        if self.k is not None and self.k < 1:
            raise BadArgument("k", self.k, "give at least 1 passage, or None")
        if self.passage < 2:
            raise BadArgument("passage", self.passage, "give at least 2 tokens")
        if self.fanout == 1 or self.fanout < 0:
            raise BadArgument("fanout", self.fanout, "give at least 2 passages a section, or 0 for a flat index")
        if self.beam < 1:
            raise BadArgument("beam", self.beam, "open at least 1 section")

    def settings(self) -> dict[str, Any]:
        """Fields that differ from the defaults, as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if isinstance(self.budget, Budget):
            exact = Budget.of(str(self.budget)) == self.budget
            values["budget"] = str(self.budget) if exact else self.budget.plain
        return values

    def with_budget(self, budget: Budget | float | int | None) -> Retrieval:
        """The same under another budget."""
        return replace(self, budget=budget)

    def open(self, tokenizer: Any, shape: ModelShape, device: Any) -> Callable[[Sample], Sample]:
        """What cuts a sample of this model down to what is read of it. Fetches the embedding model if it needs one.

        Raises:
            BadArgument: neither `k` nor a budget limits what is read.
            Refused: the embedding model cannot be had.
        """
        if self.k is None and self.budget is None:
            raise BadArgument("k", None, "nothing limits what retrieval reads; give k or a budget")
        make = RETRIEVERS[self.retriever](device)
        return lambda sample: self.read(sample, tokenizer, shape, make)

    def read(self, sample: Sample, tokenizer: Any, shape: ModelShape, make: Make) -> Sample:
        """The sample with the chosen passages as its context.

        Raises:
            Infeasible: the budget has no room for instruction, question and one passage.
        """
        first = sample.intro
        spans = [(first + a, first + b) for a, b in cut(tokenizer, sample.context_ids[first:], self.passage)]
        fixed = [] if sample.question_ids else [spans.pop()]
        asked = sample.question_ids or sample.context_ids[fixed[0][0] :]
        texts = [tokenizer.decode(sample.context_ids[a:b], skip_special_tokens=True) for a, b in spans]
        query = tokenizer.decode(asked, skip_special_tokens=True)

        taken = first + len(sample.question_ids) + sum(b - a for a, b in fixed)
        order = self.order(make(texts), len(texts), query) if texts else []
        chosen = self._fit(spans, order, self._room(shape, len(sample.context_ids) + len(sample.question_ids)) - taken)
        if spans and not chosen:
            total = len(sample.context_ids) + len(sample.question_ids)
            floor = (taken + min(b - a for a, b in spans)) / total
            raise Infeasible(
                f"budget={self.budget}: {self.id} cannot read less than {floor:.3f} of {total} tokens (instruction, "
                "question and one passage); raise the budget",
                floor,
            )
        return cut_down(sample, sorted([(0, first), *chosen, *fixed]))

    def order(self, index: Index, passages: int, query: str) -> list[int]:
        """Passages from the best on."""
        queries = parts(query) if self.decompose else [query]
        return in_turn([search(index, passages, q, fanout=self.fanout, beam=self.beam) for q in queries])

    def _fit(self, spans: Sequence[tuple[int, int]], order: Sequence[int], room: int) -> list[tuple[int, int]]:
        """The first passages of the order that have room, one that is too long for what is left passed over."""
        chosen: list[tuple[int, int]] = []
        for start, stop in (spans[number] for number in order):
            if self.k is not None and len(chosen) == self.k:
                break
            if stop - start <= room:
                chosen.append((start, stop))
                room -= stop - start
        return chosen

    def _room(self, shape: ModelShape, length: int) -> int:
        """Tokens of the prompt that is read: the longest whose dense cache is the budget's share of the whole one's."""
        if self.budget is None:
            return length
        assert isinstance(self.budget, Budget)
        if self.budget.kind == "tokens":
            return min(length, int(self.budget.value))
        granted = self.budget.share(shape, length) * shape.dense_kv_bytes(length) * (1 + 1e-9)
        return bisect_right(range(1, length + 1), granted, key=shape.dense_kv_bytes)


def cut_down(sample: Sample, spans: Sequence[tuple[int, int]]) -> Sample:
    """The sample with these spans of its context alone, in order; evidence outside them is gone."""
    ids: list[int] = []
    starts: list[int] = []
    for start, stop in spans:
        starts.append(len(ids))
        ids += sample.context_ids[start:stop]

    def left(evidence: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        cut = [
            (max(a, start) - start + new, min(b, stop) - start + new)
            for (start, stop), new in zip(spans, starts, strict=True)
            for a, b in evidence
        ]
        return tuple((a, b) for a, b in cut if a < b)

    return replace(
        sample,
        context_ids=tuple(ids),
        evidence=left(sample.evidence),
        turns=tuple(replace(turn, evidence=left(turn.evidence)) for turn in sample.turns),
    )
