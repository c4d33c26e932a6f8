"""Tokenizers to make samples with: three small ones built here, of different kinds, and a real one."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foveate.models import load
from foveate.tasks import Sample, corpus

CHAT = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def _byte_pairs() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template that trims, as GPT-2's and Llama-3's descendants have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus().text[:120_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=CHAT)


def _sentence_pieces() -> PreTrainedTokenizerFast:
    """BPE over words that carry their leading blank, a BOS and no chat template, as Llama-2's base models have."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([corpus().text[:120_000]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _characters() -> PreTrainedTokenizerFast:
    """One token per byte, BOS before and EOS behind every text, no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerBase:
    return _byte_pairs()


@pytest.fixture(scope="session")
def sentence_pieces() -> PreTrainedTokenizerBase:
    return _sentence_pieces()


@pytest.fixture(scope="session")
def characters() -> PreTrainedTokenizerBase:
    return _characters()


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    return load("smollm2").tokenizer


@pytest.fixture(scope="session", params=["bpe", "sentence_pieces", "characters", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def made() -> Callable[..., list[Sample]]:
    """Three samples of 2048 tokens of a task, made once for a tokenizer, with a seed that no run had before."""
    seed = random.SystemRandom().randrange(1 << 40)
    return functools.cache(lambda task, tokenizer: task.generate(tokenizer, 2048, 3, seed))


@pytest.fixture
def seed() -> int:
    """A seed that no run had before; pytest shows it with a failure."""
    return random.SystemRandom().randrange(1 << 40)
