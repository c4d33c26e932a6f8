"""Converted model types: the same function, saved and opened without remote code."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import foveate
from foveate.errors import Refused
from foveate.models import converted
from foveate.models.shape import ModelShape
from foveate.models.tiny import FAMILIES, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_a_container_computes_what_the_model_computes(family, tmp_path):
    model = tiny(family, kv_heads=2)
    made = converted.container(model)
    ids = torch.randint(3, 250, (2, 17))
    with torch.no_grad():
        assert torch.equal(made(ids).logits, model(ids).logits)
        made.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(again) is type(made)
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert ModelShape.of(made).layers == ModelShape.of(model).layers


def test_a_container_shares_nothing_with_the_model():
    model = tiny("llama")
    made = converted.container(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in model.parameters())
    assert not converted.is_converted(model) and converted.is_converted(made)


def test_methods_apply_to_a_container():
    made = converted.container(tiny("llama", kv_heads=2))
    ids = torch.randint(3, 250, (1, 60))
    with foveate.apply(made, "snapkv", budget=40):
        made.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_other_families_are_refused_with_those_that_work():
    with pytest.raises(Refused, match="llama"):
        converted.registered("gpt2")


def test_transformers_opens_converted_models_once_they_are_registered(tmp_path):
    made = converted.container(tiny("llama"))
    made.save_pretrained(tmp_path)
    code = f"""
import foveate, transformers
foveate.register_models()
print(type(transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "FoveateLlamaForCausalLM", run.stderr
