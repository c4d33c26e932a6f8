"""Records survive what ends a run: Ctrl-C, kill -9 in the middle of a line, a full disk, other settings."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from foveate.errors import BadArgument, FoveateError
from foveate.evaluate import record as record_module
from foveate.evaluate.record import MANIFEST, RECORDS, Cell, Log, Record, read, read_manifest, write_atomically


def a_cell(**changes: object) -> Cell:
    base = Cell("tiny", "snapkv", {"window": 32, "kernel": [3, 5]}, "0.25", 1024, "niah_single_1", 0, True)
    return replace(base, **changes)


def a_record(i: int = 0, samples: int = 3) -> Record:
    rng = random.Random(i)
    scores = [rng.random() for _ in range(samples)]
    outcomes = [
        {"index": j, "depths": [0.5], "prediction": f'{i} "ß"\n\u2028', "score": s} for j, s in enumerate(scores)
    ]
    return Record(
        cell=a_cell(seed=i),
        scores=scores,
        outcomes=outcomes,
        kv_bytes=rng.randrange(10**6),
        kv_bytes_dense=10**6,
        decode_ms=rng.random(),
        versions={"torch": "2"},
    )


# Records need neither torch nor transformers; without the packages' own imports these processes start at once.
BARE = """
import sys, types
for name, folder in (("foveate", sys.argv.pop()), ("foveate.evaluate", None)):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [folder or sys.modules["foveate"].__path__[0] + "/evaluate"]
"""


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    folder = str(Path(record_module.__file__).parents[1])
    command = [sys.executable, "-c", BARE + code, *arguments, folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_record_equals_itself_after_a_round_trip():
    for i in range(20):
        record = a_record(i, samples=1 + i)
        assert Record.from_json(record.to_json()) == record
    refused = Record(cell=a_cell(budget=None), status="refused", refused="not below 0.29 at 1024 tokens", floor=0.29)
    assert Record.from_json(refused.to_json()) == refused


def test_tuples_in_settings_are_the_lists_they_come_back_as():
    cell = a_cell(settings={"layers": (0, 1)})
    assert cell.settings == {"layers": [0, 1]}
    assert cell.key() == a_cell(settings={"layers": [0, 1]}).key()


def test_key_tells_every_field_apart_and_ignores_the_order_of_settings():
    changes = {
        "model": "other",
        "method": "h2o",
        "settings": {"window": 33, "kernel": [3, 5]},
        "budget": None,
        "length": 1025,
        "task": "vt",
        "seed": 1,
        "question_seen": False,
    }
    keys = {a_cell().key()} | {a_cell(**{name: value}).key() for name, value in changes.items()}
    assert len(keys) == len(changes) + 1
    assert a_cell(settings={"kernel": [3, 5], "window": 32}).key() == a_cell().key()


def test_key_is_the_same_in_another_process():
    code = (
        "from foveate.evaluate.record import Cell\n"
        "print(Cell('tiny', 'snapkv', {'kernel': [3, 5], 'window': 32}, '0.25', 1024, 'niah_single_1', 0, True).key())"
    )
    out, error = run_python(code).communicate()
    assert out.strip() == a_cell().key(), error


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"scores": []}, "scores"),
        ({"scores": [0.1, float("nan"), 0.3]}, "scores"),
        ({"outcomes": [{}]}, "outcomes"),
        ({"outcomes": [{"x": float("inf")}, {}, {}]}, "outcomes"),
        ({"outcomes": [{"x": object()}, {}, {}]}, "outcomes"),
        ({"status": "maybe"}, "status"),
        ({"status": "refused"}, "refused"),
        ({"status": "refused", "refused": "not below 0.3"}, "scores"),
        ({"refused": "a reason"}, "refused"),
        ({"kv_bytes_dense": 0}, "kv_bytes, kv_bytes_dense"),
        ({"decode_ms": float("inf")}, "decode_ms"),
        ({"floor": float("nan")}, "floor"),
    ],
)
def test_a_record_that_says_nonsense_is_refused_by_name(changes: dict[str, object], argument: str):
    with pytest.raises(BadArgument) as caught:
        replace(a_record(), **changes)
    assert caught.value.argument == argument


def test_a_log_gives_back_what_was_appended(tmp_path: Path):
    records = [a_record(i) for i in range(5)]
    with Log(tmp_path / "deep" / "run") as log:
        for record in records:
            log.append(record)
        assert log.done() == {r.cell.key(): r for r in records}
    assert (tmp_path / "deep" / "run" / RECORDS).read_text().count("\n") == 5
    with Log(tmp_path / "deep" / "run" / RECORDS) as log:
        assert log.done() == {r.cell.key(): r for r in records}


def test_the_last_record_of_a_cell_counts(tmp_path: Path):
    first, second = a_record(1), replace(a_record(1), kv_bytes=77)
    with Log(tmp_path) as log:
        log.append(first)
        log.append(second)
    with Log(tmp_path) as log:
        assert [r.kv_bytes for r in log.done().values()] == [77]
    assert [r.kv_bytes for r in read(tmp_path)] == [77]


def test_a_line_torn_anywhere_is_dropped_and_its_cell_run_again(tmp_path: Path):
    file = tmp_path / RECORDS
    with Log(tmp_path) as log:
        log.append(a_record(0))
    whole = file.read_bytes()
    last = a_record(1).to_json().encode()
    for cut in [*range(1, len(last), 7), len(last) - 1]:
        file.write_bytes(whole + last[:cut])
        assert [r.cell.seed for r in read(tmp_path)] == [0]
        assert file.read_bytes() == whole + last[:cut], "reading must not repair"
        with Log(tmp_path) as log:
            assert log.dropped == cut
            assert list(log.done()) == [a_record(0).cell.key()]
            log.append(a_record(2))
        assert [Record.from_json(line).cell.seed for line in file.read_text().splitlines()] == [0, 2]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path):
    file = tmp_path / RECORDS
    file.write_bytes(a_record(0).to_json().encode())
    with Log(tmp_path) as log:
        assert log.dropped == 0
        assert list(log.done()) == [a_record(0).cell.key()]
        log.append(a_record(1))
    assert [r.cell.seed for r in read(tmp_path)] == [0, 1]


@pytest.mark.parametrize("bad", ["nonsense", "[1]", '{"schema":99}', '{"schema":1,"cell":{}}', "\x00\x00", ""])
def test_a_bad_line_in_the_middle_is_named_and_nothing_is_changed(tmp_path: Path, bad: str):
    file = tmp_path / RECORDS
    text = f"{a_record(0).to_json()}\n{bad}\n{a_record(1).to_json()}\n"
    file.write_text(text)
    with pytest.raises(BadArgument, match="line 2 is not a record"):
        Log(tmp_path)
    with pytest.raises(BadArgument, match="line 2 is not a record"):
        read(tmp_path)
    assert file.read_text() == text


def test_reading_what_is_not_there_names_the_path(tmp_path: Path):
    with pytest.raises(BadArgument, match="nowhere"):
        read(tmp_path / "nowhere")


def test_several_runs_are_read_as_one(tmp_path: Path):
    for name, seeds in (("a", (0, 1)), ("b", (1, 2))):
        with Log(tmp_path / name) as log:
            for seed in seeds:
                log.append(a_record(seed))
    assert sorted(r.cell.seed for r in read(tmp_path / "a", tmp_path / "b" / RECORDS)) == [0, 1, 2]


def test_a_run_is_resumed_only_with_its_own_settings(tmp_path: Path):
    with Log(tmp_path, {"samples": 20, "dtype": "float32"}, "foveate compare m") as log:
        log.append(a_record(0))
    assert read_manifest(tmp_path)["settings"] == {"samples": 20, "dtype": "float32"}
    assert read_manifest(tmp_path / RECORDS)["command"] == "foveate compare m"
    with Log(tmp_path, {"dtype": "float32", "samples": 20}) as log:
        assert len(log.done()) == 1
    with pytest.raises(BadArgument, match=r"samples=30: the run in .* has 20; give that, or use another folder"):
        Log(tmp_path, {"samples": 30, "dtype": "float32"})
    with pytest.raises(BadArgument, match="dtype=None"):
        Log(tmp_path, {"samples": 20})
    with Log(tmp_path) as log:  # the refusals above let go of the file
        assert len(log.done()) == 1


def test_records_without_a_manifest_are_not_resumed_under_settings(tmp_path: Path):
    with Log(tmp_path) as log:
        log.append(a_record(0))
    with pytest.raises(BadArgument, match=MANIFEST):
        Log(tmp_path, {"samples": 20})


def test_a_broken_manifest_is_named(tmp_path: Path):
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(BadArgument, match="not a run manifest"):
        Log(tmp_path, {"samples": 20})


@pytest.mark.skipif(sys.platform == "win32", reason="locks are taken on POSIX systems")
def test_a_second_writer_is_refused(tmp_path: Path):
    with Log(tmp_path), pytest.raises(FoveateError, match="another run is writing"):
        Log(tmp_path)
    Log(tmp_path).close()


def test_what_was_appended_survives_kill_9(tmp_path: Path):
    code = (
        "import sys\n"
        "from dataclasses import replace\n"
        "from foveate.evaluate.record import Log, Record\n"
        "base = Record.from_json(sys.argv[2])\n"
        "with Log(sys.argv[1]) as log:\n"
        "    for seed in range(10**6):\n"
        "        log.append(replace(base, cell=replace(base.cell, seed=seed)))\n"
        "        print(seed, flush=True)\n"
    )
    process = run_python(code, str(tmp_path), a_record(0, samples=200).to_json())
    assert process.stdout is not None
    seen = -1
    for line in process.stdout:
        seen = int(line)
        if seen >= 5:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with Log(tmp_path) as log:
        seeds = sorted(record.cell.seed for record in log.done().values())
        assert seeds[: seen + 1] == list(range(seen + 1))
        log.append(a_record(10**7))
    assert read(tmp_path)[-1].cell.seed == 10**7


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_gives_one_clear_line_and_no_torn_file(tmp_path: Path):
    """The kernel's own limit on file size stands for a full disk: a write stops half-way, then fails."""
    code = (
        "import resource, sys\n"
        "from dataclasses import replace\n"
        "from foveate.errors import FoveateError\n"
        "from foveate.evaluate.record import Log, Record, write_atomically\n"
        "from pathlib import Path\n"
        "base = Record.from_json(sys.argv[2])\n"
        "size = len(base.to_json()) + 1\n"
        "log = Log(sys.argv[1])\n"
        "log.append(base)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, resource.RLIM_INFINITY))\n"
        "for attempt in range(2):\n"
        "    try:\n"
        "        log.append(replace(base, cell=replace(base.cell, seed=5)))\n"
        "    except FoveateError as error:\n"
        "        print(error)\n"
        "    print(Path(sys.argv[1], 'records.jsonl').stat().st_size == size, len(log.done()))\n"
        "page = Path(sys.argv[1], 'page.html')\n"
        "page.write_text('old')\n"
        "try:\n"
        "    write_atomically(page, b'x' * 3 * size)\n"
        "except FoveateError as error:\n"
        "    print(error)\n"
        "print(page.read_text(), sorted(p.name for p in page.parent.iterdir()))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "log.append(replace(base, cell=replace(base.cell, seed=6)))\n"
    )
    out, error = run_python(code, str(tmp_path), a_record(0).to_json()).communicate()
    lines = out.splitlines()
    full = f"{tmp_path / RECORDS}: no space left to write; free some and run the same command again to resume"
    assert lines[:4] == [full, "True 1", full, "True 1"], error
    assert "page.html: no space left" in lines[4]
    assert lines[5] == "old ['page.html', 'records.jsonl']"
    assert [record.cell.seed for record in read(tmp_path)] == [0, 6]


def test_ctrl_c_inside_a_write_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = Log(tmp_path)
    log.append(a_record(0))
    whole = (tmp_path / RECORDS).read_bytes()
    real = os.write

    def interrupted(file: int, data: bytes) -> int:
        real(file, bytes(data)[:40])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        log.append(a_record(1))
    monkeypatch.undo()
    assert (tmp_path / RECORDS).read_bytes() == whole
    log.append(a_record(2))
    log.close()
    assert [r.cell.seed for r in read(tmp_path)] == [0, 2]


def test_records_that_belong_together_are_written_together_or_not_at_all(tmp_path: Path, monkeypatch):
    log = Log(tmp_path)
    log.extend([a_record(0), a_record(1)])
    whole = (tmp_path / RECORDS).read_bytes()
    real = os.write

    def interrupted(file: int, data: bytes) -> int:
        real(file, bytes(data)[: len(data) * 3 // 4])
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        log.extend([a_record(2), a_record(3)])
    monkeypatch.undo()
    assert (tmp_path / RECORDS).read_bytes() == whole
    assert len(log.done()) == 2
    log.extend([a_record(4)])
    log.close()
    assert [r.cell.seed for r in read(tmp_path)] == [0, 1, 4]


def test_writing_short_pieces_still_writes_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, bytes(data)[:11]))
    with Log(tmp_path) as log:
        log.append(a_record(3))
    monkeypatch.undo()
    assert read(tmp_path)[0].outcomes == a_record(3).outcomes


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FoveateError, match="cannot be written"):
        Log(tmp_path / "file" / "run")
    with pytest.raises(FoveateError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "page.html", b"x")


def test_one_line_is_plain_json(tmp_path: Path):
    line = a_record(0).to_json()
    assert "\n" not in line
    data = json.loads(line)
    assert data["schema"] == 1
    assert data["cell"]["task"] == "niah_single_1"
