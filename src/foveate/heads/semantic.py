"""Semantic retrieval heads, and how much each layer suffers when its prompt is cut to a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate import compat
from foveate.errors import Refused
from foveate.heads.passkeys import Example
from foveate.heads.tap import Tap, Tapped, frozen

Report = Callable[[int, str], None]
Table = list[list[float] | None]
"""Per layer of the model one number per query head; None in layers without full attention."""


def attention_rows(layer: Tapped, rows: slice, heads: Sequence[int] | None = None) -> Tensor:
    """Attention of some queries over all keys of a text, float32 [H or heads, rows, N]; learned sinks take their part.

    Args:
        heads: the query heads that are looked at; None: all.
    """
    group = layer.q.shape[1] // layer.k.shape[1]
    chosen = range(layer.q.shape[1]) if heads is None else heads
    q, k = layer.q[0, list(chosen), rows].float(), layer.k[0, [head // group for head in chosen]].float()
    return _softmax(layer, q @ k.transpose(-1, -2), list(chosen), rows.start)


def _softmax(layer: Tapped, product: Tensor, heads: list[int], first: int, hidden: Tensor | None = None) -> Tensor:
    logits = product * layer.scale
    if layer.softcap is not None:
        logits = torch.tanh(logits / layer.softcap) * layer.softcap
    own = torch.arange(first, first + logits.shape[1], device=logits.device)
    future = torch.arange(logits.shape[2], device=logits.device) > own[:, None]
    logits = logits.masked_fill(future if hidden is None else future | hidden, -torch.inf)
    if layer.sinks is not None:
        sink = layer.sinks[heads].float().view(-1, 1, 1).expand(-1, logits.shape[1], 1)
        logits = torch.cat([logits, sink], dim=-1)
    return logits.softmax(-1)[..., : product.shape[-1]]


@torch.no_grad()
def semantic_scores(
    model: nn.Module, examples: Iterable[Example], report: Report | None = None
) -> tuple[Table, int, int]:
    """How strongly each query head looks at the sentence that an answer comes from while the answer is given.

    Where token y is to be given, every place in the sentence that holds y earns the head the attention mass that it has
    on the whole sentence; the mean over the answers that the model gives right in more than half of their tokens. The
    true answer is fed, so a text is one forward.

    Args:
        examples: texts with `recalls`.

    Returns:
        the scores; how many answers were right; how many were asked for.

    Raises:
        Refused: the model gives none of the answers.

    Source: CompressKV (2508.02401), section 3.2; the released code for counting places, not tokens.
    """
    inner = compat.unwrap(model)
    device = next(inner.parameters()).device
    total: dict[int, Tensor] = {}
    right = asked = 0
    layers = 0
    for example in examples:
        gained: list[dict[int, Tensor]] = [{} for _ in example.recalls]

        def serve(layer: Tapped, example: Example = example, gained: list[dict[int, Tensor]] = gained) -> Tensor:
            if layer.shape.kind == "full":
                for recall, mine in zip(example.recalls, gained, strict=True):
                    (low, high), (start, stop) = recall.needle, recall.answer
                    mass = attention_rows(layer, slice(start - 1, stop - 1))[..., low:high].sum(-1)
                    sentence = example.ids[low:high]
                    places = torch.tensor([sentence.count(y) for y in example.ids[start:stop]], device=mass.device)
                    mine[layer.shape.index] = (mass * places).sum(-1)
            return layer.attend()

        ids = torch.tensor([example.ids], device=device)
        with frozen(inner), Tap(inner, serve) as tap:
            layers = max(tap.layers) + 1
            logits = inner(ids, use_cache=False, logits_to_keep=len(example.ids) - example.labels + 1).logits[0]
        guess = logits[-(len(example.ids) - example.labels + 1) :].argmax(-1).tolist()
        for recall, mine in zip(example.recalls, gained, strict=True):
            start, stop = recall.answer
            hits = sum(guess[t - example.labels] == example.ids[t] for t in range(start, stop))
            asked += 1
            if 2 * hits > stop - start:
                right += 1
                for index, score in mine.items():
                    total[index] = total.get(index, torch.zeros_like(score)) + score
        if report is not None:
            report(1, f"{right} of {asked} answers right")
    if not right:
        raise Refused(f"the model gives none of {asked} answers right, so no head can be seen retrieving them")
    table = {index: [round(float(x) / right, 6) for x in score] for index, score in total.items()}
    return [table.get(index) for index in range(layers)], right, asked


@torch.no_grad()
def compression_errors(
    model: nn.Module,
    examples: Iterable[Example],
    voters: Mapping[int, Sequence[int]],
    *,
    chosen: int = 24,
    window: int = 8,
    kernel: int = 5,
    report: Report | None = None,
) -> dict[int, float]:
    """How far a layer's output moves when it holds `chosen` + `window` tokens of the prompt, while the model itself
    runs on all of them; by layer, adding up to 1.

    The prompt of an example ends where its first answer (or its labels) begin; each token behind it adds the relative
    change of the layer's output, projection included.

    Args:
        voters: by layer, the query heads whose window chooses. Layers without are left out.

    Source: CompressKV (2508.02401), section 3.3.
    """
    inner = compat.unwrap(model)
    device = next(inner.parameters()).device
    total = dict.fromkeys(voters, 0.0)
    for example in examples:
        start = min((recall.answer[0] for recall in example.recalls), default=example.labels)

        def serve(layer: Tapped, start: int = start) -> Tensor:
            out = layer.attend()
            heads = voters.get(layer.shape.index)
            if heads is not None:
                few = _compressed(layer, heads, start, chosen, window, kernel).to(out.dtype)
                whole, few = layer.project(out[:, :, start:])[0].float(), layer.project(few)[0].float()
                change = (few - whole).norm(dim=-1) / (whole.norm(dim=-1) + 1e-5)
                total[layer.shape.index] += float(change.sum())
            return out

        with frozen(inner), Tap(inner, serve):
            compat.base_model(inner)(input_ids=torch.tensor([example.ids], device=device), use_cache=False)
        if report is not None:
            report(1, "")
    whole = sum(total.values())
    return {index: error / whole if whole else 1 / len(total) for index, error in total.items()}


def _compressed(layer: Tapped, voters: Sequence[int], start: int, chosen: int, window: int, kernel: int) -> Tensor:
    """Heads' outputs [1, H, N - start, Dv] of the queries from `start` on, which see what is held of the prompt and
    everything behind it."""
    first = max(0, start - window)
    mass = attention_rows(layer, slice(first, start), voters).sum(1)[:, :first]
    score = F.avg_pool1d(mass, kernel, stride=1, padding=kernel // 2).mean(0) if first else mass.sum(0)
    hidden = torch.zeros(layer.q.shape[2], dtype=torch.bool, device=layer.q.device)
    hidden[:first] = True
    hidden[score.topk(min(chosen, first)).indices] = False
    group = layer.q.shape[1] // layer.k.shape[1]
    k, v = (x[0].float().repeat_interleave(group, dim=0) for x in (layer.k, layer.v))
    product = layer.q[0, :, start:].float() @ k.transpose(-1, -2)
    return (_softmax(layer, product, list(range(len(k))), start, hidden) @ v).unsqueeze(0)
