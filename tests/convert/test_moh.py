"""MoH conversion: exact with every head on, then as many heads as asked for; saved, opened, generated with."""

import pytest
import torch
from tests.families import FAMILIES, family_model
from transformers import AutoModelForCausalLM

import foveate
from foveate.convert.base import Calibration, conversion
from foveate.convert.run import convert
from foveate.errors import BadArgument, Refused
from foveate.models.converted import decoder_layers
from foveate.models.shape import ModelShape
from foveate.models.weights import read_heads

TEXT = torch.randint(3, 250, (3, 31), generator=torch.Generator().manual_seed(5))
PROBE = torch.randint(3, 250, (2, 23), generator=torch.Generator().manual_seed(6))


def run(model, **settings):
    return convert(model, conversion("moh", **settings), Calibration(TEXT), PROBE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["norm", "linear"])
def test_every_head_on_is_exact(family, router):
    model = family_model(family)
    done = run(model, router=router)
    assert [rung.exact for rung in done.ladder] == [True, True, False]
    assert done.ladder[1].error <= 1e-5
    assert done.ladder[2].error > 1e-3
    assert done.ladder[2].share == 1.0, "keys and values of all heads are kept"


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_every_head_on_is_exact_in_float64(kv_heads):
    done = run(family_model("qwen2", kv_heads=kv_heads, dtype=torch.float64), router="linear", active=1.0)
    assert done.ladder[1].error <= 1e-10


@pytest.mark.parametrize("router", ["norm", "linear"])
def test_as_many_heads_work_as_asked(router):
    done = run(family_model("llama", heads=9, kv_heads=3), router=router, active=0.75, shared=0.5, shared_heads="first")
    for layer in decoder_layers(done.model):
        assert layer.self_attn.shared == [0, 1, 2, 3, 4]
        x = torch.randn(2, 7, done.model.config.hidden_size)
        mixture = layer.self_attn
        routing = mixture.route(x, mixture.projected(mixture.q_proj, x))
        assert (routing.active.sum(-1) == 7).all()
        assert (routing.gates[routing.active] - 1).abs().max() < 0.1, "gates start near 1"


def test_shared_heads_are_those_that_write_most():
    model = family_model("llama", heads=8, kv_heads=8)
    with torch.no_grad():
        for layer in decoder_layers(model):
            rows = layer.self_attn.o_proj.weight.view(-1, 8, 16)
            rows[:, [0, 1, 4, 6]] *= 0.05
    done = run(model, shared=0.5)
    assert [layer.self_attn.shared for layer in decoder_layers(done.model)] == [[2, 3, 5, 7]] * 2
    # What they write is worth more than what the first ones do.
    first = run(model, shared=0.5, active=0.625, shared_heads="first").ladder[-1]
    loud = run(model, shared=0.5, active=0.625).ladder[-1]
    assert loud.error < first.error


def test_a_fitted_router_finds_the_heads_that_write():
    """Values that depend on one dim of the token: the fit must tell from it which heads to take."""
    model = family_model("llama", heads=4, kv_heads=4, layers=1)
    done = run(model, router="linear", shared=0.25, active=0.5, shared_heads="first")
    explained = done.ladder[-1].facts["explained"]
    assert all(0 < share <= 1 for share in explained)
    mixture = decoder_layers(done.model)[0].self_attn
    assert mixture.gate.among.weight.abs().sum() > 0
    # The heads that are taken write more than those that are not.
    held, seen = read_heads(mixture), {}
    mixture.o_proj.register_forward_pre_hook(lambda _, args: seen.update(out=args[0]))
    mixture.register_forward_pre_hook(lambda _, args, kw: seen.update(x=kw["hidden_states"]), with_kwargs=True)
    mixture.active = 3
    with torch.no_grad():
        done.model(TEXT)
        out = seen["out"].unflatten(-1, (4, -1)).double()
        wrote = torch.einsum("bnhd,hcd->bnhc", out, held.o).norm(dim=-1)[..., mixture.routed]
        mixture.active = 1
        routing = mixture.route(seen["x"], mixture.projected(mixture.q_proj, seen["x"]))
    taken = routing.chosen
    assert wrote[taken].mean() > 1.1 * wrote[~taken].mean()


@pytest.mark.parametrize("router", ["norm", "linear"])
@pytest.mark.parametrize("compute", ["auto", "gathered"])
def test_saved_opened_generated_with(router, compute, tmp_path):
    made = run(family_model("qwen2"), router=router, compute=compute).model
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        want = made(PROBE).logits
        assert torch.equal(again(PROBE).logits, want)
    assert decoder_layers(again)[0].self_attn.spec == decoder_layers(made)[0].self_attn.spec
    assert ModelShape.of(again).layers == ModelShape.of(made).layers
    out = again.generate(PROBE, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(again(out[:, :-1]).logits[:, -4:].argmax(-1), out[:, -4:])
    with foveate.apply(again, "dense"):
        assert torch.equal(again.generate(PROBE, max_new_tokens=4, do_sample=False, pad_token_id=0), out)


def test_bf16():
    rung = run(family_model("gemma2", dtype=torch.bfloat16), router="linear").ladder[1]
    assert rung.error < 0.02


def test_what_does_not_fit_is_refused():
    model = family_model("llama", heads=9, kv_heads=3)
    for settings, words in (
        ({"active": 0.5, "shared": 0.5}, "give 0.667 or more"),
        ({"active": 1.2}, "at most 1"),
        ({"shared": 1.0}, "from 0"),
        ({"router": "soft"}, "norm"),
        ({"shared_heads": "last"}, "energy"),
        ({"compute": "fast"}, "masked"),
    ):
        with pytest.raises(BadArgument, match=words):
            run(model, **settings)
    with pytest.raises(Refused, match="layer 0 is not softmax"):
        run(family_model("deepseek-v3"))
    with pytest.raises(Refused, match="layer 0 routes its heads already"):
        run(run(family_model("llama")).model)
