from __future__ import annotations

import random

import pytest
import torch
from tests.closeness import assert_close
from tests.evaluate.small import small

from foveate.engine.apply import apply
from foveate.evaluate.batch import Batch, causal_pairs, rows_at_once
from foveate.models import tiny
from foveate.models.shape import ModelShape

FAMILIES = ("llama", "gemma3", "deepseek-v3")


def rows(lengths: list[int]) -> list[list[int]]:
    return [[random.randrange(3, 250) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_rows_of_a_batch_equal_rows_alone(family: str) -> None:
    model, _ = small(family)
    shape = ModelShape.of(model)
    contexts, questions = rows([37, 64, 50]), rows([9, 3, 14])
    tokens = [7, 8, 9]
    with apply(model, "dense") as handle:
        batch = Batch(model, handle.cache(), 3, shape)
        got = [batch.prompt(contexts), batch.prompt(questions), batch.step(tokens)]
        assert batch.seen == [47, 68, 65]
        batch.keep([2, 0])
        got.append(batch.step([5, 6]))
    for row in range(3):
        ids = torch.tensor([[*contexts[row], *questions[row], tokens[row]]])
        logits = model(ids).logits[0]
        n = len(contexts[row])
        want = [logits[n - 1], logits[n + len(questions[row]) - 1], logits[-1]]
        for a, b in zip(got, want, strict=False):
            assert_close(a[row], b, 2e-5)
    last = model(torch.tensor([[*contexts[2], *questions[2], tokens[2], 5]])).logits[0, -1]
    assert_close(got[3][0], last, 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_dense_reads_exactly_the_causal_pairs(family: str) -> None:
    model, _ = small(family)
    with apply(model, "dense") as handle:
        batch = Batch(model, handle.cache(), 2, ModelShape.of(model))
        batch.cache.meter = {}
        batch.prompt(rows([41, 30]))
        batch.prompt(rows([5, 8]))
        batch.step([4, 5])
        batch.step([4, 5])
        assert batch.cache.meter == {"prompt_read": batch.dense["prompt"], "decode_read": batch.dense["decode"]}


@torch.inference_mode()
def test_rewinding_forgets_the_last_steps() -> None:
    model, _ = small()
    with apply(model, "dense") as handle:
        batch = Batch(model, handle.cache(), 1, ModelShape.of(model))
        batch.prompt(rows([40]))
        want = batch.step([9])
        for token in (3, 4):
            batch.step([token])
        batch.rewind(3)
        assert torch.equal(batch.step([9]), want)


def test_causal_pairs_by_hand() -> None:
    model = tiny("gemma3", layers=3, heads=4, kv_heads=2, window=8)  # two sliding layers and a global one
    shape = ModelShape.of(model)
    for start, stop in ((0, 30), (5, 6), (7, 20)):
        want = sum(4 * (t + 1 + 2 * min(t + 1, 8)) for t in range(start, stop))
        assert causal_pairs(shape, start, stop) == want


def test_the_batch_follows_from_the_length_alone() -> None:
    assert [rows_at_once(n) for n in (100, 1024, 2048, 5000, 10**6)] == [8, 8, 4, 1, 1]
    assert [rows_at_once(n, "cuda") for n in (100, 1024, 4096, 10**6)] == [64, 64, 16, 1]
