"""Selection recall: what is counted is what the cache holds and what the queries read."""

from __future__ import annotations

import torch
from tests.methods.runs import llama, prompt

import foveate
from foveate.evaluate.batch import Batch
from foveate.evaluate.recall import Evidence
from foveate.models.shape import ModelShape
from foveate.tasks import Sample


def sample(length: int, *evidence: tuple[int, int]) -> Sample:
    ids = tuple(range(5, 5 + length))
    return Sample("made-up", length, 0, 0, ids, (), ("x",), (0.5,), evidence, 4)


def shares(method, rows: list[Sample], **kwargs):
    """Held when the prompt is over, and read by one step."""
    model = llama()
    shape = ModelShape.of(model)
    full = [layer.index for layer in shape.layers if layer.kind == "full"]
    with foveate.apply(model, method, **kwargs) as handle, torch.no_grad():
        batch = Batch(model, handle.cache(), len(rows), shape)
        batch.prompt([prompt(1, len(row.context_ids), seed=i)[0].tolist() for i, row in enumerate(rows)])
        evidence = Evidence(rows)
        held = evidence.held(batch.cache, full)
        batch.cache.trace = reads = evidence.watch(full)
        batch.step([7] * len(rows))
    return held, reads.shares()


def test_dense_holds_and_reads_all_of_it() -> None:
    held, read = shares("dense", [sample(61, (3, 9), (40, 41)), sample(40, (0, 40))])
    assert held == [1.0, 1.0]
    assert read == [1.0, 1.0]


def test_a_window_holds_what_lies_in_it() -> None:
    """Of 2..5 the sinks 2 and 3; position 61 will see 46..60 besides itself, so of 44..47 the last two."""
    method = foveate.methods.StreamingLLM(sink=4, recent=16)
    held, read = shares(method, [sample(61, (2, 6)), sample(61, (10, 12)), sample(61, (44, 48)), sample(61)])
    assert held[0] == 0.5
    assert held[1] == 0.0
    assert held[2] == 0.5
    assert held[3] is None
    assert read[1] == 0.0
    assert read[0] == 0.5
    assert read[2] is not None and read[2] <= held[2]


def test_padding_moves_nothing() -> None:
    """Rows of one batch are counted from their own first token."""
    method = foveate.methods.SnapKV(budget=24, window=5, kernel=3)
    together, _ = shares(method, [sample(61, (3, 30)), sample(40, (3, 30))])
    alone, _ = shares(method, [sample(61, (3, 30))])
    assert together[0] == alone[0]
    assert 0 < together[1] < 1


def test_what_is_held_but_not_read_is_told_apart() -> None:
    held, read = shares(foveate.methods.Quest(budget=32, page=8, dense_layers=0), [sample(161, (8, 120))])
    assert held == [1.0]
    assert read[0] is not None and 0 < read[0] < 0.5
