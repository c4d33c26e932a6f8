"""ACT: must-hold tests of its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.heads.words import WordTokenizer
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt
from torch import Tensor

import foveate
from foveate.attention import columns
from foveate.engine.context import LayerContext
from foveate.heads.tap import Tap, Tapped
from foveate.methods import ACT, H2O, Profile, Quest, SnapKV
from foveate.methods.act_calibration import edited
from foveate.methods.profile import fingerprint
from foveate.models import ModelShape, tiny

SMALL: dict[str, Any] = {"theta": 0.04}
FULL: dict[str, Any] = {"beta": 1.0}


def profile_for(shape: ModelShape) -> Profile:
    """All heads of all layers but every third."""
    heads = [[h for h in range(layer.num_heads) if (h + layer.index) % 3] for layer in shape.layers]
    return Profile("act-calibration", fingerprint(shape), {"heads": heads})


def profile(model: Any, heads: list[list[int]] | None = None) -> Profile:
    shape = ModelShape.of(model)
    return profile_for(shape) if heads is None else Profile("act-calibration", fingerprint(shape), {"heads": heads})


def edit_map(a: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """The paper's edit of a map [N, M] with sinks [N, M], step by step."""
    freed = (1 - beta) * (a * sinks).sum(-1, keepdim=True)
    rest = a * ~sinks
    ratio = rest / rest.sum(-1, keepdim=True).clamp_min(1e-30)
    new = torch.where(sinks, beta * a, a) + freed * ratio
    return torch.where(rest.sum(-1, keepdim=True) > 1e-6, new, a)


def by_map(model: Any, ids: Tensor, method: ACT, heads: list[list[int]], prompt_length: int) -> Tensor:
    """Logits of one dense forward with explicit maps: rows of the prompt by column means, later rows by themselves."""
    n = ids.shape[1]

    def serve(layer: Tapped) -> Tensor:
        group = layer.q.shape[1] // layer.k.shape[1]
        k, v = layer.k.repeat_interleave(group, 1), layer.v.repeat_interleave(group, 1)
        a = (layer.q @ k.transpose(2, 3) * layer.scale).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        a = a.softmax(-1)
        for b in range(a.shape[0]):
            for h in heads[layer.shape.index]:
                first = a[b, h, :prompt_length, :prompt_length]
                seen = torch.arange(prompt_length, 0, -1)
                bound = method.theta if method.alpha is None else method.alpha / prompt_length
                sinks = torch.zeros(n, n, dtype=torch.bool)
                sinks[:prompt_length, :prompt_length] = first.sum(0) / seen > bound
                for i in range(prompt_length, n):
                    sinks[i] = a[b, h, i] > (method.theta if method.alpha is None else method.alpha / (i + 1))
                sinks[:, 0] = False
                a[b, h] = edit_map(a[b, h], sinks & torch.ones(n, n).tril().bool(), method.beta)
        assert torch.allclose(a.sum(-1), torch.ones(()), atol=1e-5)
        return a @ v

    with torch.no_grad(), Tap(model, serve):
        return model(ids).logits


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("setting", [{"theta": 0.05}, {"theta": 0.05, "beta": 0.0}, {"alpha": 3.0}])
def test_equals_the_edited_map(heads: int, kv_heads: int, setting: dict) -> None:
    """Prompt and decode, against the edit of explicit maps: two partial attentions and an lse are enough."""
    model = llama(layers=2, heads=heads, kv_heads=kv_heads)
    ids, steps = prompt(2, 41), prompt(2, 5, seed=1)
    method, table = ACT(**setting), [list(range(0, heads, 2)), list(range(heads))]
    want = by_map(model, torch.cat([ids, steps], 1), method, table, 41)[:, 40:]
    got, _ = applied(model, method, ids, steps, profile=profile(model, table))
    assert_close(got, want, TOLERANCE)
    plain, _ = logits(model, ids, steps)
    assert (got - plain).abs().max() > 1e-2


def test_rows_still_sum_to_one_and_the_formula_is_the_map() -> None:
    a, v = torch.randn(20, 30, dtype=torch.float64).softmax(-1), torch.randn(30, 6, dtype=torch.float64)
    for share in (0.0, 0.3, 1.0):
        sinks = (torch.rand(30) < share).expand(20, -1)
        for beta in (0.0, 0.4, 1.0):
            new = edit_map(a, sinks, beta)
            assert torch.allclose(new.sum(-1), torch.ones(20, dtype=torch.float64), atol=1e-12)
            got = edited(a @ v, (a * sinks) @ v, (a * sinks).sum(-1), beta)
            assert torch.allclose(got, new @ v, atol=1e-10)


def test_a_row_of_sinks_alone_stays() -> None:
    out = torch.randn(3, 4)
    for mass in (1.0, 1 - 1e-8):
        assert torch.equal(edited(out, out * mass, torch.full((3,), mass), 0.4), out)


@pytest.mark.parametrize("method", [ACT(beta=1.0), ACT(theta=0.999)], ids=["beta", "no sinks"])
def test_identity(method: ACT) -> None:
    model, ids, steps = llama(), prompt(2, 41), prompt(2, 5, seed=1)
    want, _ = logits(model, ids, steps)
    got, _ = applied(model, method, ids, steps, profile=profile(model))
    assert_close(got, want, TOLERANCE)


def test_heads_that_were_not_chosen_are_untouched() -> None:
    """No head chosen is dense; the output of the first layer changes in the chosen head alone."""
    model, ids = llama(layers=2), prompt(1, 41)
    want, _ = logits(model, ids)
    got, _ = applied(model, ACT(**SMALL), ids, profile=profile(model, [[], []]))
    assert_close(got, want, TOLERANCE)
    layers: list[Tapped] = []

    def keep(layer: Tapped) -> Tensor:
        layers.append(layer)
        return layer.attend()

    with torch.no_grad(), Tap(model, keep):
        model(ids)
    changed = ACT(**SMALL).edited_head(layers[0], 3) - layers[0].attend()
    assert [bool((changed[:, h].abs() > 1e-3).any()) for h in range(6)] == [h == 3 for h in range(6)]


def test_the_first_token_is_spared_and_no_other_in_its_place() -> None:
    """Where the first token is no sink itself, the first real sink is reduced all the same."""
    q, k = torch.zeros(1, 1, 12, 4), torch.zeros(1, 1, 12, 4)
    q[..., 0], k[:, :, 5, 0] = 4.0, 4.0  # everybody looks at token 5
    v = torch.eye(12).view(1, 1, 12, 12)
    shape = ModelShape.of(tiny("llama", heads=1, kv_heads=1)).layers[0]
    layer = Tapped(shape, q, k, v, 0.5)
    before, after = layer.attend()[0, 0], ACT(theta=0.3).edited_head(layer, 0)[0, 0]
    assert torch.allclose(after[6:, 5], 0.4 * before[6:, 5])
    assert (after[6:, 0] > before[6:, 0]).all()
    k[:, :, 0, 0], k[:, :, 5, 0] = 4.0, 0.0
    layer = Tapped(shape, q, k, v, 0.5)
    assert torch.allclose(ACT(theta=0.3).edited_head(layer, 0), layer.attend())


def test_every_row_of_a_batch_is_edited_as_alone() -> None:
    """The released code edits the first row only; padding on the left shifts no column."""
    model = llama()
    ids, mask = prompt(2, 41), torch.ones(2, 41, dtype=torch.long)
    mask[1, :17] = 0
    kwargs = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    with foveate.apply(model, ACT(**SMALL), profile=profile(model)), torch.no_grad():
        both = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **kwargs)
        alone = model.generate(ids[1:, 17:], return_dict_in_generate=True, **kwargs)
    assert_close(torch.stack(both.logits)[:, 1:], torch.stack(alone.logits), 1e-4)


def test_no_value_of_a_later_token_reaches_an_earlier_one() -> None:
    """With the sinks held as they were found, a changed token changes nothing before it."""
    model, ids = llama(), prompt(1, 41)
    changed = ids.clone()
    changed[0, 30] += 1
    original, found = LayerContext.columns, []
    try:
        LayerContext.columns = lambda ctx, q, lse: found.append(original(ctx, q, lse)) or found[-1]  # type: ignore[method-assign]
        first = run_prompt(model, ids)
        LayerContext.columns = lambda ctx, q, lse: found.pop(0)  # type: ignore[method-assign]
        second = run_prompt(model, changed)
    finally:
        LayerContext.columns = original  # type: ignore[method-assign]
    assert not found
    assert torch.equal(first[:, :30], second[:, :30])
    assert not torch.equal(first[:, 30:], second[:, 30:])


def run_prompt(model: Any, ids: Tensor) -> Tensor:
    with foveate.apply(model, ACT(**SMALL), profile=profile(model)), torch.no_grad():
        return model(ids).logits


def test_column_sums_by_head_add_up_to_those_of_the_group() -> None:
    q, k = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8)
    scores = (q @ k.repeat_interleave(3, 1).transpose(2, 3) * 8**-0.5).masked_fill(
        torch.ones(9, 9).triu(1).bool(), -torch.inf
    )
    by_head = columns(q, k, scores.logsumexp(-1), each=True)
    assert torch.allclose(by_head, scores.softmax(-1).sum(2), atol=1e-5)
    together = columns(q, k, scores.logsumexp(-1))
    assert torch.allclose(by_head.unflatten(1, (2, 3)).sum(2), together, atol=1e-5)


def test_who_leaves_parts_unread_is_refused_and_eviction_is_not() -> None:
    model, ids, steps = llama(), prompt(1, 61), prompt(1, 4, seed=1)
    with pytest.raises(foveate.BadArgument, match="whole rows"):
        foveate.methods.Composition((ACT(), Quest()))
    for keeper in (SnapKV(budget=24, window=5), H2O(budget=24)):
        got, _ = applied(model, ACT(**SMALL) | keeper, ids, steps, profile=profile(model))
        plain, _ = applied(model, keeper, ids, steps)
        assert got.isfinite().all()
        assert (got - plain).abs().max() > 1e-3


class Probe:
    """A tiny model with a tokenizer of words."""

    def __init__(self, model: Any) -> None:
        self.model, self.tokenizer, self.seed, self.notes = model, WordTokenizer(), 0, []

    def progress(self, total: int, label: str) -> Any:
        def report(steps: int, how: str) -> None:
            self.notes.append(how)

        return report


def test_calibration_keeps_the_heads_that_help() -> None:
    """One head at a time, of all layers but the first two and the last; with beta = 1 no edit helps."""
    model = llama(layers=5, max_positions=128)
    probe = Probe(model)
    made = ACT(**SMALL).calibrate(probe, samples=1, length=96)
    assert len(probe.notes) == 2 * 6
    helped = [float(note.rpartition(" ")[2]) > 0 for note in probe.notes]
    chosen = [(layer, h) for layer, row in enumerate(made.data["heads"]) for h in row]
    assert chosen == [(2 + i // 6, i % 6) for i, good in enumerate(helped) if good]
    assert 0 < len(chosen) < 12
    applied(model, ACT(**SMALL), prompt(1, 41), profile=made)
    assert ACT(beta=1.0).calibrate(Probe(model), samples=1, length=96).data["heads"] == [[]] * 5


def test_defaults_are_the_papers() -> None:
    assert (ACT().beta, ACT().theta, ACT().alpha) == (0.4, 0.1, None)


@pytest.mark.parametrize("table", [None, [], [[9]] * 3, [["a"]] * 3])
def test_damaged_profiles_are_refused(table: Any) -> None:
    model = llama()
    given = Profile("act-calibration", fingerprint(ModelShape.of(model)), {"heads": table})
    with pytest.raises(foveate.BadArgument, match="foveate calibrate"):
        foveate.apply(model, ACT(), profile=given)


@pytest.mark.parametrize("bad", [{"beta": -0.1}, {"beta": 1.5}, {"theta": 0.0}, {"alpha": 0.0}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        ACT(**bad)
