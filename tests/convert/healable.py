"""What healing is tried on: tiny models, a tokenizer of bytes, and made-up documents."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from foveate.convert.healing.text import TokenText, token_text
from foveate.models import tiny
from foveate.models.converted import container

CHAT = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
VOCABULARY = 264


def byte_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A token per byte; a BOS before each text, or a chat template and no BOS."""
    special = ["<|start|>", "<|end|>"] if chat else ["<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if chat:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=CHAT)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_documents(folder: Path, seed: int, count: int = 40, words: int = 60) -> list[str]:
    """Files of made-up words, no two of which share a word."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    texts = []
    for number in range(count):
        text = " ".join("".join(rng.choices("abcdefghijklmnop", k=5)) + f"{number:02d}" for _ in range(words)) + "."
        (folder / f"{number:02d}.txt").write_text(text)
        texts.append(text)
    return texts


def small_text(folder: Path, seed: int) -> TokenText:
    """40 documents of about 480 tokens, about one in ten of them held out."""
    write_documents(folder / "documents", seed)
    return token_text(folder / "documents", byte_tokenizer(), held_out=0.1)


def pair(seed: int, family: str = "llama", dtype: torch.dtype = torch.float32, noise: float = 0.2) -> tuple[Any, Any]:
    """A teacher, and a student that is its copy with keys disturbed."""
    teacher = tiny(family, layers=2, kv_heads=2, vocab_size=VOCABULARY, seed=seed % 1000, dtype=dtype)
    student = container(teacher)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in student.model.layers:
            weight = layer.self_attn.k_proj.weight
            weight.add_(noise * torch.randn(weight.shape, generator=generator).to(weight.dtype))
    return teacher, student


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether all are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in one.items())
