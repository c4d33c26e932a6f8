"""One matrix for queries and keys: exact where there is no rotation, nearest where there is one."""

import pytest
import torch
from tests.closeness import assert_close
from tests.families import family_model
from transformers import AutoModelForCausalLM

import foveate
from foveate.convert.base import Calibration, conversion
from foveate.convert.minimal_transformer import _turns
from foveate.convert.run import convert
from foveate.convert.surgery.score_forms import form_square, mean_form, mean_square, symmetric, triangular
from foveate.errors import BadArgument, Refused
from foveate.layers.rotation import rotate_half
from foveate.models.converted import container, decoder_layers, replace
from foveate.models.shape import ModelShape
from foveate.models.weights import read_heads

TEXT = torch.randint(3, 250, (3, 31), generator=torch.Generator().manual_seed(5))
PROBE = torch.randint(3, 250, (2, 23), generator=torch.Generator().manual_seed(6))
SPECS = ({"heads": 1, "vo": "full"}, {"heads": 1, "vo": "none"}, {"heads": 4, "vo": "full", "head_dim": 16})


def run(model, **settings):
    return convert(model, conversion("minimal-transformer", **settings), Calibration(TEXT), PROBE)


def unrotated(spec, dtype=torch.float32):
    """A model of separate query and key matrices without positions."""
    made = container(family_model("llama", dtype=dtype))
    generator = torch.Generator().manual_seed(2)
    for index in range(len(decoder_layers(made))):
        layer = replace(made, index, "minimal", qk="separate", **spec)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return made


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapsing_without_rotation_is_exact(spec, dtype):
    done = run(unrotated(spec, dtype), qk="collapsed")
    assert done.ladder[-1].exact
    assert done.ladder[-1].error <= {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    if spec == SPECS[1]:
        d = done.model.config.hidden_size
        assert done.ladder[-1].facts["attention_parameters"] == [2 * 2 * d * d, 2 * d * d]
        assert done.ladder[-1].kv_bytes == 2 * d * dtype.itemsize


@pytest.mark.parametrize("qk", ["symmetric", "cholesky"])
def test_a_symmetric_model_stays_itself(qk):
    model = unrotated(SPECS[2], torch.float64)
    for layer in decoder_layers(model):
        layer.self_attn.q_proj.weight.data = layer.self_attn.k_proj.weight.data.clone()
    done = run(model, qk=qk)
    assert done.ladder[-1].error <= 1e-6
    assert done.ladder[-1].facts["kept"] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_a_rotated_symmetric_checkpoint_stays_itself(family):
    model = family_model(family, kv_heads=8, dtype=torch.float64)
    with torch.no_grad():
        for layer in decoder_layers(model):
            attention = layer.self_attn
            if family == "phi3":
                attention.qkv_proj.weight[:128] = attention.qkv_proj.weight[128:256]
            else:
                attention.q_proj.weight.copy_(attention.k_proj.weight)
    done = run(model)
    assert done.ladder[-1].error <= 1e-6
    assert done.ladder[-1].facts["kept"] == pytest.approx([1.0, 1.0])


def _moment(width, tokens=200):
    x = torch.randn(tokens, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64)
    return x, x.T @ x / tokens


def _scores(q, k, x, y, distance, rates):
    """Scores of queries x and keys y, `distance` apart, of one head: rotated as transformers does."""
    angle = torch.cat([rates, rates]) * distance
    queries, keys = x @ q.T, y @ k.T
    rotated = queries * angle.cos() + rotate_half(queries) * angle.sin()
    return rotated @ keys.T


def test_symmetric_is_the_nearest_over_distances():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 6, dtype=torch.float64), torch.randn(1, 4, 6, dtype=torch.float64)
    x, second = _moment(6)
    t, kept = symmetric(q, k, second, 4)
    rates = torch.tensor([1.0, 0.37], dtype=torch.float64)

    def missed(made):
        return sum(
            (_scores(made, made, x, x, n, rates) - _scores(q[0], k[0], x, x, n, rates)).square().mean()
            for n in range(0, 400, 3)
        )

    whole = sum(_scores(q[0], k[0], x, x, n, rates).square().mean() for n in range(0, 400, 3))
    best = missed(t[0])
    assert 1 - best / whole == pytest.approx(kept, abs=0.03)
    for scale in (0.3, 0.1, 0.03):
        for _ in range(30):
            noise = torch.randn_like(t[0]) * t[0].abs().mean() * scale
            assert missed(t[0] + noise) > best * 0.999
    assert missed(q[0]) > best and missed(k[0]) > best


def test_dims_without_rotation_take_the_nearest_semidefinite_form():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    _, second = _moment(7)
    t, kept = symmetric(q, k, second, 0)
    total = missed = 0.0
    for head in range(2):
        values, vectors = torch.linalg.eigh(second)
        root = vectors @ torch.diag(values.sqrt()) @ vectors.T
        seen = root @ q[head].T @ k[head] @ root
        positive = torch.linalg.eigvalsh((seen + seen.T) / 2).clamp(min=0).square().sum()
        total += seen.square().sum()
        missed += seen.square().sum() - positive
        got = root @ (q[head].T @ k[head] - t[head].T @ t[head]) @ root
        assert_close(got.square().sum(), seen.square().sum() - positive, 1e-9)
    assert kept == pytest.approx(float(1 - missed / total))


def test_triangles_are_the_nearest_semidefinite_form():
    torch.manual_seed(0)
    whole = torch.randn(2, 5, 5, dtype=torch.float64)
    _, second = _moment(5)
    made, missed = triangular(whole, second)
    assert torch.equal(made, made.tril())
    values, vectors = torch.linalg.eigh(second)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    seen = root @ whole @ root
    positive = torch.linalg.eigvalsh((seen + seen.transpose(1, 2)) / 2).clamp(min=0).square().sum()
    got = root @ (whole - made @ made.transpose(1, 2)) @ root
    assert_close(got.square().sum(), seen.square().sum() - positive, 1e-9)
    assert missed == pytest.approx(float(seen.square().sum() - positive))
    assert form_square(whole, second) == pytest.approx(float(seen.square().sum()))


@pytest.mark.parametrize("rotary", [0, 4, 6])
def test_mean_forms_and_squares_are_those_over_the_distances(rotary):
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 7, dtype=torch.float64), torch.randn(2, 6, 7, dtype=torch.float64)
    x, second = _moment(7)
    rates = torch.rand(rotary // 2, dtype=torch.float64)
    angles = torch.arange(9).unsqueeze(-1) * torch.cat([rates, rates])
    weights = torch.rand(9, dtype=torch.float64).softmax(0)
    mean, square = 0.0, 0.0
    for head in range(2):
        for n, weight in enumerate(weights):
            scores = _scores(q[head, :rotary], k[head, :rotary], x, x, n, rates)
            scores = scores + (x @ q[head, rotary:].T) @ (x @ k[head, rotary:].T).T
            square = square + weight * scores.square().mean()
            mean = mean + (weight * scores if head == 0 else 0)
    given = (angles.cos(), angles.sin(), weights)
    assert_close(x @ mean_form(q, k, *given)[0] @ x.T, mean, 1e-9)
    assert mean_square(q, k, second, *given) == pytest.approx(float(square))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_collapsed_scores_are_the_mean_over_distances(family):
    model = family_model(family, dtype=torch.float64)
    made = container(model)
    cos, sin, weights = _turns(made, Calibration(TEXT))[0]
    held = read_heads(decoder_layers(model)[0].self_attn)
    width, length = held.rotary_dim, TEXT.shape[1]
    x, y = torch.randn(8, held.q.shape[-1], dtype=torch.float64).split((3, 5))
    places = made.model.rotary_emb(x, torch.arange(length).unsqueeze(0))
    rates = torch.atan2(places[1][0, 1], places[0][0, 1])[: width // 2].double()
    q, k = held.q[0, :width], held.k[0, :width]
    pairs = [(n, length - n) for n in range(length)]
    want = sum(count * _scores(q, k, x, y, n, rates) for n, count in pairs) / sum(count for _, count in pairs)
    assert_close(x @ mean_form(q.unsqueeze(0), k.unsqueeze(0), cos, sin, weights)[0] @ y.T, want, 1e-5)
    done = run(model, qk="collapsed")
    assert all(0.01 < share < 0.99 for share in done.ladder[-1].facts["kept"]), "distances are lost"
    layer = decoder_layers(done.model)[0].self_attn
    with torch.no_grad():
        a, b = layer.queries_and_keys(torch.cat([x, y]).unsqueeze(0))
    rest = (x @ held.q[0, width:].T) @ (y @ held.k[0, width:].T).T
    assert_close((a[0, 0] @ b[0, 0].T)[:3, 3:], want + rest, 1e-5)


@pytest.mark.parametrize("qk", ["symmetric", "collapsed", "cholesky"])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_what_is_made_is_saved_and_generates(qk, kv_heads, tmp_path):
    done = run(family_model("llama", kv_heads=kv_heads), qk=qk)
    rung = done.ladder[-1]
    assert not rung.exact and rung.error > 1e-3
    assert all(0 < share <= 1 for share in rung.facts["kept"])
    layers = decoder_layers(done.model)
    assert rung.facts["attention_parameters"][1] == sum(p.numel() for x in layers for p in x.self_attn.parameters())
    done.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    out = again.generate(PROBE, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(again(PROBE).logits, done.model(PROBE).logits)
        assert torch.equal(again(out[:, :-1]).logits[:, -4:].argmax(-1), out[:, -4:])
    assert ModelShape.of(again).layers == ModelShape.of(done.model).layers
    if qk == "symmetric":
        with foveate.apply(again, "dense"):
            assert torch.equal(again.generate(PROBE, max_new_tokens=4, do_sample=False, pad_token_id=0), out)


def test_without_mlp(tmp_path):
    model = family_model("llama")
    done = run(model, mlp=False)
    assert [rung.stage for rung in done.ladder[1:]] == ["symmetric queries and keys", "no MLP"]
    dropped = sum(p.numel() for layer in decoder_layers(model) for p in layer.mlp.parameters())
    assert done.ladder[1].parameters - done.ladder[2].parameters == dropped == done.ladder[2].facts["mlp_parameters"]
    done.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(PROBE).logits, done.model(PROBE).logits)


def test_bf16():
    done = run(family_model("llama", dtype=torch.bfloat16))
    assert done.model.dtype == torch.bfloat16 and done.ladder[-1].perplexity > 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadArgument, match="symmetric"):
        run(family_model("llama"), qk="separate")
    for family, words in (
        ("qwen2", "biases"),
        ("qwen3", "normalises"),
        ("gemma2", "caps"),
        ("deepseek-v3", "not plain"),
    ):
        with pytest.raises(Refused, match=f"layer 0 .*{words}"):
            run(family_model(family))
    with pytest.raises(Refused, match="already"):
        run(run(family_model("llama"), qk="collapsed").model)
