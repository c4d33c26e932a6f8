"""Kernels that start before the one in front of them has ended: when they do, and that they wait."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.attention.early import early, early_starts

SOURCES = [path for path in Path(foveate.__file__).parent.rglob("*.py") if "@early" in path.read_text()]
AHEAD = {"_products", "_gated"}
"""Kernels that read weights before they wait, which a step does not change."""


class Kernel:
    """A kernel that notes how it is launched."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.seen.append(kwargs)


@pytest.mark.parametrize(("capability", "able"), [((8, 0), False), ((9, 0), True), ((10, 3), True)])
def test_kernels_start_early_in_recorded_steps_of_a_device_that_can(
    capability: tuple[int, int], able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernel = Kernel()
    launch = early(kernel)
    launch[(1,)](N=3)
    with early_starts(torch.device("cuda")):
        launch[(1,)](N=4)
        with early_starts(torch.device("cpu")):
            launch[(1,)](N=5)
    with pytest.raises(KeyError), early_starts(torch.device("cuda")):
        raise KeyError
    launch[(1,)](N=6)
    now = {"EARLY": True, "launch_pdl": True} if able else {"EARLY": False}
    late = {"EARLY": False}
    assert kernel.seen == [{"N": 3, **late}, {"N": 4, **now}, {"N": 5, **late}, {"N": 6, **late}]


def test_each_waits_before_it_reads_or_writes() -> None:
    """`in_turn` comes first. A kernel that would write or read before it could be ahead of the one in front."""
    found = 0
    for path in SOURCES:
        for kernel in ast.walk(ast.parse(path.read_text())):
            if not isinstance(kernel, ast.FunctionDef) or "early" not in map(ast.unparse, kernel.decorator_list):
                continue
            found += 1
            body = kernel.body[1:] if ast.get_docstring(kernel) else kernel.body
            lines = [ast.unparse(statement) for statement in body]
            assert kernel.args.args[-1].arg == "EARLY", f"{path.name}: {kernel.name}"
            assert lines.count("in_turn(EARLY)") == 1, f"{path.name}: {kernel.name}"
            before = lines[: lines.index("in_turn(EARLY)")]
            if kernel.name in AHEAD:
                assert not any("tl.load" in line or "tl.store" in line or "_token" in line for line in before)
            else:
                assert not before, f"{path.name}: {kernel.name}"
    assert found > 30
