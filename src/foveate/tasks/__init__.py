"""Long-context tasks made at run time: RULER, needle grids, recall, BABILong's chains, states, perplexity; and readers
for the data files of SQuAD, HotpotQA, LongBench and InfiniteBench.

Prompts are made from Python's own documentation or a text of the user's, cut to the exact number of tokens with the
model's tokenizer, and are the same for the same seed. Wording and text are our own, so scores compare within this
library only, not with published scores. For layers that are trained on a task, `association`, `regression` and `groups`
make tensors.
"""

from __future__ import annotations

from foveate.tasks.base import Kind, Sample, Task
from foveate.tasks.corpora import Corpus, corpus
from foveate.tasks.registry import GROUPS, TASKS, expand_tasks, family, task

__all__ = ["GROUPS", "TASKS", "Corpus", "Kind", "Sample", "Task", "corpus", "expand_tasks", "family", "task"]
