"""What conversions are run on: kinds of models, each of which is opened, copied, measured and asked in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from foveate.convert.base import Conversion, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foveate.models.open import Loaded


@dataclass(frozen=True, kw_only=True)
class Rung:
    """The model after one stage; what else is measured depends on the kind of model.

    Args:
        stage: its name; "original" is the model as it came.
        exact: whether the stage had to keep the function.
        error: relative root mean square by which what the model returns differs from the original's on the probe text.
        parameters: numbers in the model.
        seconds: that the stage took, without measuring it.
        facts: what the conversion said of it.
    """

    stage: str
    exact: bool
    error: float
    parameters: int
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The most telling number, in a few words."""
        return f"error {self.error:.3g}"

    def json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Questions:
    """Something that is asked of the model after every stage, the same each time.

    Args:
        name: of the rung's field that the answer goes to.
        facts: what is asked, as JSON values.
        ask: the answer of a model, 0 to 1.
    """

    name: str
    facts: dict[str, Any]
    ask: Callable[[PreTrainedModel], float]


@dataclass(frozen=True)
class Asking:
    """What a user wants to be asked.

    Args:
        tokenizer: of the model.
        text: file or folder that questions are made of where they need text; None: Python's documentation.
        number: of questions; None: as many as this kind of model is asked unless told otherwise.
        length: tokens of a question.
        seed: equal seeds ask the same.
        told: given how many of how many questions a model has answered.
    """

    tokenizer: PreTrainedTokenizerBase
    text: str | None
    number: int | None
    length: int
    seed: int
    told: Callable[[int, int], None] = lambda done, number: None


class Subject(ABC):
    """A kind of model.

    Class attributes:
        id: what a conversion says it takes. plural: the word for such models.
        lacks: options of `foveate convert` that make no sense for such models.
    """

    id: ClassVar[str]
    plural: ClassVar[str]
    lacks: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def open(self, source: str, dtype: Any, device: Any) -> Loaded:
        """The model and its tokenizer."""

    @abstractmethod
    def check(self, conversion: Conversion, model: PreTrainedModel) -> None:
        """Raise Refused or BadArgument where the conversion does not fit this model."""

    @abstractmethod
    def name(self, model: PreTrainedModel) -> str:
        """The model's name in records."""

    @abstractmethod
    def positions(self, model: PreTrainedModel) -> int:
        """Tokens of the longest sequence that it reads."""

    @abstractmethod
    def container(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy, of the type that conversions change."""

    @abstractmethod
    def measure(self, made: Any, stage: Stage, model: Any, probe: Tensor, seconds: float) -> Rung:
        """The rung of a converted model after a stage.

        Args:
            model: the original.
            probe: [S, N] token ids, read 4 sequences at a time.
            seconds: that the stage took.
        """

    @abstractmethod
    def questions(self, asking: Asking, model: PreTrainedModel) -> Questions | None:
        """What such models are asked, beside being measured on text; None: nothing.

        Raises:
            BadArgument: a number or length that this model cannot be asked with.
        """

    @abstractmethod
    def in_use(self, model: PreTrainedModel, tokens: Tensor) -> dict[str, Any]:
        """What the model costs when it works.

        Args:
            tokens: [S, N] token ids of text.
        """


_MODULES = {"decoder": "foveate.convert.decoders", "encoder": "foveate.convert.encoders"}


def subject_of(conversion: Conversion | type[Conversion]) -> Subject:
    """The kind of model that a conversion takes."""
    return import_module(_MODULES[conversion.takes]).SUBJECT
