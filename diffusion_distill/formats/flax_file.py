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
MAX_ENTRIES = 2**17  # of all maps, skipped ones aside; a large network with its optimizer has some thousand
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
        self.begin = self.entries = 0
        self.stream, self.offset = stream, 0
        self.items = self._unpacker()

    def _unpacker(self) -> msgpack.Unpacker:
        """Of what follows in the stream."""
        return msgpack.Unpacker(
            self.stream,
            read_size=max(1, min(self.size, READ_SIZE)),
            max_buffer_size=min(self.size + 1, MAX_ITEM),
            max_str_len=MAX_TEXT,
            max_bin_len=self.size,
            max_ext_len=self.size,
            max_array_len=0,
            max_map_len=self.size,
            ext_hook=_array,
        )

    def file(self) -> dict[str, Any]:
        """The map that makes up the whole file."""
        if not self._next_is(_MAP):
            raise WeightsError("a map was expected")
        tree = self._map(())
        self.begin = self.offset + self.items.tell()
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
            self.entries += 1
            if self.entries > MAX_ENTRIES:
                raise WeightsError(f"more than {MAX_ENTRIES} entries")
            wanted, is_map = self.want(self.location), self._next_is(_MAP)
            if not wanted:
                self.items.skip()
            else:
                entries[name] = self._map(self.location) if is_map else self._leaf()
        self.location = location
        return _joined(entries) if CHUNKED in entries else entries

    def _leaf(self) -> Any:
        """The next item, which is no map. A large array is read into its place: msgpack would hold it three times."""
        self.heads.seek(self.begin)
        head = self.heads.read(LARGE_HEAD)
        end = self.begin + 6 + int.from_bytes(head[1:5])
        if head[:1] != _LARGE or end < self.begin + READ_SIZE or end > self.size:
            return self.items.unpack()
        shape, dtype, first = _described(head[5], head[6:], end - self.begin - 6)
        space = _space(end - self.begin - 6 - first)
        self.heads.seek(self.begin + 6 + first)
        filled = 0
        while filled < len(space):
            filled += self.heads.readinto(memoryview(space)[filled:]) or _out_of_data()  # type: ignore[attr-defined]
        self.stream.seek(end)
        self.offset, self.items = end, self._unpacker()
        return space.view(dtype).reshape(shape)

    def _next_is(self, kind: frozenset[int]) -> bool:
        """Whether the next item has one of these first bytes; msgpack itself cannot look ahead."""
        self.begin = self.offset + self.items.tell()
        self.heads.seek(self.begin)
        head = self.heads.read(1)
        if not head:
            raise msgpack.OutOfData
        return head[0] in kind


# First bytes of maps and of texts (the msgpack specification, "Formats").
_MAP = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_TEXT = frozenset((*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB))


_LARGE = b"\xc9"  # an extension whose length has four bytes
LARGE_HEAD = 2**10  # bytes in which its shape and type are described


def _out_of_data() -> int:
    raise msgpack.OutOfData


def _described(code: int, begin: bytes, length: int) -> tuple[list[int], np.dtype, int]:
    """(shape, type, where the elements begin) of an extension of so many bytes, from its first ones."""
    if code not in EXTENSIONS:
        raise WeightsError(f"an extension of type {code}; only arrays ({EXTENSIONS[0]}, {EXTENSIONS[1]}) are read")
    parts = msgpack.Unpacker(max_array_len=MAX_DIMENSIONS, max_map_len=0, max_ext_len=0, max_str_len=MAX_TEXT)
    parts.feed(begin)
    count, shape, name = parts.read_array_header(), parts.unpack(), parts.unpack()
    first = parts.tell() + 5
    if count != 3 or type(shape) is not list or type(name) is not str or begin[first - 5 : first - 4] != b"\xc6":
        raise WeightsError("an array that is not (shape, dtype name, bytes)")
    if int.from_bytes(begin[first - 4 : first]) != length - first:
        raise WeightsError("an array whose bytes do not fill its item")
    return shape, _checked(shape, name, length - first), first


def _array(code: int, data: bytes) -> np.ndarray:
    """The array of an extension."""
    if code not in EXTENSIONS:
        raise WeightsError(f"an extension of type {code}; only arrays ({EXTENSIONS[0]}, {EXTENSIONS[1]}) are read")
    parts = msgpack.unpackb(data, max_array_len=MAX_DIMENSIONS, max_map_len=0, max_ext_len=0, max_str_len=MAX_TEXT)
    if type(parts) is not list or [type(part) for part in parts] != [list, str, bytes]:
        raise WeightsError("an array that is not (shape, dtype name, bytes)")
    shape, name, content = parts
    dtype = _checked(shape, name, len(content))
    space = _space(len(content))
    space[:] = np.frombuffer(content, np.uint8)
    return space.view(dtype).reshape(shape)


def _checked(shape: list[Any], name: str, given: int) -> np.dtype:
    """The type of an array of so many bytes."""
    if name not in DTYPES:
        raise WeightsError(f"an array of type {name!r}; read are {', '.join(DTYPES)}")
    needed = _size(shape) * DTYPES[name].itemsize
    if needed != given:
        raise WeightsError(f"an array of shape {tuple(shape)} and type {name} needs {needed} bytes, not {given}")
    return DTYPES[name]


def _space(size: int) -> np.ndarray:
    """Bytes [size] that begin at a multiple of 64, so that JAX on CPU uses them without copying them."""
    space = np.empty(size + 64, np.uint8)
    first = -space.ctypes.data % 64
    return space[first : first + size]


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
