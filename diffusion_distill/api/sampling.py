"""Drawing images from an artefact."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from diffusion_distill.base import interrupts
from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.base.seeds import check_seed, key_of
from diffusion_distill.base.typing import Cond, Key
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.clipping import Clipped
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.denoisers.guidance import ClassifierFree
from diffusion_distill.denoisers.model import Model
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers import Table, engine, tabulate
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.training import sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.checksum import fingerprint
from diffusion_distill.training.progress import Progress

#: Steps a teacher is sampled with when nobody says otherwise.
TEACHER_STEPS = 64


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
    process = model.model.process if isinstance(model, Artefact) else model.process
    grid = grids.make_grid(process, steps, spacing, end=end)
    return grid if end else grids.clean_end(grid)


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
    name = solver[0] if solver else options.pop("solver", "ddim")
    grid = grid_for(model, steps, spacing, end)
    process = model.model.process if isinstance(model, Artefact) else model.process
    return tabulate(name, grid, process, **options).plain()


def denoiser_of(
    artefact: Artefact, clip: bool = True, guidance: Mapping[str, Any] | None = None, mesh: Mesh | None = None
) -> Denoise:
    """An artefact's denoiser, a copy on every device.

    Args:
      clip: clip x_hat, guided or not, to [-1, 1].
      guidance: {"scale": s, "null_label": label of no class} of classifier-free guidance; scale 1 is none.
      mesh: the devices; all by default.

    Raises:
      ValueError: guidance of an unconditional model, a null label it does not have, an unknown key or no scale.
      TypeError: guidance that is no mapping, or a scale that is no number.
    """
    denoise, guidance = artefact.denoiser(clip=False), _checked_guidance(guidance)
    if guidance.get("scale", 1.0) != 1:
        denoise = ClassifierFree(denoise, guidance["scale"], guidance.get("null_label", artefact.model.num_classes))
    return jax.device_put(Clipped(denoise) if clip else denoise, sharding.replicated(mesh or sharding.data_mesh()))


def _checked_guidance(guidance: Mapping[str, Any] | None) -> dict[str, Any]:
    """Guidance as `denoiser_of` takes it."""
    if guidance is not None and not isinstance(guidance, Mapping):
        raise TypeError(f'guidance must be a mapping like {{"scale": 2.0, "null_label": 10}}, got {guidance!r}.')
    for key in guidance or {}:
        choose("key of guidance", key, {"scale": None, "null_label": None})
    if guidance and "scale" not in guidance:
        raise ValueError(f"guidance needs a scale, got {dict(guidance)}.")
    scale = (guidance or {}).get("scale", 1.0)
    if isinstance(scale, bool) or np.ndim(scale) or not np.issubdtype(np.asarray(scale).dtype, np.number):
        raise TypeError(f"The scale of guidance must be a number, got {scale!r}.")
    return dict(guidance or {})


@dataclass(frozen=True)
class Sampler:
    """A model bound to a solver: draws image number i of a seed, whatever is drawn with it.

    Attributes:
      model: without parameters.
      table: the solver on its grid.
      denoise: the model's denoiser, a copy on every device of the mesh.
      seed: of all noise.
      clip: images to [-1, 1]: beside that of x_hat, for solvers whose last step is not x_hat itself.
      solver, steps, fitted: what the table was made from; fitted with lambdas.
    """

    model: Model
    table: Table
    denoise: Denoise
    mesh: Mesh
    seed: int = 0
    clip: bool = False
    solver: str = ""
    steps: int = 0
    fitted: bool = False

    @property
    def about(self) -> dict[str, Any]:
        """The facts about the sampler for results, JSON-ready."""
        return {"solver": self.solver, "steps": self.steps, "nfe": self.table.nfe, "fitted": self.fitted}

    def draw(self, first: int, count: int, labels: Cond | None = None) -> np.ndarray:
        """Images first .. first + count - 1, [count, height, width, channels] float32; labels [count] int32.

        Counts that the devices do not divide are rounded up, and the rest is thrown away.
        """
        batch, place = -(-count // self.mesh.size) * self.mesh.size, sharding.split(self.mesh)
        keys = sample_keys(key_of(self.seed), np.arange(first, first + batch), place)
        here = None if labels is None else jax.device_put(conditions.repeated(labels, batch), place)
        start = engine.noise(keys, 0, self.model.shape)
        rows = None if self.table.deterministic else keys
        images = engine.integrate(self.denoise, self.table, start, here, row_noise=rows)
        bounds = self.model.data_range if self.clip else None
        return sharding.fetch(images if bounds is None else jnp.clip(images, *bounds))[:count]


def sampler_of(
    artefact: Artefact,
    steps: int | None = None,
    *,
    solver: str | None = None,
    spacing: str = "",
    end: float = 0.0,
    fitted: FittedSolver | str | Path | None = None,
    guidance: Mapping[str, Any] | None = None,
    seed: int = 0,
    clip: bool = True,
) -> Sampler:
    """An artefact with a solver; arguments and errors as in `sample`."""
    check_seed(seed)
    if fitted:
        found = _fitted(artefact, fitted)
        found.check_asked(solver, steps, spacing, end)
        table, solver, steps = found.table(), found.solver, found.steps
    else:
        solver = solver or "ddim"
        steps = positive_int("steps", (artefact.steps or TEACHER_STEPS) if steps is None else steps)
        if artefact.steps and steps != artefact.steps:
            warnings.warn(f"A student made for {artefact.steps} steps is sampled with {steps}.", stacklevel=3)
        table = table_for(artefact, steps, solver, spacing=spacing, end=end)
    mesh = sharding.data_mesh()
    denoise = denoiser_of(artefact, clip, guidance, mesh)
    return Sampler(artefact.model, table, denoise, mesh, seed, clip, solver, steps, bool(fitted))


def sample(
    artefact: Artefact,
    count: int,
    steps: int | None = None,
    *,
    labels: Cond | None = None,
    batch_size: int = 256,
    name: str | None = None,
    seed: int = 0,
    **how: Any,
) -> np.ndarray:
    """Draws images.

    Args:
      count: how many; image i has the same noise whatever count, batch_size or the devices.
      steps: of the solver; the student's own number by default, 64 for a teacher.
      labels: [count] classes for conditional models; drawn uniformly by default.
      name: reports progress under this name.
      how: of `sampler_of`:
        solver: a name of `SOLVERS`, perhaps with options: 'deis order=2'; DDIM by default.
        spacing, end: of the grid, see `grid_for`.
        fitted: a D-ODE solver or its file, in place of steps, solver, spacing and end; others beside it are refused.
        guidance: {"scale": s, "null_label": label}, see `denoiser_of`.
        clip: x_hat and the images to [-1, 1], True by default.

    Returns:
      [count, height, width, channels] float32 in [-1, 1] if clip.

    Raises:
      ValueError: counts not positive, a seed that is no whole number of 64 bits, unknown solver, another solver or
        number of steps or grid than those fitted, labels missing, out of range or of the wrong shape.
      Interrupted: the program was asked to stop.
    """
    count, batch_size = positive_int("count", count), positive_int("batch_size", batch_size)
    drawn = sampler_of(artefact, steps, seed=seed, **how)
    labels = labels_for(artefact.model, count, labels, seed)
    batch = max(1, min(batch_size, count) // drawn.mesh.size) * drawn.mesh.size
    progress = Progress(name, -(-count // batch), batch) if name else None
    images = []
    for begin in range(0, count, batch):
        here = jax.tree.map(lambda a, begin=begin: a[begin : begin + batch], labels)
        images.append(drawn.draw(begin, batch, here))
        interrupts.check()
        if progress:
            progress.update(len(images))
    if progress:
        progress.close()
    return np.concatenate(images)[:count]


def _fitted(artefact: Artefact, fitted: FittedSolver | str | Path) -> FittedSolver:
    """Warns of lambdas that were fitted on another model."""
    solver = fitted if isinstance(fitted, FittedSolver) else FittedSolver.load(fitted)
    if solver.provenance.get("model", "") not in ("", fingerprint(artefact.params)):
        warnings.warn("The solver was fitted on another model than the one it samples.", stacklevel=4)
    return solver


@partial(jax.jit, static_argnames="place")
def sample_keys(key: Key, indices: np.ndarray, place: NamedSharding) -> Key:
    """The samples' keys, spread over the devices of all processes."""
    return jax.lax.with_sharding_constraint(engine.sample_keys(key, indices), place)


def labels_for(model: Model, count: int, labels: Cond | None, seed: int) -> Cond | None:
    """`conditions.for_samples`."""
    return conditions.for_samples(model, count, labels, seed)
