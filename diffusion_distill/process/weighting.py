"""Loss weightings: factors of the squared error of x_hat, arXiv:2202.00512 section 4.1.

constant      1                 the error of x
snr           SNR               the error of eps
snr_trunc     max(SNR, 1)       the larger of both ("truncated SNR")
snr_plus_one  SNR + 1           the error of v
edm           SNR + 1/sd²       the error of EDM's F (arXiv:2206.00364 Eq. 8), sd the standard deviation of the data
"""

from __future__ import annotations

import warnings

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.base.errors import choose
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import EPS, SIGMA_DATA


def constant(level: Level) -> Array:
    """1 at every level."""
    return namespace(*level).ones_like(level.sigma)


def snr(level: Level) -> Array:
    """alpha² / sigma²."""
    return level.snr


def snr_trunc(level: Level) -> Array:
    """max(SNR, 1)."""
    return namespace(*level).maximum(level.snr, 1.0)


def snr_plus_one(level: Level) -> Array:
    """SNR + 1."""
    return level.snr + 1


def edm(level: Level, sigma_data: float = SIGMA_DATA) -> Array:
    """SNR + 1 / sigma_data² = (s² + sigma_data²) / (s·sigma_data)² for s = sigma / alpha."""
    return level.snr + 1 / sigma_data**2


WEIGHTINGS = {
    "constant": constant,
    "snr": snr,
    "snr_trunc": snr_trunc,
    "snr_plus_one": snr_plus_one,
    "edm": edm,
}


def of(weighting: str, level: Level, sigma_data: float) -> Array:
    """A weighting by name for data of a standard deviation, which only 'edm' depends on."""
    return edm(level, sigma_data) if weighting == "edm" else WEIGHTINGS[weighting](level)


def check(weighting: str, prediction: str) -> None:
    """Raises ValueError for an unknown weighting; warns of truncated SNR for eps, which made training diverge."""
    choose("weighting", weighting, WEIGHTINGS)
    if prediction in EPS and weighting == "snr_trunc":
        warnings.warn(
            f"A network of prediction {prediction!r} trained with weighting {weighting!r} diverges, as "
            "arXiv:2202.00512 reports. Use weighting 'snr' or 'snr_plus_one', or predict 'x', 'v' or 'both'.",
            stacklevel=2,
        )
