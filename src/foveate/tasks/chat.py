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


def count_each(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """Number of tokens of each text, none added."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [len(row) for row in ids]


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


def without_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text without the special tokens that it spells out."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text
