"""Profiles of benches on the processor: what they add up to and leave alone, how they fail, how they are shown."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.cli.program import invoke
from tests.contract.recorded import recording

from foveate.bench import generation
from foveate.bench import profile as profiling
from foveate.bench.generation import PLAIN, Bench
from foveate.bench.profile import LISTED, Profiled, Work, short_name
from foveate.engine.apply import apply, resolve
from foveate.engine.captured import Step
from foveate.models import ModelShape, tiny

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def rows(bench: Bench, *methods: tuple[str, float | int | None], length: int = 200) -> list[Any]:
    model = tiny("llama", kv_heads=4)
    return list(bench.run(model, [resolve(name, ModelShape.of(model), to) for name, to in methods], [length]))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            (
                "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1ul>"
                " >(int, at::native::FillFunctor<int>, std::array<char*, 1ul>)"
            ),
            "vectorized_elementwise_kernel",
        ),
        (
            (
                "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::"
                "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda(float)#1}>"
                "(at::TensorIteratorBase&, float const&)::{lambda(int)#1}>(int, float)"
            ),
            "elementwise_kernel",
        ),
        (
            (
                "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::(anonymous namespace)::"
                "OpaqueType<2u>, unsigned int, 4, 64, 64>(at::native::(anonymous namespace)::OpaqueType<2u>*, int)"
            ),
            "CatArrayBatchedCopy",
        ),
        ("nvjet_tst_128x8_64x12_4x1_v_bz_TNT", "nvjet_tst_128x8_64x12_4x1_v_bz_TNT"),
        ("_decode", "_decode"),
        (
            (
                "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>"
                "(cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8::Params)"
            ),
            "cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8",
        ),
        (
            (
                "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<Main<int, 2>, Tail<(1 > 0)> > "
                "> >(flash::Params)"
            ),
            "FlashAttnFwdSm90",
        ),
        (
            (
                "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16, float, (bool)1>"
                "(cublasGemvParamsEx<int>)"
            ),
            "gemvx::kernel",
        ),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        ("Memset (Device)", "Memset"),
        ("aten::mm", "mm"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_work_adds_up() -> None:
    """Kernels of one short name together, the most expensive listed, all of them counted, all of it per repeat."""
    pieces = [(f"void space::kernel_{i}<{j}>(int)", 1, 1e-3 * (i + 1)) for i in range(LISTED + 4) for j in (1, 2)]
    work = Work.of(pieces, repeats=2)
    assert work.launches == LISTED + 4
    assert work.seconds == pytest.approx(1e-3 * sum(range(LISTED + 5)))
    assert [name for name, *_ in work.pieces] == [f"kernel_{i}" for i in range(LISTED + 3, 3, -1)]
    assert work.pieces[0] == ("kernel_13", 1, pytest.approx(14e-3))
    assert work.as_json(0.2)["idle_ms"] == pytest.approx(200 - 105)
    assert work.as_json(0.1)["idle_ms"] == 0


def test_kernels_are_what_ran_on_the_device() -> None:
    """Of a GPU neither what the host called nor marks of the program count."""

    def event(name: str, where: str, mark: bool = False) -> Any:
        return SimpleNamespace(
            name=lambda: name,
            device_type=lambda: SimpleNamespace(name=where),
            is_user_annotation=lambda: mark,
            duration_ns=lambda: 2_000_000,
        )

    seen = [
        event("cudaGraphLaunch", "CPU"),
        event("ProfilerStep#0", "CUDA", mark=True),
        event("_decode", "CUDA"),
        event("_decode", "CUDA"),
    ]
    results: Any = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: seen)))
    assert Work.of(profiling._kernels(results)) == Work(4e-3, 2, (("_decode", 2, 4e-3),))


def test_a_row_says_where_its_time_goes() -> None:
    for row in rows(Bench(prompt=True, steps=3, profile=True), ("dense", None), ("streaming-llm", 40)):
        assert row.decode.repeats == 3 and row.prefill.repeats == 1 and not row.unprofiled
        got = row.as_json()
        json.dumps(got, allow_nan=False)
        for part in ("prefill", "decode"):
            told = got[f"{part}_profile"]
            assert 0 < len(told["kernels"]) <= LISTED and told["launches"] >= 20
            assert 0 < sum(each["ms"] for each in told["kernels"]) <= told["device_ms"] * (1 + 1e-9)
            assert told["idle_ms"] == pytest.approx(max(0, got[f"{part}_ms"] - told["device_ms"]))
            assert {"mm", "addmm", "linear"} & {each["name"] for each in told["kernels"]}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Steps are recorded and replayed as on a GPU; those that were begun."""

    @contextmanager
    def applied(model: Any, *given: Any, **options: Any) -> Iterator[Any]:
        with apply(model, *given, **options) as handle, recording(model, handle):
            yield handle

    begun: list[Step] = []
    begin = Step.__init__

    def init(self: Step, *given: Any) -> None:
        begin(self, *given)
        begun.append(self)

    monkeypatch.setattr(generation, "apply", applied)
    monkeypatch.setattr(Step, "__init__", init)
    return begun


def test_figures_are_of_one_token(recorded: list[Step]) -> None:
    """A token of a model of three layers has the products of three layers and a head, however many are looked at; all
    of them are replays of one recording, which had room for them."""
    (row,) = rows(Bench(steps=2, baseline=False, profile=True), ("dense", None))
    products = {each["name"]: each["launches"] for each in row.as_json()["decode_profile"]["kernels"]}
    assert products["mm"] == 3 * 7 + 1
    (step,) = recorded
    assert step.cache.horizon == 200 + 1 + 2 + 8 + 1 + 4 and step.kinds == 1


def test_nobody_asked() -> None:
    (row,) = rows(Bench(prompt=True, steps=1, baseline=False), ("dense", None))
    assert row.prefill_profile is None and row.decode_profile is None
    assert not {"prefill_profile", "decode_profile", "unprofiled"} & set(row.as_json())


@pytest.mark.parametrize("when", ["prepare_trace", "start_trace", "stop_trace", "key_averages"])
def test_a_profiler_that_fails_leaves_the_times(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("no CUPTI here")

    with monkeypatch.context() as patch:
        patch.setattr(profiling.profile, when, broken)
        (row,) = rows(Bench(prompt=True, steps=2, baseline=False, profile=True), ("dense", None))
    assert row.prefill is not None and row.decode is not None and not row.refused
    assert row.decode.repeats == 2
    got = row.as_json()
    assert got["unprofiled"] == "RuntimeError: no CUPTI here" and "decode_profile" not in got
    with Profiled(CPU) as after:  # what failed is not in the way of the next one
        torch.mm(torch.ones(100, 100), torch.ones(100, 100))
    assert after.work is not None and "mm" in {name for name, *_ in after.work.pieces}


def test_a_profiler_that_sees_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_operators", lambda profiler: iter(()))
    (row,) = rows(Bench(steps=1, baseline=False, profile=True), ("dense", None))
    assert row.decode is not None and row.decode_profile is None
    assert row.unprofiled == "the profiler saw no work"


@pytest.mark.usefixtures("recorded")
def test_recording_a_step_is_no_work_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are rehearsed and recorded while somebody looks would be counted as the answer's."""
    kinds = iter(range(10))
    monkeypatch.setattr(Step, "kinds", property(lambda self: next(kinds)))
    (row,) = rows(Bench(steps=1, baseline=False, profile=True), ("dense", None))
    assert row.decode is not None and row.decode_profile is None and "recorded" in row.unprofiled


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says it, the record keeps it, the terminal shows it."""
    words = "smollm2-135m --layers 1 --cpu --lengths 64 --methods dense"
    for kind, more, parts in (("e2e", "--steps 1", {"prefill", "decode"}), ("prefill", "", {"prefill"})):
        out = tmp_path / f"{kind}.json"
        done = invoke(capsys, ["bench", kind, *words.split(), *more.split(), "--profile", "--out", out])
        assert done.code == 0, done.err
        data = json.loads(out.read_text())
        assert data["command"].endswith("--cpu --profile")
        for row in data["rows"]:
            assert {part for part in ("prefill", "decode") if f"{part}_profile" in row} == parts
        shown = " ".join(done.out.split())
        assert f"{PLAIN}, 64 tokens, prompt: " in shown and "dense, 64 tokens, prompt: " in shown
        assert ("dense, 64 tokens, token: " in shown) == ("decode" in parts)
        assert "idle" in shown and "launches" in shown


def test_page() -> None:
    """Records with profiles get a list below the table; others stay as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        page = importlib.import_module("bench_page")
    data = json.loads((ROOT / "results" / "bench" / "decode-llama3-8b.json").read_text())
    plain = page.bench_part(data)
    row = data["rows"][0]
    name = f"**{page.label(row)}**, token of {row['length']:,}"
    work = Work.of([(f"void f{i}<int>(int)", 4 * (i + 1), 4e-3 * (9 - i)) for i in range(9)], repeats=4)
    row["decode_profile"] = work.as_json(0.0461)
    lines = page.bench_part(data).splitlines()
    (said,) = set(lines) - set(plain.splitlines())
    assert said.startswith(f"- {name}: `f0` 9.00 ms (1 x), `f1` 8.00 ms (2 x), ")
    assert said.endswith("`f5` 4.00 ms (6 x), idle 1.10 ms.") and "f6" not in said
    assert lines.index(said) > max(i for i, line in enumerate(lines) if line.startswith("|"))
