"""Tokens to calibrate a conversion on, and other tokens to measure it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.errors import BadArgument
from foveate.tasks.chat import leading_ids, without_special
from foveate.tasks.corpora import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HELD = 0.2  # share of the text, at its end, that is measured on
_CHARS = 12  # of a token, more than text takes: no more of a long text is read than is wanted


@dataclass(frozen=True)
class SampleText:
    """Two samples of one text that have nothing in common.

    Args:
        calibration, probe: token ids [S, N], each sequence with what the tokenizer puts before a text.
        facts: where they are from, as JSON values.
    """

    calibration: Tensor
    probe: Tensor
    facts: dict[str, Any]


def held_out(text: str) -> str:
    """The end of a text, which is measured on and never calibrated on."""
    return text[int(len(text) * (1 - _HELD)) :]


def sample_text(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path | None = None,
    *,
    calibration: int = 32_768,
    probe: int = 4096,
    length: int = 512,
    seed: int = 0,
) -> SampleText:
    """Sequences of running text.

    Args:
        source: a text file, a folder of text files, or None: Python's documentation.
        calibration, probe: tokens of each sample, in whole sequences and at least one.
        length: tokens of a sequence.
        seed: of the choice of sequences.

    Raises:
        BadArgument: a number that cannot be, or a text that is missing or too short.
    """
    for name, value, least in (
        ("calibration_tokens", calibration, 1),
        ("probe_tokens", probe, 1),
        ("length", length, 2),
    ):
        if value < least:
            raise BadArgument(name, value, f"give at least {least}")
    text = corpus(source)
    measured = held_out(text.text)
    cut = len(text.text) - len(measured)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for name, wanted, part in (
        ("calibration_tokens", calibration, text.text[:cut]),
        ("probe_tokens", probe, measured),
    ):
        number = max(1, wanted // length)
        head = leading_ids(tokenizer)
        part = part[: max(_CHARS * number * length, 1 << 20)]
        # Piece by piece, because some tokenizers take much longer for one long text.
        ids = [
            token
            for start in range(0, len(part), 1 << 16)
            for token in tokenizer(
                without_special(tokenizer, part[start : start + (1 << 16)]), add_special_tokens=False, verbose=False
            )["input_ids"]
        ]
        body = length - len(head)
        there = len(ids) // body
        if there < number:
            mend = f"{text.name} has room for {there * length} there; give fewer, a smaller --length or a longer text"
            raise BadArgument(name, wanted, mend)
        rows = torch.tensor(ids[: there * body]).view(there, body)
        rows = rows[torch.randperm(there, generator=generator)[:number]]
        made.append(torch.cat([torch.tensor(head, dtype=torch.long).expand(number, -1), rows], dim=1))
    facts = {
        "text": text.name,
        "digest": text.digest,
        "calibration_tokens": made[0].numel(),
        "probe_tokens": made[1].numel(),
        "length": length,
        "seed": seed,
    }
    return SampleText(made[0], made[1], facts)
