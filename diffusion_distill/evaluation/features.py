"""Features: one row of numbers per 8-bit image, on which metrics are computed.

`Inception` is the network of FID. One of two rules prepares its input; they give different numbers, so never compare
across them. On an axis of length L, output pixel i of 299 mixes two input pixels, the second with weight s - floor(s):

    pytorch_fid   s = max(0, (i + 1/2) L/299 - 1/2)   floor(s), min(floor(s) + 1, L - 1)   then x / 127.5 - 1
    tensorflow    s = i L/299                         floor(s), min(floor(s) + 1, L - 1)   then (x - 128) / 128

The first is pytorch-fid's (half-pixel centres) and TRACT's, the second that of the original graph, which OpenAI's
evaluator, EDM, StyleGAN and torch-fidelity keep. Neither smooths when it shrinks. Both are linear: a matrix per axis.

"Pixels" are the 8-bit image too, in every evaluation, with grey level k as k / 127.5 - 1. Samples are written as 8-bit
images, other features see nothing else, and most real images are 8-bit, so that like is compared with like. Against
unrounded pixels it changes little: 0.2455 instead of 0.2460 between two halves of the digits.

Anything with a name, a width and a call is `Features`: `Pixels`, `FromFunction` around a function, or your own class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.base.arrays import Array, settled
from diffusion_distill.base.errors import choose
from diffusion_distill.base.typing import Params
from diffusion_distill.evaluation import pixel_features
from diffusion_distill.evaluation.inception_network import DTYPES, SIZE, InceptionV3, Outputs


class Features(Protocol):
    """Turns 8-bit images into the rows of numbers that metrics are computed on."""

    @property
    def name(self) -> str:
        """The name shown in reports."""
        ...

    @property
    def width(self) -> int:
        """Numbers per image."""
        ...

    def __call__(self, images: Array) -> Array:
        """uint8 [n, h, w, c] -> [n, width]."""
        ...

    # A text `fingerprint` may be there too, see `FromFunction`.


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves: grey levels 0..255 mapped to [-1, 1].

    Attributes:
      shape: of one image, channels last; of other data with a range, whatever it is.
    """

    shape: tuple[int, ...]
    name: str = "pixels"

    @property
    def width(self) -> int:
        """Numbers per image."""
        return math.prod(self.shape)

    def __call__(self, images: ArrayLike) -> NDArray[np.float32]:
        """uint8 [n, *shape] -> float32 [n, width]; TypeError or ValueError for other images."""
        given = np.asarray(images)
        _check_bytes(given)
        if given.shape[1:] != tuple(self.shape):
            raise ValueError(f"Images have shape {given.shape}; need [n, {', '.join(map(str, self.shape))}].")
        return pixel_features(given.astype(np.float32) / 127.5 - 1)


@dataclass(frozen=True)
class FromFunction:
    """A function of yours, [n, ...] -> [n, width], of uint8 or (without a range) of samples; its result is checked.

    Attributes:
      width: 0 if it is not known beforehand.
      fingerprint: a text that changes when the function does (say, with its weights). Features of reference images
        are remembered by it; empty for features that are computed each time.
    """

    function: Callable[[Array], Array]
    name: str
    width: int = 0
    fingerprint: str = ""

    def __call__(self, images: Array) -> Array:
        """The function's own array [n, width].

        Raises:
          ValueError: the function returned an array of another shape.
        """
        found = self.function(images)
        if np.ndim(found) != 2 or np.shape(found) != (len(images), self.width or np.shape(found)[1]):
            raise ValueError(
                f"The features {self.name!r} of {len(images)} images have shape {np.shape(found)}; need "
                f"[{len(images)}, {self.width or 'width'}]."
            )
        return found


# ---------------------------------------------------------------- Inception


class InceptionFeatures(NamedTuple):
    """Float32 outputs for n images: [n, 2048] for FID, KID, precision and recall; [n, 2023] for sFID; [n, 1008] for IS.

    The logits are without the output's bias.
    """

    pool3: Array
    spatial: Array
    logits: Array


class Inception(struct.PyTreeNode):
    """FID's InceptionV3 on 8-bit images.

    The network is compiled once per number of images, the resize once per shape: give all batches the same size.

    Attributes:
      params: as `weights.inception` reads them. Put them on the devices first (`jax.device_put`); NumPy arrays would
        be copied there at every call. If every device of a mesh has a copy, they share the images.
      rule: a key of `RULES`. Numbers published with another rule cannot be compared.
      dtype: 'float32' or 'bfloat16'. The latter changes features by about 1 %; do not publish numbers from it.

    Raises:
      ValueError: unknown rule or dtype.
    """

    params: Params
    rule: str = struct.field(pytree_node=False, default="pytorch_fid")
    dtype: str = struct.field(pytree_node=False, default="float32")

    def __post_init__(self) -> None:
        choose("input rule", self.rule, RULES)
        choose("dtype of InceptionV3", self.dtype, DTYPES)

    @property
    def name(self) -> str:
        """The name shown in reports."""
        return f"inception, {self.rule}, {self.dtype}"

    def __call__(self, images: ArrayLike) -> InceptionFeatures:
        """uint8 [n, h, w, 3 or 1] -> features; grey images count as three equal channels.

        Raises:
          TypeError: images that are not uint8: round them first, by a stated rule.
          ValueError: another shape.
        """
        found = self.outputs(images)
        return InceptionFeatures(found.pool3, found.spatial, found.logits_unbiased)

    def outputs(self, images: ArrayLike) -> Outputs:
        """All outputs of the network for images as `__call__` takes them, from the same compiled function."""
        place = getattr(next(iter(jax.tree.leaves(self.params)), None), "sharding", None)
        if not isinstance(place, NamedSharding) or place.mesh.size == 1:
            return _outputs(self.params, network_input(images, self.rule), self.dtype)
        given, mesh = _checked(images), place.mesh
        full = np.resize(given, (-(-len(given) // mesh.size) * mesh.size, *given.shape[1:]))
        split = jax.device_put(full, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
        found = settled(_outputs(self.params, settled(network_input(split, self.rule)), self.dtype))
        return Outputs(*(values[: len(given)] for values in jax.device_get(found)))


@partial(jax.jit, static_argnames="dtype")
def _outputs(params: Params, x: Array, dtype: str) -> Outputs:
    return InceptionV3(dtype).apply({"params": params}, x)  # type: ignore[return-value]


# ---------------------------------------------------------------- the network's input


@dataclass(frozen=True)
class Rule:
    """A rule that turns an image into the network's input.

    Attributes:
      sources: (i [299], length L) -> s, the places of the output pixels among the input's.
      centre, unit: values become (x - centre) / unit.
    """

    sources: Callable[[NDArray[np.float64], int], NDArray[np.float64]]
    centre: float
    unit: float


RULES = {
    "pytorch_fid": Rule(lambda i, length: np.maximum((i + 0.5) * length / SIZE - 0.5, 0), 127.5, 127.5),
    "tensorflow": Rule(lambda i, length: i * length / SIZE, 128.0, 128.0),
}


def network_input(images: ArrayLike, rule: str) -> Array:
    """uint8 [n, h, w, 3 or 1] -> float32 [n, 299, 299, 3] by a rule of `RULES`.

    Raises:
      TypeError: images that are not uint8.
      ValueError: another shape, no pixels, or an unknown rule.
    """
    choose("input rule", rule, RULES)
    return _network_input(_checked(images), rule)


def _checked(images: ArrayLike) -> Array:
    """Images that the network takes, where they are."""
    images = images if isinstance(images, jax.Array) else np.asarray(images)
    _check_bytes(images)
    if images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"Images have shape {images.shape}; need [n, h, w, 3], or [n, h, w, 1] for grey ones.")
    return images


@partial(jax.jit, static_argnames="rule")
def _network_input(images: Array, rule: str) -> Array:
    rows, columns = (interpolation(length, rule) for length in images.shape[1:3])
    resized = jnp.einsum("ih,nhwc,jw->nijc", rows, images.astype(jnp.float32), columns, precision=lax.Precision.HIGHEST)
    scaled = (resized - RULES[rule].centre) / RULES[rule].unit
    return jnp.broadcast_to(scaled, (*scaled.shape[:3], 3))


@lru_cache(maxsize=64)
def interpolation(length: int, rule: str) -> NDArray[np.float32]:
    """[299, length]: the weights of an axis's pixels in each output pixel, at most two per row, with sum 1."""
    places = choose("input rule", rule, RULES).sources(np.arange(SIZE, dtype=np.float64), length)
    first = np.floor(places).astype(np.intp)
    share, row = places - first, np.arange(SIZE)
    weights = np.zeros((SIZE, length))
    np.add.at(weights, (row, first), 1 - share)
    np.add.at(weights, (row, np.minimum(first + 1, length - 1)), share)
    return weights.astype(np.float32)


def _check_bytes(images: Array) -> None:
    if images.dtype != np.uint8:
        raise TypeError(f"Images have dtype {images.dtype}; need uint8. Round them first, by a stated rule.")
    if images.ndim != 4:
        raise ValueError(f"Images have shape {images.shape}; need [n, height, width, channels].")
