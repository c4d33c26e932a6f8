"""Tensors that are alive because of an object: the truth that `nbytes` is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def reachable_tensors(root: Any, beyond: tuple[type, ...] = ()) -> Iterator[Tensor]:
    """Every tensor in the object graph of `root`, each object once. Models, classes, functions and objects of the types
    in `beyond` belong to somebody else and are not entered."""
    visited: set[int] = set()
    todo: list[Any] = [root]
    alive: list[Any] = []  # ids are unique only among living objects
    while todo:
        item = todo.pop()
        if id(item) in visited or isinstance(item, (nn.Module, type, *beyond)) or callable(item):
            continue
        visited.add(id(item))
        alive.append(item)
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            todo.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo.extend(item)
        else:
            todo.extend(getattr(item, "__dict__", {}).values())
            todo.extend(getattr(item, name, None) for name in getattr(type(item), "__slots__", ()))


def reachable_bytes(root: Any, beyond: tuple[type, ...] = ()) -> int:
    """Bytes of the storages behind these tensors; two views of one storage count once, a view counts it whole."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in reachable_tensors(root, beyond)}
    return sum(storages.values())
