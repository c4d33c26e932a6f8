"""One sentence that recommends, chosen by a rule that is printed with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foveate.evaluate.record import Record
from foveate.evaluate.statistics import Paired, p_text
from foveate.report.quantities import bytes_text, percent, quality, signed
from foveate.report.rows import Row, View
from foveate.report.summary import overall

RULE = (
    "Rule: of all methods that ran every cell that dense ran, hold less KV cache than dense, and show no loss against "
    "dense on the same samples (two-sided p ≥ 0.05, McNemar for 0/1 scores and sign flips for others; every method is "
    "tested alone, without correction for their number, which flags more losses, not fewer), take the one that holds "
    "the fewest bytes; ties go to faster decode, then to higher quality. If none passes, the best trade is the one "
    "with the largest gap between the share of dense quality kept and the share of dense KV bytes held. Where a run "
    "has scored tasks, the rule goes by them, and a detectable rise of losses such as perplexity is named beside it. "
    "Where methods had not seen the question, a row that was shown it (retrieval searches with it) is no rival of "
    "theirs: it is named beside the choice, and chosen only where no other method ran every cell. "
    "“No detectable loss” speaks of these samples only: the interval says which losses they cannot exclude."
)

_SAVES = 0.995  # a held share above this is dense in all but rounding


@dataclass(frozen=True)
class Recommendation:
    """What to use and why.

    `kind`: `lossless` (no detectable loss), `trade` (all methods lose something), `speed` (none holds less, but one is
    faster), `untested` (no dense baseline, or too few samples to detect a loss), `none` (nothing to recommend).
    """

    model: str
    question_seen: bool
    kind: Literal["lossless", "trade", "speed", "untested", "none"]
    sentence: str
    row: Row | None


def _losing(row: Row, view: View) -> bool:
    result = view.versus_dense(row)
    return result is not None and result.loss


def _tested(row: Row, view: View) -> bool:
    result = view.versus_dense(row)
    return result is not None and result.can_detect


def _order(row: Row, view: View) -> tuple[float, float, float]:
    value = view.of(row)
    goodness = 0.0 if value is None else value.estimate if view.quality == "score" else -value.estimate
    decode = row.decode_ratio if row.decode_ratio is not None else float("inf")
    return (row.kv_share if row.kv_share is not None else 1.0, decode, -goodness)


def _kept(row: Row, dense: Row, view: View) -> float:
    """Share of dense quality that a row keeps; above 1 when it is better."""
    mine, base = view.of(row), view.of(dense)
    if mine is None or base is None:
        return 0.0
    top, bottom = (mine, base) if view.quality == "score" else (base, mine)
    return top.estimate / bottom.estimate if bottom.estimate > 0 else 1.0


def _holds(row: Row) -> str:
    return f"holds {percent(row.kv_share)} of the dense KV cache ({bytes_text(row.kv_bytes)})"


def _aside(row: Row, view: View) -> str:
    """What the loss tasks say where the rule went by scores."""
    result = row.loss_vs_dense
    if view.quality == "loss" or result is None or not result.loss:
        return ""
    tasks = ", ".join(task for task in row.loss_tasks)
    return f"; the loss on {tasks} rises by {-result.difference:.2g} ({p_text(result.p)})"


def _shown(methods: Sequence[Row], view: View, row: Row | None) -> str:
    """What is said of the best row that was shown the question, where it would pass and holds less than `row`."""
    passing = [
        r for r in methods if r.told and _tested(r, view) and not _losing(r, view) and (r.kv_share or 1.0) < _SAVES
    ]
    if not passing or (row is not None and row.told):
        return ""
    best = min(passing, key=lambda r: _order(r, view))
    if row is not None and row.kv_share is not None and row.kv_share <= (best.kv_share or 1.0):
        return ""
    return f"; {best.name} holds {percent(best.kv_share)} with no detectable loss, but was shown the question"


def _name(row: Row) -> str:
    return f"{row.name} (which was shown the question)" if row.told else row.name


def _speed(row: Row) -> str:
    if row.decode_ratio is None:
        return ""
    if 0.97 <= row.decode_ratio <= 1.03:
        return ", decodes as fast as dense"
    if row.decode_ratio < 1:
        return f", decodes {1 / row.decode_ratio:.2f}× faster"
    return f", decodes {row.decode_ratio:.2f}× slower"


def _figures(row: Row, dense: Row, view: View, result: Paired) -> str:
    word = "score" if view.quality == "score" else "loss"
    # `result` is positive when better; a loss is printed as it is measured, where higher is worse.
    sign = 1 if view.quality == "score" else -1
    low, high = sorted((sign * result.low, sign * result.high))
    # Three decimals, so that the difference of the printed scores is the printed difference.
    return (
        f"{word} {quality(view.of(row), 3)} against {quality(view.of(dense), 3)} dense, "
        f"difference {signed(sign * result.difference, 3)}, "
        f"{result.level:.0%} CI {signed(low, 3)} to {signed(high, 3)}, n={result.n}"
    )


def _where(view: View) -> str:
    lengths = f"{view.lengths[0]:,}" if len(view.lengths) == 1 else f"{view.lengths[0]:,}–{view.lengths[-1]:,}"
    use = "the question seen" if view.question_seen else "the question not seen before compression"
    return f"For {view.model} at {lengths} tokens, with {use}"


def recommend_view(view: View) -> Recommendation:
    """Applies `RULE` to one view."""

    def answer(kind: Literal["lossless", "trade", "speed", "untested", "none"], text: str, row: Row | None = None):
        return Recommendation(view.model, view.question_seen, kind, f"{_where(view)}: {text}", row)

    dense = view.dense
    methods = [row for row in view.rows if not row.dense and row.complete]
    if not methods:
        return answer("none", "nothing to recommend: no method ran every cell of the comparison.")
    if dense is None:
        return answer("untested", "no recommendation: the run has no dense baseline, so no loss can be tested.")
    everyone, methods = methods, [row for row in methods if not row.told] or methods
    tested = [row for row in methods if _tested(row, view)]
    if not tested:
        n = max((r.n for row in methods if (r := view.versus_dense(row)) is not None), default=0)
        few = f"n={n} samples are too few to detect a loss of any size" if n else "no samples are shared with dense"
        return answer("untested", f"no recommendation: {few}; run at least 6, better 100.")
    passing = [row for row in tested if not _losing(row, view)]
    saving = [row for row in passing if row.kv_share is not None and row.kv_share < _SAVES]
    if saving:
        row = min(saving, key=lambda r: _order(r, view))
        result = view.versus_dense(row)
        assert result is not None  # a tested row has been compared
        return answer(
            "lossless",
            f"use {_name(row)}; it {_holds(row)}{_speed(row)}, with no detectable loss at n={result.n} "
            f"({_figures(row, dense, view, result).rsplit(', ', 1)[0]}){_aside(row, view)}"
            f"{_shown(everyone, view, row)}.",
            row,
        )
    faster = [row for row in passing if row.decode_ratio is not None and row.decode_ratio < 0.97]
    if faster:
        row = min(faster, key=lambda r: (r.decode_ratio or 0.0, _order(r, view)))
        result = view.versus_dense(row)
        assert result is not None
        return answer(
            "speed",
            f"no method holds less KV cache without a detectable loss; {_name(row)} is the fastest without one"
            f"{_speed(row)} ({_figures(row, dense, view, result)}){_aside(row, view)}{_shown(everyone, view, None)}.",
            row,
        )
    trades = [row for row in tested if row.kv_share is not None and row.kv_share < _SAVES]
    if trades:
        row = max(trades, key=lambda r: (_kept(r, dense, view) - (r.kv_share or 0.0), [-x for x in _order(r, view)]))
        result = view.versus_dense(row)
        assert result is not None
        return answer(
            "trade",
            f"every method that holds less KV cache loses quality; the best trade is {_name(row)}, which keeps "
            f"{percent(_kept(row, dense, view))} of dense quality and {_holds(row)}{_speed(row)} "
            f"({_figures(row, dense, view, result)}, {p_text(result.p)}){_aside(row, view)}"
            f"{_shown(everyone, view, None)}.",
            row,
        )
    stay = "stay with dense: no method holds less KV cache or decodes faster without a detectable loss"
    return answer("none", f"{stay}{_shown(everyone, view, None)}.")


def recommend(records: Sequence[Record]) -> list[Recommendation]:
    """One recommendation per model and use of a run."""
    return [recommend_view(view) for view in overall(records)]
