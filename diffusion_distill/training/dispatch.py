"""Several updates in one dispatch: a GPU or a TPU does them one after another without waiting for Python in between.

A dispatch is a scan over stacked batches. Python acts only between dispatches, so a dispatch ends where the loop has
something to do: log, save, evaluate, look for updates that were not finite, end a phase. From one such update to the
next there are as many dispatches of the full size as fit, then single updates. So two programs are compiled at most.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_distill.base.arrays import settled
from diffusion_distill.base.typing import Batch, Key
from diffusion_distill.data.pipeline import Batches
from diffusion_distill.data.prefetch import ahead
from diffusion_distill.training.goodput import Goodput
from diffusion_distill.training.sharding import on_cpu, put_batch, replicated, split
from diffusion_distill.training.state import TrainState
from diffusion_distill.training.step import Step, StepInputs

#: Updates in a dispatch on a GPU or a TPU, unless the run logs or saves more often.
USUAL = 10


class Dispatch(NamedTuple):
    """The updates first, ..., first + updates - 1 of a run, counted from 0."""

    first: int
    updates: int


class Dispatcher:
    """Makes the updates of a run."""

    def __init__(
        self, step: Step, batches: Batches, seed: Key, mesh: Mesh, size: int, next_stop: Callable[[int], int],
        places: Any = None, clock: Goodput | None = None,
    ):  # fmt: skip
        """`size` is the number of updates in a full dispatch; for next_stop see `dispatches`, for places `several`."""
        self._clock = clock or Goodput()
        self._step, self._several = step, several(step, mesh, places)
        self._batches, self._seed, self._mesh = batches, seed, mesh
        self._size, self._next_stop = size, next_stop

    def updates(
        self, state: TrainState, end: int, inputs_at: Callable[[int], StepInputs]
    ) -> Generator[tuple[int, TrainState, dict], None, None]:
        """The updates from the state's step to `end`: (updates done, state, metrics of each update) after a dispatch.

        Args:
          inputs_at: number of an update of the run, counted from 0 -> its inputs, whose rows are the same for all.
        """
        planned = dispatches(int(state.step), end, self._size, self._next_stop)
        with closing(ahead(self._prepared, planned, depth=2 if self._size == 1 else 1)) as stream:
            for (first, updates), batch in self._clock.waiting(stream):
                inputs = stacked([inputs_at(update) for update in range(first, first + updates)])
                state, metrics = (self._step if updates == 1 else self._several)(state, batch, inputs, self._seed)
                yield first + updates, state, settled(metrics)

    def _prepared(self, planned: Dispatch) -> tuple[Dispatch, Batch]:
        """A dispatch with its batches, which are on the devices before they are needed."""
        return planned, put([self._batches.at(planned.first + k) for k in range(planned.updates)], self._mesh)


def dispatch_size(asked: int, most: int, mesh: Mesh) -> int:
    """Updates in a full dispatch: `asked`, or if that is 0 what suits the devices; at most `most`."""
    return min(asked or (1 if on_cpu(mesh) else USUAL), most)


def dispatches(done: int, end: int, size: int, next_stop: Callable[[int], int]) -> Iterator[Dispatch]:
    """The dispatches that lead from `done` updates to `end`.

    Args:
      size: of a full dispatch.
      next_stop: done -> the next number of updates, above done, after which a dispatch must end.
    """
    while done < end:
        stop = min(next_stop(done), end)
        while done < stop:
            updates = size if stop - done >= size else 1
            yield Dispatch(done, updates)
            done += updates


def put(batches: Sequence[Batch], mesh: Mesh) -> Batch:
    """The batches of a dispatch on the devices in one transfer: [updates, batch, ...], or one batch as it is."""
    if len(batches) == 1:
        return put_batch(batches[0], mesh)
    place, whole = split(mesh, axis=1), jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(place, a), whole)


def stacked(each: Sequence[StepInputs]) -> StepInputs:
    """The inputs of a dispatch, stacked but for the rows, which are those of the phase; one update's as they are."""
    if len(each) == 1:
        return each[0]
    stack = lambda *numbers: np.stack(numbers)  # noqa: E731
    return jax.tree.map(stack, *(one._replace(rows=()) for one in each))._replace(rows=each[0].rows)


def several(step: Step, mesh: Mesh, places: Any = None) -> Step:
    """Compiles (state, stacked batches, stacked inputs, seed key) -> (state, stacked metrics); the state is donated.

    Args:
      places: where the state's arrays lie, as of the step.
    """

    def updates(state: TrainState, batches: Batch, inputs: StepInputs, seed: Key):
        def one(state: TrainState, update: Any):
            batch, own = update
            return step(state, batch, own._replace(rows=inputs.rows), seed)

        return jax.lax.scan(one, state, (batches, inputs._replace(rows=())))

    whole = replicated(mesh)
    places = whole if places is None else places
    return jax.jit(
        updates,
        in_shardings=(places, split(mesh, axis=1), whole, whole),
        out_shardings=(places, whole),
        donate_argnums=0,
    )
