"""Tiny models: deterministic, of the shape asked for, and with attention that matters."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import BadArgument
from foveate.models import FAMILIES, ModelShape, tiny


def logits(model: torch.nn.Module, ids: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model(ids, attention_mask=kept, position_ids=positions).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (3, 1), (8, 1), (6, 2)])
def test_dropping_a_few_tokens_moves_the_logits(family: str, heads: int, kv_heads: int, seed: int):
    model = tiny(family, heads=heads, kv_heads=kv_heads, seed=seed)
    ids = torch.randint(3, 256, (4, 40), generator=torch.Generator().manual_seed(seed))
    whole = logits(model, ids)[:, -1]
    for dropped in (slice(8, 12), slice(34, 38)):
        kept = torch.ones_like(ids)
        kept[:, dropped] = 0
        moved = (logits(model, ids, kept)[:, -1] - whole).std() / whole.std()
        assert moved > 0.05, f"tokens {dropped.start}-{dropped.stop} moved the logits by {moved:.3f} of their spread"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_everything(family: str, seed: int):
    torch.manual_seed(1)
    first = tiny(family, seed=seed).state_dict()
    torch.manual_seed(2)
    again, other = tiny(family, seed=seed).state_dict(), tiny(family, seed=seed + 1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rounds_the_same_weights_and_not_the_frequencies(family: str, seed: int):
    exact, rounded = tiny(family, seed=seed), tiny(family, seed=seed, dtype=torch.bfloat16)
    assert rounded.dtype is torch.bfloat16
    assert rounded.config.dtype is torch.bfloat16
    for (name, a), b in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b), name
    for (name, a), b in zip(exact.named_buffers(), rounded.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_is_what_was_asked_for(family: str):
    model = tiny(family, layers=4, heads=6, kv_heads=2, head_dim=20, vocab_size=300, max_positions=123)
    shape = ModelShape.of(model)
    assert (shape.num_layers, shape.vocab_size, shape.max_positions) == (4, 300, 123)
    assert {layer.num_heads for layer in shape.layers} == {6}
    if family == "deepseek-v3":
        assert {(layer.latent, layer.head_dim, layer.v_head_dim) for layer in shape.layers} == {(True, 30, 20)}
    else:
        assert {(layer.num_kv_heads, layer.head_dim) for layer in shape.layers} == {(2, 20)}
        assert shape.hidden_size != 6 * 20, "a head dim derived from the hidden size would go unnoticed"


@pytest.mark.parametrize("layers", [2, 3, 4, 6])
def test_gemma3_has_both_kinds_of_layers(layers: int):
    shape = ModelShape.of(tiny("gemma3", layers=layers, window=5))
    assert {(layer.kind, layer.window) for layer in shape.layers} == {("sliding", 5), ("full", None)}
    assert shape.layers[-1].kind == "full"


def test_windows_by_family():
    assert {layer.window for layer in ModelShape.of(tiny("gemma3")).layers} == {8, None}
    assert {layer.window for layer in ModelShape.of(tiny("mistral")).layers} == {None}
    assert {layer.window for layer in ModelShape.of(tiny("mistral", window=5)).layers} == {5}
    assert {layer.window for layer in ModelShape.of(tiny("llama", window=5)).layers} == {None}


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_are_private(family: str):
    first, second = tiny(family), tiny(family)
    first.config.vocab_size = 7
    assert second.config.vocab_size == 256


@pytest.mark.parametrize("family", FAMILIES)
def test_it_generates(family: str, seed: int):
    model = tiny(family, seed=seed)
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert out.shape == (1, 9)
    assert not model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "bert"}, "family='bert': give one of llama, qwen3"),
        ({"family": "llama", "heads": 8, "kv_heads": 3}, "kv_heads=3: give a divisor of heads=8"),
        ({"family": "llama", "head_dim": 6}, "head_dim=6: give a multiple of 4"),
        ({"family": "gemma3", "layers": 1}, "layers=1"),
        ({"family": "gemma3", "window": 0}, "window=0"),
    ],
)
def test_numbers_that_make_no_model(arguments: dict, message: str):
    with pytest.raises(BadArgument, match=message):
        tiny(**arguments)
