"""MaTVLM: Mamba-2 in every fourth layer."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import foveate
from foveate.convert.base import Calibration, conversion
from foveate.convert.run import convert
from foveate.convert.surgery.layer_distillation import layer_losses
from foveate.errors import BadArgument, Refused
from foveate.models.converted import container, decoder_layers
from foveate.models.shape import ModelShape
from foveate.models.tiny import tiny


def text():
    return Calibration(torch.randint(3, 250, (3, 15)), batch=2)


OTHERS = {
    "phi": (PhiConfig, PhiForCausalLM, {"partial_rotary_factor": 0.5}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
}


def model_of(family):
    """Five layers; phi has biases everywhere, phi3 one matrix for queries, keys and values, gemma2 sliding layers."""
    if family not in OTHERS:
        return tiny(family, layers=5, kv_heads=2)
    config, cls, more = OTHERS[family]
    model = cls(
        config(
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=64,
            intermediate_size=64,
            vocab_size=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            max_position_embeddings=512,
            **more,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def done_of(model, **settings):
    return convert(model, conversion("matvlm", **settings), text(), torch.randint(3, 250, (2, 15)))


def test_every_fourth_layer_is_replaced():
    done = done_of(tiny("llama", layers=9, kv_heads=2))
    kinds = [getattr(layer.self_attn, "kind", "attention") for layer in decoder_layers(done.model)]
    assert (
        [index for index, kind in enumerate(kinds) if kind == "mamba2"] == [0, 4, 8] == done.ladder[-1].facts["layers"]
    )
    assert done.ladder[-1].share == pytest.approx(6 / 9) and done.ladder[-1].kl > 0
    assert conversion("matvlm")._layers(32) == [0, 4, 8, 12, 16, 20, 24, 28]


def test_with_no_layer_replaced_the_student_is_the_teacher():
    model = tiny("llama", layers=4, kv_heads=2)
    done = done_of(model, layers=[])
    ids = torch.randint(3, 250, (2, 11))
    with torch.no_grad():
        assert torch.equal(done.model(ids).logits, model(ids).logits)
        assert [float(loss) for loss in layer_losses(done.model, model, ids, range(4), 0.0)] == [0.0] * 4
    assert len(done.ladder) == 1


def test_the_layer_loss_falls():
    done = done_of(tiny("llama", layers=5, kv_heads=2), ild_steps=30, ild_lr=3e-3)
    facts = done.ladder[-1].facts
    assert [rung.stage for rung in done.ladder[1:]] == ["Mamba-2 layers", "layers distilled one by one"]
    assert facts["ild_last"] < 0.8 * facts["ild_first"]
    assert done.ladder[-1].share == done.ladder[1].share


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", *OTHERS])
def test_states_do_not_grow_and_all_else_works(family, tmp_path):
    made = done_of(model_of(family)).model.eval()
    held = []
    for length in (5, 60):
        cache = DynamicCache(config=made.config)
        with torch.no_grad():
            made(torch.randint(3, 250, (1, length)), past_key_values=cache)
        states = (cache.layers[0].recurrent_states[0], cache.layers[0].conv_states[0])
        held.append(sum(t.numel() * t.element_size() for t in states))
    assert held[0] == held[1] == decoder_layers(made)[0].self_attn.state_bytes()
    ids = torch.randint(3, 250, (2, 13))
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    out = made.generate(ids, **asked)
    assert torch.equal(out, made.generate(ids, **asked, use_cache=False))
    with foveate.apply(made, "dense"):
        assert torch.equal(made.generate(ids, **asked), out)
    made.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, made(ids).logits)


def test_refusals():
    model = tiny("llama", layers=4, kv_heads=2)
    shape = ModelShape.of(model)
    for settings, word in (
        ({"step": 1}, "step"),
        ({"step": 0}, "step"),
        ({"layers": [0, 1, 2, 3]}, "layers"),
        ({"layers": [7]}, "layers"),
        ({"ild_steps": -1}, "ild_steps"),
        ({"conv": 0}, "conv"),
    ):
        with pytest.raises(BadArgument, match=word):
            conversion("matvlm", **settings).check(model, shape)
    for family in ("gemma3", "deepseek-v3"):
        other = tiny(family)
        with pytest.raises(Refused):
            conversion("matvlm").check(other, ModelShape.of(other))
    states = container(model)
    list(conversion("matvlm").stages(states, text()))
    with pytest.raises(Refused):
        conversion("matvlm").check(states, ModelShape.of(states))
