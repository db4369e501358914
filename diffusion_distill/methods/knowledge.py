"""Knowledge distillation: the teacher's estimates in another network, arXiv:2303.04248 A.9.

A phase that keeps the number of steps and changes the network, usually to a smaller one. It stands before or after
the phases in time, at a step count of their process. TRACT's target for a group of one teacher step, m = s, has
weights (1, 0): at the student's times t = i/N, i = 1 .. N, the student learns the teacher's estimate itself.

    target = clip(x_teacher(z_t))
    loss   = max(SNR, 1)·sum over pixels of (x_student(z_t) - target)²

The paper's example is the BTD network for CIFAR-10 with 128 instead of 256 channels, 19.4 instead of 60.0 million
parameters, in 96M samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import positive_int
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.base.typing import Batch, Cond, Image, Key
from diffusion_distill.denoisers.clipping import Clipped
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import loss, targets, tract
from diffusion_distill.methods.phases import Phase, check_rate, momentum_for, updates_for, updates_per_phase
from diffusion_distill.process.levels import Level


@dataclass(frozen=True)
class Knowledge:
    """Settings of knowledge distillation; defaults are TRACT's for VP teachers (A.9 names no others).

    Attributes:
      steps: of the teacher and of the student.
      length: training samples, see `base.lengths`.
      residual: sets the momentum of the eval average, see `phases.momentum_for`.
      clip: whether the target is clipped to [-1, 1].
      dropout: rate in the student's network while it is trained. None is no dropout, whatever the teacher was
        trained with; a student model that is given explicitly keeps its network's own rate.
      label_dropout: rate at which cond become the null label that guidance needs; None for the rate of the
        network's own field `label_dropout`, 0 if it has none. See `training.dropout`.
    """

    steps: int = 32
    length: str | int = "96M"
    residual: float = 1e-3
    weighting: str = "snr_trunc"
    reduction: str = "sum"
    learning_rate: float = 2e-4
    warmup: int = 0
    anneal: bool = False
    clip: bool = True
    dropout: float | None = None
    label_dropout: float | None = None

    def __post_init__(self) -> None:
        loss.check(self.weighting, self.reduction)
        check_rate("dropout", self.dropout)
        check_rate("label_dropout", self.label_dropout)
        parse_length(self.length)
        positive_int("The number of steps", self.steps)

    #: Momenta of averages kept during training besides the eval average.
    averages: ClassVar[Mapping[str, float]] = {}

    def phases(self, model: Model, batch_size: int) -> list[Phase]:
        """The single phase."""
        total = parse_length(self.length)
        [updates] = updates_for(total, batch_size)
        [table] = targets.pad([tract.rows(model.process, self.steps, self.steps)])
        return [
            Phase(
                name=f"knowledge {self.steps}",
                updates=updates,
                learning_rate=self.learning_rate,
                teacher_steps=self.steps,
                student_steps=self.steps,
                warmup=self.warmup,
                anneal=self.anneal,
                momentum=momentum_for(self.residual, updates_per_phase(total, batch_size, 1)),
                inputs=table,
            )
        ]

    def losses(self, denoisers: Mapping[str, Any], table: targets.Rows, batch: Batch, key: Key) -> Array:
        """Per-image losses [batch] of denoisers['student'] against denoisers['teacher']."""
        index, eps = targets.draw(table, batch, key)
        return self.losses_at(denoisers, table.at(index), batch["x"], eps, batch.get("cond"))

    def losses_at(
        self, denoisers: Mapping[str, Any], rows: targets.Rows, x: Image, eps: Image, cond: Cond | None
    ) -> Array:
        """Per-image losses [batch] for given rows (with m = s), images and noise, instead of drawn ones."""
        teacher = denoisers["teacher"]
        return targets.losses_at(
            rows, x, eps, denoisers["student"], Clipped(teacher) if self.clip else teacher, nobody, cond,
            weight=self.weighting, reduction=self.reduction,
        )  # fmt: skip


def nobody(z: Image, level: Level, cond: Cond | None = None) -> Image:
    """The estimator of an empty second step, whose weight is zero."""
    return jnp.zeros_like(z)
