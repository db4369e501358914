"""BTD, binary time distillation: progressive distillation of Salimans & Ho, arXiv:2202.00512, Algorithm 2.

Each phase halves the steps. The student of N steps learns, at its grid points t, to do in one step t -> s
what the teacher of 2N steps does in two, t -> m -> s; both estimates are the teacher's and nothing is
clipped. Then the student becomes the teacher. On the last step (s = 0) the target is the teacher's second
estimate itself, as in the sampler, although the process keeps a little noise there.

The learning rate falls linearly to 0 in every phase and the optimizer starts afresh; the last two
phases (to 2 steps and to 1) are twice as long in the paper (Appendix; not in the released configurations).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.arrays import Array, expand
from diffusion_distill.base.errors import choose
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.base.typing import Batch, Cond, Image, Key
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import loss, targets
from diffusion_distill.methods.phases import Phase, check_averaging, check_rate, updates_for
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers import SOLVERS

#: What the target is at zero noise for a network that predicts both x and eps.
ZERO_NOISE_RULES = {
    "reconciled": "the teacher's x_hat (Google's code)",
    "x_head": "its raw x output (TRACT's BTD baseline)",
}


@dataclass(frozen=True)
class Progressive:
    """Settings of BTD; defaults are the released CIFAR-10 ones, with the paper's longer last phases.

    Attributes:
      start_steps, end_steps: from the teacher's steps to the last student's; their ratio is a power of 2.
      phase_length: training samples of one halving, see `base.lengths` (6250K is 50,000 updates of 128).
      last_two_longer: how many times longer the phases to 2 and to 1 steps are.
      momentum: of the averaged student; 0 keeps the student itself.
      averaging: the rule of that average, see `training.ema`.
      zero_noise: one of `ZERO_NOISE_RULES`.
      teacher_solver: what the teacher steps by in the first phase; later ones are students and step by DDIM.
      dropout: rate in the student's network while it is trained. None is no dropout, whatever the teacher was
        trained with; a student model that is given explicitly keeps its network's own rate.
      label_dropout: rate at which cond become the null label that guidance needs; None for the rate of the
        network's own field `label_dropout`, 0 if it has none. See `training.dropout`.
    """

    start_steps: int = 1024
    end_steps: int = 1
    phase_length: str | int = "6250K"
    last_two_longer: float = 2.0
    weighting: str = "snr_trunc"
    reduction: str = "mean"
    learning_rate: float = 5e-5
    anneal: bool = True
    momentum: float = 0.0
    averaging: str = "corrected"
    zero_noise: str = "reconciled"
    teacher_solver: str = "ddim"
    dropout: float | None = None
    label_dropout: float | None = None

    def __post_init__(self) -> None:
        loss.check(self.weighting, self.reduction)
        choose("rule at zero noise", self.zero_noise, ZERO_NOISE_RULES)
        choose("solver", self.teacher_solver, SOLVERS)
        check_averaging(self.averaging)
        check_rate("dropout", self.dropout)
        check_rate("label_dropout", self.label_dropout)
        parse_length(self.phase_length)
        halvings(self.start_steps, self.end_steps)
        if self.last_two_longer <= 0:
            raise ValueError(
                f"last_two_longer must be positive (1: phases of equal length), got {self.last_two_longer}."
            )

    def phases(self, model: Model, batch_size: int) -> list[Phase]:
        """One phase per halving, most steps first."""
        students = halvings(self.start_steps, self.end_steps)
        solvers = [self.teacher_solver, *["ddim"] * (len(students) - 1)]
        tables = targets.pad([rows(model.process, n, solver) for n, solver in zip(students, solvers, strict=True)])
        [updates] = updates_for(parse_length(self.phase_length), batch_size)
        return [
            Phase(
                name=f"btd {2 * n}→{n}",
                updates=max(1, round(updates * (self.last_two_longer if n <= 2 else 1))),
                learning_rate=self.learning_rate,
                teacher_steps=2 * n,
                student_steps=n,
                anneal=self.anneal,
                momentum=self.momentum,
                averaging=self.averaging,
                inputs=table,
            )
            for n, table in zip(students, tables, strict=True)
        ]

    #: Momenta of averages kept during training besides the eval average.
    averages: ClassVar[Mapping[str, float]] = {}

    def losses(self, denoisers: Mapping[str, Any], table: targets.Rows, batch: Batch, key: Key) -> Array:
        """Per-image losses [batch] of denoisers['student'] against denoisers['teacher']."""
        index, eps = targets.draw(table, batch, key)
        return self.losses_at(denoisers, table.at(index), batch["x"], eps, batch.get("cond"))

    def losses_at(
        self, denoisers: Mapping[str, Any], rows: targets.Rows, x: Image, eps: Image, cond: Cond | None
    ) -> Array:
        """Per-image losses [batch] for given rows, images and noise, instead of drawn ones."""
        teacher, second = denoisers["teacher"], self.second(denoisers["teacher"], rows)
        return targets.losses_at(
            rows, x, eps, denoisers["student"], teacher, second, cond,
            weight=self.weighting, reduction=self.reduction,
        )  # fmt: skip

    def second(self, teacher: Any, rows: targets.Rows) -> Any:
        """The estimator of the second step: the teacher, or its raw x head in rows that end at zero noise."""
        if self.zero_noise == "reconciled":
            return teacher

        def x_head_at_zero_noise(z: Image, level: Level, cond: Cond | None) -> Image:
            x_hat, x_head = teacher.x_head(z, level, cond)
            return jnp.where(expand(rows.second == 1, z), x_head, x_hat)

        return x_head_at_zero_noise


def rows(process: Process, student_steps: int, solver: str = "ddim") -> targets.Rows:
    """The triples of a student of N steps: t = 2i/2N, m = (2i-1)/2N, s = (2i-2)/2N for i = 1 .. N."""
    t = np.arange(2, 2 * student_steps + 1, 2)
    n = 2 * student_steps
    return targets.make_rows(process, n, t, t - 1, t - 2, clean_end=True, solver=solver, second_solver=solver)


def halvings(start_steps: int, end_steps: int) -> list[int]:
    """The students' step counts from start_steps / 2 down to end_steps.

    Raises:
      ValueError: the counts are not positive or their ratio is not a power of two, at least 2.
    """
    ratio, rest = divmod(start_steps, end_steps) if end_steps > 0 else (0, 1)
    if rest or ratio < 2 or ratio & (ratio - 1):
        raise ValueError(
            f"BTD halves the number of steps: start_steps / end_steps must be 2, 4, 8, ..., got {start_steps} / "
            f"{end_steps}. Choose for example 1024 and 1."
        )
    return [start_steps // 2**k for k in range(1, ratio.bit_length())]
