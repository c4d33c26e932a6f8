"""The page of a conversion: made of its ladder alone, complete, balanced, safe with any text."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.report.synthetic import HOSTILE
from tests.report.test_html import Page

from foveate.errors import BadArgument
from foveate.report.conversion import print_ladder, read_ladder, render_conversion, write_conversion
from foveate.report.conversion.ladder import error, exact_error, kl, number, per_layer, scalars
from foveate.report.conversion.picture import bars, curve, stacks


def rung(
    stage: str,
    exact: bool,
    error: float | None,
    perplexity: float | None,
    kv: int,
    needles: float | None = 0.9,
    **facts: Any,
) -> dict[str, Any]:
    return {
        "stage": stage,
        "exact": exact,
        "error": error,
        "kl": 0.0123,
        "perplexity": perplexity,
        "kv_bytes": kv,
        "share": kv / 4096,
        "needles": needles,
        "parameters": 123456,
        "seconds": 1.5,
        "facts": facts,
    }


RECORD: dict[str, Any] = {
    "format": 1,
    "model": "small",
    "family": "llama",
    "layers": 3,
    "conversion": "transmla",
    "what": "to latent attention",
    "settings": {"kv": 0.25, "rank": None},
    "dtype": "float32",
    "device": "cpu",
    "text": {"text": "docs", "calibration_tokens": 2048, "probe_tokens": 1024, "length": 256, "seed": 0},
    "rungs": [
        rung("original", True, 0.0, 10.0, 4096),
        rung("lift", True, 3.1e-7, 10.0, 4096),
        rung("partial rope", False, 0.51, 12.5, 4096, energy=[0.9, 0.8, 0.7], freqfold=2, tried={"2": 12.0}),
        rung("balance", True, 0.5100004, 12.5, 4096, factor=[2.0, 3.0, 4.0]),
        rung("low rank", False, 0.7, 15.25, 1024, 0.7, energy=[0.99, 0.98, 0.97], rank=48),
    ],
    "questions": {"task": "niah_single_2", "samples": 10, "length": 1024, "seed": 0},
    "before": {"context": 1024, "repeats": 16, "prefill_s": 1.0, "decode_ms": 20.0, "cache_bytes": 4194304},
    "after": {"context": 1024, "repeats": 16, "prefill_s": 1.5, "decode_ms": 12.0, "cache_bytes": 1048576},
    "healing": None,
    "export": None,
    "versions": {"torch": "2.13.0"},
}  # fmt: skip

HEALED = {
    "tokens": 20480,
    "trained": 4567,
    "seconds": 12.0,
    "device": "cpu",
    "text": {"name": "packages"},
    "evaluations": [{"tokens": 0, "perplexity": 15.0, "kl": 0.2}, {"tokens": 20480, "perplexity": 11.0, "kl": 0.05}],
    "teacher_perplexity": 9.75,
    "curve": [{"tokens": 10240, "loss": 0.3}, {"tokens": 20480, "loss": None}, {"tokens": 20480, "loss": 0.1}],
}
EXPORTED = {
    "architecture": "DeepseekV3ForCausalLM",
    "norm": "exact",
    "rank": 52,
    "biases": True,
    "kv_bytes": 1100,
    "kv_bytes_before": 1024,
    "error": 0.0,
}


def test_the_page_says_what_was_measured() -> None:
    page = Page(render_conversion(RECORD))
    assert page.open == []
    for words in (
        "small converted",
        "1.0 KiB of cache per token instead of 4.0 KiB (25%), perplexity 15.25 instead of 10.00, 70% of needles found",
        "3.1e-07",
        "freqfold 2",
        "rank 48",
        "low rank: energy",
        "balance: factor",
        "0.60×",
        "12 ms",
        "70%",
        "original 90%",
        "Needles: 10 prompts of 1,024 tokens (niah_single_2), the same each time.",
        "behind 1,024 tokens, the median of 16, on cpu in float32",
        "partial rope: 12.5",
    ):
        assert words in page.text, words
    # Three facts of three layers, and perplexity, needles and cache of five stages.
    assert len(page.of("rect", "bar-of")) == 3 * 3 + 3 * 5
    assert "Healing" not in page.text
    assert "Export" not in page.text


def test_healing_and_export_are_told() -> None:
    record = {**RECORD, "healing": HEALED, "export": EXPORTED}
    page = Page(render_conversion(record))
    assert page.open == []
    for words in ("20,480 tokens of packages", "9.75", "11.00", "stock DeepseekV3ForCausalLM", "latents of 52 dims"):
        assert words in page.text, words
    assert len(page.of("polyline", "line-of")) == 1


def test_unhealed_and_healed_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    record = {**RECORD, "healing": HEALED, "converted": {**RECORD["after"], "decode_ms": 13.0}}
    page = Page(render_conversion(record))
    assert page.open == []
    for words in ("Converted", "Healed", "20 ms", "13 ms", "12 ms"):
        assert words in page.text, words
    print_ladder(record, None, Console(width=80))
    assert "Decode, per token: 20 ms before, 13 ms converted, 12 ms healed" in capsys.readouterr().out


def test_an_encoder_has_a_ladder_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def step(stage: str, exact: bool, parameters: int, similarity: float, found: float, **facts: Any) -> dict[str, Any]:
        alike = {"similarity": similarity, "retrieval": found, "share": parameters / 4000}
        return {
            "stage": stage, "exact": exact, "error": 0.0, "parameters": parameters, "seconds": 1.0, "facts": facts
        } | alike  # fmt: skip

    rungs = [step("original", True, 4000, 1.0, 0.8), step("1 heads", False, 3000, 0.9123, 0.6, used=[0.5, 0.4, 0.3])]
    record = {**RECORD, "kind": "encoder", "rungs": rungs}
    record["questions"] = {"task": "inverse cloze", "passages": 200, "seed": 0}
    record["before"] = {"context": 256, "batch": 16, "repeats": 9, "encode_ms": 8.0}
    record["after"] = {**record["before"], "encode_ms": 6.0}
    page = Page(render_conversion(record))
    assert page.open == []
    said = "3,000 parameters instead of 4,000 (75%), vectors 0.9123 alike, 60% of passages found instead of 80%."
    for words in (said, "0.75×", "Retrieved: of 200 held-out passages", "16 sequences of 256 tokens at a time", "used"):
        assert words in page.text, words
    for words in ("Perplexity", "KL", "Cache", "Needles"):
        assert words not in page.text, words
    assert len(page.of("rect", "bar-of")) == 3 * 2 + 3
    print_ladder(record, None, Console(width=80))
    out = capsys.readouterr().out
    assert "…" not in out and "3,000" in out and "Encode, per sequence: 8 ms before, 6 ms after" in out


def test_shares_of_a_layer_are_stacked() -> None:
    record = copy.deepcopy(RECORD)
    record["rungs"][-1]["facts"] = {"energy": [[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]], "kept": [[1, 2], [0, 3], [2, 3]]}
    assert [what for _, what, _ in per_layer(record)] == ["energy", "factor", "energy"]
    page = Page(str(stacks(record["rungs"][-1]["facts"]["energy"], "energy")))
    heights = [float(str(each["height"])) for each in page.of("rect", "bar-of")]
    assert len(heights) == 6
    assert [heights[i] + heights[i + 1] for i in (0, 2, 4)] == pytest.approx([132.0] * 3, abs=0.2)


def test_what_is_missing_is_left_out() -> None:
    record = copy.deepcopy(RECORD)
    record["rungs"][1]["error"] = record["rungs"][-1]["perplexity"] = None
    record["before"] = None
    page = Page(render_conversion(record))
    assert "In use" not in page.text
    record["before"], record["after"] = {"decode_ms": 1.0}, {"decode_ms": 2.0, "context": 64}
    record["questions"] = None
    for each in record["rungs"]:
        each["needles"] = None
    page = Page(render_conversion(record))
    assert "2.00×" in page.text
    assert "eedles" not in page.text


def test_nothing_is_loaded_and_any_text_is_safe() -> None:
    record = {**RECORD, "model": HOSTILE, "what": HOSTILE, "settings": {HOSTILE: HOSTILE}}
    record["rungs"] = [
        {**each, "stage": HOSTILE, "facts": {HOSTILE: [0.1, 0.2, 0.3], "said": HOSTILE}} for each in RECORD["rungs"]
    ]
    html = render_conversion(record)
    page = Page(html)
    assert page.open == []
    assert page.scripts == Page(render_conversion(RECORD)).scripts == 1
    assert HOSTILE not in html
    for tag, attributes in page.elements:
        assert not {"src", "action", "xlink:href", "onload", "onerror"} & attributes.keys(), tag


def test_errors_of_exact_stages() -> None:
    assert [exact_error(RECORD, index) for index in range(5)] == [0.0, 3.1e-7, None, pytest.approx(4e-7), None]


def test_numbers_are_spelled() -> None:
    assert [number(v) for v in (12.345, 1e6, None)] == ["12.35", "1e+06", "–"] or number(12.345) == "12.35"
    assert [error(v) for v in (0.0, 3.14e-7, None)] == ["0", "3.1e-07", "–"]
    assert [kl(v) for v in (0.01234, 2e-6, 1e-15, None)] == ["0.0123", "2e-06", "0", "–"]
    assert scalars({"rank": 4, "share": 0.25, "name": "x", "list": [1, 2], "map": {}}) == "rank 4 · share 0.25 · name x"
    assert [(stage, what) for stage, what, _ in per_layer(RECORD)] == [
        ("partial rope", "energy"),
        ("balance", "factor"),
        ("low rank", "energy"),
    ]


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-1.0, 2.0], [0.5] * 80, [-3.0, -1.0], [1e-9, 2e-9]])
def test_pictures_stay_in_their_frame(values: list[float]) -> None:
    for picture, tag in ((bars(values, "x"), "rect"), (curve(list(enumerate(values)), "x"), "polyline")):
        page = Page(str(picture))
        assert page.open == []
        (view,) = [a["viewbox"] for t, a in page.elements if t == "svg"]
        width, height = (float(v) for v in str(view).split()[2:])
        for attributes in page.of(tag):
            if tag == "rect":
                x, y, w, h = (float(str(attributes[name])) for name in ("x", "y", "width", "height"))
                assert 0 <= x <= x + w <= width
                assert 0 <= y <= y + h <= height
            else:
                points = [tuple(map(float, p.split(","))) for p in str(attributes["points"]).split()]
                assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_the_page_is_made_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=r"holds no ladder\.json"):
        write_conversion(tmp_path)
    (tmp_path / "ladder.json").write_text("{")
    with pytest.raises(BadArgument, match="cannot be read"):
        read_ladder(tmp_path)
    (tmp_path / "ladder.json").write_text("{}")
    with pytest.raises(BadArgument, match="holds no rungs"):
        read_ladder(tmp_path)
    (tmp_path / "ladder.json").write_text(json.dumps(RECORD))
    page = write_conversion(tmp_path)
    assert page == tmp_path / "report.html"
    assert page.read_text() == render_conversion(RECORD)


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_is_whole_at_any_width(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    record = copy.deepcopy({**RECORD, "export": EXPORTED})
    record["rungs"][3]["stage"] = "the norm's gain goes into what follows"
    print_ladder(record, Path("out/report.html"), Console(width=width))
    out = capsys.readouterr().out
    assert "…" not in out
    for words in (
        "partial rope",
        "15.25",
        "25%",
        "3.1e-07",
        "Needles",
        "70%",
        "Decode, per token: 20 ms before, 12 ms after",
        "out/report.html",
    ):
        assert words in out, words
    assert ("rank 48" in out) == (width == 160)
