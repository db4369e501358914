"""Tensors with the names and shapes of EDM's program from our networks: the inverse of `weights.edm_layout`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import numpy as np

from diffusion_distill.weights import matching
from diffusion_distill.weights.edm_layout import FIXED_FILTER, Entry, entries
from diffusion_distill.weights.matching import Shape


def tensor_shapes(network: nn.Module, shape: Shape) -> dict[str, Shape]:
    """{tensor's name: shape}, buffers included, of a network for such images; nothing is allocated.

    Args:
      network: a `SongUNet`, or a `UNet` with the settings `ADM`.
      shape: (height, width, channels); names contain the height.

    Raises:
      WeightsError: the network does not take such images.
    """
    return {entry.name: entry.shape for entry in entries(network, shape)}


def to_state_dict(network: nn.Module, shape: Shape, params: Any) -> dict[str, np.ndarray]:
    """The inverse of `to_params`: {name: tensor}, buffers included.

    Raises:
      WeightsError: parameters missing, left over, or of another shape.
    """
    correspondence = entries(network, shape)
    shapes = {
        path: shape for entry in correspondence for path, shape in zip(entry.paths, entry.path_shapes, strict=True)
    }
    stored = {path: np.asarray(leaf) for path, leaf in matching.flatten(params).items()}
    filled = matching.match(stored, shapes, "The parameters")
    return {entry.name: _joined(entry, [filled[path] for path in entry.paths]) for entry in correspondence}


def _joined(entry: Entry, parts: list[np.ndarray]) -> np.ndarray:
    """The tensor from its parameters."""
    return np.ascontiguousarray(entry.whole(parts)) if parts else np.array(FIXED_FILTER[None, None])
