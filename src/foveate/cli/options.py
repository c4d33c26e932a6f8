"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate.errors import BadArgument

ModelName = Annotated[
    str, typer.Argument(help="Built-in model, folder, .gguf file or model id of the Hugging Face hub.")
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float32 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
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
