"""Methods: one published technique per file, each registering itself."""

from importlib import import_module
from pkgutil import iter_modules

from foveate.methods.base import METHODS, Composition, Method, Needs, Profile, Protect, Role, register
from foveate.methods.budget import Budget

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

globals().update({cls.__name__: cls for cls in METHODS.values()})

__all__ = [
    "METHODS",
    "Budget",
    "Composition",
    "Method",
    "Needs",
    "Profile",
    "Protect",
    "Role",
    "register",
    *(cls.__name__ for cls in METHODS.values()),
]
