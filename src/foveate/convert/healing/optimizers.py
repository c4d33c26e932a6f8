"""What is trained of a student, and the optimisers that train it, with fp32 masters of weights in less precision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.convert.healing.recipe import Recipe

FLOAT32 = ("A_log", "D", "dt_bias")
"""Parameters of state-space layers: small errors in them grow over a sequence. Always fp32, never decayed."""

_BETAS = (0.9, 0.95)
_IN_LAYER = re.compile(r"\.layers\.\d+\.")


class Optimizers:
    """AdamW, or Muon for the matrices of layers and AdamW for the rest.

    Args:
        named: the parameters that are trained, each with its name in the model.
        initial: what masters begin with, a tensor for each.
        recipe: which optimiser, weight decay and clipping.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], initial: Sequence[Tensor], recipe: Recipe) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.clip = recipe.clip
        self._half = [each for each in self.parameters if each.dtype in (torch.bfloat16, torch.float16)]
        given = dict(zip(self.parameters, initial, strict=True))
        masters = {each: nn.Parameter(given[each].detach().float().clone()) for each in self._half}
        self._full = [masters[each] for each in self._half]
        self.masters = [masters.get(each, each) for each in self.parameters]
        self._sums = [torch.zeros_like(each) for each in self._full]
        for master, grad in zip(self._full, self._sums, strict=True):
            master.grad = grad
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            decayed = master.ndim > 1 and name.rpartition(".")[2] not in FLOAT32
            orthogonal = recipe.optimizer == "muon" and decayed and master.ndim == 2 and bool(_IN_LAYER.search(name))
            groups.setdefault((orthogonal, decayed), []).append(master)
        plain = [
            {"params": group, "weight_decay": recipe.weight_decay if decayed else 0.0}
            for (orthogonal, decayed), group in groups.items()
            if not orthogonal
        ]
        fused = self.masters[0].is_cuda
        self.each: list[torch.optim.Optimizer] = []
        if plain:
            self.each.append(torch.optim.AdamW(plain, lr=recipe.lr, betas=_BETAS, fused=fused))
        if matrices := groups.get((True, True)):
            # Steps of the size that AdamW's have, so that one learning rate serves both.
            muon: Any = torch.optim.Muon
            decay = recipe.weight_decay
            self.each.append(muon(matrices, lr=recipe.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """One step with the gradients that are there, which are then forgotten. Returns their norm before clipping."""
        foreach: Any = torch  # its functions over lists: one launch in place of hundreds
        if self._half:
            made = zip(self._half, self._sums, strict=True)
            foreach._foreach_copy_(self._sums, [zero if half.grad is None else half.grad for half, zero in made])
        norm = nn.utils.clip_grad_norm_(self.masters, self.clip if self.clip is not None else float("inf"))
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        if self._half:
            foreach._foreach_copy_(self._half, self._full)
            foreach._foreach_zero_(self._sums)
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def release(self) -> None:
        """Training is over: parameters take the unrounded values of their masters."""
        for half, master in zip(self._half, self._full, strict=True):
            half.data = master.data

    def state(self) -> dict[str, Any]:
        """All that a later run needs to go on to the bit."""
        return {
            "parameters": {name: master.detach() for name, master in zip(self.names, self.masters, strict=True)},
            "optimizers": [optimizer.state_dict() for optimizer in self.each],
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            master.copy_(state["parameters"][name])
            if parameter is not master:
                parameter.copy_(master)
        for optimizer, given in zip(self.each, state["optimizers"], strict=False):
            optimizer.load_state_dict(given)
