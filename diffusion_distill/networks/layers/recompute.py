"""Memory against time: blocks whose inner values are computed again in the backward pass instead of being kept."""

from __future__ import annotations

import inspect
from typing import Any

import flax.linen as nn


def remat(block: Any, wanted: bool) -> Any:
    """A block's class, if `wanted` one that keeps only its inputs for the gradient (Chen et al., arXiv:1604.06174).

    Parameters, their names and the random numbers of dropout are the same. The backward pass evaluates the block a
    second time, so that an update takes about a third longer.

    Args:
      block: the class of a module, called with arrays and perhaps `train`.
      wanted: False returns the class as it is.
    """
    if not wanted:
        return block
    static = tuple(k for k, name in enumerate(inspect.signature(block.__call__).parameters) if name == "train")
    return nn.remat(block, static_argnums=static)
