"""Tensors of one token that are made by whoever needs them, so that a decode step has fewer launches.

A norm and a sum with the residual take a GPU less time than the pause before the next launch. The product that follows
a norm can take it along, since it reads the same token, and the product before a sum can add. Neither knows the other:
the model's own code stands between them. So a norm returns a tensor that says of what it is to be made; a product that
meets one makes it on the way, and everything else that touches it finds an ordinary tensor, made at that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_KNOWN = {"shape", "size", "numel", "ndim", "dim", "dtype", "device", "get_device", "is_cuda", "requires_grad"}
_KNOWN |= {"is_contiguous"}
"""What can be said of a tensor that is not there yet."""


class Norm(NamedTuple):
    """What a root mean square norm is made of: x [..., K], weight [K] and what keeps it from dividing by nothing."""

    x: Tensor
    weight: Tensor
    epsilon: float


class Later(Tensor):
    """A tensor that is made when it is needed first. What it is made of must stay as it is until then.

    Args:
        like: has its shape, dtype and device but for the last axis, of `width`.
        make: makes it.
        norm: what it is, if it is the norm of something.
        plus: makes its sum with another tensor of the same shape.
        rotation: what turns it (`rotary.Rotation`), if it is queries or keys to be turned.
    """

    make: Callable[[], Tensor]
    norm: Norm | None
    rotation: Any
    plus: Callable[[Tensor], Tensor] | None
    made: Tensor | None

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        width: int,
        make: Callable[[], Tensor],
        *,
        norm: Norm | None = None,
        plus: Callable[[Tensor], Tensor] | None = None,
        rotation: Any = None,
    ) -> Later:
        shape = (*like.shape[:-1], width)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        self.make, self.norm, self.plus, self.rotation, self.made = make, norm, plus, rotation, None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As made by `__new__`."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__  # type: ignore[attr-defined]
        if name in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        if name == "add" and len(args) == 2 and not kwargs:
            for term, other in (args, args[::-1]):
                if _adds(term, other):
                    return term.plus(other)
        if func is torch.nn.functional.dropout and kwargs and not kwargs.get("training", True):
            return args[0]  # between a block and its sum in some models
        args, kwargs = tree_map_only(Later, now, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(Later, now, (args, kwargs or {}))
        return func(*args, **kwargs)


def now(x: Tensor) -> Tensor:
    """The tensor itself, made if it is not there yet."""
    if not isinstance(x, Later):
        return x
    if x.made is None:
        x.made = x.make()
    return x.made


def rotation_of(q: Tensor, k: Tensor) -> Any:
    """What queries and keys are still to be turned by, if nobody has asked for either; else None."""
    if not (isinstance(q, Later) and isinstance(k, Later)) or q.rotation is not k.rotation:
        return None
    return q.rotation if q.made is None and k.made is None else None


def _adds(term: Any, other: Any) -> bool:
    """Whether a sum can be made with the term, which nobody has asked for so far."""
    if not isinstance(term, Later) or term.plus is None or term.made is not None:
        return False
    if not isinstance(other, Tensor) or isinstance(other, Later):
        return False
    same = other.shape == term.shape and other.dtype == term.dtype and other.device == term.device
    return same and other.is_contiguous()
