"""A stream of tokens to train on: documents tokenised once, kept in a file, and cut into sequences of equal length."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from foveate.convert.healing.documents import Documents, documents
from foveate.errors import BadArgument
from foveate.models.artifacts import Report, artifact
from foveate.tasks.chat import leading_ids, without_special

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1
_TOGETHER = 256  # documents handed to the tokenizer at a time
_PARTS = ("train", "held")


@dataclass(frozen=True, eq=False)
class TokenText:
    """Tokenised documents, some of which are held out and never trained on.

    Attributes:
        name: where the text is from.
        fingerprint: of the files, the tokenizer and the share held out; equal ones mean equal tokens.
        head: what the tokenizer puts before a text (BOS); every sequence begins with it.
        train, held: int32 [tokens], memory-mapped: the documents one after the other, each as head, text and EOS.
        train_starts, held_starts: int64 [documents + 1], where each begins.
    """

    name: str
    fingerprint: str
    head: tuple[int, ...]
    train: np.ndarray
    train_starts: np.ndarray
    held: np.ndarray
    held_starts: np.ndarray

    @property
    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "documents": len(self.train_starts) - 1,
            "tokens": len(self.train),
            "held_out_documents": len(self.held_starts) - 1,
            "held_out_tokens": len(self.held),
        }

    def sequences(self, length: int) -> int:
        """How many sequences of this length one pass over the text gives.

        Raises:
            BadArgument: not even one.
        """
        number = (len(self.train) - len(self.head)) // (length - len(self.head)) if length > len(self.head) else 0
        if number < 1:
            held = f"{self.name} holds {len(self.train)} tokens to train on"
            raise BadArgument("length", length, f"{held}; give more text, or a smaller length")
        return number

    def sequence(self, index: int, length: int, seed: int = 0) -> Tensor:
        """Sequence [length] of this number, from 0, int64. After the last one a new pass begins, in another order.

        Documents stand one after the other in an order that the seed and the pass decide; whatever the cut leaves at a
        sequence's start, it begins with the tokenizer's BOS.
        """
        turn, place = divmod(index, self.sequences(length))
        order, borders = self._order(seed, turn)
        return _cut(self.train, self.train_starts, order, borders, place, length, self.head)

    def held_out(self, length: int, tokens: int) -> Tensor:
        """Sequences [S, N] of held-out text: as many as `tokens` asks for, and at least one. N is `length`, or what
        there is where that is less."""
        length = min(length, len(self.held))
        order = np.arange(len(self.held_starts) - 1)
        there = max(1, (len(self.held) - len(self.head)) // (length - len(self.head)))
        number = max(1, min(there, tokens // length))
        cut = [
            _cut(self.held, self.held_starts, order, self.held_starts, place, length, self.head)
            for place in range(number)
        ]
        return torch.stack(cut)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one text lives as long as its run
    def _order(self, seed: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng([seed, turn]).permutation(len(self.train_starts) - 1)
        lengths = np.diff(self.train_starts)[order]
        return order, np.concatenate([[0], np.cumsum(lengths)])


def _cut(
    ids: np.ndarray,
    starts: np.ndarray,
    order: np.ndarray,
    borders: np.ndarray,
    place: int,
    length: int,
    head: tuple[int, ...],
) -> Tensor:
    """Tokens of the documents in this order, from the place-th sequence's first on."""
    first = place * (length - len(head))
    document = int(np.searchsorted(borders, first, side="right")) - 1
    made = list(head) if borders[document] != first else []  # a document brings its own
    pieces = [np.asarray(made, dtype=np.int64)]
    missing, offset = length - len(made), first - int(borders[document])
    while missing:
        start, stop = (int(starts[order[document] + side]) for side in (0, 1))
        piece = ids[start + offset : min(stop, start + offset + missing)]
        pieces.append(piece.astype(np.int64))
        missing, offset, document = missing - len(piece), 0, document + 1
    return torch.from_numpy(np.concatenate(pieces))


def token_text(
    text: str | Path | Documents | None, tokenizer: PreTrainedTokenizerBase, *, held_out: float = 0.01
) -> TokenText:
    """Tokenise documents, or find what an earlier call made of the same files with the same tokenizer.

    The tokens lie in the cache directory (`FOVEATE_CACHE`, or the platform's), written whole or not at all; processes
    that want the same text wait for the one that makes it.

    Args:
        text: as `documents` takes it.
        held_out: share of the documents that is set aside, chosen by a hash of their text: a document is on the same
            side in every run, and so is each copy of it.

    Raises:
        BadArgument: nothing to read, or a share outside 0 to 1 (exclusive).
        Refused: the cache directory cannot be written.
    """
    if not 0 < held_out < 1:
        raise BadArgument("held_out", held_out, "give a share between 0 and 1, such as 0.01")
    found = text if isinstance(text, Documents) else documents(text)
    identity = f"{_FORMAT}/{found.fingerprint}/{held_out}/{_identity(tokenizer)}"
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def build(folder: Path, scratch: Path, report: Report) -> None:
        _write(folder, found, tokenizer, held_out, report)

    folder = artifact(f"text{_FORMAT}-{fingerprint}", "tokens", build, space=max(1 << 20, found.size), kind="text")
    arrays = {}
    for part in _PARTS:
        arrays[part] = np.memmap(folder / f"{part}.i32", dtype=np.int32, mode="r")
        arrays[f"{part}_starts"] = np.fromfile(folder / f"{part}.starts", dtype=np.int64)
    return TokenText(found.name, fingerprint, leading_ids(tokenizer), **arrays)


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides the tokens of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = [tokenizer.eos_token_id, *leading_ids(tokenizer)]
    return hashlib.sha256(f"{type(tokenizer).__name__}{rules}{special}".encode()).hexdigest()


def _write(folder: Path, found: Documents, tokenizer: PreTrainedTokenizerBase, held_out: float, report: Report) -> None:
    starts: dict[str, list[int]] = {part: [0] for part in _PARTS}
    files = {part: (folder / f"{part}.i32").open("wb") for part in _PARTS}

    def add(part: str, ids: list[int]) -> None:
        files[part].write(np.asarray(ids, dtype=np.int32).tobytes())
        starts[part].append(starts[part][-1] + len(ids))

    # Of the documents to train on, the one nearest to being held out: it is, where no other one is.
    nearest: tuple[int, list[int]] | None = None
    try:
        for mark, ids in _tokenised(found, tokenizer):
            if mark < held_out * 2**64:
                add("held", ids)
                continue
            if nearest is None or mark < nearest[0]:
                nearest, ids = (mark, ids), nearest[1] if nearest else []
            if ids:
                add("train", ids)
        if nearest:
            add("train" if len(starts["held"]) > 1 else "held", nearest[1])
    finally:
        for file in files.values():
            file.close()
    if len(starts["train"]) == 1:
        few = "documents" if len(starts["held"]) > 1 else "text"
        raise BadArgument("text", found.name, f"holds too few {few} to train on and hold some out; give more")
    for part in _PARTS:
        np.asarray(starts[part], dtype=np.int64).tofile(folder / f"{part}.starts")
    report("tokens", 1.0)


def _tokenised(found: Documents, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, list[int]]]:
    """Each document's hash, 64 bits, and its tokens with BOS and EOS."""
    head = leading_ids(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]  # type: ignore[call-overload]
    texts = (without_special(tokenizer, text).strip() for text in found.read())
    for together in _batched(texts):
        rows: Any = tokenizer(list(together), add_special_tokens=False, verbose=False)["input_ids"]
        for text, row in zip(together, rows, strict=True):
            if row:
                mark = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
                yield mark, [*head, *row, *end]


def _batched(texts: Iterator[str]) -> Iterator[tuple[str, ...]]:
    while batch := tuple(itertools.islice(texts, _TOGETHER)):
        yield batch
