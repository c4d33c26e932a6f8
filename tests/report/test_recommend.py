"""The one sentence: chosen by its rule, and claiming no more than the samples show."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from tests.report.synthetic import make_records

from foveate.evaluate.record import DENSE, Cell, Record
from foveate.report.recommend import Recommendation, recommend
from foveate.report.summary import overall


def cell(method: str, budget: str | None, task: str = "vt") -> Cell:
    return Cell("tiny", method, {}, budget, 1024, task, 0, True)


def record(
    method: str,
    scores: list[float],
    held: float,
    *,
    budget: str | None = "0.25",
    decode: float | None = None,
    task: str = "vt",
    higher: bool = True,
) -> Record:
    return Record(
        cell=cell(method, None if method == DENSE else budget, task),
        scores=scores,
        outcomes=[{"index": i} for i in range(len(scores))],
        higher_is_better=higher,
        kv_bytes=int(held * 10**6),
        kv_bytes_dense=10**6,
        decode_ms=decode,
        decode_dense_ms=None if decode is None else 10.0,
    )


def hits(right: int, n: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


def only(records: list[Record]) -> Recommendation:
    (found,) = recommend(records)
    return found


BASE = record(DENSE, hits(36, 40), 1.0)


def test_the_smallest_cache_without_a_detectable_loss_wins():
    found = only(
        [
            BASE,
            record("small-but-loses", hits(20, 40), 0.1),
            record("small", hits(35, 40), 0.3),
            record("large", hits(36, 40), 0.5),
        ]
    )
    assert found.kind == "lossless"
    assert found.row is not None
    assert found.row.method == "small"
    assert "use small 0.25; it holds 30% of the dense KV cache" in found.sentence
    assert "with no detectable loss at n=40 (score 0.875 against 0.900 dense, difference −0.025" in found.sentence
    # The interval of the difference stands beside the claim and reaches into losses.
    low = re.search(r"95% CI −(0\.\d+) to \+0\.\d+", found.sentence)
    assert low is not None
    assert 0.03 < float(low[1]) < 0.2


def test_ties_in_bytes_go_to_faster_decode():
    found = only(
        [
            record(DENSE, hits(36, 40), 1.0, decode=10.0),
            record("slow", hits(36, 40), 0.3, decode=9.0),
            record("fast", hits(35, 40), 0.3, decode=5.0),
        ]
    )
    assert found.row is not None
    assert found.row.method == "fast"
    assert "decodes 2.00× faster" in found.sentence


def test_when_all_lose_the_best_trade_is_named_as_one():
    found = only([BASE, record("half", hits(25, 40), 0.5), record("tenth", hits(20, 40), 0.1)])
    assert found.kind == "trade"
    assert found.row is not None
    # 20/36 kept in a tenth beats 25/36 in a half.
    assert found.row.method == "tenth"
    assert "every method that holds less KV cache loses quality" in found.sentence
    assert "keeps 56% of dense quality" in found.sentence
    assert "no detectable loss" not in found.sentence


def test_few_samples_recommend_nothing():
    found = only([record(DENSE, hits(5, 5), 1.0), record("small", hits(5, 5), 0.1)])
    assert (found.kind, found.row) == ("untested", None)
    assert "n=5 samples are too few to detect a loss of any size" in found.sentence


def test_without_dense_no_loss_is_claimed_or_denied():
    found = only([record("small", hits(35, 40), 0.1)])
    assert (found.kind, found.row) == ("untested", None)
    assert "no dense baseline" in found.sentence


def test_methods_that_only_save_time_are_recommended_for_time():
    dense = record(DENSE, hits(36, 40), 1.0, decode=10.0)
    found = only(
        [dense, record("reader", hits(36, 40), 1.02, decode=4.0), record("loser", hits(9, 40), 1.0, decode=1.0)]
    )
    assert found.kind == "speed"
    assert found.row is not None
    assert found.row.method == "reader"
    assert "decodes 2.50× faster" in found.sentence
    stay = only([dense, record("slower", hits(36, 40), 1.0, decode=14.0)])
    assert (stay.kind, stay.row) == ("none", None)
    assert "stay with dense" in stay.sentence


def test_a_partial_row_is_never_recommended():
    records = [BASE, record(DENSE, hits(36, 40), 1.0, task="qa"), record("small", hits(36, 40), 0.1)]
    found = only(records)
    assert (found.kind, found.row) == ("none", None)
    assert "no method ran every cell" in found.sentence


def test_only_dense_recommends_nothing():
    assert only([BASE]).kind == "none"


def test_a_loss_on_perplexity_stands_beside_the_recommendation():
    rng = random.Random(1)
    nll = [rng.gauss(2.5, 0.2) for _ in range(40)]
    found = only(
        [
            BASE,
            record(DENSE, nll, 1.0, task="ppl", higher=False),
            record("small", hits(36, 40), 0.3),
            record("small", [x + 0.05 for x in nll], 0.3, task="ppl", higher=False),
        ]
    )
    assert found.kind == "lossless"
    assert "; the loss on ppl rises by 0.05 (p<0.001)." in found.sentence


def test_losses_alone_are_read_the_right_way_round():
    rng = random.Random(2)
    nll = [rng.gauss(2.5, 0.2) for _ in range(40)]
    dense = record(DENSE, nll, 1.0, task="ppl", higher=False)
    worse = record("worse", [x + abs(rng.gauss(0.2, 0.02)) for x in nll], 0.2, task="ppl", higher=False)
    alike = record("alike", [x + rng.choice([-0.01, 0.01]) for x in nll], 0.4, task="ppl", higher=False)
    found = only([dense, worse, alike])
    assert found.row is not None
    assert found.row.method == "alike"
    trade = only([dense, worse])
    assert trade.kind == "trade"
    # A rise of the loss is written as a rise, though it is a loss of quality.
    rise = re.search(r"difference \+(0\.\d+), 95% CI \+(0\.\d+) to \+(0\.\d+)", trade.sentence)
    assert rise is not None
    assert 0.18 < float(rise[2]) <= float(rise[1]) <= float(rise[3]) < 0.22


def test_every_use_gets_one_sentence_that_keeps_its_rule():
    for seed in range(6):
        records = make_records(seed, questions=(True, False), loss_task=False)
        for found, view in zip(recommend(records), overall(records), strict=True):
            assert found.question_seen is view.question_seen
            assert found.sentence.endswith(".")
            passing = [
                row
                for row in view.rows
                if not row.dense
                and row.complete
                and row.kv_share < 0.995
                and row.score_vs_dense is not None
                and not row.score_vs_dense.loss
            ]
            assert (found.kind == "lossless") is bool(passing)
            if passing:
                assert found.row is not None
                assert found.row.kv_share == min(row.kv_share for row in passing)


def unseen(found: Record, **settings: object) -> Record:
    """The record in a comparison where methods do not see the question."""
    return replace(found, cell=replace(found.cell, question_seen=False, settings=dict(settings)))


def test_a_row_that_was_shown_the_question_is_not_chosen_over_those_that_were_not():
    told = unseen(record("retrieval", hits(36, 40), 0.1), sees="question")
    base, fair = unseen(BASE), unseen(record("small", hits(35, 40), 0.3))
    found = only([base, fair, told])
    assert found.kind == "lossless" and found.row is not None and found.row.method == "small"
    aside = "; retrieval (sees=question) 0.25 holds 10% with no detectable loss, but was shown the question."
    assert found.sentence.endswith(aside)
    # It says nothing where it does not hold less, or loses.
    dearer = unseen(record("retrieval", hits(36, 40), 0.4), sees="question")
    assert "retrieval" not in only([base, fair, dearer]).sentence
    worse = unseen(record("retrieval", hits(5, 40), 0.1), sees="question")
    assert "retrieval" not in only([base, fair, worse]).sentence
    # Where every other method loses, the trade is theirs, and it is said what retrieval did.
    trade = only([base, unseen(record("small", hits(9, 40), 0.3)), told])
    assert trade.kind == "trade" and trade.row is not None and trade.row.method == "small"
    assert trade.sentence.endswith(aside)
    # Alone it is chosen, and its advantage is part of the advice.
    alone = only([base, told])
    assert alone.row is not None and alone.row.method == "retrieval"
    assert "use retrieval (sees=question) 0.25 (which was shown the question); it holds" in alone.sentence
    # Where all methods saw the question, it has no advantage.
    everyone = [BASE, record("small", hits(35, 40), 0.3)]
    seen = replace(told, cell=replace(told.cell, question_seen=True))
    assert only([*everyone, seen]).row.method == "retrieval"  # type: ignore[union-attr]
