"""What the library needs of a network: fresh parameters, and the output for a batch.

Everything else about a network is its own. Networks of Flax, Equinox and Haiku become a `Network` by an adapter, see
`adapters`; two plain functions do by `Functions`. A subclass with `init` and `apply` can be given to `Model` as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Cond, Data, Key, Params


class Network:
    """A network as a static value: hashable, compared by content, and without arrays that jit would not see.

    Attributes:
      kind: what it is, in words, for messages and files.
      module: the user's own object, whose attributes `num_classes`, `out_ch` and `label_dropout` are read.
    """

    kind: ClassVar[str] = "network"
    module: Any = None

    def init(self, key: Key, z: Data, time: Array, cond: Cond | None) -> Params:
        """Parameters to begin training with, a tree of arrays.

        Args:
          key: of fresh parameters; networks that hold parameters of their own give those.
          z, time, cond: a batch of one sample, as `apply` gets it.
        """
        raise NotImplementedError

    def apply(self, params: Params, z: Data, time: Array, cond: Cond | None, *, dropout: Key | None = None) -> Array:
        """The output for a batch.

        Args:
          z: [batch, *shape], scaled as the model's time input says.
          time: [batch], what the network is told of the noise level.
          cond: a tree of arrays [batch, ...], or None.
          dropout: a key, in training only; without it nothing is dropped.
        """
        raise NotImplementedError

    def init_with_output(self, key: Key, z: Data, time: Array, cond: Cond | None) -> tuple[Array, Params]:
        """(`apply` with what `init` gives, what `init` gives), in one call of the network where its library can."""
        params = self.init(key, z, time, cond)
        return self.apply(params, z, time, cond), params

    @property
    def name(self) -> str:
        """What the user calls the network, for messages and files."""
        return type(self if self.module is None else self.module).__name__

    @property
    def drops(self) -> bool:
        """Whether a dropout key has an effect."""
        return False

    @property
    def own(self) -> Params | None:
        """The parameters that came with the network; None if they are kept apart from it."""
        return None

    def with_dropout(self, rate: float) -> Any:
        """The network with another rate of dropout; rate 0 silences it.

        Raises:
          ValueError: the network cannot change to that rate.
        """
        if rate:
            raise cannot_drop(self, rate, "has no rate of dropout that the library could set")
        return Silent(self) if self.drops else self

    def without_rates(self) -> Any:
        """The network with all rates at 0, to tell whether two networks differ in them only."""
        return self.with_dropout(0.0)

    def option(self, name: str, default: Any) -> Any:
        """An attribute of the user's network, such as num_classes."""
        return getattr(self if self.module is None else self.module, name, default)


def cannot_drop(network: Network, rate: float, reason: str) -> ValueError:
    """The error of a network that cannot be trained with a rate of dropout."""
    return ValueError(
        f"dropout={rate} was asked for, but the network {network.name} {reason}. Leave dropout out, or give a student "
        "model whose network has the rate that you want."
    )


@dataclass(frozen=True)
class Silent(Network):
    """A network that never drops anything."""

    network: Network
    kind: ClassVar[str] = "network without dropout"

    def init(self, key: Key, z: Data, time: Array, cond: Cond | None) -> Params:
        """As the network."""
        return self.network.init(key, z, time, cond)

    def apply(self, params: Params, z: Data, time: Array, cond: Cond | None, *, dropout: Key | None = None) -> Array:
        """As the network without a key."""
        return self.network.apply(params, z, time, cond)

    @property
    def name(self) -> str:
        """The network's."""
        return self.network.name

    @property
    def own(self) -> Params | None:
        """The network's."""
        return self.network.own

    def option(self, name: str, default: Any) -> Any:
        """The network's."""
        return self.network.option(name, default)


@dataclass(frozen=True)
class Functions(Network):
    """A network of two plain functions.

    Attributes:
      initialise: (key, z, time, cond) -> params, any tree of arrays.
      function: (params, z, time, cond) -> output. If it has an argument `dropout`, it gets a key there in training.

    Both are compared by identity: make the pair once, or every new one is compiled again.
    """

    initialise: Callable[..., Params]
    function: Callable[..., Array]
    kind: ClassVar[str] = "pair of functions"

    def init(self, key: Key, z: Data, time: Array, cond: Cond | None) -> Params:
        """What `initialise` gives."""
        return self.initialise(key, *_inputs(self.initialise, z, time, cond, before=1))

    def apply(self, params: Params, z: Data, time: Array, cond: Cond | None, *, dropout: Key | None = None) -> Array:
        """What `function` gives."""
        options = {"dropout": dropout} if self.drops else {}
        return self.function(params, *_inputs(self.function, z, time, cond, before=1), **options)

    @property
    def name(self) -> str:
        """That of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def drops(self) -> bool:
        """Whether the function has an argument `dropout`."""
        return takes(self.function, "dropout")

    def option(self, name: str, default: Any) -> Any:
        """The default: functions have no attributes."""
        return default


def called(function: Callable[..., Array], z: Data, time: Array, cond: Cond | None, **options: Any) -> Array:
    """function(z, time, cond, **options) with those options that it has, and without cond where it has no place."""
    known = {name: value for name, value in options.items() if takes(function, name)}
    return function(*_inputs(function, z, time, cond), **known)


def takes(function: Callable[..., Any], option: str) -> bool:
    """Whether a callable has an argument of that name, or any."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == option or p.kind is p.VAR_KEYWORD for p in parameters)


def _inputs(function: Callable[..., Any], z: Data, time: Array, cond: Cond | None, before: int = 0) -> tuple:
    """(z, time, cond); without cond if it is None and the function takes two after the first `before` arguments."""
    if cond is not None:
        return z, time, cond
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return z, time, cond
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    third = places[before + 2 : before + 3]
    return (z, time, cond) if third and third[0].name not in OPTIONS else (z, time)


#: Arguments of networks that are no condition, wherever they stand.
OPTIONS = ("train", "is_training", "training", "deterministic", "rngs", "rng", "key", "dropout")
