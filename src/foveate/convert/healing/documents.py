"""Documents to learn from: files of the user's, or what is written about the packages of every Python installation."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from foveate.errors import BadArgument, Refused
from foveate.tasks.corpora import corpus
from foveate.tasks.files import clean

SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
"""Files that are read in a folder."""

_PIECE = 20_000  # characters: a plain text file is cut there, so that some of it can be held out
_LONG = 60  # characters from which on a paragraph that was seen before is left out
_LEAST = 200  # characters of such paragraphs that make a document
_MOST = 2_000_000  # bytes; larger files are tables and generated code
_LETTERS = 0.6  # least share of letters and blanks: tables and lists of numbers have fewer

_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
_QUOTED = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)
_NO_PROSE = re.compile(
    r"licen[cs]e|copying|notice|authors|top_level|entry_points|sources|requirements|cmakelists", re.I
)


@dataclass(frozen=True)
class Documents:
    """Where texts are from.

    Attributes:
        name: for the record.
        fingerprint: changes with the files.
        size: bytes of text that may be in them, roughly and rather too many.
        read: the texts, in an order that is the same for the same files, none twice.
    """

    name: str
    fingerprint: str
    size: int
    read: Callable[[], Iterator[str]]


def documents(text: str | Path | None = None) -> Documents:
    """The documents of a file or a folder, or those of all installed packages.

    Args:
        text: a file of plain text, a `.jsonl` file whose lines hold a "text", a folder of such files (`SUFFIXES`), or
            None: docstrings, and `.md`, `.rst` and `.txt` files, of this Python's own library and of every installed
            package. Paragraphs that are in `tasks.corpora.corpus()`, which evaluations read, are not among them.

    Raises:
        BadArgument: no such path, or nothing in it to read. Later, while reading: a file is not UTF-8, or a line of a
            `.jsonl` file holds no text.
        Refused: None where Python carries no sources.
    """
    if text is None:
        return _installed()
    root = Path(text).expanduser()
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise BadArgument("text", str(text), f"the folder holds no {', '.join(SUFFIXES)} file; give another")
    elif root.is_file():
        files = [root]
    else:
        raise BadArgument("text", str(text), "no such file or folder; give one, or None for Python's documentation")
    stamp, size = _stamp((file, str(file.relative_to(root) if root.is_dir() else file.name)) for file in files)
    return Documents(root.name, stamp, size, lambda: _once(itertools.chain.from_iterable(map(_of_file, files))))


def _once(texts: Iterator[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def _of_file(file: Path) -> Iterator[str]:
    try:
        whole = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadArgument("text", str(file), f"is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise BadArgument("text", str(file), f"cannot be read ({error.strerror}); give a readable file") from None
    if file.suffix.lower() != ".jsonl":
        yield from _pieces(clean(whole))
        return
    for number, line in enumerate(whole.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, str):
            raise BadArgument("text", str(file), f'line {number} is no object with a "text"; give such lines')
        if found.strip():
            yield clean(found).strip()


def _pieces(text: str) -> Iterator[str]:
    """The text, cut at the ends of paragraphs into pieces of at most so many characters, longer paragraphs whole."""
    held: list[str] = []
    for paragraph in _PARAGRAPH.split(text.strip()):
        if held and sum(map(len, held)) + len(paragraph) > _PIECE:
            yield "\n\n".join(held)
            held = []
        if paragraph.strip():
            held.append(paragraph)
    if held:
        yield "\n\n".join(held)


def _installed() -> Documents:
    files = list(_package_files())
    if not files:
        raise Refused("text=None: this Python carries no sources to read documentation from; give a text file")
    stamp, size = _stamp(iter(files))
    # Most of a source file is no documentation.
    return Documents("documentation of installed packages", stamp, size // 4, lambda: _prose(files))


def _package_files() -> Iterator[tuple[Path, str]]:
    """Files that may hold documentation, each with its path below the folder that packages are in."""
    seen: set[str] = set()
    for kind in ("purelib", "platlib", "stdlib"):
        root = os.path.realpath(sysconfig.get_path(kind))
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            found += [
                os.path.join(folder, name)
                for name in names
                if name.endswith((".py", ".md", ".rst", ".txt")) and not _NO_PROSE.match(name)
            ]
        for path in sorted(found):
            if path not in seen:
                seen.add(path)
                yield Path(path), os.path.relpath(path, root)


def _stamp(files: Iterator[tuple[Path, str]]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    for path, name in files:
        try:
            found = path.stat()
        except OSError:
            continue  # gone since it was listed: it will not be read either
        digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode("utf-8", "replace"))
        size += found.st_size
    return digest.hexdigest(), size


def _prose(files: list[tuple[Path, str]]) -> Iterator[str]:
    """A text per file: its paragraphs, without those that stand elsewhere before."""
    seen = {hash(" ".join(paragraph.split())) for paragraph in _PARAGRAPH.split(corpus().text)}
    for path, _ in files:
        try:
            if path.stat().st_size > _MOST:
                continue
            whole = path.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue  # one of many
        texts = _docstrings(clean(whole)) if path.suffix == ".py" else [clean(whole)]
        kept, fresh = [], 0
        for text in texts:
            for paragraph in _PARAGRAPH.split(text.strip()):
                flat = " ".join(paragraph.split())
                if len(flat) >= _LONG:
                    if hash(flat) in seen:
                        continue
                    seen.add(hash(flat))
                    fresh += len(flat)
                if flat:
                    kept.append(paragraph)
        made = "\n\n".join(kept)
        if fresh >= _LEAST and fresh > len(made) // 2 and _is_prose(made):
            yield made


def _docstrings(source: str) -> Iterator[str]:
    """Triple-quoted texts that begin a line. Parsing the sources would find the same, thirty times slower."""
    for match in _QUOTED.finditer(source):
        line = source[source.rfind("\n", 0, match.start()) + 1 : match.start()]
        if line.strip() in ("", "r", "R"):
            yield inspect.cleandoc(match[2])


def _is_prose(text: str) -> bool:
    return sum(char.isalpha() or char == " " for char in text) > _LETTERS * len(text)
