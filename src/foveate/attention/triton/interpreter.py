"""Triton's interpreter, in which kernels are tested where there is no GPU, mended for the NumPy of today."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton import knobs


def mend() -> None:
    """Mend what kernels here need. Does nothing unless TRITON_INTERPRET is set.

    Loop bounds are kept in arrays of one number, which NumPy 2.4 takes for no integers any more. Bfloat16 is kept as
    its bits, which a matrix product takes for whole numbers, and is cut off instead of rounded.
    """
    if not knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    given = interpreter._patch_lang_tensor
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "mended", False):
        return
    builder.mended = True

    def patch(tensor: Any, scope: Any) -> None:
        given(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(x: Any) -> Any:
        return interpreter.TensorHandle(_unpacked(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widened(a), widened(b), *others)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16:
            wide = src if src.dtype.scalar == tl.float32 else cast(self, widened(src), tl.float32)
            return interpreter.TensorHandle(_packed(wide.data), tl.bfloat16)
        return cast(self, widened(src), dst_type)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _unpacked(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _packed(x: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)
