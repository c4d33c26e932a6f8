"""What the loss would feel if a head could not see some pairs: first order, with the rest of the row renormalised."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate import compat
from foveate.heads.gates import gated_layers
from foveate.heads.passkeys import Example
from foveate.heads.tap import Tap, Tapped, frozen
from foveate.models.shape import ModelShape


def influence(a: Tensor, g: Tensor) -> Tensor:
    """First-order change of the loss if pair (i, j) is taken away and row i renormalised.

    Args:
        a: attention [..., N, M], rows that sum to at most 1; g: gradient of the loss in a.

    Returns:
        -a (g - sum_k a_k g_k) / (1 - a); -a g where a row is one pair alone. Source: MoA (2406.14909), section 4.1.
    """
    rest = 1 - a
    alone = rest < 1e-6
    change = -a * (g - (a * g).sum(-1, keepdim=True)) / rest.masked_fill(alone, 1.0)
    return torch.where(alone, -a * g, change)


def distance_profile(layer: Tapped, grad: Tensor, block: int) -> Tensor:
    """Summed |influence| by distance in blocks, [Hkv, blocks]; the first block of keys is left out (it stays visible).

    Args:
        grad: of the loss in the layer's output [1, H, N, Dv].
        block: tokens per block of rows and of keys.
    """
    heads, tokens = layer.q.shape[1:3]
    group, count = heads // layer.k.shape[1], -(-tokens // block)
    q, k, v = layer.q[0].float(), *(x[0].float().repeat_interleave(group, 0) for x in (layer.k, layer.v))
    found = torch.zeros(heads, count, device=q.device)
    place = torch.arange(tokens, device=q.device)
    for row in range(count):
        here = slice(row * block, min(tokens, (row + 1) * block))
        logits = q[:, here] @ k[:, : here.stop].transpose(1, 2) * layer.scale
        if layer.softcap is not None:
            logits = torch.tanh(logits / layer.softcap) * layer.softcap
        logits = logits.masked_fill(place[: here.stop] > place[here, None], -torch.inf)
        mass = logits.logsumexp(-1, keepdim=True)
        if layer.sinks is not None:
            mass = torch.logaddexp(mass, layer.sinks.view(-1, 1, 1).float())
        felt = influence((logits - mass).exp(), grad[0, :, here].float() @ v[:, : here.stop].transpose(1, 2)).abs()
        whole = F.pad(felt, (0, (row + 1) * block - here.stop))
        by_block = whole.view(heads, -1, row + 1, block).sum((1, 3))
        if row:
            found[:, :row] += by_block[:, 1:].flip(1)
    return found.view(-1, group, count).sum(1)


def window_losses(
    model: nn.Module, examples: Iterable[Example], block: int, report: Callable[[int, str], None] | None = None
) -> dict[int, Tensor]:
    """By layer, [Hkv, blocks]: how much influence lies outside a window of w + 1 blocks and the first block of keys.

    The loss is the cross-entropy of the labels' positions on the tokens that the model itself holds most likely there.
    Averaged over the examples, which all have the same length.
    """
    model = compat.unwrap(model)
    names = {layer.index for layer in gated_layers(ModelShape.of(model))}
    device = next(model.parameters()).device
    sums: dict[int, Tensor] = {}
    count = 0

    def serve(layer: Tapped) -> Tensor:
        out = layer.attend()
        if layer.shape.index not in names:
            return out
        out = out if out.requires_grad else out.requires_grad_()

        def note(grad: Tensor) -> None:
            with torch.no_grad():
                felt = distance_profile(layer, grad, block).cpu()
            sums[layer.shape.index] = sums.get(layer.shape.index, 0) + felt

        out.register_hook(note)
        return out

    with frozen(model):
        for example in examples:
            ids = torch.tensor([example.ids], device=device)
            with torch.enable_grad(), Tap(model, serve):
                logits = model(input_ids=ids, use_cache=False).logits[0, example.labels - 1 : -1].float()
                loss = F.cross_entropy(logits, logits.detach().argmax(-1))
                loss.backward()
            count += 1
            if report is not None:
                report(1, f"loss {float(loss.detach()):.4g}")
    # Outside a window of w + 1 blocks lies what is more than w blocks away.
    beyond = {index: found.flip(1).cumsum(1).flip(1) / max(1, count) for index, found in sums.items()}
    return {index: F.pad(x[:, 1:], (0, 1)) for index, x in beyond.items()}
