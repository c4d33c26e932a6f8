"""Layers that learn, each for itself, to return what other layers return of the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveate.convert.base import Calibration
from foveate.models.converted import decoder_layers

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "muon": lambda weights, rate: torch.optim.Muon(weights, lr=rate, weight_decay=0.0),
    "adamw": lambda weights, rate: torch.optim.AdamW(weights, lr=rate, weight_decay=0.0),
}


def align(
    model: Any, calibration: Calibration, teachers: Mapping[int, nn.Module], passes: int, rate: float, optimizer: str
) -> dict[str, list[float]]:
    """Train attention layers to return what their teachers return, all at once and each on what its teacher reads.

    While it lasts the teachers stand in the model, so that every layer sees inputs that no other layer has spoilt; a
    batch is one step of every layer, and nothing of it is kept.

    Args:
        teachers: by layer, the module to be imitated by the one that is in the model now.
        passes: over the calibration text.
        optimizer: of `OPTIMIZERS`; matrices alone are trained.

    Returns:
        The relative RMS error of each layer's output over the first and over the last pass: "first", "last".
    """
    layers = decoder_layers(model)
    students: dict[int, Any] = {index: layers[index].self_attn for index in teachers}
    steps = {
        index: OPTIMIZERS[optimizer]([p for p in student.parameters() if p.ndim == 2], rate)
        for index, student in students.items()
    }
    sums = {index: torch.zeros(2, dtype=torch.float64) for index in teachers}

    def hook(index: int) -> Callable[..., None]:
        def learn(module: nn.Module, args: Any, given: dict[str, Any], out: Any) -> None:
            target: Tensor = out[0].detach()
            with torch.enable_grad():
                error = (students[index](**given)[0] - target).float().square().sum()
                size = target.float().square().sum()
                steps[index].zero_grad()
                (error / size).backward()
                steps[index].step()
            sums[index] += torch.tensor([float(error), float(size)], dtype=torch.float64)

        return learn

    handles = []
    history: list[list[float]] = []
    try:
        for index, teacher in teachers.items():
            layers[index].self_attn = teacher
            handles.append(teacher.register_forward_hook(hook(index), with_kwargs=True))
        with torch.no_grad():
            for done in range(passes):
                calibration.watch(f"aligning layers, pass {done + 1} of {passes}")
                for held in sums.values():
                    held.zero_()
                for batch in calibration.batches():
                    model(batch.to(model.device), use_cache=False)
                history.append([float((error / size).sqrt()) for error, size in sums.values()])
    finally:
        for index, student in students.items():
            layers[index].self_attn = student
            for parameter in student.parameters():
                parameter.grad = None
        for handle in handles:
            handle.remove()
    return {"first": history[0], "last": history[-1]}
