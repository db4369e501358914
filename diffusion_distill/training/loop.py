"""The training loop: phases of updates, with figures, checkpoints and resumption. It knows no method."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_distill.base import interrupts
from diffusion_distill.base.errors import advise, in_words
from diffusion_distill.base.typing import Key
from diffusion_distill.data.pipeline import Batches
from diffusion_distill.methods.phases import Phase
from diffusion_distill.training import ema, nonfinite
from diffusion_distill.training.checkpoint import Checkpoints
from diffusion_distill.training.dispatch import Dispatcher, dispatch_size
from diffusion_distill.training.goodput import Goodput
from diffusion_distill.training.logs import Log, Logs
from diffusion_distill.training.progress import Progress
from diffusion_distill.training.sharding import places, replicated
from diffusion_distill.training.state import TrainState, last_good, next_phase
from diffusion_distill.training.step import Step, StepInputs
from diffusion_distill.training.utilisation import Meter

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True)
class Plan:
    """The cadences and callbacks between updates.

    Attributes:
      log_every, checkpoint_every: in updates; a checkpoint is also saved at the end of each phase.
      evaluate_every: in training images; 0 for never.
      evaluate: called with (update, phase, state) at that cadence and at the end of each phase.
      phase_done: called with (phase, state) at the end of each phase, before its checkpoint.
      nonfinite_limit: after so many updates in a row that were not finite the run stops. It is looked at when figures
        are logged, and at least every nonfinite_limit updates.
      meter: called with (state, rows) at the start of each phase; gives what measures the devices' utilisation, which
        is then logged and shown, or None.
      updates_per_dispatch: see `training.dispatch`; 0 for what suits the devices.
    """

    log_every: int = 50
    checkpoint_every: int = 1000
    evaluate_every: int = 0
    evaluate: Callable[[int, Phase, TrainState], None] = lambda update, phase, state: None
    phase_done: Callable[[Phase, TrainState], None] = lambda phase, state: None
    nonfinite_limit: int = 200
    meter: Callable[[TrainState, Any], Meter | None] = lambda state, rows: None
    updates_per_dispatch: int = 0


def run(
    state: TrainState,
    step: Step,
    phases: Sequence[Phase],
    batches: Batches,
    optimizer: optax.GradientTransformation,
    seed: Key,
    mesh: Mesh,
    *,
    momenta: Mapping[str, float],
    plan: Plan | None = None,
    checkpoints: Checkpoints | None = None,
    log: Log | None = None,
    clock: Goodput | None = None,
) -> TrainState:
    """Trains from the state's step to the end of the last phase.

    Args:
      state: a fresh or restored state.
      step: the compiled update.
      momenta: of the method's own averages; the eval average's is the phase's.
      checkpoints: where the state is saved; None for nowhere.
      log: gets the figures: `loss` and `grad_norm` averaged over the finite updates since the last record, None if
        there was none; `nonfinite`, the number of the others; `skipped`, their number in the whole run; with a meter
        `mfu`, the utilisation since the last record, and `flops_per_image`; `updates_in_all`; `seconds`, see
        `training.goodput`.
      clock: what tells where the time goes; by default one that begins now.

    Raises:
      NonFinite: no update in a phase was finite, or none of the last plan.nonfinite_limit; the state before them is in
        `checkpoints`.
      Interrupted: the program was asked to stop; the state is in `checkpoints`.
      Exception: what the data raise; the state before it is in `checkpoints`, if there is one process. Or what an
        update raises, such as a device without memory: if it has used up the state, the last checkpoint stays.
    """
    plan, log, done, clock = plan or Plan(), log or Logs(), int(state.step), clock or Goodput()
    stop = partial(next_stop, batch_size=batches.batch_size, plan=plan)
    size = dispatch_size(plan.updates_per_dispatch, min(cadences(plan)), mesh)
    about = lambda: {"updates_in_all": ends(phases)[-1], "seconds": clock.seconds()}  # noqa: E731
    where = places(state, mesh)
    dispatcher = Dispatcher(step, batches, seed, mesh, size, stop, where, clock)
    turned = jax.jit(next_phase, static_argnums=(1, 2, 3), out_shardings=where)
    for k, (phase, end) in enumerate(zip(phases, ends(phases), strict=True)):
        begin = end - phase.updates
        if done >= end:
            continue
        if done == begin and k > 0:
            state = turned(state, optimizer, phase.restart, phase.reset_average)
        inputs_at = _inputs_at(phases, k, momenta, mesh)
        used = plan.meter(state, inputs_at(done).rows)
        recorder = _Recorder(phase, begin, done, batches.batch_size, log, used, about)
        updates = dispatcher.updates(state, end, inputs_at)
        try:
            for done, state, metrics in updates:
                clock.moved(done)
                recorder.add(done, metrics, now=done % plan.log_every == 0 or done == end)
                if done % min(plan.log_every, plan.nonfinite_limit) == 0 or done == end:
                    nonfinite.check(metrics, done, begin, phase, plan.nonfinite_limit, saved=checkpoints is not None)
                with clock.spent("saving"):
                    if done == end:
                        plan.phase_done(phase, state)  # before the checkpoint: a run that dies in between does it again
                    if done == end or done % plan.checkpoint_every == 0:
                        _save(checkpoints, state if done == end else last_good(state))
                if evaluation_due(done, phases, batches.batch_size, plan.evaluate_every):
                    with clock.spent("evaluating"):
                        plan.evaluate(done, phase, state)
                _stop_if_asked(checkpoints)
        except (interrupts.Interrupted, nonfinite.NonFinite):
            _save(checkpoints, last_good(state))
            raise
        except Exception as error:
            advise(error)
            if done < end:  # at the end of a phase its artefact comes first, see above
                _save_after(error, checkpoints, state)
            raise
        finally:
            updates.close()
            recorder.close()
    return state


def _stop_if_asked(checkpoints: Checkpoints | None) -> None:
    """Raises `Interrupted` if the program was asked to stop, or its machines are about to be taken away."""
    if checkpoints and checkpoints.reached_preemption():
        interrupts.request("preemption")
    interrupts.check()


def _save(checkpoints: Checkpoints | None, state: TrainState) -> None:
    """Saves a state under its number of updates, if there are any and a place for it."""
    if checkpoints and int(state.step):
        checkpoints.save(int(state.step), state)


def _save_after(error: Exception, checkpoints: Checkpoints | None, state: TrainState) -> None:
    """Saves what there is when data or a figure failed; several processes would wait for each other in this."""
    alive = not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))  # a failed update has used the state up
    if jax.process_count() > 1 or not alive or checkpoints is None:
        return
    try:
        _save(checkpoints, last_good(state))
    except Exception as second:  # such as a disk that is full: the first error is the one to tell
        error.add_note(f"The state could not be saved either ({in_words(second)}); the checkpoint before it stays.")


def ends(phases: Sequence[Phase]) -> list[int]:
    """The number of updates made at the end of each phase."""
    return list(accumulate(phase.updates for phase in phases))


def evaluation_due(done: int, phases: Sequence[Phase], batch_size: int, every: int) -> bool:
    """Whether update number `done` passed a multiple of `every` images or ended a phase; never if `every` is 0."""
    passed = every and done * batch_size // every > (done - 1) * batch_size // every
    return bool(every and done and (passed or done in ends(phases)))


def cadences(plan: Plan) -> tuple[int, ...]:
    """After how many updates there is something to do each, evaluations aside."""
    return plan.log_every, min(plan.log_every, plan.nonfinite_limit), plan.checkpoint_every


def next_stop(done: int, batch_size: int, plan: Plan) -> int:
    """The next number of updates after which the loop has something to do, the end of a phase aside."""
    stops = [(done // every + 1) * every for every in cadences(plan)]
    if plan.evaluate_every:
        images = (done * batch_size // plan.evaluate_every + 1) * plan.evaluate_every
        stops.append(-(-images // batch_size))
    return min(stops)


def _inputs_at(
    phases: Sequence[Phase], number: int, momenta: Mapping[str, float], mesh: Mesh
) -> Callable[[int], StepInputs]:
    """The inputs of phase `number`, by the number of the update in the run."""
    phase, begin = phases[number], ends(phases)[number] - phases[number].updates
    rows = jax.device_put(rows_of(phase), replicated(mesh))
    averaging = ema.Averaging(phases, number, momenta)
    return lambda update: StepInputs(rows, np.float32(phase.rate(update - begin)), averaging.at(update))


def rows_of(phase: Phase) -> Any:
    """The phase's arrays in float32 or int32, as the step takes them."""
    as_array = lambda a: np.asarray(a, np.int32 if np.asarray(a).dtype.kind == "i" else np.float32)  # noqa: E731
    return jax.tree.map(as_array, phase.inputs)


class _Recorder:
    """Shows and logs the figures of a phase."""

    def __init__(
        self, phase: Phase, begin: int, done: int, batch_size: int, log: Log, meter: Meter | None,
        about: Callable[[], dict[str, Any]],
    ):  # fmt: skip
        """`about` gives what else stands in each record."""
        self._about = about
        self._phase, self._begin, self._batch_size, self._log, self._meter = phase, begin, batch_size, log, meter
        self._progress = Progress(phase.name, phase.updates, batch_size)
        self._progress.start_at(done - begin)
        self._recent: list[dict] = []
        self._since = done, time.monotonic()

    def add(self, done: int, metrics: dict, now: bool) -> None:
        """Keeps the metrics of the updates up to number `done`; with `now`, writes a record of all kept ones."""
        self._recent.append(metrics)
        if not now:
            return
        figures, used = _figures(self._recent), self._utilisation(done)
        self._recent = []
        shown = {"loss": "not finite" if figures["loss"] is None else figures["loss"]}
        shown |= {"skipped": figures["skipped"]} if figures["skipped"] else {}
        shown |= {"mfu": used["mfu"]} if used else {}
        self._progress.update(done - self._begin, **shown)
        speed = {
            "learning_rate": float(self._phase.rate(done - self._begin - 1)),
            "images_per_second": round(self._progress.rate(), 1),
        }
        where = {"phase": self._phase.name, "samples": done * self._batch_size}
        self._log.scalars(done, {**where, **speed, **used, **figures, **self._about()})

    def _utilisation(self, done: int) -> dict[str, float]:
        """Of the devices, by the updates since the last record."""
        (first, begun), now = self._since, time.monotonic()
        self._since = done, now
        images = (done - first) * self._batch_size
        return self._meter.figures(images / max(now - begun, 1e-9)) if self._meter else {}

    def close(self) -> None:
        """Ends the bar."""
        self._progress.close()


def _figures(recent: list[dict]) -> dict[str, float | int | None]:
    """The metrics since the last record in short (between checkpoints the loop waits for the device here only)."""
    fetched = jax.device_get(recent)
    each = {name: np.concatenate([np.ravel(metrics[name]) for metrics in fetched]) for name in fetched[0]}
    finite = each["nonfinite"] == 0
    means = {name: float(np.mean(each[name][finite])) if finite.any() else None for name in ("loss", "grad_norm")}
    return {**means, "nonfinite": int(np.sum(~finite)), "skipped": int(each["skipped"][-1])}
