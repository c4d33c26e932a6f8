"""What methods are handed: the context of a layer's forward, and the model to calibrate on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from foveate.attention import Parts
from foveate.attention.angles import Angles
from foveate.cache import View
from foveate.models.shape import LayerShape

if TYPE_CHECKING:
    from foveate.methods.base import Result, Role


class Rope(Protocol):
    """The model's rotary embedding, as far as methods need it."""

    def move(self, x: Tensor, delta: Tensor) -> Tensor:
        """Turn rotated x [B, H, N, D] by delta [B, N] or [B, H, N] positions; by minus its position, x is unrotated."""
        ...

    def angles(self) -> Angles:
        """By how much `move` turns."""
        ...


class Context(Protocol):
    """Everything besides q and the view.

    Attributes:
        phase: "prompt" (announced tokens, or a whole bare forward) or "decode".
        layer: index in the model; shape: its LayerShape; role: this method's role in it.
        window: [B, H, W, D] last prompt queries, right-aligned, and `window_valid` [B, W], if needed.
        samples: [B, H, n, D] prompt queries by chance, and `samples_valid` [B, n], in `prepare` if needed.
        prepared: what `prepare` made of this layer's prompt; empty before.
        scale: the softmax scale of the logits.
        clock: tokens of each row decoded since its last prompt, before this forward; int64 [B] on the host.
        seen: tokens of each row before this forward, evicted ones counted; int64 [B] on the host.
        limit: tokens per head this layer may hold, [B] on the host (keep methods with a budget).
        mine, shared: tensors of this method per layer / per cache, rows first; cleared by crop.
        forward: this method's scratch of one forward, shared by its layers.
    """

    @property
    def phase(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def shape(self) -> LayerShape: ...
    @property
    def role(self) -> Role: ...
    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def window(self) -> Tensor | None: ...
    @property
    def window_valid(self) -> Tensor | None: ...
    @property
    def samples(self) -> Tensor | None: ...
    @property
    def samples_valid(self) -> Tensor | None: ...
    @property
    def prepared(self) -> dict[str, Tensor]: ...
    @property
    def limit(self) -> Tensor | None: ...
    @property
    def clock(self) -> np.ndarray: ...
    @property
    def seen(self) -> np.ndarray: ...
    @property
    def rope(self) -> Rope: ...
    @property
    def mine(self) -> dict[str, Tensor]: ...
    @property
    def shared(self) -> dict[str, Tensor]: ...
    @property
    def forward(self) -> dict[str, Any]: ...

    def sure(self, flags: Tensor) -> bool:
        """Whether all flags are known to be set, so that work may be left out. A step that is recorded to be replayed
        cannot look at values: then the answer is False, and the step must be right whatever they are."""
        ...

    @property
    def counts(self) -> bool:
        """Whether somebody counts costs, for what is not worth working out otherwise."""
        ...

    def attend(self, q: Tensor, view: View, parts: Parts, *, probs: bool = False, keys: Tensor | None = None) -> Result:
        """Attend now, over a part that `select` then returns as a Partial.

        Args:
            keys: [B, Hs, C, Dk] in place of the held keys, slot by slot (estimates of them).
        """
        ...

    def columns(self, q: Tensor, lse: Tensor) -> Tensor:
        """Attention mass of each slot over this forward's real queries, [B, H, C], where everything visible is read:
        a second pass, with the lse [B, H, N] of the first."""
        ...

    def count(self, amount: float, of: str = "read") -> None:
        """Say how many query-key pairs a Partial read that the method attended by itself, not by `attend`; or how much
        arose of another cost, such as multiplications ("macs") or bytes of what is held that were looked at to choose
        ("looked"). `cache.meter` adds up by phase and name."""
        ...


class Probe(Protocol):
    """What calibration may use: the model, its tokenizer and a way to report progress.

    `progress(total, label)` begins a stretch of work; what it returns is called with the steps made since the last call
    and a few words on how it goes (a loss), which may be empty.
    """

    model: Any
    tokenizer: Any
    seed: int

    def progress(self, total: int, label: str) -> Callable[[int, str], None]: ...
