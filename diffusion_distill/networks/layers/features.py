"""Numbers as vectors: sinusoids and Fourier features of the time."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn.initializers import normal


def sinusoidal_features(
    time: Array, width: int, *, max_period: float = 10_000.0, shift: float = 1.0, cos_first: bool = False
) -> Array:
    """Sines, then cosines, of `time` at width // 2 frequencies falling from 1 to 1 / max_period.

    Frequency k of half = width // 2 is max_period^(-k / (half - shift)); an odd width ends with a zero.
    Salimans & Ho (2022) after Ho et al. (2020).

    Args:
      time: [batch], any real numbers (of size 1000 in the published networks).
      width: number of features, at least 4.
      max_period: ratio of the highest to the lowest frequency.
      shift: 1 spaces the frequencies so that both ends are reached, 0 leaves out the lowest.
      cos_first: cosines, then sines (Dhariwal & Nichol 2021).

    Returns:
      [batch, width] float32, whatever the compute dtype of the network.
    """
    half = width // 2
    # Rounded once from float64: angles reach 1000 rad, where a float32 exponential would cost 3e-4 rad.
    frequencies = (max_period ** (-np.arange(half) / (half - shift))).astype(np.float32)
    angles = time.astype(jnp.float32)[:, None] * frequencies[None]
    waves = [jnp.sin(angles), jnp.cos(angles)]
    features = jnp.concatenate(waves[::-1] if cos_first else waves, axis=-1)
    return jnp.pad(features, ((0, 0), (0, width % 2)))


def fourier_features(time: Array, frequencies: Array) -> Array:
    """Sines, then cosines, of 2 pi f t: time [batch], frequencies [n] -> [batch, 2 n] float32.

    Tancik et al. (2020), Song et al. (2021). 2 pi f is rounded to float32 before the product, as in the
    published networks: a phase of size 1e5 has an error of 1e-2 either way.
    """
    angles = time.astype(jnp.float32)[:, None] * (np.float32(2 * np.pi) * frequencies)[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class FourierFeatures(nn.Module):
    """`fourier_features` at width // 2 frequencies that start as 16 times standard normal numbers."""

    width: int

    @nn.compact
    def __call__(self, time: Array) -> Array:
        frequencies = self.param("freqs", normal(16.0), (self.width // 2,), jnp.float32)
        return fourier_features(time, lax.stop_gradient(frequencies))
