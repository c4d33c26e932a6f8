"""Small GGUF files, written the way llama.cpp writes them, of transformers models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_inp": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FREE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges: three special tokens, all bytes, and a few words among them one of digits."""
    alphabet = sorted(bytes_to_unicode().values())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
    return [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in merges)], merges


def write(
    path: Path,
    model: Any,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    pre: str = "smollm",
    extra: dict[str, Any] | None = None,
    factors: Tensor | None = None,
) -> None:
    """Write `model` with matrices of `kind`; its vocabulary must have room for `byte_level_vocabulary`."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_tokenizer(writer, config.vocab_size, pre)
    for name, value in (extra or {}).items():
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    for name, weight in model.state_dict().items():
        _add(writer, name, weight.float(), kind, architecture, config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.float().numpy())
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int, pre: str) -> None:
    tokens, merges = byte_level_vocabulary()
    padding = [f"[PAD{index}]" for index in range(len(tokens), vocab_size)]
    control, normal, unused = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    types = [control] * len(SPECIAL) + [normal] * (len(tokens) - len(SPECIAL)) + [unused] * len(padding)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *padding])
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT)


def _add(
    writer: gguf.GGUFWriter, name: str, weight: Tensor, kind: gguf.GGMLQuantizationType, architecture: str, config: Any
) -> None:
    stem, suffix = name.rsplit(".", 1)
    if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
        weight = interleave(weight, heads)
    if stem in FREE:
        target = FREE[stem]
    else:
        _, _, layer, part = stem.split(".", 3)
        target = f"blk.{layer}.{BLOCK[part]}"
    values = weight.contiguous().numpy()
    if weight.ndim == 1 or kind is gguf.GGMLQuantizationType.F32:
        writer.add_tensor(f"{target}.{suffix}", values)
    else:
        writer.add_tensor(f"{target}.{suffix}", gguf.quantize(values, kind), raw_dtype=kind)


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows (0, D/2, 1, D/2 + 1, ...) of every head: llama.cpp rotates neighbours."""
    half = weight.shape[0] // heads // 2
    order = [head * 2 * half + part * half + at for head in range(heads) for at in range(half) for part in (0, 1)]
    return weight[torch.tensor(order)]


def sentence_pieces(words: Sequence[str], seed: int) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a sentencepiece vocabulary: all prefixes of the words, in an order of its own."""
    control, normal, byte = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.BYTE
    pieces = sorted({word[:end] for word in words for end in range(2, len(word) + 1)})
    np.random.default_rng(seed).shuffle(pieces)
    letters = sorted({letter for word in words for letter in word})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *pieces, *letters]
    types = [gguf.TokenType.UNKNOWN, control, control] + [byte] * 256 + [normal] * (len(pieces) + len(letters))
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces) + len(letters))]
    return tokens, scores, [int(kind) for kind in types]
