"""Tasks of LongBench (arXiv 2308.14508, v2: 2412.15204) and InfiniteBench (arXiv 2402.13718) from files of the user's.

A file holds one data set, a JSON object per line. What is longer than the length loses the middle of its context, as in
LongBench; what is shorter stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import BadArgument
from foveate.tasks.base import Family, Kind, Sample, check_request, sample_random
from foveate.tasks.chat import Frame, chat_turn, count_each, encode, leading_ids, without_special
from foveate.tasks.corpora import Corpus
from foveate.tasks.files import clean, read_lines, text_of
from foveate.tasks.metrics import one_class
from foveate.tasks.suites import INFINITEBENCH, LONGBENCH, LONGBENCH_2, DataSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LETTERS = "ABCD"
_LEAST_CONTEXT = 16  # tokens


@dataclass(frozen=True)
class Entry:
    """A record of a file, made equal for all suites."""

    context: str
    question: str
    references: tuple[str, ...]
    classes: tuple[str, ...] = ()
    bucket: str = ""


@dataclass(frozen=True, eq=False)
class Documents:
    """A data set of a file; samples are its records in an order that the seed decides."""

    name: str
    description: str
    source: str
    data: DataSet
    entries: tuple[Entry, ...]
    family: Family = "document"
    metric: str = "the data set's own, 0..1"
    kind: Kind = "generate"
    higher_is_better: bool = True

    @property
    def chance(self) -> float:
        """Score of a guess: of the classes, where there are some."""
        classes = len(self.entries[0].classes)
        return 1 / classes if self.data.classes and classes > 1 else self.data.chance

    def minimum(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The smallest length with room for every question, its answer and a little of its context."""
        turn = self._turn(tokenizer)
        head = len(turn.ids) + len(encode(tokenizer, turn.head).ids)
        needed = head + _LEAST_CONTEXT + max(count_each(tokenizer, [self._tail(each, turn) for each in self.entries]))
        return min(needed + self.data.reserve, 2 * needed)

    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        samples: int,
        seed: int = 0,
        corpus: Corpus | None = None,
    ) -> list[Sample]:
        """`samples` records, prompt and answer at most `length` tokens; the corpus is not used.

        Raises:
            BadArgument: the file holds fewer records, or the length is below `minimum`.
        """
        check_request(self, tokenizer, length, samples)
        if samples > len(self.entries):
            raise BadArgument("samples", samples, f"{self.name} holds {len(self.entries)}; give at most that")
        turn = self._turn(tokenizer)
        head = encode(tokenizer, turn.head).ids if turn.head else []
        reserve = min(self.data.reserve, length // 2)
        order = sample_random(self.name, 0, 0, seed).sample(range(len(self.entries)), len(self.entries))
        made = []
        for index in range(samples):
            entry = self.entries[order[index]]
            tail = encode(tokenizer, self._tail(entry, turn)).ids
            body = encode(tokenizer, without_special(tokenizer, entry.context)).ids
            room = length - reserve - len(turn.ids) - len(head) - len(tail)
            if len(body) > room:
                body = body[: room - room // 2] + body[len(body) - room // 2 :]
            made.append(
                Sample(
                    task=self.name,
                    length=length,
                    index=index,
                    seed=seed,
                    context_ids=(*turn.ids, *head, *body),
                    question_ids=tuple(tail),
                    references=entry.references,
                    depths=(),
                    evidence=(),
                    max_new_tokens=reserve,
                    choices=entry.classes,
                    bucket=entry.bucket,
                    intro=len(turn.ids) + len(head),
                )
            )
        return made

    def score(self, prediction: str | Sequence[float], sample: Sample) -> float:
        """What the data set's metric gives for the best of the references.

        Raises:
            BadArgument: the prediction is no text.
        """
        if not isinstance(prediction, str):
            raise BadArgument("prediction", type(prediction).__name__, f"{self.name} scores the generated text")
        if self.data.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        if self.data.classes:
            return max(one_class(prediction, each, sample.choices) for each in sample.references)
        return max(self.data.metric(prediction, each) for each in sample.references)

    def done(self, text: str, sample: Sample) -> bool:
        """True once the line that counts is over; other answers are read to their end."""
        return self.data.first_line and "\n" in text.lstrip("\n")

    def _turn(self, tokenizer: PreTrainedTokenizerBase) -> Frame:
        return chat_turn(tokenizer) if self.data.chat else Frame(leading_ids(tokenizer), "", "")

    def _tail(self, entry: Entry, turn: Frame) -> str:
        return f"\n\n{self.data.ask.format(question=entry.question)}{turn.tail}"


def longbench_task(path: str) -> Documents:
    """A file of LongBench (also LongBench-E) or LongBench v2.

    Raises:
        BadArgument: it is none, or holds more than one data set.
    """
    records = read_lines(path)
    if "choice_A" in records[0]:
        entries = [_four_choices(record, f"record {number}", path) for number, record in enumerate(records, start=1)]
        return _documents("longbench", "v2, four choices", "LongBench v2, arXiv 2412.15204", path, LONGBENCH_2, entries)
    names = {text_of(record, "dataset", f"record {n}", path) for n, record in enumerate(records, start=1)}
    if len(names) > 1:
        raise BadArgument("file", path, f"holds several data sets ({', '.join(sorted(names))}); give a file of one")
    name = names.pop().removesuffix("_e")
    if name not in LONGBENCH:
        raise BadArgument("file", path, f"dataset {name!r} is none of LongBench's: {', '.join(LONGBENCH)}")
    entries = [_longbench(record, f"record {n}", path) for n, record in enumerate(records, start=1)]
    if LONGBENCH[name].classes and not all(entry.classes for entry in entries):
        raise BadArgument("file", path, "the records have no list 'all_classes'; give the original file")
    return _documents("longbench", name, "LongBench, arXiv 2308.14508", path, LONGBENCH[name], entries)


def infinitebench_task(path: str) -> Documents:
    """A file of InfiniteBench; its name says which data set it is.

    Raises:
        BadArgument: it is none.
    """
    name = Path(path).stem
    if name not in INFINITEBENCH:
        raise BadArgument("file", path, f"must be named as InfiniteBench's: {', '.join(INFINITEBENCH)} (.jsonl)")
    entries = [_infinitebench(each, f"record {n}", path) for n, each in enumerate(read_lines(path), start=1)]
    return _documents("infinitebench", name, "InfiniteBench, arXiv 2402.13718", path, INFINITEBENCH[name], entries)


def _documents(suite: str, name: str, source: str, path: str, data: DataSet, entries: list[Entry]) -> Documents:
    return Documents(f"{suite}:{path}", f"{name}: documents of {source.split(',')[0]}", source, data, tuple(entries))


def _longbench(record: dict[str, Any], where: str, path: str) -> Entry:
    context, question = text_of(record, "context", where, path), text_of(record, "input", where, path)
    words = record.get("length")
    bucket = "" if not isinstance(words, int) else "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"
    classes = tuple(clean(str(each)) for each in record.get("all_classes") or ())
    return Entry(context, question, _answers(record.get("answers"), "answers", where, path), classes, bucket)


def _four_choices(record: dict[str, Any], where: str, path: str) -> Entry:
    context, question = text_of(record, "context", where, path), text_of(record, "question", where, path)
    options = [text_of(record, f"choice_{letter}", where, path) for letter in _LETTERS]
    answer = text_of(record, "answer", where, path)
    if answer not in _LETTERS or not answer:
        raise BadArgument("file", path, f"{where}: the answer is {answer!r}, not one of A, B, C, D")
    return Entry(context, _lettered(question, options), (answer,))


def _infinitebench(record: dict[str, Any], where: str, path: str) -> Entry:
    context, question = text_of(record, "context", where, path), text_of(record, "input", where, path)
    name, answer, options = Path(path).stem, record.get("answer"), record.get("options") or []
    if INFINITEBENCH[name].chance:  # four choices
        given = answer[0] if isinstance(answer, list) and answer else answer
        if not isinstance(options, list) or len(options) != 4 or (given not in options and given not in [*_LETTERS]):
            raise BadArgument("file", path, f"{where} has not four 'options' of which 'answer' is one")
        letter = _LETTERS[options.index(given)] if given in options else str(given)
        return Entry(context, _lettered(question, [clean(str(each)) for each in options]), (letter,))
    if name == "math_calc" and isinstance(answer, list):
        answer = " ".join(map(str, answer))
    return Entry(context, question, _answers(answer, "answer", where, path))


def _answers(value: Any, field: str, where: str, path: str) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [value]
    texts = tuple(clean(str(each)).strip() for each in given if isinstance(each, str | int | float))
    if not any(texts):
        raise BadArgument("file", path, f"{where} has no {field!r}; give a file with answers")
    return tuple(text for text in texts if text)


def _lettered(question: str, options: list[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=True)]
    return "\n".join([question, *lines])
