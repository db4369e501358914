"""Weights: strict, safe importers of published files, their registry, download, and exchange as safetensors."""

from diffusion_distill.weights import exchange, progressive
from diffusion_distill.weights.download import Fetched, fetch
from diffusion_distill.weights.matching import WeightsError, digest, flatten, match, shapes_of, unflatten
from diffusion_distill.weights.progressive import Checkpoint
from diffusion_distill.weights.registry import PUBLISHED, READERS, Published

__all__ = [
    "PUBLISHED",
    "READERS",
    "Checkpoint",
    "Fetched",
    "Published",
    "WeightsError",
    "digest",
    "exchange",
    "fetch",
    "flatten",
    "match",
    "progressive",
    "shapes_of",
    "unflatten",
]
