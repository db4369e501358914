"""The loss every method shares: the weighted squared error of the student's x_hat against a target.

    loss = weighting(level) · reduce((x_hat - x)²) per image, reduce = mean or sum over H, W, C

BTD averages over pixels, TRACT-VP sums; an optimizer without scale invariance and gradient clipping see
the difference, so each method defaults to its published reduction.
"""

from __future__ import annotations

from diffusion_distill.base.arrays import Array, image_mean, image_sum
from diffusion_distill.base.errors import choose
from diffusion_distill.base.typing import Cond, Image
from diffusion_distill.denoisers.denoise import RawDenoise
from diffusion_distill.process import predictions, weighting
from diffusion_distill.process.levels import Level

REDUCTIONS = {"mean": image_mean, "sum": image_sum}


def losses(
    student: RawDenoise,
    z: Image,
    level: Level,
    x: Image,
    eps: Image,
    cond: Cond | None = None,
    *,
    weight: str,
    reduction: str,
) -> Array:
    """Per-image losses [batch] of the student at z = alpha·x + sigma·eps (x and eps are the targets)."""
    sigma_data = student.sigma_data
    error = predictions.x_error(student.prediction, student.raw(z, level, cond), x, eps, level, sigma_data)
    return weighting.of(weight, level, sigma_data) * REDUCTIONS[reduction](error**2)


def check(weight: str, reduction: str) -> None:
    """Raises ValueError for an unknown weighting or reduction."""
    choose("weighting", weight, weighting.WEIGHTINGS)
    choose("reduction", reduction, REDUCTIONS)
