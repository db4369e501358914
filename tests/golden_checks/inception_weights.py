"""Random weights of InceptionV3 by the rule of golden/eval/README.md, section 1: from a tag and a tensor's name.

seed = first 8 bytes of SHA-256 of "TAG/name", little-endian; u = (PCG64's raw outputs >> 11)·2^-53;
z = sqrt(3)(2u - 1).
Names and shapes are those of pytorch-fid's state dict.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np

Arrays = dict[str, np.ndarray]

TAG = "ddistill-eval-dev"
#: end of a name -> (z, shape) -> value, in float64
RULES = {
    "conv.weight": lambda z, shape: z * math.sqrt(2 / math.prod(shape[1:])),
    "bn.weight": lambda z, shape: 1 + 0.1 * z,
    "bn.bias": lambda z, shape: 0.1 * z,
    "bn.running_mean": lambda z, shape: 0.1 * z,
    "bn.running_var": lambda z, shape: np.exp(0.1 * z),
    "fc.weight": lambda z, shape: z * (8 / math.sqrt(2048)),
    "fc.bias": lambda z, shape: 0.1 * z,
}


def random_weights(shapes: Mapping[str, tuple[int, ...]], tag: str = TAG) -> Arrays:
    """float32 arrays by name, of variant A: with gammas that are not 1."""
    return {name: random_tensor(name, tuple(shape), tag) for name, shape in shapes.items()}


def random_tensor(name: str, shape: tuple[int, ...], tag: str = TAG) -> np.ndarray:
    """One of them."""
    seed = int.from_bytes(hashlib.sha256(f"{tag}/{name}".encode()).digest()[:8], "little")
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))
    z = math.sqrt(3) * (2 * ((raw >> np.uint64(11)) * 2.0**-53) - 1)
    [rule] = [rule for ending, rule in RULES.items() if name.endswith(ending)]
    return rule(z, shape).reshape(shape).astype(np.float32)


def without_gamma(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Variant B: gamma is 1."""
    return {n: np.ones_like(a) if n.endswith("bn.weight") else a for n, a in arrays.items()}
