"""Norms, gated MLPs, rotary embeddings and products with one token by one kernel each, within a forward on a GPU.

Between the matrix products of a decode step transformers launches some thirty kernels a layer that each take less time
than their launch; of a long prompt each of them reads and writes all tokens, in float32 where a norm does. Liger's
kernels do the same in four. Where a step has one token its products are those of `products`, and `rotary` turns. All
are taken only where they give what the module itself gives on a probe, only by the thread that asks for them, and only
within one forward: the model is as it was before and after.
"""

from __future__ import annotations

import sys
import threading
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
from foveate.engine.later import Later, Norm, now

_CLOSE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest relative error of a probe, by dtype: its rounding."""

_SHORT, _MANY = 256, 2**15 + 3
"""Rows of a norm up to this length are normed in another way once there are so many."""

_MOST = 2**31 - 1
"""Numbers that 32 bits can count."""

_known: WeakKeyDictionary[type, dict[torch.dtype, bool]] = WeakKeyDictionary()
_products: dict[torch.device, dict[torch.dtype, bool]] = {}
_rotations: WeakKeyDictionary[Callable[..., Any], dict[torch.dtype, bool]] = WeakKeyDictionary()


def available(device: torch.device) -> bool:
    """Whether Liger's kernels are installed and the device can run them."""
    return device.type == "cuda" and find_spec("liger_kernel") is not None and find_spec("triton") is not None


def multiplies(device: torch.device) -> bool:
    """Whether the device can run the kernels of `products` and `rotary`."""
    return device.type == "cuda" and find_spec("triton") is not None


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within it, this model's small operations are fused where they can be, and its products made for one token."""
    device = next(model.parameters()).device
    liger, products = available(device), multiplies(device)
    if not (liger or products):
        yield
        return
    with ExitStack() as stack:

        def put(module: nn.Module, change: Callable[..., Tensor]) -> None:
            own = partial(type(module).forward, module)
            stack.enter_context(_set(module.__dict__, "forward", _Here(change, own, device.type)))

        if liger:
            for module in model.modules():
                change = _change_of(module)
                if change is not None and _same(module, change):
                    put(module, partial(change, module))
        watched = any(module._forward_hooks for module in model.modules())  # and may keep what would be turned
        sources = set() if watched else {sys.modules[type(m).__module__] for m in compat.attention_modules(model)}
        for source in sources:
            own = _own_rotation(source)
            if own is not None and _same_rotation(own, next(model.parameters())):
                change = _Here(partial(_rotated, own), own, device.type)
                stack.enter_context(_set(source.__dict__, _ROTATION, change))
        if products:
            for module in model.modules():
                for part, change in _multiplied(module):
                    put(part, change)
        _thread.depth = getattr(_thread, "depth", 0) + 1
        try:
            yield
        finally:
            _thread.depth -= 1


_ROTATION = "apply_rotary_pos_emb"
_thread = threading.local()
"""`depth`: how many `fused` this thread is within."""
_lock = threading.Lock()
_changed: dict[tuple[int, str], tuple[int, Any]] = {}
"""How many have set a name, and what it meant before, by the id of its dict."""
_ABSENT = object()


class _Here:
    """A change that only threads within `fused` see: another may train the same model, or run one of its family
    elsewhere."""

    def __init__(self, change: Callable[..., Any], own: Callable[..., Any], kind: str) -> None:
        self.change, self.own, self.kind = change, own, kind

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not getattr(_thread, "depth", 0) or x.device.type != self.kind:
            return self.own(x, *args, **kwargs)
        with torch.cuda.device_of(x):  # kernels start on the current GPU, wherever their tensors are
            return self.change(x, *args, **kwargs)


@contextmanager
def _set(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """Who sets a name first sets it for all who do until the last has gone, who puts back what was there."""
    key = id(names), name
    with _lock:
        users, before = _changed.get(key, (0, names.get(name, _ABSENT)))
        if not users:
            names[name] = value
        _changed[key] = users + 1, before
    try:
        yield
    finally:
        with _lock:
            users, before = _changed.pop(key)
            if users > 1:
                _changed[key] = users - 1, before
            elif before is _ABSENT:
                del names[name]
            else:
                names[name] = before


def _free(module: nn.Module) -> bool:
    """Whether a module's forward is its class' own, but for changes of ours, and nobody watches it."""
    watched = module._forward_hooks or module._forward_pre_hooks
    return not watched and isinstance(module.__dict__.get("forward"), _Here | None)


def _own_rotation(source: Any) -> Callable[..., Any] | None:
    found = getattr(source, _ROTATION, None)
    return found.own if isinstance(found, _Here) else found


def _change_of(module: nn.Module) -> Callable[..., Tensor] | None:
    name = type(module).__name__
    if not _free(module):
        return None
    if name.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor):
        return _normed if _epsilon(module) is not None else None
    parts = (getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj"))
    return _gated if all(isinstance(part, nn.Linear) for part in parts) else None


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _normed(module: Any, x: Tensor) -> Tensor:
    x, weight, epsilon = now(x), module.weight, _epsilon(module)
    if weight.dtype == x.dtype and multiplies(x.device) and _kernels().suits(x) and _product_is_right(weight):
        norm = Norm(x, weight, float(epsilon or 0.0))
        return Later(x, x.shape[-1], partial(_norm, module, x), norm=norm)
    return _norm(module, x)


def _norm(module: Any, x: Tensor) -> Tensor:
    # Many short rows are several to a program, which counts them in 32 bits.
    alone = True if x.numel() > _MOST else None
    return _liger("rms_norm", "LigerRMSNormFunction")(x, module.weight, _epsilon(module), 0.0, "llama", False, alone)


def _gated(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj, module.up_proj
    if multiplies(x.device) and _plain(gate) and _plain(up) and gate.bias is None and up.bias is None:
        kernels = _kernels()
        if kernels.suits(x, gate.weight, up.weight):
            return module.down_proj(kernels.gated(_met(x), gate.weight, up.weight))
    return module.down_proj(_liger("swiglu", "LigerSiLUMulFunction")(gate(x), up(x)))


def _met(x: Tensor) -> Tensor | Norm:
    """What a product is given for x: the norm that nobody has made so far, to be made on the way."""
    return x.norm if isinstance(x, Later) and x.norm is not None and x.made is None else now(x)


def _kernels() -> Any:
    return import_module("foveate.engine.products")


def _plain(module: Any) -> bool:
    """Whether a module is a matrix, its bias, and nothing else."""
    return type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks)


def _multiplied(module: Any) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """What stands in for the forward of this module, if it is a matrix, and of its parts that meet the same token or
    whose result is its own."""
    for name in ("o_proj", "down_proj"):
        part = getattr(module, name, None)
        if isinstance(part, nn.Linear) and _plain(part) and _free(part) and _product_is_right(part.weight):
            yield part, partial(_last, part)
    if _plain(module) and _free(module) and _product_is_right(module.weight):
        yield module, partial(_product, module)
    parts: list[Any] = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not all(_plain(part) and _free(part) for part in parts):
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
    return kernels.products(_met(x), [linear.weight], None if linear.bias is None else [linear.bias])[0]


def _last(linear: nn.Linear, x: Tensor) -> Tensor:
    """`_product` of what closes a block, which is not made before it is known what it is added to."""
    if not _kernels().suits(x, linear.weight):
        return _product(linear, x)
    bias, given = None if linear.bias is None else [linear.bias], _met(x)

    def make(plus: Tensor | None = None) -> Tensor:
        return _kernels().products(given, [linear.weight], bias, plus)[0]

    return Later(x, linear.out_features, make, plus=make)


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
            weights = [part.weight for part in self.parts]
            made = kernels.products(_met(x), weights, None if biases[0] is None else biases)
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
        x, w, scale = torch.randn(1, 96).to(weight), torch.randn(40, 96).to(weight), torch.randn(96).to(weight)
        plus = torch.randn(1, 40).to(weight)
        known[weight.dtype] = _close(
            lambda: _kernels().products(Norm(x, scale, 1e-5), [w], plus=plus)[0],
            lambda: plus + nn.functional.linear(nn.functional.rms_norm(x, (96,), scale, 1e-5), w),
        )
    return known[weight.dtype]


def _rotated(
    own: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """In place, where it is the kernels' rotation: of all channels (`own` may turn the first ones alone). Of one token
    when it is needed."""
    if args or kwargs or not q.shape[-1] == k.shape[-1] == cos.shape[-1] or not q.dtype == k.dtype == cos.dtype:
        return own(q, k, cos, sin, *args, **kwargs)
    if multiplies(q.device):
        kernel = import_module("foveate.engine.rotary")
        if kernel.suits(q, k, cos, sin):
            return kernel.Rotation(q, k, cos, sin, own).laters() if q.is_contiguous() else kernel.rotate(q, k, cos, sin)
    # Of one token Liger's kernel takes the stride of an axis of size 1 for that of a row.
    long = q.shape[2] > 1 and available(q.device)
    return _liger("rope", "LigerRopeFunction")(q, k, cos, sin) if long else own(q, k, cos, sin)


def _liger(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(f"liger_kernel.ops.{module}"), name).apply


def _same(module: nn.Module, change: Callable[..., Tensor]) -> bool:
    """Whether the fused form of a module is the module, tried once for each class and dtype."""
    weight = next(module.parameters())
    known = _known.setdefault(type(module), {})
    if weight.dtype not in known:
        first = getattr(module, "gate_proj", None)
        width = weight.shape[-1] if first is None else first.in_features
        rows = _MANY if first is None and width <= _SHORT else 3
        probes = [torch.randn(1, count, width).to(weight) for count in (1, rows)]
        known[weight.dtype] = all(_close(partial(change, module, x), partial(module, x)) for x in probes)
    return known[weight.dtype]


def _same_rotation(rotate: Callable[..., tuple[Tensor, Tensor]], weight: Tensor) -> bool:
    """Whether a model's rotation is the half-split one of all channels, tried once for each dtype."""
    known = _rotations.setdefault(rotate, {})
    if weight.dtype in known:
        return known[weight.dtype]

    def agree(count: int) -> bool:
        q, k = (torch.randn(2, heads, count, 64).to(weight) for heads in (4, 2))
        angle = torch.rand(2, count, 32, device=weight.device) * 6
        cos, sin = (torch.cat([x, x], dim=-1).to(weight.dtype) for x in (angle.cos(), angle.sin()))

        def both(turn: Callable[..., Any]) -> Tensor:
            return torch.cat(turn(q.clone(), k.clone(), cos, sin), dim=1)

        return _close(partial(both, partial(_rotated, rotate)), partial(both, rotate))

    known[weight.dtype] = agree(1) and agree(5)
    return known[weight.dtype]


def _close(fast: Callable[[], Tensor], slow: Callable[[], Tensor]) -> bool:
    try:
        want = slow()
        with torch.cuda.device_of(want):
            got = fast()
    except Exception:  # whatever a foreign kernel or a model of another kind says, the module's own way works
        return False
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    error = (got.double() - want.double()).norm() / want.double().norm()
    return bool(error <= _CLOSE.get(want.dtype, 0.0))
