"""Recorded steps of methods whose lists grow, come in blocks, or serve several steps: what they launch, and how often
they are recorded."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.recorded import recording, steps
from tests.contract.runs import EXACT, tokens
from tests.contract.subjects import CASES, applied, model
from tests.contract.tape import record
from tests.contract.test_launches import launches

from foveate.attention import decoding
from foveate.engine import captured


def recordings(name: str, seed: int, count: int = 40, **changes: Any) -> int:
    """How many steps of an answer of `count` tokens are recorded; they give what ordinary steps give."""
    net, case = model("llama", 2), CASES[name]
    ids, new = tokens(seed, 61).unsqueeze(0), tokens(seed + 2, count).unsqueeze(0)
    made: list[Any] = []
    with applied(net, case, case.method(**changes)) as handle:
        _, want = steps(net, handle, ids, None, new)
        with recording(net, handle, by=lambda *args: made.append(args) or record(*args)):
            cache, got = steps(net, handle, ids, None, new)
        assert cache.step is not None, cache.unrecorded
    assert_close(got, want, EXACT)
    return len(made)


def test_tokens_are_chosen_by_their_codes_in_one_operation(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launches("a2ats", seed, monkeypatch) == ["arrive", "choose_by_codes", "decode_lists"]


def test_layers_share_what_only_lengths_decide(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer takes its token in and reads."""
    assert launches("s2-attention", seed, monkeypatch) == ["arrive", "decode_lists"]


@pytest.mark.parametrize("changes", [{"stride": 4}, {"stride": 3, "dense_heads": 1}, {"block": 8, "local": 1}])
def test_borders_of_blocks_need_no_other_recording(changes: dict[str, Any], seed: int) -> None:
    assert recordings("s2-attention", seed, **changes) == 1


@pytest.mark.parametrize(("refresh", "count"), [(1, 1), (3, 2)])
def test_searching_steps_are_one_kind_and_served_ones_another(refresh: int, count: int, seed: int) -> None:
    assert recordings("hip", seed, refresh=refresh) == count


def test_no_search_serves_where_tokens_move(seed: int) -> None:
    """H2O gives the slot of the token that it frees to the newest: what was found names slots."""
    net = model("llama", 2)
    methods = CASES["h2o"].method() | CASES["hip"].method(refresh=4)
    ids, new = tokens(seed, 61).unsqueeze(0), tokens(seed + 2, 24).unsqueeze(0)
    with applied(net, CASES["h2o"], methods) as handle:
        _, want = steps(net, handle, ids, None, new)
        with recording(net, handle):
            cache, got = steps(net, handle, ids, None, new)
        assert cache.step is not None, cache.unrecorded
    assert_close(got, want, EXACT)


@pytest.mark.parametrize("name", ["longheads", "actqkv"])
def test_steps_that_complete_a_block_are_another_kind(name: str, seed: int) -> None:
    assert recordings(name, seed) == 2


def test_whether_a_block_is_complete_is_looked_up_in_the_step(seed: int) -> None:
    assert recordings("landmark-means", seed) == 1


def test_codes_are_looked_up_in_the_step(seed: int) -> None:
    assert recordings("a2ats", seed) == recordings("a2ats", seed, budget=None, ratio=0.11) == 1


def test_a_prompt_between_recorded_steps_gets_its_codes(seed: int) -> None:
    """A step that codes its own token alone would take the others' for the first centroid."""
    net, case = model("llama", 2), CASES["a2ats"]
    ids, new = tokens(seed, 61).unsqueeze(0), tokens(seed + 2, 30).unsqueeze(0)
    with applied(net, case) as handle, torch.no_grad():
        found = []
        for recorded in (False, True):
            with recording(net, handle) if recorded else nullcontext():
                cache, first = steps(net, handle, ids, None, new[:, :10])
                cache.expect(8)
                net(input_ids=new[:, 10:18], past_key_values=cache, use_cache=True)
                rest = [net(input_ids=x, past_key_values=cache).logits[:, -1] for x in new[:, 18:].split(1, dim=1)]
                found.append(torch.cat([first, torch.stack(rest, dim=1)], dim=1))
        assert cache.step is not None
    assert_close(found[1], found[0], EXACT)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("s2-attention", {}),
        ("hip", {"tokens": 32, "k_block": 4, "refresh": 2}),
        ("a2ats", {}),
        ("a2ats", {"budget": None, "ratio": 0.11}),
        ("landmark-means", {"block": 8, "k": 2, "budget": None}),
        ("longheads", {}),
    ],
)
def test_kernels_make_the_same_steps(
    name: str, changes: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but in Triton's interpreter."""
    pytest.importorskip("triton")
    if not decoding._interpreted():
        pytest.skip("kernels run here in Triton's interpreter")
    net, case = model("llama", 2), CASES[name]
    ids, new = tokens(seed, 61).unsqueeze(0), tokens(seed + 2, 5).unsqueeze(0)
    with applied(net, case, case.method(**changes)) as handle:
        _, want = steps(net, handle, ids, None, new)
        monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (True, ""))
        with recording(net, handle, by=captured.record):
            cache, got = steps(net, handle, ids, None, new)
        assert cache.step is not None
    assert_close(got, want, EXACT)


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_recalled_blocks_are_those_of_an_ordinary_step(family: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, in steps that complete blocks and others, behind full histories: what is left of the
    blocks is handed from layer to layer."""
    pytest.importorskip("triton")
    if not decoding._interpreted():
        pytest.skip("kernels run here in Triton's interpreter")
    net, case = model(family, 2), CASES["actqkv"]
    ids, new = tokens(seed, 61).unsqueeze(0), tokens(seed + 2, 5).unsqueeze(0)
    with applied(net, case, case.method(history=2)) as handle:
        eager, want = steps(net, handle, ids, None, new)
        monkeypatch.setattr(decoding, "serves", lambda q, forced=False: (True, ""))
        with recording(net, handle, by=captured.record):
            cache, got = steps(net, handle, ids, None, new)
        assert cache.step is not None
    assert_close(got, want, EXACT)
    for mine, other in zip(cache.couriers(), eager.couriers(), strict=True):
        for name, x in other.mine["actqkv"].items():
            assert_close(mine.mine["actqkv"][name], x, EXACT)
    assert_close(cache.shared["actqkv"]["entropy"], eager.shared["actqkv"]["entropy"], EXACT)
