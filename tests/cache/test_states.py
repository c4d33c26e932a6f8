"""Caches in which some layers hold a state: their rows are chosen with those of the others."""

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import EXACT, tokens

import foveate
from foveate.models.converted import container, replace
from foveate.models.tiny import tiny


@pytest.fixture(scope="module")
def hybrid():
    torch.manual_seed(0)
    made = container(tiny("llama", kv_heads=2))
    replace(made, 1, "mamba2", heads=8, kv_heads=2, head_dim=16, state_dim=16)
    return made.eval()


@pytest.mark.parametrize("choose", ["select", "repeat"])
def test_rows_are_chosen_in_all_layers(hybrid, choose: str, seed: int) -> None:
    ids, more = tokens(seed, 3, 14), tokens(seed + 1, 6, 1)
    rows = [2, 0, 2] if choose == "select" else [0, 0, 1, 1, 2, 2]
    with foveate.apply(hybrid, "dense") as handle, torch.no_grad():
        cache = handle.cache()
        hybrid(ids, past_key_values=cache)
        if choose == "select":
            cache.batch_select_indices(torch.tensor(rows))
        else:
            cache.batch_repeat_interleave(2)
        step = more[: len(rows)]
        got = hybrid(step, past_key_values=cache).logits[:, -1]
        want = hybrid(torch.cat([ids[rows], step], dim=1)).logits[:, -1]
    assert_close(got, want, EXACT)
