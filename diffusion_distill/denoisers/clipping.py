"""Denoisers whose x_hat is kept in the range of the data: clipped, or scaled sample by sample (dynamic thresholding).

The range is the model's `data_range`; data without bounds are left as they are.
"""

from __future__ import annotations

import math
from typing import Any

from flax import struct

from diffusion_distill.base.arrays import expand, namespace
from diffusion_distill.base.typing import Cond, Data
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.process.levels import Level


class Clipped(struct.PyTreeNode):
    """A denoiser whose x_hat is clipped to the range of the data; one without bounds is left as it is."""

    denoise: Denoise

    def __call__(self, z: Data, level: Level, cond: Cond | None = None) -> Data:
        """x_hat in the range."""
        x, bounds = self.denoise(z, level, cond), range_of(self.denoise)
        return x if bounds is None else namespace(x).clip(x, *bounds)


class Thresholded(struct.PyTreeNode):
    """A denoiser with dynamic thresholding: x_hat is clipped and scaled, sample by sample, to the range of the data.

        x_hat <- clip(x_hat, -s, s) / s        s = max(floor, quantile of |x_hat| in the sample)

    Imagen (arXiv:2205.11487 section 2.3), for data in [-1, 1]; those of another range are treated as if they were
    moved there. With floor 1 a sample within the range stays as it is.

    Attributes:
      quantile: in [0, 1], with linear interpolation between two values; 1 is the largest |x_hat|.
      floor: the least s, above 0.

    Raises:
      ValueError: a quantile or floor outside its range.
    """

    denoise: Denoise
    quantile: float = struct.field(pytree_node=False, default=0.995)
    floor: float = struct.field(pytree_node=False, default=1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"The quantile of thresholding must be in [0, 1], got {self.quantile}.")
        if not 0 < self.floor < math.inf:
            raise ValueError(f"The floor of thresholding must be positive and finite, got {self.floor}.")

    def __call__(self, z: Data, level: Level, cond: Cond | None = None) -> Data:
        """x_hat in the range."""
        x, bounds = self.denoise(z, level, cond), range_of(self.denoise)
        if bounds is None:
            return x
        xp, middle, half = namespace(x), (bounds[1] + bounds[0]) / 2, (bounds[1] - bounds[0]) / 2
        if (middle, half) == (0.0, 1.0):
            return self._thresholded(xp, x)
        return middle + half * self._thresholded(xp, (x - middle) / half)

    def _thresholded(self, xp: Any, x: Data) -> Data:
        size = xp.quantile(xp.abs(x).reshape(len(x), -1), self.quantile, axis=1)
        s = expand(xp.maximum(size, self.floor), x)
        return xp.clip(x, -s, s) / s


def range_of(denoise: Any) -> tuple[float, float] | None:
    """The range of the data of a denoiser, also inside a wrapper; [-1, 1] if it does not say, None without bounds."""
    while not hasattr(denoise, "data_range") and hasattr(denoise, "denoise"):
        denoise = denoise.denoise
    return getattr(denoise, "data_range", (-1.0, 1.0))
