"""Absorbed MLA: the logits of transformers from held latents, on models that hold some, and on no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.families import LATENT, family_model

import foveate
from foveate.cache.band import GROWTH
from foveate.convert.base import Calibration, conversion
from foveate.convert.run import convert
from foveate.errors import BadArgument, Refused
from foveate.models.tiny import tiny

FAMILY = "deepseek-v3"


def ids(length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(seed))


# Angles and norms are computed in float32 in a float64 model too.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 2e-7)])
@pytest.mark.parametrize("family", LATENT)
@torch.no_grad()
def test_logits_are_those_of_transformers(family: str, dtype: torch.dtype, limit: float) -> None:
    """A prompt at once, in odd pieces, and token by token behind it; what is generated; undone it is gone."""
    model = family_model(family, dtype=dtype)
    tokens = ids(37)
    want = model(tokens, use_cache=False).logits
    new = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(tokens, **new)
    with foveate.apply(model, "absorbed-mla") as handle:
        assert_close(model(tokens, use_cache=False).logits, want, limit)
        cache = handle.cache()
        pieces = [tokens[:, :20], tokens[:, 20:27], *tokens[:, 27:].split(1, dim=1)]
        got = [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
        assert_close(torch.cat(got, dim=1), want, limit)
        assert torch.equal(model.generate(tokens, **new), answer)
    assert torch.equal(model(tokens, use_cache=False).logits, want)


@torch.no_grad()
def test_a_step_expands_nothing_held_and_latents_alone_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(FAMILY)
    tokens = ids(41, batch=1)
    with foveate.apply(model, "absorbed-mla") as handle:
        cache = handle.cache()
        model(tokens, past_key_values=cache, use_cache=True)

        kind, expanded = type(model.model.layers[0].self_attn), []

        def counted(module: Any, latent: torch.Tensor, rotated: torch.Tensor) -> Any:
            expanded.append(latent.shape[-2])
            return expand(module, latent, rotated)

        expand = kind.expand_kv
        monkeypatch.setattr(kind, "expand_kv", counted)
        model(tokens[:, :1], past_key_values=cache, use_cache=True)
        assert expanded == [1] * 3  # the new token's, by transformers, before it asks for attention
        assert cache.nbytes <= (32 + 8) * 4 * 3 * (42 + GROWTH) + 3 * 2 * 8 * 64


@torch.no_grad()
def test_what_a_conversion_makes_is_taken_while_its_latents_are_whole() -> None:
    calibration = Calibration(ids(33, 4))
    model = tiny("llama", kv_heads=2, layers=2)
    made = convert(model, conversion("transmla", kv=0.5, freqfold=2), calibration, ids(9)).model
    tokens = ids(21)
    want = made(tokens, use_cache=False).logits
    with foveate.apply(made, "absorbed-mla") as handle:
        cache = handle.cache()
        got = [made(piece, past_key_values=cache, use_cache=True).logits for piece in (tokens[:, :20], tokens[:, 20:])]
    assert_close(torch.cat(got, dim=1), want, 1e-5)
    sliced = convert(tiny(FAMILY), conversion("tpla"), calibration, ids(9)).model
    with pytest.raises(Refused, match="no layer of"):
        foveate.apply(sliced, "absorbed-mla")


def test_other_models_are_refused_in_one_line() -> None:
    with pytest.raises(Refused, match=r"^absorbed-mla: no layer of .* holds latents \(MLA\).*; use dense$"):
        foveate.apply(tiny("llama"), "absorbed-mla")
    with pytest.raises(BadArgument, match="0 methods that wait for a budget"):
        foveate.apply(tiny(FAMILY), "absorbed-mla", budget=0.5)
