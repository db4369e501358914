"""Fitting D-ODE solvers to an artefact: minutes, no training.

Lambdas are those of least squares, row by row; or, with `FitSettings.candidates`, one for all rows that is searched:
for every candidate the solver draws images, which are measured as an evaluation measures them, and the best is taken.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_distill.api.evaluation import reference_of
from diffusion_distill.api.sampling import Sampler, denoiser_of, grid_for, sample_keys, with_scale
from diffusion_distill.base import interrupts
from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.base.seeds import check_seed, key_of
from diffusion_distill.base.typing import Cond
from diffusion_distill.data import Source, from_arrays
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.model import Model
from diffusion_distill.evaluation.features import Inception
from diffusion_distill.evaluation.measuring import (
    EvaluationSettings,
    Measured,
    Part,
    as_features,
    outputs_of,
    scores,
    seen,
)
from diffusion_distill.solvers import Table, dode, engine, spelled, tabulate
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.least_squares import Fit
from diffusion_distill.solvers.pairing import Teacher, nested, published, teacher_of, teacher_steps
from diffusion_distill.solvers.search import Search, search
from diffusion_distill.solvers.spec import SamplerSpec
from diffusion_distill.training import sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.checksum import fingerprint

#: The first noise of a fit: samples are numbered from 0, and should not be those the lambdas were fitted on.
FIRST = 2**30
#: Steps a solver of a teacher is fitted for when nobody says otherwise.
FIT_STEPS = 10
#: What a search can choose by -> whether the highest value is best.
METRICS = {
    "frechet": False,
    "sfid": False,
    "kid": False,
    "precision": True,
    "recall": True,
    "inception_score": True,
    "l2": False,
}


@dataclass(frozen=True)
class FitSettings:
    """The settings of a fit.

    Attributes:
      scale: the teacher's steps per evaluation of the student, C; of a model of 1000 discrete times the teacher takes
        at most 1000 steps, as in the paper.
      batch_size: images, B.
      seed: of their noise.
      teacher_solver: any solver, perhaps with options; empty for DDIM; of iPNDM, DEIS and UniPC, themselves.
      pairing: 'nested', or 'published': by the number of the state, whatever its level.
      largest: a row keeps lambda 0 if one of its lambdas would be larger, in the paper's convention; see `dode`.
      candidates: if given, one lambda for all rows is searched among them (the paper's 'Fixed', and with the solver
        'ddim-la' its 'LA').
      search_metric: what a search chooses by, one of `METRICS`: a number of an evaluation, such as the Fréchet distance
        from reference images (the paper chooses by FID), or 'l2', the distance from the teacher's results.
      search_images: images drawn for each candidate, if they are measured against a reference.

    Raises:
      ValueError: counts that are not positive, an unknown pairing, metric or teacher, candidates that are not numbers.
    """

    scale: int = 10
    batch_size: int = 100
    seed: int = 0
    teacher_solver: str = ""
    pairing: str = "nested"
    largest: float = 1000.0
    candidates: tuple[float, ...] = ()
    search_metric: str = "frechet"
    search_images: int = 1000

    @property
    def scored(self) -> bool:
        """Whether candidates are measured against a reference."""
        return bool(self.candidates) and self.search_metric != "l2"

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("scale", "batch_size", "search_images"):
            positive_int(name, getattr(self, name))
        choose("metric of a search", self.search_metric, METRICS)
        if self.teacher_solver:
            spelled(self.teacher_solver)
        if not isinstance(self.largest, int | float) or not self.largest > 0:
            raise ValueError(f"largest, the bound of lambdas, must be positive, got {self.largest!r}.")
        if not all(isinstance(c, int | float) and math.isfinite(c) for c in self.candidates):
            raise ValueError(f"candidates must be finite numbers, got {self.candidates!r}.")
        if len(set(self.candidates)) < len(self.candidates):
            raise ValueError(f"Every candidate is tried once, got {self.candidates!r}. Leave out what is there twice.")
        choose("pairing", self.pairing, {"nested": None, "published": None})


def fit_solver(
    artefact: Artefact,
    solver: str | None = None,
    steps: int | None = None,
    settings: FitSettings | None = None,
    *,
    spec: SamplerSpec | None = None,
    cond: Cond | None = None,
    teacher: Artefact | None = None,
    reference: Source | np.ndarray | Part | None = None,
    features: Measured | Callable[[np.ndarray], Any] | None = None,
    mesh: Mesh | None = None,
    **fields: Any,
) -> FittedSolver:
    """Fits the lambdas of a solver to a teacher, with (scale + 1)·NFE network evaluations of one batch.

    Args:
      solver, steps: of `spec`, in place of its own; by default the student's own steps, 10 for a teacher.
      spec, fields: how the model will be sampled, as in `sample`.
      cond: conditions [batch_size, ...]; labels are drawn uniformly by default.
      teacher: the model the teacher's solver samples; the artefact itself by default. A student of few steps needs the
        model it was distilled from.
      reference: what a search measures against, unless it chooses by 'l2': a source, samples [n, *shape], or the Part
        that `evaluation.reference_of` or `published_reference` made of them.
      features: on which it measures; pixels by default.
      mesh: the devices, see `sampling.denoiser_of`; by default as many as the batch can be split over.

    Raises:
      ValueError: a solver without directions, a teacher that draws noise, settings out of range, a student without a
        teacher, a batch that a given mesh does not divide, or a search without the reference that its metric needs.

    Warns of rows that keep lambda 0 for the bound `largest`, and of a best candidate at the edge of the candidates.
    """
    settings, begun = settings or FitSettings(), time.monotonic()
    if artefact.steps and teacher is None:
        raise ValueError(
            f"A student made for {artefact.steps} steps knows nothing between them, so it cannot be its own teacher: "
            "give the artefact it was distilled from (--config.teacher=FOLDER)."
        )
    steps = None if steps is None else positive_int("steps", steps)
    spec = with_scale(artefact.model, SamplerSpec.of(spec, solver=solver, steps=steps, **fields))
    spec = spec.complete(artefact.steps or FIT_STEPS)
    if spec.fitted:
        raise ValueError("A fitted solver has its lambdas: leave `fitted` out to fit new ones.")
    source, model = teacher or artefact, artefact.model
    grid = grid_for(artefact, spec.steps, spec.spacing, spec.end)
    student = tabulate(spec.solver, grid, model.process)
    pair, name = _teacher(student, settings, spec, model, source.model)
    features = as_features(features, model.shape, model.data_range)
    real = _reference(reference, features, settings) if settings.scored else None
    mesh = mesh or sharding.data_mesh(sharding.devices_for(settings.batch_size))
    sharding.check_batch(settings.batch_size, mesh)
    place, indices = sharding.split(mesh), FIRST + np.arange(settings.batch_size)
    start = engine.noise(sample_keys(key_of(settings.seed), indices, place), 0, model.shape)
    given = conditions.for_samples(model, settings.batch_size, cond, settings.seed)
    here = None if given is None else jax.device_put(given, place)
    own = denoiser_of(artefact, spec, mesh)
    its = denoiser_of(teacher, spec, mesh) if teacher else None
    if settings.candidates:
        measure = far = dode.distance_from(pair, own, start, here, its)
        if real is not None:
            drawn = Sampler(model, student.plain(), own, mesh, settings.seed, spec)
            measure = _measure(drawn, settings, cond, features, real)
        found, search = _searched(student, settings, measure, far)
    else:
        found, search = dode.fit(own, student, pair, start, here, its, settings.largest), None
        _warn_of_bounds(found, settings.largest)
    facts = {
        "model": fingerprint(artefact.params),
        "teacher's model": fingerprint(source.params),
        "teacher's solver": name,
        "teacher's evaluations": pair.table.nfe,
        "evaluations": student.nfe,
        **_facts(settings, features),
        **{name: value for name, value in spec.to_dict().items() if name not in ("solver", "steps", "fitted")},
        "seconds": round(time.monotonic() - begun, 3),
    }
    lambdas, plain, fitted = (np.asarray(part, np.float64) for part in (found.lambdas, found.plain, found.fitted))
    return FittedSolver(spec.solver, model.process, grid, lambdas, plain, fitted, facts, search)


def _teacher(
    student: Table, settings: FitSettings, spec: SamplerSpec, model: Model, source: Model
) -> tuple[Teacher, str]:
    """The teacher of a student, and its solver's name."""
    name = settings.teacher_solver or teacher_of(spec.solver)
    make = lambda grid: tabulate(name, grid, model.process)  # noqa: E731
    count = teacher_steps(student.nfe, settings.scale, source.discrete_steps)
    if settings.pairing == "nested":
        return nested(student, model.process, count // student.nfe, make), name
    return published(student, make(grid_for(model, count, spec.spacing, spec.end))), name


def _facts(settings: FitSettings, features: Measured) -> dict[str, Any]:
    """What the settings say, for the file."""
    facts = {"scale": settings.scale, "images": settings.batch_size, "seed": settings.seed, "pairing": settings.pairing}
    facts |= {"largest": settings.largest, "candidates": list(settings.candidates)}
    return facts | ({"search images": settings.search_images, "features": features.name} if settings.scored else {})


def _reference(reference: Source | np.ndarray | Part | None, features: Measured, settings: FitSettings) -> Part:
    """The reference of a search, with everything that its metric needs.

    Raises:
      ValueError: there is none, or it lacks that.
    """
    metric = settings.search_metric
    if reference is None:
        raise ValueError(
            f"The best of the candidates is chosen by {metric!r}, for which reference images are needed: give "
            "fit_solver(..., reference=images), on the command line config.reference; or choose by the distance from "
            "the teacher, search_metric='l2'."
        )
    if not isinstance(reference, Part):
        source = from_arrays(reference) if isinstance(reference, np.ndarray) else reference
        reference = reference_of(source, features, _evaluated(settings))
    there = {
        "frechet": "features" in reference.moments,
        "sfid": "spatial" in reference.moments and isinstance(features, Inception),
        "inception_score": isinstance(features, Inception),
    }
    if not there.get(metric, len(reference.kept) > 0):
        raise ValueError(f"The reference and the features {features.name!r} do not allow the metric {metric!r}.")
    return reference if metric not in there else replace(reference, kept=reference.kept[:0])  # others take long


def _evaluated(settings: FitSettings) -> EvaluationSettings:
    return EvaluationSettings(count=settings.search_images, repetitions=1, batch_size=settings.batch_size)


def _measure(
    sampler: Sampler, settings: FitSettings, cond: Cond | None, features: Measured, real: Part
) -> Callable[[Table], float]:
    """The metric of images that a table draws; nan if they are not finite."""
    how, count, batch = _evaluated(settings), settings.search_images, settings.batch_size
    given = conditions.for_samples(sampler.model, count, conditions.repeated(cond, count), settings.seed)

    def measure(table: Table) -> float:
        drawn, part = replace(sampler, table=table), Part.empty(count)
        for begin in range(0, count, batch):
            here = jax.tree.map(lambda a, begin=begin: a[begin : begin + batch], given)
            images = drawn.draw(FIRST + begin, batch, here)[: count - begin]
            if not np.isfinite(images).all():
                return math.nan
            part.add(outputs_of(features, seen(images, sampler.model.data_range, how.quantisation)), how.kept)
            interrupts.check()
        return scores(part, real, how)[settings.search_metric]

    return measure


def _searched(
    student: Table, settings: FitSettings, measure: Callable[[Table], float], far: Callable[[Table], float]
) -> tuple[Fit, Search]:
    """The best candidate as a fit, whose distances are those of the results alone."""
    metric = settings.search_metric
    found = search(student, settings.candidates, measure, metric, METRICS[metric])
    if found.at_edge:
        warnings.warn(
            f"The best lambda by {metric}, {found.best:g}, stands at the edge of the candidates "
            f"{settings.candidates}: a better one may lie beyond. Widen the candidates (config.fit.candidates).",
            stacklevel=3,
        )
    lambdas = np.full(student.directions.published.shape, found.best)  # type: ignore[union-attr]
    distances = [np.array([far(table)]) for table in (student.plain(), student.distilled(lambdas))]
    return Fit(lambdas, *distances, result=None, asked=lambdas), found


def _warn_of_bounds(found: Fit, largest: float) -> None:
    for k in np.flatnonzero((found.lambdas != found.asked).any(axis=1)):
        asked = ", ".join(f"{value:.4g}" for value in found.asked[k])
        warnings.warn(
            f"Row {k} keeps lambda 0: its least squares ask for {asked}, beyond the bound largest={largest:g}. Its "
            "directions vanish or are nearly parallel, so such lambdas mean nothing for other images.",
            stacklevel=3,
        )
