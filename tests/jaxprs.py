"""Looking into traced programs: their operations, those of inner programs included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


def operations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a traced program, from front to back."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
            if _is_jaxpr(parameter):
                yield from operations(getattr(parameter, "jaxpr", parameter))


def products(jaxpr: Any) -> list[Any]:
    """Its convolutions and matrix products."""
    return [found for found in operations(jaxpr) if found.primitive.name in ("conv_general_dilated", "dot_general")]


def convolutions(jaxpr: Any) -> int:
    """The number of its convolutions."""
    return sum(found.primitive.name == "conv_general_dilated" for found in operations(jaxpr))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
