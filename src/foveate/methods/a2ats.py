"""A2ATS: which tokens a decode step reads is looked up by the codes of their keys."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from foveate.attention import ALL, Parts, Selection
from foveate.cache import UNBOUNDED, Tag, View
from foveate.errors import BadArgument, Refused
from foveate.heads.codebooks import Codebook, collect, fit, random_texts
from foveate.heads.gates import made_with
from foveate.heads.passkeys import Example, running_examples
from foveate.methods.base import Context, Method, Needs, Probe, Profile, Result, Role, register, tries
from foveate.methods.budget import Budget
from foveate.methods.policies.checks import at_least
from foveate.methods.policies.lists import set_lists, top_lists
from foveate.methods.policies.positions import at_position, refuse_fixed_positions
from foveate.methods.policies.ranks import among_best, best_ranks, chosen_by_codes, code_scores, codes_of, places
from foveate.methods.profile import fingerprint, made_up
from foveate.models.shape import LayerShape, ModelShape

CENTROIDS = 4096  # of each codebook (paper)


@register
@dataclass(frozen=True, kw_only=True)
class A2ATS(Method):
    """Every key is known by a code: the nearest of a few centroids that were fitted to the model's keys before their
    rotation, in the metric of its queries. At a decode step a query scores the centroids as if all stood `distance`
    tokens back, and each key takes the score of its code; no key is touched for that. The best keys of the query heads
    of a kv head together are read, with the first and the newest ones, exactly and where they stand. Prompt and what is
    held are left whole.

    The paper keeps keys and values on the CPU and reads chosen ones there; here they stay on the device. Codes take 16
    bits, where 12 would do for 4096 centroids.

    Args:
        ratio: of all tokens, how many each query head chooses between the first and the newest (rounded down). Under a
            budget each chooses as many as fill it, together with the others of its group.
        sink, window: first and newest tokens that are always read, the query's own included.
        distance: b, where centroids stand when they are scored; must be that of the calibration.

    Source: 2502.12665, section 3; defaults of the released code.
    """

    id = "a2ats"
    name = "A2ATS"
    paper = "2502.12665"
    slots = frozenset({"decode"})
    calibrated = True
    graph = True
    search = tries(sink=(8,), window=(32, 64, 128))

    ratio: float = 0.03
    sink: int = 8
    window: int = 64
    distance: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio <= 1:
            raise BadArgument("ratio", self.ratio, "give a share of the tokens from 0 to 1")
        at_least(self, sink=0, window=1, distance=0)

    def stand_in(self, shape: ModelShape) -> Profile:
        """As many random centroids as in the paper, under a metric that sees all channels alike."""
        full = [layer for layer in shape.layers if layer.kind == "full"]
        books = {i: Codebook.random(layer.num_kv_heads, CENTROIDS, layer.head_dim, i) for i, layer in enumerate(full)}
        tensors = {name: x for i, book in books.items() for name, x in book.tensors(str(full[i].index)).items()}
        return made_up(self.id, shape, {"distance": self.distance, "centroids": CENTROIDS}, tensors)

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        self._refuse(shape)
        full = [layer for layer in shape.layers if layer.kind == "full"]
        books = self._books(profile, full)
        budget, most = Budget.of(self.budget), None
        if budget is not None:
            fixed = self.sink + self.window
            read = budget.read_tokens(shape, length, 0, name=self.id, floor=fixed + 1)
            most = UNBOUNDED if budget.whole else max(1, read - fixed)
        most = UNBOUNDED if self.ratio == 1 and budget is None else most
        roles = {index: Role("look up", extra={"most": most, "book": book}) for index, book in books.items()}
        return [roles.get(layer.index, Role()) for layer in shape.layers]

    def _refuse(self, shape: ModelShape) -> None:
        refuse_fixed_positions(shape, self.id)
        if any(layer.latent for layer in shape.layers):
            raise Refused(f"{self.id}: {shape.name} caches a latent for all heads (MLA); codebooks are made for keys")

    def _books(self, profile: Profile | None, layers: Sequence[LayerShape]) -> dict[int, Codebook]:
        """The codebook of each layer."""
        try:
            found = {x.index: Codebook.of({} if profile is None else profile.tensors, str(x.index)) for x in layers}
            if any(found[x.index].lower.shape[:2] != (x.num_kv_heads, x.head_dim) for x in layers):
                raise KeyError
        except (KeyError, RuntimeError):
            mend = f"{self.id} needs codebooks of this model's keys: run `foveate calibrate` first"
            raise BadArgument("profile", None if profile is None else profile.model, mend) from None
        if profile is not None and (made := profile.data.get("distance")) != self.distance:
            raise BadArgument("distance", self.distance, f"the codebooks were made for {made}; give that, or calibrate")
        return found

    def needs(self, role: Role) -> Needs:
        if role.name != "look up" or role.extra["most"] == UNBOUNDED:
            return Needs()
        return Needs(tags={self.id: Tag(dtype=torch.int16, fill=-1)})

    def select(self, q: Tensor, view: View, ctx: Context) -> Parts:
        most = ctx.role.extra["most"]
        if most == UNBOUNDED or not view.exceeds(self.sink + self.window):
            return ALL
        where = {"distance": self.distance, "sink": self.sink, "window": self.window}
        chosen = chosen_by_codes(self.id, q, view, ctx, **where, ratio=self.ratio, most=most)
        if chosen is not None:
            return chosen
        codes, (own, last, seen, forced) = codes_of(self.id, q, view, ctx), places(q, view, ctx, self.sink, self.window)
        stores, capacity = codes.shape[1:]
        turned = at_position(q, own, self.distance, ctx.rope).float().unflatten(1, (stores, -1))
        table = turned @ ctx.role.extra["book"].on(q.device).centroids.mT.unsqueeze(1)
        scores = code_scores(table, codes, seen, forced)  # [B, Hs, G, N, C]
        each = int(capacity * self.ratio + 1e-9) if most is None else min(most, capacity)
        if most is None:
            counts = ((last + 1).double() * self.ratio + 1e-9).long()
            width = self.sink + self.window + q.shape[1] // stores * each
            chosen = seen & (forced | among_best(scores, each, counts))
            return Selection(lists=set_lists(chosen, width), q_block=1)
        least = best_ranks(scores, each)
        value = torch.where(least < capacity, -least.float(), -torch.inf).masked_fill(forced & seen, torch.inf)
        return Selection(lists=top_lists(value, self.sink + self.window + most), q_block=1)

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> None:
        if ctx.phase == "prompt":
            ctx.mine.clear()  # these tokens have no codes yet
        else:
            ctx.mine.update(ctx.forward.pop(f"coded {ctx.layer}", {}))

    def calibrate(
        self,
        probe: Probe,
        data: Iterable[Example] | None = None,
        *,
        centroids: int | None = None,
        tokens: int | None = None,
        length: int | None = None,
    ) -> Profile:
        """Fit a codebook to the keys of every kv head on plain text and, a fifth of it, random identifiers.

        Args:
            probe: the model, its tokenizer, a seed.
            data: texts instead of both.
            centroids: of each codebook (paper: 4096; 64 on a CPU).
            tokens: how many in all (paper: 80 thousand; 8 thousand on a CPU).
            length: of each text (2048; 512 on a CPU).

        Raises:
            Refused: MLA, or positions that cannot be turned.
            BadArgument: a number that makes no sense.
        """
        shape = ModelShape.of(probe.model)
        self._refuse(shape)
        on_cpu = next(probe.model.parameters()).device.type == "cpu"
        centroids, tokens = centroids or (64 if on_cpu else CENTROIDS), tokens or (8192 if on_cpu else 81920)
        length = min(length or (512 if on_cpu else 2048), shape.max_positions, tokens)
        for name, value, most in (("centroids", centroids, 2**15), ("length", length, tokens)):
            if not 1 <= value <= most:
                raise BadArgument(name, value, f"give 1 to {most}")
        if data is None:
            count = max(1, tokens // length)
            plain = (x.ids for x in running_examples(probe.tokenizer, (length,), probe.seed))
            names = random_texts(probe.tokenizer, length, probe.seed)
            texts = [*islice(plain, count - count // 5), *islice(names, count // 5)]
        else:
            texts = [x.ids for x in data]
        heads = sum(layer.num_kv_heads for layer in shape.layers if layer.kind == "full")
        report, began = probe.progress(len(texts) + heads, self.id), time.perf_counter()
        found = collect(probe.model, texts, self.distance, report)
        generator = torch.Generator().manual_seed(probe.seed)
        tensors: dict[str, Tensor] = {}
        for index, (keys, moment) in found.items():
            books = []
            for head in range(len(keys)):
                books.append(fit(keys[head].to(moment.device).float(), moment[head], centroids, generator))
                report(1, f"layer {index}")
            tensors |= Codebook.stacked(books).tensors(str(index))
        made: dict[str, Any] = {"tokens": sum(map(len, texts)), "texts": len(texts), "seed": probe.seed}
        made |= {"centroids": centroids, "seconds": round(time.perf_counter() - began, 1)}
        data_ = {"distance": self.distance, "centroids": centroids}
        return Profile(self.id, fingerprint(shape), data_, made | made_with(probe.model), tensors)
