"""Errors that a user can act on: each message names the argument, the value and the mend."""

from __future__ import annotations


class FoveateError(Exception):
    """Base of everything Foveate raises on purpose. The command line prints it as one line and exits with 2."""


class BadArgument(FoveateError, ValueError):
    """An argument has a value that cannot be used.

    Args:
        argument: its name as the user wrote it (`budget`, `--lengths`).
        value: the value that was given.
        mend: what to give instead.
    """

    def __init__(self, argument: str, value: object, mend: str) -> None:
        super().__init__(f"{argument}={value!r}: {mend}")
        self.argument, self.value, self.mend = argument, value, mend

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        return type(self), (self.argument, self.value, self.mend)  # so that it can come from another process


class Refused(FoveateError, RuntimeError):
    """A method, model or operation cannot be had here; the message says which, and why."""


class Infeasible(FoveateError, ValueError):
    """A budget below what the method must hold or read. `floor` is the smallest share that can be met (0..1)."""

    def __init__(self, message: str, floor: float) -> None:
        super().__init__(message)
        self.floor = floor

    def __reduce__(self) -> tuple[type, tuple[str, float]]:
        return type(self), (str(self), self.floor)
