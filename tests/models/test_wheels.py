"""How much of a download has arrived, while pip moves it about."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from foveate.models import wheels


def test_what_pip_removes_meanwhile_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("kept/a", 5), ("kept/deep/b", 7), ("gone/c", 11)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert wheels._size(tmp_path) == 23
    look = os.scandir

    def removed(path: Any = ".") -> Any:
        if str(path).endswith("gone") and Path(path).exists():
            shutil.rmtree(path)
        return look(path)

    monkeypatch.setattr(os, "scandir", removed)
    assert wheels._size(tmp_path) == 12
