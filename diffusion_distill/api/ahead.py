"""A training run before it begins: what its update needs of devices, which need not be there.

Nothing is trained and no array is made: models, states and batches are shapes. The bytes of the state and the FLOPs
follow from shapes alone; what an update needs besides is found by compiling it, with XLA's own account of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_distill.api.beginning import check_low_rank, state_shapes, step_of
from diffusion_distill.api.training import student_models
from diffusion_distill.base.errors import OUT_OF_MEMORY
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods.method import Method
from diffusion_distill.methods.phases import Phase
from diffusion_distill.training import ema, loop, sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.optimizers import make_optimizer
from diffusion_distill.training.settings import Settings
from diffusion_distill.training.state import TrainState
from diffusion_distill.training.step import StepInputs
from diffusion_distill.training.utilisation import MEMORY, PEAKS, check_memory, device_bytes, update_flops

#: The utilisation with which hours are estimated: that of an update measured on an H200, see docs/performance.md.
UTILISATION = 0.4


@dataclass(frozen=True)
class Memory:
    """Bytes of one device in an update, by XLA's account.

    Attributes:
      state: arguments, which are the state and the batch.
      temporaries: activations, gradients, gathered parameters.
      outputs: what does not take the place of an argument.
    """

    state: int
    temporaries: int
    outputs: int

    @property
    def total(self) -> int:
        """All at once."""
        return self.state + self.temporaries + self.outputs


@dataclass(frozen=True)
class Ahead:
    """A run that has not begun.

    Attributes:
      model: the teacher that is trained, or the student.
      teacher: of a distillation; its parameters may be shapes.
      devices: that need not be there, see `training.topologies`; None for those here.
    """

    model: Model
    method: Method
    settings: Settings
    teacher: Artefact | None = None
    devices: Sequence[Any] | None = None

    @classmethod
    def of(
        cls, model: Model | None, teacher: Model | None, method: Method, settings: Settings,
        devices: Sequence[Any] | None = None,
    ) -> Ahead:  # fmt: skip
        """A training of `model`; or a distillation of a teacher's model, to `model` if that is given.

        Raises:
          ValueError: neither is given.
        """
        if teacher is None and model is None:
            raise ValueError("A run has a model to train, or a teacher to distil; neither is given.")
        known = None if teacher is None else Artefact(teacher, teacher.param_shapes())
        return cls(model or teacher, method, settings, known, devices)  # type: ignore[arg-type]

    @cached_property
    def student(self) -> Model:
        """The model as the method makes it: a guided one has more parameters than its teacher."""
        return self.model if self.teacher is None else student_models(self.teacher, self.method, self.model)[0]

    @cached_property
    def trained(self) -> Model:
        """The model with the rate of dropout it is trained with."""
        return self.model if self.teacher is None else student_models(self.teacher, self.method, self.model)[1]

    @cached_property
    def mesh(self) -> Mesh:
        """The devices, arranged as the settings say."""
        return sharding.make_mesh(self.settings.data_parallel, self.settings.params_parallel, self.devices)

    @cached_property
    def phases(self) -> list[Phase]:
        """The method's."""
        own = None if self.teacher is None else self.teacher.grid
        return self.method.phases(self.model, self.settings.batch_size, own)

    @cached_property
    def state(self) -> TrainState:
        """The shapes of the state."""
        check_low_rank(self.student, self.teacher, self.settings)
        optimizer = make_optimizer(self.settings.optimizer)
        return state_shapes(self.student.param_shapes(), self.teacher, self.method, self.settings, optimizer)

    @property
    def parameters(self) -> int:
        """The number of the trained network's."""
        student = jax.eval_shape(lambda state: state.whole(state.params), self.state)
        return sum(prod(leaf.shape) for leaf in jax.tree.leaves(student))

    @property
    def kind(self) -> str:
        """JAX's name of the devices."""
        return self.mesh.devices.flat[0].device_kind

    @property
    def room(self) -> int | None:
        """Bytes of a device's memory, None if they are not known."""
        return MEMORY.get(self.kind)

    def flops(self) -> int:
        """Those of the whole run, on all devices together."""
        teacher, found, total = None if self.teacher is None else self.teacher.model, {}, 0
        for phase in self.phases:
            rows = loop.rows_of(phase)
            leaves, kind = jax.tree.flatten(rows)
            alike = kind, *(np.shape(leaf)[1:] for leaf in leaves)  # phases differ in their number of rows
            if alike not in found:
                found[alike] = update_flops(self.method.losses, self.trained, teacher, self.state, rows)
            total += phase.updates * self.settings.batch_size * found[alike]
        return total

    def hours(self, utilisation: float = UTILISATION) -> float | None:
        """The run's estimated hours at a utilisation of the devices; None if their peak is not known."""
        peak = PEAKS.get(self.kind)
        return None if peak is None else self.flops() / (utilisation * peak * self.mesh.size) / 3600

    def state_bytes(self) -> int:
        """Bytes of the state on a device."""
        return device_bytes(self.state, self.mesh)

    def lowered(self) -> jax.stages.Lowered:
        """The update of the first phase, for the devices; it is the run's own.

        Raises:
          ValueError: a batch that the devices and parts do not divide.
        """
        settings, batch = self.settings, batch_shapes(self.model, self.settings.batch_size)
        sharding.check_batch(settings.batch_size, self.mesh, settings.parts)
        optimizer, roles = make_optimizer(settings.optimizer), (self.model, self.trained, self.state, self.teacher)
        step = step_of(*roles, self.method, settings, optimizer, self.mesh)
        return step.lower(self.state, batch, *inputs(self.phases[0], self.method.averages))

    def memory(self) -> Memory:
        """Of a device, by compiling the update: minutes for published networks."""
        found: Any = self.lowered().compile().memory_analysis()
        kept = found.output_size_in_bytes - found.alias_size_in_bytes
        return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, max(0, kept))

    def with_settings(self, **changes: Any) -> Ahead:
        """The run with other settings."""
        return replace(self, settings=replace(self.settings, **changes))

    def fits(self, batch_size: int) -> bool:
        """Whether an update of so many images fits into the devices' memory; it is compiled."""
        try:
            return self.with_settings(batch_size=batch_size).memory().total <= (self.room or 0)
        except jax.errors.JaxRuntimeError as error:
            if OUT_OF_MEMORY in str(error):  # compilers of TPUs refuse what does not fit
                return False
            raise

    def figures(self, alternatives: bool = True) -> dict[str, Any]:
        """What the mode `compile` says, JSON-ready; bytes are those of one device.

        Args:
          alternatives: with remat, in twice the parts, and the largest batch; each is compiled anew.

        Raises:
          ValueError: the state alone does not fit.
        """
        check_memory(self.state, self.mesh)
        found = self.memory()
        figures = {
            "devices": f"{self.mesh.size} x {self.kind}",
            "mesh": dict(self.mesh.shape),
            "batch": self.settings.batch_size,
            "parameters": self.parameters,
            "state bytes": self.state_bytes(),
            "bytes of an update": found.total,
            "bytes besides state and batch": found.temporaries,
            "memory of a device": self.room,
            "fits": None if self.room is None else found.total <= self.room,
            "FLOPs of the run": self.flops(),
            f"hours at a utilisation of {UTILISATION}": self.hours(),
        }
        return figures | (self._alternatives(found) if alternatives else {})

    def _alternatives(self, found: Memory) -> dict[str, Any]:
        """What remat and parts would save of the memory that was found, and the largest batch if the room is known."""
        parts, saved = 2 * self.settings.parts, {}
        if not self.settings.remat and self.model.adapter.option("remat", None) is not None:
            saved["bytes saved by remat"] = found.total - self.with_settings(remat=True).memory().total
        if self.settings.batch_size % (parts * self.mesh.size) == 0:
            saved[f"bytes saved by parts={parts}"] = found.total - self.with_settings(parts=parts).memory().total
        return saved | ({"largest batch that fits": self.largest_batch()} if self.room else {})

    def largest_batch(self) -> int:
        """The largest batch whose update fits, to an eighth; 0 if none does. Every try is compiled."""
        unit = self.mesh.size * self.settings.parts
        return unit * largest(lambda count: self.fits(unit * count), max(1, self.settings.batch_size // unit))


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest whole number that fits, at most an eighth below it; 0 if 1 does not fit.

    Args:
      fits: of larger numbers not, once one does not.
      start: tried first.
    """
    low, high, trial = 0, None, start
    while high is None or high - low > max(1, low // 8):
        low, high = (trial, high) if fits(trial) else (low, trial)
        trial = 2 * low if high is None else (low + high) // 2
    return low


def batch_shapes(model: Model, count: int) -> dict[str, Any]:
    """The shapes of a batch."""
    batch = {"x": jax.ShapeDtypeStruct((count, *model.shape), jnp.float32), "cond": conditions.structs(model, count)}
    return {name: value for name, value in batch.items() if value is not None}


def inputs(phase: Phase, momenta: Mapping[str, float]) -> tuple[StepInputs, Any]:
    """Shapes of what an update takes beside the state and the batch: the inputs of a phase, and the seed's key.

    Args:
      momenta: of the method's own averages.
    """
    averaging = ema.Averaging([phase], 0, momenta).at(0)
    made = StepInputs(loop.rows_of(phase), np.float32(1e-4), averaging)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)), made)
    return shapes, jax.eval_shape(jax.random.key, 0)
