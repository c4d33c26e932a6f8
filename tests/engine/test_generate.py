"""generate() under every method: what it saw and chose is what plain forwards over the same tokens give.

The truth in each test is an own run: the prompt announced and forwarded, then the generated tokens one at a time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.contract.runs import (
    EXACT,
    assert_used,
    decode,
    held,
    left_padded,
    prompt,
    run,
    tokens,
)
from tests.contract.subjects import CASES, Case, applied, assert_refusal, each_method, model, precise
from torch import Tensor, nn

import foveate
from foveate.errors import Refused
from foveate.models.tiny import tiny

ENDLESS: dict[str, Any] = {
    "eos_token_id": 9999,
    "pad_token_id": 9998,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def generate(net: nn.Module, ids: Tensor, mask: Tensor | None = None, new: int = 7, **kwargs: Any) -> Any:
    with torch.no_grad():
        return net.generate(ids, attention_mask=mask, max_new_tokens=new, **ENDLESS, **kwargs)


def own_logits(net: nn.Module, handle: foveate.Handle, ids: Tensor, new: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits that led to each of the new tokens [B, n, V], by plain forwards."""
    got = run(net, handle.cache(), ids, new[:, :-1], mask)
    return torch.cat([got.prompt[:, -1:], got.steps], dim=1)


def seen_logits(out: Any) -> Tensor:
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@each_method()
def test_greedy(case: Case, family: str, seed: int) -> None:
    net = precise(case, family)
    ids, mask = left_padded([tokens(seed, 40), tokens(seed + 1, 73)])
    with applied(net, case) as handle:
        out = generate(net, ids, mask, do_sample=False)
        assert_used(net, out.past_key_values, less=case.holds_less)
        new = out.sequences[:, 73:]
        want = own_logits(net, handle, ids, new, mask)
    assert_close(seen_logits(out), want, EXACT)
    assert torch.equal(new, want.argmax(-1))


@each_method()
def test_unpadded_greedy_compresses(case: Case, seed: int) -> None:
    """transformers 5.23 drops a mask of ones before the cache is made: the prompt must be announced all the same."""
    net = model()
    ids = tokens(seed, 2, 73)
    with applied(net, case):
        results = [generate(net, ids, mask, do_sample=False) for mask in (None, torch.ones_like(ids))]
        for out in results:
            assert_used(net, out.past_key_values, less=case.holds_less)
    assert torch.equal(results[0].sequences, results[1].sequences)
    for b in (0, 1):
        assert held(results[0].past_key_values, b) == held(results[1].past_key_values, b)


@each_method()
def test_embeddings_instead_of_ids(case: Case, seed: int) -> None:
    net = model()
    ids = tokens(seed, 1, 73)
    with applied(net, case):
        want = generate(net, ids, do_sample=False)
        out = net.generate(
            inputs_embeds=net.get_input_embeddings()(ids).detach(), max_new_tokens=7, do_sample=False, **ENDLESS
        )
        assert_used(net, out.past_key_values, less=case.holds_less)
    assert torch.equal(out.sequences, want.sequences[:, 73:])
    assert held(out.past_key_values, 0) == held(want.past_key_values, 0)


@each_method()
def test_sampling_several_sequences(case: Case, seed: int) -> None:
    net = precise(case)
    ids = tokens(seed, 2, 73)
    with applied(net, case) as handle:
        torch.manual_seed(seed)
        out = generate(net, ids, do_sample=True, num_return_sequences=3)
        assert_used(net, out.past_key_values, less=case.holds_less)
        assert out.sequences.shape == (6, 80)
        want = own_logits(net, handle, ids.repeat_interleave(3, dim=0), out.sequences[:, 73:])
    assert_close(seen_logits(out), want, EXACT)
    assert len({tuple(row.tolist()) for row in out.sequences}) > 2


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@each_method()
def test_beams(case: Case, padded: bool, seed: int) -> None:
    """The score of each returned beam is the one that its own tokens get in a run of their own."""
    net = precise(case)
    ids, mask = left_padded([tokens(seed, 40 if padded else 73), tokens(seed + 1, 73)])
    with applied(net, case) as handle:
        out = generate(net, ids, mask, do_sample=False, num_beams=3, num_return_sequences=2, output_scores=True)
        assert_used(net, out.past_key_values, less=case.holds_less)
        new = out.sequences[:, 73:]
        rows = torch.arange(2).repeat_interleave(2)
        logits = own_logits(net, handle, ids[rows], new, mask[rows])
    chosen = logits.double().log_softmax(-1).gather(-1, new.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(out.sequences_scores.double(), chosen.mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@each_method()
def test_prefill_chunk_size(case: Case, padded: bool, seed: int) -> None:
    net = precise(case)
    ids, mask = left_padded([tokens(seed, 40 if padded else 73), tokens(seed + 1, 73)])
    with applied(net, case) as handle:
        out = generate(net, ids, mask, do_sample=False, prefill_chunk_size=10)
        assert_used(net, out.past_key_values, less=case.holds_less)
        cache = handle.cache()
        prompt(net, cache, ids, mask, chunk=10)
        new = out.sequences[:, 73:]
        decode(net, cache, new[:, :-1], mask)
        assert [held(out.past_key_values, b) for b in (0, 1)] == [held(cache, b) for b in (0, 1)]
        if case.cls.chunked == "exact":
            whole = generate(net, ids, mask, do_sample=False)
            assert_close(seen_logits(out), seen_logits(whole), EXACT)
            assert torch.equal(out.sequences, whole.sequences)


@pytest.mark.parametrize("again", ["all ids", "new ids"])
@each_method()
def test_several_turns_on_one_cache(case: Case, again: str, seed: int) -> None:
    """A second and a third turn on the same cache, with all ids again or the new ones alone."""
    net = precise(case)
    ids = tokens(seed, 2, 61)
    with applied(net, case) as handle:
        mine = handle.cache()
        logits = prompt(net, mine, ids)[:, -1:]
        out = generate(net, ids, do_sample=False)
        for turn in range(2):
            new = out.sequences[:, -7:]
            logits = torch.cat([logits, decode(net, mine, new[:, :-1])], dim=1)
            assert_close(seen_logits(out), logits, EXACT)
            assert [held(out.past_key_values, b) for b in (0, 1)] == [held(mine, b) for b in (0, 1)]
            assert_used(net, out.past_key_values, less=case.holds_less)
            asked = tokens(seed + 5 + turn, 2, 11)
            ids = torch.cat([ids, new, asked], dim=1)
            logits = prompt(net, mine, ids[:, -12:])[:, -1:]
            given = ids if again == "all ids" else ids[:, -12:]
            out = generate(net, given, torch.ones_like(ids), do_sample=False, past_key_values=out.past_key_values)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@each_method()
def test_pads_in_the_middle(case: Case, family: str, seed: int) -> None:
    """In a second turn rows ask with different lengths: padding stands between a row's tokens."""
    net = precise(case, family)
    first = [tokens(seed, 61), tokens(seed + 1, 30)]
    second = [tokens(seed + 2, 4), tokens(seed + 3, 12)]
    ids, mask = left_padded(first)
    more, more_mask = left_padded(second)
    then = tokens(seed + 4, 2, 4)
    with applied(net, case) as handle:
        cache = handle.cache()
        prompt(net, cache, ids, mask)
        got = prompt(net, cache, more, torch.cat([mask, more_mask], dim=1))
        steps = decode(net, cache, then, torch.cat([mask, more_mask], dim=1))
        assert_used(net, cache, less=case.holds_less)
        for b in (0, 1):
            alone = handle.cache()
            handle.binding.plan_cache(alone, ids.shape[1])
            prompt(net, alone, first[b][None])
            want = prompt(net, alone, second[b][None])
            assert_close(got[b : b + 1, -len(second[b]) :], want, EXACT)
            assert_close(steps[b : b + 1], decode(net, alone, then[b : b + 1]), EXACT)
            assert held(cache, b) == held(alone, 0)


class Widths:
    """How many tokens each forward of a model brought."""

    def __init__(self, net: nn.Module) -> None:
        self.seen: list[int] = []
        self.hook = net.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.append(kwargs["input_ids"].shape[1])

    def __enter__(self) -> list[int]:
        return self.seen

    def __exit__(self, *exc: object) -> None:
        self.hook.remove()


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@pytest.mark.parametrize("how", ["lookup", "lookup in chunks", "model"])
@each_method()
def test_assisted_decoding(case: Case, how: str, family: str, seed: int) -> None:
    """Equal to greedy wherever tokens can be taken back; refused by name elsewhere."""
    net = precise(case, family)
    ids = tokens(seed, 1, 131)
    extra: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if how == "model":
        extra = {"assistant_model": helper(family, seed, net.dtype)}
        # A draft with sliding layers fails in transformers 5.17 with a cache of transformers' own.
        foveate.apply(extra["assistant_model"], "dense")
    if how == "lookup in chunks":
        extra["prefill_chunk_size"] = 16
        if case.cls.chunked != "exact":
            return  # another prompt than the one that greedy search is compared on
    with applied(net, case) as handle:
        want = generate(net, ids, do_sample=False, new=16)
        if not handle.binding.croppable:
            with pytest.raises(Refused) as refusal:
                generate(net, ids, do_sample=False, new=16, **extra)
            assert_refusal(refusal.value)
            assert case.id in str(refusal.value)
            return
        with Widths(net) as seen:
            try:
                out = generate(net, ids, do_sample=False, new=16, **extra)
            except Refused as refusal:  # layers are held together only behind a prompt that comes alone
                assert case.cls.joint and case.id in str(refusal)
                assert_refusal(refusal)
                return
        assert any(1 < width < 8 for width in seen[1:]), "nothing was ever proposed"
        assert_used(net, out.past_key_values, less=case.holds_less)
    assert torch.equal(out.sequences, want.sequences)


def helper(family: str, seed: int, dtype: torch.dtype) -> nn.Module:
    """A draft model that is often right: the same weights, a little disturbed."""
    draft = tiny(family, layers=4 if family == "gemma3" else 3, heads=4, kv_heads=2, dtype=dtype)
    noise = torch.Generator().manual_seed(seed % 2**31)
    with torch.no_grad():
        draft.lm_head.weight += 0.02 * torch.randn(draft.lm_head.weight.shape, generator=noise).to(dtype)
    draft.generation_config.eos_token_id, draft.generation_config.pad_token_id = 9999, 9998
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


@each_method()
def test_an_assistant_with_a_compressed_cache_of_its_own(case: Case, seed: int) -> None:
    """A draft under a method proposes worse, never other tokens."""
    net = model()
    ids = tokens(seed, 1, 131)
    draft = helper("llama", seed, torch.float32)
    want = generate(net, ids, do_sample=False, new=16)
    with applied(draft, case) as handle:
        if not handle.binding.croppable or case.cls.joint:  # a draft's prompt comes with a token that may be taken back
            with pytest.raises(Refused) as refusal:
                generate(net, ids, do_sample=False, new=16, assistant_model=draft)
            assert_refusal(refusal.value)
            return
        with Widths(draft) as seen:
            out = generate(net, ids, do_sample=False, new=16, assistant_model=draft)
        assert len(seen) > 3
    assert torch.equal(out.sequences, want.sequences)


def test_a_callers_own_loop(seed: int) -> None:
    """custom_generate: a greedy loop of the user's, through the cache that generate prepared."""
    net = model()
    ids = tokens(seed, 1, 73)

    def greedy(model: Any, input_ids: Tensor, generation_config: Any = None, **kwargs: Any) -> Tensor:
        cache = kwargs["past_key_values"]
        out = model(input_ids, past_key_values=cache)
        for _ in range(7):
            input_ids = torch.cat([input_ids, out.logits[:, -1:].argmax(-1)], dim=1)
            out = model(input_ids[:, -1:], past_key_values=cache)
        assert_used(model, cache, less=True)
        return input_ids

    with torch.no_grad(), applied(net, CASES["snapkv"]):
        want = generate(net, ids, do_sample=False)
        got = net.generate(ids, custom_generate=greedy, max_new_tokens=7)
    assert torch.equal(got, want.sequences)


@each_method()
def test_without_a_cache(case: Case, seed: int) -> None:
    """use_cache=False: prompts are read as the method says, nothing is held, and nothing fails."""
    net = model()
    ids = tokens(seed, 1, 61)
    with applied(net, case) as handle, torch.no_grad():
        out = generate(net, ids, do_sample=False, use_cache=False, new=3)
        assert out.past_key_values is None
        cache = handle.cache()
        want = prompt(net, cache, ids)
        got = net(ids, use_cache=False)
        assert got.past_key_values is None
    assert_close(got.logits, want, EXACT)


def test_one_handle_several_methods(seed: int) -> None:
    """Caches of several bindings on one applied model, each generating as if its method alone were applied."""
    net = model()
    ids = tokens(seed, 1, 73)
    with applied(net, CASES["dense"]) as handle:
        for name in ("snapkv", "quest", "streaming-llm", "kivi"):
            case = CASES[name]
            cache = handle.bind(case.method()).cache()
            got = generate(net, ids, do_sample=False, past_key_values=cache)
            assert got.past_key_values is cache
            assert_used(net, cache, less=case.holds_less)
            with foveate.apply(net, case.method()):
                want = generate(net, ids, do_sample=False)
            assert torch.equal(got.sequences, want.sequences)
            assert held(cache, 0) == held(want.past_key_values, 0)
