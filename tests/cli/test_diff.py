from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.program import errors, invoke
from tests.report.synthetic import METHODS, make_records

from foveate.evaluate.record import RECORDS


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    records = make_records(3, lengths=(1024,), budgets=(0.5,), methods=METHODS[:2], tasks=["vt"])
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / RECORDS).write_text("".join(record.to_json() + "\n" for record in records))
        made.append(tmp_path / name)
    return made[0], made[1]


def test_the_table_and_the_page(capsys, folders: tuple[Path, Path], tmp_path: Path) -> None:
    done = invoke(capsys, ["diff", *folders, "--out", tmp_path / "out"])
    assert (done.code, done.err) == (0, "")
    assert "Nothing changed" in done.out
    assert "page: " in done.out
    assert (tmp_path / "out" / "diff.html").read_text().endswith("</html>")


def test_json(capsys, folders: tuple[Path, Path]) -> None:
    done = invoke(capsys, ["diff", *folders, "--json"])
    data = json.loads(done.out)
    assert done.code == 0
    assert (data["a"], data["b"], data["changed"], data["page"]) == (*map(str, folders), False, None)
    assert len(data["cells"]) == 6


def test_folders_without_records(capsys, folders: tuple[Path, Path], tmp_path: Path) -> None:
    (folders[1] / RECORDS).write_text("")
    for other, said in ((folders[1], "holds no records"), (tmp_path / "none", "cannot be read")):
        done = invoke(capsys, ["diff", folders[0], other])
        assert (done.code, done.out) == (2, "")
        (line,) = errors(done)
        assert said in line
