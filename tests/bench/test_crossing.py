"""From which length on a method is faster: measured and predicted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from foveate.bench.crossing import crossings, first_faster, lines_meet, sentence
from foveate.bench.generation import PLAIN


def test_first_faster() -> None:
    assert first_faster([(1, 2, 3), (2, 2, 3)]) == 1
    assert first_faster([(1, 2, 3), (2, 4, 3), (3, 2, 3), (4, 2, 3)]) == 3
    assert first_faster([(1, 2, 3), (2, 3, 3)]) is None
    assert first_faster([]) is None


def test_lines_meet() -> None:
    assert lines_meet({100: 50.0, 200: 50.0}, {100: 10.0, 200: 20.0}) == pytest.approx(500)
    assert lines_meet({100: 5.0, 200: 6.0}, {100: 10.0, 200: 20.0}) == pytest.approx(400 / 9)
    assert lines_meet({100: 50.0, 200: 60.0}, {100: 10.0, 200: 20.0}) is None
    assert lines_meet({100: 0.5, 200: 1.0}, {100: 10.0, 200: 20.0}) == 0.0
    assert lines_meet({100: 5.0, 200: 15.0}, {100: 10.0, 200: 20.0}) == 0.0
    assert lines_meet({100: 5.0, 200: 19.0}, {100: 10.0, 200: 20.0}) is None
    assert lines_meet({100: 5.0}, {100: 10.0}) is None


def rows(method: str, decode: list[float], floor: list[float], **more: Any) -> list[dict[str, Any]]:
    return [
        {"method": method, "length": n, "decode_ms": ms, "decode_floor_ms": least, **more}
        for n, ms, least in zip((1000, 2000, 4000), decode, floor, strict=True)
    ]


def test_crossings() -> None:
    plain = rows(PLAIN, [9, 9, 9], [1, 2, 4])
    dense = rows("dense", [2, 3, 5], [1, 2, 4])
    sparse = rows("sparse", [3, 3, 3], [1.5, 1.5, 1.5], settings={"sparse": {"tokens": 5}})
    refused = [{"method": "other", "length": 1000, "refused": "no"}]
    (found,) = crossings([*plain, *dense, *sparse, *refused])
    assert (found["method"], found["quantity"], found["against"]) == ("sparse", "decode", "dense")
    assert found["measured"] == 4000 and found["predicted"] == pytest.approx(1500)
    assert "from 4,000 tokens on than dense; bytes alone say from 1,500" in sentence(found, 1000)
    json.dumps(found, allow_nan=False)
    (alone,) = crossings([*plain, *sparse])
    assert alone["against"] == PLAIN and alone["measured"] == 1000
    assert "at every length" in sentence(alone, 1000)
    assert crossings(sparse) == []


def test_prompts_are_not_predicted() -> None:
    timed = [{"method": name, "length": 1000, "prefill_ms": ms} for name, ms in (("dense", 2.0), ("sparse", 3.0))]
    (found,) = crossings(timed)
    assert found["measured"] is None and found["predicted"] is None and found["quantity"] == "prefill"
    assert "not faster" in sentence(found, 1000)
