"""A2ATS: must-hold tests of its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import left_padded, run, tokens
from tests.families import family_model
from tests.heads.words import WordTokenizer
from tests.methods.runs import TOLERANCE, applied, llama, logits, prompt, stores, watching
from tests.methods.workbench import Workbench
from tests.rotation import turn
from torch import Tensor
from transformers import LlamaConfig

import foveate
from foveate.heads.codebooks import Codebook, collect, fit, kmeans, query_metric, random_texts
from foveate.methods import A2ATS, H2O, Profile, SnapKV
from foveate.methods.policies.lists import mask_lists, set_lists
from foveate.methods.policies.ranks import among_best, best_ranks
from foveate.methods.profile import built_in_profile, fingerprint, from_json, to_json
from foveate.models import tiny
from foveate.models.shape import ModelShape

SMALL = {"budget": 22, "sink": 3, "window": 6}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def profile_for(shape: ModelShape, centroids: int = 12) -> Profile:
    """Codebooks of no meaning, for any model."""
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    for layer in shape.layers:
        heads, dim = layer.num_kv_heads, layer.head_dim
        lower = torch.randn(heads, dim, dim, generator=generator).tril() * 0.2 + torch.eye(dim)
        book = Codebook(torch.randn(heads, centroids, dim, generator=generator), lower)
        tensors |= book.tensors(str(layer.index))
    return Profile("a2ats", fingerprint(shape), {"distance": 2048, "centroids": centroids}, {}, tensors)


def of(model: Any, centroids: int = 12) -> Profile:
    return profile_for(ModelShape.of(model), centroids)


def listed(read: dict[str, Any], row: int, head: int) -> list[int]:
    slots = read["parts"].lists[row, head, 0]
    return slots[slots >= 0].tolist()


def truth(model: Any, method: A2ATS, read: dict[str, Any], book: Codebook, length: int, row: int) -> list[list[int]]:
    """Tokens that a decode step reads of one row, by kv head, as the card says it: token by token."""
    kv = read["store"].spec.heads
    keys = read["store"].bands[0].keys().unflatten(0, (-1, kv))[row, :, :length]
    raw = turn(model, keys, -torch.arange(length))
    q = turn(model, read["q"][row], torch.tensor([method.distance - length + 1]))[:, 0]
    most = int(method.ratio * length)
    found = []
    for head in range(kv):
        centroids, lower = book.centroids[head].double(), book.lower[head].double()
        codes = [int(((k @ lower - centroids @ lower) ** 2).sum(1).argmin()) for k in raw[head]]
        forced = set(range(min(method.sink, length))) | set(range(max(0, length - method.window), length))
        others = [j for j in range(length) if j not in forced]
        for query in q.unflatten(0, (kv, -1))[head]:
            table = centroids @ query
            forced |= set(sorted(others, key=lambda j, t=table, c=codes: -float(t[c[j]]))[:most])
        found.append(sorted(forced))
    return found


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
def test_reads_what_the_codes_say(heads: int, kv_heads: int) -> None:
    """Lists of rows of different length against a reference token by token; then exact attention over them."""
    model = llama(layers=1, heads=heads, kv_heads=kv_heads)
    method, profile = A2ATS(ratio=0.11, sink=3, window=5), of(model)
    book = Codebook.of(profile.tensors, "0")
    lengths = (4, 37, 61)
    ids, mask = left_padded([prompt(1, n, seed=n)[0] for n in lengths])
    with foveate.apply(model, method, profile=profile) as handle, watching() as seen:
        run(model, handle.cache(), ids, prompt(3, 5, seed=9), mask)
    for step, read in enumerate(seen[1:]):
        for row, length in enumerate(lengths):
            length += step + 1
            for head, wanted in enumerate(truth(model, method, read, book, length, row)):
                assert listed(read, row, head) == wanted
                group = read["q"].shape[1] // kv_heads
                assert len(wanted) <= 8 + group * int(0.11 * length)
                k, v = (
                    x.unflatten(0, (-1, kv_heads))[row, head, wanted]
                    for x in (read["store"].bands[0].keys(), read["store"].bands[0].values())
                )
                q = read["q"][row, head * group : (head + 1) * group, 0]
                want = (q @ k.T * read["how"].scale).softmax(-1) @ v
                assert_close(read["result"].out[row, head * group : (head + 1) * group, 0], want, TOLERANCE)


@pytest.mark.parametrize("capacity", [40, 1700])
def test_the_best_of_any_head_are_those_of_a_rank_below_the_count(seed: int, capacity: int) -> None:
    """And lists of what is chosen are those of a plain loop, however long the rows."""
    torch.manual_seed(seed)
    scores = torch.randn(2, 3, 2, 4, capacity).mul(5).round()
    scores[0, 1, :, 2, 9:] = -torch.inf
    counts = torch.randint(0, 12, (2, 3, 4, 1))
    chosen = among_best(scores, 11, counts)
    assert torch.equal(chosen, best_ranks(scores, 11) < counts)
    want = [row.nonzero().flatten().tolist() for row in chosen.flatten(0, 2)]
    for lists in (set_lists(chosen, 25), mask_lists(chosen)):
        assert [[n for n in row if n >= 0] for row in lists.flatten(0, 2).tolist()] == want
        assert ((lists >= 0).long().diff(dim=-1) <= 0).all(), "nothing stands behind the end"


def test_a_budget_is_filled_by_what_the_heads_choose() -> None:
    """The union of as many of each query head's best as fit, and of the next best as many as there is room for."""
    model = llama(layers=1, heads=6, kv_heads=2)
    profile = of(model)
    with watching() as seen:
        applied(model, A2ATS(budget=24, sink=3, window=5), prompt(1, 61), prompt(1, 1, seed=1), profile=profile)
    book = Codebook.of(profile.tensors, "0")
    fitting = {}
    for k in range(1, 20):
        union = truth(model, A2ATS(ratio=(k + 0.1) / 62, sink=3, window=5), seen[1], book, 62, 0)
        fitting |= {(head, k): tokens for head, tokens in enumerate(union)}
    for head in (0, 1):
        got = set(listed(seen[1], 0, head))
        assert len(got) == 24
        inside = [k for k in range(1, 20) if len(fitting[head, k]) <= 24]
        assert max(inside) >= 5  # what three heads choose that agree on nothing
        assert set(fitting[head, max(inside)]) <= got <= set(fitting[head, max(inside) + 1])


def test_all_tokens_is_dense() -> None:
    model, ids, steps = llama(), prompt(2, 41), prompt(2, 7, seed=1)
    want, _ = logits(model, ids, steps)
    for options in ({"ratio": 1.0}, {"budget": 1.0}, {"window": 48}, {"ratio": 0.999, "sink": 0, "window": 2}):
        got, _ = applied(model, A2ATS(**options), ids, steps, profile=of(model))
        assert_close(got, want, TOLERANCE)


def test_the_metric_is_the_error_of_scores() -> None:
    """||e L||^2 is the mean of (q e)^2 over the queries, but for one factor."""
    q = torch.randn(500, 8, dtype=torch.float64) * torch.linspace(0.3, 3, 8)
    lower = query_metric(q.T @ q)
    assert torch.equal(lower, lower.tril())
    errors = torch.randn(40, 8, dtype=torch.float64)
    ratio = (errors @ lower).square().sum(1) / (errors @ q.T).square().mean(1)
    assert_close(ratio / ratio[0], torch.ones_like(ratio), 1e-5)


def test_without_queries_it_is_plain_vector_quantisation() -> None:
    # In float64, since a key as near to one centroid as to another would go either way.
    keys = torch.randn(300, 8, dtype=torch.float64)
    book = fit(keys, 5 * torch.eye(8), 6, torch.Generator().manual_seed(1))
    plain = kmeans(keys, 6, torch.Generator().manual_seed(1))
    assert_close(book.centroids, plain, 1e-5)
    assert torch.equal(book.codes(keys), torch.cdist(keys, plain).argmin(1))


def test_as_many_centroids_as_keys_lose_nothing() -> None:
    """The score of a code is then the score of its key; fewer than asked for are enough."""
    distinct = torch.randn(9, 8)
    keys, q = distinct[torch.randint(9, (200,))], torch.randn(30, 8)
    book = fit(keys, q.T @ q, 32)
    assert len(book.centroids) == 9
    table = q @ book.centroids.T
    assert_close(table[:, book.codes(keys)], q @ keys.T, 1e-4)


def test_knowing_the_queries_helps() -> None:
    """At equal size the scores of codes are closer to the keys' where the queries' metric was used."""
    q = torch.randn(400, 16) * torch.logspace(-1, 1, 16)
    keys = torch.randn(2000, 16)

    def error(book: Codebook) -> float:
        return float((q @ (keys - book.centroids[book.codes(keys)]).T).square().mean())

    aware = error(fit(keys, q.T @ q, 64, torch.Generator().manual_seed(0)))
    blind = error(fit(keys, torch.eye(16), 64, torch.Generator().manual_seed(0)))
    assert aware < 0.5 * blind


def test_kmeans_finds_clusters_and_a_minimum() -> None:
    """One of a few starts finds groups that lie apart; every start ends where each centroid is the mean of its own."""
    centres = torch.randn(5, 4) * 20
    points = (centres[torch.arange(500) % 5] + 0.1 * torch.randn(500, 4))[torch.randperm(500)]
    errors = []
    for seed in range(12):
        found = kmeans(points, 5, torch.Generator().manual_seed(seed))
        code = torch.cdist(points, found).argmin(1)
        means = torch.stack([points[code == c].mean(0) for c in range(5)])
        assert_close(found, means, 0.02)
        errors.append(float(torch.cdist(centres, found).amin(1).max()))
    assert min(errors) < 0.1


def test_packed_codebooks_are_close_and_small() -> None:
    lower = torch.randn(3, 16, 16).tril()
    book = Codebook(torch.randn(3, 10, 16), lower)
    held = book.tensors("4")
    again = Codebook.of(held, "4")
    assert_close(again.centroids, book.centroids, 0.01)
    assert_close(again.lower, lower, 0.01)
    size = sum(x.numel() * x.element_size() for x in held.values())
    assert size == 3 * (10 * 16 + 10 * 2 + 16 * 17 // 2 + 16 * 2)


def test_codes_are_of_keys_without_position() -> None:
    """In the first layer equal tokens have equal keys but for their place: equal codes, which rotated keys lack."""
    model = llama(layers=1)
    ids = prompt(1, 30).repeat(1, 2)
    profile = of(model, 50)
    _, cache = applied(model, A2ATS(**SMALL), ids, prompt(1, 1), profile=profile)
    codes = stores(cache)[0].bands[0].tags["a2ats"].data[:, :60, 0]
    assert torch.equal(codes[:, :30], codes[:, 30:])
    keys = stores(cache)[0].bands[0].keys()[:, :60]
    rotated = Codebook.of(profile.tensors, "0").codes(keys)
    assert not torch.equal(rotated[:, :30], rotated[:, 30:])


@pytest.mark.parametrize("partner", [SnapKV(budget=30, window=8), H2O(budget=30)], ids=lambda m: m.id)
def test_codes_travel_with_their_tokens(partner: Any) -> None:
    model = llama(layers=2)
    profile = of(model)
    _, cache = applied(model, partner | A2ATS(**SMALL), prompt(2, 61), prompt(2, 6, seed=1), profile=profile)
    for layer, store in enumerate(stores(cache)):
        book = Codebook.of(profile.tensors, str(layer))
        for band in store.bands:
            for i, pair in enumerate(band.pairs):
                n = int(band.lengths[i])
                codes = band.tags["a2ats"].data[i, :n, 0]
                raw = turn(model, band.keys()[i, :n], -band.slot_positions()[i, :n])
                head = int(pair) % 2
                want = Codebook(book.centroids[head].double(), book.lower[head].double()).codes(raw)
                known = codes >= 0  # the newest token is coded when the next one looks
                assert int(known.sum()) >= n - 1
                assert torch.equal(codes[known].long(), want[known])


def test_codes_take_two_bytes_a_token_and_head() -> None:
    model = llama()
    _, cache = applied(model, A2ATS(**SMALL), prompt(2, 61), prompt(2, 1), profile=of(model))
    for store in stores(cache):
        (tag,) = store.bands[0].tags.values()
        assert tag.nbytes == 2 * 2 * tag.data.shape[1] * 2


def test_moments_are_of_queries_at_one_distance() -> None:
    """And keys are collected without positions: what a shifted text gives is the same."""
    model = llama(layers=1)
    ids = prompt(1, 40)[0].tolist()
    keys, moment = collect(model, [ids, ids[:9]], 100, lambda *_: None)[0]
    with watching() as seen:
        applied(model, "dense", torch.tensor([ids]))
    band = seen[0]["store"].bands[0]
    raw = turn(model, band.keys(), -torch.arange(40))
    assert_close(keys[:, :40], raw, 1e-3)
    assert_close(keys[:, 40:], raw[:, :9], 1e-3)
    q = turn(model, seen[0]["q"][0], 100 - torch.arange(40))
    texts = [q[:, :n].unflatten(0, (2, 3)).flatten(1, 2) for n in (40, 9)]
    assert_close(moment, torch.stack([x.transpose(1, 2) @ x for x in texts]).sum(0), 1e-4)


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("llama", {"rope_parameters": SCALED}), ("qwen3", {})])
def test_codebooks_and_codes_start_from_what_the_model_makes(family: str, changes: dict[str, Any], seed: int) -> None:
    """Keys behind their own norm and before the rotation; queries turned by the model's angles, scaled ones, too."""
    model, ids = family_model(family, layers=1, heads=6, **changes), tokens(seed, 1, 40)
    attn, made = model.model.layers[0].self_attn, []
    ends = (attn.q_norm, attn.k_norm) if family == "qwen3" else (attn.q_proj, attn.k_proj)
    hooks = [end.register_forward_hook(lambda *a: made.append(a[2])) for end in ends]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    q, k = (x.view(40, -1, 16).transpose(0, 1) for x in made)
    cos, sin = (x[0].double() for x in model.model.rotary_emb(q, torch.tensor([[100]])))
    q = q.double() * cos + torch.cat([-q[..., 8:], q[..., :8]], dim=-1).double() * sin
    q = q.unflatten(0, (2, 3)).flatten(1, 2)
    keys, moment = collect(model, [ids[0].tolist()], 100, lambda *_: None)[0]
    assert_close(keys, k, 1e-3)
    assert_close(moment, q.mT @ q, 1e-4)
    profile = of(model, 50)
    _, cache = applied(model, A2ATS(**SMALL), ids, tokens(seed, 1, 1), profile=profile)
    book = Codebook.of(profile.tensors, "0")
    want = Codebook(book.centroids.double(), book.lower.double()).codes(k.double())
    assert torch.equal(stores(cache)[0].bands[0].tags["a2ats"].data[:, :40, 0].long(), want)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_calibration_makes_a_profile_that_serves(family: str) -> None:
    model = tiny(family, layers=4, heads=4, kv_heads=2)
    bench = Workbench(model)
    method = A2ATS(ratio=0.1, sink=3, window=6)
    profile = method.calibrate(bench, tokens=300, length=60, centroids=8)
    assert bench.steps == bench.total
    again = method.calibrate(Workbench(model), tokens=300, length=60, centroids=8)
    assert all(torch.equal(x, again.tensors[name]) for name, x in profile.tensors.items())
    assert profile.provenance["texts"] == 5
    loaded = from_json(to_json(profile))
    got, _ = applied(model, method, prompt(1, 61), prompt(1, 4, seed=1), profile=loaded)
    assert got.isfinite().all()


def test_the_shipped_profile_fits_the_built_in_model() -> None:
    """What `apply` finds for it: a codebook for each kv head whose codes tell keys apart, and how it was made."""
    sizes = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    shape = ModelShape.of(LlamaConfig(**sizes, vocab_size=49152, max_position_embeddings=8192))
    shipped = built_in_profile("a2ats", shape)
    assert shipped is not None
    assert shipped.provenance["tokens"] == 8192
    assert shipped.data == {"distance": 2048, "centroids": 64}
    for layer in range(30):
        book = Codebook.of(shipped.tensors, str(layer))
        assert book.centroids.shape == (3, 64, 64)
        # A centroid stands nearest to itself, and L can be inverted.
        assert torch.equal(book.codes(book.centroids), torch.arange(64).expand(3, -1))
        assert (book.lower.diagonal(dim1=1, dim2=2) > 0).all()


def test_random_texts_are_of_the_length_asked_for() -> None:
    texts = random_texts(WordTokenizer(bos=True), 77, 0)
    one, two = next(texts), next(texts)
    assert len(one) == len(two) == 77
    assert one != two
    assert one[0] == two[0] == 1
    assert 1 not in one[1:]


def test_what_does_not_fit_is_refused() -> None:
    model = llama()
    with pytest.raises(foveate.BadArgument, match="calibrate"):
        foveate.apply(model, A2ATS())
    with pytest.raises(foveate.BadArgument, match="distance"):
        foveate.apply(model, A2ATS(distance=7), profile=of(model))
    latent = tiny("deepseek-v3", heads=4, kv_heads=4)
    with pytest.raises(foveate.Refused, match="latent"):
        foveate.apply(latent, A2ATS(), profile=of(latent))
    with pytest.raises(foveate.Refused, match="latent"):
        A2ATS().calibrate(Workbench(latent))
    with pytest.raises(foveate.BadArgument, match="centroids"):
        A2ATS().calibrate(Workbench(model), centroids=2**16)


def test_below_the_floor_is_refused_with_it() -> None:
    model = llama()
    with foveate.apply(model, "dense") as handle, pytest.raises(foveate.Infeasible) as error:
        handle.bind(A2ATS(**{**SMALL, "budget": 0.04}), profile=of(model)).check(200)
    assert error.value.floor == pytest.approx((3 + 6 + 1) / 200)


@pytest.mark.parametrize("bad", [{"ratio": 1.1}, {"ratio": -0.1}, {"sink": -1}, {"window": 0}], ids=str)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(foveate.BadArgument, match=next(iter(bad))):
        A2ATS(**bad)


def test_defaults_are_the_released_ones() -> None:
    method = A2ATS()
    assert (method.ratio, method.sink, method.window, method.distance) == (0.03, 8, 64, 2048)
