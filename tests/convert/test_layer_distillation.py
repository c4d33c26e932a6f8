"""Layers that learn one by one from a teacher."""

import copy

import pytest
import torch

from foveate.convert.surgery.layer_distillation import ild, layer_losses
from foveate.convert.surgery.state_init import put_states
from foveate.errors import BadArgument
from foveate.models.converted import container, decoder_layers
from foveate.models.tiny import tiny


def pair(family="llama", layers=(0, 2), dtype=torch.float32):
    teacher = container(tiny(family, layers=4, kv_heads=2, dtype=dtype))
    student = container(teacher)
    ids = torch.randint(3, 250, (2, 15))
    if layers:
        put_states(student, layers, [ids])
    return student, teacher, ids


def by_hand(student, teacher, ids, layer, attention):
    """The loss of one layer, from hidden states that transformers hands out."""
    with torch.no_grad():
        hidden = teacher.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        mine, theirs = decoder_layers(student)[layer], decoder_layers(teacher)[layer]
        positions = teacher.model.rotary_emb(hidden[0], torch.arange(ids.shape[1])[None])
        out, want = (
            mine(hidden[layer], position_embeddings=positions),
            theirs(hidden[layer], position_embeddings=positions),
        )
        mixed, wanted = (
            each.self_attn(each.input_layernorm(hidden[layer]), position_embeddings=positions, attention_mask=None)[0]
            for each in (mine, theirs)
        )
    loss = (out - want).norm(dim=-1).mean()
    return loss + attention * (mixed - wanted).norm(dim=-1).mean()


@pytest.mark.parametrize("attention", [0.0, 1.0, 0.5])
def test_the_loss_is_the_papers(attention):
    student, teacher, ids = pair()
    losses = layer_losses(student, teacher, ids, [0, 2], attention)
    for layer, loss in zip([0, 2], losses, strict=True):
        torch.testing.assert_close(
            loss.detach(), by_hand(student, teacher, ids, layer, attention), rtol=1e-5, atol=1e-6
        )


def test_without_a_replaced_layer_all_losses_are_nothing():
    student, teacher, ids = pair(layers=())
    losses = layer_losses(student, teacher, ids, range(4))
    assert [float(loss.detach()) for loss in losses] == [0.0] * 4
    sum(losses).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in student.parameters())
    assert torch.equal(student(ids).logits, teacher(ids).logits)


def test_a_layer_s_loss_depends_on_that_layer_alone():
    student, teacher, ids = pair()
    before = [float(loss.detach()) for loss in layer_losses(student, teacher, ids, [0, 2])]
    layer_losses(student, teacher, ids, [0, 2])[1].backward()
    graded = {name for name, p in student.named_parameters() if p.grad is not None}
    assert graded and all(name.startswith("model.layers.2.") for name in graded)
    assert all(p.grad is None for p in teacher.parameters())
    with torch.no_grad():
        decoder_layers(student)[0].self_attn.out_proj.weight.mul_(2)
    after = [float(loss.detach()) for loss in layer_losses(student, teacher, ids, [0, 2])]
    assert after[0] != before[0] and after[1] == before[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_training_lowers_the_loss_of_new_layers_and_touches_no_other(family, dtype):
    student, teacher, ids = pair(family, dtype=dtype)
    before, untouched = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    told = ild(student, teacher, [ids], 25, 3e-3)
    assert len(told) == 25 and told[-1] < 0.8 * told[0]
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith(("model.layers.0.", "model.layers.2.")) for name in changed)
    assert any(".mlp." in name for name in changed) and any(".A_log" in name for name in changed)
    assert all(torch.equal(value, untouched[name]) for name, value in teacher.state_dict().items())
    assert student.dtype == dtype and all(p.requires_grad and p.grad is None for p in student.parameters())
    assert float(sum(layer_losses(student, teacher, ids, [0, 2])).detach()) < 0.8 * told[0]


def test_layers_do_not_wait_for_each_other():
    student, teacher, ids = pair()
    alone = container(student)
    ild(student, teacher, [ids, ids.flip(0)], 4, 1e-3)
    ild(alone, teacher, [ids, ids.flip(0)], 4, 1e-3, layers=[2])
    ours, theirs = (decoder_layers(model)[2].state_dict() for model in (student, alone))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-6)
    assert not torch.equal(ours["self_attn.A_log"], decoder_layers(container(alone))[0].self_attn.A_log)


def test_refusals():
    student, teacher, ids = pair(layers=())
    for batches, steps, layers in (([ids], 0, [0]), ([ids], 1, None), ([], 1, [0])):
        with pytest.raises(BadArgument):
            ild(student, teacher, batches, steps, layers=layers)
