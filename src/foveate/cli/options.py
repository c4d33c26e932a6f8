"""Arguments that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from foveate.errors import BadArgument

ModelName = Annotated[
    str, typer.Argument(help="Built-in model, folder, .gguf file or model id of the Hugging Face hub.")
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float32 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Devices = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...; spread: the layers over all GPUs.")]
Ray = Annotated[
    str,
    typer.Option(
        help="Spread the work with Ray over this machine's GPUs or cores, or those of the cluster at an address."
    ),
]
RayWorkers = Annotated[
    int | None, typer.Option(help="With --ray, at most so many workers. Default: one per GPU or core.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]


def whole_numbers(argument: str, text: str) -> tuple[int, ...]:
    """`"1024,2048"` as numbers.

    Raises:
        BadArgument: something in it is no whole number.
    """
    numbers = []
    for part in text.split(","):
        if part.strip():
            try:
                numbers.append(int(part))
            except ValueError:
                raise BadArgument(argument, part.strip(), "give whole numbers separated by commas") from None
    return tuple(numbers)


def with_ray_named(words: Sequence[str]) -> list[str]:
    """A bare `--ray` as `--ray local`; what follows it is taken where it could be an address (host:port, auto)."""
    found: list[str] = []
    for number, word in enumerate(words):
        found.append(word)
        following = words[number + 1] if number + 1 < len(words) else ""
        address = following in ("auto", "local") or (":" in following and not following.startswith("-"))
        if word == "--ray" and not address:
            found.append("local")
    return found
