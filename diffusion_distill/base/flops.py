"""Floating-point operations of a function, counted from the shapes of its arrays.

The function is traced, not run or compiled, and the matrix products and convolutions of its jaxpr are counted, two
operations for each multiply-add. Everything else is left out, as is usual for the FLOPs of a model. The count does not
depend on the device, as XLA's own cost analysis does, which misses the convolutions and attention of cuDNN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of function(*arguments).

    Gradients of a function with rules of its own (`jax.custom_vjp`, `jax.custom_jvp`) are not looked at: the function
    counts as it is written forward. A checkpointed function (`jax.checkpoint`) counts once. Of the branches of
    `jax.lax.cond` the largest counts, of those of `jax.lax.platform_dependent` the default: a form that is faster on
    one kind of device although it has more operations does not change the FLOPs of a model.

    Args:
      arguments: trees of arrays, or of `jax.ShapeDtypeStruct`s of their shapes.

    Raises:
      ValueError: there is a product in a while loop, whose number of rounds is not known from the shapes.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        return 2 * PRODUCTS[name](equation)
    if name == "cond":
        counts = [_of_jaxpr(branch) for branch in _inner(params)]
        return counts[-1] if params.get("branches_platforms") else max(counts)
    inside = sum(map(_of_jaxpr, _inner(params)))
    if name == "while" and inside:
        raise ValueError(
            "The function has a matrix product or a convolution in a while loop, whose number of rounds is not known. "
            "Use a loop of known length, such as jax.lax.scan, or fori_loop with constant bounds."
        )
    if name == "scan":
        return params["length"] * inside
    if name == "shard_map":  # its shapes are those of one device
        return params["mesh"].size * inside
    if name == "pallas_call":  # its shapes are those of one block
        return prod(params["grid_mapping"].grid) * inside
    return inside


def _inner(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs among the parameters of an equation: what it calls."""
    for value in jax.tree.leaves(list(params.values()), is_leaf=lambda v: isinstance(v, ClosedJaxpr | Jaxpr)):
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _shapes(equation: JaxprEqn) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Of what goes in and of what comes out."""
    of = lambda variables: [getattr(variable.aval, "shape", ()) for variable in variables]  # noqa: E731
    return of(equation.invars), of(equation.outvars)


def _of_dot(equation: JaxprEqn) -> int:
    """Multiply-adds of a dot_general."""
    [left, _], [out], [(axes, _), _] = *_shapes(equation), equation.params["dimension_numbers"]
    return prod(out) * prod(left[axis] for axis in axes)


def _of_convolution(equation: JaxprEqn) -> int:
    """Multiply-adds of a conv_general_dilated.

    Zeros of the padding count, as in the usual formula: pixels of the result x places of the kernel x channels. Zeros
    that lhs_dilation puts between the pixels do not. With groups a kernel has only the input channels of its group.
    """
    params, ([_, kernel], [out]) = equation.params, _shapes(equation)
    numbers = params["dimension_numbers"]
    pairs = 1  # of a pixel of the result and a place of the kernel
    settings = zip(
        params["window_strides"], params["rhs_dilation"], params["lhs_dilation"], params["padding"], strict=True
    )
    for k, (stride, spread, dilation, (before, _)) in enumerate(settings, start=2):
        results, places = out[numbers.out_spec[k]], kernel[numbers.rhs_spec[k]]
        read = stride * np.arange(results)[:, None] + spread * np.arange(places) - before
        pairs *= int(np.sum(read % dilation == 0))
    return pairs * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]


def _of_tangent(equation: JaxprEqn) -> int:
    """Multiply-adds of a 3x3 convolution of a tangent (networks/layers/winograd.py), counted as a plain one."""
    [_, kernel], [out] = _shapes(equation)
    return prod(out) * prod(kernel[:3])


def _of_attention(equation: JaxprEqn) -> int:
    """Multiply-adds of cuDNN's attention: q [batch, positions, heads, width] with k [batch, positions, ...], with v."""
    [query, key, *_], _ = _shapes(equation)
    return 2 * prod(query) * key[1]


PRODUCTS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _of_dot,
    "conv_general_dilated": _of_convolution,
    "convolution_of_a_tangent": _of_tangent,
    "dot_product_attention_fwd_wrapper": _of_attention,
}
