"""A student made ready to be trained, for as long as that takes: what of it, in which precision, with adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foveate.convert.healing.optimizers import FLOAT32
from foveate.convert.healing.recipe import Recipe
from foveate.errors import BadArgument, Refused
from foveate.models.converted import KEY, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Trained:
    """What is trained.

    Attributes:
        named: the parameters with their names in the student.
        initial: their values before they were rounded to the precision of training, in the same order.
        precision: "fp32", "autocast" or "bf16".
        finish: to be called when training is over: adapters become part of the weights.
    """

    named: list[tuple[str, nn.Parameter]]
    initial: list[Tensor]
    precision: str
    finish: Callable[[], None]


def replaced(student: PreTrainedModel) -> list[int]:
    """The layers whose attention a conversion replaced; all, where none was."""
    listed = getattr(student.config, KEY, None) or []
    found = [index for index, entry in enumerate(listed) if entry is not None]
    return found or list(range(len(decoder_layers(student))))


def compared_layers(student: PreTrainedModel, teacher: PreTrainedModel, recipe: Recipe) -> list[int]:
    """The layers whose hidden states are compared.

    Raises:
        BadArgument: a layer that is not there, or models whose hidden states cannot be compared.
    """
    if not recipe.hidden:
        return []
    count = len(decoder_layers(student))
    layers = list(range(count)) if recipe.hidden_layers == "all" else replaced(student)
    if isinstance(recipe.hidden_layers, tuple):
        layers = sorted(set(recipe.hidden_layers))
    if layers[-1] >= count:
        raise BadArgument("hidden_layers", recipe.hidden_layers, f"the model has the layers 0 to {count - 1}")
    shapes = [(len(decoder_layers(each)), each.config.hidden_size) for each in (student, teacher)]
    if shapes[0] != shapes[1]:
        said = "the student has {} layers of width {}, the teacher {} of width {}".format(*shapes[0], *shapes[1])
        raise BadArgument("hidden", recipe.hidden, f"{said}, so their hidden states cannot be compared; give 0")
    return layers


@contextmanager
def trained(student: PreTrainedModel, recipe: Recipe, device: torch.device) -> Iterator[Trained]:
    """The student in training, and as it was afterwards but for what it learned: dtypes, modes, what needs gradients.

    Raises:
        Refused: adapters are asked for and peft is not installed.
        BadArgument: nothing would be trained.
    """
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    mode = student.training
    before = [(each, each.dtype, each.requires_grad) for each in student.parameters()]
    kept = {each: each.data for each, _, _ in before}
    adapters: Any = None

    def settle() -> None:
        """What was not trained gets its own values back, rounded by nothing."""
        while kept:
            parameter, data = kept.popitem()
            parameter.data = data

    def finish() -> None:
        nonlocal adapters
        settle()
        if adapters is not None:
            adapters.merge_and_unload()
            adapters = None

    try:
        if student.dtype != torch.float64:
            _cast(student, torch.bfloat16 if precision == "bf16" else torch.float32)
        student.requires_grad_(recipe.trainable == "all")
        if recipe.trainable == "attention":
            for index in replaced(student):
                decoder_layers(student)[index].self_attn.requires_grad_(True)
        elif recipe.trainable == "lora":
            adapters = _with_adapters(student, recipe)
        if recipe.checkpointing:
            _recompute(student, True)
        student.train()
        named = [(name, each) for name, each in student.named_parameters() if each.requires_grad]
        if not named:
            raise BadArgument("trainable", recipe.trainable, "the student has no such parameter; give another")
        yield Trained(named, [kept.pop(each, each.data) for _, each in named], precision, finish)
    finally:
        settle()
        if adapters is not None:
            adapters.unload()
        if recipe.checkpointing:
            _recompute(student, False)
        for parameter, dtype, needed in before:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(needed)
            parameter.grad = None
        student.train(mode)


def _cast(student: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters in place, so that tied ones stay tied; buffers such as rotation frequencies stay as they are."""
    kept = set()
    for module in student.modules():
        names = (*FLOAT32, *getattr(module, "keeps_float32", ()))
        kept |= {id(each) for name, each in module.named_parameters(recurse=False) if name in names}
    for parameter in student.parameters():
        parameter.data = parameter.data.to(torch.float32 if id(parameter) in kept else dtype)


def _recompute(model: Any, on: bool) -> None:
    """Whether layers compute their activations again in the backward pass, or keep them."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5.23
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def _with_adapters(student: PreTrainedModel, recipe: Recipe) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise Refused(
            'trainable="lora" needs peft, which is not installed: pip install "foveate[heal]"; or train "attention"'
        ) from None
    inside = {id(part) for layer in decoder_layers(student) for part in layer.modules()}
    names = [name for name, part in student.named_modules() if type(part) is nn.Linear and id(part) in inside]
    if not names:
        raise BadArgument("trainable", "lora", "the decoder's layers hold no linear map; give another")
    config = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=names, lora_dropout=0.0)
    return get_peft_model(student, config)
