"""Tensors in a folder of safetensors files, read and written one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foveate.errors import BadArgument

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class TensorFolder(Mapping[str, Tensor]):
    """What the safetensors files of a checkpoint hold, by name; a tensor is read when it is asked for, and not kept.

    Of a folder, the files that its index lists; without an index `model.safetensors`; without that all there are.

    Args:
        source: a folder, or one file.
        argument: what errors call it.

    Raises:
        BadArgument: no such files, files that cannot be read, or a tensor that two files hold.
    """

    def __init__(self, source: str | Path, argument: str = "folder") -> None:
        self.source, self._argument = Path(source), argument
        self._files: dict[str, Any] = {}
        self._places: dict[str, Path] = {}
        for path in self._listed():
            try:
                self._files[path.name] = opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise BadArgument(argument, str(path), f"cannot be read ({error})") from error
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                if name in self._places:
                    raise BadArgument(argument, str(path), f"{name} is in {self._places[name].name} as well")
                self._places[name] = path

    def _listed(self) -> list[Path]:
        if self.source.is_file():
            return [self.source]
        paths = sorted(self.source.glob("*.safetensors"))
        if (self.source / INDEX).is_file():
            listed = set(json.loads((self.source / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(listed - {path.name for path in paths})
            if missing:
                raise BadArgument(self._argument, str(self.source), f"{missing[0]} is missing, which {INDEX} lists")
            paths = [path for path in paths if path.name in listed]
        elif (self.source / WHOLE).is_file():
            paths = [self.source / WHOLE]
        if not paths:
            raise BadArgument(self._argument, str(self.source), "no *.safetensors there; give a folder of a checkpoint")
        return paths

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._places[name].name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def files(self) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
        """By file, what it holds: names, dtypes as safetensors calls them, and shapes."""
        held: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {name: [] for name in self._files}
        for name, path in self._places.items():
            held[path.name].append((name, self._slice(name).get_dtype(), self.shape(name)))
        return held

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(
            (self.source if self.source.is_file() else self.source / name).stat().st_size for name in self._files
        )

    def _slice(self, name: str) -> Any:
        return self._files[self._places[name].name].get_slice(name)


def write_tensors(path: Path, layout: list[tuple[str, str, tuple[int, ...]]], tensor: Callable[[str], Tensor]) -> None:
    """Write a safetensors file of which never more than one tensor is in memory.

    Args:
        layout: names, dtypes as safetensors calls them, and shapes.
        tensor: gives each when its turn comes.
    """
    # Wide dtypes first, so that every tensor is aligned, which readers that map the file into memory like.
    layout = sorted(layout, key=lambda entry: (-_DTYPES[entry[1]].itemsize, entry[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in layout:
        begin, end = end, end + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in layout:
            value = tensor(name)
            if value.dtype != _DTYPES[dtype] or tuple(value.shape) != shape:
                raise BadArgument(name, f"{value.dtype} {tuple(value.shape)}", f"the layout has {dtype} {shape}")
            file.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
