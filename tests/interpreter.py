"""Triton's interpreter, quicker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any


def quicken() -> None:
    """It looks through its whole language anew for each function that a kernel calls, in each program: two fifths of
    the time of a kernel's test. Once for each launch and module is enough.

    Does nothing where there is no Triton, or one that is built in another way.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "GridExecutor")):
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen: set[int] = set()

    def patch_new(fn: Any) -> Any:
        """What a launch changes in the language, it takes back at its end; its inner functions change the same."""
        module = id(fn.__globals__)
        if module in seen:
            return interpreter._LangPatchScope()
        seen.add(module)
        return patch(fn)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, launched


@contextmanager
def unchecked() -> Iterator[None]:
    """Integers are not computed a second time to see whether they fit: a quarter of what is left."""
    try:
        from triton.runtime.interpreter import interpreter_builder as builder
    except ImportError:
        yield
        return
    known = builder.options
    builder.options = replace(known, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.options = known
