"""Training, distilling, sampling and evaluating as plain functions: what the command line and notebooks call.

source = data.digits()
teacher = train(model, source, Denoising(length="200K"))
students = distill(teacher, source, Tract((1024, 32, 1), length="200K"))
images = sample(students[1], 16)
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill import sampling
from diffusion_distill.data.pipeline import Batches
from diffusion_distill.data.sources import Source
from diffusion_distill.diffusion import grids
from diffusion_distill.distillation import Denoising
from diffusion_distill.distillation.phases import Phase, describe
from diffusion_distill.errors import choose, positive_int
from diffusion_distill.metrics import frechet_distance, moments, pixel_features, precision_recall
from diffusion_distill.model import Model
from diffusion_distill.solvers import SOLVERS, Table
from diffusion_distill.training import loop, sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.checkpoint import Checkpoints
from diffusion_distill.training.optimizers import OptimizerSettings, make_optimizer
from diffusion_distill.training.progress import JsonLines, Progress
from diffusion_distill.training.state import TrainState, create
from diffusion_distill.training.step import make_step
from diffusion_distill.typing import Labels, Params

#: Steps a teacher is sampled with when nobody says otherwise.
TEACHER_STEPS = 64


@dataclass(frozen=True)
class Settings:
    """How a training run is carried out, whatever it trains.

    Attributes:
      batch_size: global, over all devices.
      seed: of initialisation, data order, times and noise.
      log_every, checkpoint_every: in updates.
      flip: random horizontal flips of the training images.
    """

    batch_size: int = 128
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    flip: bool = False
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every", "checkpoint_every"):
            positive_int(name, getattr(self, name))


def train(
    model: Model,
    source: Source,
    method: Denoising | None = None,
    settings: Settings | None = None,
    workdir: str | Path | None = None,
) -> Artefact:
    """Trains a teacher.

    Args:
      source: images and labels, see `data`.
      workdir: where checkpoints, metrics and the artefact 'teacher' go; a run found there is resumed. None
        keeps everything in memory.

    Raises:
      ValueError: model, data and settings do not fit together, or workdir holds another run.
    """
    settings, method = settings or Settings(), method or Denoising()
    params = model.init(jax.random.key(settings.seed))
    artefacts = _fit(model, params, None, source, method, settings, workdir, lambda phase: "teacher")
    return artefacts[0]


def distill(
    teacher: Artefact,
    source: Source,
    method: Any,
    settings: Settings | None = None,
    workdir: str | Path | None = None,
) -> dict[int, Artefact]:
    """Distils a teacher; returns the student of every phase by its number of steps.

    Args:
      method: `Tract(...)`, `Progressive(...)` or another of `DISTILLERS`.
      workdir: as in `train`; students are saved as 'student_<steps>'.

    Raises:
      ValueError: as `train`, or a student's teacher was made for fewer steps than the method starts with.
    """
    settings = settings or Settings()
    start = method.phases(teacher.model, settings.batch_size)[0].teacher_steps
    if teacher.steps and teacher.steps != start:
        raise ValueError(
            f"The teacher is itself a student of {teacher.steps} steps, but the method starts from {start}. "
            f"Start from {teacher.steps} steps."
        )
    return _fit(
        teacher.model, teacher.params, teacher, source, method, settings, workdir,
        lambda phase: f"student_{phase.student_steps}",
    )  # fmt: skip


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
      steps: network evaluations on a uniform grid; the student's own number by default, 64 for a teacher.
      labels: [count] classes for conditional models; drawn uniformly by default.
      name: reports progress under this name.

    Returns:
      [count, height, width, channels] float32 in [-1, 1] if clip.

    Raises:
      ValueError: counts not positive, unknown solver, labels missing, out of range or of the wrong shape.
    """
    count, steps = (
        positive_int("count", count),
        positive_int("steps", (artefact.steps or TEACHER_STEPS) if steps is None else steps),
    )
    if artefact.steps and steps != artefact.steps:
        warnings.warn(f"A student made for {artefact.steps} steps is sampled with {steps}.", stacklevel=2)
    labels = _labels(artefact.model, count, labels, seed)
    table = table_for(artefact.model, steps, solver, **(solver_options or {}))
    mesh = sharding.data_mesh()
    batch = max(1, min(batch_size, count) // mesh.size) * mesh.size
    whole, split = sharding.replicated(mesh), sharding.split(mesh)
    denoise = jax.device_put(artefact.denoiser(clip), whole)
    key = jax.random.key(seed)
    progress = Progress(name, -(-count // batch), batch) if name else None
    images = []
    for begin in range(0, count, batch):
        keys = jax.device_put(sampling.sample_keys(key, np.arange(begin, begin + batch)), split)
        here = None if labels is None else jax.device_put(np.resize(labels[begin : begin + batch], batch), split)
        start = sampling.noise(keys, 0, artefact.model.image_shape)
        rows = None if table.deterministic else keys
        images.append(np.asarray(sampling.integrate(denoise, table, start, here, row_noise=rows)))
        if progress:
            progress.update(len(images))
    if progress:
        progress.close()
    return np.concatenate(images)[:count]


def evaluate(images: np.ndarray, reference: np.ndarray, k: int = 3) -> dict[str, float]:
    """Pixel Fréchet distance, precision and recall of images against reference images (both in [-1, 1]).

    These see means, covariances and neighbourhoods of pixels, not what people see.
    """
    features, real = pixel_features(images), pixel_features(reference)
    distance = frechet_distance(moments(features), moments(real))
    precision, recall = precision_recall(real, features, k=k)
    return {"frechet": float(distance), "precision": float(precision), "recall": float(recall)}


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


def _fit(
    model: Model,
    params: Params,
    teacher: Artefact | None,
    source: Source,
    method: Any,
    settings: Settings,
    workdir: str | Path | None,
    name_of: Callable[[Phase], str],
) -> dict[int, Artefact]:
    """Runs a method's phases; returns and saves the eval average at the end of each."""
    mesh = sharding.data_mesh()
    sharding.check_batch(settings.batch_size, mesh)
    _check_source(model, source)
    phases = method.phases(model, settings.batch_size)
    provenance = {
        "method": type(method).__name__,
        "method_settings": dataclasses.asdict(method),
        "settings": dataclasses.asdict(settings),
        "teacher": None if teacher is None else dict(teacher.provenance),
    }
    folder = None
    if workdir is not None:
        teacher_is = None if teacher is None else _fingerprint(teacher.params)
        data_are = {"images": len(source), "image_shape": source.image_shape, "classes": source.num_classes}
        description = {"model": model.to_dict(), **provenance, "teacher_parameters": teacher_is, "data": data_are}
        folder = _claim(Path(workdir), description)
    optimizer = make_optimizer(settings.optimizer)
    teacher_params = () if teacher is None else teacher.params
    state = jax.device_put(create(params, optimizer, method.averages, teacher_params), sharding.replicated(mesh))
    checkpoints = Checkpoints(folder / "checkpoints") if folder else None
    if checkpoints and checkpoints.latest is not None:
        state = checkpoints.restore(state)
    print(describe(phases), flush=True)
    artefacts: dict[int, Artefact] = {}

    def phase_done(phase: Phase, state: TrainState) -> None:
        made = {**provenance, "phase": phase.name, "updates": int(state.step), "skipped": int(state.skipped)}
        average = jax.tree.map(jnp.copy, state.averages["eval"].params)
        artefacts[phase.student_steps] = Artefact(model, average, phase.student_steps, made)
        if folder:
            artefacts[phase.student_steps].save(folder / name_of(phase))

    log = JsonLines(folder / "metrics.jsonl" if folder else None, keep=int(state.step))
    try:
        loop.run(
            state,
            make_step(method.losses, model, None if teacher is None else teacher.model, optimizer, mesh),
            phases,
            Batches(source, settings.batch_size, settings.seed, flip=settings.flip),
            optimizer,
            jax.random.key(settings.seed),
            mesh,
            momenta=dict(method.averages),
            checkpoints=checkpoints,
            checkpoint_every=settings.checkpoint_every,
            log=log,
            log_every=settings.log_every,
            phase_done=phase_done,
        )
    finally:  # also when interrupted: a checkpoint under way would be lost
        log.close()
        if checkpoints:
            checkpoints.close()
    for phase in phases:  # phases finished before a restart
        if phase.student_steps not in artefacts and folder:
            artefacts[phase.student_steps] = Artefact.load(folder / name_of(phase))
    return artefacts


def _check_source(model: Model, source: Source) -> None:
    if tuple(source.image_shape) != tuple(model.image_shape):
        raise ValueError(
            f"The images have shape {tuple(source.image_shape)}, but the model takes {tuple(model.image_shape)}. "
            "Resize the images or set the model's image_shape."
        )
    if model.num_classes > 1 and source.num_classes != model.num_classes:
        raise ValueError(
            f"The model is conditioned on {model.num_classes} classes, but the data have {source.num_classes}."
        )


def _fingerprint(params: Params) -> str:
    """A checksum of all parameters: two teachers of the same making need not be the same."""
    crc = 0
    for leaf in jax.tree.leaves(params):
        crc = zlib.crc32(np.asarray(leaf).tobytes(), crc)
    return f"crc32 {crc:08x}"


def _claim(folder: Path, description: Mapping[str, Any]) -> Path:
    """Makes the workdir or checks that what is there is the same run.

    Raises:
      ValueError: it holds another run, whose differing fields are named, or cannot be written.
    """
    path = folder / "run.json"
    wanted = json.loads(json.dumps(description))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"Cannot write to the workdir {folder}: {error}. Choose another folder.") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"Cannot write to the workdir {folder}. Choose another folder or change its permissions.")
    if path.exists():
        found = json.loads(path.read_text())
        if found != wanted:
            raise ValueError(
                f"The workdir {folder} holds another run; it differs in {', '.join(_differences(found, wanted))}. "
                "Choose another workdir, or delete this one."
            )
    else:
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(wanted, indent=2) + "\n")
        unfinished.replace(path)  # whole or not at all
    return folder


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Dotted names of fields that differ, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted({*found, *wanted})
        return [d for key in keys for d in _differences(found.get(key), wanted.get(key), f"{name}.{key}".strip("."))]
    return [] if found == wanted else [f"{name} (there {found!r}, asked {wanted!r})"]
