"""Fitting D-ODE solvers to an artefact: minutes, no training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from diffusion_distill import sampling
from diffusion_distill.distillation import dode
from diffusion_distill.distillation.fitted import FittedSolver
from diffusion_distill.errors import choose, positive_int
from diffusion_distill.model import Model
from diffusion_distill.runs.sampling import denoiser_of, grid_for, labels_for, sample_keys
from diffusion_distill.seeds import check_seed, key_of
from diffusion_distill.solvers import Table, spelled, tabulate
from diffusion_distill.training import sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.checksum import fingerprint

#: The first noise of a fit: samples are numbered from 0, and should not be those the lambdas were fitted on.
FIRST = 2**30
#: Solvers whose teacher is the same solver: the paper's, and UniPC, which a DDIM teacher would hold back; else DDIM.
THEIR_OWN_TEACHERS = ("ipndm", "deis", "unipc")


@dataclass(frozen=True)
class FitSettings:
    """How lambdas are fitted.

    Attributes:
      scale: the teacher's steps per evaluation of the student, C.
      batch_size: images, B.
      seed: of their noise.
      teacher_solver: any solver, perhaps with options; empty for DDIM; of iPNDM, DEIS and UniPC, themselves.
      pairing: 'nested', or 'published': by the number of the state, whatever its level.
      candidates: if given, one lambda for all rows is searched among them, by the distance from the teacher's result
        (the paper's 'Fixed', and with the solver 'ddim-la' its 'LA').

    Raises:
      ValueError: counts that are not positive, an unknown pairing.
    """

    scale: int = 10
    batch_size: int = 100
    seed: int = 0
    teacher_solver: str = ""
    pairing: str = "nested"
    candidates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_seed(self.seed)
        positive_int("scale", self.scale)
        positive_int("batch_size", self.batch_size)
        choose("pairing", self.pairing, {"nested": None, "published": None})


def fit_solver(
    artefact: Artefact,
    solver: str = "ddim",
    steps: int | None = None,
    settings: FitSettings | None = None,
    *,
    spacing: str = "time",
    end: float = 0.0,
    clip: bool = True,
    guidance: Mapping[str, Any] | None = None,
    labels: np.ndarray | None = None,
    teacher: Artefact | None = None,
) -> FittedSolver:
    """Fits the lambdas of a solver to a teacher, with (scale + 1)·NFE network evaluations of one batch.

    Args:
      solver, steps, spacing, end, clip, guidance: as in `runs.sample`, for which the solver is fitted.
      labels: [batch_size] classes; drawn uniformly by default.
      teacher: the model the teacher's solver samples; the artefact itself by default. A student of few steps needs the
        model it was distilled from.

    Raises:
      ValueError: a solver without directions, a teacher that draws noise, settings out of range, or a student without
        a teacher.
    """
    settings = settings or FitSettings()
    if artefact.steps and teacher is None:
        raise ValueError(
            f"A student made for {artefact.steps} steps knows nothing between them, so it cannot be its own teacher: "
            "give the artefact it was distilled from (--config.teacher=FOLDER)."
        )
    if artefact.steps and steps is None:
        steps = artefact.steps
    steps = positive_int("steps", 10 if steps is None else steps)
    begun, artefact = time.monotonic(), artefact.on_grid(steps)
    model, grid = artefact.model, grid_for(artefact.model, steps, spacing, end)
    student = tabulate(solver, grid, model.schedule)
    name = settings.teacher_solver or (solver if spelled(solver)[0] in THEIR_OWN_TEACHERS else "ddim")
    make = partial(tabulate, name, schedule=model.schedule)  # grid -> table
    pair = teacher_of(student, model, settings, make, spacing, end)
    batch = settings.batch_size
    mesh = sharding.data_mesh(sharding.devices_for(batch))
    place, indices = sharding.split(mesh), FIRST + np.arange(batch)
    start = sampling.noise(sample_keys(key_of(settings.seed), indices, place), 0, model.image_shape)
    given = labels_for(model, batch, labels, settings.seed)
    here = None if given is None else jax.device_put(given, place)
    own = denoiser_of(artefact, clip, guidance, mesh)
    its = denoiser_of(teacher, clip, guidance, mesh) if teacher else None
    if settings.candidates:
        found = dode.search(own, student, pair, start, settings.candidates, here, its)
    else:
        found = dode.fit(own, student, pair, start, here, its)
    return FittedSolver(
        solver,
        model.schedule,
        grid,
        np.asarray(found.lambdas, np.float64),
        np.asarray(found.plain, np.float64),
        np.asarray(found.fitted, np.float64),
        {
            "model": fingerprint(artefact.params),
            "teacher's model": fingerprint((teacher or artefact).params),
            "teacher's solver": name,
            "teacher's evaluations": pair.table.nfe,
            "evaluations": student.nfe,
            "scale": settings.scale,
            "images": batch,
            "seed": settings.seed,
            "pairing": settings.pairing,
            "candidates": list(settings.candidates),
            "spacing": spacing,
            "end": end,
            "clip": clip,
            "guidance": dict(guidance or {}),
            "seconds": round(time.monotonic() - begun, 3),
        },
    )


def teacher_of(
    student: Table, model: Model, settings: FitSettings, make: Any, spacing: str, end: float
) -> dode.Teacher:
    """The teacher of a student by the settings' pairing."""
    if settings.pairing == "nested":
        return dode.nested(student, model.schedule, settings.scale, make)
    count = settings.scale * student.nfe
    fine = grid_for(model.on_grid(count), count, spacing, end)
    return dode.published(student, make(fine))
