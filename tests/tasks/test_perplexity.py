"""Passages for perplexity: exact lengths, running text, and the value of a record."""

from __future__ import annotations

import math
import random
import re

import pytest

from foveate.errors import BadArgument
from foveate.tasks import TASKS, corpus
from foveate.tasks.perplexity import Perplexity

TASK = TASKS["perplexity"]


def test_a_passage_and_its_continuation_are_running_text_of_the_exact_length(tokenizer, seed):
    rng = random.Random(seed)
    text = " ".join(corpus().text.split())
    for length in (128, 129, rng.randrange(200, 1000), rng.randrange(1000, 6000)):
        for sample in TASK.generate(tokenizer, length, 2, seed):
            assert len(sample.context_ids) + len(sample.target_ids) == length
            assert len(sample.target_ids) == 64
            assert (sample.question_ids, sample.references, sample.depths, sample.evidence) == ((), (), (), ())
            assert sample.max_new_tokens == 0
            ids = (sample.context_ids + sample.target_ids)[tokenizer.chat_template is None :]  # without BOS
            passage = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            whole = passage.rstrip("\ufffd")  # a tokenizer of bytes may be cut within a character
            assert len(passage) - len(whole) <= 1
            assert " ".join(whole.split()) in text


def test_a_passage_is_what_the_tokenizer_gives_for_it_and_starts_a_sentence(tokenizer, made):
    starts = tuple({" ".join(sentence.split())[:20] for sentence in corpus().sentences})
    for sample in made(TASK, tokenizer):
        ids = sample.context_ids + sample.target_ids
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token and not tokenizer.chat_template else []
        assert list(ids[: len(bos)]) == bos
        passage = tokenizer.decode(ids[len(bos) :], clean_up_tokenization_spaces=False)
        first = tokenizer(passage, add_special_tokens=False)["input_ids"][: len(ids) - 20]
        assert list(ids[len(bos) :][: len(first)]) == first
        assert " ".join(passage.split()).startswith(starts)


def test_passages_differ_and_keep_their_place(bpe, seed):
    many, few = TASK.generate(bpe, 512, 12, seed), TASK.generate(bpe, 512, 3, seed)
    assert many[:3] == few
    # Each start is drawn by itself from some thousand: two of twelve may meet now and then, four never do.
    assert len({sample.context_ids for sample in many}) >= 10


def test_the_end_of_the_corpus_is_reached_and_not_passed(bpe, tmp_path, seed):
    file = tmp_path / "counting.txt"
    file.write_text(" ".join(f"This is sentence <|end|> {number}." for number in range(400)))
    samples = TASK.generate(bpe, 512, 60, seed, corpus(file))
    assert {len(sample.context_ids) + len(sample.target_ids) for sample in samples} == {512}
    texts = [bpe.decode(sample.context_ids + sample.target_ids) for sample in samples]
    assert all(text.startswith("This is sentence") and "<|end|>" not in text for text in texts)
    last = max(int(number) for text in texts for number in re.findall(r"(\d+)\.", text))
    assert last > 300


def test_a_corpus_shorter_than_a_passage_is_refused(bpe, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("A few words only. " * 20)
    with pytest.raises(
        BadArgument, match=r"corpus=.*short.txt.*holds \d+ tokens, length=512 needs 528; give more text"
    ):
        TASK.generate(bpe, 512, 1, 0, corpus(file))


def test_the_value_is_nats_per_token(bpe, seed):
    rng = random.Random(seed)
    (sample,) = TASK.generate(bpe, 256, 1, seed)
    probabilities = [rng.uniform(0.001, 1.0) for _ in sample.target_ids]
    value = TASK.score([math.log(probability) for probability in probabilities], sample)
    assert math.exp(value) == pytest.approx(math.prod(probabilities) ** (-1 / 64))
    assert TASK.score([0.0] * 64, sample) == 0.0
    assert not TASK.higher_is_better
    assert TASK.metric == "nats per token"
    assert TASK.done("", sample)


@pytest.mark.parametrize("prediction", ["a text", [], [-1.0] * 63, [-1.0] * 65])
def test_a_prediction_that_is_not_one_number_per_target_is_refused(bpe, made, prediction):
    with pytest.raises(BadArgument, match="give 64 log-probabilities, one per target"):
        TASK.score(prediction, made(TASK, bpe)[0])


def test_the_number_of_targets_can_be_chosen(bpe, seed):
    (sample,) = Perplexity(targets=16).generate(bpe, 32, 1, seed)
    assert (len(sample.context_ids), len(sample.target_ids)) == (16, 16)


def test_lengths_below_the_least_are_refused(bpe):
    with pytest.raises(BadArgument, match="length=127: perplexity needs at least 128 tokens"):
        TASK.generate(bpe, 127, 1)
    assert TASK.minimum(bpe) == 128


def test_positions_of_one_passage_are_scored_in_turn(bpe, seed):
    task = TASKS["perplexity_positions"]
    samples = task.generate(bpe, 2048, 16, seed)
    for passage in (samples[:8], samples[8:]):
        whole = passage[0].context_ids + passage[0].target_ids
        assert len(whole) == 2048
        for turn, sample in enumerate(passage):
            assert sample.bucket == f"position {8 - turn}/8"
            ids = sample.context_ids + sample.target_ids
            assert len(ids) == 256 * (8 - turn)
            assert ids == whole[: len(ids)]
            assert len(sample.target_ids) == 64
            assert task.score([-1.0] * 64, sample) == 1.0
    assert samples[0].context_ids != samples[8].context_ids
    assert task.generate(bpe, 2048, 3, seed) == samples[:3]
    least = task.minimum(bpe)
    assert len(task.generate(bpe, least, 8, seed)[-1].context_ids) >= 64
