"""Parameters of a conversion as a user writes them: `name=value`, checked against the fields of its dataclass."""

from __future__ import annotations

import ast
import types
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from foveate.errors import BadArgument

_WORDS = {"true": True, "false": False, "none": None}


def parse_settings(cls: type[Any], words: Sequence[str], argument: str = "--set") -> dict[str, Any]:
    """`["rank=64", "balance=none"]` as values of the fields of a dataclass.

    Raises:
        BadArgument: no such field, or a value that is not of its type.
    """
    found: dict[str, Any] = {}
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise BadArgument(argument, word, "give name=value")
        if name not in known:
            raise BadArgument(argument, word, f"there is no {name}; give one of {', '.join(known) or 'none'}")
        fits, value = _as(hints[name], _value(text.strip()))
        if not fits:
            raise BadArgument(argument, word, f"give {name} as {type_text(hints[name])}")
        found[name] = value
    return found


def share_of(argument: str, text: str) -> float:
    """`"25%"` or `"0.25"` as 0.25.

    Raises:
        BadArgument: it is neither, or not above 0 and up to 1.
    """
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise BadArgument(argument, text, "give a share above 0, up to 1, such as 25% or 0.25")
    return share


def amount_of(argument: str, text: str) -> int:
    """`"10M"`, `"500k"` or `"4096"` as a whole number.

    Raises:
        BadArgument: it is none above 0.
    """
    scale = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower(), 1.0)
    try:
        amount = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        amount = 0.0
    if not 1 <= amount < 1e15 or amount != int(amount):
        raise BadArgument(argument, text, "give a whole number above 0, such as 4096, 500k or 10M")
    return int(amount)


def type_text(hint: Any) -> str:
    """A field's type in words: `int | None`, `"norm" or "linear"`."""
    if get_origin(hint) is Literal:
        return " or ".join(repr(each).replace("'", '"') for each in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(type_text(each) for each in get_args(hint))
    if hint is types.NoneType:
        return "none"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if text.endswith("%"):
        try:
            return float(text[:-1]) / 100
        except ValueError:
            return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _as(hint: Any, value: Any) -> tuple[bool, Any]:
    """Whether a value is of the type, and the value in that type."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True, value
    if origin is Literal:
        return value in parts, value
    if origin in (Union, types.UnionType):
        # Exactly the type before one that it can be turned into: 1 is an int before it is a float.
        ordered = sorted(parts, key=lambda part: part is not type(value))
        return next((found for part in ordered if (found := _as(part, value))[0]), (False, value))
    if hint is types.NoneType:
        return value is None, value
    if hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        return fits, float(value) if fits else value
    base = origin or hint
    if base in (tuple, list, Sequence):
        fits = isinstance(value, list | tuple)
        return fits, (list(value) if base is list else tuple(value)) if fits else value
    return isinstance(value, base) and (base is bool or not isinstance(value, bool)), value
