"""The types of converted models, made known to transformers."""

from __future__ import annotations

from foveate.models import converted, encoders


def register_models() -> None:
    """Let transformers' Auto classes open converted models, decoders and encoders.

    `foveate.load` needs no such call. It is one of its own, because it imports every family that can be converted,
    which takes half a second.
    """
    converted.register_all()
    encoders.register_all()
