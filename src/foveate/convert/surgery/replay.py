"""Run a decoder layer by layer on stored hidden states, so that each layer can be changed knowing what reaches it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.models.converted import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""How strongly an output matrix may be held to what it is, in shares of the mean energy of a head's dim."""


class Replay:
    """The hidden states of some text before one layer, and what else the model gave each layer with them.

    Args:
        tokens: batches [B, N] of token ids without padding. The hidden states of all of them are held at once.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokens: Iterable[Tensor]) -> None:
        self.model = model
        self.hidden: list[Tensor] = []
        self._given: list[list[dict[str, Any]]] = []
        layers = decoder_layers(model)

        def note(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                rest = dict(kwargs)
                hidden = args[0] if args else rest.pop("hidden_states")
                if index == 0:
                    self.hidden.append(hidden.detach())
                    self._given.append([])
                self._given[-1].append(rest)

            return hook

        handles = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
        try:
            for batch in tokens:
                model(batch.to(model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def calls(self, layer: int) -> list[dict[str, Any]]:
        """What the attention module of this layer is called with, batch by batch, as keyword arguments.

        The hidden states must have come to this layer: call `step` for each one before it.
        """
        found: list[dict[str, Any]] = []

        class Stop(Exception):
            pass

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append({"hidden_states": args[0], **kwargs} if args else dict(kwargs))
            raise Stop

        block = decoder_layers(self.model)[layer]
        handle = block.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            for hidden, given in zip(self.hidden, self._given, strict=True):
                try:
                    block(hidden, **given[layer])
                except Stop:
                    continue
        finally:
            handle.remove()
        return found

    @torch.no_grad()
    def step(self, layer: int) -> None:
        """Take the hidden states through this layer, as it is now."""
        block = decoder_layers(self.model)[layer]
        for i, hidden in enumerate(self.hidden):
            out = block(hidden, **self._given[i][layer])
            self.hidden[i] = out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def refit_output(new: Any, old: Any, calls: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Solve for the output matrix with which a new layer returns what an old one does, by least squares.

    How strongly the matrix is held to what it is, a quarter of the text decides, from which it is not solved: where
    there is little text or little to gain, it stays.

    Args:
        new: a layer whose heads go through `o_proj`, which is changed. old: the module that it replaced.
        calls: keyword arguments to call both with.

    Returns:
        Relative mean square of what is missed, before and after, on that quarter.
    """
    linear: nn.Linear = new.o_proj
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    width, out = linear.in_features, linear.out_features
    a = torch.zeros(2, width, width, dtype=torch.float64, device=linear.weight.device)
    b = torch.zeros(2, width, out, dtype=torch.float64, device=linear.weight.device)
    before = energy = 0.0
    try:
        for call in calls:
            want, got = old(**call)[0].flatten(0, -2).double(), new(**call)[0].flatten(0, -2).double()
            x, rest = seen.pop().flatten(0, -2).double(), want - got
            cut = len(x) - len(x) // 4
            for half, part in enumerate((slice(0, cut), slice(cut, None))):
                a[half] += x[part].T @ x[part]
                b[half] += x[part].T @ rest[part]
            before, energy = before + float(rest[cut:].square().sum()), energy + float(want[cut:].square().sum())
    finally:
        handle.remove()
    tiny = torch.finfo(a.dtype).tiny
    eye = a[0].diagonal().mean().clamp_min(tiny) * torch.eye(width, dtype=a.dtype, device=a.device)

    def gain(change: Tensor) -> float:
        return 2 * float((change * b[1]).sum()) - float((change * (a[1] @ change)).sum())

    gains = {ridge: gain(torch.linalg.solve(a[0] + ridge * eye, b[0])) for ridge in _RIDGES}
    best = max(gains, key=lambda ridge: gains[ridge])
    if gains[best] <= 0:
        return before / max(energy, tiny), before / max(energy, tiny)
    change = torch.linalg.solve(a.sum(0) + best * eye, b.sum(0))
    linear.weight += change.T.to(linear.weight.dtype)
    return before / max(energy, tiny), max(before - gains[best], 0.0) / max(energy, tiny)


def refit_all(model: PreTrainedModel, given: Mapping[int, Any], tokens: Iterable[Tensor]) -> list[list[float]]:
    """`refit_output` of some layers, first to last, each on what the layers before it now return.

    Args:
        given: by layer, the module that was replaced.

    Returns:
        For each of these layers what is missed, before and after.
    """
    replay, missed = Replay(model, tokens), []
    for index, layer in enumerate(decoder_layers(model)):
        if index in given:
            missed.append(list(refit_output(layer.self_attn, given[index], replay.calls(index))))
        replay.step(index)
    return missed


@torch.no_grad()
def hidden_states(model: PreTrainedModel, tokens: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """What each layer's attention module reads, [B, N, d], layer by layer within each batch of token ids."""
    seen: list[tuple[int, Tensor]] = []

    def note(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((index, args[0] if args else kwargs["hidden_states"]))

        return hook

    for batch in tokens:
        layers = enumerate(decoder_layers(model))
        handles = [layer.self_attn.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in layers]
        try:
            model(batch.to(model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        yield from seen
        seen.clear()
