"""One meaning of "budget" everywhere: the share of the model's dense KV cache that is held, or of its pairs read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foveate.errors import BadArgument, Infeasible
from foveate.models.shape import ModelShape

PAIR_BYTES = 16
"""What a store holds per row and head besides its tokens: where it stands and how long it is."""


@dataclass(frozen=True)
class Budget:
    """How much a method may hold (keep, format) or read per new token (decode, prefill).

    Everything counts: dense layers, sinks, windows, protected tokens, summaries, exact tails. `Budget.of(0.25)` is a
    ratio, `Budget.of(1024)` tokens per head and layer, `Budget.bytes(2**26)` bytes of the whole cache of one row.
    """

    kind: Literal["ratio", "tokens", "bytes"]
    value: float

    @classmethod
    def ratio(cls, value: float) -> Budget:
        """A share in (0, 1] of the dense cache or of the dense pairs."""
        if not 0 < value <= 1:
            raise BadArgument("budget", value, "a ratio lies above 0 and at most at 1; write an integer for tokens")
        return cls("ratio", float(value))

    @classmethod
    def tokens(cls, value: int) -> Budget:
        """Tokens per head and layer, on average over the layers a method manages."""
        if value < 1 or value != int(value):
            raise BadArgument("budget", value, "give a whole number of tokens, at least 1")
        return cls("tokens", int(value))

    @classmethod
    def bytes(cls, value: int) -> Budget:
        """Bytes of the whole KV cache of one row."""
        if value < 1:
            raise BadArgument("budget", value, "give a positive number of bytes")
        return cls("bytes", int(value))

    @classmethod
    def of(cls, value: Budget | float | int | str | None) -> Budget | None:
        """A float (or a text with a point or %) is a ratio, an int is tokens, a text with B/KB/MB/GB is bytes."""
        if value is None or isinstance(value, Budget):
            return value
        if isinstance(value, bool):
            raise BadArgument("budget", value, "give a ratio such as 0.25 or a number of tokens such as 1024")
        if isinstance(value, str):
            return cls._parse(value)
        return cls.tokens(value) if isinstance(value, int) else cls.ratio(value)

    @classmethod
    def _parse(cls, text: str) -> Budget:
        raw = text.strip().lower()
        units = {"kb": 2**10, "mb": 2**20, "gb": 2**30, "b": 1}
        try:
            for unit, size in units.items():
                if raw.endswith(unit):
                    return cls.bytes(int(float(raw[: -len(unit)]) * size))
            if raw.endswith("%"):
                return cls.ratio(float(raw[:-1]) / 100)
            if raw.endswith("tokens"):
                return cls.tokens(int(raw[: -len("tokens")]))
            return cls.ratio(float(raw)) if "." in raw or "e" in raw else cls.tokens(int(raw))
        except BadArgument:
            raise
        except ValueError:
            raise BadArgument("budget", text, "give a ratio (0.25), tokens (1024) or bytes (64MB)") from None

    def __str__(self) -> str:
        """A short text that `Budget.of` reads back (ratios to six digits)."""
        if self.kind == "ratio":
            text = f"{self.value:g}"
            return text if "." in text or "e" in text else f"{text}.0"
        return f"{self.value:.0f} {'tokens' if self.kind == 'tokens' else 'B'}"

    @property
    def plain(self) -> float | int | str:
        """The JSON value that `Budget.of` reads back exactly."""
        return {"ratio": self.value, "tokens": int(self.value), "bytes": f"{int(self.value)} B"}[self.kind]

    @property
    def whole(self) -> bool:
        """Everything may be held or read, however long the text becomes."""
        return self.kind == "ratio" and self.value >= 1

    def held_tokens(self, shape: ModelShape, length: int, *, name: str, floor: int = 1, extra: int = 4) -> int:
        """Tokens per head that each managed (full-attention) layer may hold on average at this length.

        Sliding layers of the model hold their window whatever the method does, so the managed layers get what is left.

        Args:
            extra: bytes per held token and head beside its key and value: its position, and the method's tags.

        Raises:
            Infeasible: when less than `floor` tokens would be left; carries the smallest share that works.
        """
        managed = sum(shape.kv_bytes_per_slot(layer.index) for layer in shape.layers if layer.kind == "full")
        dense = shape.dense_kv_bytes(length)
        fixed = dense - managed * length
        heads = sum(layer.store_heads for layer in shape.layers if layer.kind == "full")
        slot = managed if self.whole else managed + extra * heads
        loose = 0 if self.whole else PAIR_BYTES * heads
        if self.kind == "tokens":
            tokens = int(self.value)
        else:
            granted = self.value * dense if self.kind == "ratio" else self.value
            tokens = int((granted - fixed - loose) / slot + 1e-9) if managed else length
        floor = min(floor, length)
        if tokens < floor:
            share = min(1.0, (fixed + floor * slot + loose) / dense)
            raise Infeasible(
                f"budget={self}: {name} cannot hold less than {share:.3f} of the dense cache at {length} tokens "
                f"({floor} tokens a head); raise the budget",
                share,
            )
        return tokens if self.kind == "tokens" else min(tokens, length)

    def share(self, shape: ModelShape, length: int) -> float:
        """The budget as a share of the dense cache (or pairs) of this length, at most 1."""
        if self.kind == "ratio":
            return self.value
        if self.kind == "tokens":
            return min(1.0, self.value / max(1, length))
        return min(1.0, self.value / max(1, shape.dense_kv_bytes(length)))

    def read_tokens(self, shape: ModelShape, length: int, dense_layers: float, *, name: str, floor: int = 1) -> int:
        """Tokens that each sparse layer may read per new token, dense and sliding layers counted in.

        Args:
            dense_layers: full-attention layers that the method leaves dense; where only some of a layer's heads or
                steps are dense, the layer counts by their share.

        Raises:
            Infeasible: when the dense layers alone, or `floor` tokens in the others, exceed the budget.
        """
        full = sum(layer.kind == "full" for layer in shape.layers)
        sliding = sum(min(length, layer.window or length) for layer in shape.layers if layer.kind == "sliding")
        total = full * length + sliding
        sparse = full - dense_layers
        fixed = dense_layers * length + sliding
        if sparse <= 0:
            if self.kind != "tokens" and self.share(shape, length) * total < fixed * (1 - 1e-9):
                raise Infeasible(f"budget={self}: {name} leaves every layer dense; raise the budget", fixed / total)
            return length
        floor = min(floor, length)
        least = (fixed + sparse * floor) / total
        if self.kind == "tokens":
            tokens = int(self.value)
        else:
            tokens = int((self.share(shape, length) * total - fixed) / sparse + 1e-9)
        if tokens < floor:
            raise Infeasible(
                f"budget={self}: {name} cannot read less than {least:.3f} of the dense pairs at {length} tokens "
                f"({dense_layers:.3g} of {full} layers stay dense); raise the budget",
                least,
            )
        return tokens if self.kind == "tokens" else min(tokens, length)

    def prompt_tokens(
        self, shape: ModelShape, length: int, dense_layers: int, *, name: str, floor: int = 1, dense_tail: int = 0
    ) -> int:
        """Tokens that each query of a prompt may read at most in each sparse layer; early queries see fewer.

        A number of tokens is just that. A share is one of all the prompt's pairs: as the first queries read all they
        see, it leaves the later ones a little less than `read_tokens` does.

        Args:
            dense_tail: last queries of the prompt that read all they see.

        Raises:
            Infeasible: when what is dense alone, or `floor` tokens per query in the rest, exceed the budget.
        """
        asked = length - min(dense_tail, length)

        def pairs(tokens: int, queries: int = length) -> int:
            tokens = min(tokens, queries)
            return tokens * queries - tokens * (tokens - 1) // 2

        full = sum(layer.kind == "full" for layer in shape.layers)
        sparse = full - dense_layers
        if sparse <= 0 or self.kind == "tokens":
            return self.read_tokens(shape, length, dense_layers, name=name, floor=floor)
        sliding = sum(pairs(min(length, layer.window or length)) for layer in shape.layers if layer.kind == "sliding")
        total = full * pairs(length) + sliding
        fixed = dense_layers * pairs(length) + sliding + sparse * (pairs(length) - pairs(asked, asked))
        granted = (self.share(shape, length) * total - fixed) / sparse
        # pairs(tokens, asked) <= granted, solved for tokens
        tokens = int((2 * asked + 1 - max(0.0, (2 * asked + 1) ** 2 - 8 * granted) ** 0.5) / 2 + 1e-9)
        floor = min(floor, length)
        if tokens < floor and not (asked <= floor and granted >= pairs(asked, asked)):
            least = (fixed + sparse * pairs(floor, asked)) / total
            raise Infeasible(
                f"budget={self}: {name} cannot read less than {least:.3f} of the dense pairs of a prompt of {length} "
                f"tokens ({floor} a query); raise the budget",
                least,
            )
        return min(tokens, length) if tokens < asked else length
