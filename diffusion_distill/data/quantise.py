"""Quantisation: images in [-1, 1] to the 256 grey levels, by the rules that published programs use.

    round_half_up      floor(127.5 x + 128)               EDM, StyleGAN; the default of an evaluation
    round_half_even    round(127.5 (x + 1))               TRACT; pictures
    truncate           floor(127.5 (x + 1))               OpenAI's sampling script
    truncate_unit      floor(255 (x + 1) / 2)             score_sde, consistency models on CIFAR-10

The result is clipped to 0..255. The first two rules differ only half way between two levels. The truncating rules make
images half a level darker on average. In float32 they even lower a third of the 256 levels by one when an image made
from such levels, x = k / 127.5 - 1, is converted back. They are here to reproduce published numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from diffusion_distill.base.arrays import Array, namespace, to_byte_range
from diffusion_distill.base.errors import choose


def quantise(images: Array, rule: str = "round_half_up") -> Array:
    """Converts images in [-1, 1], of any shape, to 8 bits; values outside the range are clipped.

    Args:
        images: floats, computed in their own precision (the published programs use float32), or uint8, which are
            returned unchanged. JAX arrays stay on their device.
        rule: one of `RULES`.

    Raises:
        TypeError: images that are neither floats nor uint8.
        ValueError: an unknown rule, or NaN in the images (not detected in traced arrays).
    """
    levels = choose("rule of quantisation", rule, RULES)
    xp = namespace(images)
    if xp is np:
        images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    if not xp.issubdtype(images.dtype, xp.floating):
        raise TypeError(f"Images have dtype {images.dtype}; need floats in [-1, 1], or uint8.")
    if xp is np and np.isnan(images).any():
        raise ValueError("Images hold NaN, which is no grey level. Find out which step made them.")
    return xp.clip(levels(images), 0, 255).astype(np.uint8)


def _round_half_up(images: Array) -> Array:
    # Not to_byte_range + 0.5: in float32 that rounds twice and moves values that sit on a tie.
    return namespace(images).floor(127.5 * images + 128)


def _round_half_even(images: Array) -> Array:
    return namespace(images).rint(to_byte_range(images))


def _truncate(images: Array) -> Array:
    return namespace(images).floor(to_byte_range(images))


def _truncate_unit(images: Array) -> Array:
    return namespace(images).floor(255 * ((images + 1) / 2))


#: name -> function from images in [-1, 1] to whole levels, not clipped.
RULES: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "round_half_up": _round_half_up,
        "round_half_even": _round_half_even,
        "truncate": _truncate,
        "truncate_unit": _truncate_unit,
    }
)
