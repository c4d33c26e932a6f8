"""Loops that numba compiles, where it is installed: what works on one number after the other is fast in no other way.

Each `native_<noun>.py` holds such loops and is imported when they are first needed. All that they do can be done
without them, in steps of numpy and torch that say more plainly what is done.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any


@cache
def native(noun: str) -> Any:
    """The module `native_<noun>`, or None where numba is missing or does not know this numpy."""
    try:
        return import_module(f"{__package__}.native_{noun}")
    except ImportError:
        return None


def jit(**options: Any) -> Callable[[Callable], Callable]:
    """Compiled at the first call, and kept in a file for other processes where there is a place for one."""
    from numba import njit

    def compiled(loop: Callable) -> Callable:
        try:
            return njit(cache=True, nogil=True, **options)(loop)
        except RuntimeError:  # neither the package's folder nor the user's can be written to
            return njit(nogil=True, **options)(loop)

    return compiled
