"""Loss weightings: factors of the squared error of x_hat, functions of the level (arXiv:2202.00512 section 4.1).

    weighting       factor              whose error it makes of that of x_hat
    constant        1                   x
    snr             SNR                 eps
    snr_trunc       max(SNR, 1)         the larger of both ("truncated SNR")
    snr_plus_one    SNR + 1             v of a VP process
    velocity        (sqrt(SNR) + 1)²    the velocity of a rectified flow
    edm             SNR + 1/sd²         EDM's F (arXiv:2206.00364 Eq. 8), sd the standard deviation of the data

A new weighting is one line in `WEIGHTINGS`. A factor may be infinite at zero noise: losses multiply its root with the
(then vanishing) factor p of the network's own error (`predictions.x_error`), a little off the ends (`Level.off_ends`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.base.errors import choose
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import predicts_noise

#: name -> (level, sigma_data) -> factor, of the level's shape
WEIGHTINGS: dict[str, Callable[[Level, float], Array]] = {
    "constant": lambda level, sigma_data: namespace(*level).ones_like(level.sigma),
    "snr": lambda level, sigma_data: level.snr,
    "snr_trunc": lambda level, sigma_data: namespace(*level).maximum(level.snr, 1.0),
    "snr_plus_one": lambda level, sigma_data: level.snr + 1,
    "velocity": lambda level, sigma_data: (level.alpha / level.sigma + 1) ** 2,
    "edm": lambda level, sigma_data: level.snr + 1 / sigma_data**2,
}


def of(weighting: str, level: Level, sigma_data: float) -> Array:
    """A weighting by name, at levels and for data of a standard deviation."""
    return choose("weighting", weighting, WEIGHTINGS)(level, sigma_data)


def check(weighting: str, prediction: str) -> None:
    """Raises ValueError for an unknown weighting; warns of truncated SNR for eps, which made training diverge."""
    choose("weighting", weighting, WEIGHTINGS)
    if predicts_noise(prediction) and weighting == "snr_trunc":
        warnings.warn(
            f"A network of prediction {prediction!r} trained with weighting {weighting!r} diverges, as "
            "arXiv:2202.00512 reports. Use weighting 'snr' or 'snr_plus_one', or predict 'x', 'v' or 'both'.",
            stacklevel=2,
        )
