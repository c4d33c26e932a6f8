"""Adam's second moments of a training run, by parameter name: the curvature that merging weighs by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from foveate.convert.tensor_folder import TensorFolder, write_tensors
from foveate.errors import BadArgument
from foveate.models.parameter_order import parameter_shapes

OPTIMIZER = "optimizer.pt"
FILE = "second_moments.safetensors"
ROWS, COLUMNS = ".row_sums", ".column_sums"
LEFT, RIGHT = ".left", ".right"
_ENDS = (ROWS, COLUMNS, LEFT, RIGHT)
_SMALL = 512  # dims up to which all singular values are computed


class SecondMoments(Mapping[str, Tensor]):
    """Second moments [the parameter's shape] by parameter name, read one at a time; what was never trained is absent.

    Args:
        source: `optimizer.pt` (the state dict of torch.optim.Adam or AdamW), a safetensors file of second moments by
            parameter name, or a folder with one of them, the safetensors file (`second_moments.safetensors`) first.
            From an optimizer they are corrected for the steps they began at zero, as Adam itself does, so that runs of
            different length can be compared; those in a safetensors file are taken as they are.
        model: the folder of the checkpoint, whose config.json gives the order of parameters where the optimizer's file
            names none; the source itself if that is a folder, else the folder it lies in.
        argument: what errors call it.

    Raises:
        BadArgument: nothing of that kind there, or parameters that the state cannot be told to belong to.
    """

    def __init__(self, source: str | Path, model: str | Path | None = None, argument: str = "second_moments") -> None:
        path, self._argument = Path(source), argument
        if path.is_dir():
            found = [path / name for name in (FILE, OPTIMIZER) if (path / name).is_file()]
            if not found:
                raise BadArgument(argument, str(path), f"the folder has neither {FILE} nor {OPTIMIZER}")
            path = found[0]
        if not path.is_file():
            raise BadArgument(argument, str(path), f"no such file; give {OPTIMIZER} or {FILE}")
        self._path = path
        self._file = TensorFolder(path, argument) if path.suffix == ".safetensors" else None
        self._states = {} if self._file is not None else self._optimizer(Path(model) if model else path.parent)

    def _optimizer(self, folder: Path) -> dict[str, tuple[Tensor, float]]:
        """By name the raw moment and what it is divided by."""
        try:
            held = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
            groups, states = held["param_groups"], held["state"]
        except Exception as error:  # a broken file fails in many ways
            raise BadArgument(
                self._argument, str(self._path), f"not the state of a torch optimizer ({error})"
            ) from error
        names = self._names(groups, states, folder)
        out = {}
        for group in groups:
            for index in group["params"]:
                state = states.get(index)
                if not state:
                    continue
                if "exp_avg_sq" not in state or "step" not in state:
                    raise BadArgument(self._argument, str(self._path), "no second moments (exp_avg_sq): not from Adam")
                out[names[index]] = (state["exp_avg_sq"], 1 - group["betas"][1] ** float(state["step"]))
        return out

    def _names(self, groups: list[Any], states: dict[Any, Any], folder: Path) -> dict[Any, str]:
        if all("param_names" in group for group in groups):
            return {i: n for group in groups for i, n in zip(group["params"], group["param_names"], strict=True)}
        shapes = parameter_shapes(folder)
        orders = [list(shapes)] if len(groups) == 1 else []
        if len(groups) == 2:
            # transformers' Trainer: what decays first, which is all but norms and biases.
            orders = [[n for n, s in shapes.items() if (len(s) > 1) is wide] for wide in (True, False)]
        fits = [len(group["params"]) == len(order) for group, order in zip(groups, orders, strict=False)]
        names = {
            index: name
            for group, order in zip(groups, orders, strict=False)
            for index, name in zip(group["params"], order, strict=False)
        }
        if (
            not orders
            or not all(fits)
            or any(
                tuple(state["exp_avg_sq"].shape) != shapes[names[index]]
                for index, state in states.items()
                if "exp_avg_sq" in state
            )
        ):
            raise BadArgument(
                self._argument,
                str(self._path),
                "its parameters have no names and are not those of the model in the order of transformers' Trainer; "
                "train with torch.optim.AdamW(model.named_parameters()), or give a safetensors file by name",
            )
        return names

    def __getitem__(self, name: str) -> Tensor:
        if self._file is None:
            moment, correction = self._states[name]
            return moment / correction
        if name + ROWS in self._file:
            return expanded(self._file[name + ROWS], self._file[name + COLUMNS])
        if name + LEFT in self._file:
            return multiplied(self._file[name + LEFT], self._file[name + RIGHT])
        return self._file[name]

    def __iter__(self) -> Iterator[str]:
        if self._file is None:
            yield from self._states
            return
        for name in self._file:
            if not name.endswith((COLUMNS, RIGHT)):
                yield name.removesuffix(ROWS).removesuffix(LEFT)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def factored(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums [m] and column sums [n] of a second moment [m, n], which is all that is kept of it (Adafactor,
    arXiv 1804.04235, section 3)."""
    if moment.ndim != 2:
        raise BadArgument("moment", tuple(moment.shape), "give a matrix [m, n]")
    return moment.double().sum(1), moment.double().sum(0)


def expanded(rows: Tensor, columns: Tensor) -> Tensor:
    """The second moment [m, n] of rank one with these row and column sums, float64."""
    total = rows.double().sum()
    return torch.outer(rows.double(), columns.double()) / torch.where(total == 0, 1.0, total)


def truncated(moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [m, r] and [r, n] of the nearest matrix of a rank (arXiv 2509.11167, compression of moments), float32.

    Wide matrices have their singular vectors iterated for, always from the same start.
    """
    if moment.ndim != 2:
        raise BadArgument("moment", tuple(moment.shape), "give a matrix [m, n]")
    wide, rank = moment.double(), min(rank, *moment.shape)
    if min(moment.shape) <= _SMALL:
        left, sizes, right = torch.linalg.svd(wide, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, sizes, right = torch.svd_lowrank(wide, q=min(rank + 16, *moment.shape), niter=8)
        right = right.T
    root = sizes[:rank].sqrt()
    return (left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float()


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """The second moment [m, n] of these factors, nothing of it below 0, float64."""
    return (left.double() @ right.double()).clamp_min(0)


def save_second_moments(
    moments: Mapping[str, Tensor],
    path: str | Path,
    form: Literal["sums", "svd", "whole"] = "sums",
    rank: int = 8,
) -> None:
    """Write second moments as a safetensors file, one at a time.

    Args:
        form: what is kept of matrices: "sums" of their rows and columns, which give a matrix of rank one; "svd", the
            factors of the nearest matrix of rank `rank`, which is cut off below 0 when it is read; "whole", all
            numbers, in float32. Other tensors are kept whole.
    """
    if form not in ("sums", "svd", "whole"):
        raise BadArgument("form", form, 'give "sums", "svd" or "whole"')
    if rank < 1:
        raise BadArgument("rank", rank, "give at least 1")
    layout: list[tuple[str, str, tuple[int, ...]]] = []
    for name, moment in moments.items():
        shape = tuple(moment.shape)
        if form == "whole" or len(shape) != 2:
            layout.append((name, "F32", shape))
        elif form == "sums":
            layout += [(name + ROWS, "F64", shape[:1]), (name + COLUMNS, "F64", shape[1:])]
        else:
            r = min(rank, *shape)
            layout += [(name + LEFT, "F32", (shape[0], r)), (name + RIGHT, "F32", (r, shape[1]))]

    held: dict[str, tuple[Tensor, Tensor]] = {}

    def tensor(name: str) -> Tensor:
        if not name.endswith(_ENDS):
            return moments[name].float()
        first = name.endswith((ROWS, LEFT))
        whole = name
        for end in _ENDS:
            whole = whole.removesuffix(end)
        if whole not in held:  # the other factor is asked for next, or nearly
            held[whole] = factored(moments[whole]) if form == "sums" else truncated(moments[whole], rank)
        return held[whole][0 if first else 1]

    write_tensors(Path(path), layout, tensor)
