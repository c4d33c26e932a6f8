"""A GGUF file opens as the model that was written into it, with its tokenizer."""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.models.gguf_files import CHAT, byte_level_vocabulary, finish, sentence_pieces, write
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from foveate.errors import BadArgument, Refused
from foveate.models import load, tiny
from foveate.models.gguf_tokenizer import tokenizer_of
from foveate.models.gguf_weights import folder_of

Q = gguf.GGMLQuantizationType


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: torch.nn.Module, seed: int) -> torch.Tensor:
    ids = torch.randint(3, 256, (2, 21), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (3, 1), (8, 2)])
def test_llama_file_gives_the_same_logits(heads: int, kv_heads: int, tmp_path: Path, seed: int):
    model = tiny("llama", heads=heads, kv_heads=kv_heads, vocab_size=320, seed=seed)
    write(tmp_path / "m.gguf", model)
    opened = load(tmp_path / "m.gguf", dtype="float32", device="cpu").model
    assert torch.equal(logits(opened, seed), logits(model, seed))
    assert opened.config.head_dim == 16
    assert opened.config.rms_norm_eps == model.config.rms_norm_eps


def test_qwen3_file_gives_the_same_logits(tmp_path: Path, seed: int):
    model = tiny("qwen3", heads=6, kv_heads=2, vocab_size=320, seed=seed)
    write(tmp_path / "m.gguf", model, architecture="qwen3", pre="qwen2")
    opened = load(tmp_path / "m.gguf", dtype="float32", device="cpu").model
    assert torch.equal(logits(opened, seed), logits(model, seed))


def test_qwen2_file_with_tied_embeddings_and_biases_gives_the_same_logits(tmp_path: Path, seed: int):
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320}
    config = Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    config.head_dim = 16
    model = Qwen2ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    write(tmp_path / "m.gguf", model, architecture="qwen2", pre="qwen2")
    opened = load(tmp_path / "m.gguf", dtype="float32", device="cpu").model
    # the writer wrote the tied matrix twice, so it comes back untied
    torch.testing.assert_close(logits(opened, seed), logits(model, seed), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "stored"),
    [(Q.F32, torch.float32), (Q.F16, torch.float16), (Q.BF16, torch.bfloat16), (Q.Q8_0, torch.float16)],
)
def test_what_is_stored_loses_nothing_that_matters(kind: Q, stored: torch.dtype, tmp_path: Path, seed: int):
    model = tiny("llama", kv_heads=2, layers=1, vocab_size=320, seed=seed)
    write(tmp_path / "m.gguf", model, kind=kind)
    weights = load_file(folder_of(tmp_path / "m.gguf") / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    values = gguf.dequantize(gguf.quantize(model.state_dict()[name].numpy(), kind), kind)
    assert weights[name].dtype is stored
    assert weights["model.norm.weight"].dtype is torch.float32
    limit = 2.0**-11 if kind is Q.Q8_0 else 0.0  # half a unit in the last place of float16
    assert np.all(np.abs(weights[name].float().numpy() - values) <= limit * np.abs(values) + 2.0**-25)


def test_weights_beyond_the_range_of_float16_keep_float32(tmp_path: Path, seed: int):
    model = tiny("llama", kv_heads=2, layers=1, vocab_size=320, seed=seed)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = 3e5
    write(tmp_path / "m.gguf", model, kind=Q.Q8_0)
    weights = load_file(folder_of(tmp_path / "m.gguf") / "model.safetensors")
    assert weights["model.layers.0.mlp.down_proj.weight"].dtype is torch.float32
    assert weights["model.layers.0.mlp.down_proj.weight"][3, 5] == pytest.approx(3e5, rel=1e-3)


def test_llama3_frequency_divisors_come_back_as_their_parameters(tmp_path: Path, seed: int):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64, vocab_size=320, rope_parameters=dict(scaling), max_position_embeddings=131072,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    factors = plain / model.model.rotary_emb.inv_freq.double()
    write(tmp_path / "m.gguf", model, factors=factors)
    opened = load(tmp_path / "m.gguf", dtype="float32", device="cpu").model
    assert opened.config.rope_parameters == scaling
    write(tmp_path / "other.gguf", model, factors=factors**0.5)
    with pytest.raises(Refused, match="not Llama 3's"):
        load(tmp_path / "other.gguf")


def test_tokenizer_splits_digits_keeps_specials_and_renders_chats(tmp_path: Path, seed: int):
    write(tmp_path / "m.gguf", tiny("llama", layers=1, vocab_size=320, seed=seed))
    tokenizer = load(tmp_path / "m.gguf", dtype="float32", device="cpu").tokenizer
    assert tokenizer.tokenize("hello 1212") == ["hello", "Ġ", "1", "2", "1", "2"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>hello<|im_end|>"
    assert tokenizer(text).input_ids == [1, tokenizer.convert_tokens_to_ids("hello"), 2]
    assert tokenizer.decode(tokenizer("naïve 日本 12\n").input_ids) == "naïve 日本 12\n"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.padding_side == "left"
    assert "[PAD280]" not in tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["Ġ", "12", "12"]),
        ("smollm", ["Ġ", "1", "2", "1", "2"]),
        ("qwen2", ["Ġ", "1", "2", "1", "2"]),
        ("llama-bpe", ["Ġ", "12", "1", "2"]),  # groups of three digits: 121|2
    ],
)
def test_each_pre_tokenizer_cuts_digits_its_own_way(pre: str, expected: list[str]):
    metadata = byte_level_metadata(pre)
    tokenizer = tokenizer_of(metadata, 64)
    assert tokenizer.tokenize(" 1212") == expected
    assert tokenizer(" 1212").input_ids[0] == (1 if pre == "llama-bpe" else tokenizer.convert_tokens_to_ids("Ġ"))


def byte_level_metadata(pre: str) -> dict:
    tokens, merges = byte_level_vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_sentencepiece_joins_by_score(seed: int):
    rng = np.random.default_rng(seed)
    letters = list("abcd▁")
    words = ["".join(rng.choice(letters, size=rng.integers(2, 6))) for _ in range(40)]
    tokens, scores, types = sentence_pieces(words, seed)
    tokenizer = tokenizer_of(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        },
        64,
    )
    known = dict(zip(tokens[259:], scores[259:], strict=True))
    for _ in range(50):
        text = "".join(rng.choice([*string.ascii_lowercase[:4], " "], size=rng.integers(1, 25)))
        assert tokenizer.tokenize(text) == greedy(list("▁" + text.replace(" ", "▁")), known)
    assert tokenizer("ab").input_ids[0] == 1
    assert tokenizer.decode(tokenizer("ab é c", add_special_tokens=False).input_ids) == "ab é c"


def greedy(pieces: list[str], scores: dict[str, float]) -> list[str]:
    """What sentencepiece's BPE does: join the pair of neighbours whose union scores best, the left one of equals."""
    while pairs := [
        (-scores[pieces[at] + pieces[at + 1]], at)
        for at in range(len(pieces) - 1)
        if pieces[at] + pieces[at + 1] in scores
    ]:
        at = min(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def test_generation_stops_at_the_end_of_a_turn_too(tmp_path: Path, seed: int):
    write(
        tmp_path / "m.gguf",
        tiny("llama", layers=1, vocab_size=320, seed=seed),
        extra={"tokenizer.ggml.eot_token_id": 0},
    )
    assert load(tmp_path / "m.gguf", dtype="float32", device="cpu").model.generation_config.eos_token_id == [2, 0]


def test_the_same_content_is_converted_once_whatever_its_path(tmp_path: Path, own_cache: Path, seed: int):
    write(tmp_path / "a.gguf", tiny("llama", layers=1, vocab_size=320, seed=seed))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes())
    first = folder_of(tmp_path / "a.gguf")
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert folder_of(tmp_path / "elsewhere" / "b.gguf") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    write(tmp_path / "a.gguf", tiny("llama", layers=1, vocab_size=320, seed=seed + 1))
    assert folder_of(tmp_path / "a.gguf") != first


def test_files_that_cannot_be_opened_are_refused_in_one_sentence(tmp_path: Path, own_cache: Path, seed: int):
    path = tmp_path / "m.gguf"
    model = tiny("llama", layers=1, vocab_size=320, seed=seed)
    path.write_bytes(b"PK\x03\x04 not this")
    with pytest.raises(BadArgument, match=r"source=.*not a GGUF file"):
        load(path)
    write(path, model)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(BadArgument, match=r"source=.*damaged or cut short"):
        load(path)
    writer = gguf.GGUFWriter(path, "falcon")
    writer.add_block_count(1)
    finish(writer)
    with pytest.raises(BadArgument, match=r"'falcon' cannot be opened; llama, qwen2, qwen3 can"):
        load(path)
    write(path, model, pre="bloom")
    with pytest.raises(Refused, match="'bloom' way"):
        load(path)
    write(path, model, extra={"llama.attention.sliding_window": 64})
    with pytest.raises(Refused, match="sliding attention"):
        load(path)
    write(path, model, extra={"llama.rope.scaling.type": "longrope"})
    with pytest.raises(Refused, match="longrope"):
        load(path)
    with pytest.raises(BadArgument, match="no such file"):
        load(tmp_path / "absent.gguf")
    assert not [entry for entry in (own_cache / "models").iterdir() if entry.is_dir()], "nothing half-made is left"


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "moe"])
def test_a_file_that_does_not_make_a_whole_model_is_refused(change: str, tmp_path: Path, seed: int):
    model = tiny("qwen3", layers=1, vocab_size=320, seed=seed)
    state = dict(model.state_dict())
    if change == "missing":
        del state["model.layers.0.mlp.up_proj.weight"]
    elif change == "unknown":
        state["model.layers.0.self_attn.q_norm.bias"] = torch.zeros(16)
    elif change == "shape":
        state["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(8)
    extra = {"model.layers.0.mlp.gate_inp.weight": torch.zeros(4, 64)} if change == "moe" else {}
    with monkeypatched_state(model, state | extra):
        write(tmp_path / "m.gguf", model, architecture="qwen3", pre="qwen2")
    with pytest.raises(Refused, match=r"no place for|does not make a whole qwen3 model"):
        load(tmp_path / "m.gguf")


@contextmanager
def monkeypatched_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "state_dict", lambda: state)
        yield


def test_chat_template_of_the_file_is_kept(tmp_path: Path, seed: int):
    write(tmp_path / "m.gguf", tiny("llama", layers=1, vocab_size=320, seed=seed))
    assert load(tmp_path / "m.gguf", device="cpu").tokenizer.chat_template == CHAT
