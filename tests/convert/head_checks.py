"""What every conversion to head-mapped layers must keep: files, caches, methods."""

from __future__ import annotations

from typing import Any

import torch
from tests.closeness import assert_close
from transformers import AutoModelForCausalLM

import foveate
from foveate.convert.base import Calibration, Conversion
from foveate.convert.run import Converted, convert
from foveate.models.shape import ModelShape


def text(sequences: int, length: int = 33) -> torch.Tensor:
    return torch.randint(3, 250, (sequences, length))


def converted_by(conversion: Conversion, model: Any, sequences: int = 16) -> Converted:
    """The conversion run by its driver, which holds stages that say they are exact to their word."""
    return convert(model, conversion, Calibration(text(sequences), batch=4), text(2, 21))


def check_model(made: Any, folder: Any) -> None:
    """Saved and opened it is the same; a cache changes nothing, be it stock or Foveate's, and has the stated bytes."""
    ids = text(2, 13)
    # Left to choose, some releases of transformers run Gemma 2 on SDPA, which leaves the cap of the logits out.
    if getattr(made.config, "attn_logit_softcapping", None):
        made.set_attn_implementation("eager")
    how = {"dtype": made.dtype, "attn_implementation": made.config._attn_implementation}
    with torch.no_grad():
        want = made(ids, use_cache=False).logits
        made.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, **how)
        assert torch.equal(again(ids, use_cache=False).logits, want)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = made.generate(ids, return_dict_in_generate=True, output_logits=True, **how)
    with torch.no_grad():
        full = made(out.sequences, use_cache=False).logits[:, 12:-1]
        assert_close(torch.stack(out.logits, 1), full, 5e-6)
        cache = made(ids, use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for x in cache.layers for t in (x.keys, x.values))
    shape = ModelShape.of(made)
    if all(layer.window is None for layer in shape.layers):
        assert held == shape.dense_kv_bytes(13, 2)
    with foveate.apply(made, "dense"):
        assert torch.equal(made.generate(ids, **how), out.sequences)
