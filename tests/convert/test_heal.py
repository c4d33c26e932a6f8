"""Healing: the student comes back to its teacher, and all that is promised of how."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.closeness import relative_rms
from tests.convert.healable import VOCABULARY, byte_tokenizer, pair, same, small_text, values

from foveate.convert.healing.heal import heal
from foveate.convert.healing.optimizers import Optimizers
from foveate.convert.healing.recipe import Healing, Progress, Recipe
from foveate.convert.healing.text import TokenText
from foveate.errors import BadArgument, FoveateError, Refused
from foveate.layers.softmax import HeadGeometry
from foveate.models import tiny
from foveate.models.converted import container, replace

TOKENIZER = byte_tokenizer()
SHORT = {"tokens": 1024, "length": 64, "batch": 4, "lr": 3e-3, "needles": 0.0, "evaluate_on": 256}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TokenText:
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEATE_CACHE", str(folder / "cache"))
        return small_text(folder, 7)


def healed(text: TokenText, student: Any, teacher: Any, **settings: Any) -> Healing:
    return heal(student, teacher, text, tokenizer=TOKENIZER, **{**SHORT, **settings})


# -- it heals ----------------------------------------------------------------------------------------------------------


def test_the_loss_falls(text: TokenText, seed: int) -> None:
    """On held-out text as well; the teacher stays what it was, and the student learns and nothing else."""
    teacher, student = pair(seed)
    before, start = values(teacher), values(student)
    student.model.embed_tokens.weight.requires_grad_(False)
    told: list[Progress] = []
    record = healed(text, student, teacher, tokens=12_000, report_every=8, watch=told.append, evaluate_every=6_000)
    assert record.curve[-1]["kl"] < 0.7 * record.curve[0]["kl"]
    assert [each.tokens for each in record.evaluations] == [0, 6144, 12032]
    assert record.evaluations[2].kl < record.evaluations[1].kl < 0.6 * record.evaluations[0].kl
    assert same(values(teacher), before)
    assert not same(values(student), start)
    assert not student.training and not teacher.training
    assert [name for name, each in student.named_parameters() if not each.requires_grad] == [
        "model.embed_tokens.weight"
    ]
    assert all(each.grad is None for each in (*student.parameters(), *teacher.parameters()))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in student.model.layers)
    assert record.tokens == 12_032 == record.mix["text"]
    assert (record.steps, record.device, record.precision) == (47, "cpu", "fp32")
    assert record.trained == sum(each.numel() for each in student.parameters())
    assert record.text == text.facts
    assert [each.step for each in told] == [8, 16, 24, 32, 40, 47]
    assert told[-1].remaining == 0 < told[0].tokens_per_second
    assert told[0].parts["kl"] == pytest.approx(told[0].loss)
    assert json.loads(json.dumps(record.json())) == record.json()
    assert Healing.of(record.json()).evaluations == record.evaluations


def test_a_healed_copy_has_nothing_to_learn(text: TokenText, seed: int) -> None:
    """An unchanged copy of the teacher: no divergence, and the perplexity is the teacher's."""
    teacher, student = pair(seed, noise=0.0)
    record = healed(text, student, teacher, tokens=256, lr=1e-12)
    assert record.evaluations[0].kl == pytest.approx(0, abs=1e-6)
    assert record.perplexity == pytest.approx(record.teacher_perplexity, rel=1e-5)
    # and the perplexity is what the model itself says
    ids = text.held_out(64, 256)
    assert math.exp(teacher(ids, labels=ids).loss.item()) == pytest.approx(record.teacher_perplexity, rel=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "deepseek-v3"])
def test_families(family: str, text: TokenText, seed: int) -> None:
    teacher = tiny(family, layers=2, vocab_size=VOCABULARY, seed=seed % 100)
    student = tiny(family, layers=2, vocab_size=VOCABULARY, seed=seed % 100)
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.o_proj.weight.add_(0.2 * torch.randn_like(layer.self_attn.o_proj.weight))
    record = healed(text, student, teacher, tokens=4096)
    assert record.evaluations[1].kl < 0.7 * record.evaluations[0].kl


def test_a_cap_on_logits_is_kept(text: TokenText, seed: int) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.1, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    teacher = Gemma2ForCausalLM(config).eval()
    student = container(teacher)
    record = healed(text, student, teacher, tokens=256, lr=1e-12)
    ids = text.held_out(64, 256)
    assert math.exp(teacher(ids, labels=ids).loss.item()) == pytest.approx(record.perplexity, rel=1e-4)


def test_other_logits_are_refused(text: TokenText, seed: int) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=3.0, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    with pytest.raises(Refused, match="GraniteForCausalLM makes its logits otherwise"):
        healed(text, GraniteForCausalLM(config), GraniteForCausalLM(config))


# -- what is trained, and by which loss --------------------------------------------------------------------------------


def changed(student: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, each in student.named_parameters() if not torch.equal(each, before[name])}


def with_heads(seed: int) -> tuple[Any, Any]:
    """A student whose second layer has a mixture of heads, disturbed."""
    teacher, student = pair(seed, noise=0.0)
    old = student.model.layers[1].self_attn
    geometry = HeadGeometry.of(old).json()
    made: Any = replace(student, 1, "mixture-of-heads", geometry=geometry, shared=[0], top_k=3, router="linear")
    made.take(old)
    return teacher, student


def test_attention_of_replaced_layers(text: TokenText, seed: int) -> None:
    teacher, student = with_heads(seed)
    before = values(student)
    healed(text, student, teacher, trainable="attention", hidden=1.0)
    names = changed(student, before)
    assert names and all(".layers.1.self_attn." in name for name in names)
    teacher, student = pair(seed)  # nothing was replaced: all attention
    before = values(student)
    healed(text, student, teacher, trainable="attention", tokens=256)
    names = changed(student, before)
    assert {name.split(".")[2] for name in names} == {"0", "1"}
    assert all(".self_attn." in name for name in names)


def test_layers_that_learn_by_themselves(text: TokenText, seed: int) -> None:
    """From the teacher's stream each layer gets the gradient of its own loss alone: what is around does not matter."""
    found = []
    for noise in (0.0, 1.0):
        teacher, student = pair(seed)
        with torch.no_grad():  # a layer before, and the head
            student.model.layers[0].mlp.down_proj.weight.add_(noise)
            student.lm_head.weight.add_(noise)
        settings = {"kl": 0.0, "hidden": 1.0, "hidden_layers": [1], "hidden_from": "teacher"}
        record = healed(text, student, teacher, trainable="attention", clip=None, **settings)
        assert record.curve[-1]["hidden"] > 0
        found.append(values(student.model.layers[1].self_attn))
    assert same(*found)
    teacher, student = pair(seed)
    healed(text, student, teacher, trainable="attention", clip=None, **{**settings, "hidden_from": "student"})
    assert not same(values(student.model.layers[1].self_attn), found[0])


def test_balance_losses_count(text: TokenText, seed: int) -> None:
    found = []
    for weight in (0.0, 5.0):
        teacher, student = with_heads(seed)
        record = healed(text, student, teacher, balance=weight, checkpointing=True)
        found.append(record.curve[-1])
    assert found[0]["balance"] == 0 < found[1]["balance"]
    assert found[1]["loss"] == pytest.approx(found[1]["kl"] + 5 * found[1]["balance"], rel=1e-4)


def test_adapters_are_merged(text: TokenText, seed: int) -> None:
    """Linear maps of layers change, by a matrix of low rank, and no adapter is left."""
    teacher, student = pair(seed)
    before = values(student)
    record = healed(text, student, teacher, trainable="lora", lora_rank=2, tokens=6144, lr=1e-2, evaluate_on=10_000)
    assert record.evaluations[1].kl < 0.8 * record.evaluations[0].kl
    assert same({name: each * 0 for name, each in before.items()}, {k: v * 0 for k, v in values(student).items()})
    linear = {f"{n}.weight" for n, m in student.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    assert changed(student, before) == {f"model.layers.{name}" for name in linear}
    for name in linear:
        change = student.get_parameter(f"model.layers.{name}") - before[f"model.layers.{name}"]
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2
    assert record.trained == sum(2 * sum(before[f"model.layers.{name}"].shape) for name in linear)
    assert "peft" in record.versions
    assert not hasattr(student, "peft_config")
    # What was measured with adapters is what the merged model does.
    again = healed(text, student, teacher, tokens=256, lr=1e-12, evaluate_on=10_000)
    assert again.evaluations[0].kl == pytest.approx(record.evaluations[1].kl, rel=1e-3)


def test_adapters_need_peft(text: TokenText, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = pair(seed)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(Refused, match=r'needs peft, which is not installed: pip install "foveate\[heal\]"'):
        healed(text, student, teacher, trainable="lora")
    assert all(each.requires_grad for each in student.parameters())
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(Refused, match="healing needs accelerate"):
        healed(text, student, teacher)


# -- how steps are made ------------------------------------------------------------------------------------------------


def test_accumulation_is_the_larger_batch(text: TokenText, seed: int) -> None:
    found = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        teacher, student = pair(seed, dtype=torch.float64)
        settings = {"kl": 0.5, "ce": 0.5, "hidden": 0.1, "tokens": 512}
        record = healed(text, student, teacher, batch=batch, accumulation=accumulation, lr=1e-3, **settings)
        found.append((values(student), record.curve[-1]["loss"]))
    for other, loss in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-6)
        for name, each in found[0][0].items():
            torch.testing.assert_close(other[name], each, rtol=0, atol=1e-8)


def test_seeds(text: TokenText, seed: int) -> None:
    found = []
    for drawn in (3, 3, 4):
        teacher, student = pair(seed)
        state = torch.random.get_rng_state()
        healed(text, student, teacher, seed=drawn, generated=0.2, pool=2)
        assert torch.equal(torch.random.get_rng_state(), state)  # the caller's draws stay what they were
        found.append(values(student))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_recomputed_layers_change_nothing(text: TokenText, seed: int) -> None:
    found = []
    for checkpointing in (False, True):
        teacher, student = pair(seed, dtype=torch.float64)
        healed(text, student, teacher, checkpointing=checkpointing, hidden=1.0)
        assert not any(getattr(each, "gradient_checkpointing", False) for each in student.modules())
        found.append(values(student))
    for name, each in found[0].items():
        torch.testing.assert_close(found[1][name], each, rtol=0, atol=1e-10)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_precision(precision: str, text: TokenText, seed: int) -> None:
    """Steps too small for bf16 add up, and the student keeps its type; what is not trained is not even rounded."""
    teacher, student = pair(seed)
    exact, found = container(student), container(student)
    before = values(student)
    healed(text, exact, teacher, lr=1e-5, trainable="attention", clip=None)
    record = healed(text, found, teacher, lr=1e-5, trainable="attention", clip=None, precision=precision)
    assert record.precision == precision
    assert all(each.dtype == torch.float32 for each in found.parameters())
    assert changed(found, before) == changed(exact, before)
    name = "model.layers.0.self_attn.k_proj.weight"
    steps = [model.get_parameter(name).detach() - before[name] for model in (exact, found)]
    assert relative_rms(steps[1], steps[0]) < 0.5  # Adam's steps of single numbers follow the sign of noisy gradients
    assert not torch.equal(found.get_parameter(name).bfloat16().float(), found.get_parameter(name))


def test_a_student_in_bf16_keeps_its_type(text: TokenText, seed: int) -> None:
    teacher, student = pair(seed)
    student, teacher = student.to(torch.bfloat16), teacher.to(torch.bfloat16)
    record = healed(text, student, teacher, tokens=4096, precision="bf16")
    assert record.evaluations[1].kl < 0.7 * record.evaluations[0].kl
    assert all(each.dtype == torch.bfloat16 for each in student.parameters())


def test_muon(text: TokenText, seed: int) -> None:
    teacher, student = pair(seed)
    record = healed(text, student, teacher, tokens=8192, optimizer="muon", lr=2e-3)
    assert record.evaluations[1].kl < 0.7 * record.evaluations[0].kl


def test_what_decays_and_what_is_fp32() -> None:
    """Matrices decay; norms, biases, A_log, D, dt_bias do not, whatever their shape. Masters are fp32."""
    shapes = {"model.layers.0.a.weight": (3, 4), "model.layers.0.norm.weight": (4,), "model.layers.0.a.bias": (4,)}
    shapes |= {f"model.layers.0.m.{name}": (4, 2) for name in ("A_log", "D", "dt_bias")}
    shapes |= {"model.embed.weight": (5, 4), "model.layers.0.conv.weight": (4, 1, 3)}
    named = [(name, torch.nn.Parameter(torch.ones(shape).bfloat16())) for name, shape in shapes.items()]
    initial = [each.detach().float() * 1.001 for _, each in named]
    for optimizer in ("adamw", "muon"):
        made = Optimizers(named, initial, Recipe(weight_decay=0.3, optimizer=optimizer))
        assert all(each.dtype == torch.float32 and bool((each == 1.001).all()) for each in made.masters)
        names = {id(master): name for name, master in zip(made.names, made.masters, strict=True)}
        decay = {
            names[id(p)]: group["weight_decay"] for each in made.each for group in each.param_groups
            for p in group["params"]
        }  # fmt: skip
        matrices = {"model.layers.0.a.weight", "model.embed.weight", "model.layers.0.conv.weight"}
        assert decay == {name: 0.3 if name in matrices else 0.0 for name in shapes}
        if optimizer == "muon":
            assert [names[id(p)] for p in made.each[1].param_groups[0]["params"]] == ["model.layers.0.a.weight"]


def test_state_space_numbers_stay_fp32(text: TokenText, seed: int) -> None:
    """Also in bf16."""
    teacher, student = pair(seed, noise=0.0)
    replace(student, 1, "mamba2", heads=8, kv_heads=2, head_dim=16, state_dim=16)
    seen = []
    handle = student.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args: seen.append((module.A_log.dtype, module.D.dtype, module.out_proj.weight.dtype))
    )
    before = values(student)
    healed(text, student, teacher, precision="bf16", tokens=512, checkpointing=True)
    handle.remove()
    assert set(seen) == {(torch.float32, torch.float32, torch.bfloat16)}
    assert {"model.layers.1.self_attn.A_log", "model.layers.1.self_attn.dt_bias"} <= changed(student, before)


def test_schedules() -> None:
    rates = {kind: [Recipe(lr=2.0, warmup=0.1, schedule=kind).rate(step, 100) for step in range(100)]
             for kind in ("cosine", "linear", "constant")}  # fmt: skip
    for kind, each in rates.items():
        assert each[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)]), kind
    assert rates["constant"][10:] == [2.0] * 90
    assert rates["linear"][55] == pytest.approx(1.0)
    assert rates["cosine"][55] == pytest.approx(1.0)
    assert rates["cosine"][99] < 1e-3 < rates["cosine"][98] * 2
    assert Recipe(warmup=0.0).rate(0, 10) == Recipe().lr


# -- what cannot be ----------------------------------------------------------------------------------------------------

BAD = {
    "tokens": 0, "length": 8, "batch": 0, "accumulation": 1.5, "lr": 0.0, "warmup": 1.5, "schedule": "square",
    "optimizer": "sgd", "weight_decay": -1.0, "clip": 0.0, "temperature": 0.0, "kl": -1.0, "ce": math.inf,
    "hidden": math.nan, "hidden_layers": "some", "hidden_from": "me", "balance": -1, "trainable": "half",
    "lora_rank": 0, "lora_alpha": True, "precision": "fp8", "seed": -1, "generated": 1.1, "pool": 0, "needles": -0.1,
    "held_out": 1.0, "evaluate_every": 0, "evaluate_on": 0, "speed": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name: str) -> None:
    with pytest.raises(BadArgument, match=f"^{name}=") as error:
        Recipe.of({name: BAD[name]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl": 0.0}, "^kl=0.0: give kl, ce or hidden a weight"),
        ({"generated": 0.6, "needles": 0.6}, "^generated=0.6"),
        ({"lr": "high"}, "^settings="),
        ({"hidden": 1.0, "hidden_layers": (2,)}, r"^hidden_layers=\(2,\): the model has the layers 0 to 1"),
        ({"length": 100_000}, "^length=100000: documents holds"),
        ({"needles": 0.1}, "^length=64: a needle prompt takes at least"),
        ({"report_every": 0}, "^report_every=0"),
        ({"save_minutes": -1}, "^save_minutes=-1"),
        ({"recipe": Recipe()}, "^tokens=1024: give it in the recipe"),
    ],
)
def test_bad_calls(settings: dict[str, Any], words: str, text: TokenText, seed: int) -> None:
    teacher, student = pair(seed)
    before = values(student)
    with pytest.raises(BadArgument, match=words) as error:
        healed(text, student, teacher, **settings)
    assert "\n" not in str(error.value)
    assert same(values(student), before)


def test_models_that_do_not_fit(text: TokenText, seed: int) -> None:
    teacher, student = pair(seed)
    with pytest.raises(BadArgument, match="it is the student"):
        healed(text, student, student)
    other = tiny("llama", layers=2, vocab_size=300)
    with pytest.raises(BadArgument, match="has a vocabulary of 300, the student one of 264"):
        healed(text, student, other)
    other = tiny("llama", layers=3, vocab_size=VOCABULARY)
    with pytest.raises(BadArgument, match="2 layers of width 64, the teacher 3 of width 64"):
        healed(text, student, other, hidden=1.0)
    student.lm_head.weight = teacher.lm_head.weight
    with pytest.raises(BadArgument, match="shares weights"):
        healed(text, student, teacher)
    teacher, student = pair(seed, dtype=torch.float64)
    with pytest.raises(BadArgument, match="precision='bf16': the student is float64"):
        healed(text, student, teacher, precision="bf16")


def test_a_larger_teacher(text: TokenText, seed: int) -> None:
    """Only the vocabulary must be the same."""
    _, student = pair(seed)
    teacher = tiny("llama", layers=3, heads=4, head_dim=32, vocab_size=VOCABULARY, seed=1)
    record = healed(text, student, teacher, tokens=8192)
    assert record.evaluations[1].kl < record.evaluations[0].kl


def test_a_loss_that_is_no_number(text: TokenText, seed: int) -> None:
    teacher, student = pair(seed)
    with pytest.raises(FoveateError, match=r"the loss is (nan|inf) after \d+ tokens: give a smaller lr than 1e\+30"):
        healed(text, student, teacher, lr=1e30, clip=None, warmup=0.0, report_every=1)
    assert not student.training


def test_a_path_is_read(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    small_text(tmp_path, seed)
    teacher, student = pair(seed)
    record = heal(student, teacher, tmp_path / "documents", tokenizer=TOKENIZER, recipe=Recipe(**SHORT, held_out=0.2))
    assert record.text["name"] == "documents"
    assert record.recipe["held_out"] == 0.2
