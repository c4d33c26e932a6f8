"""Save and load: methods and profiles travel with the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.contract.runs import assert_used, held, tokens
from tests.contract.subjects import Case, applied, each_method, model, profiles
from tests.contract.trace import same_reads, tracing
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerFast

import foveate
from foveate.errors import FoveateError
from foveate.methods import METHODS
from foveate.methods.budget import Budget
from foveate.models.shape import ModelShape


def save(net: nn.Module, folder: Path) -> None:
    net.save_pretrained(folder)
    words = WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0").save_pretrained(folder)


@pytest.mark.parametrize("budget", [None, 0.8, 1.0], ids=["small", "ratio", "whole"])
@each_method()
def test_saved_and_loaded(case: Case, budget: float | None, seed: int, tmp_path: Path) -> None:
    """A checkpoint of an applied model comes back applied: the same lists, the same tokens held."""
    if budget is not None and not case.cls.budgeted:
        return  # said by the method; tried with its small settings
    net, ids = model(case.family), tokens(seed, 1, 61)
    with applied(net, case, case.method() if budget is None else case.method(budget=budget)):
        save(net, tmp_path)
        assert "foveate" not in net.config.to_dict()
        with tracing(80) as want:
            out = net.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    loaded, _ = foveate.load(tmp_path, dtype="float32", device="cpu")
    with tracing(80) as got:
        again = loaded.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert_used(loaded, again.past_key_values, less=case.holds_less and budget is None)
    assert torch.equal(again.sequences, out.sequences)
    same_reads(got.pairs, want.pairs)
    assert held(again.past_key_values, 0) == held(out.past_key_values, 0)


def test_a_plain_checkpoint_stays_plain(tmp_path: Path) -> None:
    net = model()
    save(net, tmp_path)
    assert "foveate" not in json.loads((tmp_path / "config.json").read_text())
    loaded, _ = foveate.load(tmp_path, dtype="float32", device="cpu")
    out = loaded.generate(tokens(0, 1, 9), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, DynamicCache)


@each_method()
def test_the_checkpoint_is_an_ordinary_one(case: Case, seed: int, tmp_path: Path) -> None:
    """Transformers alone opens it, unapplied, with the same weights and without our attention in its config."""
    net, ids = model(case.family), tokens(seed, 1, 21)
    with applied(net, case):
        save(net, tmp_path)
    plain = type(net).from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "sdpa"
    assert torch.equal(plain(ids).logits, net(ids).logits)


@each_method(calibrated=True)
def test_a_lost_profile_is_named(case: Case, tmp_path: Path) -> None:
    net = model(case.family)
    with applied(net, case):
        save(net, tmp_path)
    for file in tmp_path.glob("*profile*"):
        file.unlink()
    with pytest.raises(FoveateError, match="profile"):
        foveate.load(tmp_path, dtype="float32", device="cpu")


@each_method()
def test_settings_are_json_and_make_the_method_again(case: Case) -> None:
    budgets = [None, *([0.5, 1.0, 24, "3KB"] if case.cls.budgeted else [])]
    for budget in budgets:
        method = case.method() if budget is None else case.method(budget=budget)
        again = METHODS[case.id](**json.loads(json.dumps(method.settings())))
        assert again == method, (method, again)
        assert again.budget == Budget.of(budget) or budget is None


@each_method(calibrated=True)
def test_profiles_are_json(case: Case) -> None:
    profile = profiles(case, model(case.family))
    assert profile is not None
    assert json.loads(json.dumps(dict(profile.data))) == profile.data
    assert profile.model
    assert ModelShape.of(model(case.family))
