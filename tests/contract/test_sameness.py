"""What must not change anything: a full budget, padding, chunks, and a prompt shared by fork."""

from __future__ import annotations

import pytest
import torch
from tests.closeness import assert_close, relative_rms
from tests.contract.reach import reachable_tensors
from tests.contract.runs import (
    EXACT,
    Run,
    assert_used,
    decode,
    dense_bytes,
    held,
    left_padded,
    plain,
    prompt,
    run,
    spare_bytes,
    tokens,
)
from tests.contract.subjects import (
    CASES,
    Case,
    NotHere,
    applied,
    assert_refusal,
    each_method,
    each_subject,
    model,
    precise,
    profiles,
)
from tests.contract.trace import same_reads, tracing
from torch import nn

import foveate
from foveate.engine.binding import Binding
from foveate.errors import Refused


def agree(got: Run, want: Run, limit: float = EXACT) -> None:
    assert_close(got.prompt, want.prompt, limit)
    assert_close(got.steps, want.steps, limit)


@each_subject()
def test_full_budget_is_dense(case: Case, family: str, group: int, seed: int) -> None:
    """Prompt and 20 steps equal transformers alone."""
    net = model(family, group)
    ids, then = tokens(seed, 2, 61), tokens(seed + 1, 2, 20)
    with applied(net, case, case.whole()) as handle:
        cache = handle.cache()
        agree(run(net, cache, ids, then), plain(net, ids, then))
        assert_used(net, cache, less=False)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method()
def test_full_budget_is_dense_in_bfloat16(case: Case, family: str, seed: int) -> None:
    """As close to transformers' own SDPA as its eager attention is."""
    net = model(family, dtype=torch.bfloat16)
    ids, then = tokens(seed, 2, 61), tokens(seed + 1, 2, 20)
    stock = plain(net, ids, then)
    floor = noise(net, ids, then, stock)
    with applied(net, case, case.whole()) as handle:
        cache = handle.cache()
        got = run(net, cache, ids, then)
        assert_used(net, cache, less=False)
    assert floor > 1e-4, "bfloat16 without noise measures nothing"
    agree(got, stock, 2 * floor)


def noise(net: nn.Module, ids: torch.Tensor, then: torch.Tensor, stock: Run) -> float:
    """Relative RMS between two of transformers' own implementations of the same attention."""
    net.set_attn_implementation("eager")
    try:
        eager = plain(net, ids, then)
    finally:
        net.set_attn_implementation("sdpa")
    return max(relative_rms(eager.prompt, stock.prompt), relative_rms(eager.steps, stock.steps))


@each_method()
def test_small_settings_act(case: Case, seed: int) -> None:
    """The small settings change the output, so that no test with them is empty; or where tokens lie, and no output."""
    if not case.cls.slots:
        return  # it says that it changes nothing
    net, ids, then = model(case.family), tokens(seed, 1, 101), tokens(seed + 1, 1, 8)
    with applied(net, case) as handle:
        cache = handle.cache()
        got = run(net, cache, ids, then)
        assert_used(net, cache, less=case.holds_less)
    want = plain(net, ids, then)
    if case.cls.lossless:
        agree(got, want)
        assert cache.nbytes < dense_bytes(net, cache)
        return
    assert max(relative_rms(got.prompt, want.prompt), relative_rms(got.steps, want.steps)) > 1e-3


@each_subject()
def test_padding_is_invisible(case: Case, family: str, group: int, seed: int) -> None:
    """A left-padded batch is its rows run alone: the same reads, the same tokens held, logits but for rounding."""
    net = precise(case, family, group)
    rows = [tokens(seed + i, n) for i, n in enumerate((1, 7, 41, 101))]
    ids, mask = left_padded(rows)
    then = tokens(seed + 9, len(rows), 6)
    with applied(net, case) as handle:
        batch = handle.cache()
        with tracing(110) as together:
            got = run(net, batch, ids, then, mask)
        assert_used(net, batch, less=case.holds_less)
        for b, row in enumerate(rows):
            single = handle.cache()
            handle.binding.plan_cache(single, ids.shape[1])  # what a batch reads and holds is planned for its longest
            with tracing(110) as alone:
                want = run(net, single, row[None], then[b : b + 1])
            same_reads({i: pairs[b : b + 1] for i, pairs in together.pairs.items()}, alone.pairs)
            assert held(batch, b) == held(single, 0)
            agree(Run(got.prompt[b : b + 1, -len(row) :], got.steps[b : b + 1]), want)


@each_method(chunked="exact")
def test_a_chunk_of_padding_alone_is_invisible(case: Case, seed: int) -> None:
    """The short row has no token at all in the first chunks."""
    net = precise(case)
    rows = [tokens(seed, 5), tokens(seed + 1, 61)]
    ids, mask = left_padded(rows)
    then = tokens(seed + 9, 2, 6)
    with applied(net, case) as handle:
        whole, pieces = handle.cache(), handle.cache()
        want = run(net, whole, ids, then, mask)
        got = run(net, pieces, ids, then, mask, chunk=16)
        assert_used(net, pieces, less=case.holds_less)
        real = mask.bool()
        assert_close(got.prompt[real], want.prompt[real], EXACT)
        assert_close(got.steps, want.steps, EXACT)
        assert [held(pieces, b) for b in (0, 1)] == [held(whole, b) for b in (0, 1)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method()
def test_chunks(case: Case, family: str, seed: int) -> None:
    """A prompt in pieces is the prompt, where the method promises that."""
    net = precise(case, family)
    ids, then = tokens(seed, 1, 43), tokens(seed + 1, 1, 6)
    with applied(net, case) as handle:
        whole = handle.cache()
        with tracing(49) as at_once:
            want = run(net, whole, ids, then)
        for size in (1, 3, 16):
            cache = handle.cache()
            with tracing(49) as piecewise:
                got = run(net, cache, ids, then, chunk=size)
            assert_used(net, cache, less=case.holds_less)
            if case.cls.chunked == "exact":
                agree(got, want)
                same_reads(piecewise.pairs, at_once.pairs)
                assert held(cache, 0) == held(whole, 0)
            else:
                assert got.steps.isfinite().all()
                assert cache.nbytes <= whole.nbytes + spare_bytes(net, cache)


def shared_prompt(handle: foveate.Handle, binding: Binding) -> Binding:
    """A dense binding that captures what the other one needs from a prompt."""
    return Binding(handle.model, foveate.compose("dense"), {}, handle, capture=binding.prompt_needs)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method()
def test_a_shared_prompt_is_an_own_prompt(case: Case, family: str, chunk: int | None, seed: int) -> None:
    """Sealing a fork of a dense prompt equals a run of one's own; the original stays what it was."""
    net = precise(case, family)
    ids, mask = left_padded([tokens(seed, 33), tokens(seed + 2, 61)])
    then = tokens(seed + 1, 2, 6)
    with applied(net, CASES["dense"]) as handle:
        binding = bound(handle, case)
        source = shared_prompt(handle, binding).cache()
        first = prompt(net, source, ids, mask, chunk)
        if not binding.shares_prefill:
            with pytest.raises(Refused) as refusal:
                source.fork(binding)
            assert_refusal(refusal.value)
            return
        before = [t.clone() for t in reachable_tensors(source, beyond=(Binding, nn.Module))]
        fork = source.fork(binding)
        got = Run(first, decode(net, fork, then, mask))
        after = list(reachable_tensors(source, beyond=(Binding, nn.Module)))
        assert len(before) == len(after)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        own = binding.cache()
        want = run(net, own, ids, then, mask, chunk)
        real = mask.bool()
        assert_close(got.prompt[real], want.prompt[real], EXACT)
        assert_close(got.steps, want.steps, EXACT)
        assert [held(fork, b) for b in (0, 1)] == [held(own, b) for b in (0, 1)]
        assert_used(net, fork, less=case.holds_less)


def bound(handle: foveate.Handle, case: Case) -> Binding:
    """The case's method beside the one that is applied."""
    try:
        return handle.bind(case.method(), profile=profiles(case, handle.model))
    except Refused as error:
        assert_refusal(error)
        raise NotHere from error


@each_method()
def test_a_fork_goes_its_own_way(case: Case, seed: int) -> None:
    """Decoding on a copy changes nothing in the original, and both go on as if alone."""
    net, ids = precise(case), tokens(seed, 1, 61)
    left, right = tokens(seed + 1, 1, 5), tokens(seed + 2, 1, 5)
    with applied(net, case) as handle:
        cache = handle.cache()
        prompt(net, cache, ids)
        copy = cache.fork()
        away = decode(net, copy, left)
        stayed = decode(net, cache, right)
        for got, then in ((away, left), (stayed, right)):
            assert_close(got, run(net, handle.cache(), ids, then).steps, EXACT)
