"""Preconditioning: the number that a network is told for a noise level, and the scale of its input.

With s = sigma / alpha, a network is called with scale·z and embeds a time:

                    scale·z                        time
    LogsnrInput     z                              1000·f(level)                     BTD (arXiv:2202.00512)
    EDMInput        (z/alpha) / sqrt(s² + sd²)     factor·log(s) / 4                 EDM (arXiv:2206.00364, Table 1)
    VPInput         (z/alpha) / sqrt(s² + 1)       (M - 1)·t(s) of the VP process    EDM's wrapper of DDPM++
    VEInput         z/alpha                        log(s / 2)                        EDM's wrapper of NCSN++
    IDDPMInput      (z/alpha) / sqrt(s² + 1)       M - 1 - (nearest level of s)      EDM's wrapper of iDDPM
    TimeOfProcess   z                              factor·t + offset                 DDPM (arXiv:2006.11239)
    FlowInput       z                              factor·sigma/(alpha + sigma)      rectified flows (arXiv:2403.03206)

so that networks made for alpha = 1 take other levels too. BTD's f is one of three, each about [0, 1] from clean to
noisy or back:

    inv_cos   angle / (pi/2), with logsnr clipped to [-20, 20]
    sigmoid   sigmoid(logsnr) = alpha² / (alpha² + sigma²)
    linear    (logsnr - low) / (high - low), not clipped

What the network's output means is in `predictions`: 'edm' goes with EDMInput, 'eps' with VPInput, 'scaled_score' with
VEInput, 'eps_var' with IDDPMInput, 'velocity' with FlowInput.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.process.edm_grids import iddpm_sigmas, nearest
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process


class TimeInput(Protocol):
    """A frozen, hashable value that prepares a network's inputs."""

    def time(self, level: Level, process: Process) -> Array:
        """The number the network's sinusoids embed, [batch]."""
        ...

    def scale(self, level: Level) -> Array | None:
        """The factor of z, [batch]; None for 1."""
        ...


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

    def time(self, level: Level, process: Process) -> Array:
        """The number the network's sinusoids embed, 1000·f(level), [batch]."""
        return 1000 * self.fraction(level)

    def scale(self, level: Level) -> Array | None:
        """None: the network takes z as it is."""
        return None


@dataclass(frozen=True)
class EDMInput:
    """EDM's own preconditioning; sigma_data is the standard deviation of the data.

    Consistency models (arXiv:2303.01469) are told 1000 times EDM's number: their factor is 1000.

    Raises:
      ValueError: sigma_data or factor is not positive.
    """

    sigma_data: float = 0.5
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not (self.sigma_data > 0 and self.factor > 0):
            raise ValueError(f"sigma_data and factor must be positive, got {self}.")

    def time(self, level: Level, process: Process) -> Array:
        """factor·log(s) / 4."""
        return self.factor * (namespace(*level).log(_ratio(level)) / 4)

    def scale(self, level: Level) -> Array:
        """1 / sqrt(sigma² + (sigma_data·alpha)²)."""
        return 1 / namespace(*level).hypot(level.sigma, self.sigma_data * level.alpha)


@dataclass(frozen=True)
class VPInput:
    """The input of networks trained on `steps` discrete times of the VP process with linear beta.

    t(s) = (sqrt(beta_min² + 2·beta_d·log(1 + s²)) - beta_min) / beta_d
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    steps: int = 1000

    def time(self, level: Level, process: Process) -> Array:
        """(steps - 1)·t(s)."""
        xp = namespace(*level)
        log_variance = xp.log1p(_ratio(level) ** 2)
        root = xp.sqrt(self.beta_min**2 + 2 * self.beta_d * log_variance)
        return (self.steps - 1) * (root - self.beta_min) / self.beta_d

    def scale(self, level: Level) -> Array:
        """1 / sqrt(sigma² + alpha²)."""
        return 1 / namespace(*level).hypot(level.sigma, level.alpha)


@dataclass(frozen=True)
class VEInput:
    """The input of networks trained on the VE process."""

    def time(self, level: Level, process: Process) -> Array:
        """log(s / 2)."""
        return namespace(*level).log(0.5 * _ratio(level))

    def scale(self, level: Level) -> Array:
        """1 / alpha."""
        return 1 / level.off_ends().alpha


@dataclass(frozen=True)
class IDDPMInput:
    """The input of networks trained on the discrete levels of iDDPM's cosine process, `edm_grids.iddpm_sigmas`."""

    steps: int = 1000
    c_1: float = 0.001
    c_2: float = 0.008

    def __post_init__(self) -> None:
        positive_int("steps", self.steps)

    @property
    def sigmas(self) -> np.ndarray:
        """The levels [steps + 1], decreasing to 0, in the float32 arithmetic of the published networks."""
        return iddpm_sigmas(self.steps, self.c_1, self.c_2, np.float32)

    def time(self, level: Level, process: Process) -> Array:
        """steps - 1 - (index of the level nearest to s)."""
        s = _ratio(level)
        return (self.steps - 1 - nearest(s, self.sigmas)).astype(s.dtype)

    def scale(self, level: Level) -> Array:
        """1 / sqrt(sigma² + alpha²)."""
        return 1 / namespace(*level).hypot(level.sigma, level.alpha)


@dataclass(frozen=True)
class TimeOfProcess:
    """The input of networks that are told the process's own time.

    With a factor of N and an offset of -1 it is the index 0 .. N - 1 that DDPM's networks of N betas are told.
    """

    factor: float = 1000.0
    offset: float = 0.0

    def time(self, level: Level, process: Process) -> Array:
        """factor·t + offset for the process's time t."""
        return self.factor * process.time(level) + self.offset

    def scale(self, level: Level) -> Array | None:
        """None: the network takes z as it is."""
        return None


@dataclass(frozen=True)
class FlowInput:
    """The input of rectified flows: how far the sample is on its straight line to the noise, 0 to `factor`.

    This is the flow's time after the timestep shift, as Stable Diffusion 3 and Flux are told it with factor 1000.
    """

    factor: float = 1000.0

    def time(self, level: Level, process: Process) -> Array:
        """factor·sigma / (alpha + sigma)."""
        return self.factor * (level.sigma / (level.alpha + level.sigma))

    def scale(self, level: Level) -> Array | None:
        """None: the network takes z as it is."""
        return None


def _ratio(level: Level) -> Array:
    """sigma / alpha, a finite number at pure noise too."""
    return level.sigma / level.off_ends().alpha


TIME_INPUTS = {
    "logsnr": LogsnrInput,
    "edm": EDMInput,
    "vp": VPInput,
    "ve": VEInput,
    "iddpm": IDDPMInput,
    "t": TimeOfProcess,
    "flow": FlowInput,
}
