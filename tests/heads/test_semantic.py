"""Semantic retrieval scores and compression errors, against slow loops over the model's own attention maps."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from tests.closeness import assert_close
from tests.heads.words import WordTokenizer
from torch import Tensor

from foveate.errors import Refused
from foveate.heads import semantic
from foveate.heads.passkeys import Example, Recall, passkey_examples, running_examples
from foveate.heads.semantic import compression_errors, semantic_scores
from foveate.models import ModelShape, tiny
from foveate.tasks.corpora import Corpus

ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
FILLER = Corpus("numbers", " ".join(f"Sentence {i} says nothing of interest. " for i in range(400)))


def text(seed: int, length: int, needle: tuple[int, int], answers: int) -> Example:
    """Random ids whose end is a copy of the needle's last tokens."""
    ids = torch.randint(5, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids[-answers:] = ids[needle[1] - answers : needle[1]]
    ids[needle[0]] = ids[needle[1] - 1]  # one answer token stands in two places of the needle
    return Example(tuple(ids), length - answers, (Recall(needle, (length - answers, length)),))


def maps(model: Any, example: Example) -> list[Tensor]:
    """Attention [H, N, N] of every layer, by transformers."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(torch.tensor([example.ids]), output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation("sdpa")
    return [x[0] for x in out.attentions]


def all_right(monkeypatch: pytest.MonkeyPatch, model: Any, wrong: set[int] = frozenset()) -> None:
    """Make the model guess the next token of any text, except in front of the places in `wrong`."""
    forward = type(model).forward

    def knowing(self: Any, ids: Tensor, **kwargs: Any) -> Any:
        out = forward(self, ids, **kwargs)
        out.logits = torch.nn.functional.one_hot(ids.roll(-1, 1), 256).float()
        for place in wrong:
            out.logits[0, place - 1] = 0.0
        return out

    monkeypatch.setattr(type(model), "forward", knowing)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
def test_scores_are_the_mass_on_the_whole_sentence(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per place of the sentence that holds the answer's token, whether or not the largest weight is there."""
    model = tiny(family, heads=4, kv_heads=2)
    examples = [text(seed, 47 + seed, (7, 16), 5) for seed in (1, 2)]
    want = {layer.index: torch.zeros(4) for layer in ModelShape.of(model).layers if layer.kind == "full"}
    for example in examples:
        for index, attention in enumerate(maps(model, example)):
            if index in want:
                for t in range(example.labels, len(example.ids)):
                    for place in range(7, 16):
                        if example.ids[place] == example.ids[t]:
                            want[index] += attention[:, t - 1, 7:16].sum(-1)
    all_right(monkeypatch, model)
    scores, right, asked = semantic_scores(model, examples)
    assert (right, asked) == (2, 2)
    assert [row is not None for row in scores] == [i in want for i in range(len(scores))]
    for index, row in want.items():
        assert_close(torch.tensor(scores[index]), row / 2, 1e-4)


def test_answers_that_are_mostly_wrong_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than half of an answer's tokens must be right; a head is scored on what was retrieved."""
    model, first, second = tiny("llama", heads=4, kv_heads=2), text(1, 47, (7, 16), 4), text(2, 48, (7, 16), 4)
    all_right(monkeypatch, model)
    alone, _, _ = semantic_scores(model, [second])
    monkeypatch.undo()
    all_right(monkeypatch, model, wrong={43, 44})  # two of four in the first text, one of four in the second
    scores, right, asked = semantic_scores(model, [first, second])
    assert (right, asked) == (1, 2)
    assert scores == alone
    monkeypatch.undo()
    with pytest.raises(Refused, match="none of 1 answers"):
        semantic_scores(model, [first])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
def test_errors_are_the_change_of_the_projected_output(heads: int, kv_heads: int) -> None:
    """The layer holds the best of its voters' window and the window; what is generated is added to both."""
    model = tiny("llama", layers=2, heads=heads, kv_heads=kv_heads)
    example = text(3, 61, (7, 16), 5)
    voters = {0: (1, 3), 1: (0, 2)}
    want = {}
    attentions = maps(model, example)
    with torch.no_grad():
        states = model(torch.tensor([example.ids]), output_hidden_states=True, use_cache=False).hidden_states
    for index, attention in enumerate(attentions):
        block = model.model.layers[index]
        normed = block.input_layernorm(states[index])
        v = block.self_attn.v_proj(normed)[0].unflatten(-1, (kv_heads, -1)).transpose(0, 1)
        v = v.repeat_interleave(heads // kv_heads, 0)
        start, first = 56, 52
        mass = attention[list(voters[index]), first:start].sum(1)[:, :first]
        mean = torch.nn.functional.pad(mass, (1, 1)).unfold(-1, 3, 1).mean(-1).mean(0)
        held = torch.zeros(61, dtype=torch.bool)
        held[mean.topk(6).indices] = True
        held[first:] = True
        few = attention[:, start:] * held
        few = few / few.sum(-1, keepdim=True)

        def out(weights: Tensor, v: Tensor = v, block: Any = block) -> Tensor:
            return block.self_attn.o_proj((weights @ v).transpose(0, 1).flatten(1))

        whole, part = out(attention[:, start:]), out(few)
        want[index] = float(((part - whole).detach().norm(dim=-1) / (whole.detach().norm(dim=-1) + 1e-5)).sum())
    got = compression_errors(model, [example], voters, chosen=6, window=4, kernel=3)
    for index, error in want.items():
        assert got[index] == pytest.approx(error / sum(want.values()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_holding_everything_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = tiny(family, heads=4, kv_heads=2), text(3, 61, (7, 16), 5)
    seen = []
    original = semantic._compressed

    def compressed(layer: Any, *args: Any) -> Tensor:
        seen.append((original(layer, *args), layer.attend()[:, :, 56:]))
        return seen[-1][0]

    monkeypatch.setattr(semantic, "_compressed", compressed)
    compression_errors(model, [example], {0: (0,), 1: (1,), 2: (2,)}, chosen=56, window=4)
    assert len(seen) == 3
    for few, whole in seen:
        assert_close(few, whole, 1e-5)


@pytest.mark.parametrize("length", [150, 300, 900])
def test_recalls_point_at_sentence_and_answer(length: int) -> None:
    tokenizer = WordTokenizer(vocab=1 << 30, bos=True)
    for example in islice(passkey_examples(tokenizer, (length,), 3, FILLER), 3):
        assert example.recalls
        for number, recall in enumerate(example.recalls):
            needle, answer = example.ids[slice(*recall.needle)], example.ids[slice(*recall.answer)]
            assert needle[1:3] == tuple(tokenizer(f"The {ORDINALS[number]}", False)["input_ids"])
            assert needle[-len(answer) - 2 : -2] == answer
            assert example.labels < recall.answer[0] < recall.answer[1] < length
            assert recall.needle[1] <= example.labels
        assert example.ids[example.recalls[-1].answer[1] :] == tuple(tokenizer(".\n", False)["input_ids"])


def test_running_text_has_no_question() -> None:
    tokenizer = WordTokenizer(vocab=1 << 30, bos=True)
    for example in islice(running_examples(tokenizer, (100, 1000), 3, FILLER), 4):
        assert len(example.ids) in (100, 1000)
        assert example.labels == (88 if len(example.ids) == 100 else 936)
        assert example.recalls == ()
        assert example.ids[0] == 1
