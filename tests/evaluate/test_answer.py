from __future__ import annotations

import pytest
import torch
from tests.evaluate.small import LENGTH, Brief, small

from foveate.engine.apply import apply
from foveate.evaluate.answer import answer, read_prompts, stop_tokens
from foveate.evaluate.batch import Batch
from foveate.models import Loaded
from foveate.models.shape import ModelShape
from foveate.tasks import Sample, task


@pytest.fixture(scope="module")
def opened() -> Loaded:
    return small()


def samples(opened: Loaded, name: str, count: int = 3) -> list[Sample]:
    return Brief(name, 24).generate(opened.tokenizer, LENGTH, count, seed=3)


@torch.inference_mode()
def run(
    opened: Loaded, name: str, question_seen: bool, method: str = "dense", budget: float | None = None, rows: int = 3
):
    model, tokenizer = opened
    some = samples(opened, name, rows)
    with apply(model, method, budget=budget) as handle:
        batch = Batch(model, handle.cache(), len(some), ModelShape.of(model))
        logits = read_prompts(batch, some, question_seen)
        assert logits is not None
        return some, answer(batch, logits, some, task(name), tokenizer)


@pytest.mark.parametrize("question_seen", [False, True])
def test_dense_answers_are_those_of_generate(opened: Loaded, question_seen: bool) -> None:
    model, tokenizer = opened
    some, answers = run(opened, "niah_single_1", question_seen)
    for sample, one in zip(some, answers, strict=True):
        ids = torch.tensor([[*sample.context_ids, *sample.question_ids]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=sample.max_new_tokens
        )
        assert one.prediction == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert 0 < one.tokens < sample.max_new_tokens + 1


def test_log_probabilities_are_those_of_one_forward(opened: Loaded) -> None:
    model, _ = opened
    some, answers = run(opened, "perplexity", False)
    for sample, one in zip(some, answers, strict=True):
        ids = torch.tensor([[*sample.context_ids, *sample.target_ids]])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(sample.context_ids) - 1 : -1]
        want = logits.log_softmax(-1).gather(1, torch.tensor(sample.target_ids).unsqueeze(1)).squeeze(1)
        assert torch.allclose(torch.tensor(one.prediction), want, atol=1e-4)
        assert one.score == pytest.approx(-float(want.mean()), abs=1e-4)
        assert one.tokens == len(sample.target_ids) - 1


class Content(Brief):
    """A task that has heard enough after some characters."""

    def done(self, text: str, sample: Sample) -> bool:
        return len(text) >= 5


def test_an_answer_ends_as_soon_as_it_is_complete(opened: Loaded) -> None:
    model, tokenizer = opened
    some, whole = run(opened, "niah_single_1", True)
    with apply(model, "dense") as handle, torch.inference_mode():
        batch = Batch(model, handle.cache(), 3, ModelShape.of(model))
        logits = read_prompts(batch, some, True)
        assert logits is not None
        early = answer(batch, logits, some, Content("niah_single_1"), tokenizer)
    for short, long in zip(early, whole, strict=True):
        assert short.tokens < long.tokens
        assert len(str(short.prediction)) >= 5
        assert str(long.prediction).startswith(str(short.prediction).rstrip("\ufffd"))


def test_held_bytes_are_those_of_the_cache(opened: Loaded) -> None:
    model, _ = opened
    shape = ModelShape.of(model)
    some, (one,) = run(opened, "perplexity", False, rows=1)
    context = len(some[0].context_ids)
    # besides keys and values the cache holds an index of a few integers per layer
    assert 0 <= one.kv_bytes_prompt - shape.dense_kv_bytes(context) <= 64 * shape.num_layers
    # one token more, and the room that the cache takes for later ones
    assert shape.dense_kv_bytes(context + 1) <= one.kv_bytes <= shape.dense_kv_bytes(context + 1 + context // 16 + 16)
    assert one.kv_bytes_end >= one.kv_bytes
    _, (less,) = run(opened, "perplexity", False, "snapkv", 0.25, rows=1)
    # a position of 4 bytes beside every token that stays, and one block of spare slots
    slots = [slots * (4 + shape.kv_bytes_per_token // 6) * 6 for slots in (context // 4, context // 4 + 16)]
    assert slots[0] <= less.kv_bytes_prompt <= slots[1] + 64 * shape.num_layers


def test_stop_tokens(opened: Loaded) -> None:
    model, tokenizer = opened
    assert stop_tokens(model, tokenizer) == {2, tokenizer.eos_token_id}
