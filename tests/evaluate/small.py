"""A model and a tokenizer with which a comparison takes seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveate.models import Loaded, tiny
from foveate.tasks import Sample, task
from foveate.tasks.perplexity import Perplexity

LENGTH = 1100
"""Enough characters for a needle task of one token per byte."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=4096
    )


def small(family: str = "llama", *, layers: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Loaded:
    """A model with random weights and its tokenizer."""
    tokenizer = byte_tokenizer()
    model = tiny(
        family,
        layers=layers,
        heads=4,
        kv_heads=2,
        vocab_size=len(tokenizer),
        max_positions=2048,
        seed=seed,
        dtype=dtype,
    )
    return Loaded(model, tokenizer)


def saved(folder: Path, **options: object) -> Path:
    """The same as a folder that `foveate.load` opens."""
    model, tokenizer = small(**options)  # type: ignore[arg-type]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Brief:
    """A task with short answers, so that a random model, which never ends its own, is soon done."""

    def __init__(self, name: str, tokens: int = 12) -> None:
        whole = task(name)
        self.task = replace(whole, targets=tokens) if isinstance(whole, Perplexity) else whole
        self.tokens = tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def generate(self, *args: Any, **options: Any) -> list[Sample]:
        made = self.task.generate(*args, **options)
        return [_shorter(each, self.tokens) for each in made]


def _shorter(sample: Sample, tokens: int) -> Sample:
    """The sample with answers of at most so many tokens, in each of its turns."""
    turns = tuple(replace(turn, max_new_tokens=min(tokens, turn.max_new_tokens)) for turn in sample.turns)
    return replace(sample, max_new_tokens=min(tokens, sample.max_new_tokens), turns=turns)
