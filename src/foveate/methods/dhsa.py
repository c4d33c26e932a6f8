"""DHSA: cut the prompt where its meaning changes, score chunks, read the tokens of the best ones."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from foveate.attention import ALL, Parts, Selection
from foveate.cache import UNBOUNDED, View
from foveate.errors import BadArgument, Refused
from foveate.heads.boundaries import BoundaryPredictor, BoundaryRecipe, key_distances, key_width, separate_peaks
from foveate.heads.boundaries import learn_boundaries as learn
from foveate.heads.gates import made_with
from foveate.heads.passkeys import Example, evenly, passkey_examples, shortest
from foveate.methods.base import Context, Method, Probe, Profile, Role, register, tries
from foveate.methods.budget import Budget
from foveate.methods.policies.checks import at_least
from foveate.methods.policies.chunks import chunk_scores
from foveate.methods.policies.lists import mask_lists, top_lists
from foveate.methods.policies.sequences import sequences
from foveate.methods.profile import fingerprint, made_up
from foveate.models.shape import ModelShape

WINDOW = 4  # tokens on each side of a gap where nothing was trained


@register
@dataclass(frozen=True, kw_only=True)
class DHSA(Method):
    """The keys of a prompt are cut into chunks of different length. A block of queries scores chunks by their mean key,
    every token takes the score of its chunk, and the block reads the best tokens, the newest and the first ones; all
    heads of a layer the same. Means are over heads as well and times the square root of how many tokens they are of,
    so that long chunks are not at a loss. The query blocks that hold the last `instruction` queries read everything.
    Decode is dense.

    Chunks end where a small trained network says so ("predicted"), where neighbouring keys differ most ("similarity",
    ours, needs no training), or after every `chunk` tokens ("fixed"). The first layer's keys decide for all layers.
    Which tokens are first and newest is never listed twice; the released code counts some of them double.

    Args:
        boundaries: "predicted" (needs a profile), "similarity" or "fixed".
        tokens: tokens read per query when no budget is given (paper: 1024 to 2048). A budget counts the dense end in.
        block: queries that share a list.
        chunk: tokens per chunk on average.
        apart: chunks are longer than this (but for the last two).
        local: tokens before a query block that it reads; its own too. The released code counts them from the block's
            end, which can leave its first queries without themselves.
        sink: first tokens that are always read.
        instruction: queries at the end of the prompt that read everything; a chunk ends before them.

    A prompt given in pieces is cut anew in each. Where heads hold different tokens (a second prompt behind an eviction)
    everything that is held is read.
    Source: 2510.24606, section 3; released code (`legacy`) for the defaults.
    """

    id = "dhsa"
    name = "DHSA"
    paper = "2510.24606"
    slots = frozenset({"prefill"})
    causality = "prompt"
    chunked = "approximate"
    calibrated = True
    search = tries(block=(64, 128), chunk=(16, 32, 64), local=(32, 64, 128), sink=(16, 64, 128))

    boundaries: Literal["predicted", "similarity", "fixed"] = "predicted"
    tokens: int = 2048
    block: int = 128
    chunk: int = 32
    apart: int = 8
    local: int = 64
    sink: int = 128
    instruction: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.boundaries not in ("predicted", "similarity", "fixed"):
            raise BadArgument("boundaries", self.boundaries, 'give "predicted", "similarity" or "fixed"')
        at_least(self, block=1, chunk=1, apart=0, local=0, sink=0, instruction=0)
        if self.tokens < self._forced:
            raise BadArgument("tokens", self.tokens, f"a query block always reads up to {self._forced} tokens")

    @property
    def needs_profile(self) -> bool:
        return self.boundaries == "predicted"

    @property
    def _forced(self) -> int:
        return self.block + self.local + self.sink

    def _end(self, n: int) -> int:
        """The first of n queries whose block reads everything."""
        return n if self.instruction == 0 else max(0, n - self.instruction) // self.block * self.block

    def stand_in(self, shape: ModelShape) -> Profile | None:
        """A predictor that nobody trained."""
        made = BoundaryPredictor.untrained(key_width(shape), WINDOW) if key_width(shape) else None
        return made and made_up(self.id, shape, {"window": WINDOW}, made.weights())

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        budget, tail = Budget.of(self.budget) or Budget.tokens(self.tokens), length - self._end(length)
        read = budget.prompt_tokens(shape, length, 0, name=self.id, floor=self._forced, dense_tail=tail)
        extra: dict[str, Any] = {"tokens": UNBOUNDED if budget.whole else max(self._forced, read)}
        if self.needs_profile and key_width(shape):
            extra["predictor"] = self._predictor(profile, key_width(shape))
        sparse = Role("chunks", extra=extra)
        return [sparse if layer.kind == "full" else Role() for layer in shape.layers]

    def _predictor(self, profile: Profile | None, width: int) -> BoundaryPredictor:
        try:
            if profile is None or len(profile.tensors["centre"]) != width:
                raise ValueError
            return BoundaryPredictor.of(profile.tensors, int(profile.data["window"]))
        except (KeyError, TypeError, ValueError, RuntimeError):
            mend = (
                f"{self.id} needs a predictor for this model: run `foveate calibrate`, or give boundaries another word"
            )
            raise BadArgument("profile", None if profile is None else profile.model, mend) from None

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        read = ctx.role.extra["tokens"]
        if not view.aligned or view.host_lengths.max() <= read:
            return ALL
        keys = view.k().detach()
        if "starts" not in ctx.forward:
            rows = view.host_lengths[:, 0].tolist()
            ctx.forward["starts"] = [self._starts(keys[row, :, :m], ctx) for row, m in enumerate(rows)]
        blocks = -(-q.shape[2] // self.block)
        lists = torch.full((q.shape[0], 1, blocks, min(read, keys.shape[2])), -1, dtype=torch.int32, device=q.device)
        whole = torch.zeros(q.shape[0], 1, blocks, -(-keys.shape[2] // self.block), dtype=torch.bool, device=q.device)
        for row, _, _, m, n in sequences(view, q.shape[1]):
            first = torch.arange(-(-n // self.block), device=q.device) * self.block
            last = m - n + (first + self.block).clamp_max(n) - 1
            dense = (first >= self._end(n)) | (last < read)
            reach = torch.arange(whole.shape[-1], device=q.device) <= (last // self.block)[:, None]
            whole[row, 0, : len(first)] = reach & dense[:, None]
            scores = chunk_scores(q[row, :, :n].detach(), keys[row, :, :m], ctx.forward["starts"][row], self.block)
            token = torch.arange(m, device=q.device)
            near = (token < self.sink) | (token >= (m - n + first - self.local)[:, None])
            scores = scores.masked_fill(near, torch.inf).masked_fill(token > last[:, None], -torch.inf)
            chosen = top_lists(scores, read)
            lists[row, 0, : len(first), : chosen.shape[-1]] = torch.where(dense[:, None], -1, chosen)
        sparse = Selection(lists=lists, q_block=self.block)
        return [sparse, Selection(lists=mask_lists(whole), q_block=self.block, k_block=self.block)]

    def _starts(self, k: Tensor, ctx: Context) -> Tensor:
        """First token of each chunk of one sequence k [Hs, m, D]: int64, ascending, 0 at the front."""
        m = k.shape[1]
        if self.boundaries == "fixed":
            cuts = torch.arange(self.chunk, m, self.chunk, device=k.device)
        else:
            flat = k.transpose(0, 1).flatten(1).float()
            if self.boundaries == "similarity":
                scores = key_distances(flat, WINDOW)
            else:
                scores = ctx.role.extra["predictor"].to(k.device)(flat)
            cuts = separate_peaks(scores, m // self.chunk, self.apart) + 1
        ends = torch.tensor([0, max(0, m - self.instruction) if self.instruction else 0], device=k.device)
        return torch.cat([ends, cuts]).unique()

    def calibrate(
        self,
        probe: Probe,
        data: Iterable[Example] | None = None,
        *,
        longest: int | None = None,
        recipe: BoundaryRecipe | None = None,
    ) -> Profile:
        """Train the predictor on texts with passkeys; the model stays as it is. Minutes for a small model on a CPU.

        Args:
            data: texts instead of the synthetic ones.
            longest: tokens of the longest; the shortest has half of them. None: 512 on a CPU, 2048 on a GPU.
            recipe: how many texts, how long, labels.

        Raises:
            Refused: a model without full attention.
            BadArgument: texts longer than the model's positions, or too short for a passkey.
        """
        shape, recipe = ModelShape.of(probe.model), recipe or BoundaryRecipe()
        if not any(layer.kind == "full" for layer in shape.layers):
            raise Refused(f"{shape.name} has no layer with full attention, so there is nothing to cut into chunks")
        least = shortest(probe.tokenizer)
        on_cpu = next(probe.model.parameters()).device.type == "cpu"
        longest = longest or min(max(512 if on_cpu else 2048, least), shape.max_positions)
        if longest > shape.max_positions:
            raise BadArgument("longest", longest, f"the model has {shape.max_positions} positions")
        lengths = evenly(min(longest, max(longest // 2, least)), longest)
        texts = passkey_examples(probe.tokenizer, lengths, probe.seed) if data is None else data
        report, started = probe.progress(recipe.texts + recipe.epochs, f"{self.id}: boundaries"), time.perf_counter()
        learned = learn(probe.model, texts, recipe, probe.seed, report)
        made: dict[str, Any] = {"longest": longest, "seed": probe.seed} | asdict(recipe)
        made |= {"loss": [round(x, 5) for x in learned.losses], "found": round(learned.found, 3)}
        made |= {"found_by_chance": round(learned.by_chance, 3), "seconds": round(time.perf_counter() - started, 1)}
        weights = learned.predictor.weights()
        return Profile(self.id, fingerprint(shape), {"window": recipe.window}, made | made_with(probe.model), weights)
