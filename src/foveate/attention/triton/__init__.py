"""Kernels in Triton: what a GPU runs where a library has nothing, compiled for the machine at hand."""

from foveate.attention.triton.interpreter import mend

mend()
