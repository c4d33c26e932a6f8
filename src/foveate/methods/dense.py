"""Dense attention: the path everything else is measured on."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.methods.base import Method, register


@register
@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Read everything, hold everything."""

    id = "dense"
    name = "Dense attention"
    paper = "1706.03762"
    slots = frozenset()
    core = True
    budgeted = False
