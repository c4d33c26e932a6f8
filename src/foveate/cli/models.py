"""`foveate models`: the models that come along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.cli.options import AsJson
from foveate.cli.screen import print_json


def models(as_json: AsJson = False) -> None:
    """List the built-in models: size, license, and whether they are in the cache directory already."""
    from foveate.models import BUILTIN

    rows = [entry(name, model) for name, model in BUILTIN.items()]
    if as_json:
        print_json(rows)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("name", "description", "license", "download", "on disk", "state"):
        table.add_column(name, no_wrap=name != "description")
    for row in rows:
        table.add_row(
            row["name"],
            row["description"],
            row["license"],
            f"{row['download_bytes'] / 1e6:.0f} MB",
            f"{row['disk_bytes'] / 1e6:.0f} MB",
            "ready" if row["cached"] else "made at first use",
        )
    console = Console()
    console.print(table)
    console.print(
        "Folders, .gguf files and model ids of the Hugging Face hub can be given in their place.", style="dim"
    )


def entry(name: str, model: Any) -> dict[str, Any]:
    """One built-in model as JSON values."""
    folder = cached(model)
    return {
        "name": name,
        "description": model.description,
        "license": model.licence,
        "download_bytes": model.bytes,
        "disk_bytes": model.disk_bytes,
        "cached": folder is not None,
        "folder": None if folder is None else str(folder),
    }


def cached(model: Any) -> Path | None:
    """Where the converted model lies; an entry of the cache appears whole or not at all."""
    from foveate.models.artifacts import cache_root
    from foveate.models.gguf_weights import key

    folder = cache_root() / "models" / key(model.gguf_sha256)
    return folder if folder.is_dir() else None
