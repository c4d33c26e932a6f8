"""Who holds which block of whose tokens, and who owes whom: the books of memory that is lent and borrowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

from foveate.cache.store import Store
from foveate.errors import BadArgument, Refused

DEVICE, HOST = "device", "host"


class Ledger:
    """Books of a few instances that hold blocks for each other. It moves no tokens; it says where they lie.

    A request has a home, where its newest blocks are. When the home is full, the request's oldest blocks there go to
    creditors, those with most free blocks first, as far as the last heartbeats say; a creditor has the last word.

    Args:
        capacity: blocks that each instance has room for.

    Source: DistKV-LLM (2401.02669, first version): rManager, gManager and DGFM.
    """

    def __init__(self, capacity: Mapping[str, int]) -> None:
        for name, blocks in capacity.items():
            if blocks < 0:
                raise BadArgument("capacity", {name: blocks}, "give 0 or more blocks")
        self.capacity = dict(capacity)
        self.home: dict[Hashable, str] = {}
        """Where each request lives."""
        self.table: dict[Hashable, list[str]] = {}
        """Who holds each block of a request, oldest first."""
        self.known = dict(capacity)
        """Free blocks of each instance as of its last heartbeat."""

    # -- what the books say -------------------------------------------------------------------------------------------

    def used(self, instance: str) -> int:
        return sum(holders.count(instance) for holders in self.table.values())

    def free(self, instance: str) -> int:
        return self.capacity[instance] - self.used(instance)

    def debts(self) -> Counter[tuple[str, str]]:
        """Blocks by (debtor, creditor)."""
        owed: Counter[tuple[str, str]] = Counter()
        for request, holders in self.table.items():
            owed.update((self.home[request], holder) for holder in holders if holder != self.home[request])
        return owed

    def lent(self, instance: str) -> int:
        return sum(n for (_, creditor), n in self.debts().items() if creditor == instance)

    def borrowed(self, instance: str) -> int:
        return sum(n for (debtor, _), n in self.debts().items() if debtor == instance)

    # -- what changes them --------------------------------------------------------------------------------------------

    def heartbeat(self, *instances: str) -> None:
        """These (or all) tell how much is free; between heartbeats others go by what they last heard."""
        for name in instances or self.capacity:
            self.known[name] = self.free(name)

    def grow(self, request: Hashable, blocks: int, home: str | None = None) -> None:
        """Give a request more blocks, at its home.

        Args:
            home: of a request that is new.

        Raises:
            Refused: nobody has room for what does not fit; nothing has changed then.
        """
        name = self.home.get(request, home)
        if name not in self.capacity:
            raise BadArgument("home", home, f"a new request lives with one of {', '.join(self.capacity)}")
        holders = [*self.table.get(request, []), *[name] * blocks]
        excess = blocks - self.free(name)
        cold = [i for i, holder in enumerate(holders) if holder == name][: max(0, excess)]
        for creditor in sorted(self.capacity, key=lambda other: -self.known[other]):
            if creditor == name:
                continue
            granted = cold[: self.free(creditor)]  # what it really has, whatever was heard of it
            for i in granted:
                holders[i] = creditor
            cold = cold[len(granted) :]
        if cold:
            raise Refused(f"{name} is full, and nobody lends it {len(cold)} of {blocks} blocks for {request!r}")
        self.table[request], self.home[request] = holders, name

    def shrink(self, request: Hashable, blocks: int) -> None:
        """The newest blocks of a request are given back."""
        held = self.table[request]
        if not 0 <= blocks <= len(held):
            raise BadArgument("blocks", blocks, f"{request!r} holds {len(held)}")
        self.table[request] = held[: len(held) - blocks]

    def release(self, request: Hashable) -> None:
        """A request is over: every block of it is given back."""
        if request not in self.table:
            raise BadArgument("request", request, "it holds nothing (any more)")
        del self.table[request], self.home[request]

    def reduce(self) -> int:
        """Settle debts until nobody both lends and borrows: where A owes B and B owes C, a block of A at B and one of B
        at C change places, so that A owes C and B is at home. Returns the blocks that moved."""
        moved = 0
        while True:
            owed = self.debts()
            chain = next(((a, b, c) for a, b in sorted(owed) for d, c in sorted(owed) if d == b), None)
            if chain is None:
                return moved
            debtor, middle, creditor = chain
            self._replace(debtor, middle, creditor)
            self._replace(middle, creditor, middle)
            moved += 2

    def _replace(self, debtor: str, old: str, new: str) -> None:
        """One block that `old` holds for a request of `debtor` goes to `new`."""
        for request, holders in self.table.items():
            if self.home[request] == debtor and old in holders:
                holders[holders.index(old)] = new
                return
        raise AssertionError("no such debt")


def ledger_of(store: Store) -> Ledger:
    """The books of a store whose tokens lie in two places: requests are (row, store head), at home on the device.

    Blocks are those in which tokens leave (`Place.block`); the newest of each request may be open.
    """
    place = store.spec.place
    if place is None:
        raise BadArgument("store", "no place", "only a layer that puts tokens into the host's memory keeps such books")
    lengths, away = store.lengths, store.away
    far = away // place.block
    near = -(-(lengths - away) // place.block)
    most = max(-(-(place.sink + place.recent) // place.block), int(near.max(initial=0)))
    room = int(far.sum()) if place.limit is None else lengths.size * (-(-place.limit // place.block))
    books = Ledger({DEVICE: most * lengths.size, HOST: room})
    for row in range(lengths.shape[0]):
        for head in range(lengths.shape[1]):
            books.home[row, head] = DEVICE
            books.table[row, head] = [HOST] * int(far[row, head]) + [DEVICE] * int(near[row, head])
    books.heartbeat()
    return books
