"""Flax Linen: module(z, time, cond, train=...), whose parameters are kept apart from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.compilation import run_once
from diffusion_distill.base.typing import Cond, Data, Key, Params
from diffusion_distill.denoisers.network import Network, called, cannot_drop


@dataclass(frozen=True)
class Linen(Network):
    """A Linen module. Its field `dropout`, if it has one, is its rate, which can be changed.

    `train` is passed if the module takes it: True with a dropout key.
    """

    module: nn.Module
    kind: ClassVar[str] = "Flax Linen module"

    def init(self, key: Key, z: Data, time: Array, cond: Cond | None) -> Params:
        """Fresh parameters.

        Raises:
          ValueError: the module keeps state beside its parameters, such as the means of batch normalisation.
        """
        return self._params(run_once(self._called("init"), key, z, time, cond))

    def init_with_output(self, key: Key, z: Data, time: Array, cond: Cond | None) -> tuple[Array, Params]:
        """The output for fresh parameters, and those; errors as `init`."""
        output, variables = run_once(self._called("init_with_output"), key, z, time, cond)
        return output, self._params(variables)

    def _called(self, name: str) -> Callable[..., Any]:
        """The module's function of that name, as training calls the module, without dropout."""
        return partial(getattr(self.module, name), method=partial(_call, train=False))

    def _params(self, variables: Mapping[str, Any]) -> Params:
        state = sorted(set(variables) - {"params"})
        if state:
            raise ValueError(
                f"The network {self.name} keeps state beside its parameters ({', '.join(state)}), which would be lost. "
                "Use layers without state, such as nn.GroupNorm or nn.LayerNorm in place of nn.BatchNorm."
            )
        return variables.get("params", {})

    def apply(self, params: Params, z: Data, time: Array, cond: Cond | None, *, dropout: Key | None = None) -> Array:
        """The module's output."""
        rngs = None if dropout is None else {"dropout": dropout}
        train = dropout is not None
        return self.module.apply({"params": params}, z, time, cond, rngs=rngs, method=partial(_call, train=train))  # type: ignore[return-value]

    @property
    def drops(self) -> bool:
        """Whether its field `dropout` is above 0."""
        return bool(getattr(self.module, "dropout", 0))

    def with_dropout(self, rate: float) -> nn.Module:
        """The module with another value of its field `dropout`."""
        if hasattr(self.module, "dropout"):
            return self.module.clone(dropout=rate)
        if rate:
            raise cannot_drop(self, rate, "has no field 'dropout'")
        return self.module

    def without_rates(self) -> nn.Module:
        """The module with the fields `dropout` and `label_dropout` at 0, and `remat`, which changes no number, off."""
        without: dict[str, Any] = {"dropout": 0.0, "label_dropout": 0.0, "remat": False}
        return self.module.clone(**{name: value for name, value in without.items() if hasattr(self.module, name)})


def _call(module: nn.Module, z: Data, time: Array, cond: Cond | None, train: bool) -> Any:
    return called(module, z, time, cond, train=train)  # type: ignore[arg-type]
