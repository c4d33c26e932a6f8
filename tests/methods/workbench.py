"""What a calibration in a test is given."""

from __future__ import annotations

from typing import Any

from tests.heads.words import WordTokenizer


class Workbench:
    """A probe that counts what is reported."""

    def __init__(self, model: Any, seed: int = 0) -> None:
        self.model, self.tokenizer, self.seed = model, WordTokenizer(), seed
        self.steps = 0

    def progress(self, total: int, label: str) -> Any:
        self.total = total

        def report(steps: int, how: str) -> None:
            self.steps += steps

        return report
