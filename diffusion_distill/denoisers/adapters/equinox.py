"""Equinox: module(z, time, cond, key=...) for one sample, an object that holds its parameters.

The module is called for each sample of a batch by `jax.vmap`. Its inexact arrays are the parameters, those that it
comes with are what training begins with; arrays of whole numbers stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import equinox as eqx
import jax

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.trees import Fixed, from_plain, to_plain
from diffusion_distill.base.typing import Cond, Data, Key, Params
from diffusion_distill.denoisers.network import Network, called, cannot_drop


@dataclass(frozen=True)
class Equinox(Network):
    """An Equinox module, split. Use `Equinox.split(module)`.

    Attributes:
      static: the module without its parameters.
      like: the structure of the parameters.
      first: the parameters that it came with.
    """

    static: Fixed
    like: Any = field(compare=False, repr=False)
    first: Params = field(compare=False, repr=False)
    kind: ClassVar[str] = "Equinox module"

    @classmethod
    def split(cls, module: Any) -> Equinox:
        """The network of a module.

        Raises:
          ValueError: the module has layers with state, such as `eqx.nn.BatchNorm`.
        """
        stateful = lambda node: isinstance(node, eqx.nn.StateIndex)  # noqa: E731
        if any(map(stateful, jax.tree.leaves(module, is_leaf=stateful))):
            raise ValueError(
                f"The network {type(module).__name__} has layers with state (eqx.nn.StateIndex), which would be lost. "
                "Use layers without state, such as eqx.nn.GroupNorm in place of eqx.nn.BatchNorm."
            )
        params, static = eqx.partition(module, eqx.is_inexact_array)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
        return cls(Fixed(static), shapes, to_plain(params))

    @property
    def module(self) -> Any:
        """The module with the parameters that it came with."""
        return self.merge(self.first)

    def merge(self, params: Params) -> Any:
        """The module with other parameters, such as a student's."""
        return eqx.combine(from_plain(params, self.like), self.static.tree)

    def init(self, key: Key, z: Data, time: Array, cond: Cond | None) -> Params:
        """The parameters that the module came with."""
        return self.first

    def apply(self, params: Params, z: Data, time: Array, cond: Cond | None, *, dropout: Key | None = None) -> Array:
        """The module's output for each sample; `key` is passed if the module takes it, each sample's own."""
        module = eqx.nn.inference_mode(self.merge(params), value=dropout is None)
        keys = None if dropout is None else jax.random.split(dropout, len(z))
        return jax.vmap(lambda z, time, cond, key: called(module, z, time, cond, key=key))(z, time, cond, keys)

    @property
    def own(self) -> Params:
        """The parameters that the module came with."""
        return self.first

    @property
    def drops(self) -> bool:
        """Whether a layer of `eqx.nn.Dropout` has a rate above 0."""
        return any(layer.p for layer in _dropouts(self.static.tree))

    def with_dropout(self, rate: float) -> Equinox:
        """The module with another rate in its layers of `eqx.nn.Dropout`, if all have the same."""
        rates = [layer.p for layer in _dropouts(self.static.tree)]
        if rate and len(set(rates)) != 1:
            raise cannot_drop(self, rate, f"has layers of eqx.nn.Dropout with the rates {rates}")
        static = jax.tree.map(
            lambda node: eqx.nn.Dropout(rate) if _is_dropout(node) else node, self.static.tree, is_leaf=_is_dropout
        )
        return Equinox(Fixed(static), self.like, self.first)


def _is_dropout(node: Any) -> bool:
    return isinstance(node, eqx.nn.Dropout)


def _dropouts(static: Any) -> list[Any]:
    return [node for node in jax.tree.leaves(static, is_leaf=_is_dropout) if _is_dropout(node)]


adapt = Equinox.split
