"""Resize: images of any size as squares of one size, as the papers' pipelines do it.

First a square (`CROPS`), then its size (`RESAMPLES`). BTD takes the central square, then `area` for ImageNet 64
and antialiased `bilinear` for LSUN. With scale = old / new, output pixel i of one axis is

    area       the mean over [i·scale, (i + 1)·scale), a pixel that is partly inside counting in part
    bilinear   a triangle of half-width max(scale, 1) around (i + 1/2)·scale, normalised
    lanczos    as bilinear, but with Lanczos' window of three lobes

Pillow's box filter is not `area`: it counts a pixel fully or not at all, and at 375 → 64 differs by up to 22 of
255 levels. Values of 8-bit images are rounded, where BTD's pipeline keeps the fractions.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from diffusion_distill.base.errors import choose, positive_int


def resize(image: np.ndarray, size: int, crop: str = "center", resample: str = "area") -> np.ndarray:
    """An image [height, width, channels] (uint8, or float32 in [-1, 1]) as [size, size, channels] of the same type.

    Args:
        crop: 'center' cuts out the central square; 'pad' adds black to all sides until the image is a square of
            at least `size`, so that a smaller one is not scaled; 'stretch' scales both axes as they are.
        resample: 'area', 'bilinear' or 'lanczos'; not used where the square already has the size.

    Raises:
        ValueError: unknown names, or a size below 1.
    """
    check_resize(size, crop, resample)
    square = CROPS[crop](image, size)
    if square.shape[:2] == (size, size):
        return square
    low, high = (0, 255) if image.dtype == np.uint8 else (-1, 1)
    resized = np.clip(RESAMPLES[resample](square, size), low, high)
    return (np.rint(resized) if image.dtype == np.uint8 else resized).astype(image.dtype)


def check_resize(size: int | None, crop: str, resample: str) -> None:
    """Raises ValueError where `resize` would; a size of None stands for images left as they are."""
    choose("crop", crop, CROPS)
    choose("resampling", resample, RESAMPLES)
    if size is not None:
        positive_int("size", size)


def _center(image: np.ndarray, size: int) -> np.ndarray:
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def _pad(image: np.ndarray, size: int) -> np.ndarray:
    height, width, channels = image.shape
    side = max(height, width, size)
    black = 0 if image.dtype == np.uint8 else -1
    square = np.full((side, side, channels), black, image.dtype)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _area(image: np.ndarray, size: int) -> NDArray[np.float32]:
    rows = _means(image, size)
    return _means(rows.swapaxes(0, 1), size).swapaxes(0, 1)


def _means(image: np.ndarray, size: int) -> NDArray[np.float32]:
    """[length, width, channels] -> [size, width, channels]. No matrix product: BLAS has threads of its own."""
    means = np.zeros((size, *image.shape[1:]), np.float32)
    for pixel, share in zip(*_spans(len(image), size), strict=True):
        means += share[:, None, None] * image[pixel]
    return means


@lru_cache(maxsize=256)  # a set of photographs has many sizes
def _spans(length: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """[k, size] each: the k pixels that an output pixel's span touches, and each one's share of the mean."""
    ends = np.arange(size + 1) * length / size
    pixels = np.floor(ends[:-1]) + np.arange(np.ceil(length / size) + 1)[:, None]
    inside = np.minimum(ends[1:], pixels + 1) - np.maximum(ends[:-1], pixels)
    shares = np.clip(inside, 0, None) * size / length
    return np.minimum(pixels, length - 1).astype(np.intp), shares.astype(np.float32)


def _pillow(image: np.ndarray, size: int, name: str) -> np.ndarray:
    from PIL import Image

    def resized(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((size, size), Image.Resampling[name]))

    if image.dtype == np.uint8 and image.shape[2] == 3:
        return resized(image)  # twice as fast as plane by plane
    return np.stack([resized(plane) for plane in np.moveaxis(image, -1, 0)], axis=-1)


CROPS = {"center": _center, "pad": _pad, "stretch": lambda image, size: image}

RESAMPLES = {
    "area": _area,
    "bilinear": lambda image, size: _pillow(image, size, "BILINEAR"),
    "lanczos": lambda image, size: _pillow(image, size, "LANCZOS"),
}
