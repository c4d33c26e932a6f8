"""`foveate show`: what a method computes, holds and reads on a prompt, as characters, picture or numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.options import AsJson, Device, Dtype
from foveate.cli.screen import print_json, quiet_loading
from foveate.errors import BadArgument, FoveateError

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.evaluate.trace import Trace

SHADES = " .:-=+*#%@"
WIDTH = 64


def show(
    method: Annotated[str, typer.Argument(help='Name, "A|B" to compose, or "kivi(bits=2)" to set parameters.')],
    model: Annotated[str, typer.Option(help="Built-in model, folder, .gguf file or hub id.")] = "smollm2",
    budget: Annotated[str, typer.Option(help="0.25, 1024 or 64MB; default: the method's own parameters.")] = "",
    length: Annotated[int | None, typer.Option(help="Tokens of the sample that is shown; default 1024.")] = None,
    prompt: Annotated[str, typer.Option(help="A text, or a file that holds it; default: a needle in a haystack.")] = "",
    layer: Annotated[int | None, typer.Option(help="Layer of the prompt's picture; default: the sparsest.")] = None,
    head: Annotated[int | None, typer.Option(help="Query head of it; default: the mean over the layer.")] = None,
    profile: Annotated[list[Path] | None, typer.Option(help="Calibration file; may be given several times.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the pictures to this file.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw the selection that a method makes on a prompt.

    Three maps: the pairs computed inside the prompt, the positions held when it is over, and those that the next token
    reads. A map that is full is said in a line instead.
    """
    quiet_loading(model)
    from foveate.engine.apply import apply
    from foveate.evaluate.record import DENSE
    from foveate.evaluate.setting import bind, check, open_profiles, parse_budgets, parse_methods, settings_of
    from foveate.evaluate.trace import trace
    from foveate.models import load
    from foveate.models.placement import one_device
    from foveate.models.shape import ModelShape

    entries = [entry for entry in parse_methods(method) if entry.named]
    if len(entries) > 2 or (len(entries) == 1 and method.strip() != DENSE):
        raise BadArgument("method", method, "give one method or one composition")
    if not entries[-1].reader.whole:
        raise BadArgument(
            "method", method, f"{entries[-1].reader.id} chooses text before any token is read; give methods"
        )
    (setting,) = settings_of(entries[-1:], parse_budgets(budget))[:1]
    if budget and setting.budget is None:
        raise BadArgument("budget", budget, f"{setting.method} takes none here; its own parameters decide")
    opened = load(model, dtype=dtype, device=one_device(device, "a drawing"))
    shape = ModelShape.of(opened.model)
    ids, evidence = _prompt(opened.tokenizer, prompt, length, shape.max_positions)
    _check_place(shape, layer, head)
    with apply(opened.model, DENSE) as handle:
        bound = bind(handle, setting, open_profiles(profile or (), [setting], shape))
        bound = check(bound, shape, [len(ids)])
        if bound.binding is None:
            raise FoveateError(bound.refused or "refused")
        drawn = next(each.index for each in shape.layers if each.kind != "other") if layer is None else layer
        found = trace(opened.model, shape, bound.binding, ids, layer=drawn, head=head)
        sparsest = _sparsest(found)
        if layer is None and sparsest != drawn:
            found = trace(opened.model, shape, bound.binding, ids, layer=sparsest, head=head)
    if png is not None:
        _write_png(found, setting.label, png)
    if as_json:
        print_json(_as_json(found, setting, model, evidence))
        return
    for line in text(found, setting.label, evidence):
        print(line)
    if png is not None:
        print(f"\npicture: {png}")


def _prompt(
    tokenizer: Any, prompt: str, length: int | None, positions: int
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Tokens of the prompt, and where its needle stands."""
    from foveate.tasks import task

    if not prompt:
        sample = task("niah_single_2").generate(tokenizer, length or 1024, 1)[0]
        if (length or 1024) > positions:
            raise BadArgument("length", length or 1024, f"the model has {positions} positions; give at most that")
        return [*sample.context_ids, *sample.question_ids], sample.evidence
    path = Path(prompt)
    try:
        words = path.read_text(encoding="utf-8") if len(prompt) < 256 and path.is_file() else prompt
    except (OSError, UnicodeDecodeError) as error:
        raise BadArgument("prompt", prompt, f"cannot be read as text ({error})") from None
    ids = list(tokenizer(words)["input_ids"])
    limit = min(positions, length or positions)
    if len(ids) < 2:
        raise BadArgument("prompt", prompt, "give a text of at least two tokens")
    if len(ids) > limit:
        raise BadArgument("prompt", f"{len(ids)} tokens", f"longer than {limit} tokens; shorten it or raise --length")
    return ids, ()


def _check_place(shape: Any, layer: int | None, head: int | None) -> None:
    if layer is not None and not 0 <= layer < shape.num_layers:
        raise BadArgument("layer", layer, f"choose one of 0..{shape.num_layers - 1}")
    heads = shape.layers[layer or 0].num_heads
    if head is not None and not 0 <= head < heads:
        raise BadArgument("head", head, f"choose one of 0..{heads - 1}")


def _sparsest(found: Trace) -> int:
    """The layer that computed the smallest share of its prompt."""
    import torch

    return int(torch.nan_to_num(found.density, nan=1.0).mean(1).argmin())


# -- text --------------------------------------------------------------------------------------------------------------


def text(found: Trace, label: str, evidence: Sequence[tuple[int, int]]) -> Iterator[str]:
    """The maps in characters, line by line."""
    tokens = found.tokens
    layers = [each.index for each in found.shape.layers if each.kind != "other"]
    yield f"{label} on {found.shape.name}, {tokens} tokens"
    yield ""
    density = float(found.density[layers].nanmean())
    if density > 1 - 1e-9:
        yield "prompt: every pair is computed"
    else:
        who = "mean of its heads" if found.head is None else f"head {found.head}"
        yield f"prompt: {density:.1%} of the pairs are computed; layer {found.layer}, {who}"
        yield "  rows: queries from first to last; columns: keys; share computed: . (none) to @ (all)"
        for line in found.picture.tolist()[:: max(1, found.picture.shape[0] // 32)]:
            yield "  " + "".join(" " if share != share else SHADES[1:][round(share * 8)] for share in line).rstrip()
    yield ""
    held = _held_share(found)
    if held > 1 - 1e-9:
        yield f"held: every position, {found.nbytes / found.dense_nbytes:.1%} of the dense bytes after one token more"
    else:
        yield f"held: {held:.1%} of the positions, {found.nbytes / found.dense_nbytes:.1%} of the dense bytes"
        yield from _strip(found.held, layers, [found.shape.layers[i].store_heads for i in layers], "kv heads", evidence)
    yield ""
    read = _read_share(found)
    if read > 1 - 1e-9:
        yield "next token: reads every position"
    else:
        yield f"next token: reads {read:.1%} of the positions"
        yield from _strip(
            found.read, layers, [found.shape.layers[i].num_heads for i in layers], "query heads", evidence
        )


def _held_share(found: Trace) -> float:
    heads = [each.store_heads for each in found.shape.layers if each.kind != "other"]
    return float(found.held.sum()) / (sum(heads) * found.tokens)


def _read_share(found: Trace) -> float:
    heads = [each.num_heads for each in found.shape.layers if each.kind != "other"]
    return float(found.read.sum()) / (sum(heads) * (found.tokens + 1))


def _strip(
    flags: Tensor, layers: Sequence[int], heads: Sequence[int], who: str, evidence: Sequence[tuple[int, int]]
) -> Iterator[str]:
    """Layers as rows, stretches of positions as columns, the share of heads as shade."""
    tokens = flags.shape[-1]
    width = min(WIDTH, tokens)
    edges = [round(i * tokens / width) for i in range(width + 1)]
    yield f"  rows: layers; columns: positions from first to last; share of {who}: . (few) to @ (all)"
    for layer, count in zip(layers, heads, strict=True):
        row = flags[layer, :count].double()
        cells = [float(row[:, a:b].mean()) for a, b in pairwise(edges)]
        marks = "".join(SHADES[0 if share == 0 else 1 + min(8, int(share * 9))] for share in cells)
        yield f"  {layer:3d} |{marks}|"
    if evidence:
        marked = {i for i in range(width) for start, stop in evidence if edges[i] < stop and start < edges[i + 1]}
        yield "       " + "".join("^" if i in marked else " " for i in range(width)).rstrip() + "  the needle"


# -- picture and numbers -----------------------------------------------------------------------------------------------


def _write_png(found: Trace, label: str, path: Path) -> None:
    """The three maps side by side."""
    import io

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from foveate.evaluate.record import write_atomically

    layers = [each.index for each in found.shape.layers if each.kind != "other"]
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(1, 3)
    who = "mean of heads" if found.head is None else f"head {found.head}"
    square = (0, found.tokens, found.tokens, 0)
    strip_axes = ("position", "layer", (0, found.tokens, len(layers) - 0.5, -0.5))
    maps = [
        (found.picture.numpy(), f"prompt: pairs computed\nlayer {found.layer}, {who}", "key", "query", square),
        (_shares(found.held, layers, "store_heads", found), "held after the prompt\nshare of kv heads", *strip_axes),
        (_shares(found.read, layers, "num_heads", found), "read by the next token\nshare of query heads", *strip_axes),
    ]
    for axis, (cells, title, x, y, extent) in zip(axes, maps, strict=True):
        drawn = axis.imshow(cells, aspect="auto", vmin=0, vmax=1, interpolation="nearest", extent=extent)
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(drawn, ax=axes, label="share")
    figure.suptitle(f"{label} · {found.shape.name} · {found.tokens} tokens")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    write_atomically(path, data.getvalue())


def _shares(flags: Tensor, layers: Sequence[int], heads: str, found: Trace) -> Any:
    import numpy as np

    counts = [getattr(found.shape.layers[layer], heads) for layer in layers]
    return np.stack([flags[layer, :n].float().mean(0).numpy() for layer, n in zip(layers, counts, strict=True)])


def _as_json(found: Trace, setting: Any, model: str, evidence: Sequence[tuple[int, int]]) -> dict[str, Any]:
    layers = [each for each in found.shape.layers if each.kind != "other"]
    return {
        "method": setting.method,
        "settings": setting.settings,
        "budget": setting.budget,
        "model": model,
        "tokens": found.tokens,
        "evidence": [list(span) for span in evidence],
        "bytes": found.nbytes,
        "dense_bytes": found.dense_nbytes,
        "prompt": {
            "share": float(found.density[[each.index for each in layers]].nanmean()),
            "layers": [_row(each.index, found.density[each.index, : each.num_heads].tolist()) for each in layers],
            "picture": {
                "layer": found.layer,
                "head": found.head,
                "cells": [[None if x != x else round(x, 4) for x in row] for row in found.picture.tolist()],
            },
        },
        "held": {
            "share": _held_share(found),
            "layers": [
                _row(each.index, [_ranges(found.held[each.index, head]) for head in range(each.store_heads)])
                for each in layers
            ],
        },
        "read": {
            "share": _read_share(found),
            "layers": [
                _row(each.index, [_ranges(found.read[each.index, head]) for head in range(each.num_heads)])
                for each in layers
            ],
        },
    }


def _row(layer: int, heads: list[Any]) -> dict[str, Any]:
    return {"layer": layer, "heads": heads}


def _ranges(flags: Tensor) -> list[list[int]]:
    """Positions as [start, stop) stretches."""
    positions = flags.nonzero().flatten().tolist()
    stretches: list[list[int]] = []
    for position in positions:
        if stretches and stretches[-1][1] == position:
            stretches[-1][1] += 1
        else:
            stretches.append([position, position + 1])
    return stretches
