"""What chooses keys: column sums of the map of a prompt, bounds of pages, lists of the best."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention import decoding
from foveate.attention.columns import columns
from foveate.bench.kernels.case import BOUNDS, Answer, Case, Check, Kernel, Made, distance, has_kernels
from foveate.bench.kernels.sizes import Sizes

WINDOW = 64
"""Last queries whose attention is summed."""
PAGE = 16
_KEYS = 24
"""Keys whose sums are checked."""
_TORCH = 1 << 33
"""Most scores for PyTorch's version of a whole map."""


def column_sums(sizes: Sizes, device: torch.device) -> list[Case]:
    """Attention that keys received: of the whole prompt, and of its last queries."""
    cases = []
    for n in sizes.lengths:
        cases.append(Case("columns", "of all queries", n, lambda g, n=n: _columns(sizes, n, n, g)))
        name = f"of the last {WINDOW} queries"
        cases.append(Case("columns", name, n, lambda g, n=n: _columns(sizes, n, WINDOW, g), None, True))
    return cases


def select(sizes: Sizes, device: torch.device) -> list[Case]:
    """Bounds of pages and lists of the best, exactly."""
    cases = []
    for n in sizes.lengths:
        pages, tokens = n // PAGE, min(2048, n // 4)
        budget = min(sizes.budget // PAGE, pages // 2)
        cases += [
            Case("select", f"bounds of pages of {PAGE}", n, lambda g, n=n: _bounds(sizes, n, g), None, True),
            Case(
                "select",
                f"best {budget} pages of {PAGE}",
                n,
                lambda g, p=pages, b=budget: _best(sizes.heads, p, b, g),
                None,
                True,
            ),
            Case(
                "select",
                f"best {tokens:,} tokens",
                n,
                lambda g, n=n, t=tokens: _best(sizes.kv_heads, n, t, g),
                None,
                True,
            ),
        ]
    return cases


def _columns(sizes: Sizes, n: int, queries: int, generator: torch.Generator) -> Made:
    device, dim = generator.device, sizes.head_dim
    q = 1.5 * torch.randn(1, sizes.heads, queries, dim, generator=generator, device=device, dtype=sizes.dtype)
    k = torch.randn(1, sizes.kv_heads, n, dim, generator=generator, device=device, dtype=sizes.dtype)
    # What the log-mass of random logits of this spread is on the average; the sums ask for no better one.
    seen = torch.arange(n - queries + 1, n + 1, device=device)
    lse = (seen.float().log() + 1.125).expand(1, sizes.heads, -1).contiguous()
    keys = torch.randint(0, n, (_KEYS,), generator=generator, device=device)
    want = []
    for head in range(sizes.kv_heads):
        mine = slice(head * sizes.group, (head + 1) * sizes.group)
        weights = (q[0, mine].float() @ k[0, head, keys].float().T * dim**-0.5 - lse[0, mine].unsqueeze(-1)).exp()
        want.append((weights * (keys < seen.unsqueeze(-1))).sum((0, 1)))
    truth = torch.stack(want)

    def check(answer: Answer) -> Check:
        finite = bool(torch.isfinite(answer).all())
        return Check(distance(answer[0][:, keys], truth) if finite else float("nan"), BOUNDS[sizes.dtype])

    kernels = []
    if has_kernels(device):
        kernels.append(Kernel("foveate triton", lambda: columns(q, k, lse, backend="triton")))
    if sizes.heads * queries * n <= _TORCH:
        kernels.append(Kernel("foveate torch", lambda: columns(q, k, lse, backend="torch")))
    nbytes = (q.numel() + k.numel()) * sizes.itemsize + 4 * (lse.numel() + sizes.kv_heads * n)
    return Made(kernels, check, nbytes, 2 * dim * sizes.heads * int(seen.sum()))


def _bounds(sizes: Sizes, n: int, generator: torch.Generator) -> Made:
    device, dim, pages = generator.device, sizes.head_dim, n // PAGE
    q = torch.randn(1, sizes.heads, 1, dim, generator=generator, device=device, dtype=sizes.dtype)
    ends = torch.randn(2, sizes.kv_heads, pages, dim, generator=generator, device=device, dtype=sizes.dtype)
    summary = torch.cat([ends.amin(0), ends.amax(0)], dim=-1)
    lengths = torch.full((1, sizes.kv_heads), n, dtype=torch.int32, device=device)
    truth = _torch_bounds(q.float(), summary.float())

    def check(answer: Answer) -> Check:
        # The page of the newest token counts as endless.
        return Check(distance(answer[..., :-1], truth[..., :-1]), BOUNDS[sizes.dtype])

    kernels = [Kernel("torch products", lambda: _torch_bounds(q, summary))]
    if has_kernels(device):
        work = lambda: decoding.page_bounds(q, summary, lengths, PAGE, group=True)  # noqa: E731
        kernels.insert(0, Kernel("foveate decode", work))
    nbytes = summary.numel() * sizes.itemsize + 4 * sizes.kv_heads * pages
    return Made(kernels, check, nbytes, 4 * dim * sizes.heads * pages)


def _torch_bounds(q: Tensor, summary: Tensor) -> Tensor:
    """The largest score that any query head of a kv head could give any key of a page: [1, Hk, pages]."""
    dim = q.shape[-1]
    rows = q.view(summary.shape[0], -1, dim)
    up = rows.clamp_min(0) @ summary[..., dim:].mT
    return torch.baddbmm(up, rows.clamp_max(0), summary[..., :dim].mT).amax(1).unsqueeze(0)


def _best(rows: int, n: int, k: int, generator: torch.Generator) -> Made:
    scores = torch.randn(1, rows, n, generator=generator, device=generator.device)
    best = scores.topk(k, dim=-1).values

    def check(answer: Answer) -> Check:
        # Of equal scores any may be taken: the scores must be the best, and the list must ascend.
        found = scores.gather(-1, answer.long()).sort(dim=-1, descending=True).values
        ascends = bool((answer.diff(dim=-1) > 0).all())
        return Check(0.0 if ascends and torch.equal(found, best) else 1.0, 0.0)

    kernels = [Kernel("torch topk, sort", lambda: scores.topk(k, dim=-1).indices.sort(dim=-1).values)]
    if has_kernels(scores.device):
        kernels.insert(0, Kernel("foveate decode", lambda: decoding.best(scores, k)[0]))
    return Made(kernels, check, 4 * rows * (n + k), 0.0)
