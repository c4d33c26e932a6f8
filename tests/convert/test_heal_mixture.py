"""Which sequences a healing reads: shares, needle prompts, and what the teacher writes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.convert.healable import VOCABULARY, byte_tokenizer, pair, small_text, write_documents
from torch import Tensor, nn

from foveate.convert.healing.mixture import Mixture, place
from foveate.convert.healing.needle_text import NeedleText
from foveate.convert.healing.recipe import Recipe
from foveate.convert.healing.sampling import Sampler
from foveate.convert.healing.text import TokenText, token_text
from foveate.models import tiny
from foveate.tasks.needles import NEEDLE_TASKS

CPU = torch.device("cpu")
PLAIN, CHAT = byte_tokenizer(), byte_tokenizer(chat=True)
LENGTH = 1800  # bytes are many


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def text(folder: Path) -> TokenText:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEATE_CACHE", str(folder / "cache"))
        return small_text(folder, 7)


@pytest.fixture(scope="module")
def chat_text(folder: Path) -> TokenText:
    write_documents(folder / "chat", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEATE_CACHE", str(folder / "cache"))
        return token_text(folder / "chat", CHAT, held_out=0.1)


# -- shares ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("generated", "needles"), [(0.0, 0.0), (0.25, 0.1), (0.3, 0.7), (1.0, 0.0), (0.0, 0.02)])
def test_shares(generated: float, needles: float) -> None:
    """Exact over a thousand sequences, even over a hundred; each source is read in order and without gaps."""
    places = [place(number, generated, needles) for number in range(1000)]
    for source, share in (("generated", generated), ("needles", needles), ("text", 1 - generated - needles)):
        found = [each.index for each in places if each.source == source]
        assert found == list(range(round(1000 * share)))
        for start in range(0, 1000, 100):
            count = sum(each.source == source for each in places[start : start + 100])
            assert abs(count - 100 * share) <= 1 + 1e-6


def test_processes_read_different_text(text: TokenText, seed: int) -> None:
    """Together they read what one would, each sequence once."""
    teacher, _ = pair(seed)
    recipe = Recipe(length=64, batch=3, needles=0.0, seed=seed % 100)

    def rows(rank: int, processes: int, batches: int) -> list[tuple[int, ...]]:
        mixture = Mixture(text, recipe, teacher, PLAIN, rank, processes)
        made = [mixture.batch(number, CPU) for number in range(batches)]
        assert all(sources == ["text"] * 3 for _, sources in made)
        return [tuple(row.tolist()) for ids, _ in made for row in ids]

    alone = rows(0, 1, 4)
    both = rows(0, 2, 2), rows(1, 2, 2)
    assert sorted([*both[0], *both[1]]) == sorted(alone)
    assert not set(both[0]) & set(both[1])


def test_a_batch_of_all_kinds(text: TokenText, seed: int) -> None:
    teacher, _ = pair(seed)
    recipe = Recipe(length=LENGTH, batch=10, needles=0.2, generated=0.1, pool=1)
    mixture = Mixture(text, recipe, teacher, PLAIN)
    mixture._sampler = Sampler(teacher, PLAIN, text, length=LENGTH, pool=1, seed="")
    mixture._sampler._block = (0, torch.full((1, LENGTH), 77))
    ids, sources = mixture.batch(0, CPU)
    assert ids.shape == (10, LENGTH)
    assert ids.dtype == torch.long
    assert sorted(sources) == ["generated", "needles", "needles", *["text"] * 7]
    for row, source in zip(ids, sources, strict=True):
        assert (row == 77).all() == (source == "generated")
        assert ("special magic" in PLAIN.decode(row)) == (source == "needles")


# -- needles -----------------------------------------------------------------------------------------------------------


def test_needle_prompts_hold_their_answers(text: TokenText, seed: int) -> None:
    """Behind each question stands an answer, and what it names stands in the text before."""
    made = NeedleText(PLAIN, text, LENGTH, seed)
    found = 0
    for index in range(4):
        ids = made.sequence(index)
        assert len(ids) <= LENGTH
        assert ids == NeedleText(PLAIN, text, LENGTH, seed).sequence(index)
        for part in PLAIN.decode(ids).split("<s>")[1:]:
            before, asked, after = part.partition("in the text above?")
            assert asked
            answers = after.partition(" are:" if " are:" in after else " is")[2].partition(".</s>")[0].split(", ")
            assert all(f"is: {answer.strip()}." in before for answer in answers)
            found += len(answers)
    assert found >= 4
    assert made.sequence(0) != made.sequence(1)
    assert made.sequence(0) != NeedleText(PLAIN, text, LENGTH, seed + 1).sequence(0)


def test_evaluations_use_other_seeds(text: TokenText, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    for task in NEEDLE_TASKS:
        generate = task.generate

        def spy(tokenizer: Any, length: int, samples: int, seed: int, corpus: Any, generate: Any = generate) -> Any:
            seeds.append((length, seed))
            assert corpus.name == "training text"
            return generate(tokenizer, length, samples, seed, corpus)

        monkeypatch.setitem(vars(task), "generate", spy)
    for drawn in (0, 1, seed % 2**30):
        for index in range(2):
            NeedleText(PLAIN, text, LENGTH, drawn * 4096).sequence(index)
    assert len(set(seeds)) == len(seeds) >= 6
    assert all(each >= 1 << 61 for _, each in seeds)


def test_haystacks_are_training_text(text: TokenText, seed: int) -> None:
    """Nothing of a document that is held out."""
    held = PLAIN.decode(text.held, skip_special_tokens=True).split()
    said = " ".join(PLAIN.decode(NeedleText(PLAIN, text, LENGTH, seed).sequence(index)) for index in range(6))
    assert not any(word in said for word in held)


# -- what the teacher writes -------------------------------------------------------------------------------------------


class Script(nn.Module):
    """A model that answers token t with t + 1, and 99 with EOS; and reads nothing else."""

    training = False
    device = CPU

    def __init__(self, sure: float = 1e4) -> None:
        super().__init__()
        self.sure, self.fed = sure, []

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        assert input_ids.shape[1] == 1
        assert (past_key_values is None) == (not self.fed)
        self.fed.append(input_ids[:, 0])
        wanted = torch.where(input_ids == 99, 1, (input_ids + 1) % VOCABULARY)
        logits = self.sure * nn.functional.one_hot(wanted, VOCABULARY).float()
        return type("Out", (), {"logits": logits, "past_key_values": "a cache"})()


def sampler(teacher: Any, tokenizer: Any, text: TokenText, **given: Any) -> Sampler:
    return Sampler(teacher, tokenizer, text, **{"length": 400, "pool": 6, "seed": "0", **given})


def test_rows_are_prompts_and_what_the_teacher_says(chat_text: TokenText) -> None:
    """Every row is its prompts one after the other, each followed by answers up to EOS; half begin with nothing."""
    script: Any = Script()
    made = sampler(script, CHAT, chat_text, length=2500)
    rows = [made.sequence(index).tolist() for index in range(6)]
    prompts, lengths = made._prompts(random.Random("sampling/0/0"))
    for row, ids in enumerate(rows):
        at, turn = 0, 0
        while at < len(ids):
            prompt = prompts[row, turn % 8, : lengths[row, turn % 8]].tolist()
            assert ids[at : at + len(prompt)] == prompt[: len(ids) - at]
            at, turn = at + len(prompt), turn + 1
            token = prompt[-1]  # may be EOS: it stands in a prompt and ends no answer
            while at < len(ids):
                token = 1 if token == 99 else (token + 1) % VOCABULARY
                assert ids[at] == token
                at += 1
                if token == 1:
                    break
        assert turn >= 2
        assert lengths[row].tolist() == [1] * 8 or min(lengths[row].tolist()) > 20
        said = CHAT.decode(prompt)
        assert (row % 2 == 0) == ("<|start|>" not in said)
    assert torch.equal(torch.stack(script.fed)[:, 1], torch.tensor(rows[1][:-1]))


def test_blocks(text: TokenText, seed: int) -> None:
    """Rows are the same in whatever order they are asked for; blocks differ, and so do seeds."""
    teacher, _ = pair(seed)
    made = sampler(teacher, PLAIN, text, length=40, pool=3)
    rows = [made.sequence(index) for index in range(6)]
    assert all(torch.equal(made.sequence(index), rows[index]) for index in (5, 0, 4, 2))
    assert len({tuple(row.tolist()) for row in rows}) == 6
    other = sampler(teacher, PLAIN, text, length=40, pool=3, seed="1").sequence(0)
    assert not torch.equal(other, rows[0])
    assert all(int(row[0]) == 0 for row in rows)


def test_samples_are_of_the_whole_distribution(text: TokenText, seed: int) -> None:
    """At temperature 1: how often each token follows the BOS is what the teacher says, within what chance allows."""
    teacher = tiny("llama", layers=1, vocab_size=VOCABULARY, seed=seed % 100)
    with torch.no_grad():
        p = teacher(torch.zeros(1, 1, dtype=torch.long)).logits[0, -1].softmax(-1).double()
    made = sampler(teacher, PLAIN, text, length=2, pool=1000)
    drawn = torch.stack([made.sequence(index)[1] for index in range(0, 1000, 2)])  # rows without a prompt
    counts = torch.bincount(drawn, minlength=VOCABULARY).double()
    common = p > 0.005
    statistic = ((counts - 500 * p) ** 2 / (500 * p))[common].sum()
    freedom = int(common.sum())
    assert freedom > 5
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5
    assert counts[~common].sum() == pytest.approx(500 * float(p[~common].sum()), abs=5 * (500 * 0.25) ** 0.5)


def test_with_the_cache(text: TokenText, seed: int) -> None:
    """What a nearly sure teacher wrote step by step is what it says when it reads it at once: no token is misplaced."""
    teacher, _ = pair(seed)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(100)  # nearly sure of each next token
        rows = torch.stack([sampler(teacher, PLAIN, text, length=60, pool=4).sequence(index) for index in (0, 2)])
        said = teacher(rows).logits.argmax(-1)[:, :-1]
    assert (said == rows[:, 1:]).float().mean() > 0.9
