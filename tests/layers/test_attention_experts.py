"""Attention experts and feed-forward experts: equal ones are one model, a one-hot gate is one expert."""

import pytest
import torch
from tests.closeness import assert_close
from tests.families import FAMILIES, family_model

import foveate
from foveate.errors import BadArgument
from foveate.layers.routing import routing_losses
from foveate.layers.softmax import HeadGeometry
from foveate.models.converted import container, decoder_layers, replace, replace_feed_forward
from foveate.models.shape import ModelShape
from foveate.models.weights import read_heads

IDS = torch.randint(3, 250, (2, 19), generator=torch.Generator().manual_seed(3))


def mixed(models, keys="experts", loud=1.0):
    """A container of the first model, whose attention holds that of all."""
    made = container(models[0])
    for index in range(len(decoder_layers(made))):
        experts = [decoder_layers(model)[index].self_attn for model in models]
        geometry = HeadGeometry.of(experts[0]).json()
        layer = replace(made, index, "attention-experts", geometry=geometry, experts=len(models), keys=keys)
        layer.take([read_heads(expert) for expert in experts])
        torch.nn.init.normal_(layer.gate.weight, std=loud)
    return made.eval()


def logits(model, **kwargs):
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def one_hot(layer, expert):
    """Make the layer's router take one expert for every token."""
    layer.gates = lambda x: torch.eye(layer.experts)[expert].expand(*x.shape[:2], -1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keys", ["experts", "shared"])
def test_equal_experts_are_the_model_for_any_router(family, keys):
    model = family_model(family)
    assert_close(logits(mixed([model] * 3, keys)), logits(model), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_one_hot_gate_is_that_experts_attention(family):
    models = [family_model(family, seed=seed, layers=2) for seed in range(3)]
    made = mixed(models)
    x, places = torch.randn(2, 7, made.config.hidden_size), torch.arange(7).unsqueeze(0)
    for expert, model in enumerate(models):
        layer, own = decoder_layers(made)[1].self_attn, decoder_layers(model)[1].self_attn
        one_hot(layer, expert)
        kind = getattr(made.config, "layer_types", None)
        arguments = (x, places, kind[1]) if family == "gemma3" else (x, places)
        embeddings = made.model.rotary_emb(*arguments)
        causal = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None]
        with torch.no_grad():
            got = layer(x, position_embeddings=embeddings, attention_mask=causal)[0]
            want = own(x, position_embeddings=embeddings, attention_mask=causal)[0]
        assert_close(got, want, 5e-6)


def test_the_layer_is_the_gated_sum_of_its_experts():
    models = [family_model("qwen3", seed=seed, kv_heads=4) for seed in range(3)]
    made = mixed(models, loud=0.3)
    layer = decoder_layers(made)[0].self_attn
    x = torch.randn(2, 7, made.config.hidden_size)
    places = made.model.rotary_emb(x, torch.arange(7).unsqueeze(0))
    with torch.no_grad():
        gates = (x @ layer.gate.weight.T).softmax(-1)
        parts = [decoder_layers(m)[0].self_attn(x, position_embeddings=places, attention_mask=None)[0] for m in models]
        want = sum(gates[..., i : i + 1] * part for i, part in enumerate(parts))
        assert_close(layer(x, places)[0], want, 5e-6)
    assert gates.std() > 0.1


def test_shared_keys_are_the_mean_and_each_expert_reads_them_with_its_own_queries():
    models = [family_model("qwen2", seed=seed, kv_heads=2) for seed in range(3)]
    made = mixed(models, "shared")
    layer = decoder_layers(made)[0].self_attn
    held = [read_heads(decoder_layers(m)[0].self_attn) for m in models]
    for expert, model in enumerate(models):
        one_hot(layer, expert)
        own = decoder_layers(model)[0].self_attn
        with torch.no_grad():
            for name in ("k", "v"):
                getattr(own, f"{name}_proj").weight.copy_(sum(getattr(h, name) for h in held).flatten(0, 1) / 3)
                getattr(own, f"{name}_proj").bias.copy_(sum(getattr(h, f"{name}_bias") for h in held).flatten() / 3)
            x = torch.randn(1, 9, made.config.hidden_size)
            places = made.model.rotary_emb(x, torch.arange(9).unsqueeze(0))
            want = own(x, position_embeddings=places, attention_mask=None)[0]
            assert_close(layer(x, places)[0], want, 5e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
def test_cache_and_parameters(family):
    models = [family_model(family, seed=seed) for seed in range(3)]
    dense = ModelShape.of(models[0])
    width = models[0].config.hidden_size
    attention = decoder_layers(models[0])[0].self_attn
    count = sum(p.numel() for p in attention.parameters())
    norms = sum(p.numel() for name, p in attention.named_parameters() if "norm" in name)
    for keys, times in (("experts", 3), ("shared", 1)):
        made = mixed(models, keys)
        assert ModelShape.of(made).kv_bytes_per_token == times * dense.kv_bytes_per_token
        out = made(IDS, use_cache=True)
        assert out.past_key_values.layers[0].keys.shape[1] == 2 * times
        layer = decoder_layers(made)[0].self_attn
        per_head = 0 if not norms else 16 * (3 * 8 + times * 2)
        kv = sum(p.numel() for part in (attention.k_proj, attention.v_proj) for p in part.parameters())
        expected = 3 * (count - norms) - (3 - times) * kv + per_head + 3 * width
        assert sum(p.numel() for p in layer.parameters()) == expected


@pytest.mark.parametrize("keys", ["experts", "shared"])
def test_foveate_and_transformers_caches_agree(keys):
    made = mixed([family_model("llama", seed=seed) for seed in range(2)], keys)
    padding = torch.ones_like(IDS)
    padding[1, :5] = 0
    ask = {"attention_mask": padding, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = made.generate(IDS, **ask)
    with foveate.apply(made, "dense"):
        assert torch.equal(made.generate(IDS, **ask), plain)
    with foveate.apply(made, "snapkv", budget=400):
        assert torch.equal(made.generate(IDS, **ask), plain)
    whole = logits(made)
    with torch.no_grad():
        step = made(IDS[:, :12], use_cache=True)
        rest = made(IDS[:, 12:], past_key_values=step.past_key_values)
    assert_close(torch.cat([step.logits, rest.logits], 1), whole, 5e-6)


def test_routers_are_trained():
    made = mixed([family_model("llama", seed=seed) for seed in range(2)], loud=0.1)
    made(IDS).logits.square().mean().backward()
    assert all(layer.self_attn.gate.weight.grad.abs().sum() > 0 for layer in decoder_layers(made))


def test_wrong_numbers_are_refused():
    made = container(family_model("llama"))
    geometry = HeadGeometry.of(decoder_layers(made)[0].self_attn).json()
    for wrong, words in (({"experts": 0}, "at least 1"), ({"experts": 2, "keys": "one"}, "shared")):
        with pytest.raises(BadArgument, match=words):
            replace(made, 0, "attention-experts", geometry=geometry, **wrong)
    layer = replace(made, 0, "attention-experts", geometry=geometry, experts=2)
    with pytest.raises(BadArgument, match="give 2"):
        layer.take([read_heads(decoder_layers(made)[1].self_attn)])


# -- feed-forward experts ----------------------------------------------------------------------------------------------


def test_feed_forward_experts_follow_the_formula():
    made = container(family_model("llama"))
    others = [decoder_layers(family_model("llama", seed=seed))[0].mlp for seed in range(4)]
    for gate in ("probability", "normalised"):
        layer = replace_feed_forward(made, 0, "experts", experts=4, top_k=2, gate=gate)
        layer.take(others)
        torch.nn.init.normal_(layer.gate.weight, std=0.2)
        x = torch.randn(2, 5, made.config.hidden_size)
        with torch.no_grad():
            p = (x @ layer.gate.weight.T).softmax(-1)
            best = p.topk(2).indices
            want = torch.zeros_like(x)
            for b in range(2):
                for t in range(5):
                    total = p[b, t, best[b, t]].sum() if gate == "normalised" else 1.0
                    for i in best[b, t].tolist():
                        want[b, t] += p[b, t, i] / total * others[i](x[b, t])
            assert_close(layer(x), want, 5e-6)
    assert decoder_layers(made)[0].mlp.spec == {"experts": 4, "top_k": 2, "gate": "normalised"}


@pytest.mark.parametrize("gate", ["probability", "normalised"])
def test_feed_forward_routers_are_trained_and_their_losses_collected(gate):
    made = container(family_model("phi"))
    for index in range(2):
        layer = replace_feed_forward(made, index, "experts", experts=3, gate=gate)
        layer.take([decoder_layers(family_model("phi", seed=seed))[index].mlp for seed in range(3)])
        torch.nn.init.normal_(layer.gate.weight, std=0.1)
    loss = made(IDS).logits.square().mean()
    losses = routing_losses(made)
    assert losses.balance.requires_grad and losses.balance > 0 and losses.z > 0
    loss.backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in decoder_layers(made))


def test_wrong_feed_forward_numbers_are_refused():
    made = container(family_model("llama"))
    for wrong, words in (
        ({"experts": 0}, "at least 1"),
        ({"experts": 2, "top_k": 3}, "1 to 2"),
        ({"experts": 2, "gate": "soft"}, "normalised"),
        ({"experts": 2, "width": 3}, "does not take"),
    ):
        with pytest.raises(BadArgument, match=words):
            replace_feed_forward(made, 0, "experts", **wrong)
    with pytest.raises(BadArgument, match="experts"):
        replace_feed_forward(made, 0, "dense")
    with pytest.raises(BadArgument, match="0 to 1"):
        replace_feed_forward(made, 2, "experts", experts=2)
    with pytest.raises(BadArgument, match="give 2"):
        replace_feed_forward(made, 0, "experts", experts=2).take([])
