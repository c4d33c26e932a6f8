"""OTA and FFG: what is kept, how it is weighed, where second moments come from, and folders whole or not at all."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.closeness import assert_close
from tests.convert.skills import Recall, trained, untrained
from torch import Tensor
from transformers import AutoModelForCausalLM

from foveate.convert import merging
from foveate.convert.merging import ffg_mask, linear, merge_checkpoints, operator_norm, ota, ota_merge, saliency, ties
from foveate.convert.second_moments import FILE, SecondMoments, expanded, factored, save_second_moments
from foveate.convert.tensor_folder import TensorFolder, write_tensors
from foveate.convert.threshold import solve
from foveate.errors import BadArgument, FoveateError, Refused

State = dict[str, Tensor]


def state(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (6, 5), "a.weight": (7, 3, 2), "norm": (4,), "zero": ()}
    return {n: (scale * torch.randn(shape, generator=generator)).to(dtype) for n, shape in shapes.items()}


def tuned(base: State, seed: int) -> State:
    return {n: (t + state(seed, 0.1)[n]).to(t.dtype) for n, t in base.items()}


def moments(seed: int) -> State:
    return {n: t.double().square() * 1e-9 for n, t in state(seed).items()}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_alike_moments_without_a_mask_give_the_mean_of_the_changes(seed):
    base, v = state(seed), moments(seed)
    models = [tuned(base, seed + 1), tuned(base, seed + 2), tuned(base, seed + 3)]
    merged = ota_merge(base, models, [v, v, v], density=1)
    for name, value in merged.items():
        assert_close(value, base[name] + sum(m[name] - base[name] for m in models) / 3, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_model_unmasked_is_that_model_to_the_bit(dtype, seed):
    base = state(seed, dtype=dtype)
    model = tuned(base, seed + 1)
    merged = ota_merge(base, [model], [moments(seed)], density=1)
    assert all(torch.equal(merged[name], model[name]) and merged[name].dtype is dtype for name in base)


def test_nothing_kept_is_the_base_and_no_nan(seed):
    """The bare quotient is 0 / 0 where every model is masked."""
    base = state(seed)
    models = [tuned(base, seed + 1), tuned(base, seed + 2)]
    merged = ota_merge(base, models, [moments(1), moments(2)], density=0)
    assert all(torch.equal(merged[name], base[name]) for name in base)
    nothing = [torch.zeros(6, dtype=torch.bool)] * 2
    assert torch.equal(ota([torch.randn(6)] * 2, [torch.rand(6)] * 2, nothing), torch.zeros(6, dtype=torch.float64))


def test_what_one_model_masks_the_others_decide_and_what_all_mask_stays(seed):
    """In the released code's linear mode, masks alone change nothing."""
    base = state(seed)
    models, v = [tuned(base, seed + 1), tuned(base, seed + 2)], [moments(1), moments(2)]
    merged = ota_merge(base, models, v, density=0.3)
    kept = []
    for model, moment in zip(models, v, strict=True):
        s = saliency(flat(model) - flat(base), flat(moment))
        kept.append(s >= s.sort(descending=True).values[round(0.3 * len(s)) - 1])
    out, b = flat(merged), flat(base)
    neither, both = ~(kept[0] | kept[1]), kept[0] & kept[1]
    assert neither.any() and both.any() and torch.equal(out[neither], b[neither])
    for model, mine, other in ((models[0], kept[0], kept[1]), (models[1], kept[1], kept[0])):
        alone = mine & ~other
        assert torch.equal(out[alone], flat(model)[alone])
    weight = [flat(moment)[both].sqrt() for moment in v]
    mean = sum(w * (flat(m) - b)[both] for w, m in zip(weight, models, strict=True)) / sum(weight)
    assert_close(out[both] - b[both], mean, 1e-5)


def test_the_slow_formula(seed):
    base, models, v = (
        state(seed),
        [tuned(state(seed), seed + 1), tuned(state(seed), seed + 2)],
        [moments(1), moments(2)],
    )
    for power in (0.0, 0.5, 1.0):
        merged = ota_merge(base, models, v, density=1, power=power)
        for name in base:
            w = [(m[name].double() ** power + 1e-26).flatten().tolist() for m in v]
            d = [(m[name].double() - base[name].double()).flatten().tolist() for m in models]
            want = [(a * x + c * y) / (a + c) for a, c, x, y in zip(w[0], w[1], d[0], d[1], strict=True)]
            assert_close(merged[name].flatten(), base[name].flatten() + torch.tensor(want), 1e-6)


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_the_unit_of_all_moments_does_not_matter(density, seed):
    base, models, v = (
        state(seed),
        [tuned(state(seed), seed + 1), tuned(state(seed), seed + 2)],
        [moments(1), moments(2)],
    )
    want = ota_merge(base, models, v, density)
    got = ota_merge(base, models, [{n: 4096 * t for n, t in m.items()} for m in v], density)
    assert all(torch.equal(got[name], want[name]) for name in base)
    one = ota_merge(base, models, [v[0], {n: 4096 * t for n, t in v[1].items()}], density)
    assert not all(torch.equal(one[name], want[name]) for name in base)


def test_moments_of_zero_count_alike(seed):
    base, models = state(seed), [tuned(state(seed), seed + 1), tuned(state(seed), seed + 2)]
    none = {n: torch.zeros_like(t) for n, t in base.items()}
    merged = ota_merge(base, models, [none, none], density=1)
    for name in base:
        assert_close(merged[name], (models[0][name] + models[1][name]) / 2, 1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.4, 0.77, 0.99, 1.0])
def test_exactly_the_density_is_kept_over_all_tensors_together(density, chunk, seed, monkeypatch):
    monkeypatch.setattr(merging, "_CHUNK", chunk)
    base, v = state(seed), moments(seed)
    model = tuned(base, seed + 1)
    merged = ota_merge(base, [model], [v], density)
    changed = flat(merged) != flat(base)
    assert int(changed.sum()) == round(density * len(changed))
    s = saliency(flat(model) - flat(base), flat(v))
    if 0 < density < 1:
        assert s[changed].min() >= s[~changed].max()
        threshold = float(s[changed].min())
        masks = {name: ffg_mask(model[name].double() - base[name].double(), v[name], threshold) for name in base}
        assert torch.equal(flat(masks).bool(), changed)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 1e-320, 1e-30, 1.0, 2.0, 3.5, 1e300]), max_size=9), min_size=1, max_size=4),
    st.floats(0, 1),
)
def test_ties_are_kept_in_order_up_to_the_density(lists, share):
    parts = [(str(i // 2), torch.tensor(numbers, dtype=torch.float64)) for i, numbers in enumerate(lists)]
    found = solve(lambda: iter(parts), share)
    masks: dict[str, Any] = {}
    got = torch.cat([masks.setdefault(name, found.of(name))(part) for name, part in parts])
    everything = torch.cat([part for _, part in parts])
    keep = round(share * len(everything))
    order = everything.sort(descending=True, stable=True).indices[:keep]
    want = torch.zeros(len(everything), dtype=torch.bool)
    want[order] = True
    assert torch.equal(got, want)


def test_moments_of_rank_one_are_kept_exactly_by_their_sums(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.rand(5, generator=generator).double(), torch.rand(8, generator=generator).double()
    v = torch.outer(rows, columns)
    assert_close(expanded(*factored(v)), v, 1e-14)
    other = torch.rand(5, 8, generator=generator).double()
    got = expanded(*factored(other))
    assert_close(got.sum(0), other.sum(0), 1e-14)
    assert_close(got.sum(1), other.sum(1), 1e-14)
    assert torch.linalg.matrix_rank(got) == 1
    assert torch.equal(expanded(*factored(torch.zeros(2, 3))), torch.zeros(2, 3).double())


def test_sums_of_moments_are_saved_small_and_read_back(seed, tmp_path):
    v = {"a": torch.outer(torch.rand(50), torch.rand(40)), "b": torch.rand(7), "c": torch.rand(2, 3, 4)}
    for form, limit in (("sums", 1e-6), ("svd", 1e-6), ("whole", 0)):
        save_second_moments(v, tmp_path / FILE, form, 1)
        read = SecondMoments(tmp_path)
        assert set(read) == set(v) and len(read) == 3
        for name in v:
            assert_close(read[name], v[name], limit)
        assert ((tmp_path / FILE).stat().st_size < 3000) == (form != "whole")


def test_truncated_moments_are_the_nearest_of_their_rank_and_never_negative(seed, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(40, 30, generator=generator).double().square()
    left, sizes, right = torch.linalg.svd(v)
    for rank in (1, 5, 30, 99):
        save_second_moments({"a": v}, tmp_path / FILE, "svd", rank)
        got = SecondMoments(tmp_path)["a"]
        r = min(rank, 30)
        assert_close(got, ((left[:, :r] * sizes[:r]) @ right[:r]).clamp_min(0), 1e-6)
        assert got.min() >= 0
        # Cutting below 0 brings what is positive nearer still; sums of rows and columns are further off.
        assert (got - v).norm() <= sizes[r:].norm() + 1e-5
        assert (got - v).norm() < (expanded(*factored(v)) - v).norm() or rank == 1
    big = torch.randn(600, 3, generator=generator).double().square() @ torch.rand(3, 550, generator=generator).double()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_second_moments({"a": big}, tmp_path / name / FILE, "svd", 3)
    assert_close(SecondMoments(tmp_path / "one")["a"], big, 1e-5)
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
    for form, rank in (("svd", 0), ("half", 1)):
        with pytest.raises(BadArgument):
            save_second_moments({"a": v}, tmp_path / FILE, form, rank)


def optimizer_file(folder: Path, optimizer: torch.optim.Optimizer, names: bool = True) -> None:
    saved = optimizer.state_dict()
    if not names:
        for group in saved["param_groups"]:
            group.pop("param_names", None)
    torch.save(saved, folder / "optimizer.pt")


@pytest.mark.parametrize("layout", ["named", "one group", "trainer"])
def test_an_optimizer_s_moments_get_their_names_and_are_corrected_for_the_first_steps(layout, tmp_path):
    model = untrained()
    model.save_pretrained(tmp_path)
    named = list(model.named_parameters())
    wide, narrow = [p for _, p in named if p.ndim > 1], [p for _, p in named if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        {"named": named, "one group": [p for _, p in named], "trainer": [{"params": wide}, {"params": narrow}]}[layout],
        betas=(0.9, 0.98),
    )
    gradients = {}
    for step in range(3):
        for name, parameter in named:
            parameter.grad = gradients[name] = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
        if step == 2:
            named[0][1].grad = None  # one step fewer than the others
        optimizer.step()
    optimizer_file(tmp_path, optimizer, names=layout == "named")
    read = SecondMoments(tmp_path)
    assert sorted(read) == sorted(name for name, _ in named)
    # The gradient was the same in all steps, so the corrected mean of its square is its square.
    for name, gradient in gradients.items():
        assert_close(read[name], gradient.square(), 1e-5)


def test_an_optimizer_of_another_model_or_kind_is_refused(tmp_path):
    model = untrained()
    model.save_pretrained(tmp_path)
    with pytest.raises(BadArgument, match=r"optimizer\.pt"):
        SecondMoments(tmp_path)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    backwards = torch.optim.AdamW(list(model.parameters())[::-1])
    backwards.step()
    optimizer_file(tmp_path, backwards, names=False)
    with pytest.raises(BadArgument, match="named_parameters"):
        SecondMoments(tmp_path)
    plain = torch.optim.SGD(model.named_parameters(), momentum=0.9)
    plain.step()
    optimizer_file(tmp_path, plain)
    with pytest.raises(BadArgument, match="exp_avg_sq"):
        SecondMoments(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"nothing")
    with pytest.raises(BadArgument, match="not the state"):
        SecondMoments(tmp_path)


def folder(path: Path, tensors: State, **beside: str) -> Path:
    """A checkpoint in two files with an index."""
    path.mkdir()
    names = sorted(tensors)
    files = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, held in files.items():
        save_file({name: tensors[name].contiguous() for name in held}, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, text in beside.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


@pytest.fixture
def checkpoints(tmp_path, seed) -> tuple[Path, list[Path], list[Path], State, list[State], list[State]]:
    base = state(seed, dtype=torch.bfloat16) | {"steps": torch.tensor([3, 4])}
    models = [tuned(state(seed, dtype=torch.bfloat16), seed + i) | {"steps": torch.tensor([9, 9])} for i in (1, 2)]
    v = [moments(seed + i) for i in (1, 2)]
    root = folder(tmp_path / "base", base, config__json="{}", tokenizer__json="tokens", trainer_state__json="{}")
    (root / "optimizer.pt").write_bytes(b"large")
    paths = [folder(tmp_path / f"model{i}", model) for i, model in enumerate(models)]
    for path, moment in zip(paths, v, strict=True):
        save_file({n: t.float() for n, t in moment.items()}, path / "second_moments.safetensors")
    v = [{n: t.float() for n, t in moment.items()} for moment in v]
    return root, paths, paths, base, models, v


def test_folders_merge_as_state_dicts_do(checkpoints, tmp_path):
    root, paths, sources, base, models, v = checkpoints
    done = merge_checkpoints(root, paths, sources, tmp_path / "out", density=0.4)
    want = ota_merge(base, models, v, density=0.4)
    got: State = {}
    for file in ("model-1.safetensors", "model-2.safetensors"):
        assert set(load_file(done.folder / file)) == set(load_file(root / file))
        got |= load_file(done.folder / file)
    assert set(got) == set(base)
    for name, value in got.items():
        assert torch.equal(value, want[name]) and value.dtype is base[name].dtype
    assert torch.equal(got["steps"], base["steps"])
    assert {path.name for path in done.folder.iterdir()} == {
        "config.json",
        "merge.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    record = json.loads((done.folder / "merge.json").read_text())
    assert record["thresholds"] == done.thresholds and record["kept"] == done.kept
    sizes = {name: value.numel() for name, value in base.items() if name != "steps"}
    for index in range(2):
        total = sum(done.kept[name][index] * size for name, size in sizes.items())
        assert round(total) == round(0.4 * sum(sizes.values()))
    json.loads(
        (merge_checkpoints(root, paths, sources, tmp_path / "none", 0.0).folder / "merge.json").read_text(),
        parse_constant=lambda text: pytest.fail(text),
    )


@pytest.mark.parametrize("where", ["second moments", "shape", "not finite", "disk"])
def test_nothing_is_left_when_it_fails(where, checkpoints, tmp_path, monkeypatch):
    root, paths, sources, base, models, v = checkpoints
    density = 1.0  # nothing is read before it is written
    if where == "second moments":
        del v[1]["zero"]
        save_file(v[1], paths[1] / FILE)
    elif where == "shape":
        models[0]["zero"] = torch.zeros(2, dtype=torch.bfloat16)
        save_file(
            {n: models[0][n] for n in sorted(models[0])[2:] if n != "steps"} | {"steps": base["steps"]},
            paths[0] / "model-2.safetensors",
        )
    elif where == "not finite":
        v[0]["zero"] = torch.tensor(float("nan"))
        save_file(v[0], paths[0] / FILE)
    else:
        real, calls = merging.write_tensors, []

        def full(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            real(*args)

        monkeypatch.setattr(merging, "write_tensors", full)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(FoveateError, match="space" if where == "disk" else "zero"):
        merge_checkpoints(root, paths, sources, tmp_path / "out", density)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_only_a_few_tensors_are_held_at_a_time(seed, tmp_path):
    names = [f"layer{i}" for i in range(12)]
    alive, most = weakref.WeakSet(), 0

    class Spy(Mapping[str, Tensor]):
        def __init__(self, shift: float) -> None:
            self.shift = shift

        def __getitem__(self, name: str) -> Tensor:
            nonlocal most
            made = torch.full((3, 3), float(names.index(name)) + self.shift)
            alive.add(made)
            most = max(most, len(alive))
            return made

        def __iter__(self) -> Iterator[str]:
            return iter(names)

        def __len__(self) -> int:
            return len(names)

    plan = merging._Plan(Spy(0), [Spy(1), Spy(2)], [Spy(1), Spy(1)], 0.5, 0.5, 1e-26)
    plan.solve()
    layout = [(name, "F32", (3, 3)) for name in names]
    write_tensors(tmp_path / "model.safetensors", layout, plan.merge)
    assert most <= 10  # of 60: base, models and moments of one tensor, and of the one before
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(names)


def test_written_files_are_what_safetensors_reads(seed, tmp_path):
    tensors = {
        "a": torch.randn(3, 5, dtype=torch.float64),
        "bf16": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False, True]),
        "one": torch.tensor(3.0),
        "turned": torch.randn(4, 6).half().T,
    }
    names = {
        torch.float64: "F64",
        torch.bfloat16: "BF16",
        torch.float32: "F32",
        torch.bool: "BOOL",
        torch.float16: "F16",
    }
    path = tmp_path / "x.safetensors"
    write_tensors(path, [(n, names[t.dtype], tuple(t.shape)) for n, t in tensors.items()], tensors.__getitem__)
    read = load_file(path)
    assert set(read) == set(tensors) and all(torch.equal(read[n], t) for n, t in tensors.items())
    folder = TensorFolder(path)
    assert folder.shape("a") == (3, 5) and len(folder) == 6 and folder.nbytes == path.stat().st_size
    with pytest.raises(BadArgument, match="layout"):
        write_tensors(path, [("a", "F32", (3, 5))], tensors.__getitem__)


def test_what_cannot_be_merged_is_refused(checkpoints, tmp_path):
    root, paths, sources, base, models, v = checkpoints
    out = tmp_path / "out"
    for call, word in (
        (lambda: ota_merge(base, [], []), "models"),
        (lambda: ota_merge(base, models, v[:1]), "second_moments"),
        (lambda: ota_merge(base, models, v, density=1.5), "density"),
        (lambda: ota_merge(base, models, v, power=-1), "power"),
        (lambda: ota_merge(base, [models[0] | {"new": torch.ones(1)}], v[:1]), "new"),
        (lambda: ota_merge(base, models[:1], [v[0] | {"norm": -v[0]["norm"]}]), "negative"),
        (lambda: ota_merge(base, models[:1], [v[0] | {"norm": torch.ones(2)}]), "norm"),
        (lambda: ota_merge(base, models[:1], [{n: t for n, t in v[0].items() if n != "norm"}]), "lack"),
        (lambda: merge_checkpoints(root, paths, sources[:1], out), "second_moments"),
        (lambda: merge_checkpoints(tmp_path, paths, sources, out), "base"),
        (lambda: merge_checkpoints(root, paths, sources, root), "out"),
    ):
        with pytest.raises(BadArgument, match=word):
            call()
    (root / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(Refused, match="quantised"):
        merge_checkpoints(root, paths, sources, out)
    (paths[0] / "model-2.safetensors").unlink()
    with pytest.raises(BadArgument, match="missing"):
        TensorFolder(paths[0])
    assert not out.exists()


def test_plain_baselines_need_no_moments(seed):
    """Magnitudes trim, the mean is over all models; at density 1 that is the average of the weights."""
    base, models = state(seed), [tuned(state(seed), seed + 1), tuned(state(seed), seed + 2)]
    merged = ota_merge(base, models, None, 1.0, choice="magnitude", combine="linear")
    for name in base:
        assert_close(merged[name], (models[0][name] + models[1][name]) / 2, 1e-6)
    merged = ota_merge(base, models, None, 0.5, choice="magnitude", combine="linear")
    deltas = [flat(model) - flat(base) for model in models]
    masks = [d.abs() >= d.abs().sort(descending=True).values[round(0.5 * len(d)) - 1] for d in deltas]
    assert_close(flat(merged) - flat(base), sum(d * m for d, m in zip(deltas, masks, strict=True)) / 2, 1e-5)
    # With equal moments saliency is magnitude.
    same = [{name: torch.ones_like(value) for name, value in base.items()}] * 2
    assert torch.equal(flat(ota_merge(base, models, same, 0.5, combine="linear")), flat(merged))
    refused: list[dict[str, Any]] = [{}, {"choice": "magnitude"}, {"combine": "ties"}]
    for how in refused:
        with pytest.raises(BadArgument, match="second_moments"):
            ota_merge(base, models, None, 0.5, **how)
    with pytest.raises(BadArgument, match="combine"):
        ota_merge(base, models, None, 0.5, choice="magnitude", combine="mean")  # type: ignore[arg-type]


def test_ties_elects_a_sign_and_means_what_agrees(seed):
    deltas = [torch.tensor([3.0, -1.0, 2.0, 5.0, 0.0, 1.0]), torch.tensor([1.0, -2.0, -3.0, 4.0, 0.0, -1.0]),
              torch.tensor([-2.0, 4.0, -1.0, 9.0, 0.0, 0.0])]  # fmt: skip
    masks = [torch.ones(6, dtype=torch.bool)] * 2 + [torch.tensor([1, 1, 1, 0, 1, 1]).bool()]
    # Sums 2, 1, -2, 9 (of two), 0, 0: where changes cancel, nothing changes.
    assert ties(deltas, masks).tolist() == [2.0, 4.0, -2.0, 4.5, 0.0, 0.0]
    assert linear(deltas, masks)[:4].tolist() == pytest.approx([2 / 3, 1 / 3, -2 / 3, 3.0])
    base, models, v = state(seed), [tuned(state(seed), seed + i) for i in (1, 2, 3)], [moments(i) for i in (1, 2, 3)]
    got = flat(ota_merge(base, models, v, 0.4, combine="ties")) - flat(base)
    changes, kept = [], []
    for model, moment in zip(models, v, strict=True):
        changes.append(flat(model) - flat(base))
        s = saliency(changes[-1], flat(moment))
        kept.append(s >= s.sort(descending=True).values[round(0.4 * len(s)) - 1])
    assert_close(got, ties(changes, kept), 1e-4)


def test_one_model_alone_is_itself_by_every_combination(seed):
    base = state(seed)
    model = tuned(base, seed + 1)
    for combine in ("ota", "linear", "ties"):
        merged = ota_merge(base, [model], [moments(seed)], 1.0, combine=combine, rescale=True)
        assert all(torch.equal(merged[name], model[name]) for name in base), combine


def test_rescaled_changes_have_the_operator_norm_that_they_had(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (9, 6), "embed_tokens.weight": (20, 4), "norm.weight": (30,), "experts": (3, 5, 7)}
    base = {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
    model = {name: x + torch.randn(x.shape, generator=generator) for name, x in base.items()}
    v = {name: torch.rand(x.shape, generator=generator) + 0.5 for name, x in base.items()}
    plain = ota_merge(base, [model], [v], 0.5)
    scaled = ota_merge(base, [model], [v], 0.5, rescale=True)
    for name, x in base.items():
        before, left, after = (y[name] - x for y in (model, plain, scaled))
        assert_close(operator_norm(after, name), operator_norm(before, name), 1e-9)
        # Of a vector the largest number is the norm, and it is kept.
        less = operator_norm(left, name) < 0.99 * operator_norm(before, name)
        assert less.any() or name in ("norm.weight", "embed_tokens.weight")
        assert torch.equal(after != 0, left != 0)
    each = base["a.weight"], base["experts"], base["norm.weight"]
    assert_close(operator_norm(each[0]), torch.linalg.svdvals(each[0])[0], 1e-12)
    assert_close(operator_norm(each[1]), torch.linalg.svdvals(each[1])[:, 0], 1e-12)
    assert operator_norm(each[2]) == each[2].abs().max()
    assert (
        operator_norm(base["embed_tokens.weight"], "embed_tokens.weight")
        == base["embed_tokens.weight"].norm(dim=1).max()
    )
    wide = torch.randn(2, 300, 280, generator=generator) @ torch.diag(0.98 ** torch.arange(280.0))
    assert_close(operator_norm(wide), torch.linalg.svdvals(wide.double())[:, 0], 1e-3)


def test_folders_merge_by_every_combination(checkpoints, tmp_path):
    root, paths, sources, base, models, v = checkpoints
    del base["steps"]
    for number, how in enumerate(
        ({"combine": "ties"}, {"choice": "magnitude", "combine": "linear"}, {"rescale": True})
    ):
        needed = how.get("choice") != "magnitude"
        out = tmp_path / f"out{number}"
        merge_checkpoints(root, paths, sources if needed else None, out, density=0.4, **how)
        got = {n: t for file in sorted(out.glob("*.safetensors")) for n, t in load_file(file).items()}
        want = ota_merge(base, models_without(models), v if needed else None, 0.4, **how)
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert how.items() <= json.loads((out / "merge.json").read_text()).items()


def models_without(models: list[State]) -> list[State]:
    return [{name: x for name, x in model.items() if name != "steps"} for model in models]


def test_a_tensor_that_was_not_trained_needs_no_moments(seed):
    base, v = state(seed), moments(seed)
    model = tuned(base, seed + 1) | {"norm": base["norm"].clone()}
    del v["norm"]
    other = tuned(base, seed + 2)
    merged = ota_merge(base, [model, other], [v, moments(2)], density=1)
    # A model that left it alone has no say in it.
    assert torch.equal(merged["norm"], other["norm"])


def test_two_trained_skills_are_merged_from_their_folders(tmp_path):
    skills = [Recall(3), Recall(5)]
    base, _ = trained(untrained(), skills, 40, 3e-3, 0)
    base.save_pretrained(tmp_path / "base")
    paths, models = [], []
    for index, skill in enumerate(skills):
        model, optimizer = trained(base, [skill], 20, 1e-3, 1)
        paths.append(tmp_path / f"skill{index}")
        model.save_pretrained(paths[-1])
        optimizer_file(paths[-1], optimizer, names=index == 0)
        if index:  # a file beside the weights that holds the same names
            save_second_moments(SecondMoments(paths[-1]), paths[-1] / FILE, "whole")
        models.append(model)

    def loss(model: Any) -> float:
        return sum(skill.loss(model) for skill in skills) / 2

    def merged(density: float, power: float, **how: Any) -> float:
        out = tmp_path / f"out-{density}-{power}-{len(how)}-{how.get('combine')}"
        merge_checkpoints(tmp_path / "base", paths, paths, out, density, power, **how)
        return loss(AutoModelForCausalLM.from_pretrained(out))

    losses = {(density, power): merged(density, power) for density in (0.1, 0.4, 1.0) for power in (0.0, 0.5)}
    assert losses[0.1, 0.5] < 0.7 * min(loss(model) for model in (base, *models))
    for density in (0.1, 0.4, 1.0):
        assert losses[density, 0.5] < 0.9 * losses[density, 0.0]
    # What is weighed by curvature is better than the baselines in weight space.
    for combine in ("linear", "ties"):
        assert losses[0.4, 0.5] < merged(0.4, 0.0, choice="magnitude", combine=combine)
