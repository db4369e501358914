"""The bytes of a file, mapped into memory, and arrays of them that are not copied."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from diffusion_distill.base.errors import WeightsError


def mapped(path: Path) -> memoryview:
    """All bytes of a file, read-only; the file must not be changed while they are in use.

    Raises:
      OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        size = path.stat().st_size
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")


def elements(content: memoryview, dtype: np.dtype, count: int, begin: int) -> np.ndarray:
    """An array [count] of the bytes from `begin` on, read-only and not copied.

    Raises:
      WeightsError: the bytes are not there, or a boolean is neither 0 nor 1.
    """
    size = count * dtype.itemsize
    if not 0 <= begin <= begin + size <= len(content):
        raise WeightsError(f"{size} bytes from byte {begin} on are needed, but there are {len(content)} in all")
    if dtype == np.bool_ and (np.frombuffer(content, np.uint8, count, begin) > 1).any():
        raise WeightsError("a boolean that is neither 0 nor 1")
    return np.frombuffer(content, dtype, count, begin)
