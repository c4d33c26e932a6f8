"""Latent decode and appending at device lengths, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import (
    DEVICE,
    _poison,  # noqa: F401  (a fixture: what is allocated and not written is NaN)
    check,
    made,
    on,
    spoiled,
    truth,
)
from torch import Tensor

from foveate.attention import Partial
from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton.append import append
from foveate.attention.triton.decode import Stores
from foveate.attention.triton.decode_latent import decode_latent, merge, overlapped, overlaps

HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize(
    ("heads", "size", "lengths", "dtype"),
    [
        (1, (32, 16), [0, 90, 65], torch.float32),
        (16, (512, 64), [0, 90, 65], torch.bfloat16),
        (20, (48, 16), [7, 90], torch.float16),
        (70, (64, 32), [67], torch.float32),
    ],
)
def test_latent(seed: int, heads: int, size: tuple[int, int], lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    held, dim = torch.tensor(lengths, dtype=torch.int32), sum(size)
    q, c = made(dtype, len(lengths), heads, 1, dim, factor=2), made(dtype, len(lengths), 90, dim)
    want = truth(q, c, c[..., : size[0]], held, scale=0.2)
    q, c, held = on(q, spoiled(c, held), held)
    check(decode_latent(q, c, held, 0.2, size[0]), want, dtype)


def test_slices_of_the_values_stand_side_by_side(seed: int) -> None:
    torch.manual_seed(seed)
    held = torch.tensor([70, 33], dtype=torch.int32)
    q, c = made(torch.float32, 2, 8, 2, 80), made(torch.float32, 2, 75, 80)
    want = truth(q, c, c[..., :64], held, scale=0.3)
    q, c, held = on(q, spoiled(c, held), held)
    parts = [decode_latent(q, c, held, 0.3, 32, first=first) for first in (0, 32)]
    assert torch.equal(parts[0][1], parts[1][1])
    check((torch.cat([out for out, _ in parts], dim=-1), parts[0][1]), want, torch.float32)


def test_latent_refusals() -> None:
    q, c, held = torch.zeros(1, 4, 1, 80), torch.zeros(1, 40, 80), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(BadArgument, match="multiple of 8"):
        decode_latent(q, c, held, 1.0, 32, first=3)
    with pytest.raises(BadArgument, match="of c"):
        decode_latent(q, c, held, 1.0, 81)


def pieces(q: Tensor, c: Tensor, held: Tensor, scale: float, dim: int, workers: int, block: int) -> list[Tensor]:
    """What the workers leave of an even split: outputs and log-masses in base 2, NaN where nobody writes."""
    units, rows = len(held), q.shape[1] * q.shape[2]
    part, weight = torch.full((workers + units, rows, dim), torch.nan), torch.full((workers + units, rows), torch.nan)
    blocks = [-(-int(n) // block) for n in held]
    for worker in range(workers):
        at, end = (w * sum(blocks) // workers for w in (worker, worker + 1))
        for unit in range(units):
            before = sum(blocks[:unit])
            first, last = (min(max(x - before, 0), blocks[unit]) * block for x in (at, end))
            seen = c[unit, first : min(last, int(held[unit]))].double()
            if last > first:
                s = q[unit].double().flatten(0, 1) @ seen.T * scale
                part[worker + unit] = (s.softmax(-1) @ seen[:, :dim]).float()
                weight[worker + unit] = (s.logsumexp(-1) / torch.tensor(2.0).log()).float()
    return [part, weight]


@pytest.mark.parametrize(("workers", "lengths"), [(1, [40, 3]), (5, [0, 90, 65]), (70, [1, 0, 300]), (3, [0, 0])])
@pytest.mark.parametrize("dim", [16, 160])
def test_what_workers_found_is_merged(seed: int, workers: int, lengths: list[int], dim: int) -> None:
    torch.manual_seed(seed)
    held, size = torch.tensor(lengths, dtype=torch.int32), max(*lengths, 1)
    q, c = made(torch.float32, len(lengths), 3, 1, dim + 8), made(torch.float32, len(lengths), size, dim + 8)
    want = truth(q, c, c[..., :dim], held, scale=0.3)
    q, held, part, weight = on(q, held, *pieces(q, c, held, 0.3, dim, workers, 8))
    check(merge(q, part, weight, held, None, None, workers, 8), want, torch.float32)


def test_merging_knows_pairs_and_sinks(seed: int) -> None:
    torch.manual_seed(seed)
    held, sinks = torch.tensor([30, 7], dtype=torch.int32), torch.tensor([0.5, -1.0, 2.0])
    q, c = made(torch.float32, 2, 3, 1, 24), made(torch.float32, 2, 30, 24)
    want = truth(q, c, c[..., :16], held, scale=0.3)
    found = pieces(q, c, held, 0.3, 16, 4, 8)
    q, held, pairs, logits, part, weight = on(q, held, torch.tensor([1, 0], dtype=torch.int32), sinks, *found)
    out, lse = (x.cpu().flip(0) for x in merge(q, part, weight, held, pairs, logits, 4, 8))
    mass = torch.logaddexp(want.lse, sinks.double()[None, :, None])
    torch.testing.assert_close(lse.double(), mass, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.double(), want.out * (want.lse - mass).exp().unsqueeze(-1), atol=1e-5, rtol=0)


@pytest.mark.skipif(not HOPPER, reason="the kernel for many heads is written for Hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "queries", "lengths"),
    [(128, 1, [0, 1, 777, 1024]), (128, 1, [8999, 64, 130]), (80, 1, [65]), (35, 2, [1, 1025, 777]), (40, 3, [2, 130])],
)
def test_many_heads(seed: int, heads: int, queries: int, lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    held, room = torch.tensor(lengths, dtype=torch.int32), max(lengths) + 77
    q, c = made(dtype, len(lengths), heads, queries, 576), made(dtype, len(lengths), room, 576)
    want = truth(q, c, c[..., :512], held, scale=0.07)
    q, c, held = on(q, spoiled(c, held), held)
    check(overlapped(q, Stores(c, c[..., :512], held), 0.07, None), want, dtype)


@pytest.mark.skipif(not HOPPER, reason="the kernel for many heads is written for Hopper")
def test_many_heads_in_a_buffer_with_room(seed: int) -> None:
    """By pairs in another order, in a buffer with room behind each row, and captured."""
    torch.manual_seed(seed)
    held = torch.tensor([16301, 5], dtype=torch.int32)
    q, c = made(torch.bfloat16, 2, 128, 1, 576), made(torch.bfloat16, 2, 16384, 576)
    want = truth(q, c, c[..., :512], held, scale=0.07)
    turned, c, held = on(q.flip(0), spoiled(c, held), held)
    pairs = on(torch.tensor([1, 0], dtype=torch.int32))[0]
    stores = Stores(c, c[..., :512], held, None, pairs)
    overlapped(turned, stores, 0.07, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = overlapped(turned, stores, 0.07, None)
    graph.replay()
    check((out.flip(0), lse.flip(0)), want, torch.bfloat16)


def test_why_the_kernel_for_many_heads_does_not_serve() -> None:
    def why(rows: int, room: int, dtype: torch.dtype, size: int = 576, softcap: float | None = None) -> str:
        q, c = torch.empty(4, rows, 1, size, dtype=dtype), torch.empty(4, 1, size, dtype=dtype).expand(4, room, size)
        stores = Stores(c, c[..., : size - 64], torch.empty(4, dtype=torch.int32))
        serves, reason = overlaps(q, stores, 1.0, softcap)
        assert not serves
        return reason

    assert "576 channels" in why(128, 8192, torch.bfloat16, 320)
    assert "63 query rows" in why(63, 8192, torch.bfloat16)
    assert "4 x 2,047 tokens" in why(128, 2047, torch.bfloat16)
    assert "half precision" in why(128, 8192, torch.float32)
    assert "softcap" in why(128, 8192, torch.float16, softcap=30.0)
    assert "one grid" in why(128, 8192, torch.float16)


@pytest.mark.parametrize("queries", [1, 3])
def test_append_writes_behind_the_lengths(seed: int, queries: int) -> None:
    torch.manual_seed(seed)
    lengths = torch.tensor([0, 5, 20 - queries, 3], dtype=torch.int32)
    k, v = made(torch.bfloat16, 4, 20, 24), made(torch.bfloat16, 4, 20, 40)
    k_new, v_new = made(torch.bfloat16, 2, 2, queries, 24), made(torch.bfloat16, 2, 2, queries, 40)
    want_k, want_v = k.clone(), v.clone()
    for p, n in enumerate(lengths.tolist()):
        want_k[p, n : n + queries] = k_new.flatten(0, 1)[p]
        want_v[p, n : n + queries] = v_new.flatten(0, 1)[p]
    k, v, held, k_new, v_new = on(k, v, lengths.clone(), k_new, v_new)
    append(k_new, v_new, Stores(k, v, held), advance=True)
    assert torch.equal(k.cpu(), want_k) and torch.equal(v.cpu(), want_v)
    assert torch.equal(held.cpu(), lengths + queries)


def test_append_to_named_slots_of_several_bands(seed: int) -> None:
    torch.manual_seed(seed)
    bands = [tuple(on(torch.zeros(2, size, 16), torch.zeros(2, size, 16))) for size in (9, 6)]
    numbers = on(torch.tensor([3, 0]), torch.tensor([1, 2]))
    held = on(torch.tensor([8, 2, 5, 0], dtype=torch.int32))[0]
    stores = Stores.of([(k, v, pairs) for (k, v), pairs in zip(bands, numbers, strict=True)], held)
    new = on(torch.arange(1.0, 5).view(2, 2, 1, 1).expand(2, 2, 1, 16).contiguous())[0]
    slots = on(torch.tensor([0, 2, 4, 1], dtype=torch.int32))[0]
    append(new, -new, stores, slots=slots, capacity=6)
    first, second = (k[..., 0].cpu() for k, _ in bands)
    assert first.nonzero().tolist() == [[0, 0], [1, 2]] and [first[0, 0], first[1, 2]] == [4, 1]
    assert second.nonzero().tolist() == [[0, 4], [1, 1]] and [second[0, 4], second[1, 1]] == [2, 3]
    assert torch.equal(bands[0][1], -bands[0][0])
    assert held.tolist() == [8, 2, 5, 0]


def test_append_keeps_off_what_lies_behind_the_capacity() -> None:
    memory = on(torch.zeros(3, 4, 16))[0]
    held = on(torch.tensor([4, 3], dtype=torch.int32))[0]
    stores = Stores(memory[:2], memory[:2], held)
    append(on(torch.ones(2, 2, 16))[0], None, stores, advance=True)
    assert memory.cpu().nonzero()[:, :2].unique(dim=0).tolist() == [[1, 3]]
    assert held.tolist() == [4, 4]


def test_append_refusals() -> None:
    stores = Stores(torch.zeros(2, 4, 16), torch.zeros(2, 4, 16), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(BadArgument, match="k_new"):
        append(torch.zeros(3, 1, 16), None, stores)
    with pytest.raises(BadArgument, match="slots"):
        append(torch.zeros(2, 1, 16), None, stores, slots=torch.zeros(2))


def test_the_truth_itself() -> None:
    """A row that holds nothing gives 0 and -inf."""
    got = truth(torch.ones(1, 1, 1, 8), torch.ones(1, 4, 8), torch.ones(1, 4, 8), torch.tensor([0]))
    assert isinstance(got, Partial) and got.lse.isinf().all() and not got.out.any()
