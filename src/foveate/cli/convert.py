"""`foveate convert`: a new checkpoint with other attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.options import AsJson, Device, Dtype, ModelName
from foveate.cli.screen import Watcher, print_json, quiet_loading, say
from foveate.errors import BadArgument

ALIASES = {"mla": "transmla", "hybrid": "zebra-llama"}
"""What a conversion may also be called by: what comes out of it."""

EXPORTS = ("deepseek",)


def convert(
    model: ModelName = "smollm2",
    to: Annotated[str, typer.Option("--to", help="Conversion: its id, mla or hybrid; see --list.")] = "",
    out: Annotated[Path | None, typer.Option(help="New folder of the converted model.")] = None,
    kv: Annotated[str, typer.Option(help="Share of the dense cache's bytes per token to come down to: 25%.")] = "",
    rank: Annotated[int | None, typer.Option(help="Rank of the latent, in place of --kv.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Parameter as name=value; may be given several times.")
    ] = None,
    calibration: Annotated[
        str, typer.Option(help='Text file or folder to calibrate and measure on; "docs" is Python\'s documentation.')
    ] = "docs",
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 32_768,
    probe_tokens: Annotated[int, typer.Option(help="Other tokens of the text, to measure each stage on.")] = 4096,
    length: Annotated[int, typer.Option(help="Tokens of a sequence of these texts.")] = 512,
    needles: Annotated[
        int | None, typer.Option(help="Needle prompts to ask after each stage; 0: none. Default: 10, of decoders.")
    ] = None,
    needle_length: Annotated[int, typer.Option(help="Tokens of a needle prompt.")] = 1024,
    heal: Annotated[str, typer.Option(help="Tokens to heal with afterwards: 10M. Needs the extra heal.")] = "",
    heal_text: Annotated[
        Path | None, typer.Option(help="File or folder to heal on. Default: what installed packages document.")
    ] = None,
    heal_sets: Annotated[
        list[str] | None, typer.Option("--heal-set", help="Setting of the healing as name=value, such as lr=3e-4.")
    ] = None,
    export: Annotated[str, typer.Option(help="deepseek: write a stock DeepSeek-V3 checkpoint.")] = "",
    pad: Annotated[
        bool, typer.Option("--pad", help="With --export, fill latents of different ranks up to the largest.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the choice of text and of the healing.")] = 0,
    as_json: AsJson = False,
    listed: Annotated[bool, typer.Option("--list", help="List conversions and their parameters, and stop.")] = False,
) -> None:
    """Change a model's attention for good and save it, with a ladder of what each stage did to it.

    The folder holds the model, ladder.json and report.html. If healing is stopped, the same command goes on with it.
    """
    if listed:
        _print_list(as_json)
        return
    quiet_loading(model)
    from foveate.convert.job import Job
    from foveate.convert.settings import amount_of, parse_settings, share_of
    from foveate.report.conversion import print_ladder, render_conversion
    from foveate.report.html import PAGE

    cls = _chosen(to)
    settings = parse_settings(cls, sets or [])
    for name, value in (("kv", share_of("--kv", kv) if kv else None), ("rank", rank)):
        if value is not None:
            if name in settings:
                raise BadArgument(f"--{name}", value, f"{name} is given by --set as well")
            parse_settings(cls, [f"{name}={value}"], f"--{name}")
            settings[name] = value
    if kv and rank is not None:
        raise BadArgument("--rank", rank, "give --kv or --rank, not both")
    if export and export not in EXPORTS:
        raise BadArgument("--export", export, f"give {' or '.join(EXPORTS)}")
    if pad and not export:
        raise BadArgument("--pad", pad, "it fills up an export; give --export deepseek too")
    if (heal_text is not None or heal_sets) and not heal:
        option, value = (
            ("--heal-text", str(heal_text)) if heal_text is not None else ("--heal-set", (heal_sets or [])[0])
        )
        raise BadArgument(option, value, "give the tokens to heal with too: --heal 10M")
    recipe: dict[str, Any] | None = None
    if heal:
        from foveate.convert.healing.recipe import Recipe

        recipe = {"seed": seed, "tokens": amount_of("--heal", heal)}
        recipe |= parse_settings(Recipe, heal_sets or [], "--heal-set")
        Recipe.of(recipe)
    if out is None:
        raise BadArgument("--out", "", "give a folder for the converted model")

    job = Job(
        model=model,
        to=cls.id,
        settings=settings,
        out=out,
        text=None if calibration == "docs" else calibration,
        calibration_tokens=calibration_tokens,
        probe_tokens=probe_tokens,
        length=length,
        needles=needles,
        needle_length=needle_length,
        heal=recipe,
        heal_text=heal_text,
        export=bool(export),
        pad=pad,
        dtype=dtype,
        device=device,
        seed=seed,
        texts=lambda record: {PAGE: render_conversion(record)},
    )
    try:
        with Watcher(f"convert to {cls.id}") as watch:
            record = job.run(watch)
    except KeyboardInterrupt:
        say(f"stopped: the same command goes on with the healing in {job.work}" if job.resumable else "stopped")
        raise typer.Exit(130) from None
    if as_json:
        print_json(record)
    else:
        print_ladder(record, out / PAGE)


def _chosen(to: str) -> Any:
    """The class of the conversion that is meant."""
    from foveate.convert.base import all_conversions

    known = all_conversions()
    names = sorted({*known, *(alias for alias, name in ALIASES.items() if name in known)})
    name = ALIASES.get(to, to)
    if name not in known:
        raise BadArgument("--to", to, f"give one of {', '.join(names)}; foveate convert --list says what they are")
    return known[name]


def _print_list(as_json: bool) -> None:
    from dataclasses import MISSING, fields
    from typing import get_type_hints

    from foveate.convert.base import all_conversions
    from foveate.convert.settings import type_text

    rows = []
    for name, cls in sorted(all_conversions().items()):
        hints = get_type_hints(cls)
        parameters = [
            {
                "name": field.name,
                "type": type_text(hints[field.name]),
                "default": None if field.default is MISSING else field.default,
            }
            for field in fields(cls)
        ]
        also = [alias for alias, meant in ALIASES.items() if meant == name]
        rows.append({"id": name, "also": also, "takes": cls.takes, "what": cls.what, "parameters": parameters})
    if as_json:
        print_json(rows)
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for row in rows:
        also = f" ({', '.join(row['also'])})" if row["also"] else ""
        console.print(f"[bold]{row['id']}[/bold]{also}: {row['what']}")
        for each in row["parameters"]:
            console.print(f"  --set {each['name']}={each['default']}", style="dim", markup=False)
