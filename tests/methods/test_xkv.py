"""xKV: must-hold tests of its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import left_padded, run
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, sealed_memory, stores
from tests.rotation import turn
from torch import Tensor

import foveate
from foveate.cache import JointColumn
from foveate.engine import seal as sealing
from foveate.errors import Refused
from foveate.heads.passkeys import running_examples
from foveate.methods import XKV
from foveate.methods.declared import Codec, Joint
from foveate.methods.policies.bases import LowRank, joint_share
from foveate.models import tiny
from foveate.models.shape import ModelShape

SMALL = {"group": 2, "rank_k": 6, "rank_v": 9}


def exact_prompt(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer of a dense prompt, [B, Hs, n, D]."""
    _, cache = applied(model, "dense", ids)
    found = []
    for store in stores(cache):
        (band,) = store.bands
        found.append(tuple(x.unflatten(0, (-1, store.spec.heads)) for x in (band.keys(), band.values())))
    return found


def cut(x: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, by a full decomposition."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def side_by_side(parts: list[Tensor]) -> Tensor:
    """[Hs, n, D] of each layer as [n, all]."""
    return torch.cat([x.transpose(0, 1).flatten(1) for x in parts], dim=1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_held_is_the_best_approximation_of_the_group(heads: int, kv_heads: int, group: int) -> None:
    """Of keys without their positions, turned back when they are read. The last group is smaller; rows are apart."""
    model, ids = llama(layers=3, heads=heads, kv_heads=kv_heads), prompt(2, 61)
    exact = exact_prompt(model, ids)
    _, cache = applied(model, XKV(group=group, rank_k=5, rank_v=7), ids)
    own = torch.arange(61)
    for first in range(0, 3, group):
        layers = range(first, min(3, first + group))
        for row in (0, 1):
            keys = side_by_side([turn(model, exact[i][0][row], -own) for i in layers])
            values = side_by_side([exact[i][1][row] for i in layers])
            for made, rank, of_keys in ((cut(keys, 5), 5, True), (cut(values, 7), 7, False)):
                for i, part in zip(layers, made.chunk(len(layers), dim=1), strict=True):
                    (band,) = stores(cache)[i].bands
                    got = (band.keys() if of_keys else band.values()).unflatten(0, (-1, kv_heads))[row]
                    want = part.unflatten(1, (kv_heads, -1)).transpose(0, 1)
                    assert_close(got, turn(model, want, own) if of_keys else want, 1e-4)
                    column = band.k if of_keys else band.v
                    assert isinstance(column, JointColumn)
                    assert column.basis.data.shape == (2, 61, rank)


def test_full_rank_is_dense() -> None:
    """Held as a product that leaves nothing out, the prompt and steps are those of the whole cache."""
    model, ids, steps = llama(layers=3), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)

    class Whole(XKV):
        def codec(self, role: Any, shape: ModelShape, length: int) -> Codec:
            return Codec(None, None, Joint(role.extra["layers"], LowRank(10**6), LowRank(10**6)))

    got, cache = applied(model, Whole(group=2), ids, steps)
    assert all(isinstance(store.bands[0].k, JointColumn) for store in stores(cache))
    assert_close(got, want, 1e-4)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_are_those_of_the_formula(group: int, batch: int) -> None:
    """(r_k + r_v)(M + g w) numbers of a group, in the cache and in the process, and no exact tokens beside them."""
    model, m, w = llama(layers=4, head_dim=32), 1301, 2 * 32
    cache, memory = sealed_memory(model, XKV(group=group, rank_k=6, rank_v=9), prompt(batch, m))
    columns = sum(c.nbytes for s in stores(cache) for c in (s.bands[0].k, s.bands[0].v) if c is not None)
    formula = batch * 4 // group * (6 + 9) * (m + group * w) * 4
    assert columns == formula
    beside = sum(len(s.bands[0].pairs) * 12 for s in stores(cache))
    assert formula <= cache.nbytes <= formula + beside
    assert memory < formula + 2**19
    assert memory >= formula * 0.98


def llama_8b() -> ModelShape:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
    return ModelShape.of(config)


@pytest.mark.parametrize("budget", [0.03, 0.1, 0.25, 0.42, 0.77])
def test_high_ranks_of_a_budget_are_whole_rows_of_matrix_units(budget: float) -> None:
    shape, length = llama_8b(), 2**17
    method = XKV(budget=budget)
    (ranks,) = {role.extra["ranks"] for role in method.plan(shape, None, length)}
    assert all(rank < 512 or rank % 8 == 0 for rank in ranks)
    assert 0.98 * budget <= joint_share(shape, method.group, length, ranks) <= budget


@pytest.mark.parametrize(
    ("ranks", "group", "ratio"),
    [
        ((384, 576), 4, 8.03),
        ((96, 144), 1, 8.40),
        ((1280, 1920), 4, 2.41),
        ((192, 288), 2, 8.27),
        ((640, 960), 2, 2.48),
    ],
)
def test_shares_are_the_papers(ranks: tuple[int, int], group: int, ratio: float) -> None:
    """Compression 2 M g w / ((r_k + r_v)(M + g w)) of Llama-3.1-8B at 64K tokens."""
    shape = llama_8b()
    assert 1 / joint_share(shape, group, 65536, ranks) == pytest.approx(ratio, abs=0.01)


def test_no_other_shared_basis_is_closer() -> None:
    """Any rank-r basis of the tokens, with the best matrices for it, errs more."""
    x = torch.randn(40, 24) @ torch.randn(24, 24)
    for shape in (x, x.T):
        a, b = LowRank(5).pack(shape)
        best = (shape.double() - a @ b).norm()
        assert_close(a @ b, cut(shape, 5), 1e-6)
        for seed in range(20):
            other = torch.randn(shape.shape[0], 5, generator=torch.Generator().manual_seed(seed)).double()
            fitted = other @ torch.linalg.lstsq(other, shape.double()).solution
            assert best <= (shape.double() - fitted).norm()


def test_layers_that_are_alike_share_what_a_layer_alone_cannot() -> None:
    """At equal numbers per layer, a group errs no more than its layers alone where they have a basis in common."""
    common = torch.randn(200, 8)
    layers = [common @ torch.randn(8, 16) + 0.05 * torch.randn(200, 16) for _ in range(4)]
    a, b = LowRank(8).pack(torch.cat(layers, dim=1))
    together = (torch.cat(layers, dim=1) - (a @ b).float()).norm()
    alone = torch.stack([(x - cut(x, 2)).norm() for x in layers]).norm()
    assert together < 0.2 * alone


def test_real_layers_share_more_the_more_there_are(seed: int) -> None:
    """In the built-in model's cache, at equal rank a layer. Some of that any layers give, which need not all have the
    same share of the rank; with the tokens of each in an order of its own that is all there is."""
    model, tokenizer = foveate.load("smollm2", dtype="float32", device="cpu")
    ids = torch.tensor([next(running_examples(tokenizer, (256,), seed)).ids])
    layers = exact_prompt(model, ids)[8:16]
    for of_keys in (True, False):
        parts = [turn(model, k[0], -torch.arange(256)) if of_keys else v[0] for k, v in layers]
        lost: list[list[float]] = []
        for some in (parts, [x[:, torch.randperm(256)] for x in parts]):
            lost.append([])
            for group in (1, 2, 4):
                wide = [side_by_side(some[i : i + group]) for i in range(0, 8, group)]
                lost[-1].append(sum(float((x - cut(x, 16 * group)).square().sum()) for x in wide))
        real, apart = lost
        assert real[0] == pytest.approx(apart[0])
        assert real[1] < 0.85 * apart[1]
        assert real[2] < 0.65 * apart[2]


def test_what_is_generated_stays_exact() -> None:
    model, ids, steps = llama(layers=3), prompt(2, 61), prompt(2, 5, seed=1)
    got, cache = applied(model, XKV(**SMALL), ids, steps)
    first, _ = logits(model, ids)
    assert_close(got[:, :1], first, TOLERANCE)  # the prompt's own attention is exact
    for store in stores(cache):
        (band,) = store.bands
        assert isinstance(band.k, JointColumn)
        assert band.k.packed.tolist() == [61] * 4
        assert band.lengths.tolist() == [66] * 4
    late = stores(cache)[0].bands[0].values()[:, 61:]
    with foveate.apply(model, "dense") as handle, torch.no_grad():
        dense = handle.cache()
        model(torch.cat([ids, steps], dim=1), past_key_values=dense)
    assert_close(late, stores(dense)[0].bands[0].values()[:, 61:], TOLERANCE)


def test_tokens_behind_the_prompt_in_its_own_forward_are_refused() -> None:
    """As assisted decoding sends them: the first layers of a group would read another prompt than the last."""
    model, ids = llama(layers=3), prompt(1, 61)
    with foveate.apply(model, XKV(**SMALL)) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(58)
        with pytest.raises(Refused, match="xkv holds several layers together"):
            model(ids, past_key_values=cache)


def test_rows_of_a_batch_are_independent() -> None:
    """Also of a left-padded one: its positions are those of the row, and its padding is in no basis."""
    model, method = llama(layers=3, dtype=torch.float64), XKV(**SMALL)
    rows = [prompt(1, n, seed=n)[0] for n in (101, 38)]
    ids, mask = left_padded(rows)
    steps = prompt(2, 4, seed=3)
    with foveate.apply(model, method) as handle:
        both = run(model, handle.cache(), ids, steps, mask)
        for row, tokens in enumerate(rows):
            alone = handle.cache()
            handle.binding.plan_cache(alone, 101)
            want = run(model, alone, tokens[None], steps[row : row + 1])
            assert_close(both.steps[row : row + 1], want.steps, 1e-9)


def test_the_peak_is_one_group() -> None:
    """Exact tokens of at most one group are alive at once, and all are gone when it is complete."""
    model, ids = llama(layers=6, head_dim=32), prompt(1, 400)
    _, cache = applied(model, XKV(group=2, rank_k=2, rank_v=3), ids)
    dense = ModelShape.of(model).dense_kv_bytes(400)
    assert cache.nbytes < 0.1 * dense
    assert cache.peak_nbytes < dense / 3 + cache.nbytes


def test_copies_go_on_sharing() -> None:
    """After reorder, repeat and fork the layers of a group still hold one basis; the original is untouched."""
    model = llama(layers=4)
    with foveate.apply(model, XKV(group=4, rank_k=6, rank_v=9)) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(61)
        model(prompt(2, 61), past_key_values=cache)
        before = [store.bands[0].keys().clone() for store in stores(cache)]
        size = cache.nbytes
        copy = cache.fork()
        copy.batch_repeat_interleave(2)
        copy.reorder_cache(torch.tensor([1, 1, 3, 0]))
        assert {id(store.bands[0].k.basis) for store in stores(copy)} != {id(cache.layers[0].store.bands[0].k.basis)}
        assert len({id(store.bands[0].k.basis) for store in stores(copy)}) == 1
        assert size < copy.nbytes <= 2 * size
        for old, store in zip(before, stores(copy), strict=True):
            rows = old.unflatten(0, (-1, 2))
            assert torch.equal(store.bands[0].keys(), rows[[0, 0, 1, 0]].flatten(0, 1))
        assert cache.nbytes == size
        assert all(torch.equal(old, store.bands[0].keys()) for old, store in zip(before, stores(cache), strict=True))


def test_cropping_into_the_prompt_is_exact() -> None:
    """What is left of it is what it was, and what comes after is exact and stands in its place."""
    model, ids = llama(layers=3), prompt(1, 61)
    with foveate.apply(model, XKV(**SMALL)) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(61)
        model(ids, past_key_values=cache)
        before = [store.bands[0].keys().clone() for store in stores(cache)]
        cache.crop(-9)
        model(prompt(1, 3, seed=2), past_key_values=cache)
        for old, store in zip(before, stores(cache), strict=True):
            assert torch.equal(store.bands[0].keys()[:, :52], old[:, :52])
            assert store.bands[0].lengths.tolist() == [55, 55]


def test_latents_are_held_together_and_rotated_channels_stay() -> None:
    """MLA: the latents of a group by one basis; the rotated channels beside them to the bit."""
    model, ids = tiny("deepseek-v3", layers=3, heads=4, kv_heads=4), prompt(2, 61)
    rank = ModelShape.of(model).layers[0].latent_dim
    normed: list[Tensor] = []
    norms = [layer.self_attn.kv_a_layernorm for layer in model.model.layers]
    hooks = [norm.register_forward_hook(lambda *a: normed.append(a[2])) for norm in norms]
    _, dense = applied(model, "dense", ids)
    for hook in hooks:
        hook.remove()
    exact = [store.bands[0].keys() for store in stores(dense)]
    for x, latent in zip(exact, normed, strict=True):  # the released code packs latents before their norm
        assert_close(x[..., :rank], latent, TOLERANCE)
    got, cache = applied(model, XKV(group=2, rank_k=5), ids, prompt(2, 3, seed=1))
    assert got.isfinite().all()
    for row in (0, 1):
        want = cut(torch.cat([exact[i][row, :, :rank] for i in (0, 1)], dim=1), 5)
        for i in (0, 1):
            held = stores(cache)[i].bands[0].keys()[row, :61]
            assert_close(held[:, :rank], want[:, i * rank : (i + 1) * rank], 1e-4)
            assert torch.equal(held[:, rank:], exact[i][row, :, rank:])
    column = stores(cache)[0].bands[0].k
    assert isinstance(column, JointColumn)
    assert column.nbytes - column.tail.nbytes == 2 * 4 * (61 * 5 + 5 * rank + 61 * (exact[0].shape[2] - rank))


def test_a_side_that_would_grow_stays_exact() -> None:
    """Ranks above what saves anything leave the cache as it is: short prompts cost nothing."""
    model, ids, steps = llama(layers=3), prompt(1, 41), prompt(1, 5, seed=1)
    want, _ = logits(model, ids, steps)
    got, cache = applied(model, XKV(), ids, steps)
    assert_close(got, want, TOLERANCE)
    assert not any(isinstance(store.bands[0].k, JointColumn) for store in stores(cache))


def test_sliding_layers_are_left_out_of_groups() -> None:
    model = tiny("gemma3", layers=7, heads=4, kv_heads=2)
    shape = ModelShape.of(model)
    full = [layer.index for layer in shape.layers if layer.kind == "full"]
    roles = XKV(**SMALL).plan(shape, None, 100)
    assert next(role.extra["layers"] for role in roles if role.name == "joint") == tuple(full[:2])
    assert all((role.name == "joint") == (i in full) for i, role in enumerate(roles))


def test_a_shared_prompt_is_sealed_in_groups() -> None:
    """A fork of a dense prompt is held together as a prompt of one's own is."""
    model, ids = llama(layers=3), prompt(1, 61)
    _, mine = applied(model, XKV(**SMALL), ids, prompt(1, 3))
    with foveate.apply(model, "dense") as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(61)
        model(ids, past_key_values=cache)
        fork = cache.fork(handle.bind(XKV(**SMALL)))
        assert fork.nbytes < cache.nbytes
        for a, b in zip(stores(fork), stores(mine), strict=True):
            assert torch.equal(a.bands[0].keys(), b.bands[0].keys()[:, :61])


def test_nothing_is_joined_before_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group's layers attend to their exact prompt; one join per group."""
    joined: list[int] = []
    original = sealing.hold_together

    def noting(held: Any, *args: Any) -> None:
        assert not any(isinstance(store.bands[0].k, JointColumn) for store in held)
        joined.append(len(held))
        original(held, *args)

    monkeypatch.setattr(sealing, "hold_together", noting)
    applied(llama(layers=5), XKV(**SMALL), prompt(1, 61), prompt(1, 3))
    assert joined == [2, 2, 1]


@pytest.mark.parametrize("other", ["kivi", "think", "snapkv", "duo-attention", "xkv"])
def test_partners_that_cannot_be(other: str) -> None:
    with pytest.raises(foveate.BadArgument, match="xkv"):
        foveate.compose(f"xkv|{other}")


def test_below_the_floor_is_refused_with_it() -> None:
    model = llama(layers=2)
    shape = ModelShape.of(model)
    longest, width = shape.max_positions, 2 * 2 * shape.layers[0].head_dim
    with foveate.apply(model, "dense") as handle, pytest.raises(foveate.Infeasible) as error:
        handle.bind(XKV(group=2, budget=0.001))
    assert error.value.floor == pytest.approx(2 * (longest + width) / (2 * longest * width))


@pytest.mark.parametrize("bad", [{"group": 0}, {"rank_k": 0}, {"rank_v": 0}], ids=str)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        XKV(**bad)


def test_defaults_are_the_released_ones() -> None:
    method = XKV()
    assert (method.group, method.rank_k, method.rank_v) == (4, 512, 768)
