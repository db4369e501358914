"""Seeds: whole numbers of 64 bits, each with random numbers of its own, whatever JAX is set to.

JAX's key      the two words (seed // 2^32, seed mod 2^32) of threefry2x32: what jax.random.key makes of a seed
               below 2^32, and of any other with jax_enable_x64, but with no regard to jax_default_prng_impl
NumPy's        PCG64([seed mod 2^32, number, stream, seed // 2^32]): zeros at the end count as nothing, so below
               2^32 and in stream 0 it is PCG64([seed, number])
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.typing import Key

BITS = 64
_WORD = 2**32


def check_seed(value: Any, what: str = "seed") -> int:
    """The seed as an int.

    Args:
      what: how the error calls it.

    Raises:
      ValueError: it is no whole number in [0, 2^64).
    """
    whole = hasattr(value, "__index__") and not isinstance(value, bool) and not np.ndim(value)
    if not whole or not 0 <= int(value) < 2**BITS:
        raise ValueError(f"{what} must be a whole number from 0 to 2^{BITS} - 1, got {value!r}.")
    return int(value)


def key_of(seed: int) -> Key:
    """JAX's key of a seed; errors as `check_seed`."""
    words = np.array(divmod(check_seed(seed), _WORD), np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def generator_of(seed: int, number: int, stream: int = 0) -> np.random.Generator:
    """NumPy's generator number `number` of a stream of a seed; errors as `check_seed`."""
    high, low = divmod(check_seed(seed), _WORD)
    return np.random.Generator(np.random.PCG64([low, number, stream, high]))
