"""All tasks by name, and the groups they can be asked for by."""

from __future__ import annotations

from collections.abc import Iterable

from foveate.errors import BadArgument
from foveate.tasks.base import Task
from foveate.tasks.needles import NEEDLE_TASKS
from foveate.tasks.perplexity import Perplexity
from foveate.tasks.tracking import VARIABLE_TRACKING

TASKS: dict[str, Task] = {each.name: each for each in (*NEEDLE_TASKS, VARIABLE_TRACKING, Perplexity())}

GROUPS: dict[str, tuple[str, ...]] = {
    "needles": tuple(each.name for each in NEEDLE_TASKS),
    "all": tuple(TASKS),
}


def task(name: str) -> Task:
    """The task of that name.

    Raises:
        BadArgument: there is none; the message lists the names.
    """
    if name not in TASKS:
        raise BadArgument("task", name, f"no such task; there are {', '.join(TASKS)}")
    return TASKS[name]


def expand_tasks(names: str | Iterable[str]) -> list[Task]:
    """Tasks and groups by name, "needles,vt" or a list of such texts, each task once and in the order given.

    Raises:
        BadArgument: a name is neither a task nor a group, or none is given.
    """
    texts = [names] if isinstance(names, str) else list(names)
    wanted = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if not wanted:
        raise BadArgument("tasks", names, f"give at least one of {', '.join([*GROUPS, *TASKS])}")
    found: dict[str, Task] = {}
    for name in wanted:
        if name not in TASKS and name not in GROUPS:
            raise BadArgument("tasks", name, f"no such task or group; there are {', '.join([*GROUPS, *TASKS])}")
        found.update((each, TASKS[each]) for each in GROUPS.get(name, (name,)))
    return list(found.values())
