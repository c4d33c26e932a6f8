"""What changed between two runs: `diff(a, b)`, and what prints and writes it."""

from foveate.report.diff.changes import Change, Difference, Lone, Ratio, diff
from foveate.report.diff.page import render_diff, write_diff
from foveate.report.diff.runs import Fact, Run, open_run
from foveate.report.diff.terminal import print_diff, report_diff
from foveate.report.diff.verdict import diff_json

__all__ = [
    "Change",
    "Difference",
    "Fact",
    "Lone",
    "Ratio",
    "Run",
    "diff",
    "diff_json",
    "open_run",
    "print_diff",
    "render_diff",
    "report_diff",
    "write_diff",
]
