"""Weights: strict, safe importers of published files, their registry, download, and exports for other programs."""

from diffusion_distill.base.errors import WeightsError
from diffusion_distill.weights import (
    edm,
    exchange,
    exports,
    inception,
    progressive,
    published_torch,
    state_dict,
    torch_models,
)
from diffusion_distill.weights.download import Fetched, fetch
from diffusion_distill.weights.families import FAMILIES
from diffusion_distill.weights.matching import Checkpoint, digest, flatten, match, shapes_of, unflatten
from diffusion_distill.weights.published import Published
from diffusion_distill.weights.registry import PUBLISHED, READERS

__all__ = [
    "FAMILIES",
    "PUBLISHED",
    "READERS",
    "Checkpoint",
    "Fetched",
    "Published",
    "WeightsError",
    "digest",
    "edm",
    "exchange",
    "exports",
    "fetch",
    "flatten",
    "inception",
    "match",
    "published_torch",
    "progressive",
    "shapes_of",
    "state_dict",
    "torch_models",
    "unflatten",
]
