"""Fitting a solver's lambdas for a pipeline of diffusers, in the pipeline's own loop.

    fitted = fit(pipeline, 10, prompt=prompts)
    fitted.save("solver.json")

The pipeline runs once with a scheduler that has the timesteps of the teacher's rows and then of the student's: it walks
as the teacher, whose states it keeps, and then, from the same noise, as the student. Each row's lambdas are those of
least squares (solvers/least_squares.py). Prompts, guidance and precision are therefore exactly those of sampling. With
N rows and `scale` C this is C·N + N calls of one batch.
"""

from __future__ import annotations

import inspect
import reprlib
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from diffusion_distill.base.errors import finite_number
from diffusion_distill.process.levels import Level
from diffusion_distill.process.vp_discrete import Discrete
from diffusion_distill.solvers import Table, tabulate
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.least_squares import fit_row
from diffusion_distill.solvers.pairing import Teacher, check, nested, teacher_of, teacher_steps
from diffusion_distill.solvers.registry import DEFAULT_SOLVER
from diffusion_distill.solvers.rows import after
from diffusion_distill.torch.scheduler import DistilledODEScheduler


@dataclass(frozen=True)
class Asked:
    """What is asked of a fit, and what is taken where nothing is said; see `fit`."""

    scale: int = 10
    teacher_solver: str = ""
    largest: float = 1000.0

    def __post_init__(self) -> None:
        finite_number("largest", self.largest)


def fit(
    model: Any,
    steps: int,
    *,
    solver: str = DEFAULT_SOLVER,
    scale: int = Asked.scale,
    teacher_solver: str = Asked.teacher_solver,
    largest: float = Asked.largest,
    scheduler: Any = None,
    start: torch.Tensor | None = None,
    progress: bool = True,
    **call: Any,
) -> FittedSolver:
    """Fits a solver to a pipeline, or to a function.

    Args:
      model: a pipeline, or the network with its conditions and guidance, (inputs [batch, ...], timestep) -> output.
      steps: of the solver.
      solver: its name in `SOLVERS`, perhaps with options; one with a D-ODE variant.
      scale: the teacher's steps per row. Of a model of N betas the teacher takes at most N steps.
      teacher_solver: empty for DDIM, and of iPNDM, DEIS and UniPC for themselves.
      largest: a row one of whose lambdas is larger keeps 0.
      scheduler: says what the network takes and returns, a scheduler of diffusers; by default the pipeline's.
      start: unit noise [batch, ...], of functions only.
      progress: show a progress bar.
      call: of pipelines, what it is called with: prompts, guidance, a generator.

    Returns:
      The fitted solver; its file is the one that the command line writes and reads.

    Raises:
      ValueError: a solver without lambdas, a function without its scheduler or its start, a pipeline that begins with
        an image in the middle of its steps, or an output of the network that is not finite.

    Warns of rows that keep lambda 0 for the bound `largest`.
    """
    own = scheduler_of(model, scheduler)
    fitting = FittingScheduler.from_config(own.config, solver=solver, fitted=None)
    fitting.asked = Asked(scale, teacher_solver, largest)
    walk(model, fitting, steps, start, progress, **call)
    return fitting.result()


def scheduler_of(model: Any, scheduler: Any) -> Any:
    """The given scheduler, or the pipeline's; ValueError if there is neither, or it is none."""
    own = getattr(model, "scheduler", None) if scheduler is None else scheduler
    if own is None:
        raise ValueError("Give the scheduler of the function's model, such as DDIMScheduler(beta_schedule='linear').")
    if not hasattr(own, "config"):
        raise ValueError(f"scheduler= must be a scheduler of diffusers, got {reprlib.repr(own)}.")
    return own


class WalkingScheduler(DistilledODEScheduler):
    """A scheduler that walks from noise to the end, through finite numbers only."""

    def _start(self, timestep: Any, sample: torch.Tensor) -> None:
        if self._row_of(timestep):
            raise ValueError(
                "Fits and levels need all steps, from pure noise, but the pipeline begins with an image in the middle "
                "of them. Give strength=1, or take the pipeline that begins with noise."
            )
        super()._start(None, sample)

    def _x_hat(self, output: torch.Tensor, y: torch.Tensor, level: Level) -> torch.Tensor:
        x_hat = super()._x_hat(output, y, level)
        if not x_hat.isfinite().all():
            raise ValueError(
                f"The network's output at the timestep {self._told[self._index]:g} is not finite. Look at its weights; "
                "if it computes in float16, take bfloat16 or float32."
            )
        return x_hat


class FittingScheduler(WalkingScheduler):
    """The scheduler of a fit: the teacher's rows, then the student's."""

    asked: Asked = Asked()

    def result(self) -> FittedSolver:
        """The solver with its lambdas, after all rows.

        Raises:
          ValueError: some rows are missing.
        """
        if len(self._facts) < self._student.nfe:
            raise ValueError(f"The fit was left after {len(self._facts)} of {self._student.nfe} rows of the student.")
        lambdas, plain, fitted, asked = (
            np.stack([part.double().cpu().numpy() for part in parts]) for parts in zip(*self._facts, strict=True)
        )
        for k in np.flatnonzero((lambdas != asked).any(axis=1)):
            bound = f"more than largest={self.asked.largest:g} in size"
            warnings.warn(f"Row {k} keeps lambda 0: its least squares ask for {asked[k]}, {bound}.", stacklevel=2)
        facts = {
            "teacher's solver": self._name,
            "teacher's evaluations": self._pair.table.nfe,
            "evaluations": self._student.nfe,
            "images": self._images,
            **asdict(self.asked),
            "seconds": round(time.monotonic() - self._begun, 3),
        }
        return FittedSolver(
            self.config.solver, self.convention.process, self._grid, lambdas, plain, fitted, facts, None
        )

    def _use(self, grid: Level, device: Any) -> None:
        process, self._begun = self.convention.process, time.monotonic()
        self._student = tabulate(self.config.solver, grid, process)
        self._name = self.asked.teacher_solver or teacher_of(self.config.solver)
        most = process.count if isinstance(process, Discrete) else None
        count = teacher_steps(self._student.nfe, self.asked.scale, most) // self._student.nfe
        pair = nested(self._student, process, count, lambda levels: tabulate(self._name, levels, process))
        check(self._student, pair)
        self._pair = Teacher(pair.table.plain(), pair.targets)
        self._grid, self._table, self._index, self._begin_index = grid, self._pair.table, -1, None
        self._goals, self._facts = {}, []
        both = (np.concatenate(parts) for parts in zip(self._table.level, self._student.level, strict=True))
        self._lay_out(Level(*both), self._table.init, device)
        self.num_inference_steps = len(self._told)

    def _start(self, timestep: Any, sample: torch.Tensor) -> None:
        super()._start(timestep, sample)
        self._first, self._images = self._registers[0], len(sample)

    def _row(self, k: int) -> Table:
        walked = self._table.nfe
        return super()._row(k) if k < walked else self._student.row(k - walked)

    def _advance(self, row: Table, registers: tuple, x_hat: torch.Tensor) -> tuple:
        done, walked = self._index + 1, self._table.nfe
        if done > walked:
            goal = self._goals[self._pair.targets[done - walked - 1]]
            registers, *facts = fit_row(row, registers, x_hat, goal, self.asked.largest)
            self._facts.append(facts)
            return registers
        registers = after(row, registers, x_hat)
        if done in self._pair.targets:
            self._goals[done] = registers[0]
        if done < walked:
            return registers
        return (self._first * (self._student.init / self._table.init),) * self._student.weights.shape[1]


def walk(
    model: Any, scheduler: Any, steps: int, start: torch.Tensor | None = None, progress: bool = True, **call: Any
) -> Any:
    """Runs a scheduler of ours through a pipeline's loop, or through one for a function.

    Args:
      model, start, call: as in `fit`.

    Returns:
      What the pipeline returns, or the last sample.

    Raises:
      ValueError: a function without its start or with arguments of a pipeline, or a pipeline with a start or with
        num_inference_steps.
    """
    if "num_inference_steps" in call:
        raise ValueError("Leave num_inference_steps out: the number of steps is the second argument.")
    if hasattr(model, "scheduler"):
        if start is not None:
            raise ValueError("start= is for functions. Give a pipeline what it takes, such as latents= or generator=.")
        if "latents" in inspect.signature(model.__call__).parameters:
            call = {"output_type": "latent", **call}
        with in_place_of(model, scheduler, progress):
            return model(num_inference_steps=steps, **call)
    if start is None or not isinstance(start, torch.Tensor):
        found = "" if start is None else f", got {type(start).__name__}"
        raise ValueError(f"Give the noise that a function's samples start from, start=torch.randn(batch, ...){found}.")
    if call:
        raise ValueError(f"A function takes no {', '.join(call)}: put conditions and guidance into the function.")
    scheduler.set_timesteps(steps, device=start.device)
    with torch.no_grad(), shown(scheduler, progress):
        return loop(model, scheduler, scheduler.init_noise_sigma * start)


def loop(network: Callable, scheduler: Any, z: torch.Tensor) -> torch.Tensor:
    """A pipeline's loop without a pipeline."""
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(z, timestep), timestep)
        z = scheduler.step(output, timestep, z).prev_sample
    return z


@contextmanager
def in_place_of(pipeline: Any, scheduler: Any, progress: bool) -> Iterator[None]:
    """Puts a scheduler into a pipeline for a while, with a progress bar that counts its rows."""
    own, bars = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", {})
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(**{**bars, "disable": True})
    try:
        with shown(scheduler, progress):
            yield
    finally:
        pipeline.scheduler = own
        pipeline.set_progress_bar_config(**bars)


@contextmanager
def shown(scheduler: Any, progress: bool) -> Iterator[None]:
    """A progress bar that moves with each step of a scheduler."""
    from tqdm import tqdm

    step = scheduler.step
    with tqdm(disable=not progress, desc="network calls") as bar:

        @wraps(step)  # pipelines look which arguments it takes
        def counted(*args: Any, **kwargs: Any) -> Any:
            bar.total = len(scheduler.timesteps)
            bar.update()
            return step(*args, **kwargs)

        scheduler.step = counted
        try:
            yield
        finally:
            del scheduler.step
