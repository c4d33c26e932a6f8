"""KIVI: must-hold tests of its card."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
import torch
from tests.closeness import assert_close, relative_rms
from tests.contract.recorded import recording, steps
from tests.contract.runs import tokens
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, stores, watching
from torch import Tensor

import foveate
from foveate.attention import decoding
from foveate.cache import PackedColumn
from foveate.cache.quantised import Quantised, Rotated, hadamard
from foveate.engine import captured
from foveate.evaluate.setting import parse_one
from foveate.methods import KIVI, StreamingLLM

SMALL = {"bits": 4, "group": 4, "residual": 8}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("scale", [1.0, 300.0, 1e-3])
def test_error_is_at_most_half_a_step(bits: int, per_channel: bool, scale: float) -> None:
    x = torch.randn(3, 64, 24) * scale + scale * torch.randn(24) * 5
    side = Quantised(bits, 8, per_channel, tail=0, flush=8)
    back = side.unpack(side.pack(x), torch.float32)
    grouped = x.view(3, 8, 8, 24).transpose(2, 3) if per_channel else x.view(3, 64, 3, 8)
    step = (grouped.amax(-1, keepdim=True) - grouped.amin(-1, keepdim=True)) / (2**bits - 1)
    step = step.expand_as(grouped)
    step = step.transpose(2, 3).reshape_as(x) if per_channel else step.reshape_as(x)
    # float16 holds the zero point and the scale to 11 bits; both are rounded outwards.
    slack = x.abs().amax() * 2**-10 + step * 2**-9
    assert ((x - back).abs() <= step / 2 + slack).all()
    assert relative_rms(back, x) > 1e-4


def test_a_constant_group_is_exact_to_float16() -> None:
    side = Quantised(2, 8, True, 0, 8)
    x = torch.full((1, 8, 4), 3.25)
    assert torch.equal(side.unpack(side.pack(x), torch.float32), x)


def test_identity_is_dense() -> None:
    model, ids, steps = llama(), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    got, _ = applied(model, KIVI(bits=16), ids, steps)
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize(("length", "steps"), [(41, 0), (41, 7), (48, 0), (48, 1), (5, 2), (7, 9)])
def test_residual_lengths(length: int, steps: int) -> None:
    _, cache = applied(
        llama(), KIVI(group=4, residual=8), prompt(1, length), prompt(1, steps, seed=1) if steps else None
    )
    total = length + steps
    for store in stores(cache):
        (band,) = store.bands
        assert isinstance(band.k, PackedColumn)
        assert isinstance(band.v, PackedColumn)
        assert (total - band.k.packed == total % 8).all()
        assert (total - band.v.packed == min(total, 8)).all()


def by_groups(x: Tensor, along: int) -> Tensor:
    """x [P, n, D] in two bits, group by group of four along tokens (1) or channels (2), by the formula."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for group, made in zip(x.double().split(4, along), out.split(4, along), strict=True):
        zero, high = group.amin(along, keepdim=True), group.amax(along, keepdim=True)
        made.copy_(zero + (high - zero) / 3 * ((group - zero) * 3 / (high - zero)).round())
    return out


def test_keys_are_grouped_along_tokens_and_values_along_channels(seed: int) -> None:
    """As they are cached (rotated), whole groups of `residual` keys at once and values one by one: in the first layer
    dense tokens are the truth."""
    model, ids, new = llama(layers=1), tokens(seed, 1, 43), tokens(seed + 1, 1, 9)
    _, dense = applied(model, "dense", ids, new)
    _, cache = applied(model, KIVI(bits=2, group=4, residual=8), ids, new)
    (exact,), (band,) = stores(dense)[0].bands, stores(cache)[0].bands
    for got, x, packed, along in ((band.keys(), exact.keys(), 48, 1), (band.values(), exact.values(), 44, 2)):
        assert torch.equal(got[:, packed:52], x[:, packed:52])
        error = {axis: relative_rms(got[:, :packed], by_groups(x[:, :packed], axis)) for axis in (1, 2)}
        # Scales and zero points in float16 send a few codes to the level beside.
        assert error[along] < 0.4 * error[3 - along], error


def test_a_step_is_one_softmax_over_packed_and_exact_tokens(seed: int) -> None:
    model, ids, new = llama(layers=1), tokens(seed, 2, 45), tokens(seed + 1, 2, 1)
    with foveate.apply(model, KIVI(bits=2, group=4, residual=8)) as handle, torch.no_grad(), watching() as seen:
        cache = handle.cache()
        cache.expect(45)
        model(ids, past_key_values=cache)
        (band,) = stores(cache)[0].bands
        before = [x[:, :45].clone() for x in (band.keys(), band.values())]
        model(new, past_key_values=cache)
    own = (band.keys()[:, 45:46], band.values()[:, 45:46])
    k, v = (torch.cat(x, dim=1).unflatten(0, (2, 2)).repeat_interleave(3, 1) for x in zip(before, own, strict=True))
    want = (seen[-1]["q"] @ k.mT * seen[-1]["how"].scale).softmax(-1) @ v
    assert_close(seen[-1]["result"].out, want, TOLERANCE)


def test_defaults_are_the_papers() -> None:
    method = KIVI()
    assert (method.bits, method.group, method.residual, method.early, method.hadamard) == (4, 32, 128, None, "none")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_of_the_packed_body(bits: int) -> None:
    """bits / 8 per element and 4 bytes per group, keys and values; nothing else is held for packed tokens."""
    _, cache = applied(llama(layers=1, head_dim=32), KIVI(bits=bits, group=8, residual=16), prompt(1, 64))
    (band,) = stores(cache)[0].bands
    keys = sum(t.numel() * t.element_size() for t in band.k.body)
    values = sum(t.numel() * t.element_size() for t in band.v.body)
    assert keys == 2 * 64 * 32 * bits / 8 + 2 * 64 * 32 / 8 * 4
    assert values == 2 * 48 * 32 * bits / 8 + 2 * 48 * 32 / 8 * 4


def test_prompt_attention_is_exact_and_decode_reads_what_is_held() -> None:
    model, ids, steps = llama(), prompt(1, 61), prompt(1, 5, seed=1)
    want, _ = logits(model, ids, steps)
    errors = []
    for bits in (2, 3, 4, 8):
        got, _ = applied(model, KIVI(bits=bits, group=4, residual=8), ids, steps)
        assert_close(got[:, :1], want[:, :1], TOLERANCE)
        errors.append(relative_rms(got[:, 1:], want[:, 1:]))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > TOLERANCE


def test_two_bit_keys_per_token_collapse() -> None:
    """The negative control: outlier channels ruin per-token groups of keys, which is why keys go per channel."""
    x = torch.randn(2, 128, 32)
    x[..., :2] *= 40
    error = {}
    for per_channel in (True, False):
        side = Quantised(2, 32, per_channel, 0, 32)
        small = side.unpack(side.pack(x), torch.float32)[..., 2:]
        error[per_channel] = relative_rms(small, x[..., 2:])
    assert error[False] > 3 * error[True]


def test_rows_of_different_length_pack_as_alone() -> None:
    model = llama()
    ids, mask = prompt(2, 45), torch.ones(2, 45, dtype=torch.long)
    mask[0, :12] = 0
    with foveate.apply(model, KIVI(group=4, residual=8)), torch.no_grad():
        both = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0,
                              output_logits=True, return_dict_in_generate=True)  # fmt: skip
        alone = model.generate(ids[:1, 12:], max_new_tokens=12, do_sample=False, pad_token_id=0, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
    assert_close(torch.stack(both.logits)[:, :1], torch.stack(alone.logits), 1e-4)


def test_budget_chooses_the_most_bits_that_meet_it() -> None:
    model = llama(head_dim=32)
    with foveate.apply(model, "dense") as handle:
        chosen = {}
        for share in (0.2, 0.3, 0.5, 1.0):
            binding = handle.bind(KIVI(group=32, residual=32), budget=share)
            chosen[share] = binding.transient_plan(512)[0].roles["kivi"].extra["bits"][0]
        # float32 model: 8 bits cost 9/32 of the dense cache before the exact tail, 4 bits 5/32, 2 bits 3/32
        assert chosen == {0.2: 4, 0.3: 4, 0.5: 8, 1.0: 16}
        with pytest.raises(foveate.Infeasible, match="2 bits"):
            handle.bind(KIVI(group=32, residual=32), budget=0.1).check(256)


def test_windowed_heads_stay_exact() -> None:
    _, cache = applied(llama(), StreamingLLM(sink=2, recent=9) | KIVI(group=4, residual=4), prompt(1, 41))
    assert not any(isinstance(band.k, PackedColumn) for store in stores(cache) for band in store.bands)


def test_two_numbers_are_of_keys_and_of_values() -> None:
    """(4, 2) bits in groups of (8, 16): the body holds just that; the first half of the layers may have others."""
    method = KIVI(bits=(4, 2), group=(8, 16), residual=16, early=3)
    _, cache = applied(llama(layers=2, head_dim=32), method, prompt(1, 64))
    for store, (bits_k, bits_v) in zip(stores(cache), [(3, 3), (4, 2)], strict=True):
        (band,) = store.bands
        keys = sum(t.numel() * t.element_size() for t in band.k.body)
        values = sum(t.numel() * t.element_size() for t in band.v.body)
        assert keys == 2 * 64 * 32 * bits_k / 8 + 2 * 64 * 32 / 8 * 4
        assert values == 2 * 48 * 32 * bits_v / 8 + 2 * 48 * 32 / 16 * 4


def test_one_side_may_stay_exact() -> None:
    _, cache = applied(llama(), KIVI(bits=(16, 4), group=4, residual=8), prompt(1, 41))
    for store in stores(cache):
        (band,) = store.bands
        assert not isinstance(band.k, PackedColumn)
        assert isinstance(band.v, PackedColumn)


def test_settings_are_read_back_as_written() -> None:
    text = "kivi(bits=(4, 3), group=64, residual=16, early=(3, 2), hadamard='both')"
    method = parse_one(text)
    assert method == KIVI(bits=(4, 3), early=(3, 2), group=64, residual=16, hadamard="both")
    assert KIVI(**json.loads(json.dumps(method.settings()))) == method


def test_mixed_channels_share_the_load_of_outliers() -> None:
    """Values with a few large channels lose less at two bits once they are mixed, and keys' constant channels cost
    nothing once their mean is taken off."""
    x = torch.randn(2, 128, 64)
    x[..., :3] *= 12
    plain = Quantised(2, 64, False, 0, 1)
    mixed = Rotated(plain, centred=False)
    assert relative_rms(mixed.unpack(mixed.pack(x), torch.float32), x) < 0.8 * relative_rms(
        plain.unpack(plain.pack(x), torch.float32), x
    )
    offset = torch.randn(64) * 40
    centred, moved = Rotated(plain, centred=True), torch.randn(2, 128, 64)
    learned = centred.fit(moved + offset, torch.tensor([128, 128]), None)
    back = centred.unpack(centred.pack(moved + offset, *learned), torch.float32, *learned)
    assert relative_rms(back - offset, moved) < 0.5
    matrix = hadamard(64, torch.device("cpu"))
    assert_close(matrix @ matrix, torch.eye(64), 1e-6)


@pytest.mark.parametrize("hadamard", ["values", "both"])
def test_mixed_channels_decode_near_dense(hadamard: Literal["values", "both"]) -> None:
    model, ids, steps = llama(), prompt(2, 61), prompt(2, 9, seed=1)
    want, _ = logits(model, ids, steps)
    errors = []
    for bits in (2, 4, 8):
        got, _ = applied(model, KIVI(bits=bits, group=4, residual=8, hadamard=hadamard), ids, steps)
        assert_close(got[:, :1], want[:, :1], TOLERANCE)
        errors.append(relative_rms(got[:, 1:], want[:, 1:]))
    assert errors[0] > errors[1] > errors[2] > TOLERANCE
    assert errors[2] < 0.02


def test_mixing_needs_a_power_of_two() -> None:
    with pytest.raises(foveate.Refused, match="powers of two"):
        foveate.apply(llama(head_dim=24), KIVI(hadamard="both"))


@pytest.mark.parametrize(
    "bad", [{"bits": 5}, {"bits": (4, 2, 2)}, {"early": (4, 5)}, {"group": 0}, {"residual": 48, "group": 32}]
)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        KIVI(**bad)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 2}, {"bits": (16, 8)}, {"bits": 4, "hadamard": "values"}],
)
def test_a_recorded_step_packs_as_the_ordinary_one(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel where it knows the layout, by torch elsewhere: bit for bit what is packed otherwise."""
    pytest.importorskip("triton")
    if not decoding._interpreted():
        pytest.skip("kernels run here in Triton's interpreter")
    model, ids, new = llama(layers=1), prompt(1, 21), prompt(1, 12, seed=1)
    with foveate.apply(model, KIVI(group=8, residual=8, **settings)) as handle:
        ordinary, want = steps(model, handle, ids, None, new)
        monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (True, ""))
        with recording(model, handle, by=captured.record):
            cache, got = steps(model, handle, ids, None, new)
        assert cache.step is not None
        bands = [band for store in cache.step.call.stores.values() for band in store.bands]
        mixed = "hadamard" in settings
        assert all((band.sides is None) is mixed for band in bands)
        assert_close(got, want, TOLERANCE)
        for mine, other in zip(stores(cache), stores(ordinary), strict=True):
            for side in ("k", "v"):
                a, b = (getattr(store.bands[0], side) for store in (mine, other))
                if isinstance(a, PackedColumn):
                    assert (a.packed == b.packed).all()
                    most = int(a.packed.max())
                    assert_close(a.unpacked(most).float(), b.unpacked(most).float(), 0.05)
