"""Foveate: every efficient-attention method behind one interface, compared with evidence."""

from foveate.engine.apply import Handle, apply, compose
from foveate.errors import BadArgument, FoveateError, Infeasible, Refused
from foveate.methods.budget import Budget
from foveate.models import load

__version__ = "0.1.0"

__all__ = [
    "BadArgument",
    "Budget",
    "FoveateError",
    "Handle",
    "Infeasible",
    "Refused",
    "apply",
    "compose",
    "load",
]
