"""Guided students: the guided estimates of a conditional teacher in one network call, for a range of scales.

Stage one of Meng et al., arXiv:2210.03142, section 3.1. The student is told the scale of guidance beside the condition,
and learns what classifier-free guidance makes of the teacher's two estimates:

    z      = alpha·x + sigma·eps at a level drawn as in a teacher's training, s ~ U[scales]
    target = x_u(z) + s·(x_c(z) - x_u(z))        denoisers/guidance.py; the paper writes s = 1 + w
    loss   = weighting(level)·sum over pixels of (x_student(z, s) - target)²

Stage two is any distillation of that student: BTD, TRACT, or a fit of a solver. Its teacher is not guided again. The
scales are drawn for the batch, before any loss, so that every role of an update sees the same ones
(`conditions.with_scales`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import FlaxError

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import choose
from diffusion_distill.base.guided import parts
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.base.typing import Batch, Cond, Data, Key
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.clipping import Clipped
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.denoisers.guidance import ClassifierFree
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import loss
from diffusion_distill.methods.draws import draw
from diffusion_distill.methods.method import Distiller
from diffusion_distill.methods.phases import Phase, momentum_for, updates_for, updates_per_phase
from diffusion_distill.process import noising, predictions, weighting
from diffusion_distill.process.levels import Level
from diffusion_distill.process.training_levels import NOISE_LEVELS


@dataclass(frozen=True)
class Guided(Distiller):
    """Settings of a guided student.

    Attributes:
      scales: the least and the largest scale of guidance that is learned; 1 is no guidance.
      length: training samples, see `base.lengths`.
      steps: 0 trains in continuous time, for a student that takes any number of steps; N trains on the levels of a
        grid of N steps. A teacher that is itself a student keeps its levels, whatever is said here.
      noise: how levels are drawn in continuous time, one of `training_levels.NOISE_LEVELS`.
      residual: sets the momentum of the eval average, see `phases.momentum_for`.
      clip: whether the guided estimate is clipped to the range of the data.
      others: see `Distiller`; conditions are not dropped, as nothing is left to guide.
    """

    scales: tuple[float, float] = (1.0, 5.0)
    length: str | int = "96M"
    steps: int = 0
    noise: str = "uniform"
    residual: float = 1e-3
    clip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scales", conditions.checked_scales(() if self.scales is None else self.scales))
        choose("distribution of noise levels", self.noise, NOISE_LEVELS)
        parse_length(self.length)
        if not hasattr(self.steps, "__index__") or self.steps < 0:
            raise ValueError(f"steps must be 0 (continuous time) or a number of steps, got {self.steps!r}.")

    def student_of(self, teacher: Model, student: Model | None = None) -> Model:
        """The teacher's model, or another one that is given, told the scales.

        Raises:
          ValueError: the teacher cannot be guided, or is a guided student already, or the student's network cannot be
            called with the tree of `base.guided`.
        """
        ClassifierFree(teacher.denoiser(()), self.scales[1])  # says what is wrong with a teacher
        made = dataclasses.replace(student or teacher, guided=self.scales)
        _check_network(made)
        return made

    def phases(self, model: Model, batch_size: int, grid: Level | None = None) -> list[Phase]:
        """The single phase."""
        weighting.check(self.weighting, model.prediction)
        total = parse_length(self.length)
        [updates] = updates_for(total, batch_size)
        momentum = momentum_for(self.residual, updates_per_phase(total, batch_size, 1))
        settings: dict[str, Any] = {"updates": updates, "momentum": momentum}
        if grid is None and not self.steps:
            return [self.phase("guided", None, None, **settings)]
        grid = self.teacher_grid(model, self.steps if grid is None else len(grid.sigma) - 1, grid)
        return [self.phase("guided", grid, grid, inputs=grid.at(slice(None, -1)), **settings)]

    def losses(self, denoisers: Mapping[str, Any], table: Any, batch: Batch, key: Key) -> Array:
        """Per-sample losses [batch] at levels that are drawn: of a table [rows], or in continuous time for ()."""
        u, eps = draw(batch, key)
        process = denoisers["student"].model.process
        level = _chosen(table, u) if table else NOISE_LEVELS[self.noise](process, u)
        return self.losses_at(denoisers, level, batch["x"], eps, batch["cond"])

    def losses_at(self, denoisers: Mapping[str, Any], rows: Any, x: Data, eps: Data, cond: Cond | None) -> Array:
        """Per-sample losses [batch] for given levels, samples and noise; cond is the tree of `base.guided`."""
        level, z = rows, noising.diffuse(x, eps, rows)
        scale, own = parts(cond)
        x_target = jax.lax.stop_gradient(self.guided(denoisers["teacher"], scale)(z, level, own))
        eps_target = predictions.eps_from_x(z, x_target, level)
        rule = {"weight": self.weighting, "reduction": self.reduction}
        return loss.losses(denoisers["student"], z, level, x_target, eps_target, cond, **rule)

    def guided(self, teacher: Denoise, scale: Array | None) -> Denoise:
        """The estimator of the target."""
        found = ClassifierFree(teacher, scale)
        return Clipped(found) if self.clip else found


@lru_cache(maxsize=8)  # a second for a network of ImageNet's size
def _check_network(model: Model) -> None:
    """Raises ValueError if the network of a guided student cannot be called with a scale; looks at shapes alone."""
    try:
        model.check_call()
    except (TypeError, ValueError, AttributeError, LookupError, FlaxError) as error:
        raise ValueError(
            f"The network {model.adapter.name} cannot be told the scale of guidance. A guided student's is called with "
            'cond={"guidance": scale [batch], "cond": what its teacher takes}: give such a network, '
            f"student=Model(network, ...). It said: {error}"
        ) from error


def _chosen(levels: Level, u: Array) -> Level:
    """The levels [rows] at uniform numbers [batch] in [0, 1)."""
    index = jnp.floor(u * len(levels.sigma)).astype(jnp.int32)
    return Level(*(jnp.asarray(part)[index] for part in levels))
