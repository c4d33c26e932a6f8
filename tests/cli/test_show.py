from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.program import errors, invoke

TOKENS = 700
SLOT = 128 / (128 + 4)
"""Share of a held slot that is key and value: 2 x 16 numbers of 4 bytes, beside a position of 4 bytes."""


def show(capsys, model: Path, method: str, *more: object):
    prompt = "The quick brown fox jumps over the lazy dog. " * 40
    words = ["show", method, "--model", model, "--dtype", "float32", "--prompt", prompt[:TOKENS], *more]
    return invoke(capsys, words)


def numbers(capsys, model: Path, method: str, *more: object) -> dict:
    done = show(capsys, model, method, "--json", *more)
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_dense_is_said_in_three_lines(capsys, model: Path) -> None:
    done = show(capsys, model, "dense")
    assert done.code == 0, done.err
    assert "prompt: every pair is computed" in done.out
    assert "held: every position" in done.out
    assert "next token: reads every position" in done.out
    data = numbers(capsys, model, "dense")
    assert data["prompt"]["share"] == data["held"]["share"] == data["read"]["share"] == 1
    assert data["held"]["layers"][0]["heads"] == [[[0, TOKENS]]] * 2
    assert data["read"]["layers"][0]["heads"] == [[[0, TOKENS + 1]]] * 4


def test_a_keep_method_shows_what_it_held(capsys, model: Path) -> None:
    data = numbers(capsys, model, "snapkv", "--budget", "0.25")
    assert data["prompt"]["share"] == 1
    kept = int(0.25 * SLOT * TOKENS)
    assert data["held"]["share"] == pytest.approx(kept / TOKENS)
    for layer in data["held"]["layers"]:
        for head in layer["heads"]:
            assert sum(stop - start for start, stop in head) == kept
            assert head[-1][0] <= TOKENS - 32  # its observation window is among them
            assert head[-1][1] == TOKENS
    # the next token reads all that is held, and itself
    read, held = data["read"]["layers"][1]["heads"][3], data["held"]["layers"][1]["heads"][1]
    assert sum(b - a for a, b in read) == sum(b - a for a, b in held) + 1
    assert data["bytes"] < 0.32 * data["dense_bytes"]
    drawn = show(capsys, model, "snapkv", "--budget", "0.25").out
    assert f"held: {kept / TOKENS:.1%} of the positions" in drawn
    assert drawn.count("|") == 2 * 3 * 2  # three layers, two maps


def test_a_decode_method_shows_what_the_next_token_reads(capsys, model: Path) -> None:
    data = numbers(capsys, model, "quest(dense_layers=1)", "--budget", "0.5")
    assert data["held"]["share"] == 1
    assert data["read"]["share"] == pytest.approx(0.5, abs=0.03)
    layers = {layer["layer"]: layer["heads"] for layer in data["read"]["layers"]}
    assert layers[0] == [[[0, TOKENS + 1]]] * 4
    assert all(start % 16 == 0 for head in layers[2] for start, _ in head)  # whole pages
    assert all(head[-1][1] == TOKENS + 1 for head in layers[2])


def test_a_method_inside_the_prompt_shows_its_triangle(capsys, model: Path) -> None:
    data = numbers(capsys, model, "streaming-llm", "--budget", "0.3", "--head", "1")
    assert data["prompt"]["share"] == pytest.approx(1 - 0.7**2, abs=0.02)
    cells = data["prompt"]["picture"]["cells"]
    assert len(cells) == len(cells[0]) == 64
    assert cells[0][1] is None  # the future
    assert cells[63][63] == 1  # itself
    assert cells[63][20] == 0  # behind the window
    assert data["prompt"]["picture"]["head"] == 1
    assert 0.3 * SLOT - 2 / TOKENS <= data["held"]["share"] <= 0.3 * SLOT


def test_the_picture_is_written(capsys, model: Path, tmp_path: Path) -> None:
    done = show(capsys, model, "h2o", "--budget", "0.3", "--png", tmp_path / "h2o.png")
    assert done.code == 0, done.err
    assert (tmp_path / "h2o.png").read_bytes().startswith(b"\x89PNG")
    assert f"picture: {tmp_path / 'h2o.png'}" in done.out


def test_without_a_prompt_a_needle_is_marked(capsys, model: Path) -> None:
    done = invoke(
        capsys, ["show", "snapkv", "--budget", "0.3", "--model", model, "--dtype", "float32", "--length", 1400]
    )
    assert done.code == 0, done.err
    assert "^  the needle" in done.out.replace("^^", "^").replace("^^", "^")


def test_a_file_is_read(capsys, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x" * 300)
    done = invoke(capsys, ["show", "dense", "--model", model, "--prompt", tmp_path / "text.txt", "--json"])
    assert json.loads(done.out)["tokens"] == 300


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["nothing"], "no such method"),
        (["all"], "give one method or one composition"),
        (["snapkv,h2o"], "give one method or one composition"),
        (["flexprefill", "--budget", "0.5"], "budget='0.5': flexprefill takes none here"),
        (["quest", "--budget", "0.05"], "quest cannot read less than"),
        (["snapkv", "--budget", "1.5"], "a ratio lies above 0 and at most at 1"),
        (["snapkv", "--length", "100"], "longer than 100 tokens"),
        (["snapkv", "--layer", "9"], "layer=9: choose one of 0..2"),
        (["snapkv", "--head", "4"], "head=4: choose one of 0..3"),
    ],
)
def test_bad_arguments(capsys, model: Path, tmp_path: Path, more: list[str], said: str) -> None:
    done = show(capsys, model, *more, "--png", tmp_path / "p.png")
    assert done.code == 2
    assert done.out == ""
    (line,) = errors(done)
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_beyond_the_positions(capsys, model: Path) -> None:
    done = invoke(capsys, ["show", "dense", "--model", model, "--prompt", "y" * 2100])
    assert done.code == 2
    assert "longer than 2048 tokens" in done.err
    done = invoke(capsys, ["show", "dense", "--model", model, "--length", "2100"])
    assert done.code == 2
    assert "the model has 2048 positions" in done.err
