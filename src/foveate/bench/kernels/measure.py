"""Cases checked, timed and set beside dense attention and the floor; no answer is timed that is not right."""

from __future__ import annotations

import gc
import math
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from foveate.bench.clock import Rates, Timing, clock, rates, wait
from foveate.bench.kernels import choose, decode, prefill, rivals
from foveate.bench.kernels.case import Case, Check, Kernel, Made
from foveate.bench.kernels.sizes import Sizes
from foveate.bench.record import record
from foveate.errors import BadArgument

FAMILIES: dict[str, Callable[[Sizes, torch.device], list[Case]]] = {
    "decode": decode.ragged,
    "listed": decode.listed,
    "latent": decode.latent,
    "packed": decode.packed,
    "columns": choose.column_sums,
    "select": choose.select,
    "prefill": prefill.dense,
    "block-sparse": prefill.block_sparse,
}
"""What can be timed, in the order in which it is."""

_LONGEST = 0.3
"""Seconds for the repeats of one kernel, if three do not take longer."""
_COMPILING = 25.0
"""Seconds that must be left for a kernel that takes long to compile."""

Watch = Callable[[str], None]


def bench(
    device: torch.device,
    families: Sequence[str] | None = None,
    *,
    sizes: Sizes | None = None,
    cold: bool = True,
    repeats: int = 20,
    seed: int = 0,
    limit: float | None = None,
    command: str = "foveate bench kernels",
    watch: Watch = lambda what: None,
    keep: Callable[[dict[str, Any]], None] = lambda data: None,
) -> dict[str, Any]:
    """`run`, as a record that `bench.record.write` takes. `keep` is given what there is of it after each case."""
    sizes = sizes or Sizes.of(device)
    facts = {"sizes": sizes.words, "cold": cold and device.type == "cuda", "absent": rivals.absent(device)}

    def made(rows: list[dict[str, Any]]) -> dict[str, Any]:
        data = record("kernels", command, device, rows, **facts)
        with suppress(PackageNotFoundError):
            data["versions"]["triton"] = version("triton")
        return data

    how: dict[str, Any] = {"sizes": sizes, "cold": cold, "repeats": repeats, "seed": seed, "limit": limit}
    return made(run(device, families, **how, watch=watch, found=lambda rows: keep(made(rows))))


def run(
    device: torch.device,
    families: Sequence[str] | None = None,
    *,
    sizes: Sizes | None = None,
    cold: bool = True,
    repeats: int = 20,
    seed: int = 0,
    limit: float | None = None,
    watch: Watch = lambda what: None,
    found: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Time the kernels of some families. What others are compared with is timed too, asked for or not.

    Args:
        device: a CUDA device for our Triton kernels; elsewhere the other backends are timed.
        families: names in `FAMILIES`; None: all.
        sizes: None: those of the device.
        cold: read from memory, not from a cache of the last repeat (GPU only).
        repeats: most repeats; fewer where they take long.
        seed: of the inputs.
        limit: seconds after which nothing new is begun; the rows that are left say so.
        watch: is told what comes next.
        found: is given all rows so far after each case.

    Returns:
        A row for each case and kernel, JSON values. `refused` says why a row has no time.

    Raises:
        BadArgument: no such family, or nothing to repeat.
    """
    names = list(FAMILIES) if families is None else list(families)
    for name in names:
        if name not in FAMILIES:
            raise BadArgument("families", name, "choose from " + ", ".join(FAMILIES))
    if not names or repeats < 1:
        raise BadArgument("families" if not names else "repeats", names or repeats, "give 1 or more")
    sizes = sizes or Sizes.of(device)
    asked = {name: FAMILIES[name](sizes, device) for name in names}
    for base in {case.dense for cases in asked.values() for case in cases if case.dense}:
        if base not in asked:
            asked[base] = [case for case in FAMILIES[base](sizes, device) if case.dense is None]
    ordered = [case for name in FAMILIES for case in asked.get(name, [])]
    how = _How(device, rates(device), cold, repeats, seed, None if limit is None else time.monotonic() + limit)
    rows: list[dict[str, Any]] = []
    dense = {(case.family, case.name): case.dense for case in ordered}
    longest = max(sizes.lengths)
    with torch.no_grad():
        for case in ordered:
            watch(f"{case.family}: {case.name}, {case.length:,} tokens")
            rows += how.case(case, slow=case.length == longest)
            _against_dense(rows, dense)
            found(rows)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


@dataclass(frozen=True)
class _How:
    """How everything is timed."""

    device: torch.device
    machine: Rates
    cold: bool
    repeats: int
    seed: int
    end: float | None

    def left(self) -> float:
        return math.inf if self.end is None else self.end - time.monotonic()

    def case(self, case: Case, slow: bool) -> list[dict[str, Any]]:
        """The rows of a case; of kernels that take long to compile only if `slow`."""
        row: dict[str, Any] = {"family": case.family, "case": case.name, "length": case.length}
        if self.left() <= 0:
            return [{**row, "kernel": "", "refused": "no time was left"}]
        generator = torch.Generator(self.device)
        generator.manual_seed(self.seed + zlib.crc32(f"{case.family}, {case.name}, {case.length}".encode()))
        try:
            made = case.make(generator)
        except Exception as error:  # a case that cannot be made must not end the run
            return [{**row, "kernel": "", "refused": _reason(error)}]
        floor = self.machine.floor(made.nbytes, made.flops)
        row |= {"bytes": made.nbytes, "flops": made.flops, "density": made.density, "floor_ms": 1e3 * floor}
        row |= made.facts
        return [self.kernel(case, made, kernel, row) for kernel in made.kernels if slow or not kernel.slow]

    def kernel(self, case: Case, made: Made, kernel: Kernel, row: dict[str, Any]) -> dict[str, Any]:
        """One row: checked, then timed."""
        row = {**row, "kernel": kernel.name}
        if self.left() <= (_COMPILING if kernel.slow else 0):
            return {**row, "refused": "no time was left"}
        try:
            found = made.check(kernel.read(kernel.work()))
            row |= _shown(found)
            if not found.passed:
                return {**row, "refused": f"its answer is wrong: {_words(found)}"}
            timing, recorded = self.timed(kernel.work, case.recorded)
        except Exception as error:  # a library that fails is a row that says so
            return {**row, "refused": _reason(error)}
        return {**row, **timing.as_ms(), "recorded": recorded, "floor_share": row["floor_ms"] / (1e3 * timing.median)}

    def timed(self, work: Callable[[], Any], recorded: bool) -> tuple[Timing, bool]:
        """The time of some work, and whether it is that of a replayed graph."""
        once = clock(work, self.device, repeats=1, warm_up=0).median  # the check has warmed it up
        repeats = min(self.repeats, max(3, int(_LONGEST / max(once, 1e-9))))
        recorded = recorded and self.device.type == "cuda"
        if recorded:
            try:
                return clock(work, self.device, repeats=repeats, warm_up=1, cold=self.cold, recorded=True), True
            except RuntimeError:
                wait(self.device)  # it looks at the host on its way, as it would in a decode step too
        return clock(work, self.device, repeats=repeats, warm_up=1, cold=self.cold), False


def _against_dense(rows: list[dict[str, Any]], dense: dict[tuple[str, str], str | None]) -> None:
    """How many times faster a row is than the fastest dense attention of its length, and its share of what its density
    promises of that."""
    best: dict[tuple[str, int], float] = {}
    for row in rows:
        if dense[row["family"], row["case"]] is None and "ms" in row:
            key = (row["family"], row["length"])
            best[key] = min(best.get(key, math.inf), row["ms"])
    for row in rows:
        base = dense[row["family"], row["case"]]
        if base is not None and "ms" in row and (base, row["length"]) in best:
            row["times_dense"] = best[base, row["length"]] / row["ms"]
            row["of_ideal"] = row["times_dense"] * row["density"]


def _shown(found: Check) -> dict[str, Any]:
    """Errors as JSON values, which know no NaN."""
    values = {"error": found.error, "lse_error": found.lse_error}
    return {name: x for name, x in values.items() if x is not None and math.isfinite(x)}


def _words(found: Check) -> str:
    if not math.isfinite(found.error):
        return "it is not finite"
    lse = "" if found.lse_error is None else f", lse off by {found.lse_error:.1e}"
    return f"error {found.error:.1e}, allowed {found.bound:.1e}{lse}"


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:160]}" if lines else type(error).__name__
