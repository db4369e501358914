"""A model: a network, the process it was trained on, and what its output means.

`Model` is a value (frozen, hashable, described by a plain dictionary); with parameters it becomes a
`Denoiser`, a JAX tree that maps (z, level, cond) to x_hat and is what solvers and losses call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffusion_distill.base import guided
from diffusion_distill.base.arrays import Array, expand
from diffusion_distill.base.typing import Cond, Data, Key, Params
from diffusion_distill.denoisers import conditions, description
from diffusion_distill.denoisers.adapters import Linen, adapt
from diffusion_distill.denoisers.network import Network
from diffusion_distill.process import predictions
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Cosine, DiscreteBetas, Process
from diffusion_distill.process.time_input import IDDPMInput, LogsnrInput, TimeInput
from diffusion_distill.process.vp_discrete import Discrete

#: Parts of a model that know so many `steps` and nothing between them.
DISCRETE = (Discrete, IDDPMInput)


@dataclass(frozen=True)
class Model:
    """Everything about a diffusion model but its parameters.

    Attributes:
      network: called as network(z, time, cond): a module of Flax Linen, Flax NNX or Equinox, a pair of Haiku, or
        `Functions(init, apply)`; see `adapters`. A module that holds arrays is kept as a `Network`, which does not.
      shape: of one sample, channels last: (height, width, channels), (time, channels), (width,), ...
      process: maps times to levels.
      prediction: one of `predictions.PREDICTIONS`.
      time_input: maps a level to the number the network is told, and scales its input.
      cond: the condition of one sample: a tree of arrays or `jax.ShapeDtypeStruct`s without a batch axis. None: labels
        if the network has an attribute num_classes above 1, else no condition. See `conditions`.
      null: the condition of a sample without one, for guidance; labels have num_classes by themselves.
      data_range: the least and the largest value of samples, to which estimates can be clipped, and which can be
        drawn as black and white; None for values without bounds, such as latents.
      guided: of a guided student, the least and the largest scale of guidance that it learned: its network is called
        with the tree of `base.guided`. None for any other model.

    Raises:
      ValueError: unknown prediction, a network whose output channels do not fit it, a bad shape, null condition or
        range; a guided student without a condition; noise predicted where the process has no signal.
      TypeError: a network of an unknown kind.
    """

    network: Any
    shape: tuple[int, ...]
    process: Process = field(default_factory=Cosine)
    prediction: str = "x"
    time_input: TimeInput = field(default_factory=LogsnrInput)
    cond: Any = None
    null: Any = None
    data_range: tuple[float, float] | None = (-1.0, 1.0)
    guided: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        adapted = adapt(self.network)
        set_field = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        set_field("network", adapted.module if isinstance(adapted, Linen) else adapted)
        set_field("shape", tuple(self.shape))
        set_field("cond", conditions.described(self.cond))
        set_field("null", conditions.null_for(self.null, self.cond))
        set_field("data_range", None if self.data_range is None else tuple(map(float, self.data_range)))
        set_field("guided", conditions.checked_scales(self.guided))
        if not self.shape or any(n < 1 for n in self.shape):
            raise ValueError(f"shape must be one sample's, such as (height, width, channels), got {self.shape!r}.")
        if self.data_range is not None and not (len(self.data_range) == 2 and self.data_range[0] < self.data_range[1]):
            raise ValueError(f"data_range must be (low, high) with low < high, or None, got {self.data_range!r}.")
        if self.guided and not self.conditional:
            raise ValueError("A guided student has a condition, but this model is unconditional. Leave `guided` out.")
        if isinstance(self.process, DiscreteBetas):
            self.process.check_prediction(self.prediction)
        needed = predictions.output_channels(self.prediction, self.shape[-1])
        given = adapted.option("out_ch", needed)
        if given != needed:
            raise ValueError(
                f"Prediction {self.prediction!r} of {self.shape[-1]}-channel images needs a network with "
                f"{needed} output channels, got out_ch={given}. Set out_ch={needed}."
            )

    @property
    def adapter(self) -> Network:
        """The network as the library calls it."""
        return adapt(self.network)

    @property
    def params(self) -> Params:
        """The parameters that came with the network, as those of NNX and Equinox modules do.

        Raises:
          ValueError: the parameters of such networks are kept apart from them.
        """
        own = self.adapter.own
        if own is None:
            raise ValueError(
                f"The network {self.adapter.name} holds no parameters. Give those that it was trained to, as in "
                "Artefact(model, params), or take fresh ones from model.init(key)."
            )
        return own

    @property
    def num_classes(self) -> int:
        """Number of classes of the labels that the network is conditioned on; 1 means that it takes no labels."""
        return 1 if self.cond is not None else self.adapter.option("num_classes", 1)

    @property
    def conditional(self) -> bool:
        """Whether the network takes a condition."""
        return conditions.taken(self)

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data, as EDM's preconditioning uses it."""
        return getattr(self.time_input, "sigma_data", predictions.SIGMA_DATA)

    @property
    def discrete_steps(self) -> int | None:
        """Steps of the discrete process that the network was trained for, as many as it knows; None for any time."""
        known = [part.steps for part in (self.process, self.time_input) if isinstance(part, DISCRETE)]
        return min(known, default=None)

    def with_network(self, **changes: Any) -> Model:
        """Returns a copy of the model whose network, a Flax Linen module, has other settings, such as dropout=0.1."""
        if not isinstance(self.adapter, Linen):
            raise ValueError(f"The settings of a {self.adapter.kind} cannot be changed. Build another network.")
        return dataclasses.replace(self, network=self.network.clone(**changes))

    def init(self, key: Key) -> Params:
        """Parameters to begin training with: fresh float32 ones, or those that came with the network."""
        return self.adapter.init(key, *self._zeros())

    def param_shapes(self) -> Params:
        """The shapes and types of the parameters, as `init` makes them; none is allocated.

        Raises:
          ValueError: the network cannot be built for samples of this shape.
        """
        try:
            return jax.eval_shape(self.init, jax.random.key(0))
        except Exception as error:  # networks of every library, with settings that may be damaged, raise any kind
            raise ValueError(
                f"The network {self.adapter.name} cannot be built for samples of shape {self.shape} "
                f"({type(error).__name__}: {str(error)[:400]})."
            ) from error

    def check_call(self) -> None:
        """Calls the network with shapes alone, as training will.

        Raises:
          ValueError: the output has another shape than the prediction needs; besides, what the network raises.
        """
        raw, _ = jax.eval_shape(self.adapter.init_with_output, jax.random.key(0), *self._zeros())
        self._check_output(raw, (1, *self.shape))

    def _zeros(self) -> tuple[Data, Array, Cond | None]:
        """What the network is called with for one sample, all zeros."""
        return jnp.zeros((1, *self.shape), jnp.float32), jnp.zeros((1,), jnp.float32), conditions.zeros(self)

    def raw(self, params: Params, z: Data, level: Level, cond: Cond | None, dropout: Key | None) -> Array:
        """The network's output for z [batch, *shape] at levels [batch]; dropout acts only with a key.

        Raises:
          ValueError: the output has another shape than the prediction needs, or a guided student is not told a scale.
        """
        if self.guided and guided.parts(cond)[0] is None:
            raise ValueError(
                'A guided student is called with cond={"guidance": scale, "cond": cond}, both [batch, ...], or as '
                "guidance.AtScale(denoise, scale) with cond alone."
            )
        time, scale = self.time_input.time(level, self.process), self.time_input.scale(level)
        z = z if scale is None else expand(scale, z) * z
        raw = self.adapter.apply(params, z, time, cond if self.conditional else None, dropout=dropout)
        self._check_output(raw, z.shape)
        return raw.astype(jnp.result_type(z))  # a network may compute in another precision

    def _check_output(self, raw: Any, shape: tuple[int, ...]) -> None:
        """Raises ValueError for an output that the prediction cannot be read from, for samples [batch, *shape]."""
        needed = (*shape[:-1], predictions.output_channels(self.prediction, self.shape[-1]))
        if np.shape(raw) != needed:
            raise ValueError(
                f"The network {self.adapter.name} gives {np.shape(raw)} for a batch {shape}, but a prediction of "
                f"{self.prediction!r} must be {needed}: channels last."
            )

    def denoiser(self, params: Params, dropout: Key | None = None) -> Denoiser:
        """Binds parameters; with a dropout key the network runs in training mode."""
        return Denoiser(params=params, model=self, dropout=dropout)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description from which `from_dict` rebuilds the model."""
        return description.to_dict(self)

    @classmethod
    def from_dict(cls, described: Mapping[str, Any], network: Any = None) -> Model:
        """Rebuilds a model from `to_dict`.

        Args:
          network: takes the place of the described one; needed where the library cannot rebuild it.

        Raises:
          ValueError: unknown names and fields, with near matches, missing fields, or a network that must be given.
          TypeError: no mapping, or a field of another type.
        """
        return cls(**description.from_dict(described, network))


class Denoiser(struct.PyTreeNode):
    """A model with its parameters: calls give x_hat."""

    params: Params
    model: Any = struct.field(pytree_node=False)  # a Model, or anything with `raw` and `prediction`
    dropout: Key | None = None

    @property
    def prediction(self) -> str:
        """The kind of the network's output, one of `predictions.PREDICTIONS`."""
        return self.model.prediction

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data."""
        return getattr(self.model, "sigma_data", predictions.SIGMA_DATA)

    @property
    def data_range(self) -> tuple[float, float] | None:
        """The least and the largest value of the data; None without bounds."""
        return getattr(self.model, "data_range", (-1.0, 1.0))

    def raw(self, z: Data, level: Level, cond: Cond | None = None) -> Array:
        """The network's own output."""
        return self.model.raw(self.params, z, level, cond, self.dropout)

    def __call__(self, z: Data, level: Level, cond: Cond | None = None) -> Data:
        """x_hat of the shape of z."""
        return predictions.to_x(self.prediction, self.raw(z, level, cond), z, level, self.sigma_data)

    def x_head(self, z: Data, level: Level, cond: Cond | None = None) -> tuple[Data, Data]:
        """Returns x_hat and the network's own x head from one network call; they differ only for 'both'."""
        raw = self.raw(z, level, cond)
        return (
            predictions.to_x(self.prediction, raw, z, level, self.sigma_data),
            predictions.x_head(self.prediction, raw, z, level, self.sigma_data),
        )
