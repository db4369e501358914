"""Npz: images and labels from the arrays of one NumPy file, such as MNIST's."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import numpy as np

from diffusion_distill.base import npz_file
from diffusion_distill.base.files import stand_in_of, user_path
from diffusion_distill.data.resize import check_resize, resize
from diffusion_distill.data.sources import ArraySource, from_arrays


def npz(
    path: str | Path,
    num_classes: int | None = None,
    *,
    images: str = "images",
    labels: str | None = "labels",
    size: int | None = None,
    crop: str = "center",
    resample: str = "area",
) -> ArraySource:
    """A source from an `.npz` file with the array `images` and, optionally, `labels` (pickles are refused).

    MNIST at 32x32, the digits unscaled on a larger black ground: `npz(path, size=32, crop="pad")`.

    Args:
        path: file whose `images` are [n, height, width, channels] or, for grey images, [n, height, width];
            values and labels as `from_arrays` takes them.
        num_classes: as `from_arrays`.
        images, labels: the arrays' names in the file; without an array `labels`, or with None, there are no labels.
        size, crop, resample: brings the images to [size, size] as `resize` does; None leaves them as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: not an `.npz` file, no such arrays in it, pickled objects, or as `from_arrays`.
    """
    path = user_path(path)
    check_resize(size, crop, resample)
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}. Give the path of an .npz file with an array `{images}`.")
    arrays = _read_npz(path, (images, labels))
    for name in (images, labels):
        if name not in arrays and name not in (None, "labels"):
            raise ValueError(
                f"{path} holds {sorted(arrays)}, but no array `{name}`. "
                f"Write it with `np.savez(path, {name}=...)`, or name one that is there."
            )
    pixels = arrays[images]
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if size is not None and pixels.ndim == 4:
        pixels = np.stack([resize(image, size, crop, resample) for image in pixels])
    return from_arrays(pixels, None if labels is None else arrays.get(labels), num_classes)


def _read_npz(path: Path, wanted: Container[str | None]) -> dict[str, np.ndarray]:
    """The wanted arrays of an .npz file; of any others only the names, with empty arrays."""
    try:
        return npz_file.read(path, wanted)
    except npz_file.UNREADABLE as error:
        raise ValueError(
            f"{path} is not an .npz file of plain arrays ({stand_in_of(path) or error}). "
            "Write it with `np.savez(path, images=...)`."
        ) from error
