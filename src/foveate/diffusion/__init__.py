"""Language models that denoise: a small masked-diffusion model, its sampler, and methods for what it reads."""

from foveate.diffusion.denoise import DiffusionMethod, Moment, denoise
from foveate.diffusion.model import DiffusionShape, MaskedDiffusion, masked_loss
from foveate.diffusion.sparsed import SparseD, block_means

__all__ = [
    "DiffusionMethod",
    "DiffusionShape",
    "MaskedDiffusion",
    "Moment",
    "SparseD",
    "block_means",
    "denoise",
    "masked_loss",
]
