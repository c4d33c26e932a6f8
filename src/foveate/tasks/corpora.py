"""Text that haystacks and passages are cut from: Python's own documentation, or a file or folder of the user's."""

from __future__ import annotations

import ast
import bisect
import functools
import hashlib
import itertools
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from foveate.errors import BadArgument, Refused

# Modules of the standard library with much prose in their docstrings. Reading all of it takes four times as long
# for half as much again; modules that a later Python has dropped are passed over.
_MODULES = """
_pydecimal _pyio argparse ast asyncio/base_events asyncio/locks asyncio/protocols asyncio/streams asyncio/tasks
asyncio/transports bdb calendar cmd code codecs concurrent/futures/_base configparser difflib doctest email/header
email/message email/headerregistry fileinput functools getopt graphlib gzip http/client http/cookiejar http/server
importlib/abc ipaddress locale logging/__init__ logging/handlers mimetypes optparse os pathlib pdb pickle pkgutil
platform queue random re/__init__ sched shelve shutil site smtplib socket socketserver ssl statistics subprocess tarfile
tempfile textwrap threading timeit traceback turtle typing unittest/case unittest/mock urllib/parse urllib/request
weakref xml/etree/ElementTree xml/sax/handler xml/sax/xmlreader xmlrpc/server zipfile
"""

_SUFFIXES = (".txt", ".md", ".rst")
_LONGEST_SENTENCE = 400  # characters; longer runs (tables, text without full stops) are cut at a space

_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE_END = re.compile(r"""[.!?][)\]"'”’]*\s+(?=["'“‘(\[*]*[^\W\d_a-z])|[。！？]""")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd\ufeff]")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Running text, and its sentences.

    Attributes:
        name: where it is from; goes into records.
        text: paragraphs with an empty line between them.
    """

    name: str
    text: str

    @functools.cached_property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the text: two runs with equal digests used equal text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @functools.cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Character spans [start, stop) of the sentences in `text`, at most 400 characters each."""
        return tuple(_sentence_spans(self.text))

    @functools.cached_property
    def sentences(self) -> tuple[str, ...]:
        """The sentences on one line each, in order."""
        return tuple(" ".join(self.text[start:stop].split()) for start, stop in self.spans)

    def sentence_at(self, char: int) -> int:
        """Index of the last sentence that starts at or before `char`."""
        return max(0, bisect.bisect_right(self.spans, char, key=lambda span: span[0]) - 1)


def corpus(path: str | Path | None = None) -> Corpus:
    """The text of a file or of a folder's .txt, .md and .rst files; None: the documentation that Python carries.

    Files are read once, and again only when they change.

    Raises:
        BadArgument: the path is missing, holds no text, or is not UTF-8.
        Refused: path=None on a Python without its documentation or sources.
    """
    if path is None:
        return _python_documentation()
    root = Path(path).expanduser()
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
        if not files:
            raise BadArgument("corpus", str(path), f"the folder holds no {', '.join(_SUFFIXES)} file; give another")
    elif root.is_file():
        files = [root]
    else:
        raise BadArgument("corpus", str(path), "no such file or folder; give a text file, or a folder of text files")
    stamps = tuple((str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _read(str(path), stamps)


@functools.lru_cache(maxsize=8)
def _read(name: str, stamps: tuple[tuple[str, int, int], ...]) -> Corpus:
    texts = []
    for file, _, _ in stamps:
        try:
            texts.append(Path(file).read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            mend = f"{Path(file).name} is not UTF-8 text (byte {error.start}); save it as UTF-8, or give another file"
            raise BadArgument("corpus", name, mend) from None
        except OSError as error:
            raise BadArgument("corpus", name, f"cannot be read ({error.strerror}); give a readable file") from None
    text = "\n\n".join(texts).replace("\r\n", "\n").replace("\r", "\n")
    text = _PARAGRAPH.sub("\n\n", _CONTROL.sub("", text)).strip()
    if not any(char.isalpha() for char in text):
        raise BadArgument("corpus", name, "holds no text; give a file with at least a few sentences")
    return Corpus(name, text)


@functools.cache
def _python_documentation() -> Corpus:
    seen: dict[str, None] = {}  # docstrings repeat across modules
    for document in _documents():
        for paragraph in _PARAGRAPH.split(document):
            flat = " ".join(paragraph.split())
            if _is_prose(flat):
                seen.setdefault(flat)
    if not seen:
        raise Refused(
            "corpus=None: this Python carries neither its documentation topics nor its sources; "
            "give a text file (--corpus PATH)"
        )
    return Corpus(f"python-{sys.version_info.major}.{sys.version_info.minor}-documentation", "\n\n".join(seen))


def _documents() -> Iterator[str]:
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions leave it out
        pass
    else:
        yield from (topics.topics[name] for name in sorted(topics.topics))
    for module in _MODULES.split():
        source = Path(sysconfig.get_path("stdlib"), f"{module}.py")
        if source.is_file():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escape sequences in the sources
                yield from _docstrings(ast.parse(source.read_bytes()))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def _is_prose(paragraph: str) -> bool:
    """Sentences, rather than a heading, a grammar, a table or a piece of code."""
    if len(paragraph) < 50 or not paragraph[0].isupper() or paragraph[-1] != "." or ">>>" in paragraph:
        return False
    return sum(char.isalpha() or char == " " for char in paragraph) > 0.88 * len(paragraph)


def _sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    edges = {0, len(text)}
    edges.update(match.end() for match in _SENTENCE_END.finditer(text))
    edges.update(match.end() for match in _PARAGRAPH.finditer(text))
    ordered = sorted(edges)
    for start, stop in itertools.pairwise(ordered):
        while stop - start > _LONGEST_SENTENCE:
            cut = text.rfind(" ", start + 1, start + _LONGEST_SENTENCE) + 1 or start + _LONGEST_SENTENCE
            yield start, cut
            start = cut
        if text[start:stop].strip():
            yield start, stop
