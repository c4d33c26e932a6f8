"""Synchronised times, and the rates of the machine that they are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import median, quantiles
from typing import Any

import torch

from foveate.engine.captured import uncollected

_FLUSH = 1 << 28
"""Bytes that are read to drive everything else out of a GPU's L2 cache (50 MB on an H100). What is read leaves nothing
behind that would have to be written back while the clock runs."""
_IN_A_GRAPH = 8
"""Calls in one recorded graph."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one piece of work.

    Args:
        median: of the repeats; low, high: their 20 % and 80 % quantiles.
        repeats: how many were made.
    """

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """The timing of repeats that were measured one by one."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        cuts = quantiles(seconds, n=5, method="inclusive")
        return cls(median(seconds), cuts[0], cuts[-1], len(seconds))

    def as_ms(self) -> dict[str, float]:
        """JSON values, in milliseconds."""
        return {"ms": 1e3 * self.median, "ms_low": 1e3 * self.low, "ms_high": 1e3 * self.high, "repeats": self.repeats}


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def clock(
    work: Callable[[], Any],
    device: torch.device,
    *,
    repeats: int = 20,
    warm_up: int = 3,
    cold: bool = False,
    recorded: bool = False,
) -> Timing:
    """Time `work`, each repeat alone: by the device's own events on a GPU, else by the host's clock.

    Args:
        cold: drive the inputs out of the cache before each repeat (GPU only).
        recorded: replay the work from a CUDA graph, as a decode step runs it, so that what the host needs to launch
            kernels is not counted (GPU only). Work that waits for the device cannot be recorded: RuntimeError.
    """
    for _ in range(warm_up):
        work()
    wait(device)
    if device.type != "cuda":
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            wait(device)
            seconds.append(time.perf_counter() - start)
        return Timing.of(seconds)
    flush = _flush(device) if cold else None
    if not recorded:
        return Timing.of(_timed(work, device, repeats, flush))

    def both() -> None:
        if flush is not None:
            flush()
        work()

    # A graph takes some microseconds to start, so that it holds several calls; what flushing takes is timed alone.
    seconds = _timed(_record(both, device), device, repeats)
    spent = _flush_seconds(device) if cold else 0.0
    return Timing.of([max(1e-9, each - spent) / _IN_A_GRAPH for each in seconds])


def _timed(
    work: Callable[[], Any], device: torch.device, repeats: int, before: Callable[[], Any] | None = None
) -> list[float]:
    """Seconds of each repeat by events of the device."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        if before is not None:
            before()
        start.record()
        work()
        stop.record()
    wait(device)
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


@cache
def _flush(device: torch.device) -> Callable[[], Any]:
    buffer = torch.ones(_FLUSH // 4 // 4096, 4096, device=device)
    sums = torch.empty(buffer.shape[0], device=device)
    return lambda: torch.sum(buffer, dim=1, out=sums)


@cache
def _flush_seconds(device: torch.device) -> float:
    """Of all flushes of one graph."""
    return median(_timed(_record(_flush(device), device), device, 20))


def _record(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Several calls of `work`, as one replay."""
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        work()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with uncollected(), torch.cuda.graph(graph):
            for _ in range(_IN_A_GRAPH):
                work()
    finally:
        torch.cuda.set_stream(current)  # a recording that fails leaves its own stream in place
    graph.replay()
    return graph.replay


@dataclass(frozen=True)
class Rates:
    """What the machine can do, measured on it.

    Args:
        bytes_per_s: device memory read by a sum over a tensor far larger than the caches (nothing else is written).
        copy_per_s: bytes read and written by a copy.
        flops: of a large matrix product in bf16 (multiplications and additions); on a processor in float32 if that is
            faster.
    """

    bytes_per_s: float
    copy_per_s: float
    flops: float

    def as_json(self) -> dict[str, float]:
        return asdict(self)

    def floor(self, nbytes: float, flops: float = 0.0) -> float:
        """Seconds that no implementation can beat: the larger of moving the bytes and doing the operations."""
        return max(nbytes / self.bytes_per_s, flops / self.flops)


@cache
def rates(device: torch.device) -> Rates:
    """Measure the rates of a device; once per process."""
    cuda = device.type == "cuda"
    copied, summed = _memory(device, 1 << 31 if cuda else 1 << 26)
    # Processors may be slower in few bits.
    flops = max(_product(device, dtype) for dtype in ((torch.bfloat16,) if cuda else (torch.bfloat16, torch.float32)))
    return Rates(max(copied, summed), copied, flops)


def _product(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / clock(lambda: a @ b, device, repeats=10).median


def _memory(device: torch.device, size: int) -> tuple[float, float]:
    """Bytes per second of a copy (read and written), and of a sum, which reads and writes nothing that counts."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copied = clock(lambda: target.copy_(source), device, repeats=10).median
    summed = clock(lambda: torch.sum(source.view(-1, 1 << 12), dim=1), device, repeats=10).median
    return 2 * size / copied, size / summed
