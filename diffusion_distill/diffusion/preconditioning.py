"""How a noise level becomes the scalar a network is conditioned on.

BTD's networks embed 1000·f(level) with one of three f, each about [0, 1] from clean to noisy or back:

    inv_cos   angle / (pi/2), with logsnr clipped to [-20, 20]
    sigmoid   sigmoid(logsnr) = alpha² / (alpha² + sigma²)
    linear    (logsnr - low) / (high - low), not clipped
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusion_distill.arrays import Array, namespace
from diffusion_distill.errors import choose
from diffusion_distill.levels import Level


def inv_cos(level: Level, low: float, high: float) -> Array:
    """atan(exp(-logsnr / 2)) / (pi/2), logsnr clipped to [-20, 20]."""
    steepest = math.atan(math.exp(-10.0))
    angle = namespace(*level).clip(level.angle, steepest, math.pi / 2 - steepest)
    return angle / (math.pi / 2)


def sigmoid(level: Level, low: float, high: float) -> Array:
    """sigmoid(logsnr)."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


def linear(level: Level, low: float, high: float) -> Array:
    """logsnr mapped so that low -> 0 and high -> 1."""
    return (level.logsnr - low) / (high - low)


LOGSNR_INPUTS = {"inv_cos": inv_cos, "sigmoid": sigmoid, "linear": linear}


@dataclass(frozen=True)
class LogsnrInput:
    """The conditioning of a network trained on logsnr: time = 1000·f(level).

    Raises:
      ValueError: unknown kind, or an empty range.
    """

    kind: str = "inv_cos"
    low: float = -10.0  # only read by 'linear'
    high: float = 10.0

    def __post_init__(self) -> None:
        choose("logsnr input", self.kind, LOGSNR_INPUTS)
        if not self.low < self.high:
            raise ValueError(f"The range of a logsnr input must not be empty, got [{self.low}, {self.high}].")

    def fraction(self, level: Level) -> Array:
        """f(level), [batch]."""
        return LOGSNR_INPUTS[self.kind](level, self.low, self.high)

    def time(self, level: Level) -> Array:
        """The number the network's sinusoids embed, 1000·f(level), [batch]."""
        return 1000 * self.fraction(level)
