"""What every conversion is: stages that change the model, each of which says whether it should still be the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from foveate.errors import BadArgument
from foveate.heads.moments import Moments, collect
from foveate.models.converted import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stage:
    """One step of a conversion, told after it was taken.

    Args:
        name: a few words for the ladder.
        exact: whether the model must still compute the same function; the driver checks it.
        facts: numbers for the report, such as the energy that each layer keeps. JSON values.
    """

    name: str
    exact: bool
    facts: dict[str, Any] = field(default_factory=dict)


class Calibration:
    """Text that conversions may look at, and the statistics of it, made once and kept.

    Args:
        tokens: [S, N] token ids without padding.
        batch: sequences read at a time.
        watch: told in words what is being read.
    """

    def __init__(self, tokens: Tensor, batch: int = 4, watch: Callable[[str], None] = lambda words: None) -> None:
        if tokens.ndim != 2 or not tokens.numel():
            raise BadArgument("tokens", tuple(tokens.shape), "give token ids [S, N]")
        self.tokens, self.batch, self.watch = tokens, batch, watch
        self._inputs: dict[int, Moments] = {}

    def batches(self) -> Iterator[Tensor]:
        """The text in batches [B, N]."""
        yield from self.tokens.split(self.batch)

    def inputs(self, model: PreTrainedModel) -> dict[int, Moments]:
        """By layer, moments of the hidden states that each attention module reads, in the model as first given.

        Queries, keys and values before rotation are linear in them, so their moments follow (`Moments.of`).
        """
        if not self._inputs:
            self.watch("reading the calibration text")
            modules: dict[Any, Any] = {index: layer.self_attn for index, layer in enumerate(decoder_layers(model))}
            self._inputs = collect(model, modules, self.batches())
        return self._inputs


@dataclass(frozen=True)
class Conversion(ABC):
    """A published way to turn a checkpoint into one with other attention.

    A conversion is a frozen dataclass in a file of its own, with the paper's parameters and defaults as fields, JSON
    values all. It changes the model that it is given, which is a copy of the converted type (`models.converted`), layer
    by layer through `replace`, and yields a `Stage` after each step that can be measured.
    """

    id: ClassVar[str]
    what: ClassVar[str]
    """One line for `foveate convert --help`."""
    takes: ClassVar[str] = "decoder"
    """The kind of model that it changes, a `Subject`: "decoder" or "encoder"."""

    @abstractmethod
    def check(self, model: PreTrainedModel, shape: Any) -> None:
        """Refuse, before anything is read or changed, models and numbers that do not fit.

        Args:
            shape: the `ModelShape` of a decoder; None for an encoder.

        Raises:
            Refused: a model that this conversion cannot change, with the reason.
            BadArgument: a number that does not fit this model.
        """

    @abstractmethod
    def stages(self, model: PreTrainedModel, calibration: Calibration) -> Iterator[Stage]:
        """Convert the model step by step."""

    def settings(self) -> dict[str, Any]:
        """Parameters as records beside a saved model state them; a conversion leaves out what must stay secret."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


CONVERSIONS: dict[str, type[Conversion]] = {}

C = TypeVar("C", bound=type[Conversion])


def register(cls: C) -> C:
    """Make a conversion known by its id."""
    CONVERSIONS[cls.id] = cls
    return cls


def all_conversions() -> dict[str, type[Conversion]]:
    """Every conversion by its id."""
    package = import_module("foveate.convert")
    for module in iter_modules(package.__path__):
        import_module(f"foveate.convert.{module.name}")
    return CONVERSIONS


def conversion(name: str, **settings: Any) -> Conversion:
    """The conversion of this id with these parameters.

    Raises:
        BadArgument: an unknown id or parameter.
    """
    all_conversions()
    if name not in CONVERSIONS:
        raise BadArgument("to", name, f"give one of {', '.join(sorted(CONVERSIONS))}")
    known = {f.name for f in fields(CONVERSIONS[name])}
    for key, value in settings.items():
        if key not in known:
            raise BadArgument(key, value, f"{name} has the parameters {', '.join(sorted(known))}")
    return CONVERSIONS[name](**settings)
