"""Tokens in the host's memory: they are attended there, and the merged output is that of one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import EXACT, decode, forward, left_padded, plain, prompt, run, tokens
from tests.contract.trace import same_reads, tracing

import foveate
from foveate.attention import Geometry, Selection, merge
from foveate.cache import Place, PlacedColumn, Store, StoreSpec
from foveate.engine import apart
from foveate.errors import BadArgument, Refused
from foveate.methods import METHODS, Method, Profile, Role
from foveate.models import tiny
from foveate.models.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Placed(Method):
    """Dense attention over tokens in two places."""

    id = "placed"
    name = "Placed"
    paper = ""
    slots = frozenset()
    offloads = True

    place: Place = field(default_factory=Place)

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        return [Role(place=self.place)] * len(shape.layers)


PLACES = [Place(), Place(3, 8), Place(3, 8, steady=True), Place(0, 20, 8, steady=True), Place(5, 1, 3)]
SELECTING = {
    "quest": {"page": 4, "dense_layers": 1, "tokens": 24},
    "recycled-attention": {"tokens": 12, "stride": 3},
    "tokenselect": {},
    "delta-attention": {},
    "streaming-llm": {},
    "snapkv": {"window": 4, "capacity": 40},
}
"""Methods beside which tokens are placed: lists of blocks, lists of tokens, turned keys, probabilities, windows, and
tokens that were evicted."""


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
def test_two_places_are_one(family: str, place: Place, seed: int) -> None:
    net = tiny(family, layers=4 if family == "gemma3" else 2, heads=6, kv_heads=2)
    ids, mask = left_padded([tokens(seed + i, n) for i, n in enumerate((1, 7, 41))])
    then = tokens(seed + 9, 3, 20)
    with foveate.apply(net, "dense") as handle:
        want = run(net, handle.cache(), ids, then, mask)
    for chunk in (None, 16):
        with foveate.apply(net, Placed(place=place)) as handle:
            cache = handle.cache()
            got = run(net, cache, ids, then, mask, chunk)
        real = mask.bool()
        assert_close(got.prompt[real], want.prompt[real], EXACT)
        assert_close(got.steps, want.steps, EXACT)
        full = [layer for layer in cache.couriers() if layer.store.spec.place is not None]
        assert full and all(layer.store.away[2].min() > 0 for layer in full)
        assert cache.host_nbytes > 0


@pytest.mark.parametrize("name", SELECTING)
def test_selections_do_not_see_places(name: str, seed: int) -> None:
    """A method reads the same pairs, to the same end, wherever they lie; several tokens in one step too."""
    net = tiny("llama", layers=3, heads=6, kv_heads=2)
    ids, mask = left_padded([tokens(seed + i, n) for i, n in enumerate((33, 61))])
    then = tokens(seed + 9, 2, 5)
    settings = {**_small(name), **SELECTING[name]}
    method = METHODS[name](**settings)
    with foveate.apply(net, method) as handle, tracing(80) as one:
        want = run(net, handle.cache(), ids, then, mask)
    with foveate.apply(net, method | Placed(place=Place(2, 9))) as handle, tracing(80) as two:
        cache = handle.cache()
        got = run(net, cache, ids, then, mask)
    same_reads(two.pairs, one.pairs)
    assert_close(got.steps, want.steps, EXACT)
    assert cache.host_nbytes > 0 or name == "streaming-llm"  # windows stay where they are


def _small(name: str) -> dict:
    from tests.contract.subjects import CASES

    return dict(CASES[name].small)


def test_bodies_go_where_the_place_says(seed: int) -> None:
    net = tiny("llama", layers=2, heads=6, kv_heads=2)
    place = Place(3, 8, device=torch.device("cpu"))
    with foveate.apply(net, Placed(place=place)) as handle:
        cache = handle.cache()
        run(net, cache, tokens(seed, 2, 41), tokens(seed + 1, 2, 5))
    for layer in cache.couriers():
        (band,) = layer.store.bands
        for column in (band.k, band.v):
            assert isinstance(column, PlacedColumn)
            assert column.far.data.device == place.device
            assert column.near.data.device == net.device
            assert column.away.tolist() == [30] * 4  # 41 less 3 and 8; what came later stays
            assert column.far.data.shape[1] == 30
    # 3 + 8 tokens, 5 that came later, and spare slots
    slot = 2 * 2 * 2 * 16 * 4  # rows, kv heads, keys and values, head size, bytes
    assert cache.host_nbytes == 2 * 30 * slot
    assert cache.nbytes <= 2 * (16 + 16) * slot + 2 * 4 * 12


def test_each_place_is_read_for_itself(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two reads for a step, one in each place, and no copy of what is away."""
    net = tiny("llama", layers=1, heads=6, kv_heads=2)
    with foveate.apply(net, Placed(place=Place(3, 8))) as handle:
        cache = handle.cache()
        prompt(net, cache, tokens(seed, 1, 41))
        sizes = []
        original = apart.attend

        def note(q, k, *args, **kwargs):
            sizes.append(k.shape[2])
            return original(q, k, *args, **kwargs)

        monkeypatch.setattr(apart, "attend", note)
        monkeypatch.setattr(PlacedColumn, "read", None)
        forward(net, cache, tokens(seed, 1, 1))
    assert sizes == [12, 30]


def test_a_row_without_room_is_refused_before_anything_changed(seed: int) -> None:
    net = tiny("gemma3", layers=4, heads=4, kv_heads=2)
    ids, then = tokens(seed, 2, 41), tokens(seed + 1, 2, 4)
    with foveate.apply(net, Placed(place=Place(0, 16, 4, steady=True, limit=44))) as handle:
        cache = handle.cache()
        prompt(net, cache, ids)
        decode(net, cache, then[:, :2])
        before = (cache.nbytes, cache.host_nbytes, cache.get_seq_length())
        with pytest.raises(Refused, match="44"):
            forward(net, cache, then[:, :2])
        assert (cache.nbytes, cache.host_nbytes, cache.get_seq_length()) == before
        got = forward(net, cache, then[:, 2:3])
        with pytest.raises(Refused, match="placed"):
            forward(net, cache, then[:, 3:])
    assert_close(got, plain(net, ids, then[:, :3]).steps[:, 2:], EXACT)


def test_rows_and_taken_back_tokens(seed: int) -> None:
    """Beams, a crop into what is away, and a fork for another method."""
    net = tiny("llama", layers=2, heads=6, kv_heads=2)
    ids, then = tokens(seed, 2, 41), tokens(seed + 1, 2, 6)
    with foveate.apply(net, Placed(place=Place(3, 8))) as handle:
        cache = handle.cache()
        prompt(net, cache, ids)
        dense = handle.bind("dense").cache()
        prompt(net, dense, ids)
        other = cache.fork(handle.bind("dense"))
        assert other.host_nbytes == 0
        assert_close(decode(net, other.fork(), then), decode(net, dense.fork(), then), EXACT)
        for one in (cache, dense):
            one.batch_repeat_interleave(2)
            one.reorder_cache(torch.tensor([3, 0, 1, 2]))
        four = then.repeat(2, 1)
        assert_close(decode(net, cache.fork(), four), decode(net, dense.fork(), four), EXACT)
        for one in (cache, dense):
            one.crop(-20)
        assert_close(decode(net, cache, four), decode(net, dense, four), EXACT)


@pytest.mark.parametrize("name", ["kivi", "h2o"])
def test_what_cannot_lie_in_two_places_is_refused(name: str) -> None:
    for pair in ((Placed(), METHODS[name]()), (METHODS[name](), Placed())):
        with pytest.raises(BadArgument, match="host"):
            pair[0] | pair[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_host_serves_a_model_on_a_gpu(seed: int) -> None:
    net = tiny("llama", layers=2, heads=6, kv_heads=2).to("cuda")
    ids, then = tokens(seed, 2, 61).cuda(), tokens(seed + 1, 2, 8).cuda()
    with foveate.apply(net, "dense") as handle:
        want = run(net, handle.cache(), ids, then)
    with foveate.apply(net, Placed(place=Place(3, 8, steady=True))) as handle:
        cache = handle.cache()
        got = run(net, cache, ids, then)
    assert_close(got.steps, want.steps, EXACT)
    for layer in cache.couriers():
        (band,) = layer.store.bands
        assert isinstance(band.k, PlacedColumn)
        assert band.k.far.data.device.type == "cpu"
        assert band.k.near.data.device.type == "cuda"


def test_lists_of_one_token_are_read_wherever_it_lies(seed: int) -> None:
    torch.manual_seed(seed)
    store = Store(StoreSpec(heads=1, place=Place(2, 4)))
    k, v = torch.randn(2, 3, 1, 40, 8).unbind(0)
    store.append(k, v, np.array([40, 40, 40]))
    store.settle(store.seen)
    store.depart()
    (band,), q = store.bands, torch.randn(3, 2, 1, 8)
    slots = torch.tensor([1, 20, 39])
    listed = Selection(slots.int().view(3, 1, 1, 1), None, 1)
    assert isinstance(band.k, PlacedColumn) and band.k.away.tolist() == [34] * 3
    parts = apart.attend_apart(band, q, listed, Geometry(3, 1, 40), (), scale=0.3, softcap=None)
    got = merge(parts)
    rows = torch.arange(3)
    assert len(parts) == 2
    assert_close(got.out, v[rows, 0, slots].view(3, 1, 1, 8).expand(-1, 2, -1, -1), EXACT)
    assert_close(got.lse, (q @ k[rows, 0, slots].view(3, 1, 8, 1))[..., 0] * 0.3, EXACT)


def test_a_longer_piece_of_a_shorter_row_finds_room(seed: int) -> None:
    """Rows whose second pieces differ in length: the row that takes most decides what the near part must hold."""
    store = Store(StoreSpec(heads=2, place=Place(2, 4)))
    torch.manual_seed(seed)
    k, v = torch.randn(2, 2, 2, 40, 8).unbind(0)
    store.append(k, v, np.array([40, 33]))
    store.settle(store.seen)
    more_k, more_v = torch.randn(2, 2, 2, 30, 8).unbind(0)
    store.append(more_k, more_v, np.array([6, 30]))
    (band,) = store.bands
    held = band.keys()
    assert (store.lengths == [[46, 46], [63, 63]]).all()
    assert torch.equal(held[0, :46], torch.cat([k[0, 0], more_k[0, 0, :6]]))
    assert torch.equal(held[2, :63], torch.cat([k[1, 0, :33], more_k[1, 0]]))
