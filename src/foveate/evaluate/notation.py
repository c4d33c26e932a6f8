"""How methods are written in a list: `snapkv, kivi(bits=2, budget=None), retrieval|snapkv(budget=0.25)`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from foveate.errors import BadArgument
from foveate.evaluate.reader import READERS, Reader
from foveate.methods import METHODS
from foveate.methods.base import Method

Part = Method | Reader
"""What stands between the bars of `retrieval|snapkv`."""


def part_text(part: Part, free: Part | None) -> str:
    """The words that `parse_part` reads as this method; `free` is the one that takes the budgets of the comparison."""
    values = part.settings()
    if part.budget is None and part.budgeted and part is not free:
        values["budget"] = None
    inside = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return f"{part.id}({inside})" if inside else part.id


_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


def parse_part(text: str) -> tuple[Part, bool]:
    """`kivi(bits=2)` -> the method (or the reader), and whether its budget was stated."""
    match = _NAMED.fullmatch(text)
    if match is None:
        raise BadArgument("methods", text, "write a method as name or name(parameter=value, ...)")
    name, inside = match[1], match[2] or ""
    known_parts: dict[str, type[Any]] = {**METHODS, **READERS}
    if name not in known_parts:
        raise BadArgument("methods", name, f"no such method; there are {', '.join(known_parts)}")
    parameters = dict(_parameters(text, inside))
    try:
        return known_parts[name](**parameters), "budget" in parameters
    except TypeError:
        known = ", ".join(known_parts[name].__dataclass_fields__)
        raise BadArgument("methods", text, f"{name} has the parameters {known}") from None


def _parameters(text: str, inside: str) -> Iterator[tuple[str, Any]]:
    for part in split(inside, ","):
        name, equals, value = part.partition("=")
        if not equals:
            raise BadArgument("methods", text, f"write {part!r} as parameter=value")
        try:
            yield name.strip(), ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            yield name.strip(), value.strip()


def split(text: str, separator: str) -> list[str]:
    """Parts at the separators that stand outside brackets, blanks trimmed, empty ones left out."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([") - (char in ")]")
        if char == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]
