"""LycheeDecode: must-hold tests of its card (those of its gates stand with the gates)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.recorded import recording
from tests.contract.recorded import steps as decoded
from tests.heads.words import WordTokenizer
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, stores, watching
from tests.methods.test_duo_attention import Probe

import foveate
from foveate.attention import decoding
from foveate.engine import captured
from foveate.heads.hardkuma import HardKuma, KumaRecipe, Stretch
from foveate.methods import LycheeDecode, Profile, SnapKV
from foveate.methods.profile import built_in_profile, fingerprint, load_profile, save_profile
from foveate.models import ModelShape, tiny

SMALL = {"budget": 12, "recent": 2}


def profile_for(shape: ModelShape) -> Profile:
    """Every third head open, by no reason."""
    table = [[0.9 if (x.index + h) % 3 == 0 else 0.1 for h in range(x.num_kv_heads)] for x in shape.layers]
    return Profile("lycheedecode", fingerprint(shape), {"open": table})


def profile(model: Any, table: list[Any]) -> Profile:
    return Profile("lycheedecode", fingerprint(ModelShape.of(model)), {"open": table})


OPEN = [[0.0, 0.0], [0.1, 0.7], [0.6, 0.2], [0.3, 0.4]]
LOOKING = [(0, 1), (1,), (0,), ()]


def best(read: dict[str, Any], head: int, now: int, keep: int, recent: int, reduce: str, kv_heads: int) -> set[int]:
    """What one kv head's query at position `now` looks at most, by the plain formula."""
    k = read["store"].bands[0].keys()[head, : now + 1].double()
    q = read["q"][0, :, 0].unflatten(0, (kv_heads, -1))[head].double()
    mass = (q @ k.T * read["how"].scale).softmax(-1)
    mass = mass.amax(0) if reduce == "max" else mass.mean(0)
    mass[now + 1 - recent :] = torch.inf
    return set(mass.topk(min(keep, now + 1)).indices.tolist())


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (16, 2)])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_reads_the_list_that_came_down(heads: int, kv_heads: int, reduce: str) -> None:
    model, ids, steps = llama(heads=heads, kv_heads=kv_heads, layers=4), prompt(1, 41), prompt(1, 3, seed=1)
    with watching() as seen:
        applied(model, LycheeDecode(tokens=9, recent=2, reduce=reduce), ids, steps, profile=profile(model, OPEN))
    reads = [read for read in seen if read["q"].shape[2] == 1]
    assert len(reads) == 12
    for step in range(3):
        lists: dict[int, set[int]] = {}
        for layer in range(4):
            read, now = reads[4 * step + layer], 41 + step
            for head in range(2):
                if read["parts"].lists is None:
                    got = set(range(now + 1))
                else:
                    row = read["parts"].lists[0, head, 0]
                    got = set(row[row >= 0].tolist())
                if head in LOOKING[layer]:
                    assert got == set(range(now + 1))
                    lists[head] = best(read, head, now, 9, 2, reduce, kv_heads)
                else:
                    assert got == lists[head]
                    assert {now - 1, now} <= got


def test_sparse_heads_are_dense_attention_under_their_list() -> None:
    model, ids, steps = llama(heads=4, kv_heads=2, layers=4), prompt(1, 41), prompt(1, 2, seed=1)
    with watching() as seen:
        applied(model, LycheeDecode(tokens=9, recent=2), ids, steps, profile=profile(model, OPEN))
    for read in seen[-4:]:
        k, v = (x.repeat_interleave(2, 0) for x in (read["store"].bands[0].keys(), read["store"].bands[0].values()))
        scores = (read["q"][0] @ k.transpose(-1, -2) * read["how"].scale)[:, 0]
        if read["parts"].lists is not None:
            rows = read["parts"].lists[0, :, 0].repeat_interleave(2, 0)
            mask = torch.zeros_like(scores, dtype=torch.bool)
            for head, row in enumerate(rows):
                mask[head, row[row >= 0].long()] = True
            scores = scores.masked_fill(~mask, -torch.inf)
        want = (scores.softmax(-1).unsqueeze(1) @ v)[:, 0]
        assert_close(read["result"].out[0, :, 0], want, TOLERANCE)


@pytest.mark.parametrize(("heads", "gates", "reduce"), [(4, [0.1, 0.7], "max"), (6, [0.6, 0.2], "mean")])
def test_kernels_read_and_list_what_formulas_do(
    heads: int, gates: list[float], reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In recorded steps: heads that look everywhere and heads with lists in one read, lists made of some of them."""
    pytest.importorskip("triton")
    if not decoding._interpreted():
        pytest.skip("kernels run here in Triton's interpreter")
    net, table = llama(heads=heads, kv_heads=2, layers=3), [[0.0, 0.0], gates, [0.3, 0.4]]
    ids, mask, new = prompt(2, 41), torch.ones(2, 41, dtype=torch.long), prompt(2, 3, seed=1)
    mask[1, :35] = 0
    made: list[Any] = []
    monkeypatch.setattr("foveate.cache.cache.WARMUP", 1)
    with foveate.apply(net, LycheeDecode(tokens=9, recent=2, reduce=reduce), profile=profile(net, table)) as handle:
        _, want = decoded(net, handle, ids, mask, new)
        monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (True, ""))
        listed = decoding.Held.listed
        monkeypatch.setattr(decoding.Held, "listed", lambda *a, **k: made.append(a) or listed(*a, **k))
        with recording(net, handle, by=captured.record):
            cache, got = decoded(net, handle, ids, mask, new)
    assert cache.step is not None and len(made) == 4  # two layers with lists, two recorded steps
    assert_close(got, want, TOLERANCE)


def test_all_heads_retrieving_is_dense() -> None:
    model, ids, steps = llama(), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    got, _ = applied(model, LycheeDecode(tokens=16), ids, steps, profile=profile(model, [[1.0, 1.0]] * 3))
    assert_close(got, want, TOLERANCE)
    got, _ = applied(model, LycheeDecode(tokens=16, retrieval=6), ids, steps, profile=profile(model, [[0.0] * 2] * 3))
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("kwargs", [{"tokens": 48}, {"budget": 1.0}, {}])
def test_room_for_all_is_dense(kwargs: dict) -> None:
    model, ids, steps = llama(), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    got, _ = applied(model, LycheeDecode(**kwargs), ids, steps, profile=profile(model, [[0.0, 0.0]] * 3))
    assert_close(got, want, TOLERANCE)


def test_reads_per_step() -> None:
    """Retrieval heads t, sparse heads k; the budget spends what retrieval leaves."""
    model, ids = llama(layers=4), prompt(1, 200)
    given = profile(model, OPEN)
    with foveate.apply(model, LycheeDecode(tokens=20), profile=given) as handle, torch.no_grad():
        cache = handle.cache()
        model(ids, past_key_values=cache)
        cache.meter = {}
        model(prompt(1, 1, seed=1), past_key_values=cache)
    assert cache.meter["decode_read"] == 3 * (4 * 201 + 4 * 20)
    roles = LycheeDecode(budget=0.6).plan(ModelShape.of(model), given, 200)
    assert {role.extra["keep"] for role in roles} == {40}  # 0.6 * 8 heads = 4 dense ones and 4 of 0.2


def test_below_the_floor_is_refused_with_it() -> None:
    shape = ModelShape.of(llama(layers=4))
    with pytest.raises(foveate.Infeasible) as error:
        LycheeDecode(budget=0.5).plan(shape, profile(llama(layers=4), OPEN), 200)
    assert error.value.floor == pytest.approx((4 * 200 + 4 * 16) / 1600)


def test_who_retrieves() -> None:
    """Gates above one half, or the widest; the first layer in any case. Lists nobody reads are not made."""
    model = llama(layers=4)
    shape = ModelShape.of(model)
    roles = LycheeDecode().plan(shape, profile(model, OPEN), 200)
    assert [role.extra["looking"] for role in roles] == LOOKING
    assert [role.name for role in roles] == ["retrieve", "mixed", "mixed", "reuse"]
    assert [role.extra["publish"] for role in roles] == [(0,), (1,), (0,), ()]
    for count, want in ((2, [(0, 1), (), (), ()]), (3, [(0, 1), (1,), (), ()]), (5, [(0, 1), (1,), (0,), (1,)])):
        roles = LycheeDecode(retrieval=count).plan(shape, profile(model, OPEN), 200)
        assert [role.extra["looking"] for role in roles] == want
    with pytest.raises(foveate.BadArgument, match="retrieval"):
        LycheeDecode(retrieval=1).plan(shape, profile(model, OPEN), 200)


def test_sliding_layers_hand_nothing_down() -> None:
    model = tiny("gemma3", layers=5, heads=6, kv_heads=2)
    kinds = [layer.kind for layer in ModelShape.of(model).layers]
    full = [i for i, kind in enumerate(kinds) if kind == "full"]
    table = [[0.1, 0.2] if kind == "full" else None for kind in kinds]
    roles = LycheeDecode(tokens=16).plan(ModelShape.of(model), profile(model, table), 200)
    assert [roles[i].name for i in full] == ["retrieve"] + ["reuse"] * (len(full) - 1)
    assert roles[full[0]].extra["publish"] == (0, 1)
    got, _ = applied(model, LycheeDecode(tokens=16), prompt(1, 61), prompt(1, 3, seed=1), profile=profile(model, table))
    assert got.isfinite().all()


def test_lists_mean_tokens_where_layers_hold_different_ones() -> None:
    """Under eviction a slot is another token in the next layer; what is read is what was listed and is held there."""
    model, ids, steps = llama(layers=3), prompt(1, 61), prompt(1, 2, seed=1)
    both = LycheeDecode(tokens=9, recent=2) | SnapKV(budget=24, window=5)
    with watching() as seen:
        applied(model, both, ids, steps, profile=profile(model, [[0.0, 0.0]] * 3))
    first, *others = seen[-3:]
    at = [read["store"].bands[0].slot_positions() for read in seen[-3:]]
    for head in range(2):
        k = first["store"].bands[0].keys()[head]
        mass = (first["q"][0, 3 * head : 3 * head + 3, 0] @ k.T * first["how"].scale).softmax(-1).amax(0)
        mass[at[0][head] >= 61] = torch.inf
        listed = set(at[0][head][mass.topk(9).indices].tolist())
        for read, positions in zip(others, at[1:], strict=True):
            row = read["parts"].lists[0, head, 0].long()
            held = set(positions[head].tolist())
            assert set(positions[head][row[row >= 0]].tolist()) == listed & held
            assert held != set(at[0][head].tolist())


def test_latent_attention_is_refused() -> None:
    model = tiny("deepseek-v3")
    with pytest.raises(foveate.Refused, match="one latent vector for all heads"):
        foveate.apply(model, LycheeDecode(), profile=profile(model, OPEN))


@pytest.mark.parametrize("table", [None, 3, [[1.0, 1.0]], [[1.0]] * 3, [["a", "b"]] * 3, {"0": [1.0, 1.0]}])
def test_damaged_profiles_are_refused(table: Any) -> None:
    with pytest.raises(foveate.BadArgument, match="one gate per kv head"):
        foveate.apply(llama(), LycheeDecode(), profile=profile(llama(), table))


@pytest.mark.parametrize("bad", [{"recent": 0}, {"tokens": 8}, {"retrieval": -1}, {"corrects": -1}, {"reduce": "sum"}])
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        LycheeDecode(**bad)


def test_calibration_gives_a_profile_that_plan_takes(tmp_path: Any) -> None:
    model = llama(layers=2, max_positions=256)
    probe = Probe(model, WordTokenizer())
    recipe = KumaRecipe(steps=2, lr=0.3)
    made = LycheeDecode(recent=4).calibrate(probe, recipe=recipe)
    assert (made.provenance["steps"], made.provenance["lengths"][1], probe.total) == (2, 256, 2)
    assert made.data["open"][0] == [1.0, 1.0]
    assert all(0 < gate < 1 for gate in made.data["open"][1])
    again = load_profile(save_profile(made, tmp_path / "lychee.json"))
    assert again == made
    got, _ = applied(model, LycheeDecode(**SMALL), prompt(1, 61), prompt(1, 2, seed=1), profile=again)
    assert got.isfinite().all()
    assert LycheeDecode(recent=4).calibrate(Probe(model, WordTokenizer()), recipe=recipe).data == made.data
    with pytest.raises(foveate.BadArgument, match="longest=257"):
        LycheeDecode().calibrate(probe, longest=257)


def test_the_shipped_profile_fits_its_model() -> None:
    """What `apply` finds for the built-in model: made in minutes on a CPU, and about as many heads open as asked."""
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
    shipped = built_in_profile("lycheedecode", shape)
    assert shipped is not None
    gates = torch.tensor(shipped.data["open"])
    assert gates.shape == (30, 3)
    assert gates[0].tolist() == [1.0, 1.0, 1.0]
    count = int((gates > 0.5).sum())
    assert abs(count - 90 * shipped.provenance["open"]) < 10
    assert shipped.provenance["seconds"] < 240
    assert shipped.provenance["device"] == "cpu"
    roles = LycheeDecode(budget=0.5).plan(shape, shipped, 2048)
    reads = sum(2048 * len(r.extra["looking"]) + r.extra["keep"] * (3 - len(r.extra["looking"])) for r in roles)
    assert 0.49 < reads / (90 * 2048) <= 0.5


def test_defaults_are_the_papers() -> None:
    method, recipe, stretch = LycheeDecode(), KumaRecipe(), Stretch()
    assert (method.tokens, method.retrieval, method.reduce, method.corrects) == (4096, None, "max", 0)
    assert (recipe.steps, recipe.open, recipe.seen) == (3000, 32 / 256, 0.3)
    assert (stretch.low, stretch.high) == (-0.1, 1.1)
    gates = HardKuma(6, 2, 2, 0, torch.device("cpu"), recipe.climb, stretch)
    assert gates.logs.exp().tolist() == [[1.0] * 4] * 2  # alpha and beta


# -- corrections -------------------------------------------------------------------------------------------------------


def contents(cache: Any, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of a row by position, per layer."""
    found = []
    for store in stores(cache):
        (band,) = store.bands
        pairs = [i for i, pair in enumerate(band.pairs) if int(pair) // store.spec.heads == row]
        length = int(band.lengths[pairs[0]])
        order = band.slot_positions()[pairs][:, :length].argsort(-1).unsqueeze(-1)
        found.append(tuple(x()[pairs][:, :length].take_along_dim(order, 1) for x in (band.keys, band.values)))
    return found


def fed(model: Any, method: Any, given: Profile | None, ids: Any, steps: Any, mask: Any = None) -> tuple[Any, Any]:
    """Logits of each step and the cache, with what generate() would say about padding."""
    with foveate.apply(model, method, profile=given) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(ids.shape[1])
        mask = torch.ones_like(ids) if mask is None else mask
        rows = []
        for new in [ids, *steps.split(1, dim=1)]:
            mask = mask if new is ids else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            places = (mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
            rows.append(model(new, past_key_values=cache, attention_mask=mask, position_ids=places).logits[:, -1])
        return torch.stack(rows[1:], dim=1), cache


@pytest.mark.parametrize(("family", "layers"), [("llama", 4), ("gemma3", 7)])
def test_corrected_tokens_are_those_of_dense_decoding(family: str, layers: int) -> None:
    """After 5, 10 and 15 tokens all that came before is as if decoded densely; what came since is not."""
    model = tiny(family, layers=layers, heads=4, kv_heads=2)
    given, padded = profile(model, [[0.0] * 2] * layers), torch.ones(2, 41, dtype=torch.long)
    padded[1, :9] = 0
    ids, steps = prompt(2, 41), prompt(2, 18, seed=1)
    method, never = (LycheeDecode(tokens=9, recent=2, corrects=n) for n in (5, 0))
    for count in (5, 6, 11, 18):
        got, cache = fed(model, method, given, ids, steps[:, :count], padded)
        plain, drifted = (fed(model, m, p, ids, steps[:, :count], padded) for m, p in (("dense", None), (never, given)))
        right = (count - 1) // 5 * 5
        assert cache.get_seq_length() == 41 + count
        for row, pad in enumerate((0, 9)):
            for mine, dense, loose in zip(*(contents(c, row) for c in (cache, plain[1], drifted[1])), strict=True):
                for x, want, wrong in zip(mine, dense, loose, strict=True):
                    since = want.shape[1] - (count - right)
                    assert since >= 0
                    x = x[:, -want.shape[1] :]  # a window's older tokens leave when the next correction is due
                    assert_close(x[:, :since], want[:, :since], TOLERANCE)
                    assert wrong.shape[1] == 41 - pad + count or family == "gemma3"
        assert not torch.allclose(got[:, -1], plain[0][:, -1], atol=1e-3)
    deep = [contents(c, 0)[-1][1] for c in (cache, plain[1], drifted[1])]
    new = slice(-18, -3)
    assert (deep[2][:, new] - deep[1][:, new]).abs().amax() > 100 * (deep[0][:, -18:-3] - deep[1][:, new]).abs().amax()


def test_steps_between_corrections_are_sparse_and_as_without_them() -> None:
    model, given = llama(layers=4), profile(llama(layers=4), OPEN)
    ids, steps = prompt(2, 41), prompt(2, 8, seed=1)
    got, _ = fed(model, LycheeDecode(tokens=9, recent=2, corrects=5), given, ids, steps)
    want, _ = fed(model, LycheeDecode(tokens=9, recent=2), given, ids, steps)
    assert torch.equal(got[:, :5], want[:, :5])
    assert not torch.allclose(got[:, 5:], want[:, 5:], atol=1e-4)
    with watching() as seen:
        fed(model, LycheeDecode(tokens=9, recent=2, corrects=5), given, ids, steps)
    assert [read["q"].shape[2] for read in seen[::4]] == [41, 1, 1, 1, 1, 1, 5, 1, 1, 1]
    for read in seen[4 * 6 : 4 * 7]:
        assert read["parts"].dense
    assert seen[4 * 7 + 3]["parts"].lists is not None


def test_corrections_follow_rows_and_stop_before_a_prompt() -> None:
    """Beams take what waits with them, a second prompt reads what is right, and a crop makes fewer wait."""
    model, given = llama(layers=4), profile(llama(layers=4), OPEN)
    ids, steps = prompt(2, 41), prompt(2, 6, seed=1)
    with foveate.apply(model, LycheeDecode(tokens=9, recent=2, corrects=4), profile=given) as handle, torch.no_grad():
        cache = handle.cache()
        cache.expect(41)
        for new in [ids, *steps[:, :3].split(1, dim=1)]:
            model(new, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-1)
        other = cache.fork()
        model(steps[[1, 0], 2:3], past_key_values=cache)
        other.expect(7)
        model(prompt(2, 7, seed=2), past_key_values=other)
        model(steps[[1, 0], 3:4], past_key_values=cache)
        assert cache.uncorrected["input_ids"]["given"].tolist() == steps[[1, 0], :4].tolist()
        assert cache.nbytes > sum(layer.nbytes for layer in cache.couriers())
        model(steps[[1, 0], 4:5], past_key_values=cache)
        assert cache.uncorrected["input_ids"]["given"].shape == (2, 1)
        model(steps[[1, 0], 5:6], past_key_values=other)
        assert other.uncorrected["input_ids"]["given"].shape == (2, 1)
    for made, told in ((cache, steps[[1, 0], :4]), (other, torch.cat([steps[[1, 0], :2], prompt(2, 7, seed=2)], 1))):
        _, dense = fed(model, "dense", None, ids[[1, 0]], told)
        for row in range(2):
            for mine, want in zip(contents(made, row), contents(dense, row), strict=True):
                for x, y in zip(mine, want, strict=True):
                    assert_close(x[:, : y.shape[1]], y, TOLERANCE)


def test_generation_is_corrected_as_it_goes() -> None:
    """Beams and sampling through generate(): as without corrections until the first, finished in any case."""
    model, given = llama(layers=4), profile(llama(layers=4), OPEN)
    ids = prompt(2, 41)
    for how in ({}, {"num_beams": 3}):
        made = []
        for corrects in (0, 3, 5):
            with foveate.apply(model, LycheeDecode(tokens=9, recent=2, corrects=corrects), profile=given):
                made.append(model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, **how))
        assert [x.shape for x in made] == [(2, 53)] * 3
        if not how:
            assert torch.equal(made[0][:, :46], made[2][:, :46])


def test_what_cannot_give_tokens_back_does_not_go_with_corrections() -> None:
    from foveate.methods import METHODS

    LycheeDecode() | METHODS["kivi"]()
    for other in ("kivi", "spatten", "h2o"):
        with pytest.raises(foveate.BadArgument, match="takes back what it decoded"):
            METHODS[other]() | LycheeDecode(corrects=8)
