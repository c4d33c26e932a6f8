"""LycheeDecode: a few heads look everywhere and hand what they found down the layers, head by head."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import ALL, Parts, Selection
from foveate.cache import UNBOUNDED, View
from foveate.errors import BadArgument
from foveate.heads.gates import gated_layers, made_with
from foveate.heads.hardkuma import KumaRecipe, learn_open_heads
from foveate.heads.passkeys import Example, evenly, passkey_examples, shortest
from foveate.methods.base import Context, Method, Probe, Profile, Result, Role, register
from foveate.methods.budget import Budget
from foveate.methods.policies.checks import at_least
from foveate.methods.policies.listed import Listing, read_and_list
from foveate.methods.policies.lists import top_lists
from foveate.methods.policies.places import ascending, flagged, on_device, own_slots, positions_of, slots_of
from foveate.methods.policies.rows import group_reduce, row_probs
from foveate.methods.profile import fingerprint, made_up
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class LycheeDecode(Method):
    """At each decode step retrieval heads attend to everything and list the tokens they looked at most; a sparse head
    reads the list that came down to it from the layer above at the same head index. Heads are kv heads. The first
    layer's all retrieve, which of the others do was learned: those whose gate is expected to be open.

    Nothing is dropped. The prompt is dense. In long generations `corrects` bounds the drift of what sparse steps wrote:
    so many decoded tokens are given again in one dense piece, which writes their keys and values anew.

    Args:
        tokens: k, length of a list when no budget is given (paper: 1024 and 4096). A budget counts retrieval heads in.
        recent: newest tokens that are on every list, the query's own among them (ours: lists are made of what was seen
            in this step, but nothing else forces a head to read its own token).
        retrieval: how many heads retrieve, those with the widest gates; None: all whose gate is above one half.
        reduce: how the query heads of a kv head agree: "max" or "mean" of their probabilities.
        corrects: how many (paper: 32, for reasoning), just before the next one; 0: none. A budget leaves them out.

    Source: 2602.04541, section 3.
    """

    id = "lycheedecode"
    name = "LycheeDecode"
    paper = "2602.04541"
    slots = frozenset({"decode"})
    calibrated = True
    graph = True

    tokens: int = 4096
    recent: int = 16
    retrieval: int | None = None
    reduce: Literal["max", "mean"] = "max"
    corrects: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, recent=1, retrieval=0, corrects=0)
        if self.tokens < self.recent:
            raise BadArgument("tokens", self.tokens, f"a list holds the recent={self.recent} tokens at least")
        if self.reduce not in ("max", "mean"):
            raise BadArgument("reduce", self.reduce, 'give "max" or "mean"')

    def stand_in(self, shape: ModelShape) -> Profile:
        """The first kv head of every layer retrieves."""
        gates = [[float(head == 0) for head in range(layer.num_kv_heads)] for layer in shape.layers]
        return made_up(self.id, shape, {"open": gates})

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        layers = gated_layers(shape)
        looking = self._looking(shape, profile)
        keep, budget = self.tokens, Budget.of(self.budget)
        if budget is not None:
            dense = sum(len(looking[layer.index]) / layer.num_kv_heads for layer in layers)
            keep = budget.read_tokens(shape, length, dense, name=self.id, floor=self.recent)
            keep = UNBOUNDED if budget.whole else max(self.recent, keep)
        roles = [Role() for _ in shape.layers]
        for layer, below in zip(layers, [*layers[1:], None], strict=True):
            mine = looking[layer.index]
            # A list is read if the next layer's head at this index does not make its own.
            after = () if below is None else tuple(h for h in mine if h not in looking[below.index])
            name = "retrieve" if len(mine) == layer.num_kv_heads else "mixed" if mine else "reuse"
            roles[layer.index] = Role(name, extra={"looking": mine, "publish": after, "keep": keep})
        return roles

    def _looking(self, shape: ModelShape, profile: Profile | None) -> dict[int, tuple[int, ...]]:
        """The retrieval heads of each layer."""
        layers = gated_layers(shape)
        try:
            table = {} if profile is None else profile.data["open"]
            gates = {(x.index, h): float(table[x.index][h]) for x in layers for h in range(x.num_kv_heads)}
        except (KeyError, IndexError, TypeError, ValueError):
            mend = f"{self.id} needs one gate per kv head of this model: run `foveate calibrate` first"
            raise BadArgument("profile", None if profile is None else profile.model, mend) from None
        gates |= {at: torch.inf for at in gates if at[0] == layers[0].index}
        chosen = [at for at, gate in gates.items() if gate > 0.5]
        if self.retrieval is not None:
            least = layers[0].num_kv_heads
            if self.retrieval < least:
                raise BadArgument("retrieval", self.retrieval, f"the first layer's {least} heads always retrieve")
            chosen = sorted(gates, key=gates.__getitem__, reverse=True)[: self.retrieval]
        return {x.index: tuple(sorted(h for layer, h in chosen if layer == x.index)) for x in layers}

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        role = ctx.role
        if role.name == "dense" or not view.exceeds(role.extra["keep"]):
            return ALL
        made = Listing(role.extra["publish"], role.extra["keep"], self.recent, self.reduce == "mean")
        read = read_and_list(q, view, ctx, role.extra["looking"], ctx.forward.get("lists"), made)
        if read is not None:
            out, ctx.forward["lists"] = read
            ctx.forward["listed"] = ctx.layer
            return out
        if role.name == "retrieve":
            return ALL
        handed = ctx.forward["lists"]
        lists = ascending(slots_of(handed.flatten(2), view).unflatten(2, handed.shape[2:]))
        if role.name == "mixed":
            slot = torch.arange(view.capacity, dtype=lists.dtype, device=q.device)
            every = torch.where(slot <= own_slots(q, view).unsqueeze(-1), slot, -1)
            lists = F.pad(lists, (0, max(0, len(slot) - lists.shape[-1])), value=-1)
            every = F.pad(every, (0, lists.shape[-1] - len(slot)), value=-1)
            lists = torch.where(flagged(role.extra["looking"], view), every, lists)
        return Selection(lists=lists, q_block=1)

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> None:
        publish = ctx.role.extra.get("publish", ())
        if ctx.phase != "decode" or not publish or not view.exceeds(ctx.role.extra["keep"]):
            return
        if ctx.forward.get("listed") == ctx.layer:  # while it was read
            return
        heads = on_device(publish, q.device)
        keys, own = view.k().index_select(1, heads), own_slots(q, view)
        queries = q.unflatten(1, (view.lengths.shape[1], -1)).index_select(1, heads).flatten(1, 2)
        slot, positions = torch.arange(keys.shape[2], device=q.device), view.positions.index_select(1, heads)
        newest = (view.seen - view.fresh).view(-1, 1, 1)
        best = own.new_full((*own.shape, min(ctx.role.extra["keep"], keys.shape[2])), -1)
        for i in range(q.shape[2]):
            seen = slot <= own[:, heads, i : i + 1]
            score = group_reduce(row_probs(queries[:, :, i], keys, seen, ctx), self.reduce)
            score = score.masked_fill(positions > newest + i - self.recent, torch.inf).masked_fill(~seen, -torch.inf)
            best[:, heads, i] = top_lists(score, best.shape[-1])
        best = positions_of(best.flatten(2), view).unflatten(2, best.shape[2:])
        before = ctx.forward.get("lists")
        if before is not None:
            width = max(best.shape[-1], before.shape[-1])
            best, before = (F.pad(x, (0, width - x.shape[-1]), value=-1) for x in (best, before))
            best = torch.where(flagged(publish, view), best, before)
        ctx.forward["lists"] = best

    def calibrate(
        self, probe: Probe, data: Iterable[Example] | None = None, *, longest: int | None = None,
        recipe: KumaRecipe | None = None,
    ) -> Profile:  # fmt: skip
        """Learn which kv heads must look everywhere, by HardKuma gates on texts with passkeys.

        The paper's 3000 steps on a GPU, on texts of up to 2048 tokens (masks are dense here); on a CPU 40 coarse steps
        on texts of 256 to 384 tokens, minutes for a small model.

        Args:
            probe: the model, its tokenizer, a seed.
            data: examples instead of the synthetic ones.
            longest: tokens of the longest text; the shortest has half of them.
            recipe: other steps, learning rate, share of open heads, share of the text that a closed head sees.

        Raises:
            Refused: latent attention (MLA).
            BadArgument: texts longer than the model's positions, or too short for a passkey.
        """
        shape = ModelShape.of(probe.model)
        gated_layers(shape)
        on_cpu = next(probe.model.parameters()).device.type == "cpu"
        recipe = recipe or (KumaRecipe(steps=40, lr=0.3, climb=0.3) if on_cpu else KumaRecipe())
        least = shortest(probe.tokenizer)
        longest = longest or min(max(384 if on_cpu else 2048, least), shape.max_positions)
        if longest > shape.max_positions:
            raise BadArgument("longest", longest, f"the model has {shape.max_positions} positions")
        lengths = evenly(min(longest, max(longest // 2, 256 if on_cpu else 512, least)), longest)
        examples = passkey_examples(probe.tokenizer, lengths, probe.seed) if data is None else data
        report, started = probe.progress(recipe.steps, f"{self.id}: gates"), time.perf_counter()
        recent = min(self.recent, max(1, lengths[0] // 16))
        learned = learn_open_heads(probe.model, examples, recipe, recent=recent, seed=probe.seed, report=report)
        made: dict[str, Any] = {"recent": recent, "seed": probe.seed, "tokens": learned.tokens} | asdict(recipe)
        if data is None:
            made |= {"lengths": [lengths[0], lengths[-1], len(lengths)]}
        tenth = max(1, recipe.steps // 10)
        made["distance"] = [round(sum(x) / len(x), 6) for x in (learned.losses[:tenth], learned.losses[-tenth:])]
        made["seconds"] = round(time.perf_counter() - started, 1)
        return Profile(self.id, fingerprint(shape), {"open": learned.gates}, made | made_with(probe.model))
