"""What is remembered from step to step, at fixed addresses: a replayed step reads and writes the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from foveate.errors import Refused

Slots = Mapping[Any, dict[Any, Any]]
"""Tensors (or None) by owner and name."""


class Standing:
    """The states of methods and of layers without keys, as they are before a step.

    Args:
        where: what gives each state; a crop may have put another in its place.
    """

    def __init__(self, where: Sequence[Callable[[], Any]]) -> None:
        self.where = where
        self.held = [{owner: dict(values) for owner, values in state().items()} for state in where]

    def tensors(self) -> list[Tensor]:
        """All that is remembered."""
        return [x for state in self.held for values in state.values() for x in values.values() if x is not None]

    def write_back(self) -> None:
        """Within a step: what was made of the states takes their place.

        Raises:
            Refused: if a state changed its form.
        """
        if not self._alike():
            raise Refused("the step could not be recorded: what a method remembers changes its form")
        mine = {x.untyped_storage().data_ptr() for x in self.tensors()}
        for state, make in zip(self.held, self.where, strict=True):
            now = make()
            for owner, values in state.items():
                changed = {name: x for name, x in now.get(owner, {}).items() if x is not values[name]}
                # One may have become the other's new value.
                fresh = {
                    name: x.clone() if x.untyped_storage().data_ptr() in mine else x for name, x in changed.items()
                }
                for name, x in fresh.items():
                    values[name].copy_(x)
                    now[owner][name] = values[name]

    def put_back(self) -> None:
        """Whatever a step left, the states are found where they were."""
        for state, make in zip(self.held, self.where, strict=True):
            now = make()
            for owner in [*now]:
                if owner not in state:
                    del now[owner]
            for owner, values in state.items():
                inside = now.setdefault(owner, {})
                inside.clear()
                inside.update(values)

    def take_over(self) -> bool:
        """Between steps: states that were made in another way are brought to where they are looked for. False if their
        form is another."""
        if not self._alike():
            return False
        self.write_back()
        return True

    def _alike(self) -> bool:
        """Whether all states have the names and shapes that they had."""
        return all(_form(state) == _form(make()) for state, make in zip(self.held, self.where, strict=True))


def _form(state: Slots) -> dict[tuple[Any, Any], tuple[Any, ...] | None]:
    """Names, shapes and types; an empty state is none."""
    return {
        (owner, name): None if x is None else (x.shape, x.dtype, x.device)
        for owner, values in state.items()
        for name, x in values.items()
    }
