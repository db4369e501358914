"""Haiku: the pair of `hk.transform(f)`, with f(z, time, cond, train=...), whose parameters are kept apart from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Cond, Data, Key, Params
from diffusion_distill.denoisers.network import Network, called, takes

#: What functions call the argument that says whether they are trained.
TRAIN = ("train", "is_training")


@dataclass(frozen=True)
class Haiku(Network):
    """A pair of `hk.transform`; it drops if f has an argument `train` or `is_training`."""

    pair: Any
    kind: ClassVar[str] = "Haiku pair"

    def init(self, key: Key, z: Data, time: Array, cond: Cond | None) -> Params:
        """Fresh parameters."""
        bound = partial(self.pair.init, key)
        return jax.jit(lambda *inputs: called(bound, *inputs, **dict.fromkeys(TRAIN, False)))(z, time, cond)

    def apply(self, params: Params, z: Data, time: Array, cond: Cond | None, *, dropout: Key | None = None) -> Array:
        """The output of f."""
        bound = partial(self.pair.apply, params, dropout)
        return called(bound, z, time, cond, **dict.fromkeys(TRAIN, dropout is not None))

    @property
    def name(self) -> str:
        """Haiku does not tell the name of f."""
        return "hk.transform(...)"

    @property
    def drops(self) -> bool:
        """Whether f has an argument `train` or `is_training`."""
        return any(takes(self.pair.apply, name) for name in TRAIN)

    def option(self, name: str, default: Any) -> Any:
        """The default: a pair has no attributes."""
        return default


adapt = Haiku
