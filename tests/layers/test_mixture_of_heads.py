"""Mixture of heads: the dense layer where it must be, exactly the heads it says, two ways to compute that agree."""

import pytest
import torch
from tests.closeness import assert_close
from tests.families import FAMILIES, family_model
from torch import nn

import foveate
from foveate.errors import BadArgument
from foveate.layers import mixture_of_heads as module
from foveate.layers.mixer import build
from foveate.layers.mixture_of_heads import gathered
from foveate.layers.routing import routing_losses
from foveate.layers.softmax import HeadGeometry
from foveate.models.converted import container, decoder_layers, replace
from foveate.models.weights import read_heads


def mixed(model, shared, top_k, router="linear", compute="masked", layers=None, loud=0.0):
    """A container of the model with mixtures of heads; linear routers with weights of deviation `loud`."""
    made = container(model)
    for index, layer in enumerate(decoder_layers(made)):
        if layers is not None and index not in layers:
            continue
        old = layer.self_attn
        geometry = HeadGeometry.of(old).json()
        new = replace(
            made, index, "mixture-of-heads", geometry=geometry, shared=shared, top_k=top_k, router=router,
            compute=compute,
        )  # fmt: skip
        new.take(old)
        if router == "linear" and loud:
            for parameter in new.gate.parameters():
                nn.init.normal_(parameter, std=loud)
    return made.eval()


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


IDS = torch.randint(3, 250, (2, 23), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["linear", "norm"])
@pytest.mark.parametrize("compute", ["masked", "gathered"])
def test_all_heads_with_equal_scores_are_the_dense_layer(family, router, compute):
    model = family_model(family)
    made = mixed(model, [0, 3, 4], 5, router, compute)
    assert_close(logits(made, IDS), logits(model, IDS), 1e-5)


@pytest.mark.parametrize("router", ["linear", "norm"])
def test_exactly_the_shared_and_k_heads_work(router):
    made = mixed(family_model("llama"), [1, 6], 3, router, loud=1.0)
    layer = decoder_layers(made)[0].self_attn
    x = torch.randn(2, 11, made.config.hidden_size)
    routing = layer.route(x, layer.projected(layer.q_proj, x))
    assert torch.equal(routing.gates != 0, routing.active)
    assert (routing.active.sum(-1) == 5).all()
    assert routing.active[..., [1, 6]].all()
    if router == "norm":
        assert torch.equal(routing.gates, routing.active.float())
    others = routing.active[..., layer.routed].flatten(0, 1)
    assert others.any(0).sum() > 3, "tokens take different heads"


def test_the_norm_router_takes_the_longest_queries_before_rotation():
    made = mixed(family_model("qwen3"), [0, 1], 2, "norm")
    layer = decoder_layers(made)[0].self_attn
    x = torch.randn(1, 9, made.config.hidden_size)
    q = layer.q_proj(x).unflatten(-1, (8, 16))
    lengths = q.norm(dim=-1)[..., layer.routed]
    best = torch.tensor(layer.routed)[lengths.topk(2, -1).indices].sort(-1).values
    routing = layer.route(x, q.transpose(1, 2))
    got = routing.active.clone()
    got[..., layer.shared] = False
    assert torch.equal(got.nonzero()[:, -1].view(1, 9, 2), best)


@pytest.mark.parametrize(
    ("family", "kv_heads"), [*((family, 2) for family in FAMILIES), ("llama", 1), ("llama", 8), ("qwen3", 1)]
)
@pytest.mark.parametrize("router", ["linear", "norm"])
def test_gathered_is_masked(family, router, kv_heads):
    model = family_model(family, kv_heads=kv_heads)
    masked = mixed(model, [2, 5], 3, router, "masked")
    some = mixed(model, [2, 5], 3, router, "gathered")
    for one, other in zip(decoder_layers(masked), decoder_layers(some), strict=True):
        if router == "linear":
            for parameter in one.self_attn.gate.parameters():
                nn.init.normal_(parameter, std=0.3)
            other.self_attn.load_state_dict(one.self_attn.state_dict())
    assert_close(logits(some, IDS), logits(masked, IDS), 2e-6)
    padding = torch.ones_like(IDS)
    padding[1, :6] = 0
    got, want = (logits(m, IDS, attention_mask=padding) for m in (some, masked))
    assert_close(got[padding.bool()], want[padding.bool()], 2e-6)
    got, want = (
        m.generate(IDS, attention_mask=padding, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for m in (some, masked)
    )
    assert torch.equal(got, want)


def test_gathered_computes_the_active_pairs_only():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((6, 13), (2, 13), (2, 13)))
    active = torch.rand(2, 13, 6, generator=generator) < 0.4
    # What is not asked for must not be read: a NaN in an inactive query would show anywhere.
    poisoned = torch.where(active.transpose(1, 2).unsqueeze(-1), q, torch.nan)
    out = gathered(poisoned, k, v, active, None, 0.3)
    want = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)
    want = want.transpose(1, 2) * active.unsqueeze(-1)
    assert_close(out, want, 2e-6)
    assert not out[~active].any()
    assert not gathered(q, k, v, torch.zeros_like(active), None, 0.3).any()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_token_alone_reads_the_keys_of_working_heads_only(groups, softcap):
    """Padding and room behind the last key included; a head whose queries all rest may hold anything."""
    q, k, v = (torch.randn(2, heads, n, 8).double() for heads, n in ((6, 1), (6 // groups, 19), (6 // groups, 19)))
    active = torch.zeros(2, 1, 6, dtype=torch.bool)
    active[0, 0, [0, 1]], active[1, 0, [4, 5]] = True, True
    mask = torch.zeros(2, 1, 1, 19, dtype=torch.bool)
    mask[0, ..., 3:17], mask[1, ..., :17] = True, True
    scores = q @ k.repeat_interleave(groups, 1).mT * 0.4
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    want = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 1)
    want = want.transpose(1, 2) * active.unsqueeze(-1)
    for row in (0, 1):
        for head in range(6 // groups):
            if not active[row, 0, head * groups : (head + 1) * groups].any():
                k[row, head] = v[row, head] = torch.nan
    assert_close(gathered(q, k, v, active, mask, 0.4, softcap), want, 1e-12)


def test_auto_gathers_single_tokens_behind_many_keys(monkeypatch):
    calls = []
    real = module.gathered
    monkeypatch.setattr(module, "_WORTH", 12)
    monkeypatch.setattr(module, "gathered", lambda *args: calls.append(args[0].shape[2]) or real(*args))
    model = family_model("llama")
    outs = {}
    for compute in ("masked", "gathered", "auto"):
        made = mixed(model, [2, 5], 3, "norm", compute)
        calls.clear()
        text = made.generate(IDS[:, :9], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None,
                             return_dict_in_generate=True, output_logits=True)  # fmt: skip
        outs[compute] = torch.stack(text.logits)
        layers = len(decoder_layers(made))
        # Keys: 9 of the prompt, then 10 to 14.
        assert calls == {"masked": [], "gathered": [9] * layers + [1] * 5 * layers, "auto": [1] * 3 * layers}[compute]
    assert_close(outs["auto"], outs["masked"], 2e-6)
    assert_close(outs["gathered"], outs["masked"], 2e-6)


@pytest.mark.parametrize("pieces", [1, 7, 512])
def test_gathered_reads_in_pieces_of_any_length(pieces, monkeypatch):
    monkeypatch.setattr("foveate.layers.mixture_of_heads._AT_ONCE", pieces)
    q, k, v = torch.randn(1, 4, 17, 8).double(), torch.randn(1, 2, 30, 8).double(), torch.randn(1, 2, 30, 8).double()
    active = torch.rand(1, 17, 4) < 0.5
    i, j = torch.arange(13, 30).unsqueeze(-1), torch.arange(30)
    mask = ((j <= i) & (i - j < 9))[None, None]
    want = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=1.0)
    want = want.transpose(1, 2) * active.unsqueeze(-1)
    assert_close(gathered(q, k, v, active, mask, 1.0), want, 1e-12)
    added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    assert_close(gathered(q, k, v, active, added, 1.0), want, 1e-12)


def test_permuting_routed_heads_permutes_what_they_give():
    made = mixed(family_model("llama", kv_heads=8), [0, 1, 2], 2, loud=0.5)
    layer = decoder_layers(made)[0].self_attn
    x = torch.randn(1, 9, made.config.hidden_size)
    places = tuple(t[:, :9] for t in made.model.rotary_emb(x, torch.arange(9).unsqueeze(0)))
    with torch.no_grad():
        want, _ = layer(x, places)
        order = [0, 1, 2, 5, 7, 3, 6, 4]
        w = read_heads(layer)
        other = build("mixture-of-heads", made.config, 0, layer.spec)
        other.load_state_dict(layer.state_dict())
        for linear, rows in ((other.q_proj, w.q), (other.k_proj, w.k), (other.v_proj, w.v)):
            linear.weight.copy_(rows[order].flatten(0, 1))
        other.o_proj.weight.copy_(w.o[order].transpose(0, 1).flatten(1))
        unmatched, _ = other(x, places)
        other.gate.among.weight.copy_(layer.gate.among.weight[[head - 3 for head in order[3:]]])
        got, _ = other(x, places)
    assert_close(got, want, 2e-6)
    assert (unmatched - want).abs().max() > 0.01, "the router's rows must go with their heads"


@pytest.mark.parametrize("router", ["linear", "norm"])
@pytest.mark.parametrize("compute", ["masked", "gathered"])
def test_routers_and_queries_get_gradients(router, compute):
    made = mixed(family_model("llama"), [0, 4], 3, router, compute, loud=0.3)
    layer = decoder_layers(made)[0].self_attn
    made(IDS).logits.square().mean().backward()
    if router == "linear":
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.gate.parameters())
        return
    # Queries of a head that is not taken: the straight-through gradient reaches them, a mask alone would not.
    q = torch.randn(1, 8, 1, 16, requires_grad=True)
    routing = layer.route(torch.randn(1, 1, made.config.hidden_size), q)
    (routing.gates * torch.randn(1, 1, 8)).sum().backward()
    assert (q.grad[0, ~routing.active[0, 0]].abs().sum((-1, -2)) > 0).all()


def test_norm_routing_in_training_gathers_nothing_and_changes_nothing():
    model = family_model("llama")
    grads = []
    for compute in ("masked", "gathered"):
        made = mixed(model, [0, 4], 3, "norm", compute)
        made(IDS).logits.square().mean().backward()
        grads.append(decoder_layers(made)[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*grads)


def test_linear_routing_gathered_has_the_gradient_of_masked():
    model = family_model("llama", dtype=torch.float64)
    one, other = (mixed(model, [0, 4], 3, "linear", compute, loud=0.3) for compute in ("masked", "gathered"))
    other.load_state_dict(one.state_dict())
    for made in (one, other):
        made(IDS).logits.square().mean().backward()
    for name, parameter in one.named_parameters():
        want = other.get_parameter(name).grad
        assert (parameter.grad is None) == (want is None)
        if want is not None and want.abs().max() > 0:
            assert_close(parameter.grad, want, 1e-9)


@pytest.mark.parametrize("router", ["linear", "norm"])
def test_balance_loss_is_functional_and_k_for_even_routing(router):
    made = mixed(family_model("llama"), [0, 1], 4, router)
    made(IDS)
    loss = routing_losses(made).balance
    assert loss.requires_grad and loss.isfinite()
    if router == "linear":  # equal scores: P_i = 1/6 whatever is taken
        assert loss.item() == pytest.approx(2 * 4.0, rel=1e-5)
    layer = decoder_layers(made)[0].self_attn
    assert layer._noted is None
    logits(made, IDS)
    assert layer._noted is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral", "phi"])
@pytest.mark.parametrize("method", ["dense", "snapkv"])
def test_foveate_manages_the_cache(family, method):
    made = mixed(family_model(family), [0, 5], 3, "norm", "gathered")
    plain = made.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with foveate.apply(made, method, **({"budget": 400} if method == "snapkv" else {})):
        assert torch.equal(made.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0), plain)


def test_cached_steps_and_chunks_equal_one_forward():
    made = mixed(family_model("qwen2"), [0], 4, "norm", "gathered")
    whole = logits(made, IDS)
    from transformers import DynamicCache

    cache, parts = DynamicCache(config=made.config), []
    for start, stop in ((0, 9), (9, 16), (16, 17), (17, 18), (18, 23)):
        parts.append(logits(made, IDS[:, start:stop], past_key_values=cache))
    assert_close(torch.cat(parts, 1), whole, 5e-6)


@pytest.mark.parametrize("router", ["linear", "norm"])
def test_bf16(router):
    model = family_model("gemma3")
    want = logits(model, IDS)
    half = model.to(torch.bfloat16)
    bound = 1.5 * ((logits(half, IDS).float() - want).norm() / want.norm()).item()
    made = mixed(half, [0, 5], 6, router, "gathered")
    assert_close(logits(made, IDS).float(), want, bound)


def test_wrong_heads_are_refused():
    model = container(family_model("llama"))
    geometry = HeadGeometry.of(decoder_layers(model)[0].self_attn).json()
    for wrong, words in (
        ({"shared": [8], "top_k": 1}, "0 to 7"),
        ({"shared": [1, 1], "top_k": 1}, "different"),
        ({"shared": [0], "top_k": 8}, "1 to 7"),
        ({"shared": list(range(8)), "top_k": 1}, "at least one"),
        ({"shared": [0], "top_k": 2, "router": "soft"}, "linear"),
        ({"shared": [0], "top_k": 2, "compute": "fast"}, "masked"),
    ):
        with pytest.raises(BadArgument, match=words):
            replace(model, 0, "mixture-of-heads", geometry=geometry, **wrong)
