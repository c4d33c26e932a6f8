"""A crew in this process: jobs are done when they are waited for, in an order of the test's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class InProcess:
    """Workers made by `make(number)`. What they did is in `log`, as (worker, method, jobs at hand beside it)."""

    def __init__(self, size: int, make: Callable[[int], Any], pick: int = 0) -> None:
        self.size, self.make, self.pick = size, make, pick
        self.workers: dict[int, Any] = {}
        self.jobs: dict[int, tuple[int, str, tuple[Any, ...]]] = {}
        self.ended: dict[int, Any] = {}
        self.log: list[tuple[int, str, int]] = []
        self.stopped: list[int] = []
        self.dismissed: list[int] = []
        self.count = 0
        self.closed = False

    def start(self, worker: int) -> None:
        self.workers[worker] = self.make(worker)

    def submit(self, worker: int, method: str, *args: Any) -> int:
        self.count += 1
        self.jobs[self.count] = (worker, method, args)
        return self.count

    def wait(self, jobs: Sequence[Any], seconds: float) -> list[Any]:
        job = jobs[self.pick]
        worker, method, args = self.jobs[job]
        self.log.append((worker, method, len(jobs) - 1))
        try:
            self.ended[job] = self.workers[worker].do(job, method, *args)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.ended[job] = error
        return [job]

    def result(self, job: Any) -> Any:
        found = self.ended.pop(job)
        if isinstance(found, BaseException):
            raise found
        return found

    def at(self, worker: int) -> tuple[float, str]:
        return self.workers[worker].at()

    def stop(self, worker: int) -> None:
        self.stopped.append(worker)
        self.workers[worker].stop(self.count)

    def dismiss(self, worker: int) -> None:
        self.dismissed.append(worker)

    def close(self) -> None:
        self.closed = True
        for worker in self.workers.values():
            worker.leave()
