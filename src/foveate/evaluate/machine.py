"""The machine and the versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
from collections import Counter
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Versions of what decides about results and times."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    with suppress(PackageNotFoundError):  # kernels can be timed without it
        found["transformers"] = version("transformers")
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def describe(device: torch.device, *others: torch.device) -> str:
    """The machine in words: the accelerator, or processor, threads and memory. Several alike are counted."""
    if others:
        words = Counter(describe(each) for each in (device, *others))
        return " and ".join(text if count == 1 else f"{count} x {text}" for text, count in words.items())
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    name = _processor()
    parts = [name, f"{torch.get_num_threads()} of {os.cpu_count()} cores"]
    if device.type != "cpu":
        parts.insert(0, device.type)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        parts.append(f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB")
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "unknown processor"
