"""How a converted model is healed, and the record of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from foveate.errors import BadArgument

TRAINABLE = ("all", "attention", "lora")
PRECISIONS = ("auto", "fp32", "autocast", "bf16")
SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Recipe:
    """The settings of a healing. All are JSON values; lengths and amounts are in tokens.

    Args:
        tokens: to train on, rounded up to whole steps.
        length: of a sequence.
        batch: sequences read at once by each process.
        accumulation: batches whose gradients make one step.
        lr: peak learning rate.
        warmup: share of the steps in which it climbs.
        schedule: how it falls afterwards: "cosine" and "linear" to zero, "constant" not at all.
        optimizer: "adamw", or "muon" for the matrices of the decoder's layers (and AdamW for the rest).
        weight_decay: of matrices; norms, biases, A_log, D, dt_bias and all else of one dimension have none.
        clip: greatest norm of a step's gradient; None: any.
        temperature: at which distributions are compared; the loss is multiplied by its square (Hinton, 1503.02531), so
            that gradients keep their size.
        kl: weight of the divergence of student and teacher, mean per token, nats.
        reverse: KL(student ‖ teacher) in place of KL(teacher ‖ student).
        ce: weight of the text's own next tokens.
        hidden: weight of the hidden states behind decoder layers: squared distance to the teacher's over their squared
            length, mean over tokens and layers.
        hidden_layers: which: "replaced" by the conversion (all, where none was), "all", or numbers from 0.
        hidden_from: what these layers read: "student", its own stream, or "teacher", the teacher's stream, so that each
            layer learns by itself (MOHAWK 2408.10189; Zebra-Llama 2505.17272, section 3).
        balance: weight of the balance loss of layers that route tokens.
        trainable: "all"; "attention", of the layers that the conversion replaced (of all, where none was); or "lora",
            adapters on every linear map of the decoder's layers, merged at the end (needs peft).
        lora_rank, lora_alpha: of the adapters.
        precision: "fp32"; "autocast": fp32 weights, bf16 arithmetic; "bf16": bf16 weights and arithmetic with fp32
            masters of what is trained; "auto": "bf16" on CUDA, else "fp32". A_log, D and dt_bias are fp32 in all.
        checkpointing: recompute layers in the backward pass, for less memory.
        compile: run both models through torch.compile.
        seed: of the order of the text and of all else that is drawn.
        generated: share of the sequences that the teacher samples itself, at temperature 1.
        pool: sequences that it samples at once.
        needles: share of the sequences that are needle prompts with their answers, of seeds that no evaluation uses.
        held_out: share of the documents that are never trained on.
        evaluate_every: tokens between two evaluations on them; None: only before and after.
        evaluate_on: tokens of held-out text that an evaluation reads.
    """

    tokens: int = 10_000_000
    length: int = 2048
    batch: int = 8
    accumulation: int = 1
    lr: float = 1e-4
    warmup: float = 0.02
    schedule: str = "cosine"
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    clip: float | None = 1.0
    temperature: float = 1.0
    kl: float = 1.0
    reverse: bool = False
    ce: float = 0.0
    hidden: float = 0.0
    hidden_layers: str | tuple[int, ...] = "replaced"
    hidden_from: str = "student"
    balance: float = 0.01
    trainable: str = "all"
    lora_rank: int = 16
    lora_alpha: int = 32
    precision: str = "auto"
    checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    generated: float = 0.0
    pool: int = 64
    needles: float = 0.02
    held_out: float = 0.01
    evaluate_every: int | None = None
    evaluate_on: int = 65_536

    def __post_init__(self) -> None:
        if isinstance(self.hidden_layers, list):
            object.__setattr__(self, "hidden_layers", tuple(self.hidden_layers))
        for name in ("tokens", "batch", "accumulation", "lora_rank", "lora_alpha", "pool", "evaluate_on"):
            _check(self, name, _whole(getattr(self, name)) and getattr(self, name) >= 1, "give a whole number above 0")
        _check(self, "length", _whole(self.length) and self.length >= 16, "give at least 16 tokens")
        every = self.evaluate_every
        _check(self, "evaluate_every", every is None or (_whole(every) and every >= 1), "give tokens above 0, or None")
        _check(self, "seed", _whole(self.seed) and 0 <= self.seed < 1 << 30, "give a whole number from 0 to 2**30")
        for name in ("lr", "temperature"):
            _check(self, name, 0 < getattr(self, name) < math.inf, "it must be above 0")
        _check(self, "clip", self.clip is None or 0 < self.clip < math.inf, "it must be above 0, or None")
        for name in ("kl", "ce", "hidden", "balance", "weight_decay"):
            _check(self, name, 0 <= getattr(self, name) < math.inf, "it must not be below 0")
        _check(self, "kl", self.kl + self.ce + self.hidden > 0, "give kl, ce or hidden a weight above 0")
        for name in ("warmup", "generated", "needles"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "give a share from 0 to 1")
        shares = self.generated + self.needles
        _check(self, "generated", shares <= 1, f"with needles={self.needles!r} it is more than all sequences")
        _check(self, "held_out", 0 < self.held_out < 1, "give a share between 0 and 1, such as 0.01")
        for name, known in (
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("trainable", TRAINABLE),
            ("precision", PRECISIONS),
            ("hidden_from", ("student", "teacher")),
        ):
            _check(self, name, getattr(self, name) in known, f"give one of {', '.join(known)}")
        layers = self.hidden_layers
        fits = layers in ("replaced", "all") or (
            isinstance(layers, tuple) and len(layers) > 0 and all(_whole(layer) and layer >= 0 for layer in layers)
        )
        _check(self, "hidden_layers", fits, 'give "replaced", "all" or numbers of layers')

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Recipe:
        """The recipe with these settings.

        Raises:
            BadArgument: an unknown setting, or a value that cannot be.
        """
        known = {each.name for each in fields(cls)}
        for name, value in settings.items():
            if name not in known:
                raise BadArgument(name, value, f"healing has the settings {', '.join(sorted(known))}")
        try:
            return cls(**settings)
        except TypeError as error:
            raise BadArgument("settings", settings, f"numbers are numbers and names are texts ({error})") from None

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = round(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        share = (step - warm) / max(1, steps - warm)
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * share)) / 2
        return self.lr * (1 - share) if self.schedule == "linear" else self.lr


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(recipe: Recipe, name: str, fits: bool, mend: str) -> None:
    if not fits:
        raise BadArgument(name, getattr(recipe, name), mend)


@dataclass(frozen=True)
class Progress:
    """Where a healing is: what `watch` is told.

    Attributes:
        step, steps: steps taken, and in all.
        tokens: trained on so far.
        loss: mean since the last report; `parts` its parts before they are weighted: "kl", "ce", "hidden", "balance".
        lr: learning rate of the last step.
        tokens_per_second: since the last report, evaluations and saving left out.
        remaining: seconds until the end at this speed.
    """

    step: int
    steps: int
    tokens: int
    loss: float
    parts: dict[str, float]
    lr: float
    tokens_per_second: float
    remaining: float


Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class Evaluation:
    """The student on held-out text.

    Attributes:
        tokens: trained on before.
        perplexity: of the student.
        kl: KL(teacher ‖ student), nats, mean per token, at temperature 1.
    """

    tokens: int
    perplexity: float
    kl: float


@dataclass
class Healing:
    """The record of a healing.

    Attributes:
        recipe: its settings.
        text: what was read: name, fingerprint, documents and tokens, trained on and held out.
        mix: tokens trained on by where they are from: "text", "generated" (sampled by the teacher), "needles"
            (synthetic prompts in the form of the needle tasks, which those tasks then no longer find untrained).
        tokens, steps: trained on.
        seconds: of training, evaluations and saving left out, over all calls.
        device, processes, precision: what it ran on.
        trained: parameters that were trained.
        teacher_perplexity: on held-out text.
        evaluations: of the student, the first before training, the last after it.
        curve: one entry per report: tokens, loss and its parts, lr.
        resumed: tokens at which a later call went on.
        versions: of the libraries.
    """

    recipe: dict[str, Any]
    text: dict[str, Any]
    mix: dict[str, int] = field(default_factory=lambda: {"text": 0, "generated": 0, "needles": 0})
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    device: str = ""
    processes: int = 1
    precision: str = ""
    trained: int = 0
    teacher_perplexity: float = math.nan
    evaluations: list[Evaluation] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Of the healed student on held-out text."""
        return self.evaluations[-1].perplexity

    def json(self) -> dict[str, Any]:
        """Plain JSON; a number that is none becomes null."""
        return json.loads(json.dumps(asdict(self)), parse_constant=lambda name: None)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Healing:
        """The record that `json` gave."""
        found = cls(**values)
        found.evaluations = [Evaluation(**each) for each in values["evaluations"]]
        return found
