"""`foveate calibrate`: make the profile that a method needs on a model."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.options import AsJson, Device, Dtype, ModelName
from foveate.cli.screen import Watcher, print_json, quiet_loading, say
from foveate.errors import BadArgument


def calibrate(
    ctx: typer.Context,
    model: ModelName,
    method: Annotated[str, typer.Option("--for", help='The method, "name" or "name(parameter=value)".')],
    out: Annotated[Path, typer.Option(help="The profile's file.")],
    seed: Annotated[int, typer.Option(help="Seed of the texts and of the training.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Calibrate a method on a model and save the profile, to be given to compare and show by --profile.

    What the method's calibration can be told besides is given as options of their own, such as --steps 100.
    """
    quiet_loading(model)
    from foveate.evaluate.setting import parse_one
    from foveate.methods.profile import save_profile

    chosen = parse_one(method)
    arguments = calibration_arguments(chosen, ctx.args)
    if not chosen.calibrated:
        raise BadArgument("--for", chosen.id, "this method needs no calibration")
    if out.is_dir() or not _writable(out):
        raise BadArgument("out", str(out), "give a file that can be written")
    with Watcher(f"calibrate {chosen.id}") as watch:
        watch(0, 0, "loading")
        from foveate.models import load
        from foveate.models.placement import one_device

        opened = load(model, dtype=dtype, device=one_device(device, "a calibration"))
        profile = chosen.calibrate(Workbench(opened.model, opened.tokenizer, seed, watch), **arguments)
    save_profile(profile, out)
    if as_json:
        print_json(
            {
                "method": profile.method,
                "model": profile.model,
                "file": str(out),
                "provenance": dict(profile.provenance),
            }
        )
    else:
        say(f"{profile.method} on {profile.model}: {out} ({profile.provenance.get('seconds', '?')} s)")


@dataclasses.dataclass
class Workbench:
    """What a calibration may use: the model, its tokenizer, a seed and a progress bar."""

    model: Any
    tokenizer: Any
    seed: int
    watch: Watcher

    def progress(self, total: int, label: str) -> Callable[[int, str], None]:
        """A bar of `total` steps; the result is called with the steps made since the last call, and how it goes."""
        done = 0

        def report(steps: int, how: str) -> None:
            nonlocal done
            done += steps
            self.watch(done, total, f"{label}, {how}" if how else label)

        report(0, "")
        return report


def calibration_arguments(method: Any, words: Sequence[str]) -> dict[str, Any]:
    """`["--steps", "100"]` as the keyword arguments of the method's `calibrate`.

    A keyword whose type is a dataclass (a recipe) is given by the options named after its fields.

    Raises:
        BadArgument: an option that this calibration does not have, or one without a value.
    """
    options = _pairs(words)
    hints = typing.get_type_hints(type(method).calibrate)
    keywords = [p.name for p in inspect.signature(method.calibrate).parameters.values() if p.kind is p.KEYWORD_ONLY]
    arguments: dict[str, Any] = {}
    known: list[str] = []
    for keyword in keywords:
        recipe = _dataclass_in(hints[keyword])
        names = [keyword] if recipe is None else [f.name for f in dataclasses.fields(recipe)]
        known += names
        given = {name: options.pop(name) for name in names if name in options}
        if given:
            arguments[keyword] = given[keyword] if recipe is None else recipe(**given)
    for name, value in options.items():
        choices = ", ".join(f"--{each.replace('_', '-')}" for each in known) or "no options of its own"
        raise BadArgument(f"--{name.replace('_', '-')}", value, f"the calibration of {method.id} has {choices}")
    return arguments


def _dataclass_in(hint: Any) -> Any:
    """The dataclass of an annotation such as `Recipe | None`."""
    return next((each for each in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(each)), None)


def _pairs(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            raise BadArgument("arguments", word, "there is no such argument")
        if not equals:
            if not rest:
                raise BadArgument(name, "", "give a value")
            value = rest.pop(0)
        try:
            found[name[2:].replace("-", "_")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name[2:].replace("-", "_")] = value
    return found


def _writable(out: Path) -> bool:
    """Whether a file of this name can be made, told without making one."""
    folder = out.parent
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)
