"""The text that models are healed on: what is read, what is held out, and how it is cut into sequences."""

from __future__ import annotations

import itertools
import json
import os
import random
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.convert.healable import byte_tokenizer, small_text, write_documents

from foveate.convert.healing.documents import documents
from foveate.convert.healing.text import TokenText, token_text
from foveate.errors import BadArgument
from foveate.tasks import corpus

END = 1  # the EOS of both tokenizers


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))


def parts(ids: np.ndarray, starts: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(ids[a:b].tolist()) for a, b in itertools.pairwise(starts)]


# -- what is held out --------------------------------------------------------------------------------------------------


def test_held_out_documents_are_never_trained_on(tmp_path: Path, seed: int) -> None:
    """Nor any piece of them: every document here is of words of its own."""
    text = small_text(tmp_path, seed)
    tokenizer = byte_tokenizer()
    trained, held = parts(text.train, text.train_starts), parts(text.held, text.held_starts)
    assert len(trained) + len(held) == 40
    assert 1 <= len(held) <= 12
    words = {word for document in held for word in tokenizer.decode(document, skip_special_tokens=True).split()}
    for index in range(3 * text.sequences(64)):
        sequence = tokenizer.decode(text.sequence(index, 64, seed), skip_special_tokens=True)
        assert not any(word in sequence for word in words)
    kept = text.held_out(64, 10**6)
    assert (kept[:, 0] == 0).all()
    said = tokenizer.decode(kept.flatten(), skip_special_tokens=True)
    assert sum(word in said for word in words) > 0.9 * len(words) - 40


def test_copies_of_a_document_are_on_one_side(tmp_path: Path, seed: int) -> None:
    """And each is read once."""
    texts = write_documents(tmp_path / "one", seed, 40)
    for number, text in enumerate(texts):
        (tmp_path / "one" / f"copy-{number}.md").write_text(text)
    text = token_text(tmp_path / "one", byte_tokenizer(), held_out=0.2)
    trained, held = parts(text.train, text.train_starts), parts(text.held, text.held_starts)
    assert len({*trained, *held}) == len(trained) + len(held) == 40
    # The same documents, found in another order and among others, are held out again.
    texts = [*texts, *write_documents(tmp_path / "two", seed + 1, 40)]
    random.Random(seed).shuffle(texts)
    lines = tmp_path / "all.jsonl"
    lines.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    again = token_text(lines, byte_tokenizer(), held_out=0.2)
    assert set(held) <= set(parts(again.held, again.held_starts))


def test_of_few_documents_one_is_held_out(tmp_path: Path, seed: int) -> None:
    """The one whose hash is the smallest, whatever the order."""
    texts = write_documents(tmp_path / "few", seed, 3)
    text = token_text(tmp_path / "few", byte_tokenizer(), held_out=1e-9)
    assert (len(text.train_starts) - 1, len(text.held_starts) - 1) == (2, 1)
    (tmp_path / "few" / "00.txt").write_text(texts[2])
    (tmp_path / "few" / "02.txt").write_text(texts[0])
    swapped = token_text(tmp_path / "few", byte_tokenizer(), held_out=1e-9)
    assert swapped.fingerprint != text.fingerprint
    assert parts(swapped.held, swapped.held_starts) == parts(text.held, text.held_starts)


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True], ids=["bos", "no bos"])
def test_a_pass_reads_every_token_once(chat: bool, tmp_path: Path, seed: int) -> None:
    """Sequences begin with the BOS, and joined without it they are the documents, in an order of the pass's own."""
    write_documents(tmp_path / "documents", seed, 12, 20)
    text = token_text(tmp_path / "documents", byte_tokenizer(chat), held_out=0.1)
    length, head = 50, len(text.head)
    assert head == (0 if chat else 1)
    number = text.sequences(length)
    orders = []
    for turn in range(2):
        rows = [text.sequence(turn * number + index, length, seed).tolist() for index in range(number)]
        assert all(len(row) == length and tuple(row[:head]) == text.head for row in rows)
        joined: list[int] = []
        for row in rows:
            # One that begins with a document has the document's own BOS, and a token more of text for it.
            joined += row[: length - head] if not joined or joined[-1] == END else row[head:]
        ends = [place + 1 for place, token in enumerate(joined) if token == END]
        read = [tuple(joined[start:stop]) for start, stop in itertools.pairwise([0, *ends])]
        trained = parts(text.train, text.train_starts)
        assert len(set(read)) == len(read) >= len(trained) - 1  # the last one may be cut
        assert set(read) <= set(trained)
        orders.append(read)
    assert orders[0] != orders[1]
    assert text.sequence(3, length, seed).tolist() == text.sequence(3, length, seed).tolist()
    assert text.sequence(3, length, seed).tolist() != text.sequence(3, length, seed + 1).tolist()


def test_too_little_text(tmp_path: Path, seed: int) -> None:
    write_documents(tmp_path / "documents", seed, 4, 10)
    text = token_text(tmp_path / "documents", byte_tokenizer(), held_out=0.1)
    with pytest.raises(BadArgument, match=r"length=4096: documents holds \d+ tokens"):
        text.sequence(0, 4096)
    assert text.held_out(4096, 10**6).shape == (1, len(text.held))
    (tmp_path / "one.txt").write_text("A single document, which cannot be on both sides.")
    with pytest.raises(BadArgument, match=r"text='one\.txt'.*too few"):
        token_text(tmp_path / "one.txt", byte_tokenizer())
    for share in (0, 1, -0.5):
        with pytest.raises(BadArgument, match="held_out="):
            token_text(tmp_path / "one.txt", byte_tokenizer(), held_out=share)


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_tokens_are_made_once(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a file, the tokenizer or the share changes."""
    text = small_text(tmp_path, seed)
    folder = tmp_path / "documents"
    with monkeypatch.context() as patch:
        patch.setattr("foveate.convert.healing.text._write", None)
        again = token_text(folder, byte_tokenizer(), held_out=0.1)
    assert again.facts == text.facts
    assert np.array_equal(again.train, text.train)
    seen = {text.fingerprint}
    for tokenizer, share in ((byte_tokenizer(True), 0.1), (byte_tokenizer(), 0.2)):
        seen.add(token_text(folder, tokenizer, held_out=share).fingerprint)
    (folder / "00.txt").write_text("Now another text stands here.")
    seen.add(token_text(folder, byte_tokenizer(), held_out=0.1).fingerprint)
    assert len(seen) == 4


def test_what_fails_leaves_nothing(tmp_path: Path, seed: int) -> None:
    write_documents(tmp_path / "documents", seed, 5)
    (tmp_path / "documents" / "zz.txt").write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(BadArgument, match=r"zz\.txt.*not UTF-8"):
        token_text(tmp_path / "documents", byte_tokenizer())
    assert not [each for each in (tmp_path / "cache").rglob("*") if each.suffix in (".i32", ".starts")]


# -- files -------------------------------------------------------------------------------------------------------------


def test_special_tokens_are_not_spelled(tmp_path: Path, seed: int) -> None:
    write_documents(tmp_path / "documents", seed, 5)
    (tmp_path / "documents" / "a.txt").write_text("Before </s> and <s> after, in a text of its own.")
    text = token_text(tmp_path / "documents", byte_tokenizer(), held_out=0.1)
    ids = np.concatenate([text.train, text.held])
    assert (ids == 0).sum() == (ids == 1).sum() == 6


def test_a_long_file_is_many_documents(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number} " + "words " * 60 for number in range(300)]
    (tmp_path / "long.txt").write_text("\n\n".join(paragraphs))
    found = list(documents(tmp_path / "long.txt").read())
    assert len(found) > 3
    assert all(len(each) <= 20_400 for each in found)
    assert "\n\n".join(found).split("\n\n") == [
        each.rstrip() if i == 299 else each for i, each in enumerate(paragraphs)
    ]


def refused(path: Any, words: str) -> None:
    with pytest.raises(BadArgument, match=words) as error:
        list(documents(path).read())
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path: Path) -> None:
    refused(tmp_path / "absent.txt", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no .txt, .md, .rst, .jsonl file")
    for line in ("not json", '{"words": "no text"}', '{"text": 3}', "[1]"):
        (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
        refused(tmp_path / "bad.jsonl", 'line 3 is no object with a "text"')


# -- installed packages ------------------------------------------------------------------------------------------------

PROSE = "This paragraph of plain words describes at some length what the thing below is good for, and why it is there. "


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python with one package folder, empty."""
    folder = tmp_path / "python"
    folder.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: str(folder))
    return folder


def test_documentation_of_packages(python: Path) -> None:
    (python / "package").mkdir()
    (python / "package" / "module.py").write_text(
        f'"""Module. {PROSE}\n\n{PROSE[::-1]}"""\nimport os\n\nSQL = """\nSELECT secret FROM code\n"""\n\n\n'
        f'class Thing:\n    r"""Thing. {PROSE}"""\n\n    def act(self):\n        """Act."""\n        return "code"\n'
    )
    (python / "package.dist-info").mkdir()
    (python / "package.dist-info" / "README.md").write_text(f"# Package\n\nReadme. {PROSE}{PROSE}\n")
    (python / "package.dist-info" / "LICENSE.txt").write_text(f"Licence. {PROSE}{PROSE}")
    (python / "package.dist-info" / "numbers.txt").write_text("1234567890 " * 200)
    found = list(documents().read())
    assert len(found) == 2
    module = next(each for each in found if "Module." in each)
    assert "Thing. " in module
    assert "Act." in module
    assert PROSE[::-1].strip() in module
    assert not any(word in each for each in found for word in ("secret", "return", "Licence", "12345"))


def test_what_evaluations_read_is_left_out(python: Path) -> None:
    """Of a file with paragraphs of the evaluation corpus only the others remain, and a copy of a file is not read."""
    taken = [each for each in corpus().text.split("\n\n") if len(each) > 100][:3]
    own = [f"Own paragraph {number}. {PROSE}" for number in range(3)]
    mixed = "\n\n".join([*taken, *own])
    (python / "a.py").write_text(f'"""{mixed}"""\n')
    (python / "b.rst").write_text("\n\n".join(" ".join(each.split()) for each in taken))
    (python / "c.md").write_text("\n\n".join(own))
    (found,) = documents().read()
    assert [each.strip() for each in found.split("\n\n")] == [each.strip() for each in own]


def test_a_new_package_is_noticed(python: Path) -> None:
    (python / "a.py").write_text(f'"""{PROSE}{PROSE}"""\n')
    first = documents().fingerprint
    assert documents().fingerprint == first
    (python / "b.py").write_text(f'"""{PROSE}{PROSE}"""\n')
    second = documents().fingerprint
    assert second != first
    os.utime(python / "b.py", (1, 1))
    assert documents().fingerprint != second


def test_facts(tmp_path: Path, seed: int) -> None:
    text: TokenText = small_text(tmp_path, seed)
    facts = text.facts
    assert facts["name"] == "documents"
    assert facts["tokens"] == len(text.train) == text.train_starts[-1]
    assert facts["held_out_tokens"] == len(text.held) == text.held_starts[-1]
    assert json.loads(json.dumps(facts)) == facts
