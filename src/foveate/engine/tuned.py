"""Tuned files: methods with their settings for one model, as `foveate tune` writes them and `apply` takes them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.errors import BadArgument
from foveate.methods.base import METHODS, Composition, Method, Profile
from foveate.methods.profile import fingerprint, from_json, to_json
from foveate.models.shape import ModelShape

KIND = "foveate tuned"
FORMAT = 1


@dataclass(frozen=True)
class Tuned:
    """What a tuned file holds.

    Args:
        composition: the methods, every setting in them.
        model: fingerprint of the model it was tuned on.
        profiles: calibration that its methods need and that does not ship with the package.
        evidence: what was measured, for people; nothing reads it.
    """

    composition: Composition
    model: str
    profiles: Sequence[Profile] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The file's JSON values."""
        return {
            "kind": KIND,
            "format": FORMAT,
            "model": self.model,
            "methods": [{"id": m.id, "settings": m.settings()} for m in self.composition.methods],
            "profiles": [to_json(profile) for profile in self.profiles],
            "evidence": dict(self.evidence),
        }

    def check(self, shape: ModelShape, path: str | os.PathLike[str]) -> None:
        """Raise BadArgument if the model is another one than the file is for."""
        if self.model != fingerprint(shape):
            mend = f"it was tuned on {self.model}, this model is {fingerprint(shape)}; run `foveate tune` on this one"
            raise BadArgument("method", str(path), mend)


def is_file(method: object) -> bool:
    """Whether a method is given as a tuned file: a path, or a text that ends with .json."""
    return isinstance(method, os.PathLike) or (isinstance(method, str) and method.strip().endswith(".json"))


def read_tuned(path: str | os.PathLike[str]) -> Tuned:
    """Read a tuned file.

    Raises:
        BadArgument: there is no such file, it is no tuned file, or it names a method or setting that is not known.
    """
    where = os.fspath(path).strip()
    try:
        raw = json.loads(Path(where).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadArgument("method", where, f"cannot be read ({error.strerror})") from None
    except ValueError:
        raise BadArgument("method", where, "is not JSON; make a tuned file with `foveate tune`") from None
    if not isinstance(raw, dict) or raw.get("kind") != KIND:
        raise BadArgument("method", where, "is not a tuned file; make one with `foveate tune`")
    if raw.get("format") != FORMAT:
        mend = f"has format {raw.get('format')!r}, this version of foveate reads {FORMAT}; tune again"
        raise BadArgument("method", where, mend)
    try:
        methods = [(entry["id"], dict(entry["settings"])) for entry in raw["methods"]]
        profiles = tuple(from_json(entry) for entry in raw.get("profiles", ()))
        model, evidence = str(raw["model"]), dict(raw.get("evidence", {}))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadArgument("method", where, "is a damaged tuned file; tune again") from None
    if not methods:
        raise BadArgument("method", where, "is a damaged tuned file; tune again")
    return Tuned(Composition(tuple(_made(where, *each) for each in methods)), model, profiles, evidence)


def _made(where: str, name: Any, settings: dict[str, Any]) -> Method:
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise BadArgument("method", where, f"names the unknown method {name!r}; this version has {known}")
    try:
        return METHODS[name](**settings)
    except (TypeError, ValueError) as error:  # BadArgument is a ValueError: a value that this version does not take
        raise BadArgument("method", where, f"holds settings that {name} does not take ({error})") from None
