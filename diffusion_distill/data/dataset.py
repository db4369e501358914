"""Dataset: any object of the user's with `len(dataset)` and `dataset[i]`: of Grain, PyTorch, Hugging Face, or a list.

An item is a mapping, a tuple or the sample alone. A sample is an array: of floats [*shape], channels last, in [-1, 1]
unless value_range says otherwise; or an image, uint8 [height, width, channels] or [height, width]; an image of Pillow;
or the bytes of an encoded file. Its condition is a label, one whole number, or any tree of arrays.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from diffusion_distill.base.errors import near_matches, positive_int
from diffusion_distill.base.typing import Cond
from diffusion_distill.data.decode import check_channels, decode, from_pillow
from diffusion_distill.data.lazy import MEMORY, Report, hold
from diffusion_distill.data.resize import check_resize, resize
from diffusion_distill.data.sources import Source, check_samples, range_of

#: Where a tuple has what a mapping has under these names, and what else mappings call it.
POSITIONS = {"x": 0, "cond": 1}
ALIASES = {"x": "image", "cond": "label"}


class RandomAccess(Protocol):
    """The interface that a data set must have."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def from_dataset(
    dataset: RandomAccess,
    size: int | None = None,
    *,
    x: str | int = "x",
    cond: str | int | None = "cond",
    num_classes: int | None = None,
    value_range: tuple[float, float] | str | None = "auto",
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
        size: brings every image to [size, size] as `resize` does; None: all samples have one shape already.
        x, cond: key in a mapping or position in a tuple; "x" and "cond" also mean "image" and "label", or 0 and 1 in
            tuples. If the first item has no condition, or with None, the set has none.
        num_classes: None takes the largest label plus one, if conditions are whole numbers and the set fits into
            memory; 0 for whole numbers that are no classes.
        value_range: as in `from_arrays`; None for values without bounds.
        crop, resample: see `resize`.
        channels: 1 or 3, for encoded images and Pillow's; None takes those of the first image (see `folder`).
        memory: bytes that the samples may take; a larger set is read on demand.
        threads: number of threads that read; with 1 the data set is never read by two threads at once.
        report: called with (samples done, number of samples) while a set is read into memory.
        identity: gives a text that changes when a sample does, for a set read on demand: what is remembered about its
            samples, such as their features, is then found again.

    Raises:
        TypeError, ValueError: an item that is not as above; the message names its index and what to do.
    """
    check_resize(size, crop, resample)
    check_channels(channels)
    if num_classes:
        positive_int("num_classes", num_classes)
    if not len(dataset):
        raise ValueError("The data set is empty. Give one with at least one image.")
    resized = None if size is None else partial(resize, size=size, crop=crop, resample=resample)
    lock = threading.Lock() if threads == 1 else contextlib.nullcontext()
    items = _Items(dataset, lock, x, cond, num_classes, value_range, channels, resized)
    return hold(
        items, len(dataset), items.like, items.labelled, num_classes, threads=threads, memory=memory, report=report,
        identity=identity, value_range=value_range,
    )  # fmt: skip


class _Items:
    """The items of a data set as samples and conditions; each is checked against item 0."""

    def __init__(
        self,
        dataset: RandomAccess,
        lock: contextlib.AbstractContextManager[Any],
        x: str | int,
        cond: str | int | None,
        num_classes: int | None,
        value_range: tuple[float, float] | str | None,
        channels: int | None,
        resized: Callable[[np.ndarray], np.ndarray] | None,
    ):
        """Reads item 0; `resized` brings an image to the size asked for."""
        self._dataset, self._lock, self._x, self._cond = dataset, lock, x, cond
        self._num_classes, self._value_range, self._resized = num_classes, value_range, resized
        item = self._read(0)
        if cond == "cond" and _lacks(item, cond):
            self._cond = None
        self._first = _sample(_part(item, x, "Item 0"), "Item 0", channels, value_range)
        self._channels = channels or (3 if self._first.shape[-1] == 3 else None)
        self.like = self._first if resized is None else resized(self._first)
        self._example = None if self._cond is None else _part(item, self._cond, "Item 0")
        whole = num_classes is not None or _is_label(self._example)
        self.labelled = self._cond is not None and num_classes != 0 and whole
        self._condition(item, "Item 0")

    def __call__(self, index: int) -> tuple[np.ndarray, Cond | None]:
        """The sample and the condition of an item."""
        item, where, first = self._read(index), f"Item {index}", self._first
        found = _sample(_part(item, self._x, where), where, self._channels, self._value_range)
        if (found.dtype, found.shape[-1]) != (first.dtype, first.shape[-1]):
            raise ValueError(
                f"{where} has {found.shape[-1]} channels of {found.dtype}, but item 0 has {first.shape[-1]} of "
                f"{first.dtype}. Convert the items to one kind; for encoded images and Pillow's pass channels=3 or 1."
            )
        if self._resized is not None:
            found = self._resized(found)
        elif found.shape != self.like.shape:
            raise ValueError(
                f"{where} has shape {found.shape}, but item 0 has {self.like.shape}. "
                "Pass size=... to bring all images to one size."
            )
        return found, self._condition(item, where)

    def _read(self, index: int) -> Any:
        with self._lock:
            return self._dataset[index]

    def _condition(self, item: Any, where: str) -> Cond | None:
        if self._cond is None:
            return None
        part = _part(item, self._cond, where)
        return _label(part, where, self._num_classes) if self.labelled else _condition(part, self._example, where)


def _part(item: Any, key: str | int, where: str) -> Any:
    """The sample or the condition of an item.

    Raises:
      ValueError: the item has no such key; the message lists the keys that it has.
    """
    if isinstance(item, Mapping):
        names = (key, ALIASES.get(key)) if isinstance(key, str) else (key,)
        for name in names:
            if name in item:
                return item[name]
        raise ValueError(f"{where} has no {key!r}.{near_matches(str(key), map(str, item))} It has {list(item)}.")
    position = POSITIONS.get(key) if isinstance(key, str) else key
    if position is None:
        raise ValueError(f"{where} is a {type(item).__name__}, which has no {key!r}. Give a position, such as x=0.")
    if isinstance(item, (tuple, list)):
        if -len(item) <= position < len(item):
            return item[position]
        raise ValueError(f"{where} has {len(item)} parts, no number {position}. Give another position.")
    if position == 0:
        return item  # the sample alone
    raise ValueError(f"{where} is a {type(item).__name__} alone, without a condition. Pass cond=None.")


def _lacks(item: Any, key: str | int) -> bool:
    try:
        _part(item, key, "")
    except ValueError:
        return True
    return False


def _sample(value: Any, where: str, channels: int | None, value_range: tuple[float, float] | str | None) -> np.ndarray:
    """An item's sample as uint8 [height, width, channels] or float32 [*shape]."""
    if isinstance(value, bytes):
        return decode(value, where, channels)
    if hasattr(value, "convert") and hasattr(value, "mode"):
        return from_pillow(value, where, channels)
    x = np.asarray(value)
    if x.ndim == 2 and x.dtype == np.uint8:
        x = x[..., None]
    if value_range is not None and x.ndim == 3 and x.shape[0] in (1, 3, 4) and x.shape[2] > 4:
        raise ValueError(
            f"{where} has an image of shape {x.shape}, which looks like [channels, height, width]. "
            "Need [height, width, channels]: use `image.transpose(1, 2, 0)`."
        )
    if x.dtype != np.uint8 and (np.issubdtype(x.dtype, np.floating) or x.dtype.name == "bfloat16"):
        x = x.astype(np.float32)
    try:
        check_samples(x[None], range_of(x.dtype) if value_range == "auto" else value_range)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
    return x


def _is_label(value: Any) -> bool:
    """Whether a condition is one whole number."""
    if not jax.tree_util.all_leaves([value]):
        return False
    found = np.asarray(value)
    return found.ndim == 0 and np.issubdtype(found.dtype, np.integer)


def _label(value: Any, where: str, num_classes: int | None) -> int:
    label = np.asarray(value)
    if label.ndim or not np.issubdtype(label.dtype, np.integer):
        raise TypeError(f"{where} has the label {value!r}; need one whole number. Pass cond=None to do without.")
    if label < 0 or (num_classes is not None and label >= num_classes):
        allowed = f"0..{num_classes - 1}" if num_classes is not None else "at least 0"
        raise ValueError(f"{where} has the label {label}; need {allowed}. Renumber the labels or raise num_classes.")
    return int(label)


def _condition(value: Any, like: Any, where: str) -> Cond:
    """An item's condition as arrays, if it is like that of item 0."""
    found, wanted = (jax.tree.map(np.asarray, tree) for tree in (value, like))
    shapes = [[(a.shape, a.dtype.kind) for a in jax.tree.leaves(tree)] for tree in (found, wanted)]
    if jax.tree.structure(found) != jax.tree.structure(wanted) or shapes[0] != shapes[1]:
        raise ValueError(f"{where} has a condition of arrays {shapes[0]}, but item 0 has {shapes[1]}.")
    if any(kind not in "fiub" for _, kind in shapes[0]):
        raise TypeError(f"{where} has the condition {value!r}; need numbers. Embed texts first, or pass cond=None.")
    return found
