"""ACT: in chosen heads, attention sinks behind the first token give most of their mass to all other tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import Selection
from foveate.cache import View
from foveate.errors import BadArgument
from foveate.heads.gates import made_with
from foveate.heads.passkeys import Example, passkey_examples, shortest
from foveate.heads.tap import Tap, Tapped, frozen
from foveate.methods.base import Context, Method, Needs, Probe, Profile, Result, Role, register
from foveate.methods.policies.lists import mask_lists
from foveate.methods.profile import fingerprint, made_up
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class ACT(Method):
    """In the chosen heads, every token but the first that is looked at too much on average (a sink: the mean of its
    column of the attention map, over the queries that can see it, exceeds a threshold) keeps the share `beta` of its
    mass; what it loses goes to all tokens that are no sinks, in proportion to what they have. No map is made: with the
    mass m and the output o_S of the sinks, the row becomes beta o_S + (1 + (1 - beta) m / (1 - m)) (o - o_S).

    A forward's map counts, as released: all its queries together in a prompt (so queries are edited by what later ones
    look at), each query for itself behind the prompt. The released code spares the first sink that it finds, wherever
    it stands, and edits the first row of a batch alone; here the first token of each row is spared, and nobody else.
    Behind the prompt it also gives sinks a part of what they lose and the first token a weight of 1, which is not done.

    Args:
        beta: share of its mass that a sink keeps (paper: 0.4).
        theta: threshold of the column mean, as released.
        alpha: if given, the threshold is alpha / N for a map of N keys instead (paper: 3 to 7).

    Source: 2406.15765, section 4; released code for theta. Which heads: `calibrate`.
    """

    id = "act-calibration"
    name = "ACT"
    paper = "2406.15765"
    slots = frozenset({"weights"})
    causality = "prompt"
    chunked = "approximate"
    budgeted = False
    calibrated = True
    whole_rows = True

    beta: float = 0.4
    theta: float = 0.1
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise BadArgument("beta", self.beta, "give a share from 0 to 1")
        if not 0 < self.theta < 1:
            raise BadArgument("theta", self.theta, "give a share of attention between 0 and 1")
        if self.alpha is not None and self.alpha <= 0:
            raise BadArgument("alpha", self.alpha, "give a number above 0, or None for theta")

    def stand_in(self, shape: ModelShape) -> Profile:
        """Every other head is edited, but for the first two layers and the last."""
        inner = {layer.index for layer in shape.layers[2:-1]}
        heads = [list(range(0, layer.num_heads, 2)) if layer.index in inner else [] for layer in shape.layers]
        return made_up(self.id, shape, {"heads": heads})

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        try:
            table = [tuple(sorted({int(h) for h in row or ()})) for row in (profile.data["heads"] if profile else ())]
            for layer in shape.layers:
                if any(not 0 <= h < layer.num_heads for h in table[layer.index]):
                    raise ValueError
        except (KeyError, IndexError, TypeError, ValueError):
            mend = f"{self.id} needs the heads to edit of each layer: run `foveate calibrate` first"
            raise BadArgument("profile", None if profile is None else profile.model, mend) from None
        edits = [self.beta < 1 and layer.kind == "full" and bool(table[layer.index]) for layer in shape.layers]
        return [Role("edit", extra={"heads": table[i]}) if edit else Role() for i, edit in enumerate(edits)]

    def needs(self, role: Role) -> Needs:
        return Needs(lse=True, probs=True) if role.name == "edit" else Needs()

    def attended(self, q: Tensor, view: View, result: Result, ctx: Context) -> Tensor | None:
        if ctx.role.name != "edit":
            return None
        chosen = torch.zeros(q.shape[1], dtype=torch.bool, device=q.device)
        chosen[list(ctx.role.extra["heads"])] = True
        positions = view.positions.repeat_interleave(q.shape[1] // view.positions.shape[1], dim=1)
        open_to = chosen[:, None] & (positions > 0)  # [B, H, C]
        if result.probs is not None:
            own = (view.seen - view.fresh)[:, None] + torch.arange(q.shape[2], device=q.device) + 1
            sinks = (result.probs > self._threshold(own)[:, None, :, None]) & open_to.unsqueeze(2)
            a, b = result.probs * sinks, result.probs * ~sinks
            left = b.sum(-1, keepdim=True)
            grown = self.beta * a + (1 + (1 - self.beta) * a.sum(-1, keepdim=True) / left.clamp_min(1e-6)) * b
            grouped = grown.unflatten(1, (view.lengths.shape[1], -1))
            new = torch.einsum("bsgnc,bscd->bsgnd", grouped, view.v().to(grown.dtype)).flatten(1, 2)
            return torch.where(sinks.any(-1, keepdim=True) & (left > 1e-6), new.to(result.out.dtype), result.out)
        assert result.lse is not None
        seen, start = view.seen.view(-1, 1, 1), (view.seen - view.fresh).view(-1, 1, 1)
        queries = (seen - torch.maximum(positions, start)).clamp_min(1)
        mean = ctx.columns(q, result.lse) / queries
        sinks = (mean > self._threshold(view.seen).view(-1, 1, 1)) & open_to
        if not sinks.any():
            return None
        part = ctx.attend(q, view, Selection(lists=mask_lists(sinks).unsqueeze(2)))
        assert part.lse is not None
        mass = (part.lse - result.lse).exp().nan_to_num(0.0)
        return edited(result.out, part.out.nan_to_num(0.0).to(mass.dtype) * mass.unsqueeze(-1), mass, self.beta)

    def _threshold(self, keys: Tensor) -> Tensor:
        """For maps of so many keys."""
        return torch.full_like(keys, self.theta, dtype=torch.float32) if self.alpha is None else self.alpha / keys

    def calibrate(
        self,
        probe: Probe,
        data: Iterable[Example] | None = None,
        *,
        samples: int = 4,
        length: int | None = None,
    ) -> Profile:
        """Edit one head alone at a time and keep those heads whose edit helps the model on questions and answers.

        The paper counts right answers on nine data sets; here the loss on the labelled tokens of texts with passkeys
        decides, which a few texts settle. As in the paper, the first two layers and the last are left alone.

        Args:
            probe: the model, its tokenizer, a seed.
            data: examples instead of the synthetic ones.
            samples: texts that every head is tried on.
            length: tokens of a text; 512, or the least that carries a passkey.
        """
        shape = ModelShape.of(probe.model)
        length = length or min(max(512, shortest(probe.tokenizer)), shape.max_positions)
        texts = passkey_examples(probe.tokenizer, [length], probe.seed) if data is None else data
        examples = list(islice(texts, samples))
        full = [layer for layer in shape.layers[2:-1] if layer.kind == "full"]
        heads = [(layer.index, head) for layer in full for head in range(layer.num_heads)]
        report = probe.progress(len(heads), f"{self.id}: heads")
        started = time.perf_counter()
        table: list[list[int]] = [[] for _ in shape.layers]
        with frozen(probe.model), torch.no_grad():
            before = self._loss(probe.model, examples, (-1, -1))
            for layer, head in heads:
                gain = before - self._loss(probe.model, examples, (layer, head))
                if gain > 0:
                    table[layer].append(head)
                report(1, f"layer {layer} head {head}: {gain:+.3g}")
        made = {"beta": self.beta, "theta": self.theta, "alpha": self.alpha, "samples": samples, "seed": probe.seed}
        made |= {"length": length, "loss": before, "seconds": round(time.perf_counter() - started, 1)}
        return Profile(self.id, fingerprint(shape), {"heads": table}, made | made_with(probe.model))

    def _loss(self, model: object, examples: Sequence[Example], head: tuple[int, int]) -> float:
        def serve(layer: Tapped) -> Tensor:
            return self.edited_head(layer, head[1]) if layer.shape.index == head[0] else layer.attend()

        total = 0.0
        for example in examples:
            ids = torch.tensor([example.ids], device=next(model.parameters()).device)  # type: ignore[attr-defined]
            with Tap(model, serve):  # type: ignore[arg-type]
                logits = model(input_ids=ids, use_cache=False).logits[0, example.labels - 1 : -1].float()  # type: ignore[operator]
            total += float(F.cross_entropy(logits, ids[0, example.labels :]))
        return total / len(examples)

    def edited_head(self, layer: Tapped, head: int) -> Tensor:
        """A layer's output with one head edited, by its map."""
        out = layer.attend()
        n, kv = out.shape[2], head * layer.k.shape[1] // layer.q.shape[1]
        logits = layer.q[:, head].float() @ layer.k[:, kv].float().transpose(1, 2) * layer.scale
        if layer.softcap is not None:
            logits = torch.tanh(logits / layer.softcap) * layer.softcap
        a = logits.masked_fill(torch.ones(n, n, dtype=torch.bool, device=out.device).triu(1), -torch.inf).softmax(-1)
        mean = a.sum(1) / torch.arange(n, 0, -1, device=out.device)
        sinks = mean > self._threshold(torch.tensor(n, device=out.device))
        sinks[:, 0] = False
        weights = a * sinks.unsqueeze(1)
        new = edited(out[:, head], weights @ layer.v[:, kv].float(), weights.sum(-1), self.beta)
        return out.index_copy(1, torch.tensor([head], device=out.device), new.unsqueeze(1))


def edited(out: Tensor, part: Tensor, mass: Tensor, beta: float) -> Tensor:
    """Attention whose sinks keep the share beta of their mass, the rest of the row growing in proportion.

    Args:
        out: [..., D] as it was; part: [..., D], the sinks' share in it, of mass [...]. A row that has nothing but sinks
            has nobody to give to, and stays; so does one without.
    """
    rest = (1 - mass).unsqueeze(-1)
    mass = mass.unsqueeze(-1)
    new = beta * part + (1 + (1 - beta) * mass / rest.clamp_min(1e-6)) * (out.to(part.dtype) - part)
    return torch.where((mass > 0) & (rest > 1e-6), new.to(out.dtype), out)
