"""The bench of kernels on the processor: answers are checked before they are timed, rows say what they stand beside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.program import invoke

from foveate.attention import Geometry, Selection, decoding
from foveate.attention.reference import reference
from foveate.bench import kernels
from foveate.bench.kernels import choose, decode, measure, prefill, rivals
from foveate.bench.kernels.case import Case, Check, Kernel, Made
from foveate.bench.kernels.sizes import Sizes
from foveate.bench.kernels.truth import rows_of, some_rows, truth
from foveate.bench.plot import plot
from foveate.errors import BadArgument

CPU = torch.device("cpu")
TINY = Sizes.of(CPU, lengths=(256,), heads=2, kv_heads=1, latent_heads=2, head_dim=32, budget=64)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "DENSITIES", (0.25,))
        return kernels.bench(CPU, sizes=TINY, repeats=1)


def test_every_family_has_rows_that_are_right(data: dict[str, Any]) -> None:
    assert {row["family"] for row in data["rows"]} == set(kernels.FAMILIES)
    for row in data["rows"]:
        assert "refused" not in row, row
        assert row["error"] < 1e-5 and row["bytes"] > 0
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"] and row["floor_share"] > 0
        assert row["floor_ms"] == pytest.approx(row["floor_share"] * row["ms"])
    json.dumps(data, allow_nan=False)
    assert data["absent"] == [] and not data["cold"]  # nothing of which a processor could run


def test_rows_stand_beside_the_fastest_dense_kernel(data: dict[str, Any]) -> None:
    dense = min(row["ms"] for row in data["rows"] if row["family"] == "prefill")
    rows = [row for row in data["rows"] if row["family"] == "block-sparse"]
    assert len(rows) == 3 * 3
    for row in rows:
        assert row["times_dense"] == pytest.approx(dense / row["ms"])
        assert row["of_ideal"] == pytest.approx(row["density"] * row["times_dense"])
        tiles = row["tiles"]
        assert tiles["speed_up"] <= tiles["gathered_speed_up"] + 1e-9 <= tiles["pair_speed_up"] + 1e-6
        assert tiles["pair_speed_up"] == pytest.approx(1 / row["density"])
    assert not any("times_dense" in row for row in data["rows"] if row["family"] in ("prefill", "latent", "columns"))


def test_what_others_stand_beside_is_timed_too() -> None:
    rows = kernels.run(CPU, ["packed"], sizes=TINY, repeats=1)
    assert {row["family"] for row in rows} == {"decode", "packed"}
    assert all("times_dense" in row for row in rows if row["family"] == "packed")


def of_kernels(monkeypatch: pytest.MonkeyPatch, *made: Kernel, check: Callable[[Any], Check]) -> list[dict[str, Any]]:
    case = Case("decode", "a case", 256, lambda g: Made(made, check, 1e6, 1e6))
    monkeypatch.setattr(measure, "FAMILIES", {"decode": lambda sizes, device: [case]})
    return kernels.run(CPU, ["decode"], sizes=TINY, repeats=1)


@pytest.mark.skipif(not decoding._interpreted(), reason="kernels run here in Triton's interpreter")
@pytest.mark.parametrize("family", ["decode", "listed", "latent", "packed", "columns", "select", "block-sparse"])
def test_our_kernels_take_the_inputs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case of each family, as it is made on a GPU, without other libraries."""
    for module in (choose, decode, prefill):
        monkeypatch.setattr(module, "has_kernels", lambda device: True)
    monkeypatch.setattr(rivals, "flex", lambda q, k, v, mask: Kernel("FlexAttention", lambda: None))
    case = kernels.FAMILIES[family](TINY, CPU)[-1]
    made = case.make(torch.Generator().manual_seed(4))
    ours = next(kernel for kernel in made.kernels if kernel.name in ("foveate decode", "foveate triton"))
    with torch.no_grad():
        found = made.check(ours.read(ours.work()))
    assert found.passed and found.error < 1e-5


def test_a_wrong_answer_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ValueError("first line\nno such thing\n")

    made = [Kernel(str(x), lambda x=x: x) for x in (0.0, 1.0, float("nan"))]
    right, wrong, broken, failed = of_kernels(monkeypatch, *made, Kernel("fails", fails), check=lambda x: Check(x, 0.1))
    assert right["ms"] > 0 and "refused" not in right
    assert "ms" not in wrong and "allowed 1.0e-01" in wrong["refused"]
    assert "ms" not in broken and "not finite" in broken["refused"]
    assert failed["refused"] == "ValueError: no such thing"
    json.dumps([right, wrong, broken, failed], allow_nan=False)


def test_an_lse_that_is_off_is_wrong() -> None:
    assert Check(0.0, 0.1, 0.005).passed
    assert not Check(0.0, 0.1, 0.02).passed and not Check(0.0, 0.1, float("nan")).passed


def test_no_time_left() -> None:
    rows = kernels.run(CPU, ["select"], sizes=TINY, limit=0.0)
    assert rows and all(row["refused"] == "no time was left" for row in rows)


def test_truth_is_the_reference() -> None:
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, h, 300, 16, generator=draw) for h in (4, 2, 2))
    lists = prefill.random_lists(4, 256, 64, 0.3, draw)
    padded = torch.nn.functional.pad(lists, (0, 0, 0, 1), value=0)
    selection = Selection(padded, prefill.Q_BLOCK, 64)
    pieces = some_rows(300, draw)
    want = reference(q.double(), k.double(), v.double(), selection, Geometry(1, 300, 300))
    out, lse = truth(q, k, v, pieces, selection)
    assert torch.allclose(out.double(), rows_of(want.out, pieces), atol=1e-5)
    assert torch.allclose(lse.double(), rows_of(want.lse, pieces), atol=1e-5)
    assert pieces[0][0] == 0 and pieces[-1][1] == 300


@pytest.mark.parametrize("k_block", prefill.K_BLOCKS)
def test_random_lists(k_block: int) -> None:
    """They ascend, hold the first and the queries' own blocks, and are of the density asked for."""
    n, density = 2048, 0.25
    lists = prefill.random_lists(2, n, k_block, density, torch.Generator().manual_seed(1))[0]
    for head in lists:
        for row, entries in enumerate(head.tolist()):
            own = [x for x in entries if x >= 0]
            assert own == sorted(set(own)) and entries[len(own) :] == [-1] * (len(entries) - len(own))
            end = (row + 1) * prefill.Q_BLOCK // k_block
            assert own[0] == 0 and own[-1] == end - 1 and set(range(row * 128 // k_block, end)) <= set(own)
            assert len(own) == max(round(density * end), min(end, 128 // k_block + 1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_numbers(bits: int) -> None:
    """Codes lie low bits first; keys share scales along tokens, values along channels."""
    draw = torch.Generator().manual_seed(2)
    for key in (True, False):
        codes, scale, zero, _ = decode._side(TINY, 64, bits, key, draw)
        got = decode._unpack(codes, scale, zero, bits, torch.float32)
        head, token, channel = 0, 37, 21
        byte = int(codes[head, token, channel * bits // 8])
        code = byte >> (channel * bits % 8) & (2**bits - 1)
        at = (head, token // 32, channel) if key else (head, token, channel // 32)
        assert got[head, token, channel] == pytest.approx(code * float(scale[at]) + float(zero[at]), rel=1e-6)


def test_picture(data: dict[str, Any], tmp_path: Path) -> None:
    assert plot(data, tmp_path / "a" / "bench.svg").read_bytes().startswith(b"<?xml")
    with pytest.raises(BadArgument, match="nothing to draw"):
        plot({**data, "rows": []}, tmp_path / "b.png")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "bench.svg"]


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "DENSITIES", (0.25,))
    out, picture = tmp_path / "kernels.json", tmp_path / "kernels.png"
    words = "bench kernels --families listed,block-sparse --lengths 256 --heads 2 --kv-heads 1 --head-dim 32"
    done = invoke(capsys, [*words.split(), "--repeats", 1, "--cpu", "--out", out, "--plot", picture])
    assert done.code == 0, done.err
    assert "tiles of 128 x 128" in done.out and "x dense" in done.out
    data = json.loads(out.read_text())
    assert data["kind"] == "kernels"
    assert "--head-dim 32" in data["command"] and "--cpu" in data["command"] and "--warm" not in data["command"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "block-sparse" in done.err


@pytest.mark.parametrize("whole", [0, 2])
def test_stopping_leaves_what_was_measured(
    whole: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a case leaves those before it, beside dense attention as at the end."""
    begun, of_case = [], measure._How.case

    def stop(self: Any, case: Case, slow: bool) -> list[dict[str, Any]]:
        if len(begun) == whole:
            raise KeyboardInterrupt
        begun.append(case.name)
        return of_case(self, case, slow)

    monkeypatch.setattr(measure._How, "case", stop)
    words = "bench kernels --cpu --families block-sparse --lengths 256 --heads 2 --kv-heads 1 --head-dim 32 --repeats 1"
    done = invoke(capsys, [*words.split(), "--out", tmp_path / "kernels.json"])
    assert done.code == 130
    assert [file.name for file in tmp_path.iterdir()] == ["kernels.json"] * bool(whole)
    if whole:
        rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
        assert list(dict.fromkeys(row["case"] for row in rows)) == begun
        assert all("of_ideal" in row for row in rows if row["family"] == "block-sparse")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--families", "nosuch"], "block-sparse"),
        (["--lengths", "100"], "multiples of 128"),
        (["--lengths", "many"], "whole numbers"),
        (["--heads", "3"], "multiple of the 2"),
        (["--head-dim", "48"], "32, 64, 128 or 256"),
        (["--repeats", "0"], "1 or more"),
        (["--plot", "kernels.pdf"], ".png or .svg"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = invoke(capsys, ["bench", "kernels", *arguments, "--cpu"])
    assert done.code == 2
    assert says in done.err and len(done.err.strip().splitlines()) <= 2
