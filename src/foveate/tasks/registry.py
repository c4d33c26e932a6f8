"""All tasks by name, and the groups they can be asked for by."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from foveate.errors import BadArgument
from foveate.tasks.aggregation import AGGREGATION_TASKS
from foveate.tasks.babilong import BABILONG_TASKS
from foveate.tasks.base import Task
from foveate.tasks.documents import infinitebench_task, longbench_task
from foveate.tasks.grid import NEEDLE_GRID
from foveate.tasks.needles import NEEDLE_TASKS
from foveate.tasks.perplexity import PERPLEXITY_BY_POSITION, Perplexity
from foveate.tasks.questions import QUESTION_TASKS
from foveate.tasks.recall import PAIR_RECALL
from foveate.tasks.squad import hotpotqa_task, squad_task
from foveate.tasks.states import STATE_TASKS
from foveate.tasks.tracking import VARIABLE_TRACKING
from foveate.tasks.turns import TURN_TASKS

_RULER = (*NEEDLE_TASKS, VARIABLE_TRACKING, *AGGREGATION_TASKS, *QUESTION_TASKS)

TASKS: dict[str, Task] = {
    each.name: each
    for each in (
        *_RULER,
        NEEDLE_GRID,
        PAIR_RECALL,
        *TURN_TASKS,
        *BABILONG_TASKS,
        *STATE_TASKS,
        Perplexity(),
        PERPLEXITY_BY_POSITION,
    )
}

GROUPS: dict[str, tuple[str, ...]] = {
    "needles": tuple(each.name for each in NEEDLE_TASKS),
    "ruler": tuple(each.name for each in _RULER),
    "turns": tuple(each.name for each in TURN_TASKS),
    "babilong": tuple(each.name for each in BABILONG_TASKS),
    "state": tuple(each.name for each in STATE_TASKS),
    "all": tuple(TASKS),
}

READERS: dict[str, Callable[[str], Task]] = {
    "qa_1": squad_task,
    "qa_2": hotpotqa_task,
    "longbench": longbench_task,
    "infinitebench": infinitebench_task,
}
"""Tasks made of a file that the user has; they are asked for as "name:path"."""


def task(name: str) -> Task:
    """The task of that name, or of the file in "name:path".

    Raises:
        BadArgument: there is none (the message lists the names), or the file is not what the task reads.
    """
    reader, colon, path = name.partition(":")
    if colon and reader in READERS:
        return READERS[reader](path)
    if name not in TASKS:
        raise BadArgument("task", name, f"no such task; there are {', '.join([*TASKS, *_readers()])}")
    return TASKS[name]


def family(name: str) -> str:
    """The family of the task that a record names, also where its file is gone: as in `Task.family`, "perplexity" for a
    task that scores a text (its values are losses), and for a name that is no task what stands before its first
    separator."""
    base = name.partition(":")[0]
    known = TASKS.get(name) or TASKS.get(base)
    if known is not None:
        return "perplexity" if known.kind == "perplexity" else known.family
    if base in READERS:
        return "document"
    return re.split(r"[_\-/:.]", name, maxsplit=1)[0] or name


def expand_tasks(names: str | Iterable[str]) -> list[Task]:
    """Tasks and groups by name, "needles,vt" or a list of such texts, each task once and in the order given.

    Raises:
        BadArgument: a name is neither a task nor a group, or none is given; a file is not what its task reads.
    """
    texts = [names] if isinstance(names, str) else list(names)
    wanted = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    known = [*GROUPS, *TASKS, *_readers()]
    if not wanted:
        raise BadArgument("tasks", names, f"give at least one of {', '.join(known)}")
    found: dict[str, Task] = {}
    for name in wanted:
        if name not in TASKS and name not in GROUPS and name.partition(":")[0] not in READERS:
            raise BadArgument("tasks", name, f"no such task or group; there are {', '.join(known)}")
        found.update((each, task(each)) for each in GROUPS.get(name, (name,)))
    return list(found.values())


def _readers() -> list[str]:
    return [f"{name}:FILE" for name in READERS]
