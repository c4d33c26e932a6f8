"""A tokenizer of whole words, for tests that need some text and no particular model."""

from __future__ import annotations

import re
import zlib
from typing import Any


class WordTokenizer:
    """Every word, number, sign and line break is one of `vocab` ids (3 and up); optionally with a BOS of 1."""

    def __init__(self, vocab: int = 256, bos: bool = False) -> None:
        self.vocab, self.bos = vocab, bos

    def __call__(self, text: str, add_special_tokens: bool = True, **kwargs: Any) -> dict[str, list[int]]:
        ids = [3 + zlib.crc32(word.encode()) % (self.vocab - 3) for word in re.findall(r"\w+|\n|[^\w\s]", text)]
        return {"input_ids": [1, *ids] if add_special_tokens and self.bos else ids}
