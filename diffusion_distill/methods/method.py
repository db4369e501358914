"""What a training method is, and what all distillations share.

A method is a value: its settings, the phases they make, and a loss. The training step knows nothing else of it, so a
new method is one file. A distillation is a `Distiller` with two functions:

    phases        which steps t -> m -> s of which grid each phase trains (`targets.make_rows`), and for how long
    estimators    whose estimates the target mixes: that of the step t -> m and that of the step m -> s
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import choose
from diffusion_distill.base.typing import Batch, Cond, Data, Key
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import loss, targets
from diffusion_distill.methods.phases import Phase, check_rate
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level


class Method(Protocol):
    """What training takes: `Denoising`, `Progressive`, `Tract`, `Knowledge`, `Guided`, or one of your own.

    A frozen dataclass whose fields are plain values, so that it can be written down and read again. It may have fields
    `dropout` and `label_dropout`, rates with which the student is trained, and a function `student_of`, which makes the
    student's model, as `Guided` has.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def averages(self) -> Mapping[str, float]:
        """name -> momentum of the averages of the student that the loss needs, besides the eval average."""
        ...

    def phases(self, model: Model, batch_size: int, grid: Level | None = None) -> list[Phase]:
        """The plan of a run.

        Args:
          model: the student's.
          grid: the levels of a teacher that is itself a student; None for one that takes any levels.
        """
        ...

    def losses(self, denoisers: Mapping[str, Any], inputs: Any, batch: Batch, key: Key, /) -> Array:
        """Per-sample losses [batch].

        Args:
          denoisers: 'student', 'teacher' if there is one, and one for each of `averages`.
          inputs: those of the phase.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Distiller:
    """The settings that distillations share, their loss, and parts of their phases.

    Attributes:
      grid: the rule of the first teacher's grid, one of `grids.RULES`; empty for the process's own. A teacher that is
        itself a student keeps its levels.
      weighting, reduction: of the loss, see `process.weighting` and `methods.loss`.
      learning_rate, warmup, cold_start, anneal: of each phase, see `Phase`.
      dropout: rate in the student's network while it is trained. None is no dropout, whatever the teacher was
        trained with; a student model that is given explicitly keeps its network's own rate.
      label_dropout: rate at which cond become the null label that guidance needs; None for the rate of the
        network's own field `label_dropout`, 0 if it has none. See `training.dropout`.
    """

    grid: str = ""
    weighting: str = "snr_trunc"
    reduction: str = "sum"
    learning_rate: float = 2e-4
    warmup: int = 0
    cold_start: bool = False
    anneal: bool = False
    dropout: float | None = None
    label_dropout: float | None = None

    @property
    def averages(self) -> Mapping[str, float]:
        """Momenta of averages kept during training besides the eval average."""
        return {}

    def __post_init__(self) -> None:
        loss.check(self.weighting, self.reduction)
        check_rate("dropout", self.dropout)
        check_rate("label_dropout", self.label_dropout)
        if self.grid:
            choose("rule of a grid", self.grid, grids.RULES)

    def estimators(self, denoisers: Mapping[str, Any], rows: targets.Rows) -> tuple[Denoise, Denoise]:
        """The estimators of the steps t -> m and m -> s of the target."""
        raise NotImplementedError

    def losses(self, denoisers: Mapping[str, Any], table: targets.Rows, batch: Batch, key: Key) -> Array:
        """Per-sample losses [batch] of denoisers['student'] on rows of the table and noise that are drawn."""
        index, eps = targets.draw_rows(table, batch, key)
        return self.losses_at(denoisers, table.at(index), batch["x"], eps, batch.get("cond"))

    def losses_at(
        self, denoisers: Mapping[str, Any], rows: targets.Rows, x: Data, eps: Data, cond: Cond | None
    ) -> Array:
        """Per-sample losses [batch] for given rows, samples and noise, instead of drawn ones."""
        first, second = self.estimators(denoisers, rows)
        return targets.losses_at(
            rows, x, eps, denoisers["student"], first, second, cond, weight=self.weighting, reduction=self.reduction
        )

    def teacher_grid(self, model: Model, steps: int, own: Level | None) -> Level:
        """The grid [steps + 1] of the first teacher: its own levels, or those of the rule.

        Raises:
          ValueError: its own levels are another number of steps.
        """
        if own is None:
            return grids.make_grid(model.process, steps, self.grid)
        if len(own.sigma) != steps + 1:
            raise ValueError(
                f"The teacher is itself a student of {len(own.sigma) - 1} steps, but the method starts from {steps}. "
                f"Start from {len(own.sigma) - 1} steps."
            )
        return grids.check(own)

    def phase(self, name: str, teacher_grid: Level | None, grid: Level | None, **others: Any) -> Phase:
        """A phase between two grids with the method's learning rate; others are fields of `Phase`.

        Args:
          teacher_grid, grid: None for any levels.
        """
        return Phase(
            name=name,
            learning_rate=self.learning_rate,
            teacher_steps=0 if teacher_grid is None else len(teacher_grid.sigma) - 1,
            student_steps=0 if grid is None else len(grid.sigma) - 1,
            grid=grid,
            warmup=self.warmup,
            cold_start=self.cold_start,
            anneal=self.anneal,
            **others,
        )


def student_of(method: Method, teacher: Model, student: Model | None = None) -> Model:
    """The student's model.

    Args:
      student: one with another network than the teacher's.

    Returns:
      What the method makes of them, if it has a function `student_of`; else the student, or the teacher if there is
      none, which is guided if the teacher is.

    Raises:
      ValueError: the student is guided, and the teacher is not, or for other scales.
    """
    if make := getattr(method, "student_of", None):
        return make(teacher, student)
    if student is not None and student.guided not in (None, teacher.guided):
        raise ValueError(
            f"The student is guided for scales {student.guided}, but the teacher for {teacher.guided}. Distil guidance "
            "first, with dd.Guided(...), and leave Model(guided=...) out."
        )
    return teacher if student is None else dataclasses.replace(student, guided=teacher.guided)
