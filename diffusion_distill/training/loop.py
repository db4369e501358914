"""The training loop: phases of updates, with figures, checkpoints and resumption. It knows no method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from diffusion_distill.data.pipeline import Batches
from diffusion_distill.distillation.phases import Phase
from diffusion_distill.training import ema
from diffusion_distill.training.checkpoint import Checkpoints
from diffusion_distill.training.progress import JsonLines, Progress
from diffusion_distill.training.sharding import put_batch, replicated
from diffusion_distill.training.state import TrainState, next_phase
from diffusion_distill.training.step import Step, StepInputs
from diffusion_distill.typing import Key


def run(
    state: TrainState,
    step: Step,
    phases: Sequence[Phase],
    batches: Batches,
    optimizer: optax.GradientTransformation,
    seed: Key,
    mesh: Mesh,
    *,
    momenta: dict[str, float],
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 1000,
    log: JsonLines | None = None,
    log_every: int = 50,
    phase_done: Callable[[Phase, TrainState], None] = lambda phase, state: None,
) -> TrainState:
    """Trains from the state's step to the end of the last phase.

    Args:
      state: a fresh or restored state.
      step: the compiled update.
      momenta: of the method's own averages; the eval average's is the phase's.
      checkpoints: where the state is saved, every `checkpoint_every` updates and at the end of a phase.
      log: gets a record every `log_every` updates: loss and gradient norm averaged since the last one.
      phase_done: called with the state at the end of each phase.
    """
    log = log or JsonLines(None)
    # Several CPU devices meet in one thread pool; updates in flight at once can starve each other in it.
    lockstep = mesh.size > 1 and jax.default_backend() == "cpu"
    done = int(state.step)
    for k, (phase, end) in enumerate(zip(phases, accumulate(p.updates for p in phases), strict=True)):
        begin = end - phase.updates
        if done >= end:
            continue
        if done == begin and k > 0:
            state = jax.device_put(next_phase(state, phase, optimizer), replicated(mesh))
        inputs = jax.device_put(step_inputs(phase, momenta), replicated(mesh))
        progress = Progress(phase.name, phase.updates, batches.batch_size)
        progress.start_at(done - begin)
        recent: list[dict] = []
        for update in range(done - begin, phase.updates):
            batch = put_batch(batches.at(begin + update), mesh)
            rate = np.float32(phase.rate(update))
            state, metrics = step(state, batch, inputs._replace(learning_rate=rate), seed)
            recent.append(jax.block_until_ready(metrics) if lockstep else metrics)
            done = begin + update + 1
            if done % log_every == 0 or done == end:
                figures = _averages(recent)
                recent = []
                progress.update(update + 1, loss=figures["loss"])
                speed = {"learning_rate": float(rate), "images_per_second": round(progress.rate(), 1)}
                log.write(phase=phase.name, update=done, samples=done * batches.batch_size, **speed, **figures)
            if checkpoints and done % checkpoint_every == 0 and done != end:
                checkpoints.save(done, state)
        progress.close()
        # Before the checkpoint that says the phase is over: a run that dies in between does its end again.
        phase_done(phase, state)
        if checkpoints:
            checkpoints.save(done, state)
    return state


def step_inputs(phase: Phase, momenta: dict[str, float]) -> StepInputs:
    """The phase's arrays in float32, as the step takes them."""
    log_momenta = {name: ema.log_momentum(mu) for name, mu in {"eval": phase.momentum, **momenta}.items()}
    inputs = StepInputs(phase.inputs, 0.0, log_momenta)
    return jax.tree.map(lambda a: np.asarray(a, np.int32 if np.asarray(a).dtype.kind == "i" else np.float32), inputs)


def _averages(recent: list[dict]) -> dict[str, float]:
    """Means of the metrics since the last record (the only host synchronisation of the loop)."""
    fetched = jax.device_get(recent)
    finite = [m for m in fetched if np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"])] or fetched
    means = {name: float(np.mean([m[name] for m in finite])) for name in ("loss", "grad_norm")}
    return {**means, "skipped": int(fetched[-1]["skipped"])}
