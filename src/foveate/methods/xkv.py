"""xKV: layers that follow each other hold their prompt in one low-rank basis."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.errors import Refused
from foveate.methods.base import Codec, Method, Profile, Role, register, tries
from foveate.methods.budget import Budget
from foveate.methods.declared import Joint
from foveate.methods.policies.bases import joined, joint_share, low_rank, whole, widths
from foveate.methods.policies.checks import at_least, holds_more
from foveate.models.shape import ModelShape


@register
@dataclass(frozen=True, kw_only=True)
class XKV(Method):
    """When the prompt is over, the keys of each `group` consecutive layers, heads and layers side by side, are replaced
    by their best approximation of rank `rank_k`, and the values by one of `rank_v`: one vector per token for the whole
    group and a matrix per layer, [M, r] and [r, Hkv * D]. Keys lose their rotation first and are turned to where they
    stand whenever they are read. No calibration: a singular value decomposition per prompt and group. Each sequence
    of a batch has its own.

    What is generated stays exact, as in the paper; so does the prompt's own attention. A side of a group that would
    grow by this (short prompts, high ranks) stays exact as well. Exact keys and values of a group live until its last
    layer has them: the peak is that of one group. Reading makes keys and values of one layer at a time anew. The
    released code multiplies back at once and stores what it had before.

    Under latent attention (MLA) the latents are held so, under `rank_k`; the rotated channels beside them stay exact.
    The last group may be smaller. With `group` 1 it is a decomposition of each layer alone. Assisted decoding whose
    candidates come with the prompt itself is refused: the first layers of a group would still read it exactly.

    Args:
        group: layers that share a basis.
        rank_k, rank_v: of the whole group; released example for 8B models. A budget replaces them by the largest ranks
            in this proportion that meet it, multiples of 8 from 512 on.

    Source: 2503.18893, section 4.
    """

    id = "xkv"
    name = "xKV"
    paper = "2503.18893"
    slots = frozenset({"format"})
    aligned = True
    joint = True
    search = tries(group=(1, 2, 4, 8))

    group: int = 4
    rank_k: int = 512
    rank_v: int = 768

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, group=1, rank_k=1, rank_v=1)

    def plan(self, shape: ModelShape, profile: Profile | None, length: int) -> Sequence[Role]:
        if shape.rope.get("type") in ("dynamic", "longrope"):
            raise Refused(f"{self.id} takes keys out of their positions, which {shape.name} lays out by length")
        roles = [Role() for _ in shape.layers]
        ranks = self._ranks(shape, length)
        for layers in joined(shape, self.group) if ranks else ():
            for layer in layers:
                roles[layer.index] = Role("joint", extra={"layers": tuple(x.index for x in layers), "ranks": ranks})
        return roles

    def codec(self, role: Role, shape: ModelShape, length: int) -> Codec | None:
        if role.name != "joint":
            return None
        layers = [shape.layers[index] for index in role.extra["layers"]]
        keys, values = map(low_rank, (length, length), widths(layers), role.extra["ranks"])
        if keys is None and values is None:
            return None
        turned = not layers[0].latent and shape.rope.get("type") not in (None, "none")
        return Codec(None, None, Joint(role.extra["layers"], keys, values, turned))

    def _ranks(self, shape: ModelShape, length: int) -> tuple[int, int] | None:
        """Ranks of keys and values, or None where nothing is to be packed."""
        budget = Budget.of(self.budget)
        if budget is None:
            return self.rank_k, self.rank_v
        if budget.whole:
            return None
        granted, both = budget.share(shape, length), self.rank_k + self.rank_v
        widest = max((sum(widths(layers)) for layers in joined(shape, self.group)), default=1)

        def ranks(step: int) -> tuple[int, int]:
            return whole(step * self.rank_k // both), whole(step * self.rank_v // both)

        def share(step: int) -> float:
            return joint_share(shape, self.group, length, ranks(step))

        if share(0) > granted:
            raise holds_more(self, share(0), length, "rank 1", "raise the budget, or group more layers")
        steps = range(both * widest // min(self.rank_k, self.rank_v) + 2)
        return ranks(bisect_right(steps, granted, key=share) - 1)  # the share grows with the ranks
