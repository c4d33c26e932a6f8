"""Change a checkpoint's attention for good."""

from foveate.convert.base import CONVERSIONS, Calibration, Conversion, Stage, register

__all__ = ["CONVERSIONS", "Calibration", "Conversion", "Stage", "register"]
