"""An encoder's attention heads as experts: each token is served by a few of them, and who serves is counted.

Source: "SHRP: Specialized Head Routing and Pruning for Efficient Encoder Compression", arXiv:2512.20635, of which only
the abstract says how: heads are experts, Top-1 usage says which survive. Ours: scores are of a token; a taken head has
gate 1; the router is linear, or one of two without parameters.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveate.errors import BadArgument
from foveate.layers.routing import Routed, Routing, straight_through, top_k, widened


class ExpertHeads(Routed):
    """Stands in the place of an encoder layer's `attention.self`.

    Args:
        inner: that module. output: the linear map behind its heads.
        router: "linear", trainable scores of the token; "norm", the length of its query; "written", the length of what
            the head writes, for which all heads must have been computed: it tells usage, and saves nothing.
        k: heads that serve a token; all of them: the dense layer.
    """

    usage: Tensor
    """How many tokens each head was the first choice of in eval mode, padding not counted: int64 [H]."""

    def __init__(
        self, inner: Any, output: nn.Linear, router: Literal["linear", "norm", "written"] = "norm", k: int = 1
    ) -> None:
        super().__init__()
        if router not in ("linear", "norm", "written"):
            raise BadArgument("router", router, 'give "linear", "norm" or "written"')
        heads = inner.num_attention_heads
        if not 1 <= k <= heads:
            raise BadArgument("k", k, f"give 1 to {heads}, the heads of this layer")
        self.inner, self.router, self.k, self.heads = inner, router, k, heads
        self._output = [output]  # in a list: it is the layer's, not ours
        device = output.weight.device
        self.gate = nn.Linear(output.out_features, heads, bias=False, device=device, dtype=output.weight.dtype)
        if router != "linear":
            self.gate = None
        self.register_buffer("usage", torch.zeros(heads, dtype=torch.long, device=device), persistent=False)

    def route(self, hidden_states: Tensor, out: Tensor) -> Routing:
        """Gates [B, N, H] of tokens [B, N, d] for which the heads give out [B, N, H, D]."""
        if self.gate is not None:
            logits = widened(self.gate(hidden_states))
        elif self.router == "norm":
            logits = self.inner.query(hidden_states).unflatten(-1, (self.heads, -1)).float().norm(dim=-1)
        else:
            columns = self._output[0].weight.unflatten(1, (self.heads, -1)).float()
            gram = torch.einsum("chd,che->hde", columns, columns)
            logits = torch.einsum("bnhd,hde,bnhe->bnh", out.float(), gram, out.float()).clamp(min=0).sqrt()
        soft = logits.softmax(-1)
        chosen = top_k(logits.detach(), self.k)
        return Routing(straight_through(chosen, soft), chosen, soft, chosen, logits)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        joined, weights = self.inner(hidden_states, attention_mask, **kwargs)
        out = joined.unflatten(-1, (self.heads, -1))
        routing = self.route(hidden_states, out)
        self.note(routing)
        if not self.training:
            first = routing.logits.argmax(-1)[_real(attention_mask, hidden_states)]
            self.usage += torch.bincount(first, minlength=self.heads)
        return (out * routing.gates.unsqueeze(-1).to(out.dtype)).flatten(2), weights


def _real(mask: Tensor | None, hidden_states: Tensor) -> Tensor:
    """Bool [B, N]: tokens that others may read, which in an encoder is all but the padding."""
    batch, length = hidden_states.shape[:2]
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=hidden_states.device)
    if mask.ndim == 4:
        mask = mask[:, 0, 0]
    real = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    return real.expand(batch, length)
