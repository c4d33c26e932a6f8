"""Latent decode and appending at device lengths, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from tests.attention.test_triton_decode import check, made, on, spoiled, truth

from foveate.attention import Partial
from foveate.errors import BadArgument

pytest.importorskip("triton")

from foveate.attention.triton.append import append
from foveate.attention.triton.decode import Stores
from foveate.attention.triton.decode_latent import decode_latent


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
