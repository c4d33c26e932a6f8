"""CompressKV: must-hold tests of its card."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.heads.words import WordTokenizer
from tests.methods.runs import TOLERANCE, applied, held, llama, logits, prompt, stores
from tests.methods.test_snapkv import captured, window_truth

import foveate
from foveate.heads import semantic
from foveate.heads.passkeys import passkey_examples
from foveate.methods import CompressKV, Profile
from foveate.methods.compresskv import best
from foveate.methods.policies.layers import error_aware
from foveate.methods.profile import built_in_profile, fingerprint, load_profile, save_profile
from foveate.models import ModelShape, tiny

SMALL = {"budget": 24, "window": 5, "kernel": 3, "voters": 2, "least": 8}


def profile_for(shape: ModelShape) -> Profile:
    """Scores and errors of no meaning, all different, for any model."""
    generator = torch.Generator().manual_seed(len(shape.layers))
    scores = [torch.rand(layer.num_heads, generator=generator).tolist() for layer in shape.layers]
    errors = (0.2 + torch.rand(len(shape.layers), generator=generator)).tolist()
    return Profile("compresskv", fingerprint(shape), {"scores": scores, "errors": errors})


def profile(model: Any, scores: list | None = None, errors: list | None = None) -> Profile:
    made = profile_for(ModelShape.of(model))
    return replace(made, data={"scores": scores or made.data["scores"], "errors": errors or made.data["errors"]})


def counts(model: Any, method: CompressKV, length: int, made: Profile) -> list[int]:
    shape = ModelShape.of(model)
    roles = method.plan(shape, made, length)
    full = [layer.index for layer in shape.layers if layer.kind == "full"]
    return [method.layer_total(roles[i], shape, i, length) for i in full]


# -- budgets of layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_layers_add_up_within_bounds(seed: int) -> None:
    """Exactly; and who suffers more never gets less."""
    g = torch.Generator().manual_seed(seed)
    for layers in (1, 2, 7, 32):
        errors = (torch.rand(layers, generator=g) ** (1 + seed)).tolist()
        for average, least, most in ((32, 32, 96), (33, 32, 99), (128, 32, 384), (700, 32, 702), (300, 0, 300)):
            found = error_aware(errors, average, least=least, most=most)
            assert sum(found) == layers * average
            assert all(least <= n <= most for n in found)
            by_error = [n for _, n in sorted(zip(errors, found, strict=True))]
            assert all(a <= b for a, b in pairwise(by_error))


def test_equal_errors_are_a_uniform_budget() -> None:
    for errors in ([0.25] * 4, [0.0] * 4):
        assert error_aware(errors, 100, least=32, most=300) == [100] * 4


def test_what_bounds_leave_over_goes_on_in_order() -> None:
    """By hand: the first layer is capped, what it cannot take is dealt to the others, the most suffering first."""
    assert error_aware([0.9, 0.06, 0.04], 20, least=5, most=40) == [40, 11, 9]
    assert error_aware([0.5, 0.3, 0.2], 20, least=5, most=60) == [27, 19, 14]
    assert error_aware([0.0, 0.0, 1.0], 20, least=5, most=30) == [15, 15, 30]


def test_what_is_left_over_goes_token_by_token(seed: int) -> None:
    """As released: rounds of single tokens, given to those that suffer most first, taken from those that do least."""
    chance = random.Random(seed)
    for _ in range(60):
        layers, average, least = chance.randrange(1, 9), chance.randrange(8, 60), chance.randrange(0, 9)
        errors = [chance.random() ** 4 for _ in range(layers)]
        most = chance.randrange(average, 3 * average + 1)
        order = sorted(range(layers), key=lambda i: -errors[i])
        spare = layers * (average - least)
        want = [min(most, least + round(spare * error / sum(errors))) for error in errors]
        while left := layers * average - sum(want):
            step = 1 if left > 0 else -1
            open_ = [i for i in order[::step] if want[i] != (most if step > 0 else least)]
            for i in open_[: abs(left)]:
                want[i] += step
        assert error_aware(errors, average, least=least, most=most) == want


def test_large_divisions_are_quick() -> None:
    found = error_aware([float(i == 0) for i in range(80)], 10**6, least=32, most=3 * 10**6)
    assert sum(found) == 80 * 10**6
    assert found[0] == 3 * 10**6
    assert max(found[1:]) - min(found[1:]) <= 1


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@pytest.mark.parametrize("budget", [24, 0.4, 0.8])
def test_each_layer_holds_its_part_of_the_budget(family: str, budget: float) -> None:
    net = tiny(family, layers=6, heads=4, kv_heads=2)
    method, made = CompressKV(**{**SMALL, "budget": budget}), profile(net)
    _, cache = applied(net, method, prompt(1, 101), profile=made)
    shape = ModelShape.of(net)
    full = [layer.index for layer in shape.layers if layer.kind == "full"]
    found = [len(held(stores(cache)[i])[0]) for i in full]
    average = method.total(shape, 101)
    assert found == counts(net, method, 101, made)
    assert sum(found) == len(full) * average
    assert all(8 <= n <= min(3 * average, 101) for n in found)
    assert len(set(found)) > 1


def test_layers_of_unequal_weight_share_bytes() -> None:
    net = llama(layers=4)
    shape = ModelShape.of(net)
    uneven = replace(shape, layers=tuple(replace(x, store_heads=2 + 6 * (x.index == 0)) for x in shape.layers))
    method = CompressKV(**{**SMALL, "budget": 0.3})
    roles = method.plan(uneven, profile(net, errors=[0.7, 0.1, 0.1, 0.1]), 200)
    found = [method.layer_total(roles[i], uneven, i, 200) for i in range(4)]
    weight = [uneven.kv_bytes_per_slot(i) + 4 * uneven.layers[i].store_heads for i in range(4)]
    used, granted = sum(w * n for w, n in zip(weight, found, strict=True)), sum(weight) * method.total(uneven, 200)
    assert granted * 0.95 < used <= granted


# -- who chooses, and what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("voters", [1, 3, 99])
def test_keeps_what_the_voters_window_attends_to(heads: int, kv_heads: int, voters: int) -> None:
    """The mean over the voting query heads alone, each against the keys of its own group; all kv heads hold the same.
    With all heads voting: their plain mean."""
    geometry, ids = {"heads": heads, "kv_heads": kv_heads, "layers": 2}, prompt(2, 61)
    net = llama(**geometry)
    made = profile(net, errors=[0.5, 0.5])
    method = CompressKV(budget=20, window=5, kernel=1, voters=voters, least=8)
    _, cache = applied(net, method, ids, profile=made)
    q, k, scale = captured(ids, **geometry)[0]
    mass = window_truth(q, k, 5, scale).flatten(1, 2)
    chosen = sorted(range(heads), key=lambda head: -made.data["scores"][0][head])[:voters]
    mean = mass[:, chosen].mean(1)
    want = [sorted([*row.topk(15).indices.tolist(), *range(56, 61)]) for row in mean for _ in range(kv_heads)]
    assert held(stores(cache)[0]) == want


def test_all_heads_share_their_tokens_and_layers_do_not() -> None:
    net = llama(heads=8, kv_heads=4)
    _, cache = applied(net, CompressKV(**SMALL), prompt(2, 61), prompt(2, 3, seed=1), profile=profile(net))
    found = [held(store) for store in stores(cache)]
    assert all(rows[:4] == [rows[0]] * 4 and rows[4:] == [rows[4]] * 4 for rows in found)
    assert found[0][0] != found[0][4]
    assert found[0] != found[1] != found[2]
    assert all({*range(56, 64)} <= set(row) for rows in found for row in rows)


def test_voters_are_the_best_query_heads_of_each_layer() -> None:
    """Query heads, not kv heads; in every layer, however little its heads retrieve; equal scores in order."""
    net = llama(layers=2, heads=8, kv_heads=2)
    table = [[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], [0.0, 0.001, 0.0, 0.0, 0.0, 0.002, 0.0, 0.0]]
    roles = CompressKV().plan(ModelShape.of(net), profile(net, table), 4096)
    assert [role.extra["voters"] for role in roles] == [(0, 1, 2, 3), (0, 1, 2, 5)]
    assert best([0.1, 0.3, 0.3, 0.3], 2) == (1, 2)


def test_pooling_spreads_along_the_keys() -> None:
    ids = prompt(1, 61)
    q, k, scale = captured(ids, layers=1)[0]
    net = llama(layers=1)
    method = CompressKV(budget=20, window=5, kernel=3, voters=6, least=8)
    _, cache = applied(net, method, ids, profile=profile(net))
    mass = torch.nn.functional.pad(window_truth(q, k, 5, scale).flatten(1, 2), (1, 1)).unfold(-1, 3, 1).mean(-1)
    want = sorted([*mass.mean(1)[0].topk(15).indices.tolist(), *range(56, 61)])
    assert held(stores(cache)[0]) == [want, want]


def test_room_for_all_is_dense() -> None:
    """However unequal the errors: no layer drops a token while another has room for more than there is."""
    net, ids, steps = llama(), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(net, ids, steps)
    for budget in (41, 500, 1.0):
        got, _ = applied(net, CompressKV(budget=budget), ids, steps, profile=profile(net, errors=[0.98, 0.01, 0.01]))
        assert_close(got, want, TOLERANCE)
    assert counts(net, CompressKV(budget=41), 41, profile(net, errors=[0.98, 0.01, 0.01])) == [41] * 3


def test_below_the_least_of_every_layer_is_refused() -> None:
    net = llama(layers=4)
    with foveate.apply(net, "dense") as handle:
        with pytest.raises(foveate.Infeasible) as error:
            handle.bind(CompressKV(budget=0.05), profile=profile(net)).check(400)
        handle.bind(CompressKV(budget=error.value.floor), profile=profile(net)).check(400)


# -- calibration -------------------------------------------------------------------------------------------------------


class Bench:
    """What a calibration may use, around a tiny model."""

    def __init__(self, model: Any) -> None:
        self.model, self.tokenizer, self.seed = model, WordTokenizer(), 0
        self.steps = self.total = 0

    def progress(self, total: int, label: str) -> Any:
        self.total = total

        def report(steps: int, how: str) -> None:
            self.steps += steps

        return report


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_calibration_makes_a_profile_that_plans(family: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores from texts that the model answers, errors that add up to 1, the same for the same seed, saved and read."""
    net = tiny(family, heads=4, kv_heads=2)
    untouched = {name: x.clone() for name, x in net.state_dict().items()}
    answer_all(monkeypatch)
    bench = Bench(net)
    made = CompressKV(least=16).calibrate(bench, longest=160, texts=2)
    assert bench.steps == bench.total == 6
    full = [layer.index for layer in ModelShape.of(net).layers if layer.kind == "full"]
    assert [i for i, x in enumerate(made.data["errors"]) if x is not None] == full
    assert sum(made.data["errors"][i] for i in full) == pytest.approx(1, abs=1e-5)
    assert all(len(made.data["scores"][i]) == 4 and max(made.data["scores"][i]) > 0 for i in full)
    assert made.provenance["answers"][0] == made.provenance["answers"][1] > 0
    assert made.provenance["chosen"] == 8
    again = CompressKV(least=16).calibrate(Bench(net), longest=160, texts=2)
    assert again.data == made.data
    save_profile(made, tmp_path / "compresskv.json")
    read = load_profile(tmp_path / "compresskv.json")
    _, cache = applied(net, CompressKV(**SMALL), prompt(1, 101), profile=read)
    kept = [len(held(stores(cache)[i])[0]) for i in full]
    assert kept == counts(net, CompressKV(**SMALL), 101, made)
    assert all(torch.equal(x, untouched[name]) for name, x in net.state_dict().items())


def answer_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness believe that every answer is right: a random model gives none."""
    original = semantic.semantic_scores

    def believing(model: Any, examples: Any, report: Any = None) -> Any:
        forward = type(model).forward

        def knowing(self: Any, ids: Any, **kwargs: Any) -> Any:
            out = forward(self, ids, **kwargs)
            out.logits = torch.nn.functional.one_hot(ids.roll(-1, 1), 256).float()
            return out

        with monkeypatch.context() as patch:
            patch.setattr(type(model), "forward", knowing)
            return original(model, examples, report)

    monkeypatch.setattr("foveate.methods.compresskv.semantic_scores", believing)


def test_calibration_takes_examples_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    net = llama()
    answer_all(monkeypatch)
    own = list(islice(passkey_examples(WordTokenizer(), (130,), 7), 2))
    made = CompressKV(least=16).calibrate(Bench(net), own)
    assert made.provenance["texts"] == 2
    assert "lengths" not in made.provenance


def test_calibration_says_what_is_wrong() -> None:
    net = llama()
    with pytest.raises(foveate.Refused, match="none of"):
        CompressKV().calibrate(Bench(net), longest=160, texts=1)
    with pytest.raises(foveate.BadArgument, match="512 positions"):
        CompressKV().calibrate(Bench(net), longest=1024)


def test_the_built_in_profile_is_that_of_the_built_in_model() -> None:
    """Made by this calibration's defaults on a CPU; some heads retrieve far more than most."""
    from importlib import resources

    folder = resources.files("foveate.methods") / "profiles"
    (file,) = [x for x in folder.iterdir() if x.name.startswith("compresskv.smollm2")]
    made = load_profile(str(file))
    assert len(made.data["scores"]) == len(made.data["errors"]) == 30
    assert sum(made.data["errors"]) == pytest.approx(1, abs=1e-4)
    right, asked = made.provenance["answers"]
    assert asked > right > 20
    ranked = sorted(score for row in made.data["scores"] for score in row)
    assert ranked[-10] > 10 * ranked[135]


def test_a_lost_profile_is_named() -> None:
    net = llama()
    with pytest.raises(foveate.BadArgument, match="calibrate"):
        CompressKV().plan(ModelShape.of(net), None, 100)
    with pytest.raises(foveate.BadArgument, match="calibrate"):
        CompressKV().plan(ModelShape.of(net), profile(net, errors=[0.5]), 100)
    assert built_in_profile("compresskv", ModelShape.of(net)) is None


def test_defaults_are_the_papers() -> None:
    method = CompressKV()
    assert (method.voters, method.window, method.kernel, method.least, method.most) == (4, 8, 5, 32, 3)


@pytest.mark.parametrize(
    "bad", [{"voters": 0}, {"window": 0}, {"kernel": 4}, {"least": 7}, {"most": 0.5}, {"budget": 0.0}]
)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        CompressKV(**bad)
