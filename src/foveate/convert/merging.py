"""OTA and FFG: merge fine-tuned checkpoints of one base, weighed by the second moments of their training; and the
merges in weight space that they are compared with."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from foveate.convert.saving import check_free, staged
from foveate.convert.second_moments import SecondMoments
from foveate.convert.tensor_folder import TensorFolder, write_tensors
from foveate.convert.threshold import Threshold, solve
from foveate.errors import BadArgument, Refused

DENSITY = 0.4
"""The share of each model's changes that is kept: about that of the paper's figures."""

EPSILON = 1e-26
RECORD = "merge.json"
_CHUNK = 1 << 17  # numbers worked on at a time in float64: few enough to stay in a core's cache, twice as fast
_SMALL = 256  # dims up to which singular values are computed, not iterated for
_COMBINATIONS = ("ota", "linear", "ties")
_BESIDE = {".json", ".txt", ".model", ".jinja", ".py"}
_RUN = {"trainer_state.json", "ladder.json", RECORD}

Tensors = Mapping[str, Tensor]
Choice = Literal["ffg", "magnitude"]
Combination = Literal["ota", "linear", "ties"]


@dataclass(frozen=True)
class Merged:
    """A folder of merged weights, and what went into them.

    Args:
        thresholds: by model the saliency from which on a change was kept; 0 where all are, infinite where none is.
        kept: by tensor the share of each model's changes that was kept.
    """

    folder: Path
    thresholds: list[float]
    kept: dict[str, list[float]]


def saliency(delta: Tensor, moment: Tensor) -> Tensor:
    """What it costs to undo a change under a diagonal curvature: v * delta², float64 (arXiv 2509.11167, FFG)."""
    return moment.double() * delta.double().square()


def ffg_mask(delta: Tensor, moment: Tensor, threshold: float) -> Tensor:
    """Which changes are kept: those whose saliency is at least the threshold."""
    return saliency(delta, moment) >= threshold


def ota(
    deltas: Sequence[Tensor],
    moments: Sequence[Tensor],
    masks: Sequence[Tensor] | None = None,
    power: float = 0.5,
    epsilon: float = EPSILON,
) -> Tensor:
    """The mean of the models' changes, each weighed by v^power + epsilon where its mask keeps it; float64.

    0 where no model's mask keeps anything: there the base stays, while the bare quotient would be 0 / 0.
    """
    top, bottom = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for index, (delta, moment) in enumerate(zip(deltas, moments, strict=True)):
        weight = moment.double() ** power + epsilon
        if masks is not None:
            weight = weight * masks[index]
        top, bottom = top + weight * delta.double(), bottom + weight
    return torch.where(bottom > 0, top / bottom.where(bottom > 0, 1.0), 0.0)


def linear(deltas: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """The mean over all models of the changes that their masks keep; float64."""
    return sum((d.double() * m for d, m in zip(deltas, masks, strict=True)), torch.zeros(())) / len(deltas)


def ties(deltas: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """TIES (arXiv 2306.01708, section 4): of what the masks keep, the mean of the changes whose sign is that of their
    sum; float64, 0 where there are none."""
    kept = torch.stack([d.double() * m for d, m in zip(deltas, masks, strict=True)])
    agree = kept.sign() == kept.sum(0).sign()
    agree &= kept != 0
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def operator_norm(delta: Tensor, name: str = "", steps: int = 100) -> Tensor:
    """How much a change can move what its tensor makes of a vector: of a matrix [.., m, n] its largest singular value
    [..], of an embedding its longest row, of a vector (a gain, a bias) its largest number; float64."""
    delta = delta.double()
    if delta.ndim < 2:
        return delta.abs().amax() if delta.numel() else delta.new_zeros(())
    if "embed" in name:
        return torch.linalg.vector_norm(delta, dim=-1).amax(-1)
    if min(delta.shape[-2:]) <= _SMALL:
        return torch.linalg.matrix_norm(delta, ord=2)
    # Power iteration from a vector that is the same at every call.
    x = torch.randn(delta.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.expand(*delta.shape[:-2], -1).unsqueeze(-1)
    for _ in range(steps):
        x = delta.mT @ (delta @ (x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(1e-300)))
    return torch.linalg.vector_norm(x, dim=-2).squeeze(-1).sqrt()


def ota_merge(
    base: Tensors,
    models: Sequence[Tensors],
    second_moments: Sequence[Tensors] | None,
    density: float = DENSITY,
    power: float = 0.5,
    epsilon: float = EPSILON,
    *,
    choice: Choice = "ffg",
    combine: Combination = "ota",
    rescale: bool = False,
) -> dict[str, Tensor]:
    """Merge state dicts: base + ota of the changes that FFG keeps, in the dtypes of the base.

    Each model keeps exactly round(density * n) of its n changes, those of the largest saliency over all tensors
    together; of equal ones, the first. Tensors that hold no floating-point numbers are the base's.

    Args:
        models: fine-tuned from the base, with tensors of the same names and shapes.
        second_moments: for each model, by name. One may be absent where the model has the base's very numbers. None
            where neither `choice` nor `combine` asks for them.
        density: 1: nothing is masked. 0: the base.
        choice: "ffg", changes of the largest saliency, or "magnitude", the largest changes.
        combine: "ota", or without moments "linear" or "ties". With "magnitude" these are the plain baselines: at
            density 1 "linear" is the average of the models.
        rescale: multiply what is left of each model's change of a tensor so that it has the operator norm that the
            whole change had (`operator_norm`).

    Raises:
        BadArgument: tensors or moments that are absent, of another shape, negative or not finite.
    """
    plan = _Plan(base, models, second_moments, density, power, epsilon, choice, combine, rescale)
    plan.solve()
    return {name: plan.merge(name) for name in plan.order}


def merge_checkpoints(
    base: str | Path,
    models: Sequence[str | Path],
    second_moments: Sequence[str | Path] | None,
    out: str | Path,
    density: float = DENSITY,
    power: float = 0.5,
    *,
    choice: Choice = "ffg",
    combine: Combination = "ota",
    rescale: bool = False,
    watch: Callable[[str], None] = lambda words: None,
) -> Merged:
    """Merge folders as `ota_merge` does state dicts, one tensor at a time; all of `out` is written or nothing.

    The new folder has the files, the dtypes, the configuration and the tokenizer of the base, and `merge.json`.

    Args:
        models: folders with safetensors files.
        second_moments: for each model, what `SecondMoments` reads: most often the folder of its last checkpoint; None
            where nothing asks for them.
        out: a new or empty folder.
        choice, combine, rescale: as in `ota_merge`.
        watch: told in words what is being done.

    Raises:
        Refused: quantised weights.
        BadArgument: as `ota_merge`, and folders that cannot be read or written.
        FoveateError: the disk is full.
    """
    out, base = Path(out), Path(base)
    check_free(out)
    for folder in (base, *map(Path, models)):
        _check_folder(folder)
    held, tuned = TensorFolder(base, "base"), [TensorFolder(model, "models") for model in models]
    _check_moments(models, second_moments)
    moments = None
    if second_moments is not None:
        moments = [SecondMoments(source, model) for source, model in zip(second_moments, models, strict=True)]
    plan = _Plan(held, tuned, moments, density, power, EPSILON, choice, combine, rescale)
    plan.solve(watch)
    with staged(out, held.nbytes) as partial:
        for path in sorted(base.iterdir()):
            if path.is_file() and path.suffix in _BESIDE and path.name not in _RUN:
                shutil.copyfile(path, partial / path.name)
        for file, layout in held.files().items():
            watch(f"writing {file}")
            write_tensors(partial / file, layout, plan.merge)
        record = {
            "base": str(base),
            "models": [str(model) for model in models],
            "density": density,
            "power": power,
            "choice": choice,
            "combine": combine,
            "rescale": rescale,
            "thresholds": [value if math.isfinite(value) else None for value in plan.thresholds],
            "kept": plan.kept,
        }
        (partial / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return Merged(out, plan.thresholds, plan.kept)


def _check_moments(models: Sequence[object], moments: Sequence[object] | None) -> None:
    if moments is not None and len(models) != len(moments):
        raise BadArgument("second_moments", len(moments), f"give one for each of the {len(models)} models")


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("quantization_config"):
        raise Refused(f"{folder} holds quantised weights, which cannot be averaged; merge before quantising")


class _Plan:
    """What is merged, the masks of each model, and how many changes they kept."""

    def __init__(
        self,
        base: Tensors,
        models: Sequence[Tensors],
        moments: Sequence[Tensors] | None,
        density: float,
        power: float,
        epsilon: float,
        choice: Choice = "ffg",
        combine: Combination = "ota",
        rescale: bool = False,
    ) -> None:
        if not models:
            raise BadArgument("models", [], "give at least one")
        for name, value, known in (("choice", choice, ("ffg", "magnitude")), ("combine", combine, _COMBINATIONS)):
            if value not in known:
                raise BadArgument(name, value, f"give one of {', '.join(known)}")
        if moments is None and (choice == "ffg" or combine == "ota"):
            raise BadArgument(
                "second_moments", None, 'give them, or choice="magnitude" and combine="linear" or "ties", without them'
            )
        _check_moments(models, moments)
        if not 0 <= density <= 1:
            raise BadArgument("density", density, "give a share between 0 and 1")
        if power < 0:
            raise BadArgument("power", power, "give 0 (models count alike) or more")
        self.base, self.models, self.moments = base, models, moments
        self.density, self.power, self.epsilon = density, power, epsilon
        self.choice, self.combine, self.rescale = choice, combine, rescale
        self.order = list(base)
        self.kept: dict[str, list[float]] = {}
        for index, model in enumerate(models):
            strange = sorted(set(model) ^ set(base))
            if strange:
                where = "the base" if strange[0] in model else f"model {index}"
                raise BadArgument("models", strange[0], f"{where} has no such tensor; give models tuned from the base")
        self.masks: list[Threshold | None] = [None] * len(models)

    @property
    def thresholds(self) -> list[float]:
        return [0.0 if mask is None else mask.value for mask in self.masks]

    def solve(self, watch: Callable[[str], None] = lambda words: None) -> None:
        """Find each model's threshold, so that its mask keeps what the density says."""
        if self.density == 1:
            return
        for index in range(len(self.models)):
            watch(f"weighing the changes of model {index + 1} of {len(self.models)}")
            self.masks[index] = solve(lambda index=index: self._saliencies(index), self.density)

    def _saliencies(self, index: int) -> Iterator[tuple[str, Tensor]]:
        for name in self.order:
            base = self.base[name]
            if base.is_floating_point():
                delta, moment = self._change(index, name, base)
                for part in _parts(base):
                    yield name, self._saliency(delta(part), moment(part))

    def _saliency(self, delta: Tensor, moment: Tensor) -> Tensor:
        return saliency(delta, moment) if self.choice == "ffg" else delta.square()

    def merge(self, name: str) -> Tensor:
        """The merged tensor, in the dtype and shape of the base's."""
        base = self.base[name]
        if not base.is_floating_point():
            return base
        changes = [self._change(index, name, base) for index in range(len(self.models))]
        masks = [
            self._mask(None if mask is None else mask.of(name), base, *change)
            for mask, change in zip(self.masks, changes, strict=True)
        ]
        kept = [int(mask.sum()) for mask in masks]
        scales = [self._scale(name, base, *change, mask) for change, mask in zip(changes, masks, strict=True)]
        out = torch.empty_like(base.reshape(-1))
        for part in _parts(base):
            deltas = [delta(part) * scale[part] for (delta, _), scale in zip(changes, scales, strict=True)]
            left = [mask[part] for mask in masks]
            if self.combine == "ota":
                moments = [moment(part) for _, moment in changes]
                merged = ota(deltas, moments, left, self.power, self.epsilon)
            else:
                merged = (linear if self.combine == "linear" else ties)(deltas, left)
            out[part] = (_exact(base.reshape(-1)[part]) + merged).to(base.dtype)
        self.kept[name] = [count / max(base.numel(), 1) for count in kept]
        return out.reshape(base.shape)

    def _mask(self, keep: Callable | None, base: Tensor, delta: Callable, moment: Callable) -> Tensor:
        """Which of a tensor's changes a model keeps, bool and flat."""
        mask = torch.ones(base.numel(), dtype=torch.bool)
        if keep is not None:
            for part in _parts(base):
                mask[part] = keep(self._saliency(delta(part), moment(part)))
        return mask

    def _scale(self, name: str, base: Tensor, delta: Callable, moment: Callable, mask: Tensor) -> Tensor:
        """What a model's changes are multiplied by, flat."""
        if not self.rescale or not mask.any() or mask.all():
            return torch.ones((), dtype=torch.float64).expand(base.numel())
        whole = delta(slice(None))
        before, after = (operator_norm(x.reshape(base.shape), name) for x in (whole, whole * mask))
        ratio = torch.where(after > 0, before / after.clamp_min(1e-300), 1.0)
        ratio = ratio.reshape(*ratio.shape, *[1] * (base.ndim - ratio.ndim))
        return ratio.expand(base.shape).reshape(-1) if ratio.numel() > 1 else ratio.reshape(()).expand(base.numel())

    def _change(self, index: int, name: str, base: Tensor) -> tuple[Callable, Callable]:
        """What gives parts of one model's change of a tensor, and of its second moments, flat and in float64."""
        tuned = self.models[index][name]
        if tuned.shape != base.shape:
            raise BadArgument(
                "models",
                f"{name} {tuple(tuned.shape)}",
                f"model {index} has another shape than the base, {tuple(base.shape)}; give models with its vocabulary",
            )
        moment = None if self.moments is None else self.moments[index].get(name)
        if moment is None and self.moments is None:
            moment = torch.ones((), dtype=torch.float64).expand(base.shape)
        if moment is None:
            if not torch.equal(tuned, base):
                raise BadArgument(
                    "second_moments", name, f"those of model {index} lack it, and the model has changed that tensor"
                )
            moment = torch.zeros((), dtype=torch.float64).expand(base.shape)
        if moment.shape != base.shape:
            raise BadArgument(
                "second_moments", f"{name} {tuple(moment.shape)}", f"model {index}'s tensor is {tuple(base.shape)}"
            )
        flat, other, second = base.reshape(-1), tuned.reshape(-1), moment.reshape(-1)

        def delta(part: slice) -> Tensor:
            out = _exact(other[part]) - _exact(flat[part])
            if not out.isfinite().all():
                raise BadArgument("models", name, f"model {index} or the base holds numbers that are not finite")
            return out

        def square(part: slice) -> Tensor:
            out = _exact(second[part])
            if not (out.isfinite().all() and (out >= 0).all()):
                raise BadArgument("second_moments", name, f"those of model {index} are negative or not finite")
            return out

        return delta, square


def _exact(numbers: Tensor) -> Tensor:
    """What is worked on: float64, wherever the tensor lies."""
    return numbers.detach().to("cpu", torch.float64)


def _parts(tensor: Tensor) -> Iterator[slice]:
    for start in range(0, tensor.numel(), _CHUNK):
        yield slice(start, start + _CHUNK)
