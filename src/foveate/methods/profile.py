"""Profiles: what calibration produced, as one small file that travels with the model."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from foveate.errors import BadArgument
from foveate.methods.base import Profile
from foveate.methods.declared import ARBITRARY
from foveate.models.shape import ModelShape


def fingerprint(shape: ModelShape) -> str:
    """What a profile must share with a model: its geometry, not its weights' precision."""
    facts = [shape.family, shape.hidden_size, shape.vocab_size]
    facts += [(x.kind, x.num_heads, x.num_kv_heads, x.head_dim, x.window) for x in shape.layers]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return f"{shape.family}-{len(shape.layers)}x{shape.hidden_size}-{digest}"


def made_up(
    method: str, shape: ModelShape, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> Profile:
    """A profile with arbitrary numbers (`Method.stand_in`), which says so."""
    return Profile(method, fingerprint(shape), data, {"made": ARBITRARY}, tensors or {})


def save_profile(profile: Profile, path: str | os.PathLike[str]) -> Path:
    """Write a profile as JSON; the file appears whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(to_json(profile), indent=1) + "\n")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def to_json(profile: Profile) -> dict[str, Any]:
    """A profile as JSON values; tensors as safetensors in base64."""
    raw: dict[str, Any] = {
        "format": 1,
        "method": profile.method,
        "model": profile.model,
        "data": dict(profile.data),
        "provenance": dict(profile.provenance),
    }
    if profile.tensors:
        whole = save({name: tensor.contiguous() for name, tensor in profile.tensors.items()})
        raw["tensors"] = base64.b64encode(whole).decode("ascii")
    return raw


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile file.

    Raises:
        BadArgument: if there is no such file or it is no profile.
    """
    try:
        raw = json.loads(Path(path).read_text())
        return from_json(raw)
    except OSError as error:
        raise BadArgument("profile", str(path), f"cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, SafetensorError):
        raise BadArgument("profile", str(path), "is not a Foveate profile; make one with `foveate calibrate`") from None


def from_json(raw: dict[str, Any]) -> Profile:
    """Inverse of `to_json`."""
    tensors = load(base64.b64decode(raw["tensors"], validate=True)) if "tensors" in raw else {}
    return Profile(raw["method"], raw["model"], raw["data"], raw.get("provenance", {}), tensors)


def built_in_profile(method: str, shape: ModelShape) -> Profile | None:
    """The profile that ships with the package for this model, if there is one."""
    wanted = fingerprint(shape)
    folder = resources.files("foveate.methods") / "profiles"
    if not folder.is_dir():
        return None
    for entry in folder.iterdir():
        if entry.name.startswith(f"{method}.") and entry.name.endswith(".json"):
            profile = from_json(json.loads(entry.read_text()))
            if profile.model == wanted:
                return profile
    return None
