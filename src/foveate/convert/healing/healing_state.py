"""What a healing leaves on disk so that the same call goes on: one file, whole at every moment."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from foveate.errors import BadArgument, FoveateError

FORMAT = 1
_NAME = "healing-state.pt"
_PROBES = 16  # numbers of each tensor that go into a digest


class HealingState:
    """A folder that holds the state of one healing.

    Args:
        folder: made where it is not there.
        identity: what must be equal for a later call to go on: JSON values by name.

    Raises:
        BadArgument: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = Path(folder).expanduser(), identity
        self.file = self.folder / _NAME
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadArgument("out", str(folder), f"cannot be made ({error.strerror}); give another folder") from None
        if not os.access(self.folder, os.W_OK):
            raise BadArgument("out", str(folder), "cannot be written; give another folder")
        self._lock = FileLock(self.folder / ".healing.lock")

    def lock(self) -> None:
        """Keep other processes from healing into this folder.

        Raises:
            BadArgument: one does.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BadArgument(
                "out", str(self.folder), "another process is healing there; give another folder"
            ) from None
        for left in self.folder.glob(f".{_NAME}-*"):  # of processes that were killed while they wrote
            left.unlink(missing_ok=True)

    def unlock(self) -> None:
        """Let other processes heal here again."""
        self._lock.release()

    def load(self) -> dict[str, Any] | None:
        """What was saved, or None.

        Raises:
            BadArgument: it is of another healing.
            FoveateError: it cannot be read.
        """
        if not self.file.exists():
            return None
        try:
            found = torch.load(self.file, map_location="cpu", weights_only=True)
            identity = found["identity"]
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FoveateError(f"{self.file}: cannot be read ({line}); remove it to begin again") from error
        if found["format"] != FORMAT or identity != self.identity:
            other = [name for name in self.identity if identity.get(name) != self.identity[name]]
            said = ", ".join(f"{name}={identity.get(name)!r}" for name in other)
            mend = f"holds a healing with other settings ({said}); give these, another folder, or remove {_NAME}"
            raise BadArgument("out", str(self.folder), mend)
        return found

    def save(self, state: dict[str, Any]) -> None:
        """Write a state in the place of the one before, which stays until the new one is whole.

        Raises:
            FoveateError: it cannot be written; the state before is still there.
        """
        size = sum(each.nbytes for each in tensors(state))
        name = None
        try:
            if shutil.disk_usage(self.folder).free < size:
                raise OSError(f"{size / 1e9:.2g} GB are needed")
            handle, name = tempfile.mkstemp(prefix=f".{_NAME}-", dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                torch.save({"format": FORMAT, "identity": self.identity, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.file)
        except (OSError, RuntimeError) as error:  # torch wraps errors of the file in RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            left = "the state before it is kept" if self.file.exists() else "there is none before it"
            raise FoveateError(f"{self.folder}: the state cannot be saved ({reason}); {left}") from error
        finally:
            if name is not None:
                Path(name).unlink(missing_ok=True)


def tensors(state: Any) -> Iterable[Tensor]:
    """Every tensor in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for each in state.values() if isinstance(state, dict) else state:
            yield from tensors(each)


@torch.no_grad()
def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, shapes, and a few numbers of each tensor: enough to tell two checkpoints apart."""
    made = hashlib.sha256()
    for name, tensor in named:
        flat = tensor.detach().flatten()
        places = torch.linspace(0, max(0, flat.numel() - 1), _PROBES, device=flat.device).long()
        numbers = flat[places].double().tolist() if flat.numel() else []
        made.update(f"{name}{tuple(tensor.shape)}{numbers}".encode())
    return made.hexdigest()[:16]
