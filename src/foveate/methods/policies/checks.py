"""What parameters must be, and what a budget must reach."""

from __future__ import annotations

from typing import Any

from foveate.errors import BadArgument, Infeasible


def at_least(method: Any, **least: int) -> None:
    """Fields of a method and the least that each may be, where it is not None.

    Raises:
        BadArgument: a field is below.
    """
    for name, value in least.items():
        if getattr(method, name) is not None and getattr(method, name) < value:
            raise BadArgument(name, getattr(method, name), f"give at least {value}")


def holds_more(method: Any, floor: float, length: int, because: str, mend: str = "raise the budget") -> Infeasible:
    """The error of a method that cannot hold less than the share `floor` of the dense cache at this length."""
    return Infeasible(
        f"budget={method.budget}: {method.id} cannot hold less than {floor:.3f} of the dense cache at {length} tokens "
        f"({because}); {mend}",
        floor,
    )
