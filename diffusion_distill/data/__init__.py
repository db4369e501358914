"""Data: image sets in memory and the deterministic stream of batches drawn from them."""

from diffusion_distill.data.pipeline import Batches
from diffusion_distill.data.sources import SOURCES, ArraySource, Source, digits, from_arrays, npz

__all__ = ["SOURCES", "ArraySource", "Batches", "Source", "digits", "from_arrays", "npz"]
