"""Second moments of what modules read or return, collected over text in float64, token by token never kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import BadArgument


@dataclass
class Moments:
    """Sums over `count` tokens x [d], float64.

    Whatever is linear in x follows from them: of y = W x + b the second moment is W S W' + (W m) b' + b (W m)' + b b'.

    Args:
        second: mean of x x', [d, d].
        mean: mean of x, [d].
    """

    second: Tensor
    mean: Tensor
    count: int

    def of(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The second moment [n, n] of W x + b, with weight [n, d] and bias [n]."""
        weight = weight.to(self.second)
        out = weight @ self.second @ weight.T
        if bias is not None:
            bias = bias.to(self.second)
            cross = torch.outer(weight @ self.mean, bias)
            out = out + cross + cross.T + torch.outer(bias, bias)
        return out


@torch.no_grad()
def collect(
    model: Any,
    modules: Mapping[Any, nn.Module] | Sequence[nn.Module],
    tokens: Iterable[Tensor],
    *,
    side: str = "input",
    watch: Callable[[int], None] = lambda done: None,
) -> dict[Any, Moments]:
    """Moments of what each module reads ("input") or returns ("output") while the model reads the batches.

    Args:
        modules: by any key; a sequence goes by its indices. Only a module's first tensor is looked at.
        tokens: batches [B, N] of token ids without padding.
        watch: told after each batch how many are done.

    Raises:
        BadArgument: no batch, or a side that is neither.
    """
    if side not in ("input", "output"):
        raise BadArgument("side", side, 'give "input" or "output"')
    named = dict(modules) if isinstance(modules, Mapping) else dict(enumerate(modules))
    sums: dict[Any, list[Any]] = {}

    def add(key: Any, x: Tensor) -> None:
        # Products of bf16 numbers are exact in float32, their sums over a batch are not: hence float64.
        flat = x.detach().reshape(-1, x.shape[-1]).double()
        held = sums.setdefault(key, [torch.zeros(0), torch.zeros(0), 0])
        second, mean = flat.T @ flat, flat.sum(0)
        held[0], held[1] = (second, mean) if held[2] == 0 else (held[0] + second, held[1] + mean)
        held[2] += flat.shape[0]

    def before(key: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            add(key, args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor)))

        return hook

    def after(key: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            add(key, out[0] if isinstance(out, tuple) else out)

        return hook

    handles = [
        module.register_forward_pre_hook(before(key), with_kwargs=True)
        if side == "input"
        else module.register_forward_hook(after(key))
        for key, module in named.items()
    ]
    was_training = model.training
    model.eval()
    done = 0
    try:
        for batch in tokens:
            model(batch.to(model.device), use_cache=False)
            done += 1
            watch(done)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if done == 0:
        raise BadArgument("tokens", "no batch", "give at least one batch of token ids [B, N]")
    return {key: Moments(second / count, mean / count, count) for key, (second, mean, count) in sums.items()}
