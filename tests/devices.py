"""Several devices on a machine that has none: tensors that say where they lie, and refuse to meet what lies elsewhere.

They lie in the host's memory all the same, under the name of a type of device that no build of PyTorch can run. As on a
GPU, numbers without axes may meet anything, and indices may lie on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

TYPE = "lazy"
_COPIES = ("aten::copy_", "aten::_to_copy")
_INDICES = ("aten::index.", "aten::index_put", "aten::_index_put")


def device(number: int) -> torch.device:
    return torch.device(TYPE, number)


@contextmanager
def several_devices() -> Iterator[None]:
    """Within it tensors can be brought `.to(device(i))`, for any i."""
    asked = torch.is_autocast_enabled

    def is_autocast_enabled(*kind: str) -> bool:
        return TYPE not in kind and asked(*kind)

    autocast = patch.object(torch, "is_autocast_enabled", is_autocast_enabled)
    grad = patch.object(torch, "inference_mode", torch.no_grad)  # what is not taken to pieces cannot be followed
    with torch.no_grad(), _Dispatched(), _Made(), autocast, grad:
        yield


@contextmanager
def spread(net: nn.Module) -> Iterator[Any]:
    """A copy of a model, each layer on a device of its own, as `device_map` leaves it."""
    layers = len(net.model.layers)
    places = {f"model.layers.{i}": device(i) for i in range(layers)}
    first = {"model.embed_tokens": device(0), "model.rotary_emb": device(0)}
    last = {"model.norm": device(layers - 1), "lm_head": device(layers - 1)}
    with several_devices():
        yield dispatch_model(
            copy.deepcopy(net), {**places, **first, **last}, main_device=device(0), skip_keys="past_key_values"
        )


class _Placed(Tensor):
    """A tensor on a device that does not exist."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, where: torch.device) -> _Placed:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=where
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """What PyTorch would do with the memory of a device before it asks anybody is done on the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None and not _is(first):
            where = kwargs.pop("device")
            return func(*args, **kwargs).to(where)
        if func is Tensor.tolist and _is(first):
            return first.cpu().tolist()
        if func is Tensor.new_tensor and _is(first):
            return first.cpu().new_tensor(*args[1:], **kwargs).to(first.device)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and _is(first):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (first, tuple(torch.tensor(i) if isinstance(i, list) else i for i in places), *args[2:])
        return func(*args, **kwargs)


def _is(x: Any) -> bool:
    return isinstance(x, _Placed)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    asked, name = kwargs.get("device"), func.name()
    where = {x.device for x in given if _is(x)}
    if not name.startswith(_COPIES):
        apart = any(x.dim() > 0 and not _is(x) for x in given) and not name.startswith(_INDICES)
        if len(where) > 1 or (where and apart):
            raise RuntimeError(f"{name}: tensors on {', '.join(str(x.device) for x in given)}")
    elif asked is None:
        where = {given[0].device}
    home = torch.device(asked) if asked is not None else next(iter(where), torch.device("cpu"))
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    held = tree_map(lambda x: x.held if _is(x) else x, (args, kwargs))
    out = func(*held[0], **held[1])
    known = {id(x.held if _is(x) else x): x for x in given}  # what is changed in place stays the same object

    def outside(x: Any) -> Any:
        if not isinstance(x, Tensor) or id(x) in known:
            return known.get(id(x), x)
        return _Placed(x, home) if home.type == TYPE else x

    return tree_map(outside, out)
