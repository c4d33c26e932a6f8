"""A crew of Ray actors: on the GPUs or cores of this machine, or on those of a cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from foveate.errors import BadArgument, FoveateError
from foveate.evaluate.scale import Died
from foveate.evaluate.worker import Order, Worker
from foveate.models.builtin import BUILTIN

_STORE = 2**28  # bytes of shared memory for what travels: runs and records, never weights
_PATIENCE = 2.0  # seconds that a worker has to say how far it is


class RayCrew:
    """Workers as Ray actors: one on each GPU where there are any, else one on each core.

    Starts Ray on this machine, or connects to a cluster, and ends that with `close`; a Ray that runs in this process
    already is used and left running.

    Args:
        source, dtype, device: of the model, as for `foveate.load`. Every machine opens it by itself, so a folder must
            be there on all of them. "auto" is CUDA if the cluster has a GPU.
        address: of a cluster; "" starts Ray on this machine, unless `RAY_ADDRESS` names a cluster.
        workers: the most there may be; None: as many as there are GPUs, or cores.

    Raises:
        BadArgument: no cluster at the address, more workers than GPUs or cores, a device by number.
        FoveateError: ray is not installed.
    """

    def __init__(
        self, source: str, *, dtype: Any = "auto", device: Any = "auto", address: str = "", workers: int | None = None
    ) -> None:
        if workers is not None and workers < 1:
            raise BadArgument("ray_workers", workers, "give at least 1")
        if str(device) not in ("auto", "cpu", "cuda"):
            raise BadArgument("device", str(device), "with ray give auto, cpu or cuda: Ray hands out the devices")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise FoveateError("--ray needs ray: install foveate with the extra 'ray' (foveate[ray])") from None
        self.ray: Any = ray
        self.own = not ray.is_initialized()
        if self.own:
            self._begin(address or os.environ.get("RAY_ADDRESS", "") or "local", workers)
        try:
            self.options, self.size = self._shares(str(device), workers)
        except FoveateError:
            self.close()
            raise
        device = "cuda" if "num_gpus" in self.options else "cpu"
        self.making = (_everywhere(source), dtype, device)
        self.actors: dict[int, Any] = {}
        self.looks: dict[int, tuple[float, str]] = {}
        self.orders: dict[int, Any] = {}
        self.count = 0

    def _begin(self, address: str, workers: int | None) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            quiet |= {"include_dashboard": False, "object_store_memory": _STORE}
            if workers is not None:
                quiet["num_cpus"] = max(workers, os.cpu_count() or 1)
        try:
            self.ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise BadArgument("ray", address, f"no Ray cluster could be reached there ({first})") from None

    def _shares(self, device: str, workers: int | None) -> tuple[dict[str, Any], int]:
        """What an actor takes of the cluster, and how many there may be."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        cores = [int(node.get("CPU", 0)) for node in nodes]
        if device == "cuda" and not gpus:
            raise BadArgument("device", device, "no machine of Ray's has a GPU; give cpu")
        most, what = (gpus, "GPUs") if gpus and device != "cpu" else (sum(cores), "cores")
        size = most if workers is None else workers
        if not 0 < size <= most:
            raise BadArgument("ray_workers", workers, f"Ray has {most} {what}; give at most that")
        if what == "GPUs":
            return {"num_gpus": 1, "num_cpus": 1}, size
        each = max(n for n in range(1, max(cores) + 1) if sum(core // n for core in cores) >= size)
        return {"num_cpus": each}, size

    # -- the crew -----------------------------------------------------------------------------------------------------

    def start(self, worker: int) -> None:
        self.dismiss(worker)
        # Questions of how far it is have a thread of their own; jobs stay in one, where torch keeps its modes.
        actor = self.ray.remote(concurrency_groups={"jobs": 1, "talk": 1})(Worker)
        self.actors[worker] = actor.options(max_restarts=0, **self.options).remote(*self.making)
        self.looks[worker] = (0.0, "")

    def submit(self, worker: int, method: str, *args: Any) -> Hashable:
        self.count += 1
        do = self.actors[worker].do.options(concurrency_group="jobs")
        job = do.remote(self.count, method, *(self._lent(arg) for arg in args))
        self.looks[worker] = (0.0, "")
        return job

    def _lent(self, arg: Any) -> Any:
        """An order goes to each machine once, whatever the number of its jobs."""
        if not isinstance(arg, Order):
            return arg
        if arg.number not in self.orders:
            self.orders = {arg.number: self.ray.put(arg)}
        return self.orders[arg.number]

    def wait(self, jobs: Sequence[Hashable], seconds: float) -> list[Hashable]:
        return self.ray.wait(list(jobs), num_returns=1, timeout=seconds)[0]

    def result(self, job: Hashable) -> Any:
        errors = self.ray.exceptions
        try:
            return self.ray.get(job)
        except errors.RayTaskError as error:
            raise getattr(error, "cause", None) or error from None
        except errors.RayError as error:
            raise Died(" ".join(str(error).split("\n")[0].split()).rstrip(".")) from None

    def at(self, worker: int) -> tuple[float, str]:
        try:
            look = self.actors[worker].at.options(concurrency_group="talk").remote()
            self.looks[worker] = self.ray.get(look, timeout=_PATIENCE)
        except self.ray.exceptions.RayError:  # dead, which its job says as well, or too busy to answer in time
            pass
        return self.looks[worker]

    def stop(self, worker: int) -> None:
        self.actors[worker].stop.options(concurrency_group="talk").remote(self.count)

    def dismiss(self, worker: int) -> None:
        if worker in self.actors:
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.ray.kill(self.actors.pop(worker))

    def close(self) -> None:
        for worker in list(getattr(self, "actors", {})):
            self.dismiss(worker)
        if self.own and self.ray.is_initialized():
            self.ray.shutdown()


def _everywhere(source: str) -> str:
    """A path of this machine as one that holds in any folder."""
    path = Path(source).expanduser()
    return source if source in BUILTIN or not path.exists() else str(path.resolve())
