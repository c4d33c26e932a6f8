"""The books of lent memory: they add up, whatever happens."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from foveate.cache.ledger import Ledger
from foveate.errors import BadArgument, Refused


def assert_books(books: Ledger) -> None:
    names = list(books.capacity)
    blocks = Counter(holder for holders in books.table.values() for holder in holders)
    assert blocks.keys() <= set(names)
    for name in names:
        assert books.used(name) == blocks[name] <= books.capacity[name]
        own = sum(h.count(name) for r, h in books.table.items() if books.home[r] == name)
        assert own + books.lent(name) + books.free(name) == books.capacity[name]
    assert sum(map(books.lent, names)) == sum(map(books.borrowed, names)) == sum(books.debts().values())


@pytest.mark.parametrize("seed", range(5))
def test_a_random_life_adds_up(seed: int) -> None:
    chance = random.Random(seed)
    books = Ledger({name: chance.randrange(0, 12) for name in "abcd"})
    lengths: dict[int, int] = {}
    refused = 0
    for step in range(300):
        act = chance.random()
        if act < 0.55:
            request = chance.choice([*lengths, step])
            blocks = chance.randrange(1, 5)
            before = ({r: list(h) for r, h in books.table.items()}, dict(books.home))
            room = sum(map(books.free, books.capacity))
            try:
                books.grow(request, blocks, chance.choice("abcd"))
                assert blocks <= room
                lengths[request] = lengths.get(request, 0) + blocks
            except Refused:
                refused += 1
                assert (books.table, books.home) == before, "a refusal changed the books"
        elif act < 0.7 and lengths:
            request = chance.choice(list(lengths))
            gone = chance.randrange(0, lengths[request] + 1)
            books.shrink(request, gone)
            lengths[request] -= gone
        elif act < 0.8 and lengths:
            request = chance.choice(list(lengths))
            books.release(request)
            del lengths[request]
            with pytest.raises(BadArgument, match="request"):
                books.release(request)
        elif act < 0.9:
            books.heartbeat(*chance.sample("abcd", chance.randrange(0, 4)))
        else:
            books.reduce()
            owed = books.debts()
            assert not {debtor for debtor, _ in owed} & {creditor for _, creditor in owed}
        assert_books(books)
        assert {r: len(h) for r, h in books.table.items()} == lengths
    assert refused
    books.heartbeat()
    assert books.known == {name: books.free(name) for name in "abcd"}
    for request in list(lengths):
        books.release(request)
    assert all(books.free(name) == books.capacity[name] for name in "abcd")


def test_capacity_is_all_free_memory() -> None:
    books = Ledger({"a": 3, "b": 5, "c": 2})
    books.grow("short", 2, "b")
    books.grow("long", 8, "a")
    assert books.table["long"].count("a") == 3
    with pytest.raises(Refused, match="'more'"):
        books.grow("more", 1, "c")


def test_the_oldest_blocks_leave_and_the_newest_are_at_home() -> None:
    books = Ledger({"device": 3, "host": 10})
    for _ in range(7):
        books.grow("text", 1, "device")
    assert books.table["text"] == ["host"] * 4 + ["device"] * 3
    books.shrink("text", 2)
    books.grow("text", 1)
    assert books.table["text"] == ["host"] * 4 + ["device"] * 2


def test_a_creditor_has_the_last_word() -> None:
    """What was heard of it may be old: it lends what it has, and another lends the rest."""
    books = Ledger({"a": 1, "b": 4, "c": 2})
    books.grow("other", 3, "b")  # no heartbeat since
    assert books.known["b"] == 4 and books.free("b") == 1
    books.grow("text", 4, "a")
    assert sorted(books.table["text"]) == ["a", "b", "c", "c"]


def test_who_is_known_to_have_most_is_asked_first() -> None:
    books = Ledger({"a": 1, "b": 4, "c": 9})
    books.grow("text", 3, "a")
    assert books.table["text"] == ["c", "c", "a"]
    books.grow("other", 6, "c")  # no heartbeat since
    books.grow("text", 3)
    assert books.table["text"] == ["c", "c", "c", "b", "b", "a"]


def test_chains_and_cycles_of_debt_are_reduced() -> None:
    books = Ledger({"a": 2, "b": 2, "c": 9})
    books.home = {1: "a", 2: "b", 3: "c"}
    books.table = {1: ["b", "a"], 2: ["c", "c", "b"], 3: ["a"]}  # a owes b owes c owes a
    moved = books.reduce()
    assert moved >= 2
    owed = books.debts()
    assert not {debtor for debtor, _ in owed} & {creditor for _, creditor in owed}
    assert {r: len(h) for r, h in books.table.items()} == {1: 2, 2: 3, 3: 1}
    assert_books(books)


def test_wrong_arguments() -> None:
    with pytest.raises(BadArgument, match="capacity"):
        Ledger({"a": -1})
    with pytest.raises(BadArgument, match="home"):
        Ledger({"a": 1}).grow("text", 1)
    books = Ledger({"a": 1})
    books.grow("text", 1, "a")
    with pytest.raises(BadArgument, match="blocks"):
        books.shrink("text", 2)
