"""Boundaries: the places of a text where attention changes its mind, and a small network that sees them in the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate import compat
from foveate.errors import BadArgument, Refused
from foveate.heads.passkeys import Example
from foveate.heads.tap import Tap, Tapped, frozen
from foveate.models.shape import ModelShape

GAPS_AT_ONCE = 4096
"""Gaps whose windows are looked at together."""


@dataclass(frozen=True)
class BoundaryRecipe:
    """How the predictor is trained.

    Args:
        texts: how many are looked at, one in eight of them to measure with.
        epochs: times each text is gone through (paper: about 2, with far more text).
        lr: learning rate of Adam (paper: 1e-4, with far more text).
        window: w, tokens on each side of a gap.
        apart: labels stand further apart than this.
        theta: least ratio of a label.
        chunk: one label per so many tokens at most.
        sharpness: a label's strength is sigmoid(sharpness * ln ratio).
        focus: exponent of the focal loss.
        hidden: width of the last layers.

    Source: DHSA (2510.24606), section 3; released code for the numbers.
    """

    texts: int = 32
    epochs: int = 16
    lr: float = 1e-3
    window: int = 4
    apart: int = 8
    theta: float = 1.1
    chunk: int = 32
    sharpness: float = 4.0
    focus: float = 2.0
    hidden: int = 256

    def __post_init__(self) -> None:
        for name in ("epochs", "window", "chunk", "hidden"):
            if getattr(self, name) < 1:
                raise BadArgument(name, getattr(self, name), "give at least 1")
        if self.texts < 2:
            raise BadArgument("texts", self.texts, "give at least 2, one of them to measure with")
        if not self.lr > 0:
            raise BadArgument("lr", self.lr, "it must be above 0")
        if self.theta < 1:
            raise BadArgument("theta", self.theta, "ratios are 1 and more")


def key_width(shape: ModelShape) -> int:
    """Channels of a token's keys in the first layer with full attention, all heads side by side; 0: there is none."""
    full = next((layer for layer in shape.layers if layer.kind == "full"), None)
    return 0 if full is None else (full.num_heads if full.latent else full.num_kv_heads) * full.head_dim


class BoundaryPredictor(nn.Module):
    """Says of every gap between two tokens whether a chunk should end there, from the keys of w tokens on each side.

    The 2w tokens attend to each other; each side's mean is taken, and a small network compares the two.

    Args:
        width: channels of a token's keys, all heads side by side.
        window: w.
        hidden: width of the comparing network.

    Source: DHSA (2510.24606), section 3. Keys are standardised first (ours).
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, width: int, window: int = 4, hidden: int = 256) -> None:
        super().__init__()
        self.window, self.heads = window, gcd(width, 4)
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.compare = nn.Sequential(nn.Linear(4 * width + 1, hidden), nn.GELU(), nn.Linear(hidden, 1))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], window: int) -> BoundaryPredictor:
        """A trained predictor from its weights.

        Raises:
            KeyError, RuntimeError: weights that are missing or do not fit each other.
        """
        made = cls(tensors["centre"].shape[0], window, tensors["compare.0.weight"].shape[0])
        made.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return made.eval().requires_grad_(False)

    @classmethod
    def untrained(cls, width: int, window: int) -> BoundaryPredictor:
        """One with random weights, the same in every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(width, window)

    def weights(self) -> dict[str, Tensor]:
        """What a profile holds of it, in half precision; `of` takes it."""
        return {name: x.detach().half().cpu() for name, x in self.state_dict().items()}

    def forward(self, keys: Tensor) -> Tensor:
        """Keys [m, width] -> a logit per gap [m - 1], float32; -inf where there are not w tokens on each side.

        Gap p lies between the tokens p and p + 1.
        """
        m, w = keys.shape[0], self.window
        logits = keys.new_full((max(0, m - 1),), -torch.inf, dtype=torch.float32)
        if m < 2 * w:
            return logits
        x = (keys.float() - self.centre) / self.spread
        # Nothing in a window depends on where it lies, so tokens are projected once and not once per window.
        projected = self.project(x).view(m, 3, self.heads, -1)
        offset = torch.arange(2 * w, device=keys.device)
        found = []
        for first in torch.arange(m - 2 * w + 1, device=keys.device).split(GAPS_AT_ONCE):
            index = first[:, None] + offset
            q, k, v = projected[index].permute(2, 0, 3, 1, 4)  # [gaps, heads, 2w, d] each
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            tokens = self.norm(x[index] + self.out(mixed))
            a, b = tokens[:, :w].mean(1), tokens[:, w:].mean(1)
            alike = F.cosine_similarity(a, b, dim=-1).unsqueeze(-1)
            found.append(self.compare(torch.cat([a, b, (a - b).abs(), a * b, alike], dim=-1)).squeeze(-1))
        return torch.cat([logits[: w - 1], *found, logits[: w - 1]])


def boundary_ratios(attention: Tensor, window: int, epsilon: float = 1e-9) -> Tensor:
    """How differently the two sides of each gap are attended to later: the larger of the two masses over the smaller.

    Args:
        attention: [m, m], rows are queries; averaged over heads.
        window: w. The masses of gap p are those of the w tokens up to p and of the w tokens behind it, in the rows from
            p + w + 1 on.

    Returns:
        float64 [m - 1], at least 1; 1 where there are not w tokens on each side, or no row behind them.

    Source: DHSA (2510.24606), section 3.
    """
    m = attention.shape[0]
    below = attention.double().flip(0).cumsum(0).flip(0)  # below[r, j]: mass of column j in the rows from r on
    area = F.pad(below.cumsum(1), (1, 0, 0, 1))
    ratios = attention.new_ones(max(0, m - 1), dtype=torch.float64)
    p = torch.arange(window - 1, m - window, device=attention.device)
    if len(p):
        left, middle, right = (area[p + window + 1, at] for at in (p - window + 1, p + 1, p + 1 + window))
        past, future = (middle - left).clamp_min(0), (right - middle).clamp_min(0)
        ratios[p] = (torch.maximum(past, future) + epsilon) / (torch.minimum(past, future) + epsilon)
    return ratios


def key_distances(keys: Tensor, window: int) -> Tensor:
    """1 - cosine of the mean keys [m, width] of the w tokens on each side of every gap: float32 [m - 1]; -inf where
    there are not w on each side. A boundary score that nobody has to train."""
    m = keys.shape[0]
    scores = keys.new_full((max(0, m - 1),), -torch.inf, dtype=torch.float32)
    if m >= 2 * window:
        means = keys.float().unfold(0, window, 1).mean(-1)  # of the tokens i .. i + w - 1
        scores[window - 1 : m - window] = 1 - F.cosine_similarity(means[:-window], means[window:], dim=-1)
    return scores


def separate_peaks(scores: Tensor, count: int, apart: int, least: float = -torch.inf) -> Tensor:
    """The best `count` places of scores [n], each more than `apart` from all others: int64, ascending.

    Greedy, best first, ties to the earlier place; only places with scores above `least`.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > least].tolist()
    taken: list[int] = []
    near = bytearray(len(scores))
    for place in order:
        if len(taken) >= count:
            break
        if not near[place]:
            taken.append(place)
            low, high = max(0, place - apart), min(len(near), place + apart + 1)
            near[low:high] = b"\1" * (high - low)
    return torch.tensor(sorted(taken), dtype=torch.int64, device=scores.device)


def focal_loss(logits: Tensor, labels: Tensor, weight: float, focus: float) -> Tensor:
    """Binary cross-entropy against soft labels, positives times `weight`, hard places stressed; the mean."""
    entropy = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=logits.new_tensor(weight), reduction="none")
    p = logits.sigmoid()
    return ((labels * (1 - p) + (1 - labels) * p) ** focus * entropy).mean()


class Lesson(NamedTuple):
    """One text: keys [m, width] of the first layer, and a label per gap [m - 1]."""

    keys: Tensor
    labels: Tensor


class Trained(NamedTuple):
    """A predictor, its mean loss in the first and in the last epoch, and the share of boundaries in texts it was not
    trained on that it finds within `apart` tokens, beside the share that evenly spaced ones find."""

    predictor: BoundaryPredictor
    losses: tuple[float, float]
    found: float
    by_chance: float


def learn_boundaries(
    model: nn.Module,
    examples: Iterable[Example],
    recipe: BoundaryRecipe,
    seed: int,
    report: Callable[[int, str], None],
) -> Trained:
    """Train a predictor on a frozen model. Labels come from its attention, averaged over heads and full layers; what is
    looked at are the keys of its first full layer, as they are cached.

    Args:
        report: called with steps done (texts looked at, then epochs) and how it goes.

    Raises:
        Refused: no layer has full attention.
        BadArgument: fewer than two texts.
    """
    lessons = list(_lessons(model, islice(examples, recipe.texts), recipe, report))
    return train_predictor(lessons, recipe, seed, report)


def train_predictor(
    lessons: Sequence[Lesson], recipe: BoundaryRecipe, seed: int, report: Callable[[int, str], None]
) -> Trained:
    """Train on all but the last eighth of the lessons, and measure on that.

    Raises:
        BadArgument: fewer than two lessons.
    """
    if len(lessons) < 2:
        raise BadArgument("data", f"{len(lessons)} examples", "give at least two texts, one of them to measure with")
    held = max(1, len(lessons) // 8)
    train, test = lessons[:-held], lessons[-held:]
    every = torch.cat([lesson.keys for lesson in train])
    positive = sum(float(lesson.labels.sum()) for lesson in train)
    weight = max(1.0, (sum(len(lesson.labels) for lesson in train) - positive) / max(positive, 1.0))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        predictor = BoundaryPredictor(every.shape[1], recipe.window, recipe.hidden).to(every.device)
        predictor.centre.copy_(every.mean(0))
        predictor.spread.copy_(every.std(0).clamp_min(1e-6))
        optimiser = torch.optim.Adam(predictor.parameters(), lr=recipe.lr)
        losses: list[float] = []
        for _ in range(recipe.epochs):
            total = 0.0
            for i in torch.randperm(len(train)).tolist():
                logits = predictor(train[i].keys)
                real = logits > -torch.inf
                loss = focal_loss(logits[real], train[i].labels[real], weight, recipe.focus)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += float(loss.detach())
            losses.append(total / len(train))
            report(1, f"loss {losses[-1]:.3f}")
    predictor.eval().requires_grad_(False)
    hits, chance, labels = 0, 0, 0
    for keys, label in test:
        places, count = label.nonzero().squeeze(1), int((label > 0).sum())
        even = torch.arange(1, count + 1, device=label.device) * len(label) // (count + 1)
        labels += count
        hits += _near(places, separate_peaks(predictor(keys), count, recipe.apart), recipe.apart // 2)
        chance += _near(places, even, recipe.apart // 2)
    return Trained(predictor, (losses[0], losses[-1]), hits / max(1, labels), chance / max(1, labels))


def _near(places: Tensor, others: Tensor, reach: int) -> int:
    """How many places have one of the others within reach."""
    if not len(others):
        return 0
    return int(((places[:, None] - others).abs().amin(1) <= reach).sum())


@torch.no_grad()
def _lessons(
    model: nn.Module, examples: Iterable[Example], recipe: BoundaryRecipe, report: Callable[[int, str], None]
) -> Iterator[Lesson]:
    shape = ModelShape.of(compat.unwrap(model))
    full = [layer.index for layer in shape.layers if layer.kind == "full"]
    if not full:
        raise Refused(f"{shape.name} has no layer with full attention, so there is nothing to cut into chunks")
    device = next(model.parameters()).device
    seen: list[Tensor] = []
    keys: list[Tensor] = []

    def serve(layer: Tapped) -> Tensor:
        if layer.shape.index in full:
            seen.append(_mean_map(layer))
            if layer.shape.index == full[0]:
                keys.append(layer.k[0].transpose(0, 1).flatten(1).float())
        return layer.attend()

    for example in examples:
        with frozen(model), Tap(model, serve):
            model(torch.tensor([example.ids], device=device), use_cache=False, logits_to_keep=1)
        ratios = boundary_ratios(torch.stack(seen).mean(0), recipe.window)
        labels = torch.zeros(len(ratios), device=device)
        places = separate_peaks(ratios, max(1, len(example.ids) // recipe.chunk), recipe.apart, recipe.theta)
        labels[places] = (recipe.sharpness * ratios[places].log()).sigmoid().float()
        yield Lesson(keys[0], labels)
        seen.clear()
        keys.clear()
        report(1, f"{len(places)} boundaries")


def _mean_map(layer: Tapped) -> Tensor:
    """The layer's causal attention [N, N] of one text, averaged over query heads, head by head."""
    heads, n = layer.q.shape[1:3]
    group = heads // layer.k.shape[1]
    future = torch.ones(n, n, dtype=torch.bool, device=layer.q.device).triu(1)
    total = torch.zeros(n, n, device=layer.q.device)
    for head in range(heads):
        logits = layer.q[0, head].float() @ layer.k[0, head // group].float().T * layer.scale
        if layer.softcap is not None:
            logits = torch.tanh(logits / layer.softcap) * layer.softcap
        total += logits.masked_fill_(future, -torch.inf).softmax(-1)
    return total / heads
