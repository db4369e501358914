"""A checksum of a tree of arrays, computed on the devices that hold them.

    sum_i (2·i + 1)·bits_i  mod 2^32        per array, bits_i being element i as a whole number

Integer sums do not depend on their order, so it is the same on any number of devices; a changed bit changes it,
and so do exchanged elements.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.arrays import Array


def checksums(tree: Any) -> Array:
    """uint32 [number of arrays in the tree]."""
    each = [_checksum(leaf) for leaf in jax.tree.leaves(tree)]  # one by one: no second copy of the tree
    return jnp.stack(each) if each else jnp.zeros(0, jnp.uint32)


def fingerprint(tree: Any) -> str:
    """All checksums of a tree as one short text."""
    each = np.asarray(checksums(tree)).astype(np.uint64)
    places = np.arange(1, 2 * len(each), 2, dtype=np.uint64)
    golden_ratio = np.uint64(0x9E3779B97F4A7C15)  # spreads 32 bits over 64
    return f"{int(np.bitwise_xor.reduce(each * places * golden_ratio)):016x}"


@jax.jit
def _checksum(array: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    bits = bits.ravel().astype(jnp.uint32)
    return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)
