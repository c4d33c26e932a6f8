"""From the parts of a prompt to a sample of exactly the length that was asked for."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

from foveate.errors import BadArgument, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HAYSTACK_ROOM = 48  # tokens: the least haystack a prompt is made with
_SHORTEST_TAIL = 8  # tokens: a gap at the end of the haystack below this is widened by one more unit
_CONTENT = "<<the content of the turn>>"
# Extras for the last sentence of the haystack: one of them costs a single token in any tokenizer we know of.
_STRETCH = (" so", " it", " is", " and", " to", " a", "!", ".", " .", "-", "x")


@dataclass(frozen=True)
class Insert:
    """A sentence placed in the haystack at `place` (0 = before everything, 1 = after everything)."""

    text: str
    place: float
    evidence: bool


@dataclass(frozen=True)
class Draft:
    """A prompt without its haystack. Texts neither begin nor end with white space.

    Attributes:
        intro: what comes before the haystack.
        inserts: sentences that go into it; those of evidence in the order of `references`.
        question: what is asked after it.
        prefix: the first words of the answer, put behind the chat template.
        references: the answers.
        reserve: tokens kept free for the answer; raised where the answer itself needs more.
    """

    intro: str
    inserts: tuple[Insert, ...]
    question: str
    prefix: str
    references: tuple[str, ...]
    reserve: int


@dataclass(frozen=True)
class Haystack:
    """An endless stream of sentences or lines.

    Attributes:
        units: the sentences or lines, in order.
        separator: what stands between two of them.
        tail: words that the last, shortened sentence is made of; empty: those of the unit that did not fit.
    """

    units: Iterator[str]
    separator: str
    tail: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """Token ids of a prompt, split at the question. `evidence` are spans in `context_ids`."""

    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    depths: tuple[float, ...]
    evidence: tuple[tuple[int, int], ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Turn:
    """What stands around the text of a user's turn: `ids` that no text gives (a plain tokenizer's BOS), head, tail."""

    ids: tuple[int, ...]
    head: str
    tail: str


@dataclass(frozen=True)
class Encoded:
    """Token ids with the characters [start, stop) that each covers."""

    ids: list[int]
    starts: list[int]
    stops: list[int]

    def token_at(self, char: int) -> int:
        """Index of the first token that reaches beyond `char`."""
        return bisect.bisect_right(self.stops, char)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The tokens [first, last + 1) that the characters [start, stop) are in."""
        return self.token_at(start), bisect.bisect_left(self.starts, stop)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Tokenises `text`, special tokens in it recognised and none added.

    Raises:
        Refused: the tokenizer gives no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise Refused(
            f"{type(tokenizer).__name__}: prompts are cut to length by character offsets, which this tokenizer "
            "does not give; load it with the `tokenizers` backend"
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[tuple[int, int]] = encoding["offset_mapping"]  # pyright: ignore[reportAssignmentType]
    return Encoded(list(encoding["input_ids"]), [start for start, _ in offsets], [stop for _, stop in offsets])


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Number of tokens of `text`, none added."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text (BOS), in order."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    return tuple(itertools.takewhile(lambda token: token != plain[0], whole))


def chat_turn(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """What the tokenizer's chat template puts around one user turn, or a plain frame when it has none.

    Templates that can think are told not to, and those that show the date are given a fixed one: equal seeds give
    equal bytes.

    Raises:
        BadArgument: the template cannot show a single user turn.
    """
    if not tokenizer.chat_template:
        return Turn(leading_ids(tokenizer), "", " ")
    mend = "its chat template must show the text of a single user turn once; mend it, or set chat_template to None"
    name = tokenizer.name_or_path or type(tokenizer).__name__
    try:
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": _CONTENT}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            date_string="01 Jan 2025",
        )
    except (jinja2.TemplateError, ValueError) as error:
        raise BadArgument("tokenizer", name, f"{mend} ({error})") from None
    head, found, tail = str(shown).partition(_CONTENT)
    if not found or _CONTENT in tail:
        raise BadArgument("tokenizer", name, mend)
    return Turn((), head, tail)


def without_special(tokenizer: PreTrainedTokenizerBase, texts: Iterator[str]) -> Iterator[str]:
    """The texts in which no special token of the tokenizer is spelled out."""
    special = tuple(tokenizer.all_special_tokens)
    return (text for text in texts if not any(token in text for token in special))


def least_length(tokenizer: PreTrainedTokenizerBase, drafts: Sequence[Draft]) -> int:
    """A length in tokens that is enough for each of the drafts and some haystack, rounded up to a multiple of 16."""
    turn = chat_turn(tokenizer)
    needed = max(
        len(turn.ids)
        + count_tokens(tokenizer, _compose(turn, draft, [], "\n").text)
        + _reserve(tokenizer, draft)
        + HAYSTACK_ROOM
        for draft in drafts
    )
    return -(-needed // 16) * 16


def fit(tokenizer: PreTrainedTokenizerBase, draft: Draft, haystack: Haystack, length: int) -> Fitted:
    """Fills the draft with haystack until prompt and reserve are `length` tokens.

    Whole units first, then the beginning of one more, ended with a full stop. The prompt is tokenised as one text, so
    `context_ids + question_ids` is what the tokenizer gives for it. Where no shortening of the last sentence gives the
    exact length, the prompt is the nearest one below.
    """
    turn = chat_turn(tokenizer)
    reserve = _reserve(tokenizer, draft)
    target = length - reserve - len(turn.ids)

    def whole(units: list[str]) -> int:
        return count_tokens(tokenizer, _compose(turn, draft, units, haystack.separator).text)

    room = target - whole([])
    if room < 0:
        raise BadArgument("length", length, f"this prompt needs {length - room} tokens before any haystack")
    units, costs = _take(tokenizer, haystack, room)
    number = bisect.bisect_right(list(itertools.accumulate(costs)), room)
    # Costs were counted unit by unit; where tokens cross the borders, the whole differs a little.
    while (gap := target - whole(units[:number])) < 0 or 0 < gap < _SHORTEST_TAIL:
        if number == 0:
            break
        number -= max(1, -gap * number // sum(costs[:number]))
    if gap > 0:
        words = haystack.tail or tuple(" ".join(units[number : number + 3]).split())
        before = units[number - 1][-80:] if number else draft.intro[-80:]

        def added(tail: str) -> int:
            return count_tokens(tokenizer, f"{before}{haystack.separator}{tail}\n") - count_tokens(
                tokenizer, f"{before}\n"
            )

        wanted = gap
        chosen = units[:number]
        for _ in range(6):
            candidate = [*units[:number], _tail(words, wanted, added)]
            difference = target - whole(candidate)
            if difference >= 0:
                chosen = candidate
            if difference == 0:
                break
            wanted += difference
        units = chosen
    else:
        units = units[:number]
    composed = _compose(turn, draft, units, haystack.separator)
    encoded = encode(tokenizer, composed.text)
    shift, split = len(turn.ids), encoded.token_at(composed.question)
    evidence = [encoded.span(*span) for span in composed.evidence]
    first, last = encoded.span(*composed.haystack)
    return Fitted(
        context_ids=(*turn.ids, *encoded.ids[:split]),
        question_ids=tuple(encoded.ids[split:]),
        depths=tuple((start - first) / max(1, last - first - (stop - start)) for start, stop in evidence),
        evidence=tuple((start + shift, stop + shift) for start, stop in evidence),
        max_new_tokens=reserve,
    )


@dataclass(frozen=True)
class _Composed:
    text: str
    haystack: tuple[int, int]
    evidence: list[tuple[int, int]]
    question: int


def _compose(turn: Turn, draft: Draft, units: list[str], separator: str) -> _Composed:
    """The whole text, with the characters where its parts stand."""
    at: dict[int, list[Insert]] = {}
    for insert in draft.inserts:
        at.setdefault(round(insert.place * len(units)), []).append(insert)
    text = [f"{turn.head}{draft.intro}\n\n"]
    start = position = len(text[0])
    spans: dict[int, tuple[int, int]] = {}
    pieces: list[tuple[str, Insert | None]] = []
    for index in range(len(units) + 1):
        pieces.extend((insert.text, insert) for insert in at.get(index, ()))
        if index < len(units):
            pieces.append((units[index], None))
    for index, (piece, insert) in enumerate(pieces):
        if index:
            text.append(separator)
            position += len(separator)
        if insert is not None:
            spans[id(insert)] = (position, position + len(piece))
        text.append(piece)
        position += len(piece)
    text.append(f"\n\n{draft.question}{turn.tail}{draft.prefix}")
    evidence = [spans[id(insert)] for insert in draft.inserts if insert.evidence]
    return _Composed("".join(text), (start, position), evidence, position + 2)


def _reserve(tokenizer: PreTrainedTokenizerBase, draft: Draft) -> int:
    """The draft's reserve, or what the answer needs where the tokenizer cuts it finer than that."""
    return max(draft.reserve, count_tokens(tokenizer, ", ".join(draft.references)) + 8)


def _take(tokenizer: PreTrainedTokenizerBase, haystack: Haystack, budget: int) -> tuple[list[str], list[int]]:
    """Units, and the tokens of each, until there are at least two more than `budget` tokens hold."""
    units: list[str] = []
    costs: list[int] = []
    spare = 0
    while spare < 2:
        batch = list(itertools.islice(haystack.units, 64))
        ids = tokenizer([haystack.separator + unit for unit in batch], add_special_tokens=False, verbose=False)
        for unit, tokens in zip(batch, ids["input_ids"], strict=True):  # pyright: ignore[reportArgumentType]
            budget -= len(tokens)
            spare += budget < 0
            units.append(unit)
            costs.append(len(tokens))
    return units, costs


def _tail(words: Sequence[str], tokens: int, added: Callable[[str], int]) -> str:
    """The first words as one sentence that adds exactly `tokens` tokens, or the nearest number below."""

    def sentence(count: int, extra: str = "") -> str:
        return " ".join(words[:count]).rstrip(".,;:") + extra + "."

    most = bisect.bisect_right(range(1, len(words) + 1), tokens, key=lambda count: added(sentence(count)))
    best, best_cost = sentence(max(1, most)), -1
    for count in range(most, max(0, most - 4), -1):
        extra, cost = "", added(sentence(count))
        while cost < tokens:
            more = [(added(sentence(count, extra + piece)), piece) for piece in _STRETCH]
            step = min(((new, piece) for new, piece in more if cost < new <= tokens), default=None)
            if step is None:
                break
            cost, extra = step[0], extra + step[1]
        if cost > best_cost:
            best, best_cost = sentence(count, extra), cost
        if best_cost == tokens:
            break
    return best
