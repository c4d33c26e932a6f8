"""Save a converted model with its tokenizer and its ladder: a whole folder, or none."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import BadArgument, FoveateError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LADDER = "ladder.json"
"""In the folder of a converted model: how it was made and what was measured on the way."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MARGIN = 64 << 20  # for the tokenizer and what a file system needs of its own


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
    ladder: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write the model as a folder that transformers opens, all of it or nothing.

    The files are written beside the folder and get its name when all of them are on the disk. Weights are safetensors.

    Args:
        model: any transformers model. One of a converted type is opened by `foveate.load`, or by AutoModelForCausalLM
            once `foveate.register_models()` was called.
        folder: new or empty; folders above it are made.
        ladder: plain JSON, written as `ladder.json`.
        texts: further files by name.

    Raises:
        BadArgument: the folder holds something, is a file, or cannot be written to.
        FoveateError: the disk is full.
    """
    folder = Path(folder)
    check_free(folder)
    with staged(folder, weight_bytes(model)) as partial:
        with _without_bar():
            model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if ladder is not None:
            (partial / LADDER).write_text(json.dumps(ladder, indent=1, allow_nan=False), encoding="utf-8")
        for name, text in (texts or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
    return folder


def check_free(folder: Path, argument: str = "out") -> None:
    """Refuse a place where no model can be saved, before any work is done.

    Raises:
        BadArgument: the folder holds something, is a file, or lies where nothing can be written.
    """
    if folder.is_dir():
        if next(folder.iterdir(), None) is not None:
            raise BadArgument(argument, str(folder), "the folder is not empty; give a new or an empty one")
    elif folder.exists() or folder.is_symlink():
        raise BadArgument(argument, str(folder), "this is a file; give a folder")
    above = folder.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise BadArgument(argument, str(folder), f"nothing can be written in {above}; give another folder")


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model's weights; tied ones are counted once."""
    held = {tensor.data_ptr() or id(tensor): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(held.values())


@contextmanager
def staged(folder: Path, space: int = 0) -> Iterator[Path]:
    """A new folder beside `folder` that gets its name at the end; after any failure nothing of it is left.

    Args:
        space: bytes that are about to be written; if so many are not free, nothing is begun.

    Raises:
        BadArgument: the folder cannot be written, or holds something when all is ready.
        FoveateError: the disk is full.
    """
    partial = folder.parent / f"{_prefix(folder)}{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        free = shutil.disk_usage(folder.parent).free
        if free < space + _MARGIN:
            raise FoveateError(
                f"{folder}: no space left to write {space / 1e6:,.0f} MB ({free / 1e6:,.0f} MB are free); free some "
                f"and run the same command again"
            )
        partial.mkdir()
        yield partial
        _sync(partial)
        partial.rename(folder)
        _sync_folder(folder.parent)
    except FoveateError:
        raise
    except Exception as error:
        raise _explained(folder, error) or error from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Without transformers' bar over the files of weights, which stands between a program and its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _prefix(folder: Path) -> str:
    """Of the names under which this machine's processes write the folder."""
    return f".{folder.name}.partial-{socket.gethostname()}-"


def _remove_leftovers(folder: Path) -> None:
    """What a killed process of this machine has left."""
    for leftover in folder.parent.iterdir():
        number = leftover.name.removeprefix(_prefix(folder))
        if leftover.name == number or not number.isdecimal():
            continue
        if int(number) == os.getpid() or not _alive(int(number)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(process: int) -> bool:
    if os.name == "nt":
        return True  # there the signal 0 is no question
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(folder: Path) -> None:
    """Put every file on the disk: a rename alone can survive a power cut that its content does not."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # no handle of a folder can be had
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explained(folder: Path, error: Exception) -> FoveateError | None:
    """A failure of the disk as one line; None for what is none. safetensors passes such errors on as text only."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        number = next((code for code in _FULL if f"os error {code}" in str(error)), None)
    if number in _FULL:
        return FoveateError(f"{folder}: no space left to write; free some and run the same command again")
    if number in (errno.ENOTEMPTY, errno.EEXIST):
        return BadArgument("out", str(folder), "something was put there meanwhile; give a new or an empty folder")
    if isinstance(error, OSError):
        return BadArgument("out", str(folder), f"cannot be written ({error.strerror}); give another folder")
    return None
