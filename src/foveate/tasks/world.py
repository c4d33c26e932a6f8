"""A small world in which persons move, carry and give things: the facts of bAbI's first five tasks, and their answers.

Simulated after the descriptions of bAbI (arXiv 1502.05698); each answer comes with the numbers of the facts that it
follows from.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

PERSONS = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
DIRECTIONS = {"north": "south", "south": "north", "east": "west", "west": "east"}

_MOVES = ("moved to", "went to", "travelled to", "journeyed to", "went back to")
_TAKES = ("got the {} there", "took the {}", "picked up the {}", "grabbed the {} there")
_DROPS = ("dropped the {}", "left the {}", "put down the {}", "discarded the {} there")
_GIVES = ("gave the {} to", "handed the {} to", "passed the {} to")


Trail = list[tuple[str, frozenset[int]]]
"""Places one after another, each with the numbers of the facts that say so."""


@dataclass(frozen=True)
class Story:
    """Facts in order, a question, its answer, what could be answered, and the facts it follows from."""

    facts: tuple[str, ...]
    question: str
    answer: str
    choices: tuple[str, ...]
    support: tuple[int, ...]


@dataclass
class World:
    """Who is where and holds what, and by which facts.

    Attributes:
        trail: for each thing the places it has been in, with the facts that say so.
    """

    rng: random.Random
    facts: list[str] = field(default_factory=list)
    at: dict[str, tuple[str, int]] = field(default_factory=dict)
    holder: dict[str, tuple[str, int]] = field(default_factory=dict)
    trail: dict[str, Trail] = field(default_factory=dict)

    def step(self, things: bool) -> None:
        """One more fact: somebody moves or, where things are in the world, takes or drops one."""
        rng = self.rng
        person = rng.choice(PERSONS)
        mine = [thing for thing, (who, _) in self.holder.items() if who == person]
        if things and person in self.at and rng.random() < 0.45:
            free = [thing for thing in THINGS if thing not in self.holder and self._here(thing, person)]
            if free and (not mine or rng.random() < 0.6):
                return self._take(person, rng.choice(free))
            if mine:
                return self._drop(person, rng.choice(mine))
        return self._move(person, mine)

    def _here(self, thing: str, person: str) -> bool:
        """Whether a thing lies where the person is; nobody has seen the first places of things."""
        return thing not in self.trail or self.trail[thing][-1][0] == self.at[person][0]

    def _move(self, person: str, mine: list[str]) -> None:
        place = self.rng.choice([each for each in PLACES if each != self.at.get(person, ("",))[0]])
        number = self.tell(f"{person} {self.rng.choice(_MOVES)} the {place}.")
        self.at[person] = (place, number)
        for thing in mine:
            self.trail[thing].append((place, frozenset({self.holder[thing][1], number})))

    def _take(self, person: str, thing: str) -> None:
        place, came = self.at[person]
        number = self.tell(f"{person} {self.rng.choice(_TAKES).format(thing)}.")
        self.holder[thing] = (person, number)
        if thing not in self.trail:
            self.trail[thing] = [(place, frozenset({came, number}))]

    def _drop(self, person: str, thing: str) -> None:
        number = self.tell(f"{person} {self.rng.choice(_DROPS).format(thing)}.")
        place, facts = self.trail[thing][-1]
        self.trail[thing][-1] = (place, facts | {number})
        del self.holder[thing]

    def tell(self, fact: str) -> int:
        """Adds a fact; gives its number."""
        self.facts.append(fact)
        return len(self.facts) - 1


def one_fact(rng: random.Random) -> Story:
    """qa1: where is a person?"""
    world = World(rng)
    for _ in range(rng.randrange(2, 11)):
        world.step(things=False)
    person = rng.choice(list(world.at))
    place, number = world.at[person]
    return Story(tuple(world.facts), f"Where is {person}?", place, PLACES, (number,))


def two_facts(rng: random.Random) -> Story:
    """qa2: where is a thing that somebody carried?"""
    world = _carried(rng, 14, lambda trail: bool(trail))
    thing = rng.choice(list(world.trail))
    place, support = world.trail[thing][-1]
    return Story(tuple(world.facts), f"Where is the {thing}?", place, PLACES, tuple(sorted(support)))


def three_facts(rng: random.Random) -> Story:
    """qa3: where was a thing before it came to a place?"""

    def once(trail: Trail) -> list[int]:
        """The steps of the trail whose place comes up only there."""
        places = [place for place, _ in trail]
        return [step for step in range(1, len(trail)) if places.count(places[step]) == 1]

    world = _carried(rng, 24, lambda trail: bool(once(trail)))
    thing = rng.choice([thing for thing, trail in world.trail.items() if once(trail)])
    trail = world.trail[thing]
    step = rng.choice(once(trail))
    (before, earlier), (place, later) = trail[step - 1 : step + 1]
    choices = tuple(each for each in PLACES if each != place)
    question = f"Where was the {thing} before the {place}?"
    return Story(tuple(world.facts), question, before, choices, tuple(sorted(earlier | later)))


def _carried(rng: random.Random, facts: int, enough: Callable[[Trail], object]) -> World:
    """A world of so many facts in which some thing has a trail that is enough."""
    while True:
        world = World(rng)
        while len(world.facts) < facts:
            world.step(things=True)
        if any(enough(trail) for trail in world.trail.values()):
            return world


def two_places(rng: random.Random) -> Story:
    """qa4: which place lies in a direction of another?"""
    first, middle, last = rng.sample(PLACES, 3)
    pairs = [(first, rng.choice(list(DIRECTIONS)), middle)]
    pairs.append((middle, rng.choice([each for each in DIRECTIONS if each != DIRECTIONS[pairs[0][1]]]), last))
    told = [(0, *pairs[0]), (1, *pairs[1])]
    rng.shuffle(told)
    facts = tuple(f"The {a} is {direction} of the {b}." for _, a, direction, b in told)
    number = rng.randrange(2)
    _, a, direction, b = told[number]
    if rng.random() < 0.5:
        question, answer, known = f"What is {direction} of the {b}?", a, b
    else:
        question, answer, known = f"What is the {a} {direction} of?", b, a
    return Story(facts, question, answer, tuple(each for each in PLACES if each != known), (number,))


def three_arguments(rng: random.Random) -> Story:
    """qa5: who gave what to whom?"""
    world = World(rng)
    gifts: list[tuple[str, str, str, int]] = []
    owner = {thing: rng.choice(GIVERS) for thing in THINGS}
    for _ in range(rng.randrange(3, 9)):
        if rng.random() < 0.4:
            world.tell(f"{rng.choice(GIVERS)} {rng.choice(_MOVES)} the {rng.choice(PLACES)}.")
        thing = rng.choice(THINGS)
        giver, taker = owner[thing], rng.choice([each for each in GIVERS if each != owner[thing]])
        gifts.append((giver, thing, taker, world.tell(f"{giver} {rng.choice(_GIVES).format(thing)} {taker}.")))
        owner[thing] = taker
    giver, thing, taker, number = gifts[-1]
    form = rng.choice(("who gave", "to whom", "what"))
    if form == "who gave":
        question, answer, known = f"Who gave the {thing} to {taker} last?", giver, (thing, taker)
        number = max(n for a, what, c, n in gifts if (what, c) == (thing, taker))
    elif form == "to whom":
        question, answer, known = f"Who did {giver} give the {thing} to last?", taker, (thing, giver)
    else:
        question, answer, known = f"What did {giver} give to {taker} last?", thing, (giver, taker)
    choices = tuple(each for each in (*GIVERS, *THINGS) if each not in known)
    return Story(tuple(world.facts), question, answer, choices, (number,))
