"""Which dtype and device a model is loaded in when the user does not say."""

from __future__ import annotations

import torch

from foveate.errors import BadArgument

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


SPREAD = "spread"
"""The device of a model whose layers lie on all GPUs."""


def one_device(device: str | torch.device, what: str) -> str | torch.device:
    """The same device, unless it is several.

    Raises:
        BadArgument: `what` needs the model on one.
    """
    if device == SPREAD:
        raise BadArgument(
            "device", SPREAD, f'{what} needs the whole model on one device: give "auto", "cpu" or "cuda:1"'
        )
    return device


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU.

    Raises:
        BadArgument: no such device, or not on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BadArgument("device", device, 'give "auto", "cpu", "cuda", "cuda:1" or a torch.device') from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise BadArgument("device", str(device), f"this machine has {torch.cuda.device_count()} CUDA devices")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise BadArgument("device", str(device), "this machine has no Metal device")
    return found


def enter_device(device: str | torch.device) -> torch.device:
    """`resolve_device` for a command, which has the process to itself: kernels and clocks start on this GPU from now.

    Raises:
        BadArgument: as `resolve_device`.
    """
    found = resolve_device(device)
    if found.type == "cuda" and found.index is not None:  # plain "cuda" is the current one, and is refused here
        torch.cuda.set_device(found)
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the processor multiplies it natively, else float32.

    Raises:
        BadArgument: not a floating point dtype that a model can be loaded in.
    """
    if dtype == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise BadArgument("dtype", dtype, f'give "auto", {", ".join(DTYPES)} or one of these as a torch.dtype')
    return found


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run on the device's own instructions.

    These are AVX512-BF16 or AMX on a CPU, and CUDA from compute capability 8.0 (Ampere) on.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
