"""Norms, gated MLPs and rotary embeddings by one kernel each, while a decode step is recorded.

Between the matrix products of a decode step transformers launches some thirty kernels a layer that each take less time
than their launch. Liger's kernels do the same in four. They are taken only where they give what the module itself gives
on a probe, and only while a step is being recorded: the model is as it was before and after.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from foveate import compat

_CLOSE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest relative error of a probe, by dtype: its rounding."""

_known: WeakKeyDictionary[type, dict[torch.dtype, bool]] = WeakKeyDictionary()
_rotations: WeakKeyDictionary[Callable[..., Any], dict[torch.dtype, bool]] = WeakKeyDictionary()


def available(device: torch.device) -> bool:
    """Whether Liger's kernels are installed and the device can run them."""
    return device.type == "cuda" and find_spec("liger_kernel") is not None and find_spec("triton") is not None


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within it, this model's small operations are fused where they can be."""
    if not available(next(model.parameters()).device):
        yield
        return
    with ExitStack() as stack:
        for module in model.modules():
            change = _change_of(module)
            if change is not None and _same(module, change):
                stack.enter_context(_set(module.__dict__, "forward", partial(change, module)))
        for source in {sys.modules[type(m).__module__] for m in compat.attention_modules(model)}:
            rotate = getattr(source, "apply_rotary_pos_emb", None)
            if rotate is not None and _same_rotation(rotate, next(model.parameters())):
                stack.enter_context(_set(source.__dict__, "apply_rotary_pos_emb", _rotated))
        yield


@contextmanager
def _set(names: Any, name: str, value: Any) -> Iterator[None]:
    absent = object()
    before = names.get(name, absent)
    names[name] = value
    try:
        yield
    finally:
        if before is absent:
            del names[name]
        else:
            names[name] = before


def _change_of(module: nn.Module) -> Callable[..., Tensor] | None:
    name = type(module).__name__
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return None
    if name.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor):
        return _normed if _epsilon(module) is not None else None
    parts = (getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj"))
    return _gated if all(isinstance(part, nn.Linear) for part in parts) else None


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _normed(module: Any, x: Tensor) -> Tensor:
    return _liger("rms_norm", "LigerRMSNormFunction")(x, module.weight, _epsilon(module), 0.0, "llama", False)


def _gated(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(_liger("swiglu", "LigerSiLUMulFunction")(module.gate_proj(x), module.up_proj(x)))


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, unsqueeze_dim: int = 1, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    # Rows of one token each are given as the tokens of one row: the kernel takes the stride of an axis of size 1 for
    # that of a row.
    cos, sin = (x.expand(len(q), -1, -1).transpose(0, 1).contiguous() for x in (cos, sin))
    turned = _liger("rope", "LigerRopeFunction")(q.permute(2, 1, 0, 3), k.permute(2, 1, 0, 3), cos, sin)
    return turned[0].permute(2, 1, 0, 3), turned[1].permute(2, 1, 0, 3)


def _liger(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(f"liger_kernel.ops.{module}"), name).apply


def _same(module: nn.Module, change: Callable[..., Tensor]) -> bool:
    """Whether the fused form of a module is the module, tried once for each class and dtype."""
    weight = next(module.parameters())
    known = _known.setdefault(type(module), {})
    if weight.dtype not in known:
        first = getattr(module, "gate_proj", None)
        x = torch.randn(1, 1, weight.shape[-1] if first is None else first.in_features).to(weight)
        known[weight.dtype] = _close(lambda: change(module, x), lambda: module(x))
    return known[weight.dtype]


def _same_rotation(rotate: Callable[..., tuple[Tensor, Tensor]], weight: Tensor) -> bool:
    """Whether a model's rotation is the half-split one of all channels, tried once for each dtype."""
    known = _rotations.setdefault(rotate, {})
    if weight.dtype in known:
        return known[weight.dtype]
    q, k = (torch.randn(2, heads, 1, 64).to(weight) for heads in (4, 2))
    angle = torch.rand(2, 1, 32, device=weight.device) * 6
    cos, sin = (torch.cat([x, x], dim=-1).to(weight.dtype) for x in (angle.cos(), angle.sin()))
    known[weight.dtype] = _close(
        lambda: torch.cat(_rotated(q.clone(), k.clone(), cos, sin), dim=1),
        lambda: torch.cat(rotate(q, k, cos, sin), dim=1),
    )
    return known[weight.dtype]


def _close(fast: Callable[[], Tensor], slow: Callable[[], Tensor]) -> bool:
    try:
        want = slow()
        got = fast()
    except Exception:  # whatever a foreign kernel or a model of another kind says, the module's own way works
        return False
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    error = (got.double() - want.double()).norm() / want.double().norm()
    return bool(error <= _CLOSE.get(want.dtype, 0.0))
