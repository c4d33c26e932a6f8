"""Tasks by name."""

from __future__ import annotations

import pickle

import pytest

from foveate.errors import BadArgument
from foveate.tasks import GROUPS, TASKS, expand_tasks, family, task

NEEDLES = [
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
]

RULER = [*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2"]
BABILONG = [f"babilong_qa{number}" for number in range(1, 6)]
TURNS = ["ask_many_needles", "ask_many_pairs", "turns_needles", "turns_pairs"]
STATE = ["state_parity", "state_s3", "state_s5", "state_a5"]
LISTED = "needles, ruler, turns, babilong, state, all, niah_single_1"


def names(tasks) -> list[str]:
    return [each.name for each in tasks]


def test_every_task_is_there_by_its_name_and_says_what_it_is():
    assert list(TASKS) == [*RULER, "niah_grid", "mqar", *TURNS, *BABILONG, *STATE, "perplexity", "perplexity_positions"]
    for name, each in TASKS.items():
        assert task(name) is each
        assert each.name == name
        assert each.kind == ("perplexity" if name.startswith("perplexity") else "generate")
        assert each.higher_is_better == (not name.startswith("perplexity"))
        assert each.description
        assert each.family
        assert each.source
        assert each.chance is None or 0.0 <= each.chance < 1.0
        assert each.metric
    assert len({each.description for each in TASKS.values()}) == len(TASKS)


def test_groups_and_names_mix_and_repeat_nothing():
    assert names(expand_tasks("needles")) == NEEDLES
    assert names(expand_tasks("ruler")) == RULER
    assert len(RULER) == 13
    assert names(expand_tasks("turns")) == TURNS
    assert names(expand_tasks("babilong,state")) == [*BABILONG, *STATE]
    assert names(expand_tasks("all")) == list(TASKS)
    assert names(expand_tasks(" vt, needles ,niah_single_2,vt")) == ["vt", *NEEDLES]
    assert names(expand_tasks(["perplexity", "niah_single_1,vt"])) == ["perplexity", "niah_single_1", "vt"]
    assert not set(GROUPS) & set(TASKS)


@pytest.mark.parametrize("wanted", ["", " , ", []])
def test_no_task_at_all_is_refused(wanted):
    with pytest.raises(
        BadArgument, match=r"tasks=.*give at least one of needles, ruler, turns, babilong, state, all, niah_single_1"
    ):
        expand_tasks(wanted)


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(BadArgument, match=f"tasks='nials': no such task or group; there are {LISTED}"):
        expand_tasks("vt,nials")
    with pytest.raises(
        BadArgument, match=r"task='needles': no such task; there are niah_single_1, .*, perplexity_positions, qa_1:FILE"
    ):
        task("needles")


def test_the_family_of_a_name_in_a_record():
    assert {each.family for each in TASKS.values()} - {family(name) for name in TASKS} <= {"document"}
    names = ["niah_grid", "vt", "qa_1:gone.json", "longbench:gone.jsonl", "perplexity_positions", "own_task", "_x"]
    assert [family(name) for name in names] == ["needle", "tracing", "qa", "document", "perplexity", "own", "_x"]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_travels_to_another_process(name):
    """Sweeps hand tasks to workers that start anew, so that whatever they hold has a name."""
    assert pickle.loads(pickle.dumps(TASKS[name])) == TASKS[name]
