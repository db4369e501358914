"""The loss every method shares: the weighted squared error of the student's x_hat against a target.

    loss = reduce(weighting(level)·(x_hat - x)²) per sample, reduce = mean or sum over all its values

The error is computed in the network's own output (process/predictions.py), with the root of the weighting as a part of
its factor. BTD averages over pixels, TRACT-VP sums; an optimizer without scale invariance and gradient clipping see
the difference, so each method defaults to its published reduction.
"""

from __future__ import annotations

from diffusion_distill.base.arrays import Array, image_mean, image_sum, namespace
from diffusion_distill.base.errors import choose
from diffusion_distill.base.typing import Cond, Data
from diffusion_distill.denoisers.denoise import RawDenoise
from diffusion_distill.process import predictions, weighting
from diffusion_distill.process.levels import Level

REDUCTIONS = {"mean": image_mean, "sum": image_sum}


def losses(
    student: RawDenoise,
    z: Data,
    level: Level,
    x: Data,
    eps: Data,
    cond: Cond | None = None,
    *,
    weight: str,
    reduction: str,
) -> Array:
    """Per-image losses [batch] of the student at z = alpha·x + sigma·eps (x and eps are the targets)."""
    inside, sigma_data = level.off_ends(), student.sigma_data
    root = namespace(*level).sqrt(weighting.of(weight, inside, sigma_data))
    raw = student.raw(z, level, cond)
    error = predictions.x_error(student.prediction, raw, x, eps, inside, sigma_data, scale=root)
    return REDUCTIONS[reduction](error**2)


def check(weight: str, reduction: str) -> None:
    """Raises ValueError for an unknown weighting or reduction."""
    choose("weighting", weight, weighting.WEIGHTINGS)
    choose("reduction", reduction, REDUCTIONS)
