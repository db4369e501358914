"""Flax NNX: module(z, time, cond), an object that holds its parameters.

The module is taken as it is when the model is made: its parameters are those that training begins with, the rest of
its state (the means of batch normalisation) stays as it is. Changing the object afterwards changes nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.trees import Fixed, from_plain, to_plain
from diffusion_distill.base.typing import Cond, Data, Key, Params
from diffusion_distill.denoisers.network import Network, called, cannot_drop


@dataclass(frozen=True)
class Nnx(Network):
    """An NNX module, split. Use `Nnx.split(module)`.

    Attributes:
      graph: the module without arrays.
      state: what is neither a parameter nor a random stream.
      like: the structure of the parameters and of the random streams.
      first: the parameters that it came with.
    """

    graph: Any
    state: Fixed
    like: Any = field(compare=False, repr=False)
    first: Params = field(compare=False, repr=False)
    kind: ClassVar[str] = "Flax NNX module"

    @classmethod
    def split(cls, module: nnx.Module) -> Nnx:
        """The network of a module."""
        graph, params, streams, state = nnx.split(module, nnx.Param, nnx.RngState, ...)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, streams))
        return cls(graph, Fixed(state), shapes, to_plain(params))

    @property
    def module(self) -> nnx.Module:
        """The module without arrays, for its attributes; `merge` gives one that can be called."""
        return nnx.merge(self.graph, *self.like, self.state.tree)

    def merge(self, params: Params, dropout: Key | None = None) -> nnx.Module:
        """The module with other parameters, such as a student's; its random streams begin at the dropout key."""
        like_params, like_streams = self.like
        key = jax.random.key(0) if dropout is None else dropout
        streams = _streams(key, like_streams)
        module = nnx.merge(self.graph, from_plain(params, like_params), streams, self.state.tree)
        # Only dropout differs in training: means of batch normalisation are state and stay as they are.
        switches = {"deterministic": dropout is None, "use_running_average": True}
        module.set_attributes(**switches, raise_if_not_found=False)
        return module

    def init(self, key: Key, z: Data, time: Array, cond: Cond | None) -> Params:
        """The parameters that the module came with."""
        return self.first

    def apply(self, params: Params, z: Data, time: Array, cond: Cond | None, *, dropout: Key | None = None) -> Array:
        """The module's output; `train`, `deterministic` and `rngs` are passed if the module takes them."""
        rngs = None if dropout is None else nnx.Rngs(dropout=dropout)
        options = {"train": dropout is not None, "deterministic": dropout is None, "rngs": rngs}
        return called(self.merge(params, dropout), z, time, cond, **options)  # type: ignore[arg-type]

    @property
    def own(self) -> Params:
        """The parameters that the module came with."""
        return self.first

    @property
    def drops(self) -> bool:
        """Whether a layer of `nnx.Dropout` has a rate above 0."""
        return any(layer.rate for layer in _dropouts(self.module))

    def with_dropout(self, rate: float) -> Nnx:
        """The module with another rate in its layers of `nnx.Dropout`, if all have the same."""
        module = self.merge(self.first)
        layers = _dropouts(module)
        if rate and len({layer.rate for layer in layers}) != 1:
            raise cannot_drop(self, rate, f"has layers of nnx.Dropout with the rates {[la.rate for la in layers]}")
        for layer in layers:
            layer.rate = rate
        return Nnx.split(module)


def _dropouts(module: nnx.Module) -> list[nnx.Dropout]:
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Dropout)]


def _streams(key: Key, like: Any) -> Any:
    """Random streams that begin at a key: one key for each stream, counts at 0."""
    leaves, structure = jax.tree.flatten(like)
    fresh = []
    for number, leaf in enumerate(leaves):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            fresh.append(jnp.zeros(leaf.shape, leaf.dtype))
            continue
        own = jax.random.fold_in(key, number)
        fresh.append(jax.random.split(own, leaf.shape) if leaf.shape else own)
    return jax.tree.unflatten(structure, fresh)


adapt = Nnx.split
