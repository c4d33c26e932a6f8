"""The questions of RULER's qa_1 and qa_2 from the original files, where the user has them: SQuAD and HotpotQA."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from foveate.errors import BadArgument
from foveate.tasks.chat import without_special
from foveate.tasks.corpora import Corpus
from foveate.tasks.files import clean, read_json, sentences_of, stamp, text_of
from foveate.tasks.generation import GenerationTask, Request
from foveate.tasks.haystack import Haystack
from foveate.tasks.questions import Asked, Passage, reading_task


@dataclass(frozen=True)
class Question:
    """A question of a file, and the numbers of its passages.

    Attributes:
        gold: (passage, characters of the evidence) of those that hold the answer.
        near: passages that are used first to hide them among.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    near: tuple[int, ...]


@dataclass
class Library:
    """The passages of a file, each once, and the questions on them."""

    passages: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> int:
        """The number of a passage; new texts are added."""
        number = self.numbers.setdefault(text, len(self.passages))
        if number == len(self.passages):
            self.passages.append(text)
        return number


def squad_task(path: str) -> GenerationTask:
    """RULER's qa_1: a SQuAD file (version 1.1 or 2.0), questions without an answer left out."""
    return _task("qa_1", "a question of SQuAD on one of many paragraphs", path, "squad")


def hotpotqa_task(path: str) -> GenerationTask:
    """RULER's qa_2: a HotpotQA file with its distractors."""
    return _task("qa_2", "a question of HotpotQA on two of many paragraphs together", path, "hotpotqa")


def _task(name: str, description: str, path: str, form: str) -> GenerationTask:
    questions = FromFile(path, form)
    questions.library()  # a wrong file is refused when it is named
    return reading_task(f"{name}:{path}", description, questions)


@dataclass(frozen=True)
class FromFile:
    """Questions of a SQuAD file ("squad") or of a HotpotQA file ("hotpotqa").

    The other passages are those of the same article (SQuAD) or of the same question (HotpotQA), then any.
    """

    path: str
    form: str

    @property
    def name(self) -> str:
        """The file."""
        return self.path

    def library(self) -> Library:
        """What the file holds.

        Raises:
            BadArgument: it is no such file.
        """
        return _open(self.path, self.form, stamp(self.path))

    def ask(self, request: Request) -> Asked:
        """A question of the file."""
        library, rng, tokenizer = self.library(), request.rng, request.tokenizer
        question = rng.choice(library.questions)
        gold = [number for number, _ in question.gold]
        near = [number for number in question.near if number not in gold]
        used = {*gold, *near}
        far = [number for number in range(len(library.passages)) if number not in used]
        rng.shuffle(far)
        if request.length:  # no more than the prompt can hold
            far = far[: request.length // 8]
        return Asked(
            without_special(tokenizer, question.text),
            question.answers,
            tuple(_marked(tokenizer, library.passages[number], marks) for number, marks in question.gold),
            tuple(Passage(without_special(tokenizer, library.passages[number])) for number in [*near, *far]),
        )

    def rest(self, request: Request) -> Haystack:
        """Sentences of random passages."""
        passages = self.library().passages
        start = request.rng.randrange(len(passages))
        some = [passages[(start + step) % len(passages)] for step in range(min(len(passages), 50))]
        return sentences_of(list(Corpus(self.path, "\n\n".join(some)).sentences), request.tokenizer)


def _marked(tokenizer: Any, text: str, marks: tuple[tuple[int, int], ...]) -> Passage:
    """The passage; a text that spells special tokens loses them, and is evidence as a whole."""
    kept = without_special(tokenizer, text)
    return Passage(kept, marks if kept == text and marks else ((0, len(kept)),))


@functools.lru_cache(maxsize=4)
def _open(path: str, form: str, changed: tuple[int, int]) -> Library:
    data = read_json(path)
    library = _squad(path, data) if form == "squad" else _hotpotqa(path, data)
    if not library.questions:
        raise BadArgument("file", path, "holds no question that has an answer; give another file")
    return library


def _squad(path: str, data: Any) -> Library:
    articles = data.get("data") if isinstance(data, dict) else None
    if not isinstance(articles, list):
        raise BadArgument("file", path, "is no SQuAD file: it must hold an object with a list 'data'")
    library = Library()
    for article in articles:
        where = f"article {article.get('title', '?')!r}" if isinstance(article, dict) else "an article"
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            raise BadArgument("file", path, f"is no SQuAD file: {where} has no list 'paragraphs'")
        texts = [text_of(each, "context", where, path) for each in paragraphs]
        numbers = [library.add(text.strip()) for text in texts]
        near = tuple(dict.fromkeys(numbers))
        for paragraph, number, text in zip(paragraphs, numbers, texts, strict=True):
            for entry in paragraph.get("qas", []):
                if entry.get("is_impossible") or not entry.get("answers"):
                    continue
                answers = dict.fromkeys(text_of(each, "text", where, path).strip() for each in entry["answers"])
                marks = _sentence(text.strip(), next(iter(answers)), entry["answers"][0].get("answer_start", 0))
                asked = text_of(entry, "question", where, path).strip()
                kept = tuple(answer for answer in answers if answer)
                if kept and asked:
                    library.questions.append(Question(asked, kept, ((number, marks),), near))
    return library


def _sentence(text: str, answer: str, near: Any) -> tuple[tuple[int, int], ...]:
    """The sentences that hold the occurrence of the answer at `near`, or its first one."""
    start = near if isinstance(near, int) and text.startswith(answer, near) else text.find(answer)
    if start < 0:
        return ()
    cut = Corpus("", text)
    first, last = cut.sentence_at(start), cut.sentence_at(start + max(1, len(answer)) - 1)
    begin, end = cut.spans[first][0], cut.spans[last][1]
    return ((begin, begin + len(text[begin:end].rstrip())),)


def _hotpotqa(path: str, data: Any) -> Library:
    if not isinstance(data, list):
        raise BadArgument("file", path, "is no HotpotQA file: it must hold a list of questions")
    library = Library()
    for place, entry in enumerate(data, start=1):
        where = f"question {place}"
        asked, answer = (text_of(entry, name, where, path).strip() for name in ("question", "answer"))
        try:
            supports = {(str(title), int(number)) for title, number in entry.get("supporting_facts", [])}
            titled = [(str(title), [clean(str(each)) for each in sentences]) for title, sentences in entry["context"]]
        except (KeyError, TypeError, ValueError):
            mend = f"is no HotpotQA file: {where} has no lists 'context' and 'supporting_facts' of (title, ...) pairs"
            raise BadArgument("file", path, mend) from None
        gold: list[tuple[int, tuple[tuple[int, int], ...]]] = []
        near: list[int] = []
        for title, sentences in titled:
            text, marks = f"{clean(title).strip()}\n", []
            for number, sentence in enumerate(sentences):
                start = len(text) + len(sentence) - len(sentence.lstrip())
                text += sentence
                if (title, number) in supports:
                    marks.append((start, len(text.rstrip())))
            number = library.add(text.strip())
            near.append(number)
            if marks:
                gold.append((number, tuple(marks)))
        if gold and asked and answer:
            library.questions.append(Question(asked, (answer,), tuple(gold), tuple(near)))
    return library
