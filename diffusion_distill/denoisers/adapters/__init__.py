"""Adapters: networks of other libraries as a `Network`. A new one is a file beside these and a line in `ADAPTERS`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NamedTuple

import flax.linen as nn

from diffusion_distill.denoisers.adapters.linen import Linen
from diffusion_distill.denoisers.network import Network


class Adapter(NamedTuple):
    """How networks of a library are told and taken.

    Attributes:
      kind: in words.
      library, type: the class of its networks. The library is not imported here: who has a network of it has done so.
      module: of this package, whose function `adapt` takes them.
    """

    kind: str
    library: str
    type: str
    module: str


ADAPTERS = (
    Adapter("a Flax NNX module", "flax.nnx", "Module", "nnx"),
    Adapter("an Equinox module", "equinox", "Module", "equinox"),
    Adapter("Haiku's hk.transform(f)", "haiku", "Transformed", "haiku"),
)


def adapt(network: Any) -> Network:
    """The network as the library calls it.

    Args:
      network: a Flax Linen module, one of those in `ADAPTERS`, or a `Network` such as `Functions(init, apply)`.

    Raises:
      TypeError: it is something else.
    """
    if isinstance(network, Network):
        return network
    if isinstance(network, nn.Module):
        return Linen(network)
    for adapter in ADAPTERS:
        library = sys.modules.get(adapter.library)
        if library is not None and isinstance(network, getattr(library, adapter.type)):
            return import_module(f"{__name__}.{adapter.module}").adapt(network)
    known = ", ".join(adapter.kind for adapter in ADAPTERS)
    raise TypeError(
        f"A network must be a Flax Linen module, {known}, a pair dd.Functions(init, apply), or a subclass of Network, "
        f"got {network!r}. Wrap it in dd.Functions, with init(key, z, time, cond) and apply(params, z, time, cond)."
    )
