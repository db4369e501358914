"""What an experiment would cost, cell by cell: updates, images, FLOPs, bytes, hours, from shapes and a measured update.

Hours on accelerators are the FLOPs at a utilisation of 40 %, what a TRACT update of BTD's CIFAR-10 network reached on
an H200 (docs/performance.md); sampling for the evaluation is counted, features are not. Bytes are those of parameters,
averages, optimizer state and gradients; activations come on top.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import diffusion_distill as dd
from diffusion_distill.api.beginning import state_shapes
from diffusion_distill.report.tables import format_table
from diffusion_distill.training.logs import read_json_lines
from diffusion_distill.training.optimizers import make_optimizer
from diffusion_distill.training.utilisation import forward_flops, update_flops

from .cells import Cell, Work
from .scales import Scale

UTILISATION = 0.4
#: FLOP/s in bfloat16.
DEVICES = {"H100": 989e12, "TPU v5e-8": 8 * 197e12}


@dataclass(frozen=True)
class Cost:
    """What a cell costs.

    Attributes:
      state: bytes of everything that training keeps.
      seconds: here, from a measured update; None where it was not measured.
    """

    phases: str
    updates: int
    images: int
    parameters: int
    flops: float
    state: int
    seconds: float | None = None


class Known(NamedTuple):
    """What is the same for all cells of a kind: FLOPs of an update for each image, and its seconds here.

    Attributes:
      seconds: None where nothing is measured.
    """

    flops: dict[Any, int]
    seconds: dict[Any, float] | None


def print_costs(title: str, scale: Scale, cells: Sequence[Cell], seeds: int, measure: bool = False) -> None:
    """Prints what the cells cost with so many seeds, and what they need."""
    known = Known({}, {} if measure else None)
    costs = {cell.name: cost_of(cell, scale, known) for cell in cells}
    print(f"{title}\nScale '{scale.name}': {scale.title}. {len(cells)} cells, {seeds} seed(s).\n")
    print(format_table([_line(name, cost) for name, cost in costs.items()]))
    flops = seeds * sum(cost.flops for cost in costs.values())
    hours = ", ".join(f"{name} {flops / peak / UTILISATION / 3600:.3g} h" for name, peak in DEVICES.items())
    print(f"\nAll: {flops:.3g} FLOPs; at a utilisation of {UTILISATION:.0%}: {hours}.")
    if measure:
        total = seeds * sum(cost.seconds or 0.0 for cost in costs.values())
        print(f"On this {jax.devices()[0].device_kind}, from measured updates: {total / 3600:.3g} h of training.")
    for name in dict.fromkeys(cell.teacher for cell in cells):
        print(f"Teacher '{name}': {_made(scale, name)}")
    for command in scale.data:
        print(f"Needed: {command}")


def cost_of(cell: Cell, scale: Scale, known: Known | None = None) -> Cost:
    """The cost of one cell and one seed, without its teacher's.

    Args:
      known: filled; None measures nothing.
    """
    known = known or Known({}, None)
    work, images = cell.work(scale), scale.evaluation.count * scale.evaluation.repetitions
    params, one_call = _of_model(work.model)
    drawn = float(work.calls) * images * one_call
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    if work.method is None:
        return Cost("", 0, 0, size, drawn, 4 * size)
    settings = replace(scale.running(cell.teacher), **work.running)
    phases, batch = work.method.phases(work.model, settings.batch_size), settings.batch_size
    state = _state(work, settings)
    updates = sum(phase.updates for phase in phases)
    kind = type(work.method), getattr(work.method, "teacher_solver", ""), work.model, work.teacher, settings.low_rank
    if kind not in known.flops:
        losses = work.method.losses
        known.flops[kind] = update_flops(losses, work.model, work.teacher, state, phases[0].inputs)
    flops = float(updates) * batch * known.flops[kind]
    names = ", ".join(f"{p.teacher_steps}→{p.student_steps}" for p in phases if p.student_steps)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, state.params)))
    seconds = None if known.seconds is None else updates * _update_seconds(work, settings, kind, known.seconds)
    return Cost(names, updates, updates * batch, size, flops + drawn, kept, seconds)


@cache
def _of_model(model: dd.Model) -> tuple[Any, int]:
    """Shapes of a model's parameters, and FLOPs of a network call for one sample."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    return params, forward_flops(model, params)


def _state(work: Work, settings: dd.Settings) -> Any:
    """Shapes of the training state of some work."""
    assert work.method is not None
    optimizer = make_optimizer(settings.optimizer)
    teacher = None if work.teacher is None else dd.Artefact(work.teacher, _of_model(work.teacher)[0])
    return state_shapes(_of_model(work.model)[0], teacher, work.method, settings, optimizer)


def _update_seconds(work: Work, settings: dd.Settings, key: Any, known: dict[Any, float]) -> float:
    """Seconds of an update here, measured on up to 8 images and taken to grow with the batch."""
    if key not in known:
        known[key] = settings.batch_size / images_per_second(work, settings, min(8, settings.batch_size))
    return known[key]


def images_per_second(work: Work, settings: dd.Settings, batch: int, stretches: int = 3) -> float:
    """Training images a second here, of the fastest of some stretches: compiling and pauses are left out.

    Args:
      batch: images of an update.
      stretches: of four updates each; the first, which compiles, does not count.
    """
    labels = np.zeros(batch, np.int32) if work.model.num_classes > 1 else None
    source = dd.data.from_arrays(np.zeros((batch, *work.model.shape), np.float32), labels)
    method, short = _of_one_phase(work.method, 4 * stretches * batch), replace(settings, batch_size=batch, log_every=4)
    with tempfile.TemporaryDirectory() as folder:
        if work.teacher is None:
            dd.train(work.model, source, method, short, folder)  # type: ignore[arg-type]
        else:
            teacher = dd.Artefact(work.teacher, work.teacher.init(jax.random.key(0)))
            student = None if work.model == work.teacher else work.model
            dd.distill(teacher, source, method, short, folder, student)
        records = read_json_lines(Path(folder) / "metrics.jsonl")
    at = [(record["samples"], record["seconds"]["training"] + record["seconds"]["data"]) for record in records]
    return max((images - before) / max(end - begin, 1e-3) for (before, begin), (images, end) in pairwise(at))


def _of_one_phase(method: Any, images: int) -> Any:
    """The method with a single phase of so many images, whose updates cost as those of all do."""
    if isinstance(method, dd.Progressive):
        return replace(method, start_steps=2 * method.end_steps, phase_length=images, last_two_longer=1.0)
    if isinstance(method, dd.Tract):
        return replace(method, schedule=(method.schedule[0], method.schedule[-1]), shares=(), length=images)
    return replace(method, length=images)


def _line(name: str, cost: Cost) -> dict[str, Any]:
    line = {
        "cell": name,
        "phases": cost.phases,
        "updates": cost.updates,
        "images": f"{cost.images:,}",
        "parameters": f"{cost.parameters / 1e6:.3g}M",
        "FLOPs": f"{cost.flops:.3g}",
        "state GB": f"{cost.state / 1e9:.3g}",
    }
    line |= {f"h {name}": f"{cost.flops / peak / UTILISATION / 3600:.2g}" for name, peak in DEVICES.items()}
    return line if cost.seconds is None else {**line, "h here": f"{cost.seconds / 3600:.2g}"}


def _made(scale: Scale, name: str) -> str:
    """How a teacher comes about."""
    described = scale.teachers[name]
    if described.published:
        return (
            f"python -m diffusion_distill.main --mode=import --model={described.published} "
            f"--workdir=runs/experiments/{scale.name}/teachers/{name}"
        )
    assert described.method is not None
    return f"trained at the first use, {described.method.length} images"
