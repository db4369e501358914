"""Decode: an encoded image, or one of Pillow's, as 8-bit array [height, width, channels].

| the file's colours                    | channels by itself | asked for 1     | asked for 3     |
|---------------------------------------|--------------------|-----------------|-----------------|
| black and white, grey, grey and alpha | 1                  | as it is        | repeated        |
| RGB, RGBA, palette, CMYK, YCbCr, ...  | 3                  | luma (BT.601)   | RGB             |
| 16 or 32 bits of grey                 | refused: Pillow would cut the values off at 255          |

Alpha is dropped: the colours stay as stored and are not blended with any ground. An animation gives its first
frame. Turns that a camera noted (EXIF) are ignored, as TensorFlow's decoder ignores them.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion_distill.base.files import stand_in

GREY_MODES = ("1", "L", "LA", "La")
WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def decode(data: bytes, name: str, channels: int | None = None) -> NDArray[np.uint8]:
    """An encoded image (JPEG, PNG, ...: what Pillow reads) as [height, width, channels].

    Args:
        name: its name in error messages.
        channels: 1 or 3; None: as the table above says.

    Raises:
        ValueError: not an image, damaged, truncated, implausibly large, or more than 8 bits per value.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        limit = Image.MAX_IMAGE_PIXELS
        if limit is None or image.width * image.height <= limit:
            image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(_bomb(name, str(error))) from error
    except Exception as error:  # damaged files make Pillow's readers raise nearly anything
        unknown = isinstance(error, UnidentifiedImageError)  # whose message shows an address in memory
        reason = stand_in(data) or ("no format of images that Pillow knows" if unknown else str(error))
        raise ValueError(
            f"{name} cannot be read as an image ({reason}). It may be damaged or cut short: replace or remove it."
        ) from error
    if limit is not None and image.width * image.height > limit:  # Pillow itself only warns up to twice the limit
        raise ValueError(_bomb(name, f"{image.width} x {image.height} pixels, allowed are {limit}"))
    return from_pillow(image, name, channels)


def from_pillow(image: Any, name: str, channels: int | None = None) -> NDArray[np.uint8]:
    """A Pillow image as [height, width, channels]; arguments and errors as `decode`."""
    if image.mode in WIDE_MODES:
        raise ValueError(
            f"{name} has more than 8 bits per value (Pillow's mode {image.mode}). "
            "Scale it to 8 bits, or load the images yourself and pass floats in [-1, 1] to `from_arrays`."
        )
    if channels is None:
        channels = 1 if image.mode in GREY_MODES else 3
    mode = "L" if channels == 1 else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], channels)


def check_channels(channels: int | None) -> None:
    """Raises ValueError unless channels is 1, 3 or None."""
    if channels not in (None, 1, 3):
        raise ValueError(f"channels is {channels!r}; allowed are 1 (grey), 3 (RGB) and None (as the first image).")


def _bomb(name: str, reason: str) -> str:
    return (
        f"{name} claims to be larger than any usual image ({reason}). Remove it, or raise `PIL.Image.MAX_IMAGE_PIXELS`."
    )
