"""Reports made from records: a terminal table, one HTML page, and a summary for programs."""

from foveate.report.as_json import summary_json
from foveate.report.cards import MethodCard
from foveate.report.html import render, write_report
from foveate.report.recommend import RULE, Recommendation, recommend
from foveate.report.terminal import print_report, report

__all__ = [
    "RULE",
    "MethodCard",
    "Recommendation",
    "print_report",
    "recommend",
    "render",
    "report",
    "summary_json",
    "write_report",
]
