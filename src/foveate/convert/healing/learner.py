"""A student beside its teacher: one forward of each, and the loss between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate import compat
from foveate.convert.healing.distillation import LogitLoss, chunk_for, hidden_loss, logit_loss, next_tokens
from foveate.convert.healing.recipe import Recipe
from foveate.errors import Refused
from foveate.models.converted import decoder_layers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

PARTS = ("kl", "ce", "hidden", "balance")
"""Of the loss, before they are weighted."""


@dataclass(frozen=True)
class Seen:
    """What a forward gave: last hidden states [B, N, d], and what the watched layers read and wrote."""

    last: Tensor
    read: tuple[Tensor, ...]
    written: tuple[Tensor, ...]


class Streams:
    """What decoder layers read and write, seen by hooks; and fed to them, where the stream is another model's.

    Args:
        model: a decoder.
        layers: the layers to watch, from 0.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        self._layers = [decoder_layers(model)[index] for index in layers]
        self._read: dict[int, Tensor] = {}
        self._written: dict[int, Tensor] = {}
        self._fed: Sequence[Tensor] = ()
        self._open = False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While this is entered, the layers are watched."""
        handles: list[Any] = []
        for place, layer in enumerate(self._layers):
            handles.append(layer.register_forward_pre_hook(self._before(place), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after(place)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.take()

    def begin(self, fed: Sequence[Tensor] = ()) -> None:
        """A forward follows. `fed`: what the layers are to read in it, and again where it is recomputed."""
        self._fed, self._open = fed, True

    def take(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What the layers read and wrote in the forward."""
        read, written = tuple(self._read.values()), tuple(self._written.values())
        self._read, self._written, self._open = {}, {}, False
        return read, written

    def _before(self, place: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            if self._fed:
                given = self._fed[place].to(given.dtype)
            if self._open:
                self._read[place] = given
            return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

        return hook

    def _after(self, place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if self._open:  # else a layer that is recomputed in the backward pass
                self._written[place] = out if isinstance(out, Tensor) else out[0]

        return hook


class Head:
    """From last hidden states to logits, as the model itself makes them.

    Raises:
        Refused: a model whose logits are made in another way.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = compat.text_config(model)
        self.linear: Any = model.get_output_embeddings()
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.vocabulary = int(config.vocab_size)
        name = type(model).__name__
        if self.linear is None:
            raise Refused(f"{name} has no output embedding, so it has no logits to learn")
        mode, ids = model.training, torch.linspace(0, self.vocabulary - 1, 8, device=model.device).long().unsqueeze(0)
        model.eval()  # without dropout
        with torch.no_grad():
            last = compat.base_model(model)(input_ids=ids, use_cache=False).last_hidden_state
            wanted, got = model(input_ids=ids, use_cache=False).logits, self(last)
        model.train(mode)
        if wanted.shape != got.shape or (wanted.float() - got.float()).norm() > 0.01 * wanted.float().norm():
            raise Refused(f"{name} makes its logits otherwise than by its output embedding; healing does not know how")

    def __call__(self, last: Tensor) -> Tensor:
        logits = self.linear(last.to(self.linear.weight.dtype))
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the output embedding."""
        return list(self.linear.parameters())


class Teacher:
    """The model that is learned from: read without gradients, never changed.

    Args:
        layers: whose streams are wanted.
        halved: whether an fp32 teacher computes in bf16.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], halved: bool) -> None:
        self.model, self.head, self.streams = model, Head(model), Streams(model, layers)
        self.halved = halved and model.dtype == torch.float32

    def computing(self) -> AbstractContextManager[Any]:
        """The arithmetic that it computes in."""
        return torch.autocast(self.model.device.type, torch.bfloat16) if self.halved else nullcontext()

    def logits(self, last: Tensor) -> Tensor:
        """Of last hidden states [T, d]."""
        with self.computing():
            return self.head(last)

    def __call__(self, ids: Tensor) -> Seen:
        self.streams.begin()
        with torch.inference_mode(), self.computing():
            last = compat.base_model(self.model)(input_ids=ids, use_cache=False).last_hidden_state
        read, written = self.streams.take()
        # Copies outside of inference mode can take part in a graph.
        return Seen(last.clone(), tuple(each.clone() for each in read), tuple(each.clone() for each in written))


class Learner(nn.Module):
    """The student with its loss: the module that processes share the gradients of.

    Args:
        student: a transformers model, adapters included.
        recipe: weights of the losses.
        layers: whose hidden states are compared.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: Teacher, recipe: Recipe, layers: Sequence[int], device: torch.device
    ) -> None:
        super().__init__()
        self.student = student
        self.head, self._theirs = Head(student), teacher.logits
        self.recipe, self.streams = recipe, Streams(student, layers)
        self.loss = LogitLoss(recipe.kl, recipe.ce, recipe.temperature, recipe.reverse)
        self.chunk = chunk_for(self.head.vocabulary, device)
        routed: list[Any] = [each for each in student.modules() if hasattr(each, "balance_loss")]
        self.balanced = routed if recipe.balance else []

    def forward(
        self, ids: Tensor, last: Tensor, read: tuple[Tensor, ...], written: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """The loss of token ids [B, N] beside what the teacher made of them, and its `PARTS` [4]."""
        self.streams.begin(read if self.recipe.hidden_from == "teacher" else ())
        ours = compat.base_model(self.student)(input_ids=ids, use_cache=False).last_hidden_state
        _, states = self.streams.take()
        zero = torch.zeros((), dtype=torch.float32, device=ids.device)
        total, parts = zero, [zero, zero]
        if self.recipe.kl or self.recipe.ce:
            total, found = logit_loss(
                ours.flatten(0, 1),
                last.flatten(0, 1),
                next_tokens(ids).flatten(),
                (self.head, self._theirs),
                self.head.parameters,
                self.loss,
                self.chunk,
            )
            parts = list(found)
        hidden = hidden_loss(states, written) if states else zero
        balance = torch.stack([each.balance_loss() for each in self.balanced]).sum() if self.balanced else zero
        total = total + self.recipe.hidden * hidden + self.recipe.balance * balance
        return total, torch.stack([each.detach().float() for each in (*parts, hidden, balance)])

    @torch.no_grad()
    def compared(self, ids: Tensor, seen: Seen, alone: bool = False) -> tuple[Tensor, Tensor]:
        """Mean KL(teacher ‖ student) and mean cross entropy of the student with the text, nats; of the teacher with
        itself where it is `alone`."""
        ours, head = seen.last, self._theirs
        if not alone:
            ours, head = compat.base_model(self.student)(input_ids=ids, use_cache=False).last_hidden_state, self.head
        flat = (ours.flatten(0, 1), seen.last.flatten(0, 1), next_tokens(ids).flatten())
        _, parts = logit_loss(*flat, (head, self._theirs), (), LogitLoss(1.0, 1.0), self.chunk)
        return parts[0], parts[1]
