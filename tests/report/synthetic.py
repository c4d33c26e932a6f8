"""A made-up comparison for the tests of the report: seeded, with everything a real one can hold."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from foveate.evaluate.record import DENSE, Cell, Record

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HOSTILE = "</script><img src=x onerror=alert(1)> <b>needle</b> & \"quotes\" 'single'"


@dataclass(frozen=True)
class Character:
    """How a made-up method behaves: quality kept at budget 1 -> steepness, cost factors, floor, what is missing."""

    name: str
    fall: float
    decode: float
    prefill: float
    floor: float = 0.0
    timed: bool = True
    peak: float = 1.0
    held: bool = True
    calibration: float | None = None
    settings: dict[str, object] = field(default_factory=dict)


RETRIEVAL = Character("retrieval", 0.2, 0.6, 0.7, settings={"sees": "question"})


METHODS = [
    Character("snapkv", 0.10, 0.8, 1.02, settings={"window": 32, "kernel": 5}),
    Character("h2o", 0.30, 0.85, 1.6, floor=0.29),
    Character("streaming-llm", 0.55, 0.7, 1.0, peak=0.4),
    Character("pyramid-kv", 0.14, 0.82, 1.05),
    Character("kivi", 0.02, 1.35, 1.1),
    Character("quest", 0.05, 0.6, 1.01, held=False),
    Character("flex-prefill", 0.04, 1.0, 0.55, held=False, timed=False),
    Character("duo-attention", 0.08, 0.9, 0.95, calibration=41.5),
    Character("snapkv|kivi", 0.16, 1.2, 1.12),
]
TASKS = ["needle", "niah_multikey_1", "vt", "qa_1"]


def make_records(
    seed: int = 7,
    *,
    lengths: tuple[int, ...] = (1024, 2048, 4096),
    budgets: tuple[float, ...] = (0.25, 0.5),
    samples: int = 15,
    questions: tuple[bool, ...] = (True,),
    methods: list[Character] | None = None,
    tasks: list[str] | None = None,
    timings: bool = True,
    loss_task: bool = True,
    dense: bool = True,
) -> list[Record]:
    """Records of every method x budget x length x task, refused ones where the floor is above the budget.

    Tasks named after what they hold have it: "needle" depths, "niah_multiquery" four needles of which some are found,
    "turns" five questions to one context, and "perplexity_positions" passages measured at eight positions.
    """
    rng = random.Random(seed)
    records = []
    tasks = TASKS if tasks is None else tasks
    names = tasks + (["ppl"] if loss_task else [])
    everyone = ([Character(DENSE, 0.0, 1.0, 1.0)] if dense else []) + (METHODS if methods is None else methods)
    for seen in questions:
        for length in lengths:
            for task in names:
                luck = [rng.random() for _ in range(samples)]
                for who in everyone:
                    for budget in (None,) if who.name == DENSE else budgets:
                        records.append(_record(rng, who, budget, length, task, luck, seen, timings))
    return records


def _record(
    rng: random.Random,
    who: Character,
    budget: float | None,
    length: int,
    task: str,
    luck: list[float],
    seen: bool,
    timings: bool,
) -> Record:
    share = 1.0 if budget is None else budget
    whole = length * 2 * 3 * 64 * 30 * 2
    cell = Cell(
        model=MODEL,
        method=who.name,
        settings=dict(who.settings),
        budget=None if budget is None else f"{budget:g}",
        length=length,
        task=task,
        seed=0,
        question_seen=seen,
    )
    common = {
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        "device": "2-core CPU, 8 GiB",
        "command": "foveate compare --methods all --budgets 0.25,0.5 --out 'runs/a b'",
        "created": "2026-01-02T03:04:05+00:00",
        "foveate": "0.1.0",
    }
    if share < who.floor:
        return Record(
            cell=cell,
            status="refused",
            refused=f"not below {who.floor} at {length} tokens",
            floor=who.floor,
            kv_bytes_dense=whole,
            **common,
        )
    hit = 0.9 - who.fall * (1 - share) ** 0.7 - (0.0 if seen else who.fall * 0.8) - 0.03 * (length / 4096)
    loss = task in ("ppl", "perplexity_positions")
    scores, outcomes = [], []
    for i in range(len(luck)):
        depth = (i % 5) / 4
        dip = who.fall * 0.5 if 0.2 < depth < 0.8 else 0.0
        more: dict[str, object] = {}
        if task == "niah_multiquery":
            keys = [f"{i}00{j}" for j in range(4)]
            found = [key for key in keys if rng.random() < hit]
            more = {"depths": [0.1, 0.35, 0.6, 0.85], "references": keys, "prediction": " and ".join(found)}
            score = len(found) / 4
        elif task == "turns":
            turns = [float(rng.random() < hit - 0.9 * who.fall * (1 - share) * turn / 4) for turn in range(5)]
            more, score = {"turns": turns}, sum(turns) / 5
        elif task == "perplexity_positions":
            place = 8 - i % 8
            score = round(2.2 + 0.6 / place + 0.2 * luck[i] + who.fall * (1 - share) * 0.1 * place, 6)
        elif loss:
            score = round(2.4 + luck[i] + who.fall * (1 - share) * (0.5 + rng.random()), 6)
        else:
            score = 1.0 if luck[i] + rng.gauss(0, 0.03) < hit - dip else 0.0
        scores.append(score)
        outcomes.append(
            {
                "index": i,
                "depths": [depth] if task == "needle" else [],
                "prediction": HOSTILE if i == 0 else f"the number is {rng.randrange(10**6)}",
                "references": [str(rng.randrange(10**6))],
                "score": score,
                "kv_bytes": whole,
                "evidence_held": None if loss else round(share**0.5 * rng.uniform(0.9, 1.0), 4),
                "evidence_read": None if loss or who.name == "kivi" else round(share**0.7 * rng.uniform(0.8, 1.0), 4),
                **more,
            }
        )
    held = whole if who.name == DENSE else int(whole * (share * rng.uniform(0.97, 1.01) if who.held else 1.02))
    speed = who.decode + (1 - who.decode) * 0.8 * (length < 2000) + 0.15 * (length < 2000) * (who.name != DENSE)
    times = {}
    if timings:
        times = {"prefill_dense_s": length / 900, "decode_dense_ms": 18 + length / 200, "repeats": 3}
        times["prefill_s"] = times["prefill_dense_s"] * who.prefill
        if who.timed:
            times["decode_ms"] = times["decode_dense_ms"] * (1.0 if who.name == DENSE else speed * (0.85 + 0.3 * share))
    return Record(
        cell=cell,
        scores=scores,
        outcomes=outcomes,
        higher_is_better=not loss,
        kv_bytes=held,
        kv_bytes_dense=whole,
        kv_bytes_peak=max(held, int(whole * who.peak)),
        pairs_read=share if who.name != DENSE else 1.0,
        pairs_prefill=0.3 if who.name == "flex-prefill" else 1.0,
        calibration_s=who.calibration,
        **times,
        **common,
    )
