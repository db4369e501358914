"""The tensors of PyTorch's networks and the parameters they become, both ways.

PyTorch's kernels are (out, in[, height, width]), ours ([height, width,] in, out); its 1x1 convolutions are our matrix
products. Each importer says which tensor a parameter comes from (`Place`); shapes and values follow from that:

    order    the tensor holds
    ""       a kernel, or a vector, which is unchanged
    table    a table of labels, which is unchanged
    hqc      q, k and v of an attention in one kernel, whose outputs are (heads, {q, k, v}, channels of a head)
    qhc      the same as ({q, k, v}, heads, channels)
    hcq      the same as (heads, channels, {q, k, v})
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.weights import matching
from diffusion_distill.weights.matching import Shape, WeightsError

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
#: The most digits in the number of a block.
MOST_DIGITS = 9


class Place(NamedTuple):
    """Where a parameter is stored.

    Attributes:
      name: of the tensor.
      order: see above.
      ones: trailing axes of size 1, which a product stored as a convolution has.
      places: height and width of a convolution that is a matrix product of patches here.
    """

    name: str
    order: str = ""
    ones: int = 0
    places: tuple[int, ...] = ()


class Entry(NamedTuple):
    """A tensor and the parameters it becomes: none (a fixed buffer), one, or q, k and v.

    Attributes:
      name, shape: of the tensor.
      paths, path_shapes: of the parameters.
      order: see above.
    """

    name: str
    shape: Shape
    paths: tuple[str, ...]
    path_shapes: tuple[Shape, ...]
    order: str = ""

    def parts(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The parameters in a tensor, as views where that is possible."""
        if not self.paths:
            return []
        if self.order in ("", "table"):
            kernel = tensor if self.order else _channels_last(tensor)
            return [kernel.reshape(self.path_shapes[0])]
        packed = tensor.reshape(*self._packed, -1)  # the last axis: inputs, or 1 of a bias
        split = np.moveaxis(packed, self.order.index("q"), 0)
        return [np.moveaxis(part, -1, 0).reshape(shape) for part, shape in zip(split, self.path_shapes, strict=True)]

    def whole(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor of its parameters: the inverse of `parts`."""
        if self.order == "table" or (not self.order and len(self.shape) == 1):
            return parts[0].reshape(self.shape)
        if not self.order:
            outputs, inputs, *places = self.shape
            return np.moveaxis(parts[0].reshape(*places, inputs, outputs), (-1, -2), (0, 1))
        heads, size = self.path_shapes[0][-2:]
        split = np.stack([np.moveaxis(part.reshape(-1, heads, size), 0, -1) for part in parts])
        return np.moveaxis(split, 0, self.order.index("q")).reshape(self.shape)

    @property
    def _packed(self) -> tuple[int, ...]:
        heads, size = self.path_shapes[0][-2:]
        return tuple({"h": heads, "c": size, "q": 3}[axis] for axis in self.order)


def entries(shapes: Mapping[str, Shape], place_of: Callable[[str], Place]) -> tuple[Entry, ...]:
    """The correspondence for parameters {path: shape}, every tensor once."""
    places: dict[Place, list[str]] = {}
    for path in shapes:
        places.setdefault(place_of(path), []).append(path)
    found = []
    for place, paths in places.items():
        paths = tuple(sorted(paths, key=lambda path: "qkv".find(path.split("/")[-2])) if len(paths) > 1 else paths)
        shape = _tensor_shape(paths[0], shapes[paths[0]], place)
        found.append(Entry(place.name, shape, paths, tuple(shapes[path] for path in paths), place.order))
    return tuple(found)


def to_params(
    correspondence: Sequence[Entry], tensors: Mapping[str, np.ndarray], what: str = "The tensors"
) -> dict[str, Any]:
    """Nested parameters from tensors, every tensor used once.

    Returns:
      Nested dictionaries of float32 NumPy arrays, views of the given ones where these are float32.

    Raises:
      WeightsError: tensors missing, left over, of another shape or type or not finite, see `matching.match`. Axes of
        size 1 at the end may differ: programs store products as convolutions over no, one or two axes.
    """
    wanted = {entry.name: entry.shape for entry in correspondence}
    return filled_params(correspondence, matching.match(tensors, wanted, what, [_same_but_ones]))


def filled_params(correspondence: Sequence[Entry], filled: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Nested parameters from tensors of the right shapes."""
    flat = {
        path: part
        for entry in correspondence
        for path, part in zip(entry.paths, entry.parts(filled[entry.name]), strict=True)
    }
    return matching.unflatten(flat)


def to_tensors(correspondence: Sequence[Entry], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors by name from nested parameters: the inverse of `to_params`."""
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in matching.flatten(params).items()}
    return {
        entry.name: np.ascontiguousarray(entry.whole([flat[path] for path in entry.paths])) for entry in correspondence
    }


@lru_cache(maxsize=16)  # a network is traced for it, which takes a second
def parameter_shapes(network: nn.Module, shape: Shape) -> Mapping[str, Shape]:
    """{path: shape} of a network's parameters for images [height, width, channels]; none is allocated.

    Raises:
      WeightsError: the network does not take such images.
    """
    x, time = jax.ShapeDtypeStruct((1, *shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        tree = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), x, time)["params"]
    except (ValueError, TypeError) as error:
        raise WeightsError(f"The network does not take images of shape {shape}: {error}") from error
    return MappingProxyType({path: leaf.shape for path, leaf in matching.flatten(tree).items()})


def count_of(names: Iterable[str], pattern: str) -> int:
    """How many numbers 0, 1, ... a pattern finds at the beginnings of names: one more than the largest; 0 for none.

    Numbers of more than `MOST_DIGITS` digits are of no block, and are not counted.
    """
    found = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match and len(match[1]) <= MOST_DIGITS), default=0)


def _channels_last(tensor: np.ndarray) -> np.ndarray:
    """(out, in, ...) -> (..., in, out)."""
    return np.moveaxis(tensor, (0, 1), (-1, -2)) if tensor.ndim > 1 else tensor


def _tensor_shape(path: str, shape: Shape, place: Place) -> Shape:
    """The shape of a tensor, from that of a parameter in it."""
    *_, module, leaf = path.split("/")
    times = 1 if place.order in ("", "table") else 3
    if place.order == "table":
        return shape
    if leaf != "kernel":
        return (times * math.prod(shape),) if leaf in LEAVES else shape[::-1]
    if len(shape) == 4:
        return (*shape[:1:-1], *shape[:2])
    if place.places:
        return (shape[1], shape[0] // math.prod(place.places), *place.places)
    inputs = shape[:-1] if module == "proj_out" else shape[:1]
    return (times * math.prod(shape[len(inputs) :]), math.prod(inputs), *[1] * place.ones)


def _same_but_ones(name: str, stored: Shape, wanted: Shape) -> bool:
    def cut(shape: Shape) -> Shape:
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
        return shape

    return cut(stored) == cut(wanted)
