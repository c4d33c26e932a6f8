"""DuoAttention: must-hold tests of its card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.heads.words import WordTokenizer
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, sealed_memory, stores
from torch import Tensor

import foveate
from foveate.heads.gates import GateRecipe
from foveate.heads.tap import Tap, Tapped
from foveate.methods import DuoAttention, Profile, Quest
from foveate.methods.profile import built_in_profile, fingerprint, load_profile, save_profile
from foveate.models import ModelShape, tiny

SINK, RECENT = 3, 16
SMALL = {"sink": SINK, "recent": RECENT}


def profile_for(shape: ModelShape) -> Profile:
    """Gates of no meaning, all different, for any model."""
    generator = torch.Generator().manual_seed(len(shape.layers))
    gates = [torch.rand(layer.num_kv_heads, generator=generator).tolist() for layer in shape.layers]
    return Profile("duo-attention", fingerprint(shape), {"gates": gates})


def profile(model: Any, gates: list[list[float]] | None = None) -> Profile:
    shape = ModelShape.of(model)
    return profile_for(shape) if gates is None else Profile("duo-attention", fingerprint(shape), {"gates": gates})


def masked(model: Any, ids: Tensor, seen: Callable[[int, int, Tensor, Tensor], Tensor]) -> Tensor:
    """Logits of one dense forward in which kv head h of layer l reads the pairs (i, j) that seen(l, h, i, j) says."""
    n = ids.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)

    def serve(layer: Tapped) -> Tensor:
        heads, stores = layer.q.shape[1], layer.k.shape[1]
        mask = torch.stack([(j <= i) & seen(layer.shape.index, head, i, j) for head in range(stores)])
        k, v, mask = (x.repeat_interleave(heads // stores, dim=-3) for x in (layer.k, layer.v, mask))
        scores = (layer.q @ k.transpose(-1, -2) * layer.scale).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v

    with torch.no_grad(), Tap(model, serve):
        return model(ids).logits


def streaming_heads(table: list[list[float]], count: int) -> set[tuple[int, int]]:
    """(layer, head) of the lowest gates, by the definition."""
    flat = sorted((gate, layer, head) for layer, row in enumerate(table) for head, gate in enumerate(row))
    return {(layer, head) for _, layer, head in flat[:count]}


# -- what is read ------------------------------------------------------------------------------------------------------


def test_no_streaming_head_is_dense() -> None:
    model, ids, steps = llama(), prompt(2, 61), prompt(2, 9, seed=1)
    want, _ = logits(model, ids, steps)
    got, _ = applied(model, DuoAttention(**SMALL, sparsity=0.0), ids, steps, profile=profile(model))
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_short_texts_are_dense_for_any_gates(sparsity: float) -> None:
    """M <= S + R; the current token comes on top."""
    model, ids, steps = llama(), prompt(2, 11), prompt(2, SINK + RECENT + 1 - 11, seed=1)
    want, _ = logits(model, ids, steps)
    got, _ = applied(model, DuoAttention(**SMALL, sparsity=sparsity), ids, steps, profile=profile(model))
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("chunks", [None, 1, 7])
@pytest.mark.parametrize("sparsity", [0.5, 1.0])
def test_equals_the_masked_dense_reference(sparsity: float, chunks: int | None) -> None:
    """Visibility j < sink or i - j <= recent in streaming heads, in the prompt and after it; sparsity 1 is a model of
    sinks and window alone."""
    model, ids, steps = llama(), prompt(2, 61), prompt(2, 9, seed=1)
    table = profile(model).data["gates"]
    streaming = streaming_heads(table, round(sparsity * 6))
    whole = torch.cat([ids, steps], dim=1)
    want = masked(model, whole, lambda layer, head, i, j: (
        (j < SINK) | (i - j <= RECENT) | torch.tensor((layer, head) not in streaming)
    ))[:, 60:]  # fmt: skip
    got, cache = applied(model, DuoAttention(**SMALL, sparsity=sparsity), ids, steps, chunks, profile=profile(model))
    assert_close(got, want, TOLERANCE)
    assert cache.nbytes < 0.9 * 2 * ModelShape.of(model).dense_kv_bytes(70)
    dense, _ = logits(model, ids, steps)
    assert (got - dense).abs().max() > 1e-2


def test_released_first_call_leaves_the_prompt_dense() -> None:
    model, ids, steps = llama(), prompt(2, 61), prompt(2, 9, seed=1)
    streaming = streaming_heads(profile(model).data["gates"], 3)
    want = masked(model, torch.cat([ids, steps], dim=1), lambda layer, head, i, j: (
        (j < SINK) | (i - j <= RECENT) | (i < 61) | torch.tensor((layer, head) not in streaming)
    ))[:, 60:]  # fmt: skip
    got, cache = applied(model, DuoAttention(**SMALL, in_prompt=False), ids, steps, profile=profile(model))
    assert_close(got, want, TOLERANCE)
    assert cache.nbytes < 0.9 * 2 * ModelShape.of(model).dense_kv_bytes(70)
    strict, _ = applied(model, DuoAttention(**SMALL), ids, steps, profile=profile(model))
    assert (strict - got).abs().max() > 1e-2


def test_scaled_rotations_are_the_models_own(seed: int) -> None:
    """Angles of Llama 3.1, which the released static path takes for linearly scaled ones; in prompt and decode."""
    model = llama()
    model.config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    plain = model.model.rotary_emb.inv_freq
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    slowed = plain / model.model.rotary_emb.inv_freq
    assert slowed.min() == 1 < slowed.max()  # not one factor for all channels
    ids, steps = prompt(1, 61, seed % 10**6), prompt(1, 5, seed % 10**6 + 1)
    streaming = streaming_heads(profile(model).data["gates"], 3)
    want = masked(model, torch.cat([ids, steps], dim=1), lambda layer, head, i, j: (
        (j < SINK) | (i - j <= RECENT) | torch.tensor((layer, head) not in streaming)
    ))[:, 60:]  # fmt: skip
    got, _ = applied(model, DuoAttention(**SMALL), ids, steps, profile=profile(model))
    assert_close(got, want, TOLERANCE)


def test_only_a_dense_prompt_is_shared() -> None:
    model = llama()
    with foveate.apply(model, DuoAttention(**SMALL), profile=profile(model)) as handle:
        assert not handle.binding.shares_prefill
    with foveate.apply(model, DuoAttention(**SMALL, in_prompt=False), profile=profile(model)) as handle:
        assert handle.binding.shares_prefill


# -- what is held ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_prompt", [True, False])
@pytest.mark.parametrize("length", [10, 19, 20, 61])
def test_tokens_per_layer(length: int, in_prompt: bool) -> None:
    """n_full * M + n_stream * min(M, S + R), exactly; streaming heads hold the sinks and the newest."""
    model, steps = llama(), 5
    table = profile(model).data["gates"]
    streaming = streaming_heads(table, 3)
    method = DuoAttention(**SMALL, in_prompt=in_prompt)
    _, cache = applied(model, method, prompt(1, length), prompt(1, steps, seed=1), profile=profile(model))
    m = length + steps
    few = sorted({*range(min(m, SINK)), *range(max(0, m - RECENT), m)})
    for layer, store in enumerate(stores(cache)):
        n = sum((layer, head) in streaming for head in range(2))
        tokens = held(store)
        assert sum(map(len, tokens)) == (2 - n) * m + n * min(m, SINK + RECENT)
        for head in range(2):
            assert tokens[head] == (few if (layer, head) in streaming else list(range(m)))


def test_the_lowest_gates_stream() -> None:
    """A quantile over all layers and heads together, wherever the gates lie; by default half of grouped heads."""
    model, shape = llama(), ModelShape.of(llama())
    for shift in (0.0, 0.9):  # far from 0.5 on either side: no fixed threshold
        table = [[shift + 0.01, shift + 0.06], [shift + 0.02, shift + 0.03], [shift + 0.05, shift + 0.04]]
        roles = DuoAttention().plan(shape, profile(model, table), 4096)
        assert [role.extra.get("streaming", ()) for role in roles] == [(0,), (0, 1), ()]
        assert [role.name for role in roles] == ["mixed", "streaming", "retrieval"]
    for share, count in ((0.0, 0), (1 / 6, 1), (0.75, 5), (1.0, 6)):
        roles = DuoAttention(sparsity=share).plan(shape, profile(model, table), 4096)
        assert sum(len(role.extra.get("streaming", ())) for role in roles) == count


def test_multi_head_models_stream_three_quarters() -> None:
    model = llama(layers=2, heads=4, kv_heads=4)
    roles = DuoAttention().plan(ModelShape.of(model), profile(model), 4096)
    assert sum(len(role.extra.get("streaming", ())) for role in roles) == 6


def test_equal_gates_have_an_order() -> None:
    """A saturated table is cut where the quantile says, the same way each time: earlier layers and heads stream."""
    model = llama()
    roles = DuoAttention(sparsity=0.5).plan(ModelShape.of(model), profile(model, [[1.0, 1.0]] * 3), 4096)
    assert [role.extra.get("streaming", ()) for role in roles] == [(0, 1), (0,), ()]


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1.0, 0.9, 0.7, 0.45, "60 tokens", "bytes"])
def test_as_few_heads_stream_as_the_budget_needs(budget: Any) -> None:
    model, length = llama(), 100
    shape = ModelShape.of(model)
    few, dense = SINK + RECENT, 6 * length
    in_bytes = foveate.Budget.bytes(shape.dense_kv_bytes(length) * 400 // dense)
    asked = {"60 tokens": 60, "bytes": in_bytes}.get(budget, budget)
    granted = {"60 tokens": 6 * 60, "bytes": 400}.get(budget, 0) or budget * dense
    method = DuoAttention(**SMALL, budget=asked, sparsity=0.9)  # the budget replaces the sparsity
    roles = method.plan(shape, profile(model), length)
    count = sum(len(role.extra.get("streaming", ())) for role in roles)
    assert dense - count * (length - few) <= granted
    assert count == 0 or dense - (count - 1) * (length - few) > granted
    _, cache = applied(model, method, prompt(1, length), profile=profile(model))
    assert sum(len(x) for store in stores(cache) for x in held(store)) == dense - count * (length - few)


def test_infeasible_below_the_floor() -> None:
    model, length = llama(), 100
    shape = ModelShape.of(model)
    method = DuoAttention(**SMALL)
    floor = method.floor(shape, length)
    assert floor == pytest.approx((SINK + RECENT) / length)
    with pytest.raises(foveate.Infeasible, match=r"budget=0\.189: .*cannot hold less than 0\.190") as refusal:
        method.with_budget(0.189).plan(shape, profile(model), length)
    assert refusal.value.floor == pytest.approx(floor)
    roles = method.with_budget(floor).plan(shape, profile(model), length)
    assert all(role.extra["streaming"] == (0, 1) for role in roles)
    assert method.floor(shape, 10) == 1.0


def test_sliding_layers_are_counted_and_left_alone() -> None:
    model = tiny("gemma3", layers=4, heads=6, kv_heads=2)
    shape, length = ModelShape.of(model), 100
    table = [[], None, [0.9, 0.1], [0.5, 0.6]]  # gates of sliding layers are not looked at
    given = Profile("duo-attention", fingerprint(shape), {"gates": table})
    ids, steps = prompt(1, length), prompt(1, 4, seed=1)
    method = DuoAttention(**SMALL, budget=0.7)
    dense = 4 * 8 + 4 * length  # heads times tokens: two sliding layers of 8, two of everything
    count = next(n for n in range(5) if dense - n * (length - SINK - RECENT) <= 0.7 * dense)
    assert count == 2
    _, cache = applied(model, method, ids, steps, profile=given)
    counts = [[len(x) for x in held(store)] for store in stores(cache)]
    m = length + 4
    assert counts == [[7, 7], [7, 7], [m, 19], [19, m]]
    want, _ = logits(model, ids, steps)
    got, _ = applied(model, DuoAttention(**SMALL, sparsity=0.0), ids, steps, profile=given)
    assert_close(got, want, TOLERANCE)


# -- profiles and refusals ---------------------------------------------------------------------------------------------


def test_latent_attention_is_refused() -> None:
    model = tiny("deepseek-v3")
    with pytest.raises(foveate.Refused, match="one latent vector for all heads"):
        foveate.apply(model, DuoAttention(), profile=profile(model))


def test_profiles_belong_to_a_model() -> None:
    other = profile(llama(layers=2))
    with pytest.raises(foveate.BadArgument, match="made on another model"):
        foveate.apply(llama(), DuoAttention(), profile=other)
    with pytest.raises(foveate.BadArgument, match="foveate calibrate"):
        foveate.apply(llama(), DuoAttention())


@pytest.mark.parametrize("table", [None, 3, [[1.0, 1.0]], [[1.0]] * 3, [["a", "b"]] * 3, {"0": [1.0, 1.0]}])
def test_damaged_profiles_are_refused(table: Any) -> None:
    model = llama()
    given = Profile("duo-attention", fingerprint(ModelShape.of(model)), {"gates": table})
    with pytest.raises(foveate.BadArgument, match="one gate per kv head"):
        foveate.apply(model, DuoAttention(), profile=given)


def test_defaults_are_the_papers() -> None:
    recipe = GateRecipe()
    assert (DuoAttention().sink, DuoAttention().recent) == (64, 256)
    assert (recipe.steps, recipe.lr, recipe.l1, recipe.full_term) == (2000, 0.02, 0.05, "teacher")


@pytest.mark.parametrize("bad", [{"sink": -1}, {"recent": -1}, {"sparsity": 1.5}, {"sparsity": -0.1}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        DuoAttention(**bad)


def test_leaves_the_other_slots_free() -> None:
    model, ids, steps = llama(), prompt(1, 61), prompt(1, 4, seed=1)
    both = DuoAttention(**SMALL) | Quest(page=4, budget=1.0)
    got, _ = applied(model, both, ids, steps, profile=profile(model))
    want, _ = applied(model, DuoAttention(**SMALL), ids, steps, profile=profile(model))
    assert_close(got, want, TOLERANCE)


# -- calibration -------------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """A tiny model with a tokenizer of words; keeps what was reported."""

    model: Any
    tokenizer: Any
    seed: int = 0
    total: int = 0
    notes: tuple[str, ...] = ()

    def progress(self, total: int, label: str) -> Callable[[int, str], None]:
        self.total = total

        def advance(steps: int, note: str) -> None:
            self.notes += (note,) * steps

        return advance


def test_calibration_gives_a_profile_that_plan_takes(tmp_path: Any) -> None:
    model = llama(layers=2, max_positions=256)
    probe = Probe(model, WordTokenizer())
    recipe = GateRecipe(steps=3, lr=0.1)
    made = DuoAttention().calibrate(probe, recipe=recipe)
    assert made.provenance["steps"] == 3
    assert (made.provenance["sink"], made.provenance["recent"]) == (16, 32)
    assert made.provenance["lengths"][1] == 256
    assert made.provenance["device"] == "cpu"
    assert probe.total == len(probe.notes) == 3
    assert all("distance" in note for note in probe.notes)
    again = load_profile(save_profile(made, tmp_path / "duo.json"))
    assert again == made
    _, cache = applied(model, DuoAttention(**SMALL), prompt(1, 61), profile=again)
    assert cache.nbytes < ModelShape.of(model).dense_kv_bytes(61)

    twice = DuoAttention().calibrate(Probe(model, WordTokenizer()), recipe=recipe)
    assert twice.data == made.data
    other = DuoAttention().calibrate(Probe(model, WordTokenizer(), seed=1), recipe=recipe)
    assert other.data != made.data


def test_calibration_refuses_what_plan_refuses() -> None:
    with pytest.raises(foveate.Refused, match="one latent vector"):
        DuoAttention().calibrate(Probe(tiny("deepseek-v3"), WordTokenizer()))


@pytest.mark.parametrize("longest", [513, 20])
def test_calibration_refuses_texts_that_do_not_fit(longest: int) -> None:
    with pytest.raises(foveate.BadArgument, match=rf"(longest|lengths)={longest}"):
        DuoAttention().calibrate(Probe(llama(), WordTokenizer()), longest=longest, recipe=GateRecipe(steps=1))


def test_the_shipped_profile_fits_its_model() -> None:
    """What `apply` finds for the built-in model: a gate for each of its kv heads, and how they were learned."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
    )
    shape = ModelShape.of(config)
    shipped = built_in_profile("duo-attention", shape)
    assert shipped is not None
    gates = torch.tensor(shipped.data["gates"])
    assert gates.shape == (30, 3)
    assert gates.min() >= 0
    assert gates.max() <= 1
    assert gates.std() > 0.1  # they tell heads apart
    made = shipped.provenance
    assert made["steps"] >= 100
    assert made["tokens"] >= made["steps"] * made["lengths"][0]
    assert made["lengths"][0] > 2 * (made["sink"] + made["recent"])
    assert {"seconds", "device", "dtype", "torch", "transformers", "date", "seed"} <= made.keys()
    roles = DuoAttention(budget=0.5).plan(shape, shipped, 2048)
    held = sum(3 * 2048 - len(role.extra.get("streaming", ())) * (2048 - 320) for role in roles)
    assert 0.49 < held / (90 * 2048) <= 0.5


def test_half_the_heads_streaming_at_2048_tokens_is_the_card_s_formula_in_memory() -> None:
    """Full heads hold T tokens, streaming heads sink + recent (and one for the next query); the process agrees."""
    model, ids = llama(layers=4, heads=4, kv_heads=2, head_dim=64, max_positions=2304), prompt(1, 2048)
    gates = profile(model, [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    dense, dense_used = sealed_memory(model, "dense", ids)
    cache, used = sealed_memory(model, DuoAttention(sink=64, recent=256, sparsity=0.5), ids, profile=gates)
    slot = 2 * 64 * 4
    formula = 4 * (2048 + 64 + 256) * slot
    assert abs(cache.nbytes - formula) <= 4 * 2 * 16 * slot
    assert dense_used - used == pytest.approx(dense.nbytes - cache.nbytes, rel=0.02)
