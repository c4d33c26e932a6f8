"""load: open a model, and put back the methods it was saved with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from foveate import compat, models
from foveate.engine.apply import CONFIG_KEY, PROFILE_FILE, Handle, apply, named
from foveate.errors import BadArgument
from foveate.methods.base import Composition
from foveate.methods.profile import from_json
from foveate.models import Loaded


def load(
    source: str | os.PathLike[str] = "smollm2",
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
) -> Loaded:
    """Open a model with its tokenizer; if it was saved with methods applied, they are applied again.

    Args:
        source: a built-in name ("smollm2"), a hub id, a local folder, or a GGUF file.
        dtype: "auto" is bfloat16 where the processor computes in it, else float32.
        device: "auto" is a GPU if there is one, "spread" lays the layers evenly over all of them.

    Returns:
        (model, tokenizer). `Handle.of(model)` gives the handle of methods that were restored.

    Raises:
        BadArgument: unknown source, or a value that cannot be used.
    """
    loaded = models.load(os.fspath(source), dtype=dtype, device=device)
    restore(loaded.model, str(source))
    return loaded


def restore(model: Any, source: str) -> Handle | None:
    """Re-apply what `save_pretrained` of an applied model recorded; None if nothing was."""
    state = getattr(model.config, CONFIG_KEY, None)
    if not state:
        return None
    methods = Composition(tuple(named(entry["id"], entry["settings"]) for entry in state["methods"]))
    profiles = []
    if state.get("profiles"):
        try:
            path = compat.companion_file(source, PROFILE_FILE)
            profiles = [from_json(raw) for raw in json.loads(Path(path).read_text()).values()]
        except (OSError, ValueError, KeyError):
            raise BadArgument("source", source, f"its {PROFILE_FILE} is missing or damaged") from None
    return apply(model, methods, profile=profiles or None)
