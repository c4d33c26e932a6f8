"""The backends of `attend`, in the order in which they are asked."""

from __future__ import annotations

from typing import Protocol

from foveate.attention import decoding, flex, gather, sdpa, triton_prefill
from foveate.attention.request import Request
from foveate.attention.selection import Partial
from foveate.errors import BadArgument, Refused


class Backend(Protocol):
    """A module that can serve a read.

    `name` is the word a user forces it by. `can_run` says whether it will, else why not, in words for a user.
    `run` gives out [B, H, N, Dv] in the dtype of q, and lse [B, H, N] (may be None if the request does not ask for it).
    """

    name: str

    def can_run(self, request: Request) -> tuple[bool, str]: ...

    def run(self, request: Request) -> Partial: ...


BACKENDS: list[Backend] = [triton_prefill, decoding, flex, gather, sdpa]
"""In order of priority: the first that can run serves."""


def choose(request: Request, name: str | None = None) -> Backend:
    """The backend for a read: the named one, else the first that can run.

    Raises:
        BadArgument: no backend has that name.
        Refused: it (or none of them) can run, with the reason of each.
    """
    backends = BACKENDS if name is None else [backend for backend in BACKENDS if backend.name == name]
    if not backends:
        raise BadArgument("backend", name, "choose one of " + ", ".join(backend.name for backend in BACKENDS))
    reasons = []
    for backend in backends:
        able, reason = backend.can_run(request)
        if able:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise Refused("no attention backend can serve this read (" + "; ".join(reasons) + ")")
