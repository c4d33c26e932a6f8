"""Numbers on their way from the host to a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """An array of the host on a device, without waiting for what the device has to do.

    An ordinary copy waits for all work that was asked for before, in every layer of every step. CUDA takes ordinary
    memory into a buffer of its own before it returns, so that the array may change at once. While a graph is recorded
    the copy is an ordinary one, which CUDA refuses there: a replay would read the array's memory again.
    """
    free = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    return torch.from_numpy(numbers).to(device, non_blocking=free)
