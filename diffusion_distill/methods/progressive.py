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
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.arrays import expand
from diffusion_distill.base.errors import choose, finite_number
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.base.typing import Cond, Data
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import targets
from diffusion_distill.methods.method import Distiller
from diffusion_distill.methods.phases import Phase, check_averaging, updates_for
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers import SOLVERS

#: What the target is at zero noise for a network that predicts both x and eps.
ZERO_NOISE_RULES = {
    "reconciled": "the teacher's x_hat (Google's code)",
    "x_head": "its raw x output (TRACT's BTD baseline)",
}


@dataclass(frozen=True)
class Progressive(Distiller):
    """Settings of BTD; defaults are the released CIFAR-10 ones, with the paper's longer last phases.

    Attributes:
      start_steps, end_steps: from the teacher's steps to the last student's; their ratio is a power of 2.
      phase_length: training samples of one halving, see `base.lengths` (6250K is 50,000 updates of 128).
      last_two_longer: how many times longer the phases to 2 and to 1 steps are.
      momentum: of the averaged student; 0 keeps the student itself.
      averaging: the rule of that average, see `training.ema`.
      zero_noise: one of `ZERO_NOISE_RULES`.
      teacher_solver: what the teacher steps by in the first phase; later ones are students and step by DDIM.
      others: see `Distiller`.
    """

    start_steps: int = 1024
    end_steps: int = 1
    phase_length: str | int = "6250K"
    last_two_longer: float = 2.0
    _: KW_ONLY
    reduction: str = "mean"
    learning_rate: float = 5e-5
    anneal: bool = True
    momentum: float = 0.0
    averaging: str = "corrected"
    zero_noise: str = "reconciled"
    teacher_solver: str = "ddim"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("rule at zero noise", self.zero_noise, ZERO_NOISE_RULES)
        choose("solver", self.teacher_solver, SOLVERS)
        check_averaging(self.averaging)
        parse_length(self.phase_length)
        halvings(self.start_steps, self.end_steps)
        if finite_number("last_two_longer", self.last_two_longer) == 0:
            raise ValueError(
                f"last_two_longer must be positive (1: phases of equal length), got {self.last_two_longer}."
            )

    def phases(self, model: Model, batch_size: int, grid: Level | None = None) -> list[Phase]:
        """One phase per halving, most steps first."""
        students = halvings(self.start_steps, self.end_steps)
        grid = self.teacher_grid(model, self.start_steps, grid)
        levels = [grid.at(slice(None, None, 2**k)) for k in range(len(students) + 1)]
        solvers = [self.teacher_solver, *["ddim"] * (len(students) - 1)]
        tables = targets.pad(
            [rows(fine, solver, model.process) for fine, solver in zip(levels[:-1], solvers, strict=True)]
        )
        [updates] = updates_for(parse_length(self.phase_length), batch_size)
        return [
            self.phase(
                f"btd {2 * n}→{n}",
                levels[k],
                levels[k + 1],
                updates=max(1, round(updates * (self.last_two_longer if n <= 2 else 1))),
                momentum=self.momentum,
                averaging=self.averaging,
                inputs=tables[k],
            )
            for k, n in enumerate(students)
        ]

    def estimators(self, denoisers: Mapping[str, Any], rows: targets.Rows) -> tuple[Denoise, Denoise]:
        """The teacher twice; in rows that end at zero noise perhaps its raw x head."""
        teacher = denoisers["teacher"]
        if self.zero_noise == "reconciled":
            return teacher, teacher

        def x_head_at_zero_noise(z: Data, level: Level, cond: Cond | None = None) -> Data:
            x_hat, x_head = teacher.x_head(z, level, cond)
            return jnp.where(expand(rows.second == 1, z), x_head, x_hat)

        return teacher, x_head_at_zero_noise


def rows(grid: Level, solver: str = "ddim", process: Process | None = None) -> targets.Rows:
    """The steps t -> m -> s of a student of half the steps of the teacher's grid [2N + 1], the cleanest first."""
    t = np.arange(len(grid.sigma) - 3, -1, -2)
    return targets.make_rows(
        grid, t, t + 1, t + 2, clean_end=True, solver=solver, second_solver=solver, process=process
    )


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
