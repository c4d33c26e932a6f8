"""DHSA: must-hold tests of its card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.closeness import assert_close
from tests.heads.words import WordTokenizer
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, watching
from torch import Tensor
from transformers import LlamaConfig

import foveate
from foveate.heads import boundaries
from foveate.heads.boundaries import (
    BoundaryPredictor,
    BoundaryRecipe,
    Lesson,
    boundary_ratios,
    focal_loss,
    key_distances,
    separate_peaks,
    train_predictor,
)
from foveate.methods import DHSA, Profile, dhsa
from foveate.methods.policies.chunks import chunk_scores
from foveate.methods.profile import built_in_profile, fingerprint, load_profile, save_profile
from foveate.models.shape import ModelShape

SMALL = {"tokens": 24, "block": 8, "chunk": 4, "apart": 1, "local": 4, "sink": 4, "instruction": 8}
WAYS = ["predicted", "similarity", "fixed"]


def profile_for(shape: ModelShape) -> Profile:
    """A predictor that was never trained, for any model."""
    layer = next(layer for layer in shape.layers if layer.kind == "full")
    width = (layer.num_heads if layer.latent else layer.num_kv_heads) * layer.head_dim
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = BoundaryPredictor(width, 2, 8).state_dict()
    return Profile("dhsa", fingerprint(shape), {"window": 2}, {}, dict(weights))


def run(ids: Tensor, model: Any = None, **kwargs: Any) -> list[dict[str, Any]]:
    model = model or llama()
    method = DHSA(**{**SMALL, **kwargs})
    with watching() as seen:
        applied(model, method, ids, profile=profile_for(ModelShape.of(model)) if method.needs_profile else None)
    return seen


def read_sets(read: dict[str, Any], row: int = 0) -> list[set[int]]:
    """Tokens on the lists of each query block; nothing may be listed twice."""
    sets = []
    for block in range(read["parts"][0].lists.shape[2]):
        listed = []
        for part in read["parts"]:
            for start in part.lists[row, 0, block].tolist():
                if start >= 0:
                    listed += range(start * part.k_block, (start + 1) * part.k_block)
        assert len(set(listed)) == len(listed)
        sets.append(set(listed))
    return sets


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_a_budget_for_all_is_dense(way: str, heads: int, kv_heads: int) -> None:
    model, ids = llama(heads=heads, kv_heads=kv_heads), prompt(2, 61)
    want, _ = logits(model, ids)
    for how in ({"tokens": 61}, {"budget": 1.0}):
        assert all(r["parts"].dense for r in run(ids, model, boundaries=way, **how))
    got, _ = applied(model, DHSA(**{**SMALL, "tokens": 60}, boundaries="fixed"), ids)
    assert (got - want).abs().max() > 0


def test_listing_everything_is_dense() -> None:
    """The two parts together, not the short cut: all tokens but for the batch's longest row are listed."""
    model, ids = llama(), prompt(1, 61)
    want, _ = logits(model, ids)
    got, _ = applied(model, DHSA(**{**SMALL, "tokens": 60, "instruction": 5}, boundaries="fixed"), ids)
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("length", [93, 96, 101])
@pytest.mark.parametrize("way", WAYS)
def test_reads_what_the_plain_rule_says(length: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against loops over blocks, chunks and tokens."""
    cuts: list[Tensor] = []
    original = DHSA._starts
    monkeypatch.setattr(DHSA, "_starts", lambda *a: cuts.append(original(*a)) or cuts[-1])
    for read in run(prompt(1, length), boundaries=way):
        (starts,) = cuts  # one cut for all layers
        starts = starts.tolist()
        assert starts[0] == 0
        assert length - 8 in starts
        q, k = read["q"][0].double().mean(0), read["store"].bands[0].keys().double().mean(0)
        ends = [*starts[1:], length]
        means = [k[a:b].mean(0) * (b - a) ** 0.5 for a, b in zip(starts, ends, strict=True)]
        for i, got in enumerate(read_sets(read)):
            first, last = 8 * i, min(8 * i + 8, length) - 1
            if first >= (length - 8) // 8 * 8 or last < 24:
                assert got >= set(range(last + 1))
                continue
            asked = q[first : last + 1].mean(0) * (last + 1 - first) ** 0.5
            worth = {}
            for a, b, mean in zip(starts, ends, means, strict=True):
                for j in range(a, b):
                    worth[j] = float(asked @ mean)
            forced = {j for j in range(last + 1) if j < 4 or j >= first - 4}
            others = sorted((j for j in range(last + 1) if j not in forced), key=lambda j: (-round(worth[j], 9), j))
            want = forced | set(others[: 24 - len(forced)])
            assert got == want


@pytest.mark.parametrize("way", WAYS)
def test_nothing_twice_local_tokens_always_and_no_more_than_the_budget(way: str) -> None:
    """The released code puts the first tokens over its worst picks without looking whether they are there already."""
    for read in run(prompt(2, 101), boundaries=way):
        for row in (0, 1):
            for i, got in enumerate(read_sets(read, row)):
                first, last = 8 * i, min(8 * i + 8, 101) - 1
                assert got >= set(range(max(0, first - 4), last + 1)) | set(range(4))
                if first < 88 and last >= 24:
                    assert len(got) == 24
                    assert max(got) == last


def test_the_end_of_the_prompt_reads_everything() -> None:
    for length, instruction, dense in ((101, 8, 2), (104, 8, 1), (101, 0, 0), (101, 20, 3)):
        read = run(prompt(1, length), boundaries="fixed", instruction=instruction)[0]
        sets = read_sets(read)
        full = [set(range(min(8 * i + 8, length))) <= got for i, got in enumerate(sets)]
        assert full[3:] == [False] * (len(sets) - 3 - dense) + [True] * dense


def test_rows_of_a_batch_are_cut_by_their_own_length() -> None:
    model, method = llama(), DHSA(**SMALL, boundaries="similarity")
    ids = prompt(1, 101)
    padded = torch.cat([torch.zeros_like(ids), ids], dim=0)
    mask = torch.ones_like(padded)
    mask[0, :40] = 0
    padded[0, 40:] = prompt(1, 61, seed=3)[0]
    with foveate.apply(model, method), torch.no_grad():
        both = model(padded, attention_mask=mask).logits
        for row, alone in ((0, padded[:1, 40:]), (1, ids)):
            assert_close(both[row : row + 1, -alone.shape[1] :], model(alone).logits, TOLERANCE)


# -- scores ------------------------------------------------------------------------------------------------------------


def test_upsampled_scores_equal_a_lookup() -> None:
    q, k = torch.randn(6, 21, 16), torch.randn(2, 37, 16)
    starts = torch.tensor([0, 1, 5, 20, 21, 36])
    got = chunk_scores(q, k, starts, 8)
    assert got.shape == (3, 37)
    ends, want = [*starts.tolist()[1:], 37], torch.empty(3, 37, dtype=torch.float64)
    for i in range(3):
        rows = q[:, 8 * i : 8 * i + 8].double().mean((0, 1)) * min(8, 21 - 8 * i) ** 0.5
        for a, b in zip(starts.tolist(), ends, strict=True):
            want[i, a:b] = rows @ k[:, a:b].double().mean((0, 1)) * (b - a) ** 0.5
    assert_close(got, want, 1e-5)  # of all together: a single score may be as good as 0


def test_equal_chunks_are_ranked_as_by_plain_means() -> None:
    q, k = torch.randn(4, 16, 8), torch.randn(4, 48, 8)
    got = chunk_scores(q, k, torch.arange(0, 48, 6), 8)[:, ::6]
    plain = q.mean(0).view(2, 8, 8).mean(1) @ k.mean(0).view(8, 6, 8).mean(1).T
    ordered = plain.gather(-1, got.argsort(-1))
    assert (ordered.diff(dim=-1) > -1e-6).all()  # near equals go either way


def test_noise_scores_the_same_whatever_a_chunks_length() -> None:
    """Plain means of long chunks would be small, and short chunks win by chance."""
    torch.manual_seed(0)
    k, starts = torch.randn(1, 20000, 16), []
    while (starts[-1] if starts else 0) < 19900:
        starts += [(starts[-1] if starts else -2) + 2, (starts[-1] if starts else -2) + 4]
        starts.append(starts[-1] + 32)
    cut = torch.tensor(starts)
    score = chunk_scores(torch.randn(1, 1, 16), k, cut, 8)[0, cut[:-1]]
    lengths = cut.diff()
    short, long = score[lengths == 2].std(), score[lengths == 32].std()
    assert 0.85 < float(short / long) < 1.18


def test_boundaries_find_a_needle_that_fixed_blocks_dilute() -> None:
    """Segments of keys of odd lengths, one of them what the question asks for, at equal budgets."""
    found = {}
    for way in ("similarity", "fixed"):
        hits = 0
        for seed in range(20):
            torch.manual_seed(seed)
            lengths = torch.randint(10, 40, (24,)).tolist()
            topics = F.normalize(torch.randn(24, 32), dim=-1) * 6
            k = torch.cat([topics[i] + torch.randn(n, 32) for i, n in enumerate(lengths)])[None]
            needle = int(torch.randint(2, 22, ()))
            first, end = sum(lengths[:needle]), sum(lengths[: needle + 1])
            m = k.shape[1]
            cuts = separate_peaks(key_distances(k[0], 4), m // 24, 8) + 1 if way == "similarity" else None
            starts = (
                torch.cat([torch.zeros(1, dtype=torch.int64), cuts]) if cuts is not None else torch.arange(0, m, 24)
            )
            score = chunk_scores(topics[needle][None, None] + torch.randn(1, 8, 32), k, starts, 8)[0]
            top = score.topk(end - first).indices
            hits += float(((top >= first) & (top < end)).sum()) / (end - first)
        found[way] = hits / 20
    assert found["similarity"] > 0.9
    assert found["similarity"] > found["fixed"] + 0.15


# -- boundaries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 4])
def test_ratios_equal_naive_sums(window: int) -> None:
    attention = torch.rand(29, 29).tril()
    attention /= attention.sum(1, keepdim=True)
    got = boundary_ratios(attention, window)
    assert got.dtype == torch.float64
    for p in range(28):
        if p < window - 1 or p + window > 28:
            assert got[p] == 1
            continue
        rows = attention[p + window + 1 :].double()
        past, future = rows[:, p - window + 1 : p + 1].sum() + 1e-9, rows[:, p + 1 : p + window + 1].sum() + 1e-9
        assert float(got[p]) == pytest.approx(float(max(past, future) / min(past, future)), rel=1e-6)
    assert (got >= 1).all()


def test_peaks_stand_apart_and_the_best_come_first() -> None:
    torch.manual_seed(0)
    scores = torch.randn(200)
    got = separate_peaks(scores, 9, 8)
    assert len(got) == 9
    assert (got.diff() > 8).all()
    assert separate_peaks(torch.randn(4000), 4000, 8).diff().min() == 9
    assert int(scores.argmax()) in got.tolist()
    for place in scores.argsort(descending=True)[:30].tolist():  # whoever was passed over stands near a better one
        rivals = [p for p in got.tolist() if abs(p - place) <= 8 and scores[p] >= scores[place]]
        assert rivals or scores[place] < scores[got].min()
    assert (scores[separate_peaks(scores, 200, 0, 1.0)] > 1.0).all()
    assert len(separate_peaks(scores, 200, 0)) == 200
    assert len(separate_peaks(torch.full((5,), -torch.inf), 3, 0)) == 0


@pytest.mark.parametrize("window", [1, 3])
def test_distances_of_keys_equal_a_loop(window: int) -> None:
    keys = torch.randn(17, 6)
    got = key_distances(keys, window)
    for p in range(16):
        if p < window - 1 or p + window > 16:
            assert got[p] == -torch.inf
            continue
        a, b = keys[p - window + 1 : p + 1].mean(0), keys[p + 1 : p + 1 + window].mean(0)
        assert float(got[p]) == pytest.approx(1 - float(F.cosine_similarity(a, b, dim=0)), abs=1e-5)


@pytest.mark.parametrize("at_once", [5, 4096])
def test_the_predictor_equals_attention_in_each_window(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundaries, "GAPS_AT_ONCE", at_once)
    torch.manual_seed(0)
    net = BoundaryPredictor(12, 3, 8).eval().requires_grad_(False)
    net.centre.normal_()
    net.spread.uniform_(0.5, 2.0)
    keys = torch.randn(20, 12)
    got = net(keys)
    assert got.shape == (19,)
    x = (keys - net.centre) / net.spread
    attention = torch.nn.MultiheadAttention(12, net.heads, batch_first=True)
    attention.load_state_dict({
        "in_proj_weight": net.project.weight, "in_proj_bias": net.project.bias,
        "out_proj.weight": net.out.weight, "out_proj.bias": net.out.bias,
    })  # fmt: skip
    for p in range(19):
        if p < 2 or p > 16:
            assert got[p] == -torch.inf
            continue
        near = x[p - 2 : p + 4]
        tokens = net.norm(near + attention(near[None], near[None], near[None])[0][0].detach())
        a, b = tokens[:3].mean(0), tokens[3:].mean(0)
        features = torch.cat([a, b, (a - b).abs(), a * b, F.cosine_similarity(a, b, dim=0)[None]])
        assert_close(got[p : p + 1], net.compare(features), 1e-5)
    assert (net(keys[:5]) == -torch.inf).all()
    assert net(keys[:1]).shape == (0,)


def test_focal_loss_equals_its_formula() -> None:
    z, y = torch.randn(50), torch.rand(50) * (torch.rand(50) > 0.5)
    want = 0.0
    for logit, label in zip(z.tolist(), y.tolist(), strict=True):
        p = float(torch.sigmoid(torch.tensor(logit)))
        log, other = float(torch.tensor(p).log()), float(torch.tensor(1 - p).log())
        want += (label * (1 - p) + (1 - label) * p) ** 2 * -(3 * label * log + (1 - label) * other)
    assert float(focal_loss(z, y, 3.0, 2.0)) == pytest.approx(want / 50, rel=1e-4)


def test_training_learns_planted_boundaries() -> None:
    """Topics change every few tokens; the predictor finds where, in texts that it has not seen."""
    torch.manual_seed(0)
    topics, lessons = torch.randn(12, 16), []
    for _ in range(16):
        lengths = torch.randint(9, 25, (10,)).tolist()
        which = torch.randperm(12)[:10]
        keys = torch.cat([topics[t] + 0.5 * torch.randn(n, 16) for t, n in zip(which, lengths, strict=True)])
        labels = torch.zeros(len(keys) - 1)
        labels[torch.tensor(lengths).cumsum(0)[:-1] - 1] = 0.9
        lessons.append(Lesson(keys, labels))
    done: list[int] = []
    learned = train_predictor(lessons, BoundaryRecipe(epochs=12, hidden=32, lr=3e-3), 0, lambda n, note: done.append(n))
    assert learned.losses[1] < 0.5 * learned.losses[0]
    assert learned.found > 0.9 > learned.by_chance + 0.2
    assert sum(done) == 12


# -- calibration and settings ------------------------------------------------------------------------------------------


class Probe:
    """A tiny model with a tokenizer of words; counts what was reported."""

    def __init__(self, model: Any, seed: int = 0) -> None:
        self.model, self.tokenizer, self.seed, self.steps = model, WordTokenizer(), seed, 0

    def progress(self, total: int, label: str) -> Callable[[int, str], None]:
        def advance(steps: int, note: str) -> None:
            self.steps += steps

        return advance


def test_a_calibrated_predictor_is_used_and_travels(tmp_path: Any) -> None:
    model, recipe = llama(), BoundaryRecipe(texts=4, epochs=2, hidden=8)
    probe = Probe(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    made = DHSA(**SMALL).calibrate(probe, longest=160, recipe=recipe)
    assert probe.steps == 6
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert {"texts", "found", "found_by_chance", "loss", "seconds", "seed"} <= made.provenance.keys()
    again = load_profile(save_profile(made, tmp_path / "dhsa.json"))
    assert again == made
    same = DHSA(**SMALL).calibrate(Probe(model), longest=160, recipe=recipe)
    assert all(torch.equal(x, made.tensors[name]) for name, x in same.tensors.items())
    ids = prompt(1, 93)
    trained, untrained = (applied(model, DHSA(**SMALL), ids, profile=p)[0] for p in (again, profile_for_model(model)))
    assert (trained - untrained).abs().max() > 0
    assert torch.equal(trained, applied(model, DHSA(**SMALL), ids, profile=made)[0])


def profile_for_model(model: Any) -> Profile:
    return profile_for(ModelShape.of(model))


def test_the_predictor_that_ships() -> None:
    """What `apply` finds for the built-in model, and that it learned something on the texts it was measured with."""
    sizes = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    shape = ModelShape.of(LlamaConfig(**sizes, vocab_size=49152, max_position_embeddings=8192))
    shipped = built_in_profile("dhsa", shape)
    assert shipped is not None
    assert shipped.provenance["found"] > shipped.provenance["found_by_chance"] + 0.3
    roles = DHSA().plan(shape, shipped, 4096)
    logits = roles[0].extra["predictor"](torch.randn(40, 192))
    assert logits[3:36].isfinite().all()


def test_only_predicted_boundaries_need_a_profile() -> None:
    model, ids = llama(), prompt(1, 61)
    with pytest.raises(foveate.BadArgument, match="calibrate"):
        foveate.apply(model, DHSA(**SMALL))
    for way in ("similarity", "fixed"):
        applied(model, DHSA(**SMALL, boundaries=way), ids)
    good = profile_for_model(model)
    other = profile_for_model(llama(heads=4, kv_heads=4))
    for bad in ({}, {k: x for k, x in good.tensors.items() if k != "out.bias"}, other.tensors):
        with pytest.raises(foveate.BadArgument, match="predictor"):
            foveate.apply(model, DHSA(**SMALL), profile=Profile("dhsa", good.model, good.data, {}, bad))


@pytest.mark.parametrize("share", [0.45, 0.6, 0.8])
def test_the_prompts_reads_are_within_the_budget(share: float) -> None:
    """The dense end counted in."""
    model, ids = llama(), prompt(1, 200)
    with foveate.apply(model, DHSA(**SMALL, boundaries="similarity"), budget=share) as handle, torch.no_grad():
        cache = handle.cache()
        cache.meter = {}
        model(ids, past_key_values=cache)
    dense = 3 * 6 * 200 * 201 / 2
    assert share - 0.04 < cache.meter["prompt_read"] / dense <= share


def test_decode_is_dense() -> None:
    with watching() as seen:
        applied(llama(), DHSA(**SMALL, boundaries="fixed"), prompt(1, 61), prompt(1, 2, seed=1))
    assert [isinstance(r["parts"], list) for r in seen] == [True] * 3 + [False] * 6


@pytest.mark.parametrize("bad", [{"block": 0}, {"boundaries": "oracle"}, {"tokens": 15}, {"apart": -1}, {"chunk": 0}])
def test_bad_parameters(bad: dict[str, Any]) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        DHSA(**{**SMALL, **bad})
    with pytest.raises(foveate.BadArgument, match="texts"):
        BoundaryRecipe(texts=1)


def test_defaults_are_the_papers() -> None:
    method = DHSA()
    assert (method.tokens, method.block, method.sink, method.instruction, dhsa.WINDOW) == (2048, 128, 128, 64, 4)
    assert (method.local, method.apart, method.boundaries) == (64, 8, "predicted")
    recipe = BoundaryRecipe()
    assert (recipe.theta, recipe.window, recipe.apart, recipe.sharpness, recipe.focus) == (1.1, 4, 8, 4.0, 2.0)
