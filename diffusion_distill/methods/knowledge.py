"""Knowledge distillation: the teacher's estimates in another network, arXiv:2303.04248 A.9.

A phase that keeps the number of steps and changes the network, usually to a smaller one. It stands before or after
the phases in time, at a step count of their grid. TRACT's target for a group of one teacher step, m = s, has
weights (1, 0): at the student's levels, the student learns the teacher's estimate itself.

    target = clip(x_teacher(z_t))
    loss   = max(SNR, 1)·sum over pixels of (x_student(z_t) - target)²

The paper's example is the BTD network for CIFAR-10 with 128 instead of 256 channels, 19.4 instead of 60.0 million
parameters, in 96M samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from diffusion_distill.base.errors import positive_int
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.base.typing import Cond, Data
from diffusion_distill.denoisers.clipping import Clipped
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import targets, tract
from diffusion_distill.methods.method import Distiller
from diffusion_distill.methods.phases import Phase, momentum_for, updates_for, updates_per_phase
from diffusion_distill.process.levels import Level


@dataclass(frozen=True)
class Knowledge(Distiller):
    """Settings of knowledge distillation; defaults are TRACT's for VP teachers (A.9 names no others).

    Attributes:
      steps: of the teacher and of the student.
      length: training samples, see `base.lengths`.
      residual: sets the momentum of the eval average, see `phases.momentum_for`.
      clip: whether the target is clipped to the range of the data.
      others: see `Distiller`.
    """

    steps: int = 32
    length: str | int = "96M"
    residual: float = 1e-3
    clip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_length(self.length)
        positive_int("The number of steps", self.steps)

    def phases(self, model: Model, batch_size: int, grid: Level | None = None) -> list[Phase]:
        """The single phase."""
        total, grid = parse_length(self.length), self.teacher_grid(model, self.steps, grid)
        [updates] = updates_for(total, batch_size)
        momentum = momentum_for(self.residual, updates_per_phase(total, batch_size, 1))
        [table] = targets.pad([tract.rows(grid, self.steps)])
        name = f"knowledge {self.steps}"
        return [self.phase(name, grid, grid, updates=updates, momentum=momentum, inputs=table)]

    def estimators(self, denoisers: Mapping[str, Any], rows: targets.Rows) -> tuple[Denoise, Denoise]:
        """The teacher, clipped if asked for, and nobody for the empty second step."""
        return Clipped(denoisers["teacher"]) if self.clip else denoisers["teacher"], nobody


def nobody(z: Data, level: Level, cond: Cond | None = None) -> Data:
    """The estimator of an empty second step, whose weight is zero."""
    return jnp.zeros_like(z)
