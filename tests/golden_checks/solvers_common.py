"""What the checks of the solvers' fixtures share: the exact denoiser of a Gaussian mixture.

    v_k = alpha²·std_k² + sigma²,    r_k ∝ w_k·N(z; alpha·mu_k, diag v_k)
    x_hat = sum_k r_k·(mu_k + alpha·std_k²/v_k·(z - alpha·mu_k))

The mean of the images of which z is a noisy one, for VP and VE alike (README of the fixtures).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import struct

from diffusion_distill.base.arrays import namespace
from diffusion_distill.process.levels import Level
from golden_checks.common import Fixture, Mode

PARAMETERS = ("weights", "means", "stds")


class Mixture(struct.PyTreeNode):
    """The README's network, a `Denoise` for NumPy float64 and JAX float32.

    Attributes:
      weights: [K]; means, stds: [K, height, width, channels].
    """

    weights: Any
    means: Any
    stds: Any

    def __call__(self, z: Any, level: Level, labels: Any = None) -> Any:
        xp, z = namespace(z), z[:, None]
        alpha, sigma = level.expand(z)
        off, variance = z - alpha * self.means, alpha**2 * self.stds**2 + sigma**2
        pixels, each = tuple(range(2, z.ndim)), (-1, *[1] * (z.ndim - 2))
        distance = (off**2 / variance + xp.log(variance)).sum(axis=pixels, keepdims=True)
        log_share = xp.log(self.weights).reshape(each) - distance / 2
        share = xp.exp(log_share - log_share.max(axis=1, keepdims=True))
        share = share / share.sum(axis=1, keepdims=True)
        return (share * (self.means + alpha * self.stds**2 / variance * off)).sum(axis=1)


def mixture(source: Fixture | Mapping[str, np.ndarray], mode: Mode) -> Mixture:
    """The mixture that a fixture carries, else that of mixture.npz beside it; or one of arrays.

    Raises:
      FileNotFoundError: the fixture has none, and there is no mixture.npz beside it.
    """
    if isinstance(source, Fixture):
        source = {name: source.input(name) for name in PARAMETERS} if "weights" in source else _beside(source)
    return Mixture(*(mode.array(source[name]) for name in PARAMETERS))


def _beside(fixture: Fixture) -> dict[str, np.ndarray]:
    path = fixture.path.parent / "mixture.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{fixture.path.name} needs the mixture.npz of its folder beside it: put it there.")
    with np.load(path) as stored:
        return {name: stored[name] for name in PARAMETERS}
