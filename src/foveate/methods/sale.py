"""SALE: estimate every logit of a prompt in 4 bits, attend to the blocks in which one stands out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from foveate.attention import ALL, Partial, Parts, Selection, attend
from foveate.cache import View
from foveate.errors import BadArgument
from foveate.heads.gates import made_with
from foveate.heads.passkeys import Example, passkey_examples
from foveate.heads.tap import Tapped
from foveate.heads.thresholds import Halving, Sparse, halve_thresholds
from foveate.methods.base import Context, Method, Probe, Profile, Role, register, tries
from foveate.methods.policies.lists import mask_lists
from foveate.methods.policies.lowbit import block_peaks
from foveate.methods.policies.sequences import sequences
from foveate.methods.profile import fingerprint, made_up
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class SALE(Method):
    """Each block of queries attends exactly to the first key block and a local window. All its other logits are
    estimated from 4-bit queries and keys; a key block is read if one of its pairs weighs more than the share tau of the
    softmax mass that its query found so far. One tau per query head, from a calibration;
    0 is dense. Decode is dense.

    Two passes: the mass that weights are compared with is that of sink and window alone (the released default), so a
    relative weight may exceed 1. Keys that share a scale may straddle two blocks; the released code tiles them for its
    warps. Keys are centred for rounding only: the estimate is of the logits themselves, softcap included.

    Args:
        q_block, k_block: tokens per block.
        local: a query block attends at least so many tokens before its first one, rounded out to a multiple of it.
        tile: neighbouring tokens that share a scale; 1: each has its own.
        dense_below: longest prompt that is attended densely.

    A prompt given in pieces is estimated per piece, so its reads differ from those of a whole prompt.
    Source: 2505.24179; released code for the order of the passes and the defaults.
    """

    id = "sale"
    name = "SALE"
    paper = "2505.24179"
    slots = frozenset({"prefill"})
    causality = "prompt"
    chunked = "approximate"
    calibrated = True
    budgeted = False
    search = tries(local=(64, 128, 256))

    q_block: int = 64
    k_block: int = 32
    local: int = 128
    tile: int = 16
    dense_below: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("q_block", "k_block", "tile"):
            if getattr(self, name) < 1:
                raise BadArgument(name, getattr(self, name), "give at least 1 token")
        if self.local < 0 or self.local % self.k_block:
            raise BadArgument("local", self.local, f"give 0 or a multiple of k_block={self.k_block}")
        if self.dense_below < 0:
            raise BadArgument("dense_below", self.dense_below, "give 0 or more tokens")

    def stand_in(self, shape: ModelShape) -> Profile:
        """A threshold that lets about a tenth of the blocks through where keys and queries are random numbers of the
        size that random weights of a model of 8B give them."""
        return made_up(self.id, shape, {"tau": [[1.0] * layer.num_heads for layer in shape.layers]})

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        roles = [Role()] * len(shape.layers)
        try:
            table: Any = () if profile is None else profile.data["tau"]
            for layer in shape.layers:
                if layer.kind == "full":
                    tau = tuple(float(x) for x in table[layer.index])
                    if len(tau) != layer.num_heads or not all(x >= 0 for x in tau):
                        raise ValueError
                    roles[layer.index] = Role("estimate", extra={"tau": tau})
        except (KeyError, IndexError, TypeError, ValueError):
            mend = f"{self.id} needs one tau per query head of this model: run `foveate calibrate` first"
            raise BadArgument("profile", None if profile is None else profile.model, mend) from None
        return roles

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        if (view.host_lengths <= self.dense_below).all():
            return ALL
        keys, stores = view.k().detach(), view.lengths.shape[1]
        blocks = (-(-q.shape[2] // self.q_block), -(-keys.shape[2] // self.k_block))
        near = torch.zeros(q.shape[0], stores, *blocks, dtype=torch.bool, device=q.device)
        for rows in sequences(view, q.shape[1]):
            exact = self._near(rows.keys, rows.queries, q.device)[0]
            near[rows.row, rows.stores, : exact.shape[0], : exact.shape[1]] = exact
        first = self._listed(near)
        found = ctx.attend(q, view, first)
        assert found.lse is not None
        tau = torch.tensor(ctx.role.extra["tau"], device=q.device).log()
        rest = torch.zeros(q.shape[0], q.shape[1], *blocks, dtype=torch.bool, device=q.device)
        for row, of, heads, m, n in sequences(view, q.shape[1]):
            q_row, lse = q[row, heads, :n].detach(), found.lse[row, heads, :n].detach()
            kept = self._far(q_row, keys[row, of, :m], lse, tau[heads], ctx.scale, ctx.softcap)
            rest[row, heads, : kept.shape[1], : kept.shape[2]] = kept
        second = self._listed(rest)
        return [Partial(found.out, found.lse, first), second]

    def _near(self, m: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What n queries at the end of m keys attend exactly, and what is estimated: bool [query, key blocks]."""
        block = torch.arange(-(-n // self.q_block), device=device)
        own = m - n + block * self.q_block
        start = (own - self.local).clamp_min(0) // max(self.local, self.k_block) * max(self.local, self.k_block)
        newest = (own + self.q_block).clamp_max(m) - 1
        key = torch.arange(-(-m // self.k_block), device=device)
        causal = key <= (newest // self.k_block)[:, None]
        if m <= self.dense_below:
            return causal, torch.zeros_like(causal)
        far = (key >= 1) & (key < (start // self.k_block)[:, None])
        return causal & ~far, far

    def _far(self, q: Tensor, k: Tensor, lse: Tensor, log_tau: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Estimated blocks that are read, of one sequence q [H, n, D], k [Hs, m, D], lse [H, n]: bool [H, ...]."""
        far = self._near(k.shape[1], q.shape[1], q.device)[1]
        if not far.any():
            return far.expand(q.shape[0], -1, -1)
        return (self._peaks(q, k, lse, scale, softcap) > log_tau[:, None, None]) & far

    def _peaks(self, q: Tensor, k: Tensor, lse: Tensor, scale: float, softcap: float | None) -> Tensor:
        q_block, k_block, tile = self.q_block, self.k_block, self.tile
        return block_peaks(q, k, lse, q_block=q_block, k_block=k_block, tile=tile, scale=scale, softcap=softcap)

    def _listed(self, blocks: Tensor) -> Selection:
        return Selection(lists=mask_lists(blocks), q_block=self.q_block, k_block=self.k_block)

    # -- calibration --------------------------------------------------------------------------------------------------

    def calibrate(
        self,
        probe: Probe,
        data: Iterable[Example] | None = None,
        *,
        samples: int = 2,
        longest: int | None = None,
        rule: Halving | None = None,
    ) -> Profile:
        """Find one tau per query head, as high as its output allows on texts with passkeys.

        Args:
            data: texts instead of the synthetic ones.
            samples: how many texts are looked at.
            longest: tokens of each; None: 1024 on a CPU, 8192 on a GPU.
            rule: largest error, first and least tau.

        Raises:
            BadArgument: texts too short to have anything estimated, or too long for the model.
            Refused: a model without full attention.
        """
        shape, rule = ModelShape.of(probe.model), rule or Halving()
        if longest is None:
            on_cpu = next(probe.model.parameters()).device.type == "cpu"
            longest = min(shape.max_positions, 1024 if on_cpu else 8192)
        if not 2 * self.local + self.k_block < longest <= shape.max_positions:
            least = 2 * self.local + self.k_block
            mend = f"give more than {least} tokens, so that some are estimated, and at most {shape.max_positions}"
            raise BadArgument("longest", longest, mend)
        texts = passkey_examples(probe.tokenizer, (longest,), probe.seed) if data is None else data
        report = probe.progress(samples, f"{self.id}: thresholds")
        began = time.perf_counter()
        table = halve_thresholds(probe.model, islice(texts, samples), self._prepared, rule, report)
        made: dict[str, Any] = {"samples": samples, "longest": longest, "seed": probe.seed} | asdict(rule)
        made["seconds"] = round(time.perf_counter() - began, 1)
        return Profile(self.id, fingerprint(shape), {"tau": table}, made | made_with(probe.model))

    def _prepared(self, layer: Tapped) -> Sparse:
        """One text in one layer: everything but the thresholds."""
        n, group = layer.q.shape[2], layer.q.shape[1] // layer.k.shape[1]
        how: dict[str, Any] = {"scale": layer.scale, "softcap": layer.softcap}
        near, far = replace(self, dense_below=0)._near(n, n, layer.q.device)
        first = self._listed(near[None, None])
        found = attend(layer.q, layer.k, layer.v, first, **how)
        peaks = self._peaks(layer.q[0], layer.k[0], found.lse[0], **how)

        def sparse(heads: Tensor, tau: Tensor) -> Tensor:
            second = self._listed(((peaks[heads] > tau.log()[:, None, None]) & far)[None])
            k, v = layer.k[:, heads // group], layer.v[:, heads // group]
            rest = attend(layer.q[:, heads], k, v, second, **how)
            return layer.merged([Partial(found.out[:, heads], found.lse[:, heads]), rest], heads)

        return sparse
