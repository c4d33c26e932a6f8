"""SALE: must-hold tests of its card."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.families import family_model
from tests.heads.words import WordTokenizer
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, stores, watching
from torch import Tensor
from transformers import LlamaConfig

import foveate
from foveate.attention import Partial
from foveate.heads.thresholds import Halving, _lower
from foveate.methods import H2O, SALE, Profile
from foveate.methods.policies import lowbit
from foveate.methods.policies.lowbit import block_peaks, low_bit
from foveate.methods.profile import built_in_profile, fingerprint, load_profile, save_profile
from foveate.models import tiny
from foveate.models.shape import ModelShape

SMALL = {"q_block": 8, "k_block": 4, "local": 8, "tile": 4, "dense_below": 16}
FULL = {"dense_below": 4096}


def profile_for(shape: ModelShape) -> Profile:
    """Thresholds of no meaning that differ between heads, for any model."""
    table = [[0.5 + head % 4 for head in range(layer.num_heads)] for layer in shape.layers]
    return Profile("sale", fingerprint(shape), {"tau": table})


def same(model: Any, tau: float) -> Profile:
    """One threshold for all heads."""
    shape = ModelShape.of(model)
    return Profile("sale", fingerprint(shape), {"tau": [[tau] * layer.num_heads for layer in shape.layers]})


def run(ids: Tensor, model: Any, tau: float, steps: Tensor | None = None, **kwargs: Any) -> list[dict[str, Any]]:
    with watching() as seen:
        applied(model, SALE(**{**SMALL, **kwargs}), ids, steps, profile=same(model, tau))
    return seen


def blocks(lists: Any, count: int) -> Tensor:
    """bool [B, h, query blocks, key blocks]."""
    out = torch.zeros(*lists.shape[:3], count + 1, dtype=torch.bool)
    return out.scatter(-1, torch.where(lists < 0, count, lists).long(), True)[..., :count]


def exact_and_rest(read: dict[str, Any], size: int = 4) -> tuple[Tensor, Tensor]:
    partial, rest = read["parts"]
    assert isinstance(partial, Partial)
    count = -(-read["store"].bands[0].used // size)
    exact, kept = blocks(partial.over.lists, count), blocks(rest.lists, count)
    return exact.repeat_interleave(kept.shape[1] // exact.shape[1], 1), kept


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_zero_thresholds_are_dense(heads: int, kv_heads: int) -> None:
    model, ids = llama(heads=heads, kv_heads=kv_heads), prompt(2, 93)
    want, _ = logits(model, ids)
    with watching() as seen:
        got, _ = applied(model, SALE(**SMALL), ids, profile=same(model, 0.0))
    assert_close(got, want, TOLERANCE)
    for read in seen:
        exact, rest = exact_and_rest(read)
        assert rest.any()
        assert not (exact & rest).any()


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3", "qwen3"])
def test_zero_thresholds_are_dense_in_every_family(family: str) -> None:
    model, ids = tiny(family, heads=4, kv_heads=2), prompt(1, 77)
    want, _ = logits(model, ids, prompt(1, 3, seed=1))
    got, _ = applied(model, SALE(**SMALL), ids, prompt(1, 3, seed=1), profile=same(model, 0.0))
    assert_close(got, want, TOLERANCE)


def uncoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowbit, "low_bit", lambda x, tile: (x, torch.ones(x.shape[:2])))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_centring_changes_no_logit(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    """Without quantisation the estimates are the logits, so a block's peak is their true maximum."""
    uncoded(monkeypatch)
    q, k, lse = torch.randn(6, 21, 16) + 2, torch.randn(2, 37, 16) - 3, torch.randn(6, 21)
    got = block_peaks(q, k, lse, q_block=8, k_block=4, tile=4, scale=0.3, softcap=softcap)
    logit = q @ k.repeat_interleave(3, 0).mT * 0.3
    logit = logit if softcap is None else (logit / softcap).tanh() * softcap
    away = logit - lse[..., None]
    for i in range(3):
        for j in range((16 + 8 * i) // 4):  # blocks in the past of the whole query block
            want = away[:, 8 * i : 8 * i + 8, 4 * j : 4 * j + 4].amax((1, 2))
            assert_close(got[:, i, j], want, 1e-5)


@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_peaks_do_not_depend_on_how_much_is_in_memory(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    q, k, lse = torch.randn(6, 45, 16), torch.randn(2, 61, 16), torch.randn(6, 45)
    how: dict[str, Any] = {"q_block": 8, "k_block": 4, "tile": 4, "scale": 0.3}
    want = block_peaks(q, k, lse, **how)
    monkeypatch.setattr(lowbit, "at_once", lambda device: at_once)
    got = block_peaks(q, k, lse, **how)
    past = (torch.arange(16) < (16 + 8 * torch.arange(6)[:, None]) // 4).expand(6, -1, -1)
    assert torch.equal(got[past], want[past])


@pytest.mark.parametrize("tile", [1, 4, 16])
def test_codes_are_four_bits_and_close(tile: int) -> None:
    x = torch.randn(3, 37, 16) * torch.rand(3, 37, 1)
    x[1, :16] = 0
    codes, scale = low_bit(x, tile)
    assert set(codes.unique().tolist()) <= set(range(-7, 8))
    half = scale.double()[..., None] / 2
    assert (x - codes.double() * 2 * half).abs().le(half * (1 + 1e-6)).all()  # a quotient near a border is rounded
    for i in range(0, 37, tile):
        assert (scale[:, i : i + tile] == scale[:, i : i + 1]).all()
        assert_close(scale[:, i], x[:, i : i + tile].abs().amax((1, 2)) / 7, 1e-6)


def captured(ids: Tensor, model: Any) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Queries and keys of the last layer under dense attention, and what makes logits of their products."""
    with watching() as seen:
        applied(model, "dense", ids)
    read = seen[-1]
    scale, cap = read["how"].scale, read["how"].softcap
    keys = read["store"].bands[0].keys().repeat_interleave(3, 0)
    return read["q"][0], keys, lambda x: x * scale if cap is None else (x * scale / cap).tanh() * cap


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("length", "local"), [(93, 8), (96, 12)])
@pytest.mark.parametrize("coded", [True, False])
def test_reads_the_blocks_with_a_pair_above_the_threshold(
    monkeypatch: pytest.MonkeyPatch, family: str, length: int, local: int, coded: bool
) -> None:
    """Brute force over tokens: mass of sink and window, weight of each estimated pair beside it. Gemma 2 caps its
    logits; its first layer slides and is left alone."""
    if not coded:
        uncoded(monkeypatch)
    model = llama(layers=1) if family == "llama" else family_model(family, heads=6, kv_heads=2)
    ids, tau = prompt(1, length), 1.5 if family == "llama" else 0.5
    q, k, logits_of = captured(ids, model)
    exact, rest = exact_and_rest(run(ids, model, tau, local=local)[-1])
    logit = logits_of(q @ k.mT)
    mean_q, mean_k = q.mean(1, keepdim=True), k.mean(1, keepdim=True)
    coded_q, coded_k = (c * s[..., None] for c, s in (lowbit.low_bit(x, 4) for x in (q - mean_q, k - mean_k)))
    estimate = logits_of(coded_q @ coded_k.mT + mean_q @ (k - mean_k).mT + q @ mean_k.mT)
    for i in range(-(-length // 8)):
        first, last = 8 * i, min(8 * i + 8, length) - 1
        window = max(0, (first - local) // local * local)
        near = {0} | set(range(window // 4, last // 4 + 1))
        assert set(exact[0, 0, i].nonzero().flatten().tolist()) == near
        for head in range(6):
            kept = set()
            for j in set(range(last // 4)) - near:
                for row in range(first, last + 1):
                    tokens = [t for b in near for t in range(4 * b, 4 * b + 4) if t <= row]
                    mass = logit[head, row, tokens].exp().sum()
                    if (estimate[head, row, 4 * j : 4 * j + 4].exp() / mass > tau).any():
                        kept.add(j)
            assert set(rest[0, head, i].nonzero().flatten().tolist()) == kept
    assert rest.any()


def test_a_higher_threshold_never_adds_a_block() -> None:
    ids, model = prompt(1, 93), llama(layers=1)
    kept = [exact_and_rest(run(ids, model, tau)[0])[1] for tau in (0.1, 0.7, 3.0, 12.0)]
    for low, high in pairwise(kept):
        assert not (high & ~low).any()
        assert high.sum() < low.sum()


def test_each_query_head_has_its_own_threshold() -> None:
    model, ids = llama(layers=1), prompt(1, 93)
    shape = ModelShape.of(model)
    table = [[0.0, 1e9, 2.0, 2.0, 1e9, 0.0]]
    with watching() as seen:
        applied(model, SALE(**SMALL), ids, profile=Profile("sale", fingerprint(shape), {"tau": table}))
    exact, rest = exact_and_rest(seen[0])
    counts = rest[0].sum((1, 2))
    causal = torch.ones(93, 93).tril()[:, ::4].unflatten(0, (-1, 1)).amax(1)
    whole = torch.stack([causal[8 * i : 8 * i + 8].amax(0) for i in range(12)]).bool()
    assert counts[1] == counts[4] == 0
    for head in (0, 5):
        assert torch.equal(rest[0, head] | exact[0, 0], whole)
    assert 0 < counts[2] < counts[0]


def test_short_prompts_and_decode_are_dense() -> None:
    model, ids, steps = llama(), prompt(1, 33), prompt(1, 3, seed=1)
    assert all(r["parts"].dense for r in run(ids, model, 9.0, steps, dense_below=33))
    seen = run(ids, model, 9.0, steps, dense_below=32)
    assert [isinstance(r["parts"], list) for r in seen] == [True] * 3 + [False] * 9


def test_sums_over_keys_see_the_exact_part_too() -> None:
    """A heavy-hitter method beside it: every real query hands out a mass of one."""
    model = llama(layers=1)
    _, cache = applied(model, SALE(**SMALL) | H2O(budget=1.0), prompt(1, 61), profile=same(model, 0.3))
    for band in stores(cache)[0].bands:
        assert_close(band.tags["columns"].data[:, :61, 0].sum(-1), torch.full((2,), 3.0 * 61), 1e-4)


# -- calibration -------------------------------------------------------------------------------------------------------


class Probe:
    """A tiny model with a tokenizer of words; counts what was reported."""

    def __init__(self, model: Any, seed: int = 0) -> None:
        self.model, self.tokenizer, self.seed, self.steps = model, WordTokenizer(), seed, 0

    def progress(self, total: int, label: str) -> Callable[[int, str], None]:
        def advance(steps: int, note: str) -> None:
            self.steps += steps

        return advance


def taus(model: Any, theta: float, samples: int = 2, **kwargs: Any) -> Tensor:
    made = SALE(**SMALL).calibrate(Probe(model), samples=samples, longest=160, rule=Halving(theta=theta, **kwargs))
    return torch.tensor(made.data["tau"])


def test_a_smaller_error_means_smaller_thresholds() -> None:
    model = llama(layers=1)
    found = [taus(model, theta, start=16.0) for theta in (1e6, 2.0, 1.0, 1e-9)]
    for loose, tight in pairwise(found):
        assert (tight <= loose).all()
    assert (found[0] == 16).all()
    assert (found[-1] == 0).all()
    assert len(found[1].unique()) > 1  # heads differ
    assert set((found[1] / 16).log2().flatten().tolist()) <= {-float(i) for i in range(17)}


def test_thresholds_are_halved_until_they_hold_or_are_zero() -> None:
    """An error of theta itself is too large; what would fall below the least is dense."""
    holds = torch.tensor([1.0, 0.0011, 1.3e-4, 1.1e-4])
    wrong, tau = torch.full((1, 4, 10, 2), 0.25), torch.full((4,), 0.008)

    def sparse(heads: Tensor, tried: Tensor) -> Tensor:
        return wrong[:, heads] * (tried > holds[heads])[:, None, None]

    _lower(torch.zeros_like(wrong), sparse, tau, Halving(theta=0.5))
    assert torch.equal(tau, 0.008 / torch.tensor([1.0, 8.0, 64.0, torch.inf]))


def test_more_texts_only_lower_thresholds() -> None:
    model = llama(layers=1)
    assert (taus(model, 1.0, samples=3, start=16.0) <= taus(model, 1.0, samples=1, start=16.0)).all()


def test_calibrated_heads_are_within_the_error(tmp_path: Any) -> None:
    """On the calibration's own text, head by head, in a run under the profile."""
    from foveate.heads.passkeys import passkey_examples

    model, rule = llama(layers=1), Halving(theta=1.0, start=16.0)
    probe = Probe(model)
    made = SALE(**SMALL).calibrate(probe, samples=1, longest=160, rule=rule)
    assert probe.steps == 1
    assert {"theta", "start", "least", "seconds", "date", "seed"} <= made.provenance.keys()
    again = load_profile(save_profile(made, tmp_path / "sale.json"))
    assert again == made
    ids = torch.tensor([next(passkey_examples(probe.tokenizer, (160,), 0)).ids])
    outs = []
    for method in (SALE(**SMALL), "dense"):
        with watching() as seen:
            applied(model, method, ids, profile=made if method != "dense" else None)
        outs.append(seen[0]["result"].out)
    error = (outs[0] - outs[1]).abs().sum((0, 2, 3)) / 160
    assert (error > 0).all()
    assert (error < 1.0).all()


@pytest.mark.parametrize("longest", [20, 513])
def test_texts_that_do_not_fit_are_refused(longest: int) -> None:
    with pytest.raises(foveate.BadArgument, match=f"longest={longest}"):
        SALE(**SMALL).calibrate(Probe(llama()), longest=longest)


def test_the_shipped_profile_fits_its_model() -> None:
    """What `apply` finds for the built-in model: a threshold for each of its query heads, and how they were found."""
    sizes = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**sizes, vocab_size=49152, max_position_embeddings=8192)
    shipped = built_in_profile("sale", ModelShape.of(config))
    assert shipped is not None
    table = torch.tensor(shipped.data["tau"])
    assert table.shape == (30, 9)
    assert set(table.unique().tolist()) <= {0.0, *(x for i in range(7) for x in torch.tensor([0.008 / 2**i]).tolist())}
    assert shipped.provenance["theta"] == 0.4
    assert len(table.unique()) > 1


def test_defaults_are_those_of_the_released_code() -> None:
    method, rule = SALE(), Halving()
    assert (method.q_block, method.k_block, method.local, method.tile, method.dense_below) == (64, 32, 128, 16, 1024)
    assert (rule.theta, rule.start, rule.least) == (0.4, 0.008, 1e-4)


@pytest.mark.parametrize("table", [None, {}, {"tau": [[0.1]]}, {"tau": [[-1.0] * 6] * 3}, {"tau": "x"}])
def test_damaged_profiles_are_refused(table: Any) -> None:
    model = llama()
    made = None if table is None else Profile("sale", fingerprint(ModelShape.of(model)), table)
    with pytest.raises(foveate.BadArgument, match="profile"):
        foveate.apply(model, SALE(), profile=made).__enter__()


@pytest.mark.parametrize("bad", [{"q_block": 0}, {"k_block": 0}, {"tile": 0}, {"local": 7}, {"dense_below": -1}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        SALE(**bad)
    with pytest.raises(foveate.BadArgument, match="budget"):
        SALE(budget=0.5)
