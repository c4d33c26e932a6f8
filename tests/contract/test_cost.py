"""Cost: what is held and read is what is reported, within the budget, and nothing else is touched."""

from __future__ import annotations

import math

import pytest
import torch
from tests.closeness import assert_close, relative_rms
from tests.contract.reach import reachable_bytes
from tests.contract.runs import (
    EXACT,
    assert_used,
    decode,
    dense_bytes,
    forward,
    held,
    left_padded,
    prompt,
    run,
    spare_bytes,
    tokens,
)
from tests.contract.subjects import Case, applied, each_method, each_subject, model, profiles
from tests.contract.test_time import LENGTH, as_list, selecting
from tests.contract.trace import Reads, tracing
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

import foveate
from foveate.attention import Selection
from foveate.cache import Column, FoveateCache, StoreSpec
from foveate.cache.transform import Transform
from foveate.engine.binding import Binding
from foveate.errors import Infeasible
from foveate.methods import Method
from foveate.models.shape import ModelShape

READS = frozenset({"prefill", "decode"})


def alive(cache: FoveateCache) -> int:
    """Bytes behind a cache. Plans (spans of a layer's heads, bases of a side) are the binding's, shared by caches."""
    return reachable_bytes(cache, beyond=(Binding, nn.Module, StoreSpec, foveate.attention.Span, Transform))


@each_subject()
def test_every_live_byte_is_counted(case: Case, family: str, group: int, seed: int) -> None:
    """Inside a chunked prompt, at its end, and behind it; the peak is never below what is held."""
    net = model(family, group)
    rows = [tokens(seed + i, n) for i, n in enumerate((9, 61))]
    ids, mask = left_padded(rows)
    with applied(net, case) as handle:
        cache = handle.cache()
        cache.expect(61)
        for stop in (32, 61):
            forward(net, cache, ids[:, (stop - 1) // 32 * 32 : stop], mask[:, :stop])
            assert cache.nbytes + cache.host_nbytes == alive(cache)
        for i in range(5):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            forward(net, cache, tokens(seed + i, 2, 1), mask)
            assert cache.nbytes + cache.host_nbytes == alive(cache)
            assert cache.peak_nbytes >= cache.nbytes - 64  # bytes of the cache itself, which no layer holds
        assert_used(net, cache, less=case.holds_less)
        copy = cache.fork()
        assert copy.nbytes + copy.host_nbytes == alive(copy)


def budgets_of(case: Case, net: nn.Module, length: int) -> list[float]:
    """A few shares between the method's floor and everything."""
    with applied(net, case) as handle:
        floor = floor_of(handle, case, length)
    return [floor + (1 - floor) * x for x in (0.1, 0.35, 0.7)]


def floor_of(handle: foveate.Handle, case: Case, length: int) -> float:
    """The smallest share at a length. Binding asks for what any length could meet, so it refuses first."""
    budget, profile = 1e-6, profiles(case, handle.model)
    for _ in range(2):
        with pytest.raises(Infeasible) as refusal:
            handle.bind(case.method(budget=budget), profile=profile).check(length)
        assert "\n" not in str(refusal.value)
        assert case.id in str(refusal.value)
        floor = refusal.value.floor
        assert budget < floor < 1
        budget = math.nextafter(floor, 1)
        try:
            handle.bind(case.method(budget=budget), profile=profile).check(length)
        except Infeasible:
            continue
        return floor
    raise AssertionError(f"{case.id} refuses the floor that it names: {budget}")


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method(budgeted=True)
def test_held_share_is_within_the_budget(case: Case, family: str, seed: int) -> None:
    """A steady cache holds its share of the dense one, and at most one block of spare slots per head."""
    net = model(family)
    if not case.holds_less:
        return  # its budget is one of reads
    ids = tokens(seed, 2, 151)
    for share in budgets_of(case, net, 151):
        with applied(net, case, case.method(budget=share)) as handle:
            cache = handle.cache()
            prompt(net, cache, ids)
            granted = share * dense_bytes(net, cache) + spare_bytes(net, cache)
            assert cache.nbytes <= granted, f"budget {share:.3f}: {cache.nbytes} of {granted:.0f} bytes"
            assert_used(net, cache, less=share < 0.5)


def dense_pairs(net: nn.Module, first: int, last: int, rows: int = 1) -> int:
    """Pairs that dense attention reads for queries first..last-1."""
    total = 0
    for layer in ModelShape.of(net).layers:
        total += layer.num_heads * sum(min(i + 1, layer.window or i + 1) for i in range(first, last))
    return total * rows


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method(budgeted=True)
def test_read_share_is_within_the_budget(case: Case, family: str, seed: int) -> None:
    """Decode reads its share of the dense pairs, and at most one block more per list."""
    net = model(family)
    if "decode" not in case.method().fills:
        return
    ids, then = tokens(seed, 1, 151), tokens(seed + 1, 1, 4)
    for share in budgets_of(case, net, 151):
        with applied(net, case, case.method(budget=share)) as handle:
            cache = handle.cache()
            prompt(net, cache, ids)
            blocks: list[int] = []

            def note(original, method, q, view, ctx, blocks=blocks):
                parts = original(method, q, view, ctx)
                for part in as_list(parts):
                    if isinstance(part, Selection) and part.lists is not None:
                        blocks.append(part.k_block * q.shape[0] * q.shape[1] * q.shape[2])
                return parts

            cache.meter = {}
            with selecting(case, note):
                decode(net, cache, then)
            read, dense = cache.meter["decode_read"], dense_pairs(net, 151, 155)
            # The share was planned for the prompt's length; each of the 4 tokens behind it adds at most itself.
            slack = sum(blocks) + 4 * sum(layer.num_heads for layer in ModelShape.of(net).layers)
            assert read <= share * dense + slack, f"budget {share:.3f}: {read:.0f} of {dense} pairs"
            assert read < dense or share > 0.9


@each_subject()
def test_reported_pairs_are_the_pairs_read(case: Case, family: str, group: int, seed: int) -> None:
    """The meter against every part expanded by its definition, in a padded batch and in both phases."""
    net = model(family, group)
    ids, mask = left_padded([tokens(seed, 20), tokens(seed + 1, 61)])
    with applied(net, case) as handle:
        cache = handle.cache()
        cache.meter = {}
        with tracing(70) as trace:
            run(net, cache, ids, tokens(seed + 2, 2, 4), mask)
    assert cache.meter.get("prompt_read", 0) == trace.counts["prompt"] > 0
    assert cache.meter.get("decode_read", 0) == trace.counts["decode"] > 0


@each_subject()
def test_the_reads_are_the_whole_truth(case: Case, family: str, group: int, seed: int) -> None:
    """Transformers' dense forward under a mask of the recorded pairs gives the same logits, prompt and decode."""
    net = model(family, group)
    ids, then = tokens(seed, 1, LENGTH), tokens(seed + 1, 1, 5)
    method = case.whole() if {"format", "weights"} & case.cls.slots else case.method()  # else it is not all there is
    with applied(net, case, method) as handle:
        cache = handle.cache()
        with tracing(LENGTH + 5) as trace:
            got = run(net, cache, ids, then)
    want = under_mask(net, torch.cat([ids, then], dim=1), trace.pairs)
    if trace.framed:  # what is read is not all there is to such a read: where it stands is
        assert relative_rms(got.prompt, want[:, :LENGTH]) < 1
        return
    assert_close(got.prompt, want[:, :LENGTH], EXACT)
    assert_close(got.steps, want[:, LENGTH:], EXACT)


def under_mask(net: nn.Module, ids: torch.Tensor, pairs: Reads) -> torch.Tensor:
    """Logits of one dense forward in which layer i reads pairs[i] alone."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        scores = (query @ key.transpose(-1, -2)) * scaling
        weights = scores.masked_fill(~pairs[module.layer_idx], -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_pairs", attention)
    AttentionMaskInterface.register("by_pairs", lambda *args, **kwargs: None)
    net.set_attn_implementation("by_pairs")
    try:
        with torch.no_grad():
            return net(ids, use_cache=False).logits
    finally:
        net.set_attn_implementation("sdpa")


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method()
def test_unread_slots_may_hold_anything(case: Case, family: str, seed: int) -> None:
    """With NaN in every held slot that no query reads, a decode step is finite and equal: skipped is not masked."""
    net = model(family)
    ids, then = tokens(seed, 2, LENGTH), tokens(seed + 1, 2, 1)
    taken: list = []

    def record(original, method: Method, q, view, ctx):
        taken.append(original(method, q, view, ctx))
        return taken[-1]

    with applied(net, case) as handle:
        clean = handle.cache()
        run(net, clean, ids, tokens(seed + 2, 2, 1))  # some look at everything in their first step
        poisoned = clean.fork()
        with tracing(LENGTH + 2) as trace, selecting(case, record):
            want = decode(net, clean, then)
        spoilt = 0
        for layer in poisoned.couriers():
            pairs = trace.pairs[layer.index][:, :, LENGTH + 1]  # [B, H, T]
            spoilt += poison_unread(layer, pairs)
        # What is read was chosen already: looking for it may look at everything.
        with selecting(case, lambda original, method, q, view, ctx: taken.pop(0)):
            got = decode(net, poisoned, then)
    assert torch.equal(got, want)
    # Who fills `weights` may change what is read instead of leaving it out.
    skips = "decode" in case.method().fills and "weights" not in case.cls.slots and not case.holds_less
    assert (spoilt > 0) == skips, f"{spoilt} held slots are not read"


def poison_unread(layer, pairs: torch.Tensor) -> int:
    """NaN in the keys and values of held slots that none of a store head's query heads reads."""
    heads = layer.store.spec.heads
    group = pairs.shape[1] // heads
    count = 0
    for band in layer.store.bands:
        positions = band.slot_positions().long()
        for i, pair in enumerate(band.pairs):
            row, head = divmod(int(pair), heads)
            length = int(band.lengths[i])
            read = pairs[row, head * group : (head + 1) * group].any(0)[positions[i, :length]]
            dead = (~read).nonzero().squeeze(-1)
            for column in (band.k, band.v):
                if isinstance(column, Column):
                    column.data[i, dead] = torch.nan
            count += len(dead)
    return count


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method()
def test_freed_slots_may_hold_anything(case: Case, family: str, seed: int) -> None:
    """Spare slots behind the longest head hold NaN, those beside longer heads hold huge numbers."""
    net = model(family)
    ids, mask = left_padded([tokens(seed, 30), tokens(seed + 1, LENGTH)])
    then = tokens(seed + 2, 2, 4)
    with applied(net, case) as handle:
        cache = handle.cache()
        prompt(net, cache, ids, mask)
        want = decode(net, cache.fork(), then, mask)
        for layer in cache.couriers():
            for band in layer.store.bands:
                for column in (band.k, band.v):
                    if isinstance(column, Column):
                        for i, length in enumerate(band.lengths):
                            column.data[i, int(length) : band.used] = 1e4
                        column.data[:, band.used :] = torch.nan
        got = decode(net, cache, then, mask)
    assert_close(got, want, EXACT)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method(budgeted=True)
def test_below_the_floor_is_infeasible(case: Case, family: str, seed: int) -> None:
    """Too small a budget is refused with the floor; at the floor it runs, just below it does not."""
    net = model(family)
    with applied(net, case) as handle:
        profile = profiles(case, net)
        floor = floor_of(handle, case, 151)
        binding = handle.bind(case.method(budget=math.nextafter(floor, 1)), profile=profile)
        cache = binding.cache()
        assert run(net, cache, tokens(seed, 1, 151), tokens(seed + 1, 1, 3)).steps.isfinite().all()
        assert_used(net, cache, less=case.holds_less)
        with pytest.raises(Infeasible) as again:
            handle.bind(case.method(budget=floor * 0.98), profile=profile).check(151)
        assert again.value.floor <= floor * (1 + 1e-9)


@each_method(budgeted=True, nested=True)
def test_more_budget_never_means_less(case: Case, seed: int) -> None:
    """What is held, and what the first sparse layer of the first sparse step reads, grows with the budget."""
    if case.method().fills == {"format"}:
        return  # every token is held and read, in more bits
    net = model(case.family)
    ids, then = tokens(seed, 1, 151), tokens(seed + 1, 1, 2)
    sets: list[set] = []
    for share in budgets_of(case, net, 151):
        with applied(net, case, case.method(budget=share)) as handle:
            cache = handle.cache()
            prompt(net, cache, ids)
            chosen: set = {
                (layer, head, p)
                for layer, heads in enumerate(held(cache, 0))
                for head, kept in enumerate(heads)
                for p in kept
            }
            if "prefill" in case.method().fills and case.holds_less:
                # Layers behind one that left something out see another prompt.
                first = min(layer for layer, heads in enumerate(held(cache, 0)) if any(len(x) < 151 for x in heads))
                chosen = {at for at in chosen if at[0] <= first}
            if not case.holds_less:
                inside = "decode" not in case.method().fills
                with tracing(153) as trace:
                    prompt(net, handle.cache(), ids) if inside else decode(net, cache, then)
                times = range(151) if inside else (151, 152)
                reads = {(t, i): pairs[0, :, t, : t + 1] for t in times for i, pairs in trace.pairs.items()}
                if inside:  # layers behind the first sparse one see another prompt
                    first = min(i for (_, i), read in reads.items() if not read.all())
                    chosen = {(t, *x) for t in times for x in map(tuple, reads[t, first].nonzero().tolist())}
                else:
                    chosen = {
                        tuple(x) for x in reads[min(at for at in reads if not reads[at].all())].nonzero().tolist()
                    }
            sets.append(chosen)
    assert sets[0] <= sets[1] <= sets[2]
    assert sets[0] < sets[2]
