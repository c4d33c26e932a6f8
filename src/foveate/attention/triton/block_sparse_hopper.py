"""Block-sparse attention for Hopper: one group of warps fetches, two multiply, and their softmaxes run under products.

Triton waits for all matrix products before a softmax, and a program starts to fetch when it starts. Here programs stay
and take tile after tile; the fetching group is ahead of the others, across tiles too. Each of the two other groups has
64 of the 128 query rows of a tile. Scores of the next keys are under way while values of the last ones are added up,
and the groups take turns, so that one multiplies while the other one exponentiates (the schedule of FlashAttention-3,
2407.08608, sections 3.1 and 3.2). 128 keys a step, of one listed block or of several. For the plain case: tiles of 128
rows, bottom-right causality, no span, no softcap.
"""

# Kernels are compiled from this text; what their functions return outside of it is nobody's concern.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from foveate.attention.triton.block_sparse_tiles import Tiles, Tiling
from foveate.attention.triton.workers import multiprocessors

jit: Any = gluon.jit

ROWS = 128
"""Query rows of a tile."""
COLUMNS = 128
"""Keys of a step."""

# Barriers: keys and values of two steps each, queries of two tiles, and whose turn it is. Whoever frees is two groups.
_K_HERE = gl.constexpr(0)
_K_FREE = gl.constexpr(2)
_V_HERE = gl.constexpr(4)
_V_FREE = gl.constexpr(6)
_Q_HERE = gl.constexpr(8)
_Q_FREE = gl.constexpr(10)
_TURN = gl.constexpr(12)
_BARRIERS = gl.constexpr(14)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    places: Tiles,
    out: Tensor,
    lse: Tensor,
    q_block: int,
    k_block: int,
    how: Tiling,
    factor: float,
) -> None:
    """The kernel over tiles that were found before (see `block_sparse.forward`); factor: scale times log2(e)."""
    dim = q.shape[3]
    piece, q_piece = min(k_block, COLUMNS), min(how.rows, ROWS // 2)

    def pieces(x: Tensor, rows: int) -> TensorDescriptor:
        # 64 channels are what lies side by side in shared memory.
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, 64], gl.bfloat16)
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, 64], layout)

    items = places.order.numel()
    programs = min(items, multiprocessors(q.device))
    _attend[(programs,)](
        pieces(q, q_piece), pieces(k, piece), pieces(v, piece), pieces(out, q_piece), lse, lists, places.full,
        places.stop, places.order, *(lists.stride(i) if lists.shape[i] > 1 else 0 for i in range(3)),
        q.shape[2], k.shape[2], places.order.shape[1], -(-q.shape[2] // how.rows), items, programs, factor, k.shape[1],
        GROUP=q.shape[1] // k.shape[1], LIST_GROUP=q.shape[1] // lists.shape[1], Q_BLOCK=q_block, K_BLOCK=k_block,
        ROWS=how.rows, Q_PIECE=q_piece, PIECE=piece, D=dim, num_warps=4,
    )  # fmt: skip


@jit
def _item(number, items, worker, programs, order, count):
    """The tile that a program takes as its one of this number: forth and back along the tiles, the heaviest of which
    come first. Beyond the last one, the last one."""
    at = number * programs + gl.where(number % 2 == 0, worker, programs - 1 - worker)
    here = at < items
    at = gl.minimum(at, items - 1)
    segment = at // count
    return here, segment, gl.load(order + at)


@jit
def _place(segment, index, across, k_heads, GROUP: gl.constexpr, ROWS: gl.constexpr):
    """Row of the batch, head of the store, first query head and first query of a tile."""
    b = segment // k_heads
    h = segment % k_heads
    return b, h, h * GROUP + index // across * (128 // ROWS), index % across * ROWS


@jit
def _list(lists, b, head, row, sb, sh, sq, LIST_GROUP: gl.constexpr, Q_BLOCK: gl.constexpr):
    wide = b.to(gl.int64) * sb
    return lists + wide + (head // LIST_GROUP).to(gl.int64) * sh + (row // Q_BLOCK).to(gl.int64) * sq


@jit
def _steps(stop, K_BLOCK: gl.constexpr):
    """Steps of 128 keys, the last of which may be filled in part; one at least."""
    if K_BLOCK >= 128:
        return gl.maximum(stop * (K_BLOCK // 128), 1)
    else:
        return gl.maximum((stop + 1) // 2, 1)


@jit
def _whole(full, K_BLOCK: gl.constexpr):
    """Steps that need no mask."""
    if K_BLOCK >= 128:
        return full * (K_BLOCK // 128)
    else:
        return full // 2


@jit
def _starts(base, t, stop, K_BLOCK: gl.constexpr):
    """First slots of both halves of step t of a list; beyond all slots where nothing is listed."""
    if K_BLOCK >= 128:
        entry = t // (K_BLOCK // 128)
        block = gl.load(base + entry, mask=entry < stop, other=0)
        start = gl.where(entry < stop, block * K_BLOCK + t % (K_BLOCK // 128) * 128, 1 << 30)
        return start, start + 64
    else:
        first = gl.load(base + t * 2, mask=t * 2 < stop, other=1 << 24)
        return first * 64, gl.load(base + t * 2 + 1, mask=t * 2 + 1 < stop, other=1 << 24) * 64


@jit
def _fetch_step(desc, rooms, bars, HERE: gl.constexpr, b, h, first, second, u, PIECE: gl.constexpr, D: gl.constexpr):
    """Keys or values of the step that is the program's one of number u: zeros where nothing is listed."""
    COUNT: gl.constexpr = 128 // PIECE
    stage = u % 2
    here = bars.index(HERE + stage)
    mbarrier.wait(bars.index(HERE + 2 + stage), (u // 2 + 1) & 1)
    mbarrier.expect(here, 128 * D * 2)
    for c in gl.static_range(D // 64):
        room = (stage * (D // 64) + c) * COUNT
        tma.async_copy_global_to_shared(desc, [b, h, first, c * 64], here, rooms.index(room))
        if COUNT == 2:
            tma.async_copy_global_to_shared(desc, [b, h, second, c * 64], here, rooms.index(room + 1))


@jit
def _fetch(
    q_desc, k_desc, v_desc, q_rooms, k_rooms, v_rooms, bars, lists, stop_ptr, order, sb, sh, sq, count, across, items,
    programs, k_heads, GROUP: gl.constexpr, LIST_GROUP: gl.constexpr, Q_BLOCK: gl.constexpr, K_BLOCK: gl.constexpr,
    ROWS: gl.constexpr, Q_PIECE: gl.constexpr, PIECE: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The fetching group. Keys of a step come before the values of the one in front, of the tile before too. What says
    where the next ones lie is loaded before the wait for room."""
    QS: gl.constexpr = 64 // Q_PIECE
    worker = gl.program_id(0)
    number = 0
    u = 0  # steps fetched so far
    here, segment, index = _item(0, items, worker, programs, order, count)
    b, h, head, row = _place(segment, index, across, k_heads, GROUP, ROWS)
    base = _list(lists, b, head, row, sb, sh, sq, LIST_GROUP, Q_BLOCK)
    stop = gl.load(stop_ptr + segment * count + index)
    first, second = _starts(base, _steps(stop, K_BLOCK) - 1, stop, K_BLOCK)
    ahead, segment, index = _item(1, items, worker, programs, order, count)
    # Other numbers than the first keys' own: what starts as the same value is not carried along a loop (Triton 3.6).
    v_b, v_h, v_first, v_second = 0, 0, 0, 0
    while here:
        next_stop = gl.load(stop_ptr + segment * count + index)
        next_b, next_h, next_head, next_row = _place(segment, index, across, k_heads, GROUP, ROWS)
        next_base = _list(lists, next_b, next_head, next_row, sb, sh, sq, LIST_GROUP, Q_BLOCK)
        beyond, segment, index = _item(number + 2, items, worker, programs, order, count)

        slot = number % 2
        mbarrier.wait(bars.index(_Q_FREE + slot), (number // 2 + 1) & 1)
        mbarrier.expect(bars.index(_Q_HERE + slot), 128 * D * 2)
        for p in gl.static_range(2 * QS):
            # Pieces of 64 rows are halves of a tile, smaller ones parts of a half.
            at = p * Q_PIECE
            for c in gl.static_range(D // 64):
                place = (slot * 2 + p // QS) * (D // 64) * QS + c * QS + p % QS
                tma.async_copy_global_to_shared(
                    q_desc, [b, head + at // ROWS, row + at % ROWS, c * 64], bars.index(_Q_HERE + slot),
                    q_rooms.index(place),
                )  # fmt: skip
        steps = _steps(stop, K_BLOCK)
        next_first, next_second = _starts(next_base, _steps(next_stop, K_BLOCK) - 1, next_stop, K_BLOCK)
        for j in range(steps):
            after_first, after_second = _starts(base, gl.maximum(steps - 2 - j, 0), stop, K_BLOCK)
            _fetch_step(k_desc, k_rooms, bars, _K_HERE, b, h, first, second, u, PIECE, D)
            if u > 0:
                _fetch_step(v_desc, v_rooms, bars, _V_HERE, v_b, v_h, v_first, v_second, u - 1, PIECE, D)
            v_b, v_h, v_first, v_second = b, h, first, second
            first, second = after_first, after_second
            u += 1
        first, second = next_first, next_second
        number += 1
        here, b, h, head, row, base, stop = ahead, next_b, next_h, next_head, next_row, next_base, next_stop
        ahead = beyond
    _fetch_step(v_desc, v_rooms, bars, _V_HERE, v_b, v_h, v_first, v_second, u - 1, PIECE, D)


@jit
def _masked(s, first, second, ends, S: gl.constexpr):
    """Scores of a step, -inf where a query does not see a key and where nothing is listed."""
    offset = gl.arange(0, 128, gl.SliceLayout(0, S))
    slot = gl.where(offset < 64, first, second - 64) + offset
    return gl.where(gl.expand_dims(slot, 0) < gl.expand_dims(ends, 1), s, float("-inf"))


@jit
def _softmax(s, top, total, factor):
    """Probabilities of one step, and the running maximum and sum of the rows."""
    new = gl.maximum(top, gl.max(s, 1) * factor)
    anchor = gl.where(new == float("-inf"), 0.0, new)
    p = gl.exp2(s * factor - gl.expand_dims(anchor, 1))
    alpha = gl.exp2(top - anchor)
    return p, new, total * alpha + gl.sum(p, 1), alpha


@jit
def _multiply(
    out_desc, lse_ptr, q_rooms, k_rooms, v_rooms, sums, bars, lists, full_ptr, stop_ptr, order, sb, sh, sq, queries,
    keys, count, across, items, programs, factor, k_heads, GROUP: gl.constexpr, LIST_GROUP: gl.constexpr,
    Q_BLOCK: gl.constexpr, K_BLOCK: gl.constexpr, ROWS: gl.constexpr, Q_PIECE: gl.constexpr, D: gl.constexpr,
    SIDE: gl.constexpr,
):  # fmt: skip
    """A group that multiplies: 64 rows of each tile. Steps run from the newest keys to the oldest, so that those under
    the mask come first. The last values of a tile are added up while the first scores of the next one are under way."""
    KIND: gl.constexpr = out_desc.dtype
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    O_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    QS: gl.constexpr = 64 // Q_PIECE
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], KIND)
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, D], KIND)
    q_tiles = q_rooms._reinterpret(KIND, [4, 64, D], q_layout)
    k_tiles = k_rooms._reinterpret(KIND, [2, 128, D], kv_layout)
    v_tiles = v_rooms._reinterpret(KIND, [2, 128, D], kv_layout)
    zeros = gl.zeros([64, 128], gl.float32, S)
    r = SIDE * 64 + gl.arange(0, 64, S_ROW)
    none = gl.full([64], float("-inf"), gl.float32, S_ROW)
    nil = gl.full([64], 0.0, gl.float32, S_ROW)

    worker = gl.program_id(0)
    number = 0
    turn = 0  # steps multiplied so far
    # The tile at hand, the next one, and the one behind that, whose list nobody has looked at: what comes is loaded
    # long before it is needed.
    here, segment, index = _item(0, items, worker, programs, order, count)
    b, _, head, row = _place(segment, index, across, k_heads, GROUP, ROWS)
    base = _list(lists, b, head, row, sb, sh, sq, LIST_GROUP, Q_BLOCK)
    stop = gl.load(stop_ptr + segment * count + index)
    whole = _whole(gl.load(full_ptr + segment * count + index), K_BLOCK)
    steps = _steps(stop, K_BLOCK)
    first, second = _starts(base, steps - 1, stop, K_BLOCK)
    ahead, segment, index = _item(1, items, worker, programs, order, count)
    next_b, _, next_head, next_row = _place(segment, index, across, k_heads, GROUP, ROWS)
    next_stop = gl.load(stop_ptr + segment * count + index)
    next_full = gl.load(full_ptr + segment * count + index)
    beyond, segment, index = _item(2, items, worker, programs, order, count)

    mbarrier.wait(bars.index(_Q_HERE), 0)
    mbarrier.wait(bars.index(_K_HERE), 0)
    s_going = warpgroup_mma(q_tiles.index(SIDE), k_tiles.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s_going])
    mbarrier.arrive(bars.index(_K_FREE))
    i = row + r % ROWS
    if steps > whole:
        s = _masked(s, first, second, gl.minimum(keys - queries + i + 1, keys), S)
    pf, top, total, alpha = _softmax(s, none, nil, factor)
    p = gl.convert_layout(pf.to(KIND), P)
    while here:
        next_base = _list(lists, next_b, next_head, next_row, sb, sh, sq, LIST_GROUP, Q_BLOCK)
        next_steps = _steps(next_stop, K_BLOCK)
        first, second = _starts(next_base, next_steps - 1, next_stop, K_BLOCK)
        last_stop = gl.load(stop_ptr + segment * count + index)
        last_full = gl.load(full_ptr + segment * count + index)
        last_b, _, last_head, last_row = _place(segment, index, across, k_heads, GROUP, ROWS)
        then, segment, index = _item(number + 3, items, worker, programs, order, count)

        slot = number % 2
        ends = gl.minimum(keys - queries + i + 1, keys)
        acc = gl.zeros([64, D], gl.float32, OUT)
        q = q_tiles.index(slot * 2 + SIDE)
        for j in range(1, steps):
            u = turn + j
            stage = u % 2
            before = 1 - stage
            mbarrier.wait(bars.index(_K_HERE + stage), (u // 2) & 1)
            mbarrier.wait(bars.index(_TURN + SIDE), (u & 1) ^ SIDE)
            s_going = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(bars.index(_V_HERE + before), ((u - 1) // 2) & 1)
            acc_going = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
            mbarrier.arrive(bars.index(_TURN + 1 - SIDE))
            s = warpgroup_mma_wait(1, deps=[s_going])
            mbarrier.arrive(bars.index(_K_FREE + stage))
            if steps - 1 - j >= whole:
                here_first, here_second = _starts(base, steps - 1 - j, stop, K_BLOCK)
                s = _masked(s, here_first, here_second, ends, S)
            pf, top, total, alpha = _softmax(s, top, total, factor)
            # What is written down has its place before the wait. The compiler would wait first otherwise, and make the
            # probabilities that it sums behind the products, not under them.
            sums.index(SIDE).store(total)
            acc, p = warpgroup_mma_wait(0, deps=[acc_going, p])
            mbarrier.arrive(bars.index(_V_FREE + before))
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW), 1)
            p = gl.convert_layout(pf.to(KIND), P)
            if j == 1:
                # The result of the tile before has left its room by now.
                tma.store_wait(0)
                mbarrier.arrive(bars.index(_Q_FREE + 1 - slot), pred=number > 0)
        if steps == 1:
            tma.store_wait(0)
            mbarrier.arrive(bars.index(_Q_FREE + 1 - slot), pred=number > 0)

        turn += steps
        stage = turn % 2
        before = 1 - stage
        mbarrier.wait(bars.index(_Q_HERE + 1 - slot), ((number + 1) // 2) & 1, pred=ahead)
        mbarrier.wait(bars.index(_K_HERE + stage), (turn // 2) & 1, pred=ahead)
        mbarrier.wait(bars.index(_TURN + SIDE), (turn & 1) ^ SIDE)
        s_going = warpgroup_mma(
            q_tiles.index((1 - slot) * 2 + SIDE), k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False,
            is_async=True,
        )  # fmt: skip
        mbarrier.wait(bars.index(_V_HERE + before), ((turn - 1) // 2) & 1)
        acc_going = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
        mbarrier.arrive(bars.index(_TURN + 1 - SIDE))
        s = warpgroup_mma_wait(1, deps=[s_going])
        mbarrier.arrive(bars.index(_K_FREE + stage), pred=ahead)
        i_next = next_row + r % ROWS
        next_whole = _whole(next_full, K_BLOCK)
        if next_steps > next_whole:
            s = _masked(s, first, second, gl.minimum(keys - queries + i_next + 1, keys), S)
        pf, next_top, next_total, alpha = _softmax(s, none, nil, factor)
        sums.index(SIDE).store(next_total)
        acc, p = warpgroup_mma_wait(0, deps=[acc_going, p])
        mbarrier.arrive(bars.index(_V_FREE + before))
        p = gl.convert_layout(pf.to(KIND), P)

        some = total > 0
        mass = (top + gl.log2(gl.where(some, total, 1.0))) * 0.6931471805599453
        flat = (b.to(gl.int64) * k_heads * GROUP + head + r // ROWS) * queries + i
        gl.store(lse_ptr + flat, gl.where(some, mass, float("-inf")), mask=i < queries)
        shrink = gl.convert_layout(1.0 / gl.where(some, total, 1.0), O_ROW)
        # Nobody needs these queries any more: the result leaves from their room.
        q.store((acc * gl.expand_dims(shrink, 1)).to(KIND))
        fence_async_shared()
        for piece in gl.static_range(QS):
            at = SIDE * 64 + piece * Q_PIECE
            for c in gl.static_range(D // 64):
                room = q_rooms.index((slot * 2 + SIDE) * (D // 64) * QS + c * QS + piece)
                tma.async_copy_shared_to_global(out_desc, [b, head + at // ROWS, row + at % ROWS, c * 64], room)

        number += 1
        top, total, i = next_top, next_total, i_next
        here, b, head, row, base = ahead, next_b, next_head, next_row, next_base
        stop, whole, steps = next_stop, next_whole, next_steps
        ahead, next_b, next_head, next_row = beyond, last_b, last_head, last_row
        next_stop, next_full = last_stop, last_full
        beyond = then
    tma.store_wait(0)


@jit(do_not_specialize=["sb", "sh", "sq", "queries", "keys", "count", "across", "items", "programs", "k_heads"])
def _attend(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, lists, full_ptr, stop_ptr, order, sb, sh, sq, queries, keys, count,
    across, items, programs, factor, k_heads, GROUP: gl.constexpr, LIST_GROUP: gl.constexpr, Q_BLOCK: gl.constexpr,
    K_BLOCK: gl.constexpr, ROWS: gl.constexpr, Q_PIECE: gl.constexpr, PIECE: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    KIND: gl.constexpr = k_desc.dtype
    q_rooms = gl.allocate_shared_memory(KIND, [2 * (128 // Q_PIECE) * (D // 64), 1, 1, Q_PIECE, 64], q_desc.layout)
    k_rooms = gl.allocate_shared_memory(KIND, [2 * (128 // PIECE) * (D // 64), 1, 1, PIECE, 64], k_desc.layout)
    v_rooms = gl.allocate_shared_memory(KIND, [2 * (128 // PIECE) * (D // 64), 1, 1, PIECE, 64], v_desc.layout)
    sums = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [_BARRIERS, 1], mbarrier.MBarrierLayout())
    for x in gl.static_range(_BARRIERS):
        # Two groups free what was fetched.
        mbarrier.init(bars.index(x), count=2 if x % 4 >= 2 and x < _TURN else 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _fetch,
                (
                    q_desc, k_desc, v_desc, q_rooms, k_rooms, v_rooms, bars, lists, stop_ptr, order, sb, sh, sq, count,
                    across, items, programs, k_heads, GROUP, LIST_GROUP, Q_BLOCK, K_BLOCK, ROWS, Q_PIECE, PIECE, D,
                ),
            ),
            (
                _multiply,
                (
                    out_desc, lse_ptr, q_rooms, k_rooms, v_rooms, sums, bars, lists, full_ptr, stop_ptr, order, sb, sh,
                    sq, queries, keys, count, across, items, programs, factor, k_heads, GROUP, LIST_GROUP, Q_BLOCK,
                    K_BLOCK, ROWS, Q_PIECE, D, 0,
                ),
            ),
            (
                _multiply,
                (
                    out_desc, lse_ptr, q_rooms, k_rooms, v_rooms, sums, bars, lists, full_ptr, stop_ptr, order, sb, sh,
                    sq, queries, keys, count, across, items, programs, factor, k_heads, GROUP, LIST_GROUP, Q_BLOCK,
                    K_BLOCK, ROWS, Q_PIECE, D, 1,
                ),
            ),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
