"""What methods remember from step to step, at fixed addresses: a replayed step reads and writes the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from foveate.cache.cache import State
from foveate.errors import Refused


class Standing:
    """The states of all layers, as they are before a step.

    Args:
        where: what gives each state; a crop may put another in its place.
    """

    def __init__(self, where: Sequence[Callable[[], State]]) -> None:
        self.where = where
        self.held = [{owner: dict(values) for owner, values in state().items()} for state in where]

    def tensors(self) -> list[Tensor]:
        """All that is remembered."""
        return [x for state in self.held for values in state.values() for x in values.values()]

    def write_back(self) -> None:
        """Within a step: what was made of the states takes their place.

        Raises:
            Refused: if a state changed its form.
        """
        if not self.alike():
            raise Refused("the step could not be recorded: what a method remembers changes its form")
        mine = {x.untyped_storage().data_ptr() for x in self.tensors()}
        for state, make in zip(self.held, self.where, strict=True):
            now = make()
            for owner, values in state.items():
                # One may have become the other's new value.
                fresh = {
                    name: x.clone() if x is not values[name] and x.untyped_storage().data_ptr() in mine else x
                    for name, x in now[owner].items()
                }
                for name, x in values.items():
                    if fresh[name] is not x:
                        x.copy_(fresh[name])
                    now[owner][name] = x

    def put_back(self) -> None:
        """Whatever a step left, the states are found where they were."""
        for state, make in zip(self.held, self.where, strict=True):
            now = make()
            now.clear()
            now.update({owner: dict(values) for owner, values in state.items()})

    def take_over(self) -> bool:
        """Between steps: states that were made in another way are brought to where they are looked for. False if their
        form is another."""
        if not self.alike():
            return False
        self.write_back()
        return True

    def alike(self) -> bool:
        """Whether all states have the names and shapes that they had."""
        return all(_form(state) == _form(make()) for state, make in zip(self.held, self.where, strict=True))


def _form(state: State) -> dict[tuple[str, str], tuple[object, ...]]:
    """Names, shapes and types; an empty state is none."""
    return {
        (owner, name): (x.shape, x.dtype, x.device) for owner, values in state.items() for name, x in values.items()
    }
