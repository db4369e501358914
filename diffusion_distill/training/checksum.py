"""A checksum of a tree of arrays, computed where they are: on their devices, or in the memory of the host.

    sum_i (2·i + 1)·bits_i  mod 2^32        per array, bits_i being element i as a whole number

Integer sums do not depend on their order, so it is the same on any number of devices; a changed bit changes it,
and so do exchanged elements. Devices need a program for each shape, which is compiled when first used. NumPy needs
none, so the first checkpoint of a run on CPUs takes no longer than the others.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.arrays import Array

#: Elements of a part on the host.
BLOCK = 2**16


def checksums(tree: Any) -> Array:
    """uint32 [number of arrays in the tree]."""
    each = [_on_host(np.asarray(leaf)) if _is_on_host(leaf) else _checksum(leaf) for leaf in jax.tree.leaves(tree)]
    if all(isinstance(value, np.generic) for value in each):
        return jax.device_put(np.array(each, np.uint32))
    return jnp.stack(each)  # one by one: no second copy of the tree


def fingerprint(tree: Any) -> str:
    """All checksums of a tree as one short text."""
    each = np.asarray(checksums(tree)).astype(np.uint64)
    places = np.arange(1, 2 * len(each), 2, dtype=np.uint64)
    golden_ratio = np.uint64(0x9E3779B97F4A7C15)  # spreads 32 bits over 64
    return f"{int(np.bitwise_xor.reduce(each * places * golden_ratio)):016x}"


def _is_on_host(array: Array) -> bool:
    """Whether NumPy can read the array as it lies in memory."""
    if not isinstance(array, jax.Array):
        return True
    return array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())


def _on_host(array: np.ndarray) -> np.uint32:
    """An array's checksum, by parts that stay in a core's cache."""
    bits = array.ravel().view(f"uint{8 * array.dtype.itemsize}")
    parts = (_weighted(np, bits[k : k + BLOCK].astype(np.uint32), k) for k in range(0, bits.size, BLOCK))
    return np.uint32(sum(map(int, parts)) % 2**32)


@jax.jit
def _checksum(array: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    return _weighted(jnp, bits.ravel().astype(jnp.uint32), 0)


def _weighted(xp: Any, bits: Array, first: int) -> Array:
    """The sum of the equation over the elements `first`, `first` + 1, ... of an array."""
    factors = 2 * xp.arange(first, first + bits.size, dtype=xp.uint32) + 1
    return xp.sum(bits * factors, dtype=xp.uint32)
