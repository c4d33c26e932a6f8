"""Absorbed MLA: dense attention of models with latents, read from the latents as they are held.

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.2: the up-projections of keys and values move into queries and
outputs, so that a decode step expands nothing. `dense` does the same on such models; this one runs on no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.errors import Refused
from foveate.methods.base import Method, Profile, Role, register
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class AbsorbedMLA(Method):
    """Read and hold everything, as latents."""

    id = "absorbed-mla"
    name = "Absorbed MLA"
    paper = "2405.04434"
    slots = frozenset()
    budgeted = False

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        if not any(layer.latent and layer.kind == "full" for layer in shape.layers):
            raise Refused(f"{self.id}: no layer of {shape.name} holds latents (MLA) that it could read; use dense")
        return super().plan(shape, profile, length)
