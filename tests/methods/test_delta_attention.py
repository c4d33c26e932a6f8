"""DELTA: must-hold tests of its card."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import left_padded, run, tokens
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, watching

import foveate
from foveate.methods import DeltaAttention, SnapKV

SMALL = {"budget": 24, "page": 4, "recent": 2, "full_layers": (0,)}


@pytest.mark.parametrize("kwargs", [{"pages": 16}, {"budget": 1.0}, {"pages": 6, "full_layers": (0, 1, 2, 3)}])
def test_all_pages_or_all_layers_is_dense(kwargs: dict) -> None:
    model, ids, steps = llama(layers=4), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    got, cache = applied(model, DeltaAttention(**{"page": 4, "recent": 2, "full_layers": (0,), **kwargs}), ids, steps)
    assert_close(got, want, TOLERANCE)
    assert isinstance(cache, foveate.engine.apply.FoveateCache)


def test_pages_against_the_plain_formula() -> None:
    """Largest probability over all heads, summed per page; newest pages forced; one list for all layers behind."""
    model, ids, steps = llama(layers=5), prompt(2, 61), prompt(2, 3, seed=1)
    with watching() as seen:
        applied(model, DeltaAttention(page=4, pages=7, recent=2, full_layers=(0, 1, 3)), ids, steps)
    decode = seen[5:]
    for step in range(3):
        reads = decode[5 * step : 5 * step + 5]
        assert [r["parts"].dense for r in reads] == [True, True, False, True, False]
        for chooser, user in ((1, 2), (3, 4)):
            q = reads[chooser]["q"][:, :, 0]
            k = reads[chooser]["store"].bands[0].keys().unflatten(0, (2, 2)).repeat_interleave(3, 1)
            k = k[:, :, : 62 + step]
            token = (torch.einsum("bhd,bhmd->bhm", q, k) * reads[chooser]["how"].scale).softmax(-1).amax(1)
            count = -(-token.shape[-1] // 4)
            mass = torch.nn.functional.pad(token, (0, count * 4 - token.shape[-1])).view(2, count, 4).sum(-1)
            mass[:, count - 2 :] = torch.inf
            want = mass.topk(7).indices.sort(-1).values
            assert torch.equal(reads[user]["parts"].lists[:, 0, 0].long(), want)


def test_attended_tokens_per_step() -> None:
    """|full|·t + (layers - |full|)·min(K·P, t), up to the newest page being part full."""
    model, ids = llama(layers=5), prompt(1, 63)
    with foveate.apply(model, DeltaAttention(page=4, pages=5, recent=2, full_layers=(0, 1))) as handle, torch.no_grad():
        cache = handle.cache()
        model(ids, past_key_values=cache)
        cache.meter = {}
        model(prompt(1, 1, seed=1), past_key_values=cache)
    assert cache.meter["decode_read"] == 6 * (2 * 64 + 3 * 20)


def test_prompt_is_dense() -> None:
    model, ids = llama(layers=4), prompt(1, 61)
    want, _ = logits(model, ids)
    got, _ = applied(model, DeltaAttention(page=4, pages=4, recent=2), ids)
    assert_close(got, want, TOLERANCE)


def test_rows_are_independent() -> None:
    model, steps = llama(layers=4), prompt(2, 4, seed=1)
    method = DeltaAttention(page=4, pages=4, recent=2, full_layers=(0,))
    both, _ = applied(model, method, prompt(2, 61), steps)
    for row in range(2):
        alone, _ = applied(model, method, prompt(2, 61)[row : row + 1], steps[row : row + 1])
        assert_close(both[row : row + 1], alone, TOLERANCE)


def test_a_row_may_have_fewer_pages_than_a_list(seed: int) -> None:
    """Lists hold all pages of such a row, of others exactly as many as asked, ascending, the newest ones always."""
    model, method = llama(layers=4), DeltaAttention(page=4, pages=5, recent=2, full_layers=(0,))
    rows, steps = [tokens(seed + length, length) for length in (9, 18, 61)], tokens(seed, 3, 5)
    ids, mask = left_padded(rows)
    with foveate.apply(model, method) as handle:
        with watching() as seen:
            together = run(model, handle.cache(), ids, steps, mask).steps
        for b, row in enumerate(rows):
            cache = handle.cache()
            handle.binding.plan_cache(cache, 61)
            assert_close(together[b : b + 1], run(model, cache, row[None], steps[b : b + 1]).steps, TOLERANCE)
    for step in range(5):
        for read in seen[4 * step + 5 : 4 * step + 8]:
            for row, listed in zip(rows, read["parts"].lists[:, 0, 0].tolist(), strict=True):
                pages, newest = [page for page in listed if page >= 0], (len(row) + step) // 4
                assert pages == sorted(set(pages))
                assert len(pages) == min(5, newest + 1)
                assert pages[-2:] == [newest - 1, newest]


def test_of_equal_pages_the_first_are_read(seed: int) -> None:
    model = llama(layers=2)
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()  # so all tokens weigh the same
    with watching() as seen:
        method = DeltaAttention(page=4, pages=5, recent=2, full_layers=(0,))
        applied(model, method, prompt(1, 61, seed), prompt(1, 1, seed + 1))
    assert seen[-1]["parts"].lists.flatten().tolist() == [0, 1, 2, 14, 15]


def test_full_layers_stand_at_the_papers_depths() -> None:
    model = llama(layers=28, heads=2, kv_heads=1)
    with foveate.apply(model, DeltaAttention()) as handle:
        plan = handle.binding.transient_plan(512)
        names = [plan[i].roles["delta-attention"].name for i in range(28)]
    assert [i for i, name in enumerate(names) if name != "reuse"] == [0, 1, 2, 14, 22]
    assert [i for i, name in enumerate(names) if name == "select"] == [2, 14, 22]


def test_one_list_for_all_heads_needs_equal_slots() -> None:
    with pytest.raises(foveate.BadArgument, match="snapkv"):
        DeltaAttention() | SnapKV()


@pytest.mark.parametrize("bad", [{"page": 0}, {"recent": 0}, {"full_layers": (1, 2)}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        DeltaAttention(**bad)
    with pytest.raises(foveate.BadArgument, match="layers"), foveate.apply(llama(), DeltaAttention(full_layers=(0, 9))):
        pass


def test_defaults_are_the_released_ones() -> None:
    method = DeltaAttention()
    assert (method.page, method.pages, method.recent) == (16, 64, 8)
