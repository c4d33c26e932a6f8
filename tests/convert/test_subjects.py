"""What models are asked between the stages of a conversion: the same each time, and answers counted as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.evaluate.small import LENGTH, byte_tokenizer, small

from foveate.convert.decoders import needles_found
from foveate.convert.encoders import SUBJECT, cloze, vectors
from foveate.convert.subject import Asking, subject_of
from foveate.convert.transmla import TransMLA
from foveate.errors import BadArgument
from foveate.tasks import task


class Parrot:
    """Answers every prompt with what it was told to say."""

    device = torch.device("cpu")

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers, self.asked = list(answers), []

    def generate(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        self.asked.append(ids[0].tolist())
        return torch.cat([ids, torch.tensor([self.answers.pop(0)])], dim=1)


def test_needles_are_counted() -> None:
    tokenizer = byte_tokenizer()
    samples = task("niah_single_2").generate(tokenizer, LENGTH, 4, 3)
    right = [tokenizer(sample.references[0], add_special_tokens=False)["input_ids"] for sample in samples]
    wrong = tokenizer("nothing", add_special_tokens=False)["input_ids"]
    told = []
    parrot = Parrot([right[0], wrong, right[2], wrong])
    found = needles_found(parrot, tokenizer, samples, told=lambda done, number: told.append((done, number)))  # type: ignore[arg-type]
    assert found == 0.5
    assert told == [(done, 4) for done in range(5)]
    assert parrot.asked == [[*sample.context_ids, *sample.question_ids] for sample in samples]


def test_questions_are_the_same_for_every_model() -> None:
    model, tokenizer = small(layers=1)
    subject = subject_of(TransMLA)
    asked = [subject.questions(Asking(tokenizer, None, 2, LENGTH, seed), model) for seed in (5, 5, 6)]
    prompts = []
    for questions in asked:
        assert questions is not None
        parrot = Parrot([[9], [9]])
        assert questions.ask(parrot) == 0  # type: ignore[arg-type]
        prompts.append(parrot.asked)
    assert prompts[0] == prompts[1] != prompts[2]
    assert subject.questions(Asking(tokenizer, None, 0, LENGTH, 0), model) is None
    with pytest.raises(BadArgument, match=r"^--needles=-1"):
        subject.questions(Asking(tokenizer, None, -1, LENGTH, 0), model)


def test_a_sentence_is_asked_for_the_passage_that_it_was_taken_out_of() -> None:
    sentences = [f"Sentence {i} speaks of the thing {i * 7} and no other thing at all." for i in range(60)]
    pairs = cloze(" ".join(sentences), seed=1)
    assert len(pairs) == 60 // 5
    for query, passage in pairs:
        own = [each for each in sentences if each in passage]
        assert query in sentences and query not in passage and len(own) == 4
        assert min(abs(sentences.index(query) - sentences.index(each)) for each in own) == 1
    assert len({passage for _, passage in pairs}) == len(pairs)
    assert cloze(" ".join(sentences), seed=1) == pairs != cloze(" ".join(sentences), seed=2)
    assert len(cloze(" ".join(sentences), 1, most=3)) == 3
    assert cloze("Too little.", 1) == []


def test_retrieval_counts_who_is_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Sentence {i} speaks of the thing {i * 7} and no other thing." for i in range(400)))
    asking = Asking(byte_tokenizer(), str(text), None, 0, 0)
    model = encoder()
    questions = SUBJECT.questions(asking, model)
    assert questions is not None and questions.facts["passages"] >= 10
    n = questions.facts["passages"]
    sides = iter([torch.eye(n), torch.eye(n).roll(1, 0), torch.eye(n), torch.eye(n)])
    monkeypatch.setattr("foveate.convert.encoders.vectors", lambda *given: next(sides))
    assert [questions.ask(model), questions.ask(model)] == [0.0, 1.0]
    text.write_text("One sentence of a text that is by far too short for this. " * 3)
    with pytest.raises(BadArgument, match=r"--calibration=.*no passages"):
        SUBJECT.questions(asking, model)


def encoder():
    from transformers import BertConfig, BertModel

    numbers: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    return BertModel(BertConfig(vocab_size=300, max_position_embeddings=64, **numbers)).eval()


def test_vectors_do_not_depend_on_their_neighbours() -> None:
    model, tokenizer = encoder(), byte_tokenizer()
    texts = ["short", "a somewhat longer text", "x" * 500]
    together = vectors(model, tokenizer, texts, 64)
    alone = torch.cat([vectors(model, tokenizer, [each], 64) for each in texts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    ids = torch.tensor([tokenizer("short")["input_ids"]])
    with torch.no_grad():
        mean = model(ids).last_hidden_state[0].mean(0).double()
    assert torch.allclose(together[0], mean / mean.norm(), atol=1e-5)
