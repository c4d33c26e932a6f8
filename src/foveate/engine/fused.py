"""Norms, gated MLPs, rotary embeddings and products with one token by one kernel each, while a decode step is recorded.

Between the matrix products of a decode step transformers launches some thirty kernels a layer that each take less time
than their launch. Liger's kernels do the same in four. The products themselves are `products`' where a step has one
token. All are taken only where they give what the module itself gives on a probe, and only while a step is being
recorded: the model is as it was before and after.
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
_products: dict[torch.device, dict[torch.dtype, bool]] = {}
_rotations: WeakKeyDictionary[Callable[..., Any], dict[torch.dtype, bool]] = WeakKeyDictionary()


def available(device: torch.device) -> bool:
    """Whether Liger's kernels are installed and the device can run them."""
    return device.type == "cuda" and find_spec("liger_kernel") is not None and find_spec("triton") is not None


def multiplies(device: torch.device) -> bool:
    """Whether the device can run the kernels of `products`."""
    return device.type == "cuda" and find_spec("triton") is not None


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within it, this model's small operations are fused where they can be, and its products made for one token."""
    device = next(model.parameters()).device
    liger, products = available(device), multiplies(device)
    with ExitStack() as stack:

        def put(module: nn.Module, change: Callable[..., Tensor]) -> None:
            stack.enter_context(_set(module.__dict__, "forward", change))

        if liger:
            for module in model.modules():
                change = _change_of(module)
                if change is not None and _same(module, change):
                    put(module, partial(change, module))
            for source in {sys.modules[type(m).__module__] for m in compat.attention_modules(model)}:
                rotate = getattr(source, "apply_rotary_pos_emb", None)
                if rotate is not None and _same_rotation(rotate, next(model.parameters())):
                    stack.enter_context(_set(source.__dict__, "apply_rotary_pos_emb", _rotated))
        if products:
            for module in model.modules():
                for part, change in _multiplied(module):
                    put(part, change)
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
    gate, up = module.gate_proj, module.up_proj
    if multiplies(x.device) and _plain(gate) and _plain(up) and gate.bias is None and up.bias is None:
        kernels = _kernels()
        if kernels.suits(x, gate.weight, up.weight):
            return module.down_proj(kernels.gated(x, gate.weight, up.weight))
    return module.down_proj(_liger("swiglu", "LigerSiLUMulFunction")(gate(x), up(x)))


def _kernels() -> Any:
    return import_module("foveate.engine.products")


def _plain(module: Any) -> bool:
    """Whether a module is a matrix, its bias, and nothing else."""
    return type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks)


def _multiplied(module: Any) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """What stands in for the forward of this module, if it is a matrix, and of its parts that meet the same token."""
    if _plain(module) and "forward" not in module.__dict__ and _product_is_right(module.weight):
        yield module, partial(_product, module)
    parts: list[Any] = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not all(_plain(part) and "forward" not in part.__dict__ for part in parts):
        return
    if len({part.in_features for part in parts}) > 1 or len({part.bias is None for part in parts}) > 1:
        return
    if _product_is_right(parts[0].weight):
        together = _Together(parts)
        for number, part in enumerate(parts):
            yield part, partial(together, number)


def _product(linear: nn.Linear, x: Tensor) -> Tensor:
    kernels = _kernels()
    if not kernels.suits(x, linear.weight):
        return nn.functional.linear(x, linear.weight, linear.bias)
    return kernels.products(x, [linear.weight], None if linear.bias is None else [linear.bias])[0]


class _Together:
    """Queries, keys and values of one token in one launch, made when the first is asked for."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        self.parts = parts
        self.of: Tensor | None = None
        self.made: dict[int, Tensor] = {}

    def __call__(self, number: int, x: Tensor) -> Tensor:
        kernels = _kernels()
        if self.of is not x or number not in self.made:
            if number or not kernels.suits(x, *(part.weight for part in self.parts)):
                return _product(self.parts[number], x)
            biases = [part.bias for part in self.parts]
            made = kernels.products(x, [part.weight for part in self.parts], None if biases[0] is None else biases)
            self.of, self.made = x, dict(enumerate(made))
        found = self.made.pop(number)
        if not self.made:
            self.of = None
        return found


def _product_is_right(weight: Tensor) -> bool:
    """Whether the kernels multiply on this device as torch does, tried once for each dtype."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    known = _products.setdefault(weight.device, {})
    if weight.dtype not in known:
        x, w = torch.randn(1, 96).to(weight), torch.randn(40, 96).to(weight)
        known[weight.dtype] = _close(lambda: _kernels().products(x, [w])[0], lambda: nn.functional.linear(x, w))
    return known[weight.dtype]


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
