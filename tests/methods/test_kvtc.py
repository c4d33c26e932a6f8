"""KVTC: bytes, what is exact, how errors fall with bits, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from tests.closeness import assert_close, relative_rms
from tests.contract.recorded import steps, steps_in_place
from tests.contract.runs import left_padded, tokens
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, stores
from tests.methods.workbench import Workbench
from torch import Tensor
from transformers import LlamaConfig

import foveate
from foveate.attention import decoding
from foveate.cache import PackedColumn
from foveate.cache.transform import SCALE, losses
from foveate.evaluate.setting import parse_one
from foveate.heads.tap import Tap
from foveate.heads.transform_coding import Moments, collect, longest, sensitivity, share_out, water_filling
from foveate.methods import KVTC, Profile, Quest, SnapKV
from foveate.methods.profile import built_in_profile, from_json, to_json
from foveate.models import tiny
from foveate.models.shape import ModelShape

SMALL = {"bits": 4.5, "residual": 8, "sink": 2}


def profile_for(shape: ModelShape) -> Profile:
    """Bases of no meaning, for any model with heads of its own."""
    profile = KVTC().stand_in(shape)
    return Profile("kvtc", profile.model, profile.data, {}, profile.tensors)


def of(model: Any) -> Profile:
    """Bases of this very model."""
    return KVTC().calibrate(Workbench(model), texts=3, length=256)


def test_prompt_attention_is_exact_and_errors_fall_with_bits() -> None:
    model, ids, new = llama(), prompt(2, 61), prompt(2, 9, seed=1)
    want, _ = logits(model, ids, new)
    errors, profile = [], of(model)
    for bits in (3, 5, 8):
        got, _ = applied(model, KVTC(bits=bits, residual=4), ids, new, profile=profile)
        assert_close(got[:, :1], want[:, :1], TOLERANCE)
        errors.append(relative_rms(got[:, 1:], want[:, 1:]))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > TOLERANCE, errors
    assert errors[2] < 0.02


def test_calibrated_bases_lose_less_than_arbitrary_ones() -> None:
    model, ids, new = llama(head_dim=32), prompt(2, 61), prompt(2, 9, seed=1)
    want, _ = logits(model, ids, new)
    method, error = KVTC(bits=3, residual=4), {}
    for name, profile in (("own", of(model)), ("any", profile_for(ModelShape.of(model)))):
        got, _ = applied(model, method, ids, new, profile=profile)
        error[name] = relative_rms(got[:, 1:], want[:, 1:])
    assert error["own"] < 0.7 * error["any"], error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "new"), [(3, 2), (41, 7), (48, 1)])
def test_bytes_are_those_counted(dtype: torch.dtype, length: int, new: int) -> None:
    """Rows, an exact tail, the first tokens and the head's number; the bases are the model's."""
    model = llama(layers=1, head_dim=16, dtype=dtype)
    method = KVTC(bits=3.5, residual=8, sink=2)
    _, cache = applied(
        model, method, prompt(1, length), prompt(1, new, seed=1), profile=profile_for(ModelShape.of(model))
    )
    (band,), total = stores(cache)[0].bands, length + new
    rows = []
    for column in (band.k, band.v):
        assert isinstance(column, PackedColumn)
        assert column.packed.tolist() == [total // 8 * 8] * 2
        assert all(t.dtype == torch.uint8 for t in column.body)
        rows += [t.shape[2] for t in column.body]
        heads, first = column.fitted
        assert heads.tolist() == [0, 1]
        assert first.shape == (2, 2, 16)
        assert first.dtype == dtype
        assert torch.equal(column.read(total)[:, :2], first)
    assert sum(rows) == (2 * 16 * 3.5 / 8 if total >= 8 else 0)


def test_a_quarter_of_the_bytes_is_one() -> None:
    """The defaults at 1024 and 2048 tokens of the built-in model's shape in bfloat16, everything counted."""
    sizes = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, vocab_size=49152, max_position_embeddings=8192)
    config.dtype = torch.bfloat16
    shape = ModelShape.of(config)
    assert KVTC().share(shape, 1024) < 0.24
    assert KVTC().share(shape, 2048) < 0.23


def test_a_budget_is_met_and_used() -> None:
    model, ids = llama(layers=2, head_dim=32), prompt(1, 320)
    profile = profile_for(ModelShape.of(model))
    rows = []
    for share in (0.12, 0.15, 0.2, 1.0):
        _, cache = applied(model, KVTC(budget=share, residual=8, sink=1), ids, profile=profile)
        _, dense = applied(model, "dense", ids)
        (band,) = stores(cache)[0].bands
        if share == 1.0:
            assert not isinstance(band.k, PackedColumn)
            break
        assert 0.8 * share * dense.nbytes < cache.nbytes <= share * dense.nbytes * 1.02
        rows.append(sum(c.body[0].shape[2] for store in stores(cache) for c in (store.bands[0].k, store.bands[0].v)))
    assert rows == sorted(set(rows))
    with pytest.raises(foveate.FoveateError, match="cannot hold less"):
        applied(model, KVTC(budget=0.02), ids, profile=profile)


def test_rows_of_different_length_pack_as_alone() -> None:
    model = llama(dtype=torch.float64)
    profile = profile_for(ModelShape.of(model))
    ids, mask = prompt(2, 45), torch.ones(2, 45, dtype=torch.long)
    mask[0, :12] = 0
    with foveate.apply(model, KVTC(**SMALL), profile=profile), torch.no_grad():
        both = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0,
                              output_logits=True, return_dict_in_generate=True)  # fmt: skip
        alone = model.generate(ids[:1, 12:], max_new_tokens=12, do_sample=False, pad_token_id=0, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
    assert_close(torch.stack(both.logits)[:, :1], torch.stack(alone.logits), 1e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("partner", [None, SnapKV(budget=0.5, window=8), Quest(tokens=32)], ids=str)
def test_groups_and_compositions(heads: int, kv_heads: int, partner: Any) -> None:
    """Beside eviction it packs what is left, beside a reader of few tokens what is read; near what they give alone."""
    model, ids, new = tiny("llama", layers=2, heads=heads, kv_heads=kv_heads), prompt(1, 77), prompt(1, 5, seed=1)
    profile = of(model)
    want, other = applied(model, partner or "dense", ids, new)
    method = KVTC(bits=7, residual=8)
    got, cache = applied(model, partner | method if partner else method, ids, new, profile=profile)
    assert relative_rms(got, want) < 0.1
    assert [held(s) for s in stores(cache)] == [held(s) for s in stores(other)]
    assert all(isinstance(band.k, PackedColumn) for store in stores(cache) for band in store.bands)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "partner", "settings"),
    [(8, 1, None, SMALL), (6, 2, SnapKV(budget=30, window=7), {"bits": 3, "residual": 1, "sink": 0})],
)
def test_recorded_steps_read_codes(heads: int, kv_heads: int, partner: Any, settings: Any, seed: int) -> None:
    """Of rows of different length, as on a GPU but in Triton's interpreter: nothing is unpacked, and tokens are packed
    on the way."""
    pytest.importorskip("triton")
    if not decoding._interpreted():
        pytest.skip("kernels run here in Triton's interpreter")
    net, method = llama(heads=heads, kv_heads=kv_heads, layers=1), KVTC(**settings)
    profile = profile_for(ModelShape.of(net))
    ids, mask = left_padded([tokens(seed, 33), tokens(seed + 1, 61)])
    new = torch.stack([tokens(seed + 2, 10), tokens(seed + 3, 10)])
    with foveate.apply(net, partner | method if partner else method, profile=profile) as handle:
        ordinary, want = steps(net, handle, ids, mask, new)
        cache, got = steps_in_place(net, handle, ids, mask, new)
        assert cache.step is not None
    assert_close(got, want, TOLERANCE)
    for mine, other in zip(stores(cache), stores(ordinary), strict=True):
        for a, b in ((x.k, y.k) for x, y in zip(mine.bands, other.bands, strict=True)):
            assert isinstance(a, PackedColumn)
            assert isinstance(b, PackedColumn)
            assert (a.packed == b.packed).all()
            assert a.packed.max() > 40 - 30 * bool(partner)


def test_sliding_layers_are_left_alone() -> None:
    model = tiny("gemma3", layers=4, heads=4, kv_heads=2)
    _, cache = applied(model, KVTC(**SMALL), prompt(1, 61), prompt(1, 4, seed=1), profile=of(model))
    packed = {isinstance(band.k, PackedColumn) for store in stores(cache) for band in store.bands}
    assert True in packed


def test_calibration_makes_a_profile_that_serves() -> None:
    model = llama()
    bench = Workbench(model)
    profile = KVTC().calibrate(bench, texts=3, length=256)
    assert bench.steps == bench.total == 3 + profile.provenance["asked"]
    again = KVTC().calibrate(Workbench(model), texts=3, length=256)
    assert all(torch.equal(x, again.tensors[name]) for name, x in profile.tensors.items())
    assert profile.provenance["tokens"] == 32 + 64 + 128
    assert profile.provenance["longest"] == 128
    loaded = from_json(to_json(profile))
    got, _ = applied(model, KVTC(), prompt(1, 61), prompt(1, 4, seed=1), profile=loaded)
    assert got.isfinite().all()


def test_moments_are_of_cached_keys_and_values() -> None:
    model, ids = llama(layers=2), prompt(1, 37)
    seen: list[tuple[Tensor, Tensor]] = []

    def serve(layer: Any) -> Tensor:
        seen.append((layer.k[0, :, 4:].double(), layer.v[0, :, 4:].double()))
        return layer.attend()

    with torch.no_grad(), Tap(model, serve):
        model.model(ids, use_cache=False)
    found = collect(model, [ids[0].tolist(), ids[0].tolist()], 4, lambda steps, how: None)
    for index, (k, v) in enumerate(seen):
        moments = found[index]
        assert isinstance(moments, Moments)
        for (mean, covariance), x in ((moments.keys, k), (moments.values, v)):
            assert_close(mean, x.mean(1), 1e-6)
            assert_close(covariance, torch.stack([torch.cov(y.T, correction=0) for y in x]), 1e-5)


def test_sensitivity_says_how_far_predictions_move() -> None:
    """Half of the metric's cost of a small error is the divergence that it makes, on average over texts."""
    model, generator = llama(layers=2, dtype=torch.float64), torch.Generator().manual_seed(0)
    texts = [prompt(1, 24, seed=seed)[0].tolist() for seed in range(60)]
    costs = sensitivity(model, [(ids, 1) for ids in texts for _ in range(8)], 0, 3, lambda steps, how: None)
    assert abs(sum(float(x.diagonal(dim1=1, dim2=2).sum()) for x in costs.values()) - 1) < 1e-6
    found = {}
    for side in costs:
        moved = torch.tensor(0.0, dtype=torch.float64)
        for ids in texts:
            likely = []
            for size in (0.0, 1e-3):

                def serve(layer: Any, size: float = size, side: tuple[int, str] = side) -> Tensor:
                    if layer.shape.index != side[0]:
                        return layer.attend()
                    x = layer.k if side[1] == "keys" else layer.v
                    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype) * size
                    return replace(layer, **{side[1][0]: x + noise}).attend()

                with torch.no_grad(), Tap(model, serve):
                    likely.append(model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1))
            moved += (likely[0].exp() * (likely[0] - likely[1])).sum()
        found[side] = float(moved)
    total = sum(found.values())
    for side, moved in found.items():
        want = float(costs[side].diagonal(dim1=1, dim2=2).sum())
        assert abs(moved / total - want) < 0.35 * want + 0.01, (side, moved / total, want)


def test_bytes_go_where_errors_cost_most() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.rand(heads, 3, 16, generator=generator) + 0.1 for heads in (2, 2, 1)]
    sides = tuple((x, (cost,) * len(x)) for x, cost in zip(numbers, (1.0, 100.0, 1.0), strict=True))
    least = share_out(sides, 0)
    assert least == (1, 1, 1)
    rows = share_out(sides, 40)
    assert rows[1] > rows[0] + 2
    assert 38 <= 2 * rows[0] + 2 * rows[1] + rows[2] <= 40
    assert share_out(sides, 10_000) == (longest(16),) * 3

    def lost(rows: Sequence[int]) -> float:
        total = 0.0
        for (x, (cost, *_)), row in zip(sides, rows, strict=True):
            bits = water_filling(x[:, 2].double().square(), max(0, 8 * row - SCALE))
            total += cost * float((x[:, 2].double().square() * torch.tensor(losses()).double()[bits]).sum())
        return total

    for more, less in permutations(range(3), 2):  # no exchange of bytes does better
        other = list(rows)
        other[more] += len(numbers[less])
        other[less] -= len(numbers[more])
        assert other[less] < 1 or lost(other) >= lost(rows) * (1 - 1e-9)


def test_the_shipped_profile_fits_the_built_in_model() -> None:
    sizes = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    shape = ModelShape.of(LlamaConfig(**sizes, vocab_size=49152, max_position_embeddings=8192))
    shipped = built_in_profile("kvtc", shape)
    assert shipped is not None
    assert shipped.provenance["longest"] == 4096
    roles = KVTC().plan(shape, shipped, 1024)
    rows = [side.row for role in roles for side in role.extra.values()]
    assert sum(rows) == 30 * 2 * 64 * 3.5 / 8
    assert max(rows) > 1.5 * min(rows)
    for role in roles:
        for side in role.extra.values():
            assert (side.bits.sum(1) == 8 * side.row - 5).all()
            assert int(side.bits.max()) > int(side.bits.min())


def test_what_does_not_fit_is_refused() -> None:
    model = llama()
    with pytest.raises(foveate.BadArgument, match="calibrate"):
        foveate.apply(model, KVTC())
    latent = tiny("deepseek-v3", heads=4, kv_heads=4)
    with pytest.raises(foveate.Refused, match="latent"):
        foveate.apply(latent, KVTC(), profile=profile_for(ModelShape.of(latent)))
    with pytest.raises(foveate.Refused, match="latent"):
        KVTC().calibrate(Workbench(latent))
    with pytest.raises(foveate.BadArgument, match="length"):
        KVTC().calibrate(Workbench(model), length=8)
    with pytest.raises(foveate.BadArgument, match="texts"):
        KVTC().calibrate(Workbench(model), texts=0)


@pytest.mark.parametrize(
    "bad", [{"bits": 0}, {"bits": 17}, {"bits": (4, 4)}, {"bits": True}, {"residual": 0}, {"sink": 9}]
)
def test_bad_parameters(bad: dict[str, Any]) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        KVTC(**bad)


def test_settings_survive_writing() -> None:
    method = KVTC(bits=3.25, sink=1)
    assert method.settings() == {"bits": 3.25, "sink": 1}
    assert parse_one("kvtc(bits=3.25, sink=1)") == method
