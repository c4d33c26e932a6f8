"""Mamba-2 layers from attention layers: the projections as they are, the rest so that attention is nearly met."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.compat import output_projection
from foveate.errors import BadArgument, Refused
from foveate.heads.moments import collect
from foveate.layers.mamba2 import Mamba2
from foveate.layers.mixer import build
from foveate.models.converted import decoder_layers, replace
from foveate.models.weights import HeadWeights, read_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPEN_GATE = 1.2784645
"""Where SiLU is 1."""
VALUE_TAP = 0.05
"""The convolution's last tap for values: so near 0 SiLU is a line, and the norm behind it takes any factor away."""
HORIZONS = (1.0, 256.0)
"""Tokens after which heads forget, the first and the last head's; those between them geometrically."""


def check_states(model: PreTrainedModel) -> None:
    """Refuse models in which no layer can hold a state.

    Raises:
        Refused: rotary embeddings by layer type, or latent attention.
    """
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(rope.get("full_attention"), dict):
        raise Refused(f"{config.model_type} rotates by layer type, and knows none for layers that hold a state")
    if hasattr(config, "kv_lora_rank"):
        raise Refused(f"{config.model_type} has latent attention: it has no keys and values to begin from")


@torch.no_grad()
def put_states(
    model: PreTrainedModel,
    layers: Iterable[int],
    tokens: Iterable[Tensor],
    *,
    conv: int = 4,
    repeat_first: bool = False,
) -> dict[str, Any]:
    """Replace the attention of these decoder layers, all others being as they were, by Mamba-2 layers.

    As in MambaInLlama (arXiv 2408.15237, section 3): x <- W_v, B <- W_k, C <- W_q, out <- W_o, biases with them. How
    what is new begins, the papers leave to chance. Here gates are open (z is 1.28 whatever the token, where SiLU is 1);
    the convolution passes the token itself; dt is 1, and heads forget after 1 to 256 tokens; D is 0; and each channel's
    gain in the norm is the one that brings it nearest to the same channel of the attention heads on this text, by least
    squares. Norms on queries and keys become their mean factor on this text.

    Args:
        tokens: batches [B, N] of token ids without padding.

    Returns:
        "error": by layer, the relative root mean square that is left between the heads. JSON values.

    Raises:
        BadArgument: no text.
        Refused: attention whose weights cannot be read.
    """
    batches, chosen = list(tokens), sorted(set(layers))
    if not batches:
        raise BadArgument("tokens", "no batch", "give at least one batch of token ids [B, N]")
    old = {index: decoder_layers(model)[index].self_attn for index in chosen}
    made = {index: _made(model, index, read_heads(module), conv, repeat_first) for index, module in old.items()}
    normed = {index: module for index, module in old.items() if read_heads(module).q_norm is not None}
    for index, moments in (collect(model, normed, batches) if normed else {}).items():
        _scale_by_norms(made[index], read_heads(normed[index]), moments)

    fits = {index: _Fit(module) for index, module in made.items()}
    hooks = [hook for index, module in old.items() for hook in fits[index].watch(module)]
    try:
        for batch in batches:
            model(batch.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for index, fit in fits.items():
        fit.settle()
        replace(model, index, "mamba2", **made[index].spec).load_state_dict(made[index].state_dict())
    return {"error": {str(index): fit.error for index, fit in fits.items()}}


def state_bytes(model: PreTrainedModel) -> int:
    """Bytes that the states of one sequence take, whatever its length."""
    return sum(layer.self_attn.state_bytes() for layer in decoder_layers(model) if isinstance(layer.self_attn, Mamba2))


def _made(model: Any, index: int, weights: HeadWeights, conv: int, repeat_first: bool) -> Mamba2:
    heads, state_dim, _ = weights.q.shape
    kv_heads, head_dim, _ = weights.v.shape
    spec = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "state_dim": state_dim,
        "conv": conv,
        "repeat_first": repeat_first,
        "bias": True,
        "out_bias": weights.o_bias is not None,
    }
    module: Any = build("mamba2", model.config, index, spec)
    parameter = next(decoder_layers(model)[index].self_attn.parameters())
    module = module.to(device=parameter.device, dtype=parameter.dtype)
    rows, biases = module.in_proj.weight, module.in_proj.bias
    z, x, b, c, dt = rows.split(module.widths)
    z_bias, x_bias, b_bias, c_bias, dt_bias = biases.split(module.widths)
    for part, given in ((x, weights.v), (b, weights.k), (c, weights.q)):
        part.copy_(given.flatten(0, 1))
    for part, given in ((x_bias, weights.v_bias), (b_bias, weights.k_bias), (c_bias, weights.q_bias)):
        part.zero_() if given is None else part.copy_(given.flatten())
    for part, value in ((z, 0.0), (dt, 0.0), (z_bias, OPEN_GATE), (dt_bias, 0.0)):
        part.fill_(value)
    module.out_proj.weight.copy_(weights.o.transpose(0, 1).flatten(1))
    if weights.o_bias is not None:
        module.out_proj.bias.copy_(weights.o_bias)
    module.conv1d.weight.zero_()
    module.conv1d.bias.zero_()
    taps = [torch.full((width,), tap) for width, tap in zip(module.mixed, (VALUE_TAP, 1.0, 1.0), strict=True)]
    module.conv1d.weight[:, 0, -1] = torch.cat(taps).to(module.conv1d.weight)
    module.dt_bias.fill_(math.log(math.expm1(1.0)))
    first, last = (math.log(tokens) for tokens in HORIZONS)
    module.A_log.copy_(-torch.linspace(first, last, heads))
    module.D.zero_()
    return module


def _scale_by_norms(module: Mamba2, weights: HeadWeights, moments: Any) -> None:
    """Queries and keys as their norms leave them on average: gain over root mean square, head by head."""
    _, _, b, c, _ = module.in_proj.weight.split(module.widths)
    for part, rows, gain in ((b, weights.k, weights.k_norm), (c, weights.q, weights.q_norm)):
        if gain is not None:
            for head, given in zip(part.unflatten(0, rows.shape[:2]), rows, strict=True):
                size = moments.of(given).diagonal().mean().sqrt()
                head.copy_(given * (gain / size)[:, None])


class _Fit:
    """Gains of the norm by least squares, channel by channel: sums over the text."""

    def __init__(self, module: Mamba2) -> None:
        self.module = module
        self.sums = torch.zeros(3, len(module.norm.weight), dtype=torch.float64, device=module.norm.weight.device)
        self.seen: Tensor | None = None
        self.error = 0.0

    def watch(self, attention: Any) -> list[Any]:
        """Hooks that show this the attention's inputs and its heads' outputs."""
        out = output_projection(attention)
        if out is None:
            raise Refused(f"{type(attention).__name__} has no output projection that Foveate knows")
        return [
            attention.register_forward_pre_hook(self._before, with_kwargs=True),
            out.register_forward_pre_hook(self._heads),
        ]

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen = args[0] if args else kwargs["hidden_states"]

    def _heads(self, module: Any, args: tuple[Any, ...]) -> None:
        assert self.seen is not None
        ours, theirs = self.module.heads_of(self.seen).flatten(0, 1).double(), args[0].flatten(0, -2).double()
        self.sums += torch.stack([(ours * theirs).sum(0), ours.square().sum(0), theirs.square().sum(0)])
        self.seen = None

    def settle(self) -> None:
        mixed, own, wanted = self.sums
        gain = mixed / own.clamp_min(1e-30)
        left = (wanted - gain * mixed).clamp_min(0).sum()
        self.error = math.sqrt(float(left / wanted.sum().clamp_min(1e-30)))
        self.module.norm.weight.mul_(gain.to(self.module.norm.weight))
