"""Dataset: any object of the user's with `len(dataset)` and `dataset[i]`: of Grain, PyTorch, Hugging Face, or a list.

An item is a mapping, a tuple or the image alone. An image is an array [height, width, channels] or [height,
width], uint8 or floating point in [-1, 1]; an image of Pillow; or the bytes of an encoded file.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from diffusion_distill.base.errors import near_matches, positive_int
from diffusion_distill.data.decode import check_channels, decode, from_pillow
from diffusion_distill.data.lazy import MEMORY, Report, hold
from diffusion_distill.data.resize import check_resize, resize
from diffusion_distill.data.sources import Source, check_images, range_of

#: Where a tuple has what a mapping has under these names.
POSITIONS = {"image": 0, "label": 1}


class RandomAccess(Protocol):
    """The interface that a data set must have."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def from_dataset(
    dataset: RandomAccess,
    size: int | None = None,
    *,
    image: str | int = "image",
    label: str | int | None = "label",
    num_classes: int | None = None,
    crop: str = "center",
    resample: str = "area",
    channels: int | None = None,
    memory: int = MEMORY,
    threads: int = 1,
    report: Report | None = None,
    identity: Callable[[], str] | None = None,
) -> Source:
    """A source of a random-access data set; every item is checked when it is read.

    Args:
        dataset: item i must be the same whenever it is read.
        size: brings every image to [size, size] as `resize` does; None: all images have one size already.
        image, label: key in a mapping or position in a tuple; for tuples "image" means 0 and "label" 1. If the first
            item has no label, or with None, the set has no labels.
        num_classes: None takes the largest label plus one, if the set fits into memory.
        crop, resample: see `resize`.
        channels: 1 or 3, for encoded images and Pillow's; None takes those of the first image (see `folder`).
        memory: bytes that the images may take; a larger set is read on demand.
        threads: number of threads that read; with 1 the data set is never read by two threads at once.
        report: called with (images done, number of images) while a set is read into memory.
        identity: gives a text that changes when an image does, for a set read on demand: what is remembered about its
            images, such as their features, is then found again.

    Raises:
        TypeError, ValueError: an item that is not as above; the message names its index and what to do.
    """
    check_resize(size, crop, resample)
    check_channels(channels)
    if num_classes is not None:
        positive_int("num_classes", num_classes)
    count = len(dataset)
    if not count:
        raise ValueError("The data set is empty. Give one with at least one image.")
    one_at_a_time = threading.Lock() if threads == 1 else contextlib.nullcontext()

    def read(index: int) -> Any:
        with one_at_a_time:
            return dataset[index]

    def pixels(item: Any, where: str, channels: int | None) -> np.ndarray:
        return _image(_part(item, image, where), where, channels)

    item = read(0)
    first = pixels(item, "Item 0", channels)
    like = first if size is None else resize(first, size, crop, resample)
    labelled = label is not None and not (label == "label" and _lacks(item, label))

    def make(index: int) -> tuple[np.ndarray, int | None]:
        item, where = read(index), f"Item {index}"
        found = pixels(item, where, channels or (3 if first.shape[2] == 3 else None))
        if (found.dtype, found.shape[2]) != (first.dtype, first.shape[2]):
            raise ValueError(
                f"{where} has {found.shape[2]} channels of {found.dtype}, but item 0 has {first.shape[2]} of "
                f"{first.dtype}. Convert the items to one kind; for encoded images and Pillow's pass channels=3 or 1."
            )
        if size is not None:
            found = resize(found, size, crop, resample)
        elif found.shape != like.shape:
            raise ValueError(
                f"{where} has shape {found.shape}, but item 0 has {like.shape}. "
                "Pass size=... to bring all images to one size."
            )
        return found, _label(_part(item, label, where), where, num_classes) if label is not None and labelled else None

    return hold(
        make, count, like, labelled, num_classes, threads=threads, memory=memory, report=report, identity=identity
    )


def _part(item: Any, key: str | int, where: str) -> Any:
    """The image or label of an item.

    Raises:
      ValueError: the item has no such key; the message lists the keys that it has.
    """
    if isinstance(item, Mapping):
        if key in item:
            return item[key]
        raise ValueError(f"{where} has no {key!r}.{near_matches(str(key), map(str, item))} It has {list(item)}.")
    position = POSITIONS.get(key) if isinstance(key, str) else key
    if position is None:
        raise ValueError(f"{where} is a {type(item).__name__}, which has no {key!r}. Give a position, such as image=0.")
    if isinstance(item, (tuple, list)):
        if -len(item) <= position < len(item):
            return item[position]
        raise ValueError(f"{where} has {len(item)} parts, no number {position}. Give another position.")
    if position == 0:
        return item  # the image alone
    raise ValueError(f"{where} is a {type(item).__name__} alone, without labels. Pass label=None.")


def _lacks(item: Any, key: str | int) -> bool:
    try:
        _part(item, key, "")
    except ValueError:
        return True
    return False


def _image(value: Any, where: str, channels: int | None) -> np.ndarray:
    """An item's image as uint8 or float32 [height, width, channels]."""
    if isinstance(value, bytes):
        return decode(value, where, channels)
    if hasattr(value, "convert") and hasattr(value, "mode"):
        return from_pillow(value, where, channels)
    image = np.asarray(value)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3:
        raise ValueError(
            f"{where} has an image of shape {image.shape}; need [height, width, channels] or [height, width]."
        )
    if image.shape[0] in (1, 3, 4) and image.shape[2] > 4:
        raise ValueError(
            f"{where} has an image of shape {image.shape}, which looks like [channels, height, width]. "
            "Need [height, width, channels]: use `image.transpose(1, 2, 0)`."
        )
    if image.dtype != np.uint8 and (np.issubdtype(image.dtype, np.floating) or image.dtype.name == "bfloat16"):
        image = image.astype(np.float32)
    try:
        check_images(image[None], range_of(image.dtype))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
    return image


def _label(value: Any, where: str, num_classes: int | None) -> int:
    label = np.asarray(value)
    if label.ndim or not np.issubdtype(label.dtype, np.integer):
        raise TypeError(f"{where} has the label {value!r}; need one whole number. Pass label=None to do without.")
    if label < 0 or (num_classes is not None and label >= num_classes):
        allowed = f"0..{num_classes - 1}" if num_classes is not None else "at least 0"
        raise ValueError(f"{where} has the label {label}; need {allowed}. Renumber the labels or raise num_classes.")
    return int(label)
