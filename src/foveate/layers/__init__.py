"""Trainable token-mixing layers that stand in the place of a transformer's attention."""

from foveate.layers.mixer import MIXERS, Mixer, mixer

__all__ = ["MIXERS", "Mixer", "mixer"]
