"""The parameters of a checkpoint in the order in which its model, and so its optimizer, lists them."""

from __future__ import annotations

from pathlib import Path

import torch

from foveate.errors import BadArgument


def parameter_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's parameters, first to last; shared ones once. No weights are read.

    Raises:
        BadArgument: a folder without a config.json of a language model that transformers knows.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise BadArgument("folder", str(folder), "no config.json there; give the folder of the checkpoint")
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as error:
        raise BadArgument("folder", str(folder), f"not a language model that transformers knows ({error})") from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
