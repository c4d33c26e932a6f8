"""Data files that the user has: what is read, and what is said where it is not what it should be."""

from __future__ import annotations

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

from foveate.errors import BadArgument
from foveate.tasks.chat import without_special
from foveate.tasks.haystack import Haystack

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd\ufeff]")


def read_json(path: str) -> Any:
    """The value in a JSON file, read again only when the file changes.

    Raises:
        BadArgument: the file is missing, unreadable or not JSON.
    """
    return _read(path, *stamp(path), False)


def read_lines(path: str) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; a file that holds one list of objects is taken as well.

    Raises:
        BadArgument: the file is missing or unreadable, a line is no JSON object, or there is none.
    """
    records = _read(path, *stamp(path), True)
    if not records:
        raise BadArgument("file", path, "is empty; give a file with one JSON object per line")
    return records


def stamp(path: str) -> tuple[int, int]:
    """When a file was changed, and its size.

    Raises:
        BadArgument: it is missing.
    """
    try:
        found = Path(path).expanduser().stat()
    except OSError as error:
        raise BadArgument("file", path, f"cannot be read ({error.strerror}); give the path of a data file") from None
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=8)
def _read(path: str, changed: int, size: int, lines: bool) -> Any:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadArgument("file", path, f"is not UTF-8 text (byte {error.start}); give a JSON file") from None
    except OSError as error:
        raise BadArgument("file", path, f"cannot be read ({error.strerror}); give a file") from None
    if not lines or text.lstrip().startswith("["):
        try:
            return _objects(path, json.loads(text)) if lines else json.loads(text)
        except ValueError as error:
            raise BadArgument("file", path, f"is not JSON ({error}); give the original file") from None
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise BadArgument("file", path, f"line {number} is not JSON ({error}); give a .jsonl file") from None
    return _objects(path, records)


def _objects(path: str, records: list[Any]) -> list[Any]:
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise BadArgument("file", path, f"record {number} is a {type(record).__name__}; give one object per line")
    return records


def text_of(record: Any, field: str, where: str, path: str) -> str:
    """A field of a record that must be a text, without control characters.

    Raises:
        BadArgument: it is missing, or no text.
    """
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        held = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise BadArgument("file", path, f"{where} has no text {field!r}, only {held or 'nothing'}; give another file")
    return clean(value)


def clean(text: str) -> str:
    """The text without control characters and with plain line ends, as a corpus has it."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def sentences_of(texts: list[str], tokenizer: Any) -> Haystack:
    """The given texts, again from the first after the last, special tokens left out."""
    kept = [text for text in (without_special(tokenizer, each).strip() for each in texts) if text]
    return Haystack(itertools.cycle(kept or ["So."]), " ")
