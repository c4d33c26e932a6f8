"""Foveate: every efficient-attention method behind one interface, compared with evidence."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from foveate.comparison import Comparison, compare
    from foveate.engine.apply import Handle, apply, compose
    from foveate.engine.saved import load
    from foveate.errors import BadArgument, FoveateError, Infeasible, Refused
    from foveate.methods.budget import Budget
    from foveate.models.registration import register_models
    from foveate.tuning.tune import Tuning, tune

_PUBLIC = {
    "BadArgument": "foveate.errors",
    "Budget": "foveate.methods.budget",
    "Comparison": "foveate.comparison",
    "FoveateError": "foveate.errors",
    "Handle": "foveate.engine.apply",
    "Infeasible": "foveate.errors",
    "Refused": "foveate.errors",
    "Tuning": "foveate.tuning.tune",
    "apply": "foveate.engine.apply",
    "compare": "foveate.comparison",
    "compose": "foveate.engine.apply",
    "load": "foveate.engine.saved",
    "register_models": "foveate.models.registration",
    "tune": "foveate.tuning.tune",
}

__all__ = [
    "BadArgument",
    "Budget",
    "Comparison",
    "FoveateError",
    "Handle",
    "Infeasible",
    "Refused",
    "Tuning",
    "apply",
    "compare",
    "compose",
    "load",
    "register_models",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that `import foveate` and the command line start at once."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")
