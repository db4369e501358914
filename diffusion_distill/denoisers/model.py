"""A model: a network, the process it was trained on, and what its output means.

`Model` is a value (frozen, hashable, described by a plain dictionary); with parameters it becomes a
`Denoiser`, a JAX tree that maps (z, level, cond) to x_hat and is what solvers and losses call.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from diffusion_distill.base.arrays import Array, expand, namespace
from diffusion_distill.base.registry import check_keys, describe, rebuild
from diffusion_distill.base.typing import Cond, Image, Key, Params
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.networks import NETWORKS
from diffusion_distill.process import predictions
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import PROCESSES, Cosine, LinearBetaDiscrete, Process, on_grid
from diffusion_distill.process.time_input import TIME_INPUTS, IDDPMInput, LogsnrInput, TimeInput

#: Parts of a model that know so many `steps` and nothing between them.
DISCRETE = (LinearBetaDiscrete, IDDPMInput)


@dataclass(frozen=True)
class Model:
    """Everything about a diffusion model but its parameters.

    Attributes:
      network: a Flax module called as network(x, time, cond, train=...).
      shape: (height, width, channels) of one image.
      process: maps times to levels.
      prediction: one of `predictions.PREDICTIONS`.
      time_input: maps a level to the scalar the network embeds, and scales its input.

    Raises:
      ValueError: unknown prediction, a network whose output channels do not fit it, or a bad image shape.
    """

    network: nn.Module
    shape: tuple[int, int, int]
    process: Process = field(default_factory=Cosine)
    prediction: str = "x"
    time_input: TimeInput = field(default_factory=LogsnrInput)

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or any(n < 1 for n in self.shape):
            raise ValueError(f"shape must be (height, width, channels), got {self.shape!r}.")
        needed = predictions.output_channels(self.prediction, self.shape[-1])
        given = getattr(self.network, "out_ch", needed)
        if given != needed:
            raise ValueError(
                f"Prediction {self.prediction!r} of {self.shape[-1]}-channel images needs a network with "
                f"{needed} output channels, got out_ch={given}. Set out_ch={needed}."
            )

    @property
    def num_classes(self) -> int:
        """Number of classes the network is conditioned on; 1 means unconditional."""
        return getattr(self.network, "num_classes", 1)

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
        """Returns a copy of the model whose network has other settings, such as dropout=0.1."""
        return dataclasses.replace(self, network=self.network.clone(**changes))

    def on_grid(self, steps: int) -> Model:
        """Returns a copy whose process is for `steps` steps, if its levels depend on their number (EDM's do)."""
        return dataclasses.replace(self, process=on_grid(self.process, steps))

    def init(self, key: Key) -> Params:
        """Fresh float32 parameters."""
        x = jnp.zeros((1, *self.shape), jnp.float32)
        cond = jnp.zeros((1,), jnp.int32) if self.num_classes > 1 else None
        return jax.jit(partial(self.network.init, train=False))(key, x, jnp.zeros((1,), jnp.float32), cond)["params"]

    def raw(self, params: Params, z: Image, level: Level, cond: Cond | None, dropout: Key | None) -> Array:
        """The network's output for z [batch, h, w, c] at levels [batch]; dropout acts only with a key."""
        rngs = None if dropout is None else {"dropout": dropout}
        time, scale = self.time_input.time(level), self.time_input.scale(level)
        z = z if scale is None else expand(scale, z) * z
        cond = cond if self.num_classes > 1 else None
        raw = self.network.apply({"params": params}, z, time, cond, train=dropout is not None, rngs=rngs)
        return raw.astype(jnp.result_type(z))  # type: ignore[union-attr]  # a network may compute in another precision

    def denoiser(self, params: Params, dropout: Key | None = None) -> Denoiser:
        """Binds parameters; with a dropout key the network runs in training mode."""
        return Denoiser(params=params, model=self, dropout=dropout)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description from which `from_dict` rebuilds the model."""
        return {
            "network": describe(self.network, NETWORKS),
            "process": describe(self.process, PROCESSES),
            "prediction": self.prediction,
            "time_input": describe(self.time_input, TIME_INPUTS),
            "shape": list(self.shape),
        }

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> Model:
        """Rebuilds a model from `to_dict`.

        Raises:
          ValueError: unknown names and fields, with near matches, and missing fields.
          TypeError: no mapping, or a field of another type.
        """
        check_keys("model", description, [f.name for f in dataclasses.fields(cls)])
        return cls(
            network=rebuild("network", description["network"], NETWORKS),
            process=rebuild("process", description["process"], PROCESSES),
            prediction=description["prediction"],
            time_input=rebuild("time_input", description["time_input"], TIME_INPUTS),
            shape=tuple(description["shape"]),
        )


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

    def raw(self, z: Image, level: Level, cond: Cond | None = None) -> Array:
        """The network's own output."""
        return self.model.raw(self.params, z, level, cond, self.dropout)

    def __call__(self, z: Image, level: Level, cond: Cond | None = None) -> Image:
        """x_hat of the shape of z."""
        return predictions.to_x(self.prediction, self.raw(z, level, cond), z, level, self.sigma_data)

    def x_head(self, z: Image, level: Level, cond: Cond | None = None) -> tuple[Image, Image]:
        """Returns x_hat and the network's own x head from one network call; they differ only for 'both'."""
        raw = self.raw(z, level, cond)
        return (
            predictions.to_x(self.prediction, raw, z, level, self.sigma_data),
            predictions.x_head(self.prediction, raw, z, level),
        )


class Clipped(struct.PyTreeNode):
    """A denoiser whose x_hat is clipped to [-1, 1]."""

    denoise: Denoise

    def __call__(self, z: Image, level: Level, cond: Cond | None = None) -> Image:
        """x_hat in [-1, 1]."""
        x = self.denoise(z, level, cond)
        return namespace(x).clip(x, -1, 1)


class Thresholded(struct.PyTreeNode):
    """A denoiser with dynamic thresholding: large x_hat are clipped and scaled, sample by sample, to [-1, 1].

        x_hat <- clip(x_hat, -s, s) / s        s = max(floor, quantile of |x_hat| in the sample)

    Imagen (arXiv:2205.11487 section 2.3); with floor 1 a sample within [-1, 1] stays as it is.

    Attributes:
      quantile: in [0, 1], with linear interpolation between two values; 1 is the largest |x_hat|.
      floor: the least s, above 0.

    Raises:
      ValueError: a quantile or floor outside its range.
    """

    denoise: Denoise
    quantile: float = struct.field(pytree_node=False, default=0.995)
    floor: float = struct.field(pytree_node=False, default=1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"The quantile of thresholding must be in [0, 1], got {self.quantile}.")
        if not 0 < self.floor < math.inf:
            raise ValueError(f"The floor of thresholding must be positive and finite, got {self.floor}.")

    def __call__(self, z: Image, level: Level, cond: Cond | None = None) -> Image:
        """x_hat in [-1, 1]."""
        x = self.denoise(z, level, cond)
        xp = namespace(x)
        size = xp.quantile(xp.abs(x).reshape(len(x), -1), self.quantile, axis=1)
        s = expand(xp.maximum(size, self.floor), x)
        return xp.clip(x, -s, s) / s
