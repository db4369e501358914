"""One training update: jitted once, the same for every method, phase and number of devices.

The step receives the loss as a function of the roles' denoisers and knows no method. What changes between
phases (rows of the loss, learning rate, momenta) comes in as arrays, so nothing recompiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Batch, Key, Params
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.model import Model
from diffusion_distill.training import ema
from diffusion_distill.training.gradients import gradient_of
from diffusion_distill.training.sharding import replicated, split
from diffusion_distill.training.state import TrainState

if TYPE_CHECKING:
    import optax


class StepInputs(NamedTuple):
    """The step's inputs that depend on phase and update: the loss's arrays, the learning rate, weights of averages."""

    rows: Any
    learning_rate: Array
    averaging: Mapping[str, Array]  # name -> weight of this update's value, see `ema`


class Losses(Protocol):
    """A method's per-sample losses [batch] from the roles' denoisers."""

    def __call__(self, denoisers: Mapping[str, Any], rows: Any, batch: Batch, key: Key, /) -> Array: ...


Step = jax.stages.Wrapped  # (state, batch, inputs, seed key) -> (state, metrics)


def mean_loss_of(losses: Losses, model: Model, teacher: Model | None) -> Callable[..., Array]:
    """The function (params, state, batch, rows, key) -> loss of a batch; arguments as in `make_step`."""
    drops = model.adapter.drops

    def mean_loss(params: Params, state: TrainState, batch: Batch, rows: Any, key: Key) -> Array:
        noise_key, dropout_key = jax.random.split(key)
        if "part" in batch:  # draws from what the whole batch draws from
            part = batch["part"]
            batch = {**batch, "part": part.replace(key=jax.random.split(part.key)[0])}
        student_key = dropout_key if drops else None
        denoisers = {name: model.denoiser(state.whole(a.params)) for name, a in state.averages.items()}
        if teacher is not None:
            denoisers["teacher"] = teacher.denoiser(state.whole(state.teacher))
        denoisers["student"] = model.denoiser(state.whole(params), student_key)
        return jnp.mean(losses(denoisers, rows, batch, noise_key))

    return mean_loss


def make_step(
    losses: Losses,
    model: Model,
    teacher: Model | None,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    parts: int = 1,
    shard_clip: optax.GradientTransformation | None = None,
    label_dropout: float = 0.0,
    places: Any = None,
) -> Step:
    """Compiles (state, batch, inputs, seed key) -> (state, metrics).

    Args:
      losses: the method's.
      model: the student's (and every average's) model; the student drops at its network's rate.
      teacher: the teacher's model, None without one.
      mesh: devices; the batch is split over all of them.
      parts, shard_clip: see `gradients.gradient_of`.
      label_dropout: rate at which conditions become the null condition, see `conditions.drop`.
      places: where the state's arrays lie, see `sharding.places`; a copy on every device by default.

    The randomness of an update is addressed by the seed key and the state's step; dropped conditions have a stream of
    their own, so that noise and dropout are the same with and without them; scales of guided students too. A non-finite
    update changes nothing but the step and the count of skipped ones. The state is donated.
    """

    gradient_at = gradient_of(mean_loss_of(losses, model, teacher), parts, mesh, shard_clip)

    def step(state: TrainState, batch: Batch, inputs: StepInputs, seed: Key):
        key = jax.random.fold_in(seed, state.step)
        if label_dropout:
            dropped = conditions.drop(model, batch["cond"], label_dropout, jax.random.fold_in(key, conditions.STREAM))
            batch = {**batch, "cond": dropped}
        if getattr(model, "guided", None):  # what is trained may be no denoiser, such as a classifier
            told = conditions.with_scales(model, batch["cond"], jax.random.fold_in(key, conditions.SCALES))
            batch = {**batch, "cond": told}
        loss, gradient, norm = gradient_at(state.params, state, batch, inputs.rows, key)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        moved = _update(state, gradient, inputs, optimizer)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        skipped = (~finite).astype(jnp.int32)
        counts = {"skipped": state.skipped + skipped, "nonfinite": (state.nonfinite + 1) * skipped}
        state = kept.replace(step=state.step + 1, **counts)
        return state, {"loss": loss, "grad_norm": norm, **counts}

    whole = replicated(mesh)
    places = whole if places is None else places
    return jax.jit(
        step,
        in_shardings=(places, split(mesh), whole, whole),
        out_shardings=(places, whole),
        donate_argnums=0,
    )


def _update(
    state: TrainState, gradient: Any, inputs: StepInputs, optimizer: optax.GradientTransformation
) -> TrainState:
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole powers, which 'strict' would refuse
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p - inputs.learning_rate * u, state.params, updates)
    averages = {name: ema.update(average, params, inputs.averaging[name]) for name, average in state.averages.items()}
    return state.replace(params=params, opt_state=opt_state, averages=averages)
