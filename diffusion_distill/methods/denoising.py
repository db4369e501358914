"""Training a teacher: regress the clean image (or eps, v, both) from the noisy one.

z = alpha·x + sigma·eps at the level of u ~ U[0, 1), or (i + 1)/N with i uniform on 0 .. N-1
loss = weighting(level) · (x_hat(z) - x)²        arXiv:2202.00512 sections 2 and 4
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import choose
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.base.typing import Batch, Cond, Data, Key
from diffusion_distill.denoisers.denoise import RawDenoise
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import loss
from diffusion_distill.methods.draws import draw
from diffusion_distill.methods.phases import Phase, check_averaging, check_rate, momentum_for, updates_for
from diffusion_distill.process import noising, weighting
from diffusion_distill.process.levels import Level
from diffusion_distill.process.training_levels import NOISE_LEVELS


@dataclass(frozen=True)
class Denoising:
    """Settings of teacher training; defaults are those of BTD's CIFAR-10 teacher (released configuration).

    Attributes:
      length: training samples, see `base.lengths`.
      noise: how levels are drawn, one of `training_levels.NOISE_LEVELS`.
      steps: 0 trains in continuous time, N on the N times of a discrete grid.
      momentum: of the averaged parameters.
      averaging: the rule of that average, see `training.ema`; BTD's program has 'plain'.
      residual: if not 0, sets the momentum from the length instead, see `phases.momentum_for`.
      label_dropout: rate at which cond become the null label that guidance needs; None for the rate of the
        network's own field `label_dropout`, 0 if it has none. See `training.dropout`.
    """

    length: str | int = "64M"
    noise: str = "uniform"
    steps: int = 0
    weighting: str = "snr_trunc"
    reduction: str = "mean"
    learning_rate: float = 2e-4
    warmup: int = 1000
    cold_start: bool = False
    anneal: bool = False
    momentum: float = 0.9999
    averaging: str = "corrected"
    residual: float = 0.0
    label_dropout: float | None = None

    def __post_init__(self) -> None:
        loss.check(self.weighting, self.reduction)
        choose("distribution of noise levels", self.noise, NOISE_LEVELS)
        check_averaging(self.averaging)
        check_rate("label_dropout", self.label_dropout)
        parse_length(self.length)
        if self.steps != 0 and (not hasattr(self.steps, "__index__") or self.steps < 0):
            raise ValueError(f"steps must be 0 (continuous time) or a number of time steps, got {self.steps}.")

    def phases(self, model: Model, batch_size: int, grid: Level | None = None) -> list[Phase]:
        """The single phase of teacher training."""
        weighting.check(self.weighting, model.prediction)
        [updates] = updates_for(parse_length(self.length), batch_size)
        momentum = momentum_for(self.residual, updates) if self.residual else self.momentum
        return [
            Phase(
                name="teacher",
                updates=updates,
                learning_rate=self.learning_rate,
                warmup=self.warmup,
                cold_start=self.cold_start,
                anneal=self.anneal,
                momentum=momentum,
                averaging=self.averaging,
            )
        ]

    @property
    def averages(self) -> Mapping[str, float]:
        """Momenta of averages kept during training besides the eval average: there are none."""
        return {}

    def losses(self, denoisers: Mapping[str, Any], inputs: Any, batch: Batch, key: Key) -> Array:
        """Per-image losses [batch] of denoisers['student']."""
        u, eps = draw(batch, key)
        student = denoisers["student"]
        level = NOISE_LEVELS[self.noise](student.model.process, self.times(u))
        return self.losses_at(student, level, batch["x"], eps, batch.get("cond"))

    def losses_at(self, student: RawDenoise, level: Level, x: Data, eps: Data, cond: Cond | None = None) -> Array:
        """Per-image losses [batch] for given levels and noise, instead of drawn ones."""
        z = noising.diffuse(x, eps, level)
        return loss.losses(student, z, level, x, eps, cond, weight=self.weighting, reduction=self.reduction)

    def times(self, u: Array) -> Array:
        """Training times from uniform numbers in [0, 1): themselves, or those of the discrete grid."""
        return (jnp.floor(u * self.steps) + 1) / self.steps if self.steps else u
