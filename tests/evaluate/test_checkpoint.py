"""Converted checkpoints as rows beside the model that they came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.evaluate.small import LENGTH, small

from foveate.comparison import compare
from foveate.errors import BadArgument
from foveate.evaluate.setting import parse_methods, settings_of, text_of
from foveate.models import Loaded
from foveate.models.converted import container
from foveate.models.tiny import tiny


@pytest.fixture(scope="module")
def opened() -> Loaded:
    return small()


@pytest.fixture(scope="module")
def folders(opened: Loaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    same, other = (tmp_path_factory.mktemp("models") / name for name in ("same", "other"))
    made = container(opened.model)
    made.save_pretrained(same)
    with torch.no_grad():
        made.model.layers[0].self_attn.v_proj.weight.zero_()
    made.save_pretrained(other)
    for folder in (same, other):
        opened.tokenizer.save_pretrained(folder)
    return same, other


def test_a_checkpoint_is_a_row_like_any_other(opened: Loaded, folders: tuple[Path, Path], tmp_path: Path) -> None:
    same, other = folders
    found = compare(
        opened.model,
        tokenizer=opened.tokenizer,
        methods=f"{same}, {other}, {same}|kivi(bits=4), kivi(bits=4)",
        lengths=LENGTH,
        tasks=["perplexity"],
        samples=2,
        repeats=1,
        out=tmp_path / "run",
    )
    rows = {record.cell.method: record for record in found.records}
    dense = rows["dense"]
    assert set(rows) == {"dense", "same", "other", "same|kivi", "kivi"}
    assert rows["same"].scores == pytest.approx(dense.scores, rel=1e-5)
    assert rows["other"].scores != pytest.approx(dense.scores, rel=1e-3)
    assert rows["same"].kv_bytes == dense.kv_bytes == rows["same"].kv_bytes_dense
    assert rows["same|kivi"].kv_bytes == rows["kivi"].kv_bytes < dense.kv_bytes
    assert rows["same|kivi"].scores == pytest.approx(rows["kivi"].scores, rel=1e-4)
    assert all(record.prefill_s > 0 and record.decode_ms > 0 for record in found.records)
    assert "same|kivi" in found.report.read_text()


def test_the_text_of_a_checkpoint_is_read_again(folders: tuple[Path, Path]) -> None:
    entries = parse_methods(f"{folders[0]}|snapkv, {folders[1]}")
    again = parse_methods(text_of(entries))
    assert [s.key for s in settings_of(again, [])] == [s.key for s in settings_of(entries, [])]
    assert len(entries) == 3


def test_what_is_no_checkpoint_is_said(opened: Loaded, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="no folder with a model"):
        parse_methods("runs/missing")
    tiny("llama", vocab_size=99).save_pretrained(tmp_path / "wide")
    opened.tokenizer.save_pretrained(tmp_path / "wide")
    with pytest.raises(BadArgument, match="vocabulary"):
        compare(
            opened.model,
            tokenizer=opened.tokenizer,
            methods=str(tmp_path / "wide"),
            lengths=LENGTH,
            tasks=["perplexity"],
            samples=1,
            repeats=0,
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run" / "records.jsonl").exists()
