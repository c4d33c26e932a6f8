"""Which layers become what."""

import copy
import itertools

import pytest
import torch

from foveate.convert.surgery.layer_plan import every, listed, sensitivities, smart, spread, swapped
from foveate.errors import BadArgument
from foveate.models.converted import container, decoder_layers, replace
from foveate.models.tiny import tiny

PUBLISHED = {16: [0, 5, 10, 14], 28: [0, 5, 10, 16, 21, 26], 32: [0, 4, 8, 12, 16, 20, 25, 30]}


def test_by_count():
    assert every(32, 4) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert every(16, 2) == list(range(0, 16, 2)) and every(5, 3, 1) == [1, 4]
    assert spread(16, 8) == every(16, 2) and spread(7, 3) == [0, 2, 4] and spread(5, 5) == [0, 1, 2, 3, 4]
    assert listed(5, [3, 0]) == [0, 3]


def keeps_the_rules(chosen, layers):
    ends, steps = layers // len(chosen), [b - a for a, b in itertools.pairwise(chosen)]
    return chosen[0] < ends and chosen[-1] >= layers - ends and max(steps) - min(steps) <= 1


@pytest.mark.parametrize("layers", PUBLISHED)
def test_the_published_lists_keep_the_rules(layers):
    """And are what comes out where they score."""
    assert keeps_the_rules(PUBLISHED[layers], layers)
    scores = [float(index in PUBLISHED[layers]) for index in range(layers)]
    assert smart(scores, len(PUBLISHED[layers])) == PUBLISHED[layers]


@pytest.mark.parametrize(("layers", "count"), [(7, 1), (7, 2), (9, 3), (10, 4), (12, 5), (8, 8), (30, 7)])
def test_smart_finds_the_best_of_all_that_keep_the_rules(layers, count):
    scores = torch.randn(layers).tolist()
    chosen = smart(scores, count)
    ends = layers // count
    first = max(range(ends), key=scores.__getitem__)
    last = max(range(layers - ends, layers), key=scores.__getitem__)
    if count == 1:
        assert chosen == [max(range(layers), key=scores.__getitem__)]
        return
    if count > 6:
        assert keeps_the_rules(chosen, layers)
        return
    between = itertools.combinations(range(first + 1, last), count - 2)
    allowed = [c for c in ([first, *middle, last] for middle in between) if count < 3 or keeps_the_rules(c, layers)]
    assert chosen == max(allowed, key=lambda c: sum(scores[i] for i in c))


def three():
    """A teacher, and two students that differ from it and from each other."""
    teacher = container(tiny("llama", layers=4, kv_heads=2))
    student, donor = container(teacher), container(teacher)
    for model, std in ((student, 0.2), (donor, 0.02)):
        for layer in decoder_layers(model):
            with torch.no_grad():
                layer.self_attn.o_proj.weight.add_(std * torch.randn_like(layer.self_attn.o_proj.weight))
    return teacher, student, donor


def kl(teacher, student, ids):
    with torch.no_grad():
        p, q = (model(ids).logits.log_softmax(-1) for model in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_scores_are_what_a_swap_gains():
    teacher, student, donor = three()
    ids = torch.randint(3, 250, (3, 15))
    before = copy.deepcopy(student.state_dict())
    scores = sensitivities(teacher, student, donor, ids.split(2))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    for layer in range(4):
        other = copy.deepcopy(student)
        decoder_layers(other)[layer].load_state_dict(decoder_layers(donor)[layer].state_dict())
        assert scores[layer] == pytest.approx(kl(teacher, student, ids) - kl(teacher, other, ids), abs=1e-5)
    assert max(scores) > 0


def test_a_layer_that_is_the_donor_s_already_scores_nothing():
    teacher, student, donor = three()
    decoder_layers(student)[2].load_state_dict(decoder_layers(donor)[2].state_dict())
    scores = sensitivities(teacher, student, donor, [torch.randint(3, 250, (2, 11))])
    assert scores[2] == 0 and 0 not in (scores[0], scores[1], scores[3])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_swapped_layer_gets_the_mask_of_its_kind(family, implementation):
    """Attention in place of a state layer stays causal, whatever looks masks up by layer type."""
    plain = container(tiny(family, kv_heads=2))
    states = container(plain)
    replace(states, 1, "mamba2", heads=8, kv_heads=2, head_dim=16, state_dim=16)
    for model in (plain, states):
        model.config.layer_types = list(getattr(model.config, "layer_types", None) or ["full_attention"] * 3)
        model.set_attn_implementation(implementation)
    ids = torch.randint(3, 250, (1, 9))
    with torch.no_grad(), swapped(states, 1, plain):
        assert torch.equal(states(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    assert states.config.layer_types[1] == "linear_attention"


def test_refusals():
    for call in (
        lambda: every(4, 0),
        lambda: every(4, 2, 4),
        lambda: spread(4, 5),
        lambda: smart([1.0, 2.0], 0),
        lambda: listed(4, [1, 1]),
        lambda: listed(4, [4]),
        lambda: sensitivities(*three(), []),
    ):
        with pytest.raises(BadArgument):
            call()
