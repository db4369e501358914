"""A run before its first update: its state, and the compiled update; also from shapes alone, see `api.ahead`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from diffusion_distill.base.seeds import key_of
from diffusion_distill.base.trees import filled
from diffusion_distill.base.typing import Params
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods.method import Method
from diffusion_distill.training import dropout, low_rank, sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.optimizers import make_clip
from diffusion_distill.training.settings import Settings
from diffusion_distill.training.state import TrainState, create
from diffusion_distill.training.step import Step, make_step

if TYPE_CHECKING:
    import optax


def check_low_rank(model: Model, teacher: Artefact | None, settings: Settings) -> None:
    """Raises ValueError if adapters are asked for where there is no teacher of the same network to adapt."""
    if settings.low_rank and (teacher is None or not dropout.same_but_for_dropout(model, teacher.model)):
        what = "a teacher's training has no teacher" if teacher is None else "the student has another network or model"
        raise ValueError(
            f"low_rank={settings.low_rank} trains adapters of the teacher's parameters, but {what}. Set low_rank=0, or "
            "distil a teacher to a student of its own network."
        )


def first_params(model: Model, teacher: Artefact, settings: Settings) -> Params:
    """The parameters that a student begins with.

    They are the teacher's where the two models differ in dropout at most, and fresh ones of another network. A guided
    student of an unguided teacher begins with the teacher's where its network has a place for each of them: the scale's
    parameters are the only fresh ones then.
    """
    if dropout.same_but_for_dropout(model, teacher.model):
        return teacher.params
    fresh = model.init(key_of(settings.seed))
    return filled(fresh, teacher.params) if model.guided != teacher.model.guided else fresh


def state_shapes(
    params: Params,
    teacher: Artefact | None,
    method: Method,
    settings: Settings,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The shapes of a run's state; parameters may be shapes too."""
    begin = partial(_first_state, method=method, settings=settings, optimizer=optimizer)
    return jax.eval_shape(begin, params, () if teacher is None else teacher.params)


def begun(
    params: Params,
    teacher: Artefact | None,
    method: Method,
    settings: Settings,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The state before the first update, made where it will lie: no device ever has more than its share of it."""
    frozen = () if teacher is None else sharding.place(teacher.params, mesh)
    first = partial(_first_state, method=method, settings=settings, optimizer=optimizer)
    where = sharding.places(state_shapes(params, teacher, method, settings, optimizer), mesh)
    return jax.jit(first, out_shardings=where)(sharding.place(params, mesh), frozen)


def _first_state(
    params: Params, frozen: Params, method: Method, settings: Settings, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first update, of the student's and the teacher's parameters."""
    if not settings.low_rank:
        return create(params, optimizer, method.averages, frozen)
    key = jax.random.fold_in(key_of(settings.seed), low_rank.STREAM)
    adapters = low_rank.init(key, frozen, settings.low_rank, settings.low_rank_pattern)
    return create(adapters, optimizer, method.averages, adapters, base=frozen)  # which change nothing yet: the teacher


def step_of(
    model: Model,
    trained: Model,
    state: TrainState,
    teacher: Artefact | None,
    method: Method,
    settings: Settings,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Step:
    """The compiled update of a run; of the state and the teacher only shapes are used."""
    return make_step(
        method.losses,
        _with_remat(trained) if settings.remat else trained,
        None if teacher is None else teacher.model,
        optimizer,
        mesh,
        parts=settings.parts,
        shard_clip=make_clip(settings.optimizer) if settings.optimizer.clip_scope == "shard" else None,
        label_dropout=dropout.label_dropout_of(model, getattr(method, "label_dropout", None)),
        places=sharding.places(state, mesh),
    )


def _with_remat(model: Model) -> Model:
    """The model whose network computes its blocks again in the backward pass.

    Raises:
      ValueError: its network has no such setting.
    """
    if model.adapter.option("remat", None) is None:
        raise ValueError(
            f"remat=True was asked for, but the network {model.adapter.name} has no field 'remat'. Leave it out, and "
            "use flax.linen.remat or jax.checkpoint inside the network."
        )
    return model.with_network(remat=True)
