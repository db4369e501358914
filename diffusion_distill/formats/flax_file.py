"""Flax msgpack files, read item by item without trusting them.

The layout of `flax.serialization`: nested maps with text as keys; at the leaves nil, numbers, text, or arrays.
An array is an extension (1: array, 3: NumPy scalar) that holds, again in msgpack, (shape, dtype name, bytes). One
of more than 1 GiB is a map {"__msgpack_chunked_array__": true, "shape": {"0": ...}, "chunks": {"0": ...}}.

The file is read once, from start to end. Entries that are not wanted are skipped, and arrays share memory with the
bytes that were read, so the peak is the size of the wanted entries plus a few times the largest item. A length that
reaches beyond the file is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import msgpack
import numpy as np

from diffusion_distill.base.errors import WeightsError
from diffusion_distill.base.files import stand_in_of, user_path

Location = tuple[str, ...]

EXTENSIONS = (1, 3)  # an array, a NumPy scalar
WHOLE = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64", "bool", *WHOLE)}
DTYPES["bfloat16"] = np.dtype(jnp.bfloat16)
CHUNKED = "__msgpack_chunked_array__"
MAX_DEPTH = 32  # of maps
MAX_DIMENSIONS = 32
MAX_TEXT = 4096  # bytes of a name or another text
READ_SIZE = 2**20
MAX_ITEM = 2**31 - 1  # of msgpack itself


def read(path: str | Path, want: Callable[[Location], bool] = lambda location: True) -> dict[str, Any]:
    """The nested dictionaries of a flax msgpack file.

    Args:
      want: called with the location of each entry, for example ("ema_params", "conv_in", "kernel"), returns whether
        to read it; otherwise the entry is skipped with everything in it. It may raise WeightsError.

    Returns:
      Dictionaries with read-only NumPy arrays, numbers, text or None at the leaves.

    Raises:
      WeightsError: the file is truncated, damaged or of another format; the error says where.
      OSError: it cannot be opened.
    """
    path = user_path(path)
    with open(path, "rb") as stream, open(path, "rb", buffering=0) as heads:
        walk = _Walk(stream, heads, path.stat().st_size, want)
        try:
            return walk.file()
        except (msgpack.OutOfData, msgpack.BufferFull):
            reason = f"the file ends in the middle of it, after {walk.size} bytes"
        except (msgpack.UnpackException, ValueError) as error:
            reason = str(error) or type(error).__name__
        where = "/".join(walk.location) or "its first item"
        found = stand_in_of(path)
        reason = f"it is {found}" if found else f"{where}, at byte {walk.begin}: {reason}"
        raise WeightsError(f"{path} cannot be read as a flax checkpoint: {reason}.")


class _Walk:
    """One pass over a file; `location` is the current entry, `begin` the byte where its newest item begins."""

    def __init__(self, stream: BinaryIO, heads: BinaryIO, size: int, want: Callable[[Location], bool]) -> None:
        self.size, self.want, self.heads = size, want, heads
        self.location: Location = ()
        self.begin = 0
        self.items = msgpack.Unpacker(
            stream,
            read_size=max(1, min(size, READ_SIZE)),
            max_buffer_size=min(size + 1, MAX_ITEM),
            max_str_len=MAX_TEXT,
            max_bin_len=size,
            max_ext_len=size,
            max_array_len=0,
            max_map_len=size,
            ext_hook=_array,
        )

    def file(self) -> dict[str, Any]:
        """The map that makes up the whole file."""
        if not self._next_is(_MAP):
            raise WeightsError("a map was expected")
        tree = self._map(())
        self.begin = self.items.tell()
        if self.begin != self.size:
            raise WeightsError(f"{self.size - self.begin} bytes follow the end of the map")
        return tree

    def _map(self, location: Location) -> Any:
        if len(location) > MAX_DEPTH:
            raise WeightsError(f"more than {MAX_DEPTH} maps in each other")
        entries: dict[str, Any] = {}
        names = set()
        for _ in range(self.items.read_map_header()):
            self.location = location
            if not self._next_is(_TEXT):
                raise WeightsError("a name that is no text")
            name = self.items.unpack()
            self.location = (*location, name)
            if name in names:
                raise WeightsError("the name stands twice")
            names.add(name)
            wanted, is_map = self.want(self.location), self._next_is(_MAP)
            if not wanted:
                self.items.skip()
            else:
                entries[name] = self._map(self.location) if is_map else self.items.unpack()
        self.location = location
        return _joined(entries) if CHUNKED in entries else entries

    def _next_is(self, kind: frozenset[int]) -> bool:
        """Whether the next item has one of these first bytes; msgpack itself cannot look ahead."""
        self.begin = self.items.tell()
        self.heads.seek(self.begin)
        head = self.heads.read(1)
        if not head:
            raise msgpack.OutOfData
        return head[0] in kind


# First bytes of maps and of texts (the msgpack specification, "Formats").
_MAP = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_TEXT = frozenset((*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB))


def _array(code: int, data: bytes) -> np.ndarray:
    """The array of an extension."""
    if code not in EXTENSIONS:
        raise WeightsError(f"an extension of type {code}; only arrays ({EXTENSIONS[0]}, {EXTENSIONS[1]}) are read")
    parts = msgpack.unpackb(data, max_array_len=MAX_DIMENSIONS, max_map_len=0, max_ext_len=0, max_str_len=MAX_TEXT)
    if type(parts) is not list or [type(part) for part in parts] != [list, str, bytes]:
        raise WeightsError("an array that is not (shape, dtype name, bytes)")
    shape, name, content = parts
    if name not in DTYPES:
        raise WeightsError(f"an array of type {name!r}; read are {', '.join(DTYPES)}")
    needed = _size(shape) * DTYPES[name].itemsize
    if needed != len(content):
        raise WeightsError(f"an array of shape {tuple(shape)} and type {name} needs {needed} bytes, not {len(content)}")
    return _aligned(content).view(DTYPES[name]).reshape(shape)


def _aligned(content: bytes) -> np.ndarray:
    """A copy [bytes] of uint8 that begins at a multiple of 64, so that JAX on CPU uses it without copying again."""
    space = np.empty(len(content) + 64, np.uint8)
    first = -space.ctypes.data % 64
    place = space[first : first + len(content)]
    place[:] = np.frombuffer(content, np.uint8)
    return place


def _joined(entries: dict[str, Any]) -> np.ndarray:
    """An array that was stored in pieces."""
    shape, chunks = (_sequence(entries.get(part)) for part in ("shape", "chunks"))
    if set(entries) != {CHUNKED, "shape", "chunks"} or not chunks:
        raise WeightsError("an array in pieces that is not {shape, chunks}")
    if not all(isinstance(chunk, np.ndarray) and chunk.ndim == 1 for chunk in chunks):
        raise WeightsError("an array in pieces that are not all one-dimensional arrays")
    if len({chunk.dtype for chunk in chunks}) > 1 or sum(chunk.size for chunk in chunks) != _size(shape):
        raise WeightsError(f"an array in pieces that do not make up the shape {tuple(shape)}")
    return np.concatenate(chunks).reshape(shape)


def _sequence(numbered: Any) -> list[Any]:
    """The values of {"0": ..., "1": ..., ...} in order."""
    if not isinstance(numbered, dict) or set(numbered) != {str(k) for k in range(len(numbered))}:
        raise WeightsError("an array in pieces whose parts are not numbered")
    return [numbered[str(k)] for k in range(len(numbered))]


def _size(shape: list[Any]) -> int:
    """Number of elements of a shape, or an error."""
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise WeightsError(f"an array of shape {str(shape)[:80]}")
    return math.prod(shape)
