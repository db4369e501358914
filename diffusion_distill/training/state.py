"""The state of a run: all that a restart needs, a tree of arrays.

Roles: `params` is the student being trained; `teacher` is frozen within a phase; `averages` holds 'eval'
(the slow average that is evaluated and handed on as the next teacher) and what else a method averages,
such as TRACT's 'self_teacher'. With a `base`, each role is low-rank adapters of it, see `training.low_rank`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Params
from diffusion_distill.training import ema, low_rank

if TYPE_CHECKING:
    import optax


class TrainState(struct.PyTreeNode):
    """Attributes:
    step: updates made so far, over all phases (int32 scalar).
    params: the student.
    opt_state: the optimizer's state.
    averages: name -> `ema.Average`; always has 'eval'.
    teacher: the frozen teacher's parameters; an empty tuple without one.
    skipped: updates skipped because they were not finite (int32 scalar).
    nonfinite: how many of them were the last ones in a row, in this phase; not saved (int32 scalar).
    base: the first teacher's parameters, frozen, if the roles are adapters of them; else an empty tuple. Not saved: the
      teacher's artefact has them.
    """

    step: Array
    params: Params
    opt_state: Any
    averages: dict[str, ema.Average]
    teacher: Params
    skipped: Array
    nonfinite: Array
    base: Params = ()

    def whole(self, role: Params) -> Params:
        """The parameters of a role as its network takes them: merged with the base, if there is one."""
        return low_rank.merged(self.base, role) if jax.tree.leaves(self.base) else role


def create(
    params: Params,
    optimizer: optax.GradientTransformation,
    averages: Iterable[str],
    teacher: Params = (),
    base: Params = (),
) -> TrainState:
    """A state before the first update; the trees are copied, so that they may be donated."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        averages={name: ema.init(params) for name in ("eval", *averages)},
        teacher=jax.tree.map(jnp.copy, teacher),
        skipped=jnp.zeros((), jnp.int32),
        nonfinite=jnp.zeros((), jnp.int32),
        base=jax.tree.map(jnp.copy, base),
    )


def last_good(state: TrainState) -> TrainState:
    """The state before the last updates in a row that were skipped: they changed nothing but the counts."""
    return state.replace(
        step=state.step - state.nonfinite,
        skipped=state.skipped - state.nonfinite,
        nonfinite=jnp.zeros_like(state.nonfinite),
    )


def next_phase(
    state: TrainState, optimizer: optax.GradientTransformation, restart: bool, reset_average: bool
) -> TrainState:
    """The state with which a later phase begins: the eval average becomes the teacher.

    With `restart` everything else starts afresh from that teacher (the paper's rule); otherwise student, optimizer and
    averages go on, and `reset_average` restarts the eval average's bias correction. See `methods.phases.Phase`.
    """
    teacher = state.averages["eval"].params
    if restart:
        fresh = create(teacher, optimizer, [n for n in state.averages if n != "eval"], teacher)
        return fresh.replace(step=state.step, skipped=state.skipped, base=state.base)
    averages = dict(state.averages)
    if reset_average:
        averages["eval"] = ema.reset(averages["eval"])
    none = jnp.zeros_like(state.nonfinite)
    return state.replace(teacher=jax.tree.map(jnp.copy, teacher), averages=averages, nonfinite=none)
