"""The store against a list of tokens: any order of append, evict, expire, grow, crop, reorder, repeat and fork.

Every token has a random key and value and a tag that holds its own position, so whatever the store returns can be
traced to one token. Blocks have a summary (minimum, maximum and count) that is compared with the block's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.contract.reach import reachable_bytes
from torch import Tensor

from foveate.attention import Span
from foveate.cache import Blocks, Place, Store, StoreSpec, Tag, View

DIM, BLOCK, FRESH = 6, 4, -1
THOROUGH = settings(
    max_examples=12,
    stateful_step_count=20,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a life of 20 steps can be read as it is; to shorten it takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

Token = tuple[int, Tensor, Tensor]
"""Position, key, value."""


def bounds(k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Smallest and largest key of each block, the sum of the values' first channel, and the number of tokens."""
    there = valid.unsqueeze(-1)
    low = k.masked_fill(~there, torch.inf).amin(2)
    high = k.masked_fill(~there, -torch.inf).amax(2)
    first = (v[..., :1] * there).sum(2)
    return torch.cat([low, high, first, valid.sum(-1, keepdim=True).to(k.dtype)], dim=-1)


class Sevens:
    """A side that packs exactly: tokens as they are, in groups of `unit` with their sum, so that cuts are visible."""

    def __init__(self, tail: int, flush: int, unit: int) -> None:
        self.tail, self.flush, self.unit = tail, flush, unit

    def pack(self, x: Tensor) -> tuple[Tensor, ...]:
        assert x.shape[1] % self.unit == 0
        sums = x.unflatten(1, (-1, self.unit)).sum(2)
        return x * 7, sums

    def unpack(self, packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        x, sums = packed
        assert x.shape[1] == sums.shape[1] * self.unit
        return (x / 7).to(dtype)


class StoreMachine(RuleBasedStateMachine):
    """Random life of one store. `truth[b][h]` is the list of tokens that must be held."""

    packs = places = False

    @initialize(
        seed=st.integers(0, 2**31),
        rows=st.integers(1, 3),
        heads=st.integers(1, 3),
        latent=st.booleans(),
        sinks=st.lists(st.integers(0, 3), min_size=3, max_size=3),
        windows=st.lists(st.sampled_from([1, 3, 5, 1 << 30]), min_size=3, max_size=3),
        spanned=st.booleans(),
        place=st.builds(
            Place, sink=st.integers(0, 3), recent=st.integers(0, 6), block=st.integers(1, 4), steady=st.booleans()
        ),
    )
    def start(
        self,
        seed: int,
        rows: int,
        heads: int,
        latent: bool,
        sinks: list[int],
        windows: list[int],
        spanned: bool,
        place: Place,
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.heads, self.latent = heads, latent
        self.window = windows[:heads] if spanned else [1 << 30] * heads
        self.sink = sinks[:heads]
        span = Span(sink=torch.tensor(self.sink), window=torch.tensor(self.window))
        self.spec = StoreSpec(
            heads=heads,
            spans=(span,) if spanned else (),
            tags={"own": Tag(width=1, dtype=torch.int64, fill=FRESH)},
            blocks={"bounds": Blocks(BLOCK, bounds)},
            value_dim=DIM - 2 if latent else None,
            place=place if self.places else None,
        )
        self.store = Store(self.spec)
        self.truth: list[list[list[Token]]] = [[[] for _ in range(heads)] for _ in range(rows)]
        self.seen = [0] * rows
        self.packed = False
        self.append_tokens([1 + i for i in range(rows)], 0)

    def append_tokens(self, fresh: list[int], padding: int) -> None:
        rows, width = len(fresh), max([*fresh, 1]) + padding
        k = torch.randn(rows, self.heads, width, DIM, generator=self.random)
        v = k[..., : DIM - 2] if self.latent else torch.randn(rows, self.heads, width, 3, generator=self.random)
        self.store.append(k, None if self.latent else v, np.array(fresh))
        for b, n in enumerate(fresh):
            for h in range(self.heads):
                self.truth[b][h] += [(self.seen[b] + i, k[b, h, i], v[b, h, i]) for i in range(n)]
            self.seen[b] += n
        # Whoever keeps a tag writes it once, when its token has just arrived with the tag's fill.
        view = self.view()
        tag = view.tag("own")
        new = tag == FRESH
        arrived = (new.squeeze(-1) & view.valid()).sum(-1)
        assert arrived.tolist() == [[n] * self.heads for n in fresh]
        view.write("own", torch.where(new, view.positions.unsqueeze(-1).long(), tag))

    def view(self) -> View:
        return View(self.store, np.zeros(len(self.truth), dtype=np.int64))

    @rule(data=st.data(), padding=st.integers(0, 2))
    def append(self, data: st.DataObject, padding: int) -> None:
        fresh = data.draw(st.lists(st.integers(0, 9), min_size=len(self.truth), max_size=len(self.truth)))
        self.append_tokens(fresh, padding)

    @rule()
    def step(self) -> None:
        self.append_tokens([1] * len(self.truth), 0)

    @precondition(lambda self: not self.packed)
    @rule(data=st.data(), share=st.floats(0, 1))
    def keep(self, data: st.DataObject, share: float) -> None:
        upcoming = [data.draw(st.integers(max(0, n - 3), n)) for n in self.seen]
        positions = self.view().positions
        kept: dict[int, np.ndarray] = {}
        for b in range(len(self.truth)):
            for h in range(self.heads):
                if data.draw(st.booleans()):
                    length = len(self.truth[b][h])
                    lucky = torch.rand(length, generator=self.random) < share
                    slots = np.nonzero((lucky | (positions[b, h, :length] >= upcoming[b])).numpy())[0]
                    held = {int(p) for p in positions[b, h, torch.from_numpy(slots)]}
                    kept[b * self.heads + h] = slots
                    self.truth[b][h] = [t for t in self.truth[b][h] if t[0] in held]
        self.store.keep(kept, np.array(upcoming))

    @precondition(lambda self: not self.packed)
    @rule(data=st.data())
    def drop_one(self, data: st.DataObject) -> None:
        for band in self.store.bands:
            local = [i for i in range(len(band.pairs)) if band.lengths[i] and data.draw(st.booleans())]
            if not local:
                continue
            slots = [data.draw(st.integers(0, int(band.lengths[i]) - 1)) for i in local]
            positions = band.slot_positions()
            for i, slot in zip(local, slots, strict=True):
                b, h = divmod(int(band.pairs[i]), self.heads)
                gone = int(positions[i, slot])
                self.truth[b][h] = [t for t in self.truth[b][h] if t[0] != gone]
            band.drop_one(torch.tensor(slots), np.array(local))

    @rule(more=st.integers(0, 20))
    def grow(self, more: int) -> None:
        for band in self.store.bands:
            band.reserve(band.used + more)

    @rule()
    def settle(self) -> None:
        self.store.settle(self.store.seen)
        for b, row in enumerate(self.truth):
            for h in range(self.heads):
                row[h] = [t for t in row[h] if t[0] < self.sink[h] or self.seen[b] - t[0] < self.window[h]]

    @precondition(lambda self: self.places)
    @rule()
    def depart(self) -> None:
        """No head has more on the device than it may; but heads with a window may have all, unless it is steady."""
        self.store.depart()
        place = self.spec.place
        assert place is not None
        for band in self.store.bands:
            here = band.lengths - band.away
            if band.bounded and not place.steady:
                assert not band.away.any()
            else:
                assert (np.maximum(here - place.sink, 0) <= np.maximum(place.recent, place.block - 1)).all()

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        removed = [data.draw(st.integers(0, min(n, 5))) for n in self.seen]
        if not self.store.croppable(np.array(removed)):
            return
        self.store.crop(np.array(removed))
        for b, n in enumerate(removed):
            before = self.seen[b]
            self.seen[b] -= n
            for h in range(self.heads):
                held = {t[0] for t in self.truth[b][h]}
                assert all(p in held for p in range(self.seen[b], before)), "a crop was granted over evicted tokens"
                self.truth[b][h] = [t for t in self.truth[b][h] if t[0] < self.seen[b]]

    @rule(data=st.data())
    def choose_rows(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, len(self.truth) - 1), min_size=1, max_size=4))
        self.store.select_rows(np.array(rows))
        self.truth = [[list(head) for head in self.truth[r]] for r in rows]
        self.seen = [self.seen[r] for r in rows]

    @rule()
    def there_and_back(self) -> None:
        """A permutation and its inverse leave what is read bitwise equal."""
        before = [x.clone() for x in self.read()]
        order = torch.randperm(len(self.truth), generator=self.random)
        self.store.select_rows(order.numpy())
        self.store.select_rows(order.argsort().numpy())
        for x, y in zip(before, self.read(), strict=True):
            assert torch.equal(x, y)

    @rule()
    def fork(self) -> None:
        """Go on with a copy; the original must not notice."""
        original, before = self.store, [x.clone() for x in self.read()]
        self.store = original.fork()
        self.append_tokens([2] * len(self.truth), 0)
        self.settle()
        copy, self.store = self.store, original
        for x, y in zip(before, self.read(), strict=True):
            assert torch.equal(x, y)
        self.store = copy

    @precondition(lambda self: self.packs and not self.packed)
    @rule(tail=st.sampled_from([0, 3, 8]), groups=st.integers(1, 2), unit=st.sampled_from([1, 4]))
    def pack(self, tail: int, groups: int, unit: int) -> None:
        self.packed = True
        keys, values = Sevens(tail, unit * groups, unit), Sevens(tail + 1, 1, 1)
        self.store.pack(keys, None if self.latent else values)

    def read(self) -> Iterator[Tensor]:
        view = self.view()
        valid = view.valid().unsqueeze(-1)
        for x in (view.k(), view.v(), view.tag("own"), view.positions.unsqueeze(-1)):
            yield x.masked_fill(~valid, 0)

    @invariant()
    def holds_what_it_should(self) -> None:
        if not hasattr(self, "store"):
            return
        view = self.view()
        k, v, own, positions, blocks = view.k(), view.v(), view.tag("own"), view.positions, view.blocks("bounds")
        assert view.lengths.tolist() == [[len(head) for head in row] for row in self.truth]
        assert view.seen.tolist() == self.seen
        for b, row in enumerate(self.truth):
            for h, tokens in enumerate(row):
                known = {t[0]: t for t in tokens}
                length = len(tokens)
                order = positions[b, h, :length].tolist()
                assert sorted(order) == sorted(known), (b, h)
                assert own[b, h, :length, 0].tolist() == order, "a tag left its token"
                if not length:
                    continue
                keys = torch.stack([known[p][1] for p in order])
                values = torch.stack([known[p][2] for p in order])
                self.same(k[b, h, :length], keys)
                self.same(v[b, h, :length], values)
                self.check_blocks(blocks[b, h], k[b, h, :length], v[b, h, :length])

    def same(self, got: Tensor, want: Tensor) -> None:
        if self.packed:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # x * 7 / 7
        else:
            assert torch.equal(got, want)

    def check_blocks(self, got: Tensor, k: Tensor, v: Tensor) -> None:
        for i, start in enumerate(range(0, k.shape[0], BLOCK)):
            there = slice(start, start + BLOCK)
            want = [k[there].amin(0), k[there].amax(0), v[there, :1].sum(0), torch.tensor([float(k[there].shape[0])])]
            torch.testing.assert_close(got[i], torch.cat(want), rtol=1e-5, atol=1e-6, msg="a summary is stale")

    @invariant()
    def counts_its_bytes(self) -> None:
        if hasattr(self, "store"):
            assert self.store.nbytes + self.store.host_nbytes == reachable_bytes(self.store, beyond=(StoreSpec,))


class PackedMachine(StoreMachine):
    """The same life with a codec: what was packed can still be cropped, reordered and forked."""

    packs = True


class PlacedMachine(StoreMachine):
    """The same life with tokens in two places."""

    places = True


def run(machine: type[StoreMachine]) -> Callable[[], Any]:
    case = machine.TestCase
    case.settings = THOROUGH
    return case


TestExactStore = run(StoreMachine)
TestPackedStore = run(PackedMachine)
TestPlacedStore = run(PlacedMachine)
