"""Drawing samples from an artefact."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from diffusion_distill.base import interrupts
from diffusion_distill.base.errors import positive_int
from diffusion_distill.base.seeds import check_seed, key_of
from diffusion_distill.base.typing import Cond, Key
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.clipping import Clipped, Thresholded
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.denoisers.guidance import AtScale, ClassifierFree, ClassifierGuided, check_classifier
from diffusion_distill.denoisers.model import Model
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers import Table, engine, tabulate
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.spec import DEFAULT_SOLVER, SamplerSpec
from diffusion_distill.training import sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.checksum import fingerprint
from diffusion_distill.training.progress import Progress

#: Steps a teacher is sampled with when nobody says otherwise.
TEACHER_STEPS = 64
#: Guidance that changes nothing.
UNGUIDED: Mapping[str, Any] = MappingProxyType({"scale": 1.0})


def grid_for(model: Model | Artefact, steps: int, spacing: str = "", end: float = 0.0) -> Level:
    """The grid [steps + 1] on which a model is sampled, from time 1.

    Args:
      model: a model; or an artefact, of which a student keeps the levels that it was made for, or every k-th of them,
        if the number of steps divides its own and neither spacing nor end ask for others.
      spacing: one of `process.grids.RULES`; empty for the process's own.
      end: the process's time at which it ends; 0 means exactly zero noise.
    """
    own = model.grid if isinstance(model, Artefact) and not spacing and not end else None
    if own is not None and model.steps % positive_int("steps", steps) == 0:  # type: ignore[union-attr]
        return grids.clean_end(own.at(slice(None, None, (len(own.sigma) - 1) // steps)))
    grid = grids.make_grid(_process(model), steps, spacing, end=end)
    return grid if end else grids.clean_end(grid)


def _process(model: Model | Artefact) -> Process:
    return model.model.process if isinstance(model, Artefact) else model.process


def table_for(
    model: Model | Artefact, steps: int, *solver: str, spacing: str = "", end: float = 0.0, **options: Any
) -> Table:
    """A solver's plain table on `grid_for`.

    Args:
      model, spacing, end: as in `grid_for`.
      solver: one name of `SOLVERS`, perhaps with options, 'ddim' by default. It may be given as solver=NAME too; beside
        a name by place, solver=... is an option of the solver, as the ablation has one.
      options: of the solver, more of them.
    """
    if len(solver) > 1:
        raise TypeError(f"A table is of one solver, with its options as option=value; got {solver}.")
    name = solver[0] if solver else options.pop("solver", DEFAULT_SOLVER)
    return tabulate(name, grid_for(model, steps, spacing, end), _process(model), **options).plain()


def denoiser_of(
    artefact: Artefact, spec: SamplerSpec | None = None, mesh: Mesh | None = None, **fields: Any
) -> Denoise:
    """An artefact's denoiser as a spec samples it: guided, thresholded, clipped; on the devices of a mesh.

    A guided student is told the scale of guidance, and not guided again; see `with_scale`.

    Args:
      mesh: the devices; by default all, with a copy on each. Of a mesh whose axis 'params' is longer than one, each
        device has its share of the parameters, which are gathered in every call.
      fields: of the spec, in place of its own.

    Raises:
      ValueError, TypeError: guidance of an unconditional model, with a null condition that it does not have, or with a
        classifier of other images or classes; of a guided student, as `with_scale`.
    """
    spec, denoise = with_scale(artefact.model, SamplerSpec.of(spec, **fields)), artefact.denoiser(clip=False)
    guidance = dict(spec.guidance or UNGUIDED)
    if artefact.model.guided:
        denoise = AtScale(denoise, float(guidance["scale"]))
    elif "classifier" in guidance:
        check_classifier(guidance["classifier"], artefact.model)
        denoise = ClassifierGuided(denoise, guidance["classifier"], guidance["scale"])
    elif guidance["scale"] != 1:
        denoise = ClassifierFree(denoise, guidance["scale"], guidance.get("null"))
    denoise = Thresholded(denoise, spec.threshold) if spec.threshold else denoise
    return sharding.place(Clipped(denoise) if spec.clip else denoise, mesh or sharding.data_mesh())


def with_scale(model: Model, spec: SamplerSpec) -> SamplerSpec:
    """A spec as a model is sampled with it: for a guided student it has the scale that the student is told.

    Without a scale that is 1, no guidance, or if the student did not learn 1, the nearest to it that it learned, of
    which a warning tells.

    Raises:
      ValueError: a scale that a guided student did not learn, or for it anything but a scale.
    """
    if model.guided is None:
        return spec
    low, high = model.guided
    if spec.guidance is None:
        scale = min(max(1.0, low), high)
        if scale != 1:
            said = f"The student learned guidance at scales from {low:g} to {high:g}. No scale was given: it is told"
            warnings.warn(f'{said} {scale:g}. To choose another, give guidance={{"scale": s}}.', stacklevel=4)
        return SamplerSpec.of(spec, guidance={"scale": scale})
    if set(spec.guidance) != {"scale"}:
        raise ValueError(
            f"The model is guided already: it is told a scale and nothing else, got {', '.join(spec.guidance)}. Leave "
            "out null and classifier."
        )
    if not low <= (scale := float(spec.guidance["scale"])) <= high:
        raise ValueError(
            f"The scale of guidance must be a finite number from {low:g} to {high:g}, which this student learned, got "
            f"{scale:g}."
        )
    return spec


def guidance_used(artefacts: Mapping[str, Artefact], asked: SamplerSpec) -> dict[str, Any] | None:
    """The guidance of all artefacts, or that of each by its name where guided students are told other scales."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever samples tells of a scale that nobody gave
        used = {name: with_scale(found.model, asked).to_dict()["guidance"] for name, found in artefacts.items()}
    first = next(iter(used.values()))
    return first if all(guidance == first for guidance in used.values()) else used


@dataclass(frozen=True)
class Sampler:
    """A model bound to a solver: draws sample number i of a seed, whatever is drawn with it.

    Attributes:
      model: without parameters.
      table: the solver on its grid.
      denoise: the model's denoiser on the devices of the mesh.
      seed: of all noise.
      spec: what the table and the denoiser were made from. If it clips, results are clipped too, for solvers whose last
        step is not x_hat itself.
    """

    model: Model
    table: Table
    denoise: Denoise
    mesh: Mesh
    seed: int = 0
    spec: SamplerSpec = field(default_factory=SamplerSpec)

    @property
    def about(self) -> dict[str, Any]:
        """The facts about the sampler for results, JSON-ready."""
        spec = self.spec
        about = {"solver": spec.solver, "steps": spec.steps, "nfe": self.table.nfe, "fitted": bool(spec.fitted)}
        return {**about, "sampling": spec.to_dict()}

    @cached_property
    def _placed(self) -> engine.PlacedTable:
        return engine.place(self.table, self.mesh)

    def draw(self, first: int, count: int, cond: Cond | None = None) -> np.ndarray:
        """Samples first .. first + count - 1, [count, *shape] float32; cond: their conditions, [count, ...].

        Counts that the devices do not divide are rounded up, and the rest is thrown away.
        """
        batch, place = -(-count // self.mesh.size) * self.mesh.size, sharding.split(self.mesh)
        keys = sample_keys(key_of(self.seed), np.arange(first, first + batch), place)
        here = None if cond is None else jax.device_put(conditions.repeated(cond, batch), place)
        start = engine.noise(keys, 0, self.model.shape)
        rows = None if self.table.deterministic else keys
        drawn = engine.integrate(self.denoise, self._placed, start, here, row_noise=rows)
        bounds = self.model.data_range if self.spec.clip else None
        images = sharding.fetch(drawn)[:count]
        return images if bounds is None else images.clip(*bounds)


def sampler_of(
    artefact: Artefact, spec: SamplerSpec | None = None, *, seed: int = 0, mesh: Mesh | None = None, **fields: Any
) -> Sampler:
    """An artefact with a solver; arguments and errors as in `sample`."""
    check_seed(seed)
    spec = with_scale(artefact.model, SamplerSpec.of(spec, **fields))
    if spec.fitted:
        found = _fitted(artefact, spec.fitted, spec.to_dict()["guidance"])
        found.check_asked(spec)
        table, spec = found.table(), SamplerSpec.of(spec, solver=found.solver, steps=found.steps)
    else:
        spec = spec.complete(artefact.steps or TEACHER_STEPS)
        if artefact.steps and spec.steps != artefact.steps:
            warnings.warn(f"A student made for {artefact.steps} steps is sampled with {spec.steps}.", stacklevel=3)
        table = table_for(artefact, spec.steps, spec.solver, spacing=spec.spacing, end=spec.end)
    mesh = mesh or sharding.data_mesh()
    return Sampler(artefact.model, table, denoiser_of(artefact, spec, mesh), mesh, seed, spec)


def sample(
    artefact: Artefact,
    count: int,
    steps: int | None = None,
    *,
    cond: Cond | None = None,
    batch_size: int = 256,
    name: str | None = None,
    seed: int = 0,
    spec: SamplerSpec | None = None,
    mesh: Mesh | None = None,
    **fields: Any,
) -> np.ndarray:
    """Draws samples.

    Args:
      count: how many; sample i has the same noise whatever count, batch_size or the devices.
      steps: of the solver; the student's own number by default, 64 for a teacher.
      cond: conditions [count, ...] for conditional models; labels are drawn uniformly by default.
      name: reports progress under this name.
      spec: how the model is sampled; see there.
      mesh: the devices, see `denoiser_of`; images are split over all of them.
      fields: of the spec, in place of its own: solver, spacing, end, fitted, clip, threshold, guidance.

    Returns:
      [count, *shape] float32, in the range of the data if the spec clips.

    Raises:
      ValueError: counts not positive, a seed that is no whole number of 64 bits, unknown solver, another solver or
        number of steps or grid than those fitted, conditions missing or not as the model takes them, a scale that a
        guided student did not learn.
      TypeError: an unknown setting.
      Interrupted: the program was asked to stop.
    """
    count, batch_size = positive_int("count", count), positive_int("batch_size", batch_size)
    steps = None if steps is None else positive_int("steps", steps)
    drawn = sampler_of(artefact, spec, seed=seed, mesh=mesh, steps=steps, **fields)
    cond = conditions.for_samples(artefact.model, count, cond, seed)
    batch = even_batch(count, batch_size, drawn.mesh.size)
    progress = Progress(name, -(-count // batch), batch) if name else None
    found = []
    for begin in range(0, count, batch):
        here = jax.tree.map(lambda a, begin=begin: a[begin : begin + batch], cond)
        found.append(drawn.draw(begin, batch, here))
        interrupts.check()
        if progress:
            progress.update(len(found))
    if progress:
        progress.close()
    return np.concatenate(found)[:count]


def even_batch(count: int, largest: int, devices: int) -> int:
    """The size of as few batches as samples need, of at most `largest` or a sample per device: as even as can be.

    All batches have this size and are compiled once; what the last has too many is drawn for nothing.
    """
    batches = -(-count // (max(1, largest // devices) * devices))
    return -(-count // (batches * devices)) * devices


def _fitted(artefact: Artefact, fitted: FittedSolver | str | Path, guidance: Mapping[str, Any] | None) -> FittedSolver:
    """Warns of lambdas that were fitted on another model, or with other guidance."""
    solver = fitted if isinstance(fitted, FittedSolver) else FittedSolver.load(fitted)
    if solver.provenance.get("model", "") not in ("", fingerprint(artefact.params)):
        warnings.warn("The solver was fitted on another model than the one it samples.", stacklevel=4)
    then, now = (given or UNGUIDED for given in (solver.provenance.get("guidance", guidance), guidance))
    if then != now:
        warnings.warn(
            f"The solver was fitted with the guidance {dict(then)}, but samples with {dict(now)}.", stacklevel=4
        )
    return solver


@partial(jax.jit, static_argnames="place")
def sample_keys(key: Key, indices: np.ndarray, place: NamedSharding) -> Key:
    """The samples' keys, spread over the devices of all processes."""
    return jax.lax.with_sharding_constraint(engine.sample_keys(key, indices), place)
