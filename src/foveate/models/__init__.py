"""Open a model, know its geometry, and make tiny ones to try things on."""

from foveate.models.builtin import BUILTIN
from foveate.models.open import Loaded, load
from foveate.models.shape import LayerShape, ModelShape
from foveate.models.tiny import FAMILIES, tiny

__all__ = ["BUILTIN", "FAMILIES", "LayerShape", "Loaded", "ModelShape", "load", "tiny"]
