"""What a tokenizer and its chat template do to a text."""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

from foveate.errors import BadArgument, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTENT = "<<the content of the turn>>"
_ANSWER = "<<the answer to it>>"
_NEXT = "<<the content of the next turn>>"


@dataclass(frozen=True)
class Frame:
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


def count_each(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """Number of tokens of each text, none added."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [len(row) for row in ids]


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text (BOS), in order."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    return tuple(itertools.takewhile(lambda token: token != plain[0], whole))


def chat_turn(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What the tokenizer's chat template puts around one user turn, or a plain frame when it has none.

    Templates that can think are told not to, and those that show the date are given a fixed one: equal seeds give
    equal bytes.

    Raises:
        BadArgument: the template cannot show a single user turn.
    """
    if not tokenizer.chat_template:
        return Frame(leading_ids(tokenizer), "", " ")
    mend = "its chat template must show the text of a single user turn once; mend it, or set chat_template to None"
    shown = _shown(tokenizer, [_CONTENT], mend)
    head, found, tail = shown.partition(_CONTENT)
    if not found or _CONTENT in tail:
        raise BadArgument("tokenizer", _name(tokenizer), mend)
    return Frame((), head, tail)


def next_turn(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What the tokenizer's chat template puts around a user turn behind an answer: the end of the answer's turn in
    front, or a paragraph's end where there is no template.

    Templates that show past answers otherwise than they were asked for (Qwen3 takes the empty thinking out of them) are
    continued as they were asked for, since what a cache has read stays read.

    Raises:
        BadArgument: the template cannot show a conversation.
    """
    if not tokenizer.chat_template:
        return Frame((), "\n\n", " ")
    mend = "its chat template must show question, answer and next question once each; mend it, or ask single questions"
    shown = _shown(tokenizer, [_CONTENT, _ANSWER, _NEXT], mend)
    head, found, tail = shown.partition(_ANSWER)[2].partition(_NEXT)
    if not found or [shown.count(text) for text in (_CONTENT, _ANSWER, _NEXT)] != [1, 1, 1]:
        raise BadArgument("tokenizer", _name(tokenizer), mend)
    return Frame((), head, tail)


def _shown(tokenizer: PreTrainedTokenizerBase, contents: list[str], mend: str) -> str:
    """The chat of user and assistant in turn, and the head of the next answer.

    Raises:
        BadArgument: the template refuses it.
    """
    roles = itertools.cycle(["user", "assistant"])
    try:
        shown = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            date_string="01 Jan 2025",
        )
    except (jinja2.TemplateError, ValueError) as error:
        raise BadArgument("tokenizer", _name(tokenizer), f"{mend} ({error})") from None
    return str(shown)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


def without_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text without the special tokens that it spells out."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text
