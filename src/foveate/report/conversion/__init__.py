"""What a conversion did to a model: its ladder, read from `ladder.json`, printed and as a page."""

from foveate.report.conversion.ladder import read_ladder
from foveate.report.conversion.page import render_conversion, write_conversion
from foveate.report.conversion.terminal import print_ladder

__all__ = ["print_ladder", "read_ladder", "render_conversion", "write_conversion"]
