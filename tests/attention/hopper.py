"""Compile the kernels that are written for Hopper by hand, without a GPU, and print what the machine code shows.

Run as `python -m tests.attention.hopper`, without TRITON_INTERPRET: standard functions of the language are not compiled
where it is set.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from foveate.attention.triton import block_sparse_hopper, decode_latent_hopper
from foveate.attention.triton.block_sparse_tiles import Tiles, Tiling

HALF = torch.bfloat16
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(kernel: Any, args: tuple[Any, ...], given: dict[str, Any]) -> bytes:
    """The machine code of a launch."""
    options = {"num_warps": given.pop("num_warps")}
    bound = dict(zip(kernel.arg_names, args, strict=False)) | given
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    known: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        x, name = bound[parameter.name], parameter.name
        if parameter.is_constexpr:
            signature[name], constants[i,] = "constexpr", x
        elif isinstance(x, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[x.base.dtype]}{list(x.block_shape)},{x.layout!r}>"
        elif isinstance(x, Tensor):
            signature[name], known[i,] = f"*{TYPES[x.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(x, float) else "i32"
    source = GluonASTSource(kernel, signature, constants, known)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


def shown(code: bytes) -> dict[str, Any]:
    """Matrix products, how many of them end a group, the waits for groups, and the exponentials of each wait for all
    groups that follows a wait for all but the newest."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        text = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    under: list[int] = []
    exponentials = None
    for line in text.splitlines():
        if "WARPGROUP.DEPBAR.LE gsb0, 0x1" in line:
            exponentials = 0
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line and exponentials is not None:
            under.append(exponentials)
            exponentials = None
        elif "MUFU.EX2" in line and exponentials is not None:
            exponentials += 1
    lines = [line for line in text.splitlines() if "HGMMA" in line]
    return {
        "products": len(lines),
        "groups": sum("gsb0" in line for line in lines),
        "waits": text.count("WARPGROUP.DEPBAR"),
        "exponentials": under,
    }


def main() -> None:
    """One line of JSON for each kernel."""
    codes: list[bytes] = []
    GluonJITFunction.run = lambda self, *args, grid, warmup, **given: codes.append(compiled(self, args, given))
    for k_block, rows, dim in ((128, 128, 128), (64, 32, 64)):
        q, k = torch.empty(1, 8, 256, dim, dtype=HALF), torch.empty(1, 2, 256, dim, dtype=HALF)
        lists = torch.zeros(1, 8 if rows == 128 else 2, 256 // rows, 5, dtype=torch.int32)
        found = Tiles(*(torch.zeros(2, 8, dtype=torch.int32) for _ in range(4)))
        how = Tiling(rows, 128 // rows, 64)
        lse = torch.empty(1, 8, 256)
        block_sparse_hopper.launch(q, k, k, lists, found, torch.empty_like(q), lse, rows, k_block, how, 0.1)
    q, c = torch.empty(2, 128, 1, 576, dtype=HALF), torch.empty(2, 256, 576, dtype=HALF)
    part, weight = torch.empty(6, 128, 512), torch.empty(6, 128)
    decode_latent_hopper.start(q, c, torch.zeros(2, dtype=torch.int32), None, part, weight, 0.1, 4)
    for code in codes:
        print(json.dumps(shown(code)))


if __name__ == "__main__":
    main()
