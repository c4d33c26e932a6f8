"""State: beams, tokens taken back, and caches, models and threads that do not hear of each other."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import (
    EXACT,
    assert_used,
    decode,
    forward,
    held,
    left_padded,
    prompt,
    run,
    state,
    tokens,
)
from tests.contract.subjects import CASES, Case, applied, assert_refusal, each_method, model, precise
from tests.contract.trace import same_reads, tracing

from foveate.errors import Refused


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method()
def test_beams_are_runs_of_their_own(case: Case, family: str, seed: int) -> None:
    """Rows repeated, decoded apart and reordered equal a run of each beam's own tokens."""
    net = precise(case, family)
    rows = [tokens(seed, 41), tokens(seed + 1, 73)]
    ids, mask = left_padded(rows)
    early, late = tokens(seed + 2, 4, 3), tokens(seed + 3, 4, 3)
    order = torch.tensor([1, 1, 3, 2])  # among the beams of one prompt, as beam search does
    with applied(net, case) as handle:
        cache = handle.cache()
        prompt(net, cache, ids, mask)
        single = [cache.fork(), cache.fork()]
        for b, one in enumerate(single):
            one.batch_select_indices(torch.tensor([b]))
        cache.batch_repeat_interleave(2)
        wide = mask.repeat_interleave(2, dim=0)
        decode(net, cache, early, wide)
        cache.reorder_cache(order)
        wide = torch.cat([wide, wide.new_ones(4, 3)], dim=1)
        got = decode(net, cache, late, wide)
        assert_used(net, cache, less=case.holds_less)
        for beam, parent in enumerate(order.tolist()):
            b = parent // 2
            own = single[b].fork()
            path = torch.cat([early[parent : parent + 1], late[beam : beam + 1]], dim=1)
            want = decode(net, own, path, mask[b : b + 1])
            assert_close(got[beam : beam + 1], want[:, 3:], EXACT)
            assert held(cache, beam) == held(own, 0)


@each_method()
def test_there_and_back(case: Case, seed: int) -> None:
    """A permutation of the rows and its inverse leave every tensor bitwise equal."""
    net = model(case.family)
    ids, mask = left_padded([tokens(seed + i, n) for i, n in enumerate((9, 73, 40))])
    with applied(net, case) as handle:
        cache = handle.cache()
        run(net, cache, ids, tokens(seed + 5, 3, 2), mask)
        before = state(cache)
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        turned = state(cache)
        cache.reorder_cache(order.argsort())
        after = state(cache)
    assert before.keys() == after.keys() == turned.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(
        not torch.equal(before[name], turned[name]) for name in before if before[name].shape == turned[name].shape
    )


@pytest.mark.parametrize("recording", [True, False], ids=["recording", "plain"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method()
def test_tokens_can_be_taken_back(case: Case, family: str, recording: bool, seed: int) -> None:
    """Append four, crop four: all later logits are those of a run that never had them, or the crop is refused."""
    net = precise(case, family)
    ids, then = tokens(seed, 1, 73), tokens(seed + 1, 1, 6)
    with applied(net, case) as handle:
        cache = handle.cache()
        if recording:
            cache.activate_past_recording()
        prompt(net, cache, ids)
        never = cache.fork()
        forward(net, cache, tokens(seed + 2, 1, 4))
        kept = cache.fork()
        try:
            cache.crop(-4)
        except Refused as refusal:
            assert_refusal(refusal)
            assert case.id in str(refusal)
            assert not handle.binding.croppable or not recording, "assisted decoding is promised and cannot work"
            # All or nothing: after a refusal the cache goes on as if nobody had asked.
            assert_close(decode(net, cache, then), decode(net, kept, then), EXACT)
            return
        assert cache.get_seq_length() == 73
        got, want = decode(net, cache, then), decode(net, never, then)
        assert_used(net, cache, less=case.holds_less)
        assert_close(got, want, EXACT)
        assert held(cache, 0) == held(never, 0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@each_method()
def test_recording_the_past_reads_the_same(case: Case, family: str, seed: int) -> None:
    """A cache that holds what a crop may want back (a draft's) must not read it."""
    net = model(family)
    ids, then = tokens(seed, 1, 73), tokens(seed + 1, 1, 6)
    with applied(net, case) as handle:
        if not handle.binding.croppable:
            return
        usual, recording = handle.cache(), handle.cache()
        recording.activate_past_recording()
        with tracing(79) as want:
            expected = run(net, usual, ids, then)
        with tracing(79) as got:
            found = run(net, recording, ids, then)
        assert_used(net, recording, less=case.holds_less)
    same_reads(got.pairs, want.pairs)
    if "format" not in case.cls.slots:  # nothing is packed meanwhile
        assert_close(found.steps, expected.steps, EXACT)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@each_method()
def test_single_steps_can_be_taken_back_or_not(case: Case, family: str, seed: int) -> None:
    """The same after single steps, of which each may have freed or packed something."""
    net = precise(case, family)
    ids, then = tokens(seed, 1, 73), tokens(seed + 1, 1, 6)
    with applied(net, case) as handle:
        cache = handle.cache()
        prompt(net, cache, ids)
        never = cache.fork()
        decode(net, cache, tokens(seed + 2, 1, 5))
        try:
            cache.crop(-5)
        except Refused as refusal:
            assert_refusal(refusal)
            assert case.id in str(refusal)
            return
        got, want = decode(net, cache, then), decode(net, never, then)
        assert held(cache, 0) == held(never, 0)
        # What was packed to make room for the tokens that left stays packed.
        assert_close(got, want, EXACT if "format" not in case.cls.slots else 0.1)


@each_method()
def test_two_caches_interleaved(case: Case, seed: int) -> None:
    net = model(case.family)
    ids, then = tokens(seed, 2, 61), tokens(seed + 1, 2, 6)
    with applied(net, case) as handle:
        alone = [run(net, handle.cache(), ids[b : b + 1], then[b : b + 1]) for b in (0, 1)]
        caches = [handle.cache(), handle.cache()]
        for b in (0, 1):
            caches[b].expect(61)
        for piece in (slice(0, 30), slice(30, 61)):
            for b in (0, 1):
                if case.cls.chunked == "exact":
                    forward(net, caches[b], ids[b : b + 1, piece])
        if case.cls.chunked != "exact":
            for b in (0, 1):
                prompt(net, caches[b], ids[b : b + 1])
        steps: list[list[torch.Tensor]] = [[], []]
        for i in range(then.shape[1]):
            for b in (0, 1):
                steps[b].append(forward(net, caches[b], then[b : b + 1, i : i + 1]))
    for b in (0, 1):
        assert_close(torch.cat(steps[b], dim=1), alone[b].steps, EXACT)


@each_method()
def test_threads_on_one_model(case: Case, seed: int) -> None:
    """Four threads with a cache each get what they would have got alone."""
    net = model(case.family)
    ids, then = tokens(seed, 4, 61), tokens(seed + 1, 4, 6)
    with applied(net, case) as handle:

        def work(b: int) -> torch.Tensor:
            return run(net, handle.cache(), ids[b : b + 1], then[b : b + 1]).steps

        want = [work(b) for b in range(4)]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(work, [*range(4), *range(4)]))
    for b, steps in enumerate(got):
        assert torch.equal(steps, want[b % 4])


@each_method()
def test_two_models_with_two_methods(case: Case, seed: int) -> None:
    """Another method on another model changes nothing here, and the other way round."""
    mine, other = model(case.family, seed=1), model("qwen3", seed=2)
    ids, then = tokens(seed, 1, 61), tokens(seed + 1, 1, 6)
    partner = CASES["snapkv"] if case.id != "snapkv" else CASES["dense"]
    with applied(mine, case) as handle:
        want = run(mine, handle.cache(), ids, then)
    with applied(other, partner) as handle:
        wanted = run(other, handle.cache(), ids, then)
    with applied(mine, case) as one, applied(other, partner) as two:
        first, second = one.cache(), two.cache()
        prompt(mine, first, ids)
        prompt(other, second, ids)
        steps: list[list[torch.Tensor]] = [[], []]
        for i in range(then.shape[1]):
            steps[0].append(forward(mine, first, then[:, i : i + 1]))
            steps[1].append(forward(other, second, then[:, i : i + 1]))
        assert_used(mine, first, less=case.holds_less)
    assert torch.equal(torch.cat(steps[0], dim=1), want.steps)
    assert torch.equal(torch.cat(steps[1], dim=1), wanted.steps)


@each_method()
def test_a_method_holds_no_state(case: Case, seed: int) -> None:
    """Frozen, hashable, and the same bytes before and after work."""
    method = case.method()
    before = pickle.dumps(method)
    net = model(case.family)
    with applied(net, case, method) as handle:
        run(net, handle.cache(), tokens(seed, 1, 61), tokens(seed + 1, 1, 3))
    assert pickle.dumps(method) == before
    assert hash(method) == hash(case.method())
    assert method == case.method()
    assert pickle.loads(before) == method
    with pytest.raises(AttributeError):
        method.budget = None  # type: ignore[misc]
