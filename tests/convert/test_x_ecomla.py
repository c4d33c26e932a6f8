"""X-EcoMLA: ranks and shares, per-layer ranks that are saved, and a start from which distillation goes down."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.families import family_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

import foveate
from foveate.convert.base import Calibration, conversion
from foveate.convert.run import convert
from foveate.convert.surgery.latent_init import largest_rank
from foveate.convert.x_ecomla import XEcoMLA, energy_rank
from foveate.errors import BadArgument, Infeasible, Refused
from foveate.layers.latent import LatentAttention
from foveate.models.converted import decoder_layers
from foveate.models.shape import ModelShape
from foveate.models.tiny import tiny
from foveate.models.weights import read_heads

FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "phi3")


def ids(length, batch=2):
    return torch.randint(3, 250, (batch, length))


def run(model, **settings):
    return convert(model, XEcoMLA(**settings), Calibration(ids(9)), ids(17))


def stub(kv_heads, dim, width, heads=32):
    """What `XEcoMLA` asks of a layer's weights to set its rank, without the weights."""
    k, v = torch.empty(kv_heads, dim, width, device="meta"), torch.empty(kv_heads, dim, width, device="meta")
    return SimpleNamespace(q=torch.empty(heads, dim, width, device="meta"), k=k, v=v)


@pytest.mark.parametrize(
    ("kv_heads", "rank", "share"),
    # Llama-3.2-1B: 8 key heads of 64, 32 of which stay rotated; Smol-1.7B has 32 and no grouping.
    [(8, 512, 0.531), (8, 128, 0.156), (8, 64, 0.094), (8, 48, 0.078), (32, 480, 0.125)],
)
def test_the_papers_shares(kv_heads, rank, share):
    weights = stub(kv_heads, 64, 2048)
    dense = 2 * kv_heads * 64
    assert (rank + 32) / dense == pytest.approx(share, abs=5e-4)
    assert XEcoMLA(kv=(rank + 32) / dense)._rank(weights) == rank


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("kv", [0.6, 0.75])
def test_the_share_is_met_in_bytes(kv_heads, kv):
    model = tiny("llama", kv_heads=kv_heads)
    done = run(model, kv=kv)
    rung, dense = done.ladder[-1], 2 * kv_heads * 16
    assert rung.share == rung.facts["share"][0] == min(int(kv * dense), 64 + 8) / dense
    cache = DynamicCache(config=done.model.config)
    with torch.no_grad():
        done.model(ids(11), past_key_values=cache)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == 2 * 11 * rung.kv_bytes


def test_the_rank_is_that_of_the_rows_before_repeating():
    weights = read_heads(tiny("llama", kv_heads=2).model.layers[0].self_attn)
    repeated = torch.cat([w.repeat_interleave(4, 0).flatten(0, 1) for w in (weights.k, weights.v)])
    assert repeated.shape == (2 * 8 * 16, 64)
    assert largest_rank(weights) == int(torch.linalg.matrix_rank(repeated)) == 64
    with pytest.raises(BadArgument, match="rank"):
        run(tiny("llama", kv_heads=1), rank=33)
    assert run(tiny("llama", kv_heads=1), rank=32).ladder[-1].facts["kv_energy"] == pytest.approx([1.0] * 3)


def test_energy_ranks():
    energies = torch.tensor([5.0, 2.0, 1.0, 1.0, 0.5, 0.5], dtype=torch.float64).repeat_interleave(8) / 80
    # the largest count that holds no more, then up to the next multiple of 8
    assert energy_rank(energies, 0.5, 48) == 8
    assert energy_rank(energies, 0.52, 48) == 8
    assert energy_rank(energies, 0.53, 48) == 16
    assert energy_rank(energies, 1e-9, 48) == 8
    assert energy_rank(energies, 1.0, 48) == 48
    assert energy_rank(energies, 1.0, 45) == 45
    ranks = [energy_rank(energies, share / 40, 48) for share in range(1, 41)]
    assert ranks == sorted(ranks)
    assert all(rank % 8 == 0 for rank in ranks)
    assert len(set(ranks)) == 6


def uneven():
    """Layers whose keys and values have ever more directions."""
    model = tiny("llama", kv_heads=4)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            mix = torch.randn(64, 12 * (index + 1)) @ torch.randn(12 * (index + 1), 64) / 30
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight.copy_(linear.weight @ mix)
    return model


def test_layers_have_ranks_of_their_own(tmp_path):
    done = run(uneven(), mode="energy")
    ranks = done.ladder[-1].facts["rank"]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[2]
    assert all(rank % 8 == 0 for rank in ranks)
    assert min(done.ladder[-1].facts["kv_energy"]) > 0.9
    assert [layer.self_attn.kv_lora_rank for layer in decoder_layers(done.model)] == ranks
    assert [layer.store_k_dim for layer in ModelShape.of(done.model).layers] == [rank + 8 for rank in ranks]
    done.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = ids(13)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, done.model(tokens).logits)
    lower = run(uneven(), mode="energy", energy=0.5).ladder[-1].facts["rank"]
    assert all(low <= rank for low, rank in zip(lower, ranks, strict=True))
    assert lower != ranks


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_runs_generates_and_takes_methods(family):
    model = family_model(family)
    # Phi-3 rotates three quarters of a head: its last rows hold no position.
    settings = {"rope_rows": "even", "rope_dim": 6} if family == "phi3" else {}
    made = run(model, kv=0.75, q_rank=40, **settings).model
    assert all(isinstance(layer.self_attn, LatentAttention) for layer in decoder_layers(made))
    tokens = ids(21)
    new = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = made.generate(tokens, **new)
    logits = made(out).logits
    assert logits.isfinite().all()
    assert torch.equal(logits[:, 20:-1].argmax(-1), out[:, 21:])
    with foveate.apply(made, "dense"):
        assert torch.equal(made.generate(tokens, **new), out)


def test_the_paths_that_are_exact():
    """With all positions alike and one key head nothing is lost but what the rank leaves out."""
    model = tiny("llama", kv_heads=1).double()
    tokens, nowhere = ids(15), torch.zeros(2, 15, dtype=torch.long)
    errors = []
    for rank in (8, 20, 32):
        made = run(model, rank=rank).model
        with torch.no_grad():
            gap = made(tokens, position_ids=nowhere).logits - model(tokens, position_ids=nowhere).logits
        errors.append(float(gap.norm()))
    assert errors[2] < 1e-5 < 1 < errors[1] < errors[0]


@torch.no_grad()
def test_pairs_that_stay_keep_what_depends_on_position():
    """Where all other rows hold nothing, keeping the pairs that do keeps the model; the published rows do not."""
    model = tiny("llama", kv_heads=1).double()
    for layer in model.model.layers:
        held = torch.zeros(16, 1)
        held[[0, 2, 4, 6, 8, 10, 12, 14]] = 1
        layer.self_attn.k_proj.weight.mul_(held)
    tokens = ids(15)
    errors = {
        rows: float(
            (run(model, rank=32, rope_dim=8, rope_rows=rows).model(tokens).logits - model(tokens).logits).norm()
        )
        for rows in ("even", "last", "fastest")
    }
    assert errors["even"] < 1e-5 < 1 < min(errors["last"], errors["fastest"])


@torch.no_grad()
def test_only_the_layers_that_are_named():
    model = tiny("llama", kv_heads=2)
    done = run(model, kv=0.5, layers=[2, 0])
    kinds = [type(layer.self_attn).__name__ for layer in decoder_layers(done.model)]
    assert kinds == ["LatentAttention", "LlamaAttention", "LatentAttention"]
    assert done.ladder[-1].facts["rank"] == [24, 24]
    assert done.ladder[-1].share == pytest.approx((1 + 0.5 + 0.5) / 3)
    tokens = ids(12)
    new = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = done.model.generate(tokens, **new)
    with foveate.apply(done.model, "dense"):
        assert torch.equal(done.model.generate(tokens, **new), plain)


def test_distillation_goes_down_and_further_than_from_chance():
    """A few dozen steps towards the model that it was: lower than before, and lower than from a random start."""
    torch.manual_seed(0)
    teacher = tiny("llama", kv_heads=2, layers=2)
    text, probe = ids(32, 96), ids(32, 16)

    def kl(student, tokens):
        with torch.no_grad():
            wanted = teacher(tokens).logits.log_softmax(-1)
        return (
            functional.kl_div(student(tokens).logits.log_softmax(-1), wanted, log_target=True, reduction="none")
            .sum(-1)
            .mean()
        )

    def healed(student):
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        for batch in text.split(4) * 2:
            optimizer.zero_grad()
            kl(student, batch).backward()
            optimizer.step()
        with torch.no_grad():
            return float(kl(student, probe))

    student = run(teacher, kv=0.5).model
    with torch.no_grad():
        before = float(kl(student, probe))
    after = healed(student)
    assert after < 0.8 * before
    chance = run(teacher, kv=0.5).model
    with torch.no_grad():
        for layer in decoder_layers(chance):
            for name, parameter in layer.self_attn.named_parameters():
                if "o_proj" not in name:
                    parameter.copy_(torch.randn_like(parameter) * parameter.std())
    assert after < healed(chance)


@torch.no_grad()
def test_half_precision():
    made = run(tiny("llama", kv_heads=2, dtype=torch.bfloat16), kv=0.75)
    assert next(made.model.parameters()).dtype == torch.bfloat16
    single = run(tiny("llama", kv_heads=2), kv=0.75)
    tokens = ids(15)
    gap = made.model(tokens).logits.float() - single.model(tokens).logits
    assert float(gap.norm() / single.model(tokens).logits.norm()) < 0.05


def test_what_is_refused():
    llama = tiny("llama", kv_heads=2)
    shape = ModelShape.of(llama)
    for settings, argument in (
        ({"kv": 0.0}, "kv"),
        ({"kv": 1.5}, "kv"),
        ({"mode": "dynamic"}, "mode"),
        ({"energy": 0.0}, "energy"),
        ({"rank": 65}, "rank"),
        ({"rank": 0}, "rank"),
        ({"q_rank": 65}, "q_rank"),
        ({"rope_dim": 5}, "rope_dim"),
        ({"rope_dim": 6}, "rope_dim"),
        ({"kv": 0.9, "nope_dim": 9}, "nope_dim"),
        ({"rope_rows": "first"}, "rope_rows"),
        ({"layers": [3]}, "layers"),
        ({"layers": []}, "layers"),
    ):
        with pytest.raises(BadArgument, match=f"^{argument}="):
            conversion("x-ecomla", **({"kv": 0.5} | settings)).check(llama, shape)
    with pytest.raises(Infeasible) as told:
        XEcoMLA(kv=0.1).check(llama, shape)
    assert told.value.floor == (8 + 1) / 64
    XEcoMLA(kv=told.value.floor).check(llama, shape)
    for family in ("qwen3", "gemma3"):
        with pytest.raises(Refused, match="norms on queries and keys"):
            XEcoMLA(kv=0.75).check(tiny(family), ModelShape.of(tiny(family)))
    with pytest.raises(Refused, match="latent attention already"):
        XEcoMLA().check(tiny("deepseek-v3"), ModelShape.of(tiny("deepseek-v3")))
