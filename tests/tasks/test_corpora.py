"""Text for haystacks: what is read, what is refused, and how it is cut in sentences."""

from __future__ import annotations

import random

import pytest

from foveate.errors import BadArgument, Refused
from foveate.tasks import TASKS, Corpus, corpora, corpus


def test_pythons_documentation_is_prose_and_enough_of_it():
    text = corpus()
    assert text is corpus(None)
    assert text.name.startswith("python-3.")
    assert len(text.text) > 500_000
    assert len(text.sentences) > 3000
    assert len(set(text.text.split("\n\n"))) == text.text.count("\n\n") + 1, "no paragraph twice"
    assert ">>>" not in text.text
    letters = sum(char.isalpha() or char == " " for char in text.text)
    assert letters > 0.92 * len(text.text)


def test_without_documentation_a_file_is_asked_for(monkeypatch):
    monkeypatch.setattr(corpora, "_documents", lambda: iter(["short"]))
    with pytest.raises(Refused, match="give a text file"):
        corpora._python_documentation.__wrapped__()


def test_a_file_is_read_whole(tmp_path):
    file = tmp_path / "story.text"
    file.write_bytes("\ufeffOnce upon a time.\r\nThere was more!\r\n\r\n \r\nThe end \x00came.\n".encode())
    read = corpus(str(file))
    assert read.text == "Once upon a time.\nThere was more!\n\nThe end came."
    assert read.sentences == ("Once upon a time.", "There was more!", "The end came.")
    assert read.name == str(file)


def test_a_folder_is_read_in_order_of_its_names(tmp_path):
    for name, text in (("b.md", "Second."), ("a.txt", "First."), ("deep/c.RST", "Third."), ("d.py", "Never = 1")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert corpus(tmp_path).text == "First.\n\nSecond.\n\nThird."


def test_a_file_is_read_again_when_it_changed(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("One sentence.")
    first = corpus(file)
    assert corpus(file) is first
    file.write_text("Another sentence, longer.")
    second = corpus(file)
    assert second.text == "Another sentence, longer."
    assert second.digest != first.digest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no text"),
        (b" \n\t 12 -- 34\n", "holds no text"),
        ("Grüße".encode("latin-1"), r"story.txt is not UTF-8 text \(byte 2\)"),
        (b"\x7fELF\x02\x01\x80\x81", "is not UTF-8 text"),
    ],
)
def test_files_without_text_are_refused(tmp_path, content, says):
    file = tmp_path / "story.txt"
    file.write_bytes(content)
    with pytest.raises(BadArgument, match=f"corpus=.*{says}"):
        corpus(file)


def test_missing_files_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(BadArgument, match=r"corpus=.*no such file or folder"):
        corpus(tmp_path / "none.txt")
    with pytest.raises(BadArgument, match=r"corpus=.*holds no \.txt, \.md, \.rst file"):
        corpus(tmp_path)


def test_sentences_are_short_and_leave_nothing_out(seed):
    rng = random.Random(seed)
    words = [
        "Table",
        "of",
        "e.g.",
        "3.14",
        "values.",
        "Ünder",
        '"Quote."',
        "end!",
        "\n\n",
        "\n",
        "why?",
        "x" * 500,
        "。",
    ]
    for _ in range(200):
        text = "A" + " ".join(rng.choices(words, k=rng.randrange(1, 60))).strip()
        cut = Corpus("made", text)
        assert all(0 < stop - start <= 400 for start, stop in cut.spans)
        assert "".join("".join(cut.sentences).split()) == "".join(text.split())
        for index, (start, stop) in enumerate(cut.spans):
            assert cut.sentence_at(start) == cut.sentence_at(stop - 1) == index


def test_sentences_end_where_sentences_end():
    cut = Corpus("made", 'He said "No." Then left. See fig. 3 of e.g. this? Yes\n\nno stop\n\n今日は。明日も。')
    assert cut.sentences == (
        'He said "No."',
        "Then left.",
        "See fig. 3 of e.g. this?",
        "Yes",
        "no stop",
        "今日は。",
        "明日も。",
    )


def test_a_users_text_becomes_the_haystack(bpe, tmp_path, seed):
    file = tmp_path / "sea.txt"
    file.write_text("The whale swam on. A boat went after it! 海は広い。 Nobody <|end|> saw the end.")
    (sample,) = TASKS["niah_single_2"].generate(bpe, 900, 1, seed, corpus(file))
    context = bpe.decode(sample.context_ids)
    assert context.count("The whale swam on.") > 5
    assert "海は広い。" in context
    assert "saw the end" not in context, "sentences that spell a special token are left out"
    assert len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens == 900


def test_scripts_without_blanks_fill_a_prompt_exactly(tokenizer, tmp_path, seed):
    rng = random.Random(seed)
    file = tmp_path / "sea.txt"
    file.write_text("".join(chr(rng.randrange(0x4E00, 0x9FA5)) + "。" * (rng.random() < 0.02) for _ in range(4000)))
    for length in (rng.randrange(2000, 3000), rng.randrange(3000, 4000)):
        (sample,) = TASKS["niah_single_2"].generate(tokenizer, length, 1, seed, corpus(file))
        assert len(sample.context_ids) + len(sample.question_ids) + sample.max_new_tokens == length


def test_a_text_of_special_tokens_alone_is_refused(bpe, tmp_path):
    file = tmp_path / "odd.txt"
    file.write_text("All of it <|end|> is odd")
    with pytest.raises(BadArgument, match=r"corpus=.*special token"):
        TASKS["niah_single_2"].generate(bpe, 900, 1, 0, corpus(file))
