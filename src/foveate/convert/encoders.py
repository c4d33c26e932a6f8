"""Encoders as the subject of conversions: hidden states, likeness of vectors, passages retrieved, time of encoding."""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.convert.base import Conversion, Stage
from foveate.convert.sample_text import held_out
from foveate.convert.subject import Asking, Questions, Rung, Subject
from foveate.errors import BadArgument
from foveate.models.encoders import encoder_container
from foveate.models.open import Loaded, load_encoder
from foveate.retrieval import embed
from foveate.tasks.corpora import Corpus, corpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PASSAGES = 200  # in which a sentence is looked for, where the text has so many
_WORDS = 60  # of a passage, at least
_AT_ONCE = 16
_REPEATS = 9


@dataclass(frozen=True, kw_only=True)
class EncoderRung(Rung):
    """An encoder after one stage.

    Args:
        similarity: mean cosine between the original's vector and this model's of the same sequence of the probe text,
            a vector being the mean of the last hidden states.
        retrieval: share of sentences whose passage's vector is nearest to theirs among all passages.
        share: of the original's parameters.
    """

    similarity: float
    share: float
    retrieval: float | None = None

    @property
    def summary(self) -> str:
        return f"similarity {self.similarity:.4f}"


class Encoder(Subject):
    """Encoders of BERT's build without a task's head."""

    id = "encoder"
    plural = "encoders"
    lacks = frozenset({"--heal", "--export", "--needles"})

    def open(self, source: str, dtype: Any, device: Any) -> Loaded:
        return load_encoder(str(embed.folder()) if source == embed.NAME else source, dtype=dtype, device=device)

    def check(self, conversion: Conversion, model: PreTrainedModel) -> None:
        conversion.check(model, None)

    def name(self, model: PreTrainedModel) -> str:
        return str(model.name_or_path).rstrip("/").rpartition("/")[2] or model.config.model_type

    def positions(self, model: PreTrainedModel) -> int:
        # RoBERTa counts positions from behind its padding's.
        inner: Any = model
        table = inner.embeddings.position_embeddings
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)

    def container(self, model: PreTrainedModel) -> PreTrainedModel:
        return encoder_container(model)

    @torch.no_grad()
    def measure(self, made: Any, stage: Stage, model: Any, probe: Tensor, seconds: float) -> EncoderRung:
        error = norm = alike = 0.0
        for batch in probe.to(model.device).split(4):
            ours, theirs = (each(batch).last_hidden_state.double() for each in (made, model))
            error += float((ours - theirs).square().sum())
            norm += float(theirs.square().sum())
            alike += float(torch.cosine_similarity(ours.mean(1), theirs.mean(1), dim=-1).sum())
        parameters = sum(p.numel() for p in made.parameters())
        return EncoderRung(
            stage=stage.name,
            exact=stage.exact,
            error=math.sqrt(error / norm),
            similarity=alike / len(probe),
            share=parameters / sum(p.numel() for p in model.parameters()),
            parameters=parameters,
            seconds=seconds,
            facts=copy.deepcopy(stage.facts),
        )

    def questions(self, asking: Asking, model: PreTrainedModel) -> Questions | None:
        """Sentences of held-out text, whose passages, without them, are to be found (inverse cloze)."""
        source = corpus(asking.text)
        pairs = cloze(held_out(source.text), asking.seed)
        if len(pairs) < 2:
            raise BadArgument(
                "--calibration", source.name, "has no passages to retrieve at its end; give a longer text"
            )
        facts = {"task": "inverse cloze", "passages": len(pairs), "seed": asking.seed}
        longest = min(256, self.positions(model))

        def ask(model: PreTrainedModel) -> float:
            sides = []
            for number, texts in enumerate(zip(*pairs, strict=True)):
                asking.told(number * len(pairs), 2 * len(pairs))
                sides.append(vectors(model, asking.tokenizer, texts, longest))
            asking.told(2 * len(pairs), 2 * len(pairs))
            queries, passages = sides
            nearest = (queries @ passages.T).argmax(-1)
            return float((nearest == torch.arange(len(pairs))).double().mean())

        return Questions("retrieval", facts, ask)

    @torch.no_grad()
    def in_use(self, model: PreTrainedModel, tokens: Tensor) -> dict[str, Any]:
        batch = tokens[:_AT_ONCE].to(model.device)
        model(batch)  # what is done once is not timed
        seconds = []
        for _ in range(_REPEATS):
            begin = _now(model)
            model(batch)
            seconds.append(_now(model) - begin)
        encode = 1e3 * statistics.median(seconds) / len(batch)
        return {"context": batch.shape[1], "batch": len(batch), "repeats": _REPEATS, "encode_ms": encode}


SUBJECT = Encoder()


def cloze(text: str, seed: int, most: int = _PASSAGES) -> list[tuple[str, str]]:
    """(sentence, the passage that it was taken out of) of running text, at most so many and no passage twice.

    Source: the inverse cloze task of Lee et al., "Latent Retrieval for Weakly Supervised Open Domain Question
    Answering", arXiv:1906.00300, section 4.
    """
    draw = random.Random(seed)
    pairs: list[tuple[str, str]] = []
    passage: list[str] = []
    for sentence in Corpus("", text).sentences:
        passage.append(sentence)
        if sum(len(each.split()) for each in passage) < _WORDS:
            continue
        asked = [index for index, each in enumerate(passage) if len(each.split()) >= 6]
        if len(passage) > 1 and asked:
            query = passage.pop(draw.choice(asked))
            pairs.append((query, " ".join(passage)))
        passage = []
    return draw.sample(pairs, min(most, len(pairs)))


@torch.no_grad()
def vectors(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int) -> Tensor:
    """Vectors of length 1 [texts, d] on the CPU, the mean over each text's tokens, of which `longest` are read."""
    made = []
    for start in range(0, len(texts), _AT_ONCE):
        given = tokenizer(
            list(texts[start : start + _AT_ONCE]),
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        ids, mask = (given[name].to(model.device) for name in ("input_ids", "attention_mask"))
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state.double() * mask.unsqueeze(-1)
        made.append(torch.nn.functional.normalize(states.sum(1), dim=-1).cpu())
    return torch.cat(made)


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
