"""BAM: copies of one model are that model; different checkpoints keep their parts; saved, opened, generated with."""

import json

import pytest
import torch
from tests.closeness import assert_close
from tests.families import FAMILIES, family_model
from transformers import AutoModelForCausalLM

import foveate
from foveate.convert.base import Calibration, conversion
from foveate.convert.run import convert
from foveate.errors import BadArgument, Refused
from foveate.models.converted import container, decoder_layers
from foveate.models.shape import ModelShape
from foveate.models.weights import read_heads

TEXT = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(5))
PROBE = torch.randint(3, 250, (2, 23), generator=torch.Generator().manual_seed(6))


def run(model, **settings):
    return convert(model, conversion("bam", **settings), Calibration(TEXT), PROBE)


@pytest.fixture
def folders(tmp_path):
    """Two other checkpoints of the build of `family_model("qwen2")`."""
    made = []
    for seed in (1, 2):
        family_model("qwen2", seed=seed).save_pretrained(tmp_path / str(seed))
        made.append(str(tmp_path / str(seed)))
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keys", ["experts", "shared"])
def test_copies_of_the_model_are_the_model(family, keys):
    done = run(family_model(family), experts=3, keys=keys)
    assert [rung.exact for rung in done.ladder] == [True, True, True]
    assert max(rung.error for rung in done.ladder) <= 1e-5
    assert done.ladder[-1].share == (3.0 if keys == "experts" else 1.0)
    gates = [layer.self_attn.gate.weight for layer in decoder_layers(done.model)]
    assert all(gate.std() > 0.01 for gate in gates), "routers start at random"


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("keys", ["experts", "shared"])
def test_copies_are_exact_in_float64(kv_heads, keys):
    done = run(family_model("qwen2", kv_heads=kv_heads, dtype=torch.float64), experts=2, keys=keys, top_k=2)
    assert max(rung.error for rung in done.ladder) <= 1e-10


def test_the_papers_gate_is_the_models_network_times_a_probability():
    model = family_model("phi")
    done = run(model, experts=4, gate="probability")
    assert not done.ladder[-1].exact and done.ladder[-1].error > 0.01
    layer, own = decoder_layers(done.model)[0].mlp, decoder_layers(model)[0].mlp
    x = torch.randn(1, 5, model.config.hidden_size)
    with torch.no_grad():
        p = (x @ layer.gate.weight.T).softmax(-1).amax(-1, keepdim=True)
        assert_close(layer(x), p * own(x), 5e-6)


def test_different_checkpoints_keep_their_parts(folders):
    model = family_model("qwen2", seed=0)
    done = run(model, experts=folders)
    assert [rung.exact for rung in done.ladder] == [True, False, False, False]
    models = [model, *(AutoModelForCausalLM.from_pretrained(folder) for folder in folders)]
    for index, layer in enumerate(decoder_layers(done.model)):
        for expert, other in enumerate(models):
            own = decoder_layers(other)[index]
            held = read_heads(own.self_attn, torch.float32)
            q = layer.self_attn.q_proj.weight.unflatten(0, (3, 8, 16))[expert]
            k = layer.self_attn.k_proj.weight.unflatten(0, (3, 2, 16))[expert]
            assert torch.equal(q, held.q) and torch.equal(k, held.k)
            for name, value in own.mlp.state_dict().items():
                assert torch.equal(layer.mlp.experts[expert].state_dict()[name], value)
        mean = sum(decoder_layers(other)[index].input_layernorm.weight for other in models) / 3
        torch.testing.assert_close(layer.input_layernorm.weight, mean)
    mean = sum(other.lm_head.weight for other in models) / 3
    torch.testing.assert_close(done.model.lm_head.weight, mean)


def test_a_folder_of_the_model_itself_moves_nothing(tmp_path):
    model = family_model("llama")
    model.save_pretrained(tmp_path)
    done = run(model, experts=[str(tmp_path)], keys="shared")
    assert done.ladder[1].facts["moved"] <= 1e-7
    assert max(rung.error for rung in done.ladder) <= 1e-5


@pytest.mark.parametrize("keys", ["experts", "shared"])
def test_saved_opened_generated_with(keys, folders, tmp_path):
    made = run(family_model("qwen2"), experts=folders, keys=keys, top_k=2).model
    made.save_pretrained(tmp_path / "made")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    with torch.no_grad():
        assert torch.equal(again(PROBE).logits, made(PROBE).logits)
        assert torch.equal(container(again)(PROBE).logits, made(PROBE).logits)
    assert ModelShape.of(again).layers == ModelShape.of(made).layers
    out = again.generate(PROBE, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(again(out[:, :-1]).logits[:, -4:].argmax(-1), out[:, -4:])
    with foveate.apply(again, "dense"):
        assert torch.equal(again.generate(PROBE, max_new_tokens=4, do_sample=False, pad_token_id=0), out)
    entry = json.loads((tmp_path / "made" / "config.json").read_text())["feed_forward_layers"][0]
    assert entry == {"kind": "experts", "spec": {"experts": 3, "top_k": 2, "gate": "normalised"}}


def test_parameters_are_those_of_the_experts_and_their_routers():
    model = family_model("llama")
    layer = decoder_layers(model)[0]
    attention, network = (sum(p.numel() for p in part.parameters()) for part in (layer.self_attn, layer.mlp))
    norms = sum(p.numel() for p in layer.parameters()) - attention - network
    width = model.config.hidden_size
    facts = run(model, experts=3).ladder[-1].facts
    assert facts["parameters_per_layer"] == 3 * (attention + network) + 2 * 3 * width + norms


def test_bf16():
    done = run(family_model("gemma3", dtype=torch.bfloat16), experts=2)
    assert done.ladder[-1].error < 0.05


def test_what_does_not_fit_is_refused(folders, tmp_path):
    model = family_model("qwen2")
    for settings, words in (
        ({"experts": 1}, "at least 2"),
        ({"experts": []}, "at least 2"),
        ({"experts": 2, "top_k": 3}, "1 to 2"),
        ({"keys": "one"}, "shared"),
        ({"gate": "soft"}, "normalised"),
    ):
        with pytest.raises(BadArgument, match=words):
            run(model, **settings)
    with pytest.raises(Refused, match="qwen2 model; its attention"):
        run(family_model("llama"), experts=folders)
    with pytest.raises(Refused, match="num_key_value_heads 2, this model 4"):
        run(family_model("qwen2", kv_heads=4), experts=folders)
    with pytest.raises(Refused, match="layer 0 is not plain"):
        run(family_model("deepseek-v3"))
    with pytest.raises(Refused, match="layer 0 is not plain"):
        run(run(model, experts=2).model)
