"""SHRP: usage that adds up, heads really cut out, counters that are true, and what is left is a plain encoder."""

import pytest
import torch
from tests.closeness import assert_close, relative_rms
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from foveate.convert.base import Calibration, conversion
from foveate.convert.shrp import count_usage, prune_by_usage, routed, size, unrouted
from foveate.errors import BadArgument, Refused
from foveate.models.encoders import encoder_container, encoder_layers, keep_heads, layer_flops, layer_parameters
from foveate.models.tiny import tiny

TEXT = torch.randint(3, 90, (6, 23), generator=torch.Generator().manual_seed(5))
PROBE = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(6))


def encoder(family="bert", heads=6, layers=2):
    import transformers

    name = {"bert": "Bert", "roberta": "Roberta"}[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=100, hidden_size=48, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=80,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                gain = 3.0 if "query" in name else 1.0
                parameter.copy_(gain * torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def states(model, ids=PROBE, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).last_hidden_state


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("router", ["written", "norm"])
def test_stages(family, router):
    model = encoder(family)
    made = encoder_container(model)
    assert torch.equal(states(made), states(model))
    how = conversion("shrp", heads=2, router=router)
    how.check(model, None)
    stages = how.stages(made, Calibration(TEXT))
    first = next(stages)
    assert first.exact
    assert_close(states(made), states(model), 1e-6)
    last = next(stages)
    assert not last.exact and next(stages, None) is None
    assert all(sum(counts) == TEXT.numel() for counts in last.facts["usage"]), "each token has one first choice"
    for kept, counts in zip(last.facts["kept"], last.facts["usage"], strict=True):
        assert sorted(counts, reverse=True)[:2] == sorted((counts[head] for head in kept), reverse=True)
    assert states(made).isfinite().all() and relative_rms(states(made), states(model)) > 1e-3
    assert torch.equal(states(made), states(made))
    assert {type(layer.attention.self).__module__.split(".")[0] for layer in encoder_layers(made)} == {"transformers"}


def test_usage_does_not_count_padding():
    model = encoder_container(encoder())
    routed(model, "norm")
    mask = torch.ones_like(PROBE)
    mask[1, 5:] = 0
    states(model, attention_mask=mask)
    assert [int(layer.attention.self.usage.sum()) for layer in encoder_layers(model)] == [22, 22]


@pytest.mark.parametrize("router", ["written", "norm", "linear"])
def test_pruned_is_routed_where_the_router_takes_the_kept_head(router):
    """Top-1 with a router that always takes head 4, against the encoder that keeps head 4 alone."""
    model = encoder()
    with torch.no_grad():
        for layer in encoder_layers(model):
            dims = slice(4 * 8, 5 * 8)
            layer.attention.self.query.bias[dims] = 100.0
            layer.attention.output.dense.weight[:, dims] *= 30.0
    made = encoder_container(model)
    routed(made, router)
    if router == "linear":
        for layer in encoder_layers(made):
            experts = layer.attention.self
            experts.route = lambda x, out, own=experts.route: _always(own(x, out), 4)
    want = states(made)
    usage = count_usage(made, Calibration(TEXT)) if router != "linear" else [torch.eye(6)[4]] * 2
    assert [int(counts.argmax()) for counts in usage] == [4, 4]
    assert prune_by_usage(made, usage, 1) == [[4], [4]]
    assert_close(states(made), want, 1e-5)


def _always(routing, head):
    from dataclasses import replace

    chosen = torch.zeros_like(routing.chosen)
    chosen[..., head] = True
    return replace(routing, gates=chosen.float(), chosen=chosen, active=chosen)


def test_keeping_all_heads_keeps_the_function_and_cutting_silent_ones_too():
    model = encoder()
    made = encoder_container(model)
    for layer in encoder_layers(made):
        keep_heads(layer, range(6))
    assert torch.equal(states(made), states(model))
    with torch.no_grad():
        for layer in encoder_layers(model):
            layer.attention.output.dense.weight[:, 8:24] = 0
    made = encoder_container(model)
    for layer in encoder_layers(made):
        keep_heads(layer, [0, 3, 4, 5])
    assert_close(states(made), states(model), 1e-6)


def test_a_fitted_projection_is_the_least_squares_one():
    model = encoder(layers=1)
    made, plain = encoder_container(model), encoder_container(model)
    seen = {}
    encoder_layers(model)[0].attention.output.dense.register_forward_hook(
        lambda _, args, out: seen.update(given=args[0].double(), want=out.double())
    )
    states(model, TEXT)
    for one, fitted in ((made, True), (plain, False)):
        list(conversion("shrp", heads=3, fitted=fitted).stages(one, Calibration(TEXT)))
    kept = made.config.kept_heads[0]
    assert plain.config.kept_heads == made.config.kept_heads
    given = seen["given"].flatten(0, 1).unflatten(-1, (6, 8))[:, kept].flatten(1)
    want = seen["want"].flatten(0, 1)
    errors = []
    for one in (made, plain):
        dense = encoder_layers(one)[0].attention.output.dense
        errors.append(
            float((given @ dense.weight.detach().double().T + dense.bias.detach().double() - want).square().sum())
        )
    with_one = torch.cat([given, torch.ones(len(given), 1)], dim=1)
    best = float((with_one @ torch.linalg.lstsq(with_one, want).solution - want).square().sum())
    assert best <= errors[0] <= 1.01 * best < errors[1]


def test_counters_are_true():
    model = encoder_container(encoder())
    model.set_attn_implementation("eager")  # whose products are counted on every device
    for heads in (6, 2):
        for layer in encoder_layers(model):
            keep_heads(layer, range(heads))
            assert layer_parameters(48, 80, 8, heads) == sum(p.numel() for p in layer.parameters())
        hidden = torch.randn(1, 13, 48)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.encoder(hidden)
        assert counter.get_total_flops() == 2 * layer_flops(48, 80, 8, heads, 13)
    facts = size(model, Calibration(TEXT))
    assert facts["layer_parameters"] == sum(p.numel() for p in model.encoder.parameters())
    assert facts["layer_flops"] == 2 * layer_flops(48, 80, 8, 2, 23)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_saved_and_opened(family, tmp_path):
    made = encoder_container(encoder(family))
    list(conversion("shrp", heads=3).stages(made, Calibration(TEXT)))
    made.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(made)
    assert torch.equal(states(again), states(made))
    # What is left can be pruned once more; heads go by their numbers in the original.
    twice = encoder_container(again)
    list(conversion("shrp", heads=1).stages(twice, Calibration(TEXT)))
    assert all(set(few) < set(more) for few, more in zip(twice.config.kept_heads, made.config.kept_heads, strict=True))


def test_routers_can_be_trained():
    made = encoder_container(encoder())
    routed(made, "linear", k=2)
    made.train()
    made(PROBE).last_hidden_state.square().mean().backward()
    for layer in encoder_layers(made):
        experts = layer.attention.self
        assert experts.gate.weight.grad.abs().sum() > 0
        assert 0 < experts.balance_loss() < 6
        assert not experts.usage.any()
    unrouted(made)
    assert torch.equal(states(made.eval()), states(encoder()))


def test_bf16():
    model = encoder().to(torch.bfloat16)
    made = encoder_container(model)
    stages = conversion("shrp", heads=3).stages(made, Calibration(TEXT))
    next(stages)
    assert torch.equal(states(made), states(model))
    next(stages)
    assert states(made).isfinite().all() and made.dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    for heads in (0, 7):
        with pytest.raises(BadArgument, match="1 to 6"):
            conversion("shrp", heads=heads).check(encoder(), None)
    with pytest.raises(BadArgument, match="written"):
        conversion("shrp", router="linear").check(encoder(), None)
    with pytest.raises(Refused, match="llama models are not encoders"):
        conversion("shrp").check(tiny("llama"), None)
    with pytest.raises(BadArgument, match="0 to 5"):
        keep_heads(encoder_layers(encoder())[0], [6])
    import transformers

    masked = transformers.BertForMaskedLM(encoder().config)
    with pytest.raises(Refused, match=r"model\.bert"):
        encoder_container(masked)
    decoder = encoder()
    decoder.config.is_decoder = True
    with pytest.raises(Refused, match="decoder"):
        encoder_container(decoder)
