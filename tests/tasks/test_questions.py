"""Question answering: made questions, and those of SQuAD's and HotpotQA's files."""

from __future__ import annotations

import json
import random
import re

import pytest
from tests.tasks.solving import SAMPLES, check_blind, check_nothing_without_evidence, check_oracle, parts, pieces

from foveate.errors import BadArgument
from foveate.tasks import TASKS, Sample, corpus, expand_tasks, task
from foveate.tasks.invention import invent

NAME = r"([A-Z][a-z]{6})"
FACTS = {
    "world": [rf"{NAME} was born in {NAME}\."],
    "spouse": [rf"{NAME} is married to {NAME}\."],
    "vessel": [rf"{NAME} always travels on the ship {NAME}\."],
    "company": [rf"{NAME} works for {NAME}\.", rf"{NAME} has its seat in {NAME}\."],
    "teacher": [rf"{NAME} was taught by {NAME}\.", rf"{NAME} is at home in {NAME}\."],
    "portrait": [rf"{NAME} is a child of {NAME}\.", rf"{NAME} was painted by {NAME}\."],
}


def read(context: str, question: str) -> str:
    """Follows the facts from the name that is asked for."""
    asked = question.split("Question: ")[1].split("?")[0]
    name = re.findall(NAME, asked)[-1]
    for fact in next(forms for word, forms in FACTS.items() if word in asked):
        name = dict(re.findall(fact, context)).get(name, "nobody")
    return name


@pytest.fixture(scope="module", params=["qa_1", "qa_2"])
def made(request, bpe) -> tuple[str, list[Sample]]:
    seed = random.SystemRandom().randrange(1 << 40)
    return request.param, TASKS[request.param].generate(bpe, 1400, SAMPLES, seed)


def test_reading_gets_everything(made, bpe):
    name, samples = made
    check_oracle(TASKS[name], bpe, samples, read)


def test_guessing_gets_nothing(made, bpe, seed):
    name, samples = made
    check_blind(TASKS[name], bpe, samples, lambda rng, question, sample: " ".join(invent(rng, 5)), seed)
    check_nothing_without_evidence(bpe, samples, read, TASKS[name])


def test_evidence_is_the_sentences_of_the_answer(made, bpe):
    name, samples = made
    hops = 1 if name == "qa_1" else 2
    for sample in samples:
        found = pieces(bpe, sample)
        assert len(found) == hops == len(sample.depths)
        assert sum(sample.references[0] in sentence for sentence in found) == 1
        joint = " ".join(sorted(found, key=lambda sentence: sample.references[0] in sentence))
        assert read(joint, parts(bpe, sample)[1]) == sample.references[0]


def test_every_passage_says_the_same_of_others_and_the_answer_is_said_once(made, bpe):
    name, samples = made
    for sample in samples[:20]:
        context, question = parts(bpe, sample)
        passages = re.split(r"Document \d+:", context)[1:]
        assert [int(n) for n in re.findall(r"Document (\d+):", context)] == list(range(1, len(passages) + 1))
        assert len(passages) > 4
        facts = next(forms for word, forms in FACTS.items() if word in question)
        assert all(any(re.search(fact, passage) for fact in facts) for passage in passages[:-1])
        assert not any(re.search(fact, passages[-1]) for fact in facts)
        assert context.count(sample.references[0]) == 1
        if name == "qa_2":
            holders = {next(i for i, p in enumerate(passages) if piece in p) for piece in pieces(bpe, sample)}
            assert len(holders) == 2, "in two passages"


def test_passages_are_the_users_text(bpe, tmp_path, seed):
    file = tmp_path / "sea.txt"
    file.write_text("The whale swam on. A boat went after it! Nobody saw the end. Waves came, and waves went.")
    (sample,) = TASKS["qa_1"].generate(bpe, 1200, 1, seed, corpus(file))
    context = parts(bpe, sample)[0]
    assert context.count("The whale swam on.") > 5
    assert len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens == 1200


def test_any_answer_counts(bpe, seed):
    (sample,) = TASKS["qa_1"].generate(bpe, 1400, 1, seed)
    answer = sample.references[0]
    score, done = TASKS["qa_1"].score, TASKS["qa_1"].done
    assert score(f"It is {answer.upper()}\x07!", sample) == 1.0
    assert score(answer[:-1], sample) == 0.0
    assert done(f"no: {answer}", sample)
    assert not done(answer[:-1], sample)
    assert sample.max_new_tokens >= 32


# -- files -------------------------------------------------------------------------------------------------------------

KINGDOMS = ["Arda", "Borea", "Calda", "Delia", "Evora", "Falun", "Gotha", "Halle"]


def squad(tmp_path):
    """A file of the form of SQuAD 2.0: two articles, one question that has no answer."""
    articles = []
    for title in ("Kings", "Towns"):
        paragraphs = []
        for number, land in enumerate(KINGDOMS):
            text = f"{title} have a story. In {land} the {title} number {number + 1:,}00. " + f"More of {land}. " * 12
            answer = f"{number + 1:,}00"
            paragraphs.append(
                {
                    "context": text,
                    "qas": [
                        {
                            "question": f"How many {title} has {land}?",
                            "answers": [
                                {"text": answer, "answer_start": text.index(answer)},
                                {"text": f"the {title} number {answer}", "answer_start": text.index(f"the {title}")},
                            ],
                        },
                        {"question": f"Why {land}?", "answers": [], "is_impossible": True},
                    ],
                }
            )
        articles.append({"title": title, "paragraphs": paragraphs})
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return file


def hotpot(tmp_path):
    """A file of the form of HotpotQA: questions over two of four titled paragraphs."""
    entries = []
    for land, other in zip(KINGDOMS[::2], KINGDOMS[1::2], strict=True):
        context = [
            [f"Page {each}", [f"{each} is a land.", f" {each} is ruled by Queen {each}ne."]] for each in (land, other)
        ]
        context += [[f"River {each}", [f"A river of {each}.", " It is long."]] for each in (land, other)]
        entries.append(
            {
                "_id": land,
                "question": f"Who rules {land} and {other}?",
                "answer": f"Queens {land}ne and {other}ne",
                "supporting_facts": [[f"Page {land}", 1], [f"Page {other}", 1]],
                "context": context,
            }
        )
    file = tmp_path / "hotpot.json"
    file.write_text(json.dumps(entries))
    return file


def test_squad_is_read(bpe, tmp_path, seed):
    (each,) = expand_tasks(f"qa_1:{squad(tmp_path)}")
    assert each.name == f"qa_1:{tmp_path / 'squad.json'}"
    assert (each.family, each.kind, each.chance) == ("qa", "generate", 0.0)
    samples = each.generate(bpe, 1100, 30, seed)
    asked = set()
    for sample in samples:
        context, question = parts(bpe, sample)
        title, land = re.search(r"How many (\w+) has (\w+)\?", question).groups()  # pyright: ignore[reportOptionalMemberAccess]
        asked.add((title, land))
        (piece,) = pieces(bpe, sample)
        assert piece == f"In {land} the {title} number {sample.references[0]}."
        assert sample.references[1] == f"the {title} number {sample.references[0]}"
        first = re.findall(r"Document \d+:\n(\w+) have a story", context)
        near = [each == title for each in first]
        assert near.count(False) == 0 or near.count(True) == len(KINGDOMS), "the same article is used first"
        assert len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens == 1100
        assert each.score(f"so {sample.references[0]}", sample) == each.score(sample.references[1], sample) == 1.0
    assert len(asked) > 5
    assert each.generate(bpe, 1100, 3, seed) == samples[:3]


def test_hotpotqa_is_read(bpe, tmp_path, seed):
    each = task(f"qa_2:{hotpot(tmp_path)}")
    for sample in each.generate(bpe, 600, 20, seed):
        context, question = parts(bpe, sample)
        lands = re.search(r"Who rules (\w+) and (\w+)\?", question).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert set(pieces(bpe, sample)) == {f"{land} is ruled by Queen {land}ne." for land in lands}
        assert len(pieces(bpe, sample)) == 2
        assert sample.references == (f"Queens {lands[0]}ne and {lands[1]}ne",)
        assert f"River {lands[0]}\nA river of" in context


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("qa_1", "{", "is not JSON"),
        ("qa_1", "[]", "is no SQuAD file: it must hold an object with a list 'data'"),
        ("qa_1", '{"data": [{"title": "x"}]}', "article 'x' has no list 'paragraphs'"),
        (
            "qa_1",
            '{"data": [{"title": "x", "paragraphs": [{"qas": []}]}]}',
            "article 'x' has no text 'context', only qas",
        ),
        ("qa_1", '{"data": []}', "holds no question that has an answer"),
        ("qa_2", '{"data": []}', "is no HotpotQA file: it must hold a list of questions"),
        ("qa_2", '[{"question": "x?"}]', "question 1 has no text 'answer', only question"),
        ("qa_2", '[{"question": "x?", "answer": "y"}]', "question 1 has no lists 'context'"),
    ],
)
def test_other_files_are_refused_when_they_are_named(tmp_path, name, content, says):
    file = tmp_path / "data.json"
    file.write_text(content)
    with pytest.raises(BadArgument, match=rf"file=.*data.json.*{re.escape(says)}"):
        expand_tasks(f"{name}:{file}")


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(BadArgument, match=r"file=.*none.json.*cannot be read \(No such file or directory\)"):
        task(f"qa_1:{tmp_path / 'none.json'}")


def test_a_file_of_too_few_passages_is_refused(bpe, tmp_path):
    each = task(f"qa_2:{hotpot(tmp_path)}")
    with pytest.raises(BadArgument, match=r"passages=.*hotpot.json.*holds 16 passages, too few for length=4000"):
        each.generate(bpe, 4000, 1)


def test_a_file_that_changed_is_read_again(bpe, tmp_path):
    file = squad(tmp_path)
    assert task(f"qa_1:{file}").generate(bpe, 1100, 1)
    file.write_text('{"data": []}')
    with pytest.raises(BadArgument, match="no question"):
        task(f"qa_1:{file}")
