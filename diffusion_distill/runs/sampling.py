"""Drawing images from an artefact."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from diffusion_distill import interrupts, sampling
from diffusion_distill.diffusion import grids
from diffusion_distill.errors import choose, positive_int
from diffusion_distill.model import Model
from diffusion_distill.solvers import SOLVERS, Table
from diffusion_distill.training import sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.progress import Progress
from diffusion_distill.typing import Key, Labels

#: Steps a teacher is sampled with when nobody says otherwise.
TEACHER_STEPS = 64


def table_for(model: Model, steps: int, solver: str = "ddim", **options: Any) -> Table:
    """A solver's table on the uniform grid of a model's schedule, ending at exactly zero noise."""
    make = choose("solver", solver, SOLVERS)
    return make(grids.clean_end(grids.uniform(model.schedule, steps)), **options)


def sample(
    artefact: Artefact,
    count: int,
    steps: int | None = None,
    *,
    solver: str = "ddim",
    solver_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    labels: np.ndarray | None = None,
    clip: bool = True,
    batch_size: int = 256,
    name: str | None = None,
) -> np.ndarray:
    """Draws images.

    Args:
      count: how many; image i has the same noise whatever count, batch_size or the devices.
      steps: of the solver, on a grid uniform in time; the student's own number by default, 64 for a teacher.
      labels: [count] classes for conditional models; drawn uniformly by default.
      name: reports progress under this name.

    Returns:
      [count, height, width, channels] float32 in [-1, 1] if clip.

    Raises:
      ValueError: counts not positive, unknown solver, labels missing, out of range or of the wrong shape.
      Interrupted: the program was asked to stop.
    """
    count, steps = (
        positive_int("count", count),
        positive_int("steps", (artefact.steps or TEACHER_STEPS) if steps is None else steps),
    )
    artefact = artefact.on_grid(steps)
    if artefact.steps and steps != artefact.steps:
        warnings.warn(f"A student made for {artefact.steps} steps is sampled with {steps}.", stacklevel=2)
    labels = _labels(artefact.model, count, labels, seed)
    table = table_for(artefact.model, steps, solver, **(solver_options or {}))
    mesh = sharding.data_mesh()
    batch = max(1, min(batch_size, count) // mesh.size) * mesh.size
    whole, split = sharding.replicated(mesh), sharding.split(mesh)
    denoise = jax.device_put(artefact.denoiser(clip), whole)
    progress = Progress(name, -(-count // batch), batch) if name else None
    images = []
    for begin in range(0, count, batch):
        keys = _keys(jax.random.key(seed), np.arange(begin, begin + batch), split)
        here = None if labels is None else jax.device_put(np.resize(labels[begin : begin + batch], batch), split)
        start = sampling.noise(keys, 0, artefact.model.image_shape)
        rows = None if table.deterministic else keys
        images.append(sharding.fetch(sampling.integrate(denoise, table, start, here, row_noise=rows)))
        interrupts.check()
        if progress:
            progress.update(len(images))
    if progress:
        progress.close()
    return np.concatenate(images)[:count]


@partial(jax.jit, static_argnames="place")
def _keys(key: Key, indices: np.ndarray, place: NamedSharding) -> Key:
    """The samples' keys, spread over the devices of all processes."""
    return jax.lax.with_sharding_constraint(sampling.sample_keys(key, indices), place)


def _labels(model: Model, count: int, labels: np.ndarray | None, seed: int) -> Labels | None:
    if model.num_classes <= 1:
        if labels is not None:
            raise ValueError("Labels were given, but the model is unconditional. Leave them out.")
        return None
    if labels is None:
        return np.random.default_rng(seed).integers(model.num_classes, size=count, dtype=np.int32)
    labels = np.asarray(labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be {count} whole numbers, got shape {labels.shape}, type {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= model.num_classes:
        raise ValueError(
            f"labels must be in [0, {model.num_classes - 1}], got values from {labels.min()} to {labels.max()}."
        )
    return labels.astype(np.int32)
