"""`foveate bench`: speed and memory beside plain transformers, dense attention and the floor."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from foveate.cli.options import AsJson, whole_numbers
from foveate.cli.screen import print_json, say
from foveate.errors import BadArgument

app = typer.Typer(
    name="bench",
    help="Speed and memory of methods on models of well-known shape, beside dense attention and the floor.",
    no_args_is_help=True,
)

Shape = Annotated[str, typer.Argument(help="Geometry with random weights: llama3-8b, qwen3-8b, deepseek-v2-lite, ...")]
Methods = Annotated[str, typer.Option(help='Methods, compositions, "core" or "all", as for `foveate compare`.')]
Budgets = Annotated[str, typer.Option(help="Budgets, separated by commas; empty: each method's own parameters.")]
Lengths = Annotated[str, typer.Option(help="Context lengths in tokens, separated by commas.")]
Layers = Annotated[int | None, typer.Option(help="Build only so many layers; default: all.")]
Rows = Annotated[int, typer.Option(help="Sequences side by side.")]
DeviceName = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda:1, ...")]
OnCpu = Annotated[bool, typer.Option("--cpu", help="Measure on the processor.")]
Out = Annotated[Path | None, typer.Option(help="Write the record to this JSON file.")]
Steps = Annotated[int, typer.Option(help="Tokens that are timed.")]
Profiled = Annotated[bool, typer.Option("--profile", help="Look which kernels the time of a row goes to.")]
Repeats = Annotated[int, typer.Option(help="Prompts that are timed.")]
Limit = Annotated[float | None, typer.Option(help="Give a row up after so many seconds of prompts and tokens.")]


@app.command()
def decode(
    shape: Shape = "llama3-8b",
    methods: Methods = "core",
    budgets: Budgets = "",
    lengths: Lengths = "32768,131072",
    steps: Steps = 64,
    rows: Rows = 1,
    layers: Layers = None,
    device: DeviceName = "auto",
    cpu: OnCpu = False,
    profile: Profiled = False,
    limit: Limit = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Milliseconds per token inside generate(), behind a context of random keys and values."""
    from foveate.bench.generation import Bench

    _generation("decode", Bench(steps=steps, rows=rows, profile=profile, limit=limit), locals())


@app.command()
def prefill(
    shape: Shape = "llama3-8b",
    methods: Methods = "core",
    budgets: Budgets = "",
    lengths: Lengths = "32768,131072",
    repeats: Repeats = 1,
    rows: Rows = 1,
    layers: Layers = None,
    device: DeviceName = "auto",
    cpu: OnCpu = False,
    profile: Profiled = False,
    limit: Limit = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Seconds for a prompt of random tokens, and the most memory on the way."""
    from foveate.bench.generation import Bench

    _generation(
        "prefill", Bench(prompt=True, repeats=repeats, steps=0, rows=rows, profile=profile, limit=limit), locals()
    )


@app.command()
def e2e(
    shape: Shape = "llama3-8b",
    methods: Methods = "core",
    budgets: Budgets = "",
    lengths: Lengths = "32768,65536,131072",
    repeats: Repeats = 1,
    steps: Steps = 64,
    rows: Rows = 1,
    layers: Layers = None,
    device: DeviceName = "auto",
    cpu: OnCpu = False,
    profile: Profiled = False,
    limit: Limit = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """A prompt and its answer: prefill seconds, decode milliseconds per token, bytes held and peak bytes."""
    from foveate.bench.generation import Bench

    _generation(
        "e2e", Bench(prompt=True, repeats=repeats, steps=steps, rows=rows, profile=profile, limit=limit), locals()
    )


@app.command()
def memory(
    shape: Shape = "llama3-8b",
    methods: Methods = "core",
    budgets: Budgets = "",
    lengths: Lengths = "32768,131072",
    rows: Rows = 1,
    layers: Layers = None,
    device: DeviceName = "auto",
    cpu: OnCpu = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Bytes that are held, and the most that the device held, for a prompt and eight tokens of answer."""
    from foveate.bench.generation import Bench

    _generation("memory", Bench(prompt=True, repeats=1, steps=1, rows=rows), locals())


@app.command()
def kernels(
    families: Annotated[str, typer.Option(help="Separated by commas; default: all that there are.")] = "",
    lengths: Annotated[str, typer.Option(help="Context lengths; default: 32768,131072 on a GPU, 512,2048 else.")] = "",
    heads: Annotated[int | None, typer.Option(help="Query heads; default: 32 on a GPU, 8 else.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key and value heads; default: 8 on a GPU, 2 else.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Head size; default: 128 on a GPU, 64 else.")] = None,
    cold: Annotated[
        bool, typer.Option("--cold/--warm", help="Drive the inputs out of the GPU's L2 cache before each repeat.")
    ] = True,
    repeats: Annotated[int, typer.Option(help="Most repeats of a kernel; slow ones are repeated less often.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    limit: Annotated[float | None, typer.Option(help="Begin nothing new after so many seconds.")] = None,
    device: DeviceName = "auto",
    cpu: OnCpu = False,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(help="Draw times and shares of the floor: .png or .svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Kernels alone: checked against float32, then timed beside dense attention, other libraries and the floor."""
    from foveate.bench import kernels as timed
    from foveate.bench.plot import check_name
    from foveate.bench.plot import plot as draw
    from foveate.bench.record import write
    from foveate.models.placement import enter_device

    given = locals()
    if plot is not None:
        check_name(plot)
    where = enter_device("cpu" if cpu else device)
    names = [name.strip() for name in families.split(",") if name.strip()] or None
    sizes = timed.Sizes.of(
        where,
        lengths=tuple(sorted(set(whole_numbers("lengths", lengths)))) if lengths else None,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
    asked = ("families", "lengths", "heads", "kv_heads", "head_dim", "repeats", "seed", "limit")
    words = ["foveate", "bench", "kernels"]
    for name in asked:
        if given[name] not in (None, ""):
            words += [f"--{name.replace('_', '-')}", str(given[name])]
    words += [word for word, on in (("--warm", not cold), ("--cpu", cpu)) if on]
    how: dict[str, Any] = {"cold": cold, "repeats": repeats, "seed": seed, "limit": limit}
    if out is not None:
        how["keep"] = lambda data: write(out, data)
    data = timed.bench(where, names, sizes=sizes, **how, command=shlex.join(words), watch=say)
    if plot is not None:
        draw(data, plot)
    if as_json:
        print_json(data)
    else:
        _show_kernels(data)


def _generation(kind: str, bench: Any, given: dict[str, Any]) -> None:
    """Run one of the commands above on a model, show it, write it."""
    from foveate.bench.crossing import crossings
    from foveate.bench.record import record, write
    from foveate.engine.apply import find_profiles
    from foveate.errors import FoveateError
    from foveate.evaluate.setting import parse_budgets, parse_methods, settings_of
    from foveate.models.named import named
    from foveate.models.placement import enter_device
    from foveate.models.shape import ModelShape

    lengths = whole_numbers("lengths", given["lengths"])
    if not lengths or min(lengths) < 16:
        raise BadArgument("lengths", given["lengths"], "give lengths of 16 tokens or more")
    for name in ("rows", "steps", "repeats"):
        if given.get(name) is not None and given[name] < 1:
            raise BadArgument(name, given[name], "give 1 or more")
    if given.get("limit") is not None and not given["limit"] > 0:
        raise BadArgument("limit", given["limit"], "give seconds above 0")
    settings = settings_of(parse_methods(given["methods"]), parse_budgets(given["budgets"] or None))
    if any(not setting.reader.whole for setting in settings):
        raise BadArgument("methods", given["methods"], "retrieval reads passages of a text; give attention methods")
    device = enter_device("cpu" if given["cpu"] else given["device"])
    say(f"{given['shape']} with random weights on {device}")
    model = named(given["shape"], layers=given["layers"], device=device)
    geometry = ModelShape.of(model)
    rows: list[dict[str, Any]] = []

    def data() -> dict[str, Any]:
        facts = {"shape": given["shape"], "layers": geometry.num_layers, "crossovers": crossings(rows)}
        return record(kind, _command(kind, given), device, rows, **facts)

    applied = []
    for setting in settings:
        parts = setting.composition.methods
        made = [profile for m in parts if m.needs_profile and (profile := m.stand_in(geometry)) is not None]
        try:
            applied.append((setting.composition, find_profiles(setting.composition, geometry, made)))
        except FoveateError as error:
            rows += [{"method": setting.method, "length": n, "refused": str(error)} for n in lengths]
    for row in bench.run(model, applied, lengths, say):
        rows.append(row.as_json())
        if given["out"] is not None:  # after each row, so that a run that is cut short leaves those before
            write(given["out"], data())
    if given["as_json"]:
        print_json(data())
    else:
        _show(kind, data())


def _command(kind: str, given: dict[str, Any]) -> str:
    """The command that measures the same again; where it writes to is no part of that."""
    words = ["foveate", "bench", kind, given["shape"]]
    for name in ("methods", "budgets", "lengths", "repeats", "steps", "rows", "layers", "limit"):
        if given.get(name) not in (None, ""):
            words += [f"--{name}", str(given[name])]
    return shlex.join([*words, *(f"--{name}" for name in ("cpu", "profile") if given.get(name))])


_COLUMNS: dict[str, Sequence[tuple[str, str, float, str]]] = {
    "prefill": [("prefill s", "prefill_ms", 1e-3, ".3f"), ("peak GB", "prefill_peak_bytes", 1e-9, ".2f")],
    "decode": [
        ("ms/token", "decode_ms", 1, ".2f"),
        ("floor", "decode_floor_ms", 1, ".2f"),
        ("x floor", "decode_of_floor", 1, ".2f"),
        ("read GB", "read_bytes", 1e-9, ".3f"),
    ],
    "held": [("held GB", "kv_bytes", 1e-9, ".3f"), ("peak GB", "peak_bytes", 1e-9, ".2f")],
}
_SHOWN = {
    "prefill": ["prefill"],
    "decode": ["decode", "held"],
    "e2e": ["prefill", "decode", "held"],
    "memory": ["prefill", "held"],
}


def _show(kind: str, data: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from foveate.bench.crossing import sentence

    columns = [column for group in _SHOWN[kind] for column in _COLUMNS[group]]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{data['shape']} on {data['device']}")
    table.add_column("method", no_wrap=True)
    table.add_column("tokens", justify="right")
    for title, *_ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row in data["rows"]:
        cells = [format(row[key] * unit, how) if row.get(key) else "-" for _, key, unit, how in columns]
        table.add_row(row["method"], str(row["length"]), *cells)
    console = Console()
    console.print(table)
    for row in data["rows"]:
        note = row.get("refused") or (f"steps not recorded: {row['why_not']}" if row.get("why_not") else "")
        if note:
            console.print(f"{row['method']}, {row['length']} tokens: {note}", style="dim")
        for line in _where(row):
            console.print(f"{row['method']}, {row['length']} tokens, {line}", highlight=False)
    shortest = min(row["length"] for row in data["rows"])
    for found in data["crossovers"]:
        console.print(sentence(found, shortest), highlight=False)


def _where(row: dict[str, Any], most: int = 5) -> Iterator[str]:
    """What the time of a row went to, the prompt and a token a line each."""
    for name, part in (("prefill", "prompt"), ("decode", "token")):
        if work := row.get(f"{name}_profile"):
            wall = work["device_ms"] + work["idle_ms"]
            spent = [*((each["name"], each["ms"]) for each in work["kernels"][:most]), ("idle", work["idle_ms"])]
            shares = (f"{what} {ms:,.3f} ms ({ms / wall:.0%})" for what, ms in spent)
            yield f"{part}: {', '.join(shares)}; {work['launches']:,.0f} launches"
    if row.get("unprofiled"):
        yield f"no profile: {row['unprofiled']}"


_KERNELS: list[tuple[str, str, float, str]] = [
    ("ms", "ms", 1, ".4g"),
    ("20 %", "ms_low", 1, ".4g"),
    ("80 %", "ms_high", 1, ".4g"),
    ("floor", "floor_ms", 1, ".3g"),
    ("of floor", "floor_share", 100, ".0f"),
    ("x dense", "times_dense", 1, ".2f"),
    ("of ideal", "of_ideal", 100, ".0f"),
]


def _show_kernels(data: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{data['sizes']}, on {data['device']}")
    for title in ("case", "kernel"):
        table.add_column(title)
    table.add_column("tokens", justify="right")
    for title, *_ in _KERNELS:
        table.add_column(title, justify="right", no_wrap=True)
    for row in data["rows"]:
        if row.get("ms"):
            cells = [
                format(row[key] * unit, how) + (" %" if unit == 100 else "") if row.get(key) else "-"
                for _, key, unit, how in _KERNELS
            ]
            table.add_row(f"{row['family']}: {row['case']}", row["kernel"], str(row["length"]), *cells)
    console.print(table)
    bounds = {(row["case"], row["length"]): row["tiles"] for row in data["rows"] if row.get("tiles")}
    for (case, length), tiles in bounds.items():
        by_pairs, by_tiles, filled = (tiles[f"{kind}speed_up"] for kind in ("pair_", "", "gathered_"))
        console.print(
            f"{case}, {length} tokens: pairs allow {by_pairs:.1f} x, "
            f"tiles of {tiles['q']} x {tiles['k']} {by_tiles:.1f} x, filled with listed keys {filled:.1f} x",
            highlight=False,
        )
    for row in data["rows"]:
        if row.get("refused"):
            console.print(f"{row['case']}, {row['length']} tokens, {row['kernel']}: {row['refused']}", style="dim")
    if data["absent"]:
        console.print(f"not installed: {', '.join(data['absent'])}", style="dim")
