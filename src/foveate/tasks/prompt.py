"""From the parts of a prompt to a sample of exactly the length that was asked for."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from foveate.errors import BadArgument
from foveate.tasks.base import Turn
from foveate.tasks.chat import Frame, chat_turn, count_each, count_tokens, encode, next_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from foveate.tasks.haystack import Haystack

_HAYSTACK_ROOM = 48  # tokens: the least haystack a prompt is made with
_SHORTEST_TAIL = 8  # tokens: a gap at the end of the haystack below this is widened by one more unit
_SHORT = "So."
_MARK = "\0"  # stands in no text: control characters are taken out of a corpus
_NEIGHBOURHOOD = 120  # characters: farther away, no token changes with the last sentence
_LONGEST_WORD = 16  # characters: scripts without blanks are cut there in the last sentence
_MOST_DEPTHS = 16  # evidence in more pieces is all over the prompt, and where each stands says nothing
# Extras for the last sentence of the haystack: in the tokenizers we know, one of them costs a single token.
_STRETCH = (" so", " it", " is", " and", " to", " a", "!", ".", " .", "-", "x")


@dataclass(frozen=True, eq=False)
class Insert:
    """A text placed in the haystack at `place` (0 = before everything, 1 = after everything).

    Attributes:
        evidence: whether the text holds evidence.
        marks: the characters [start, stop) of the pieces of evidence in it; empty: the whole text is one.
        turn: the question, from 0, whose evidence it is.
    """

    text: str
    place: float
    evidence: bool
    marks: tuple[tuple[int, int], ...] = ()
    turn: int = 0


@dataclass(frozen=True)
class Ask:
    """A question and the first words of its answer; as the fields of `Draft`."""

    question: str
    prefix: str
    references: tuple[str, ...]
    reserve: int


@dataclass(frozen=True)
class Draft:
    """A prompt without its haystack. Texts neither begin nor end with white space.

    Attributes:
        intro: what comes before the haystack.
        inserts: what goes into it; in the needle family those of evidence in the order of `references`.
        question: what is asked after it.
        prefix: the first words of the answer, put behind the chat template.
        references: the answers.
        reserve: tokens kept free for the answer; raised where the answer itself needs more.
        choices, bucket: as in `Sample`.
        later: further questions about the haystack.
        conversation: whether they follow the first one's answer in one chat.
    """

    intro: str
    inserts: tuple[Insert, ...]
    question: str
    prefix: str
    references: tuple[str, ...]
    reserve: int
    choices: tuple[str, ...] = ()
    bucket: str = ""
    later: tuple[Ask, ...] = ()
    conversation: bool = False

    @property
    def asks(self) -> tuple[Ask, ...]:
        """All questions."""
        return (Ask(self.question, self.prefix, self.references, self.reserve), *self.later)


@dataclass(frozen=True)
class Prompt:
    """Token ids of a whole prompt, split at the question; the rest is as in `Sample`."""

    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    depths: tuple[float, ...]
    evidence: tuple[tuple[int, int], ...]
    max_new_tokens: int
    intro: int
    turns: tuple[Turn, ...] = ()


def least_length(tokenizer: PreTrainedTokenizerBase, drafts: Sequence[Draft]) -> int:
    """A length in tokens that is enough for each of the drafts and some haystack, rounded up to a multiple of 16."""
    turn = chat_turn(tokenizer)
    fixed = len(turn.ids) + _HAYSTACK_ROOM
    texts = [_compose(turn, draft, _Fill(), "\n").text for draft in drafts]
    needed = max(
        fixed + count_tokens(tokenizer, text) + _reserve(tokenizer, draft)
        for text, draft in zip(texts, drafts, strict=True)
    )
    return -(-needed // 16) * 16


def room(tokenizer: PreTrainedTokenizerBase, draft: Draft, length: int) -> int:
    """Tokens that a draft leaves for its haystack; negative where it does not fit."""
    turn = chat_turn(tokenizer)
    text = _compose(turn, draft, _Fill(), "\n").text
    return length - _reserve(tokenizer, draft) - len(turn.ids) - count_tokens(tokenizer, text)


def fit(tokenizer: PreTrainedTokenizerBase, draft: Draft, haystack: Haystack, length: int) -> Prompt:
    """Fills the draft with haystack until prompt and reserve are `length` tokens.

    Whole units first, then the beginning of one more, ended with a full stop. The prompt is tokenised as one text, so
    `context_ids + question_ids` is what the tokenizer gives for it. Where no shortening of the last sentence gives the
    exact length, the prompt is the nearest one found below.

    Raises:
        BadArgument: the length has no room for the draft.
    """
    turn = chat_turn(tokenizer)
    reserve = _reserve(tokenizer, draft)
    composed = _compose(turn, draft, _fill(tokenizer, turn, draft, haystack, length, reserve), haystack.separator)
    encoded = encode(tokenizer, composed.text)
    shift, split = len(turn.ids), encoded.token_at(composed.question)
    evidence = [encoded.span(*span) for span in composed.evidence]
    first, last = encoded.span(*composed.haystack)
    prompt = Prompt(
        context_ids=(*turn.ids, *encoded.ids[:split]),
        question_ids=tuple(encoded.ids[split:]),
        depths=tuple(
            (start - first) / max(1, last - first - (stop - start))
            for start, stop in (evidence if len(evidence) <= _MOST_DEPTHS else ())
        ),
        evidence=tuple((start + shift, stop + shift) for start, stop in evidence),
        max_new_tokens=reserve,
        intro=shift + first,
    )
    return replace(prompt, turns=_turns(tokenizer, draft, prompt, composed)) if draft.later else prompt


@dataclass(frozen=True)
class _Fill:
    """Units of haystack, and about how many tokens each is."""

    units: tuple[str, ...] = ()
    costs: tuple[int, ...] = ()

    def border(self, place: float) -> int:
        """How many units stand before the border that is nearest to this share of the tokens."""
        borders = [0, *itertools.accumulate(self.costs)]
        wanted = place * borders[-1]
        after = min(bisect.bisect_left(borders, wanted), len(self.units))
        return after - 1 if after and wanted - borders[after - 1] < borders[after] - wanted else after


def _fill(
    tokenizer: PreTrainedTokenizerBase, turn: Frame, draft: Draft, haystack: Haystack, length: int, reserve: int
) -> _Fill:
    """Units for which prompt and reserve together are `length` tokens."""

    def missing(fill: _Fill) -> int:
        text = _compose(turn, draft, fill, haystack.separator).text
        return length - reserve - len(turn.ids) - count_tokens(tokenizer, text)

    free = missing(_Fill())
    if free < 0:
        raise BadArgument("length", length, f"prompt and answer need {length - free} tokens without any haystack")
    units, costs = _take(tokenizer, haystack, free)

    def first(number: int, *tail: str) -> _Fill:
        return _Fill((*units[:number], *tail), (*costs[:number], *(max(1, gap) for _ in tail)))

    number = bisect.bisect_right(list(itertools.accumulate(costs)), free)
    gap = 0
    # Costs were counted unit by unit; where tokens cross the borders, the whole differs a little.
    while (gap := missing(first(number))) < 0 or 0 < gap < _SHORTEST_TAIL:
        if number == 0:
            break
        number -= max(1, -gap * number // sum(costs[:number]))
    filled = first(number)
    if gap == 0:
        return filled

    # The last sentence is chosen by the tokens of its neighbourhood, then checked in the whole prompt.
    around = _compose(turn, draft, first(number, _MARK), haystack.separator).text
    before, _, after = around.partition(_MARK)
    before, after = before[-_NEIGHBOURHOOD:], after[:_NEIGHBOURHOOD]

    def nearby(tail: str) -> int:
        return count_tokens(tokenizer, f"{before}{tail}{after}")

    words = haystack.tail or re.findall(rf"\S{{1,{_LONGEST_WORD}}}", " ".join(units[number : number + 3]))
    wanted = nearby(_SHORT) + missing(first(number, _SHORT))
    best, least = filled, gap
    for _ in range(4):
        candidate = first(number, _tail(words, wanted, nearby))
        left = missing(candidate)
        if 0 <= left < least:
            best, least = candidate, left
        if left == 0:
            break
        wanted += left
    return best


@dataclass(frozen=True)
class _Composed:
    """A whole text, and the characters where its parts stand."""

    text: str
    haystack: tuple[int, int]
    evidence: list[tuple[int, int]]
    owners: list[int]
    question: int


def _compose(turn: Frame, draft: Draft, fill: _Fill, separator: str) -> _Composed:
    inserts: dict[int, list[Insert]] = {}
    for insert in draft.inserts:
        inserts.setdefault(fill.border(insert.place), []).append(insert)
    pieces: list[str | Insert] = []
    for index, unit in enumerate(fill.units):
        pieces.extend(inserts.get(index, ()))
        pieces.append(unit)
    pieces.extend(inserts.get(len(fill.units), ()))

    head = f"{turn.head}{draft.intro}\n\n"
    position = len(head)
    starts: dict[Insert, int] = {}
    texts: list[str] = []
    for piece in pieces:
        text = piece if isinstance(piece, str) else piece.text
        if not isinstance(piece, str):
            starts[piece] = position
        texts.append(text)
        position += len(text) + len(separator)
    body = separator.join(texts)
    stop = len(head) + len(body)
    return _Composed(
        text=f"{head}{body}\n\n{draft.question}{turn.tail}{draft.prefix}",
        haystack=(len(head), stop),
        evidence=[
            (starts[insert] + start, starts[insert] + stop)
            for insert in draft.inserts
            if insert.evidence
            for start, stop in insert.marks or [(0, len(insert.text))]
        ],
        owners=[insert.turn for insert in draft.inserts if insert.evidence for _ in insert.marks or [()]],
        question=stop + 2,
    )


def _turns(tokenizer: PreTrainedTokenizerBase, draft: Draft, prompt: Prompt, composed: _Composed) -> tuple[Turn, ...]:
    """The questions of a draft with several, each with its own part of the prompt's evidence."""
    frame, context = chat_turn(tokenizer), composed.text[: composed.question]
    first, following = draft.asks[0], _following(tokenizer, draft)
    turns = []
    for number, ask in enumerate(draft.asks):
        mine = [piece for piece, owner in enumerate(composed.owners) if owner == number]
        question, later = prompt.question_ids, ()
        if number and draft.conversation:
            question = following[number - 1]
        elif number:
            question = ids_behind(tokenizer, context, f"{ask.question}{frame.tail}{ask.prefix}")
            answer = ids_behind(tokenizer, first.prefix, f" {', '.join(first.references)}")
            later = (*answer, *following[number - 1])
        turns.append(
            Turn(
                question_ids=question,
                references=ask.references,
                depths=tuple(prompt.depths[piece] for piece in mine) if prompt.depths else (),
                evidence=tuple(prompt.evidence[piece] for piece in mine),
                max_new_tokens=_answer_room(tokenizer, ask),
                later_ids=later,
            )
        )
    return tuple(turns)


def _following(tokenizer: PreTrainedTokenizerBase, draft: Draft) -> list[tuple[int, ...]]:
    """Each later question as the next turn of the chat, from the end of the answer before on."""
    if not draft.later:
        return []
    frame, found = next_turn(tokenizer), []
    for before, ask in itertools.pairwise(draft.asks):
        answered = f"{before.prefix} {', '.join(before.references)}"
        found.append(ids_behind(tokenizer, answered, f"{frame.head}{ask.question}{frame.tail}{ask.prefix}"))
    return found


def ids_behind(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> tuple[int, ...]:
    """The tokens of `text` as they are behind `before`; one that reaches into both is counted to `text`."""
    before = before[-_NEIGHBOURHOOD:]
    encoded = encode(tokenizer, before + text)
    return tuple(encoded.ids[encoded.token_at(len(before)) :])


def _reserve(tokenizer: PreTrainedTokenizerBase, draft: Draft) -> int:
    """Tokens kept free behind the first question: for all answers and the later questions."""
    answers = sum(_answer_room(tokenizer, ask) for ask in draft.asks)
    return answers + sum(map(len, _following(tokenizer, draft)))


def _answer_room(tokenizer: PreTrainedTokenizerBase, ask: Ask) -> int:
    """The question's reserve, or what its answer needs where the tokenizer cuts it finer than that."""
    return max(ask.reserve, count_tokens(tokenizer, ", ".join(ask.references)) + 8)


def _take(tokenizer: PreTrainedTokenizerBase, haystack: Haystack, budget: int) -> tuple[list[str], list[int]]:
    """Units, and the tokens of each, until at least three do not fit in `budget` tokens."""
    units: list[str] = []
    costs: list[int] = []
    over = 0
    while over < 3:
        batch = list(itertools.islice(haystack.units, 64))
        for unit, cost in zip(batch, count_each(tokenizer, [haystack.separator + unit for unit in batch]), strict=True):
            units.append(unit)
            costs.append(cost)
            budget -= cost
            over += budget < 0
    return units, costs


def _tail(words: Sequence[str], wanted: int, nearby: Callable[[str], int]) -> str:
    """The first words as one sentence for which `nearby` is exactly `wanted`, or the nearest number found below."""

    def sentence(count: int, extra: str = "") -> str:
        return " ".join(words[:count]).rstrip(".,;:") + extra + "."

    most = bisect.bisect_right(range(1, len(words) + 1), wanted, key=lambda count: nearby(sentence(count)))
    if most == 0:
        most, words = 1, [_SHORT.rstrip(".")]
    best, best_cost = _SHORT, 0
    for count in range(most, max(0, most - 4), -1):
        extra, cost = "", nearby(sentence(count))
        while cost < wanted:
            longer = ((nearby(sentence(count, extra + piece)), extra + piece) for piece in _STRETCH)
            step = next((each for each in longer if cost < each[0] <= wanted), None)
            if step is None:
                break
            cost, extra = step
        if best_cost < cost <= wanted:
            best, best_cost = sentence(count, extra), cost
        if best_cost == wanted:
            break
    return best
