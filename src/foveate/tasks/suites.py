"""What the data sets of LongBench and InfiniteBench ask for: how they are asked, how long answers are, how they count.

Names, answer lengths and metrics are the suites'; the wording of the prompts is our own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foveate.tasks import metrics

Metric = Callable[[str, str], float]


@dataclass(frozen=True)
class DataSet:
    """How one data set is used.

    Attributes:
        ask: the instruction behind the context; {question} is the record's own.
        reserve: tokens of an answer; half of the length at most.
        metric: (text, reference) -> 0..1; the best reference counts.
        first_line: only the first line of an answer counts.
        classes: the record lists the classes that can be answered.
        chance: score of a guess.
        chat: whether the prompt is a turn of a chat; examples and code are continued as plain text.
    """

    ask: str
    reserve: int
    metric: Metric
    first_line: bool = False
    classes: bool = False
    chance: float = 0.0
    chat: bool = True


_QUESTION = "Answer the question from the text above, as briefly as you can.\n\nQuestion: {question}\nAnswer:"
_SUMMARY = "Write a summary of the text above. {question}\nSummary:"
_SHOTS = "{question}"
_PARAGRAPH = "Which of the paragraphs above is this about? Answer like: Paragraph 1.\n\n{question}\n\nAnswer:"
_COUNT = (
    "How many different paragraphs are there above, when repeated ones count once? Answer with a number. {question}"
)
_CODE = "{question}The next line of code is:\n"
_LETTER = "{question}\n\nAnswer with the letter of the right choice alone.\nAnswer:"
_NUMBER = "{question}\nAnswer with the number alone.\nAnswer:"
_BARE = "{question}\nAnswer:"


def _qa(reserve: int) -> DataSet:
    return DataSet(_QUESTION, reserve, metrics.token_f1)


def _summary(reserve: int) -> DataSet:
    return DataSet(_SUMMARY, reserve, metrics.rouge_l)


_CLASSES = DataSet(_SHOTS, 64, metrics.token_f1, first_line=True, classes=True, chat=False)

LONGBENCH: dict[str, DataSet] = {
    **dict.fromkeys(("narrativeqa", "qasper"), _qa(128)),
    **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh"), _qa(64)),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), _qa(32)),
    "dureader": DataSet(_QUESTION, 128, metrics.rouge_l),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), _summary(512)),
    **dict.fromkeys(("trec", "lsht"), _CLASSES),
    "triviaqa": DataSet(_SHOTS, 32, metrics.token_f1, first_line=True, chat=False),
    "samsum": DataSet(_SHOTS, 128, metrics.rouge_l, first_line=True, chat=False),
    "passage_count": DataSet(_COUNT, 32, metrics.share_of_numbers),
    **dict.fromkeys(
        ("passage_retrieval_en", "passage_retrieval_zh"), DataSet(_PARAGRAPH, 32, metrics.share_of_numbers)
    ),
    **dict.fromkeys(("lcc", "repobench-p"), DataSet(_CODE, 64, metrics.code_similarity, chat=False)),
}
"""LongBench's data sets by the field `dataset` of their records."""

LONGBENCH_2 = DataSet(_LETTER, 16, metrics.choice_letter, chance=0.25)
"""LongBench v2: four choices."""

INFINITEBENCH: dict[str, DataSet] = {
    "passkey": DataSet(_NUMBER, 16, metrics.first_number),
    "number_string": DataSet(_NUMBER, 24, metrics.first_number),
    "kv_retrieval": DataSet(_BARE, 50, metrics.whole_word),
    "longbook_sum_eng": _summary(1200),
    **dict.fromkeys(("longbook_qa_eng", "longbook_qa_chn"), _qa(40)),
    "longdialogue_qa_eng": DataSet(_BARE, 40, metrics.whole_word),
    **dict.fromkeys(("longbook_choice_eng", "code_debug"), DataSet(_LETTER, 16, metrics.choice_letter, chance=0.25)),
    **dict.fromkeys(("math_find", "code_run"), DataSet(_NUMBER, 16, metrics.first_number)),
    "math_calc": DataSet(_BARE, 4096, metrics.running_values),
}
"""InfiniteBench's data sets by the name of their file."""
