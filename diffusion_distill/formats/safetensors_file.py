"""Safetensors files, read with all of the format's rules checked.

    8 bytes      the length n of the header, a whole number, little-endian
    n bytes      the header, a JSON object, spaces at its end; its first byte is "{"
    the rest     the elements of all tensors, row-major and little-endian, one tensor after another without holes

The header is {name: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}}, with offsets from the end of the
header, and may have {"__metadata__": {text: text}}. Arrays are read-only views of the memory-mapped file, which must
not be changed while they are in use.

The package `safetensors` reads such files too, but takes one of two tensors of the same name, and must be installed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.errors import WeightsError
from diffusion_distill.base.files import stand_in, user_path
from diffusion_distill.base.whole import whole
from diffusion_distill.formats import strict_json
from diffusion_distill.formats.mapped import elements, mapped

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
LENGTH = 8  # bytes of the header's length
METADATA = "__metadata__"
MAX_HEADER = 2**21  # bytes; a network of a thousand tensors has some hundred thousand
MAX_TENSORS = 2**14
MAX_DIMENSIONS = 8


def is_safetensors(content: bytes) -> bool:
    """Whether a file with these first bytes, at least 9, may be of this format."""
    return content[LENGTH : LENGTH + 1] == b"{"


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name, in the order of its header.

    Raises:
      WeightsError: the file breaks a rule of the format, or exceeds a limit; the message says what and where.
      OSError: it cannot be opened.
    """
    return read_with_metadata(path)[0]


def read_with_metadata(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The same, and the texts in the file's metadata, by name."""
    path = user_path(path)
    content = mapped(path)
    try:
        header, begin = _header(content)
        metadata = header.pop(METADATA, {})
        if type(metadata) is not dict or not all(type(text) is str for text in metadata.values()):
            raise WeightsError(f"{METADATA} is not a dictionary of texts")
        if len(header) > MAX_TENSORS:
            raise WeightsError(f"there are {len(header)} tensors; at most {MAX_TENSORS} are read")
        entries = {name: _entry(name, described) for name, described in header.items()}
        _check_tiling(entries, len(content) - begin)
        return {name: _array(content, begin, name, entry) for name, entry in entries.items()}, metadata
    except WeightsError as error:
        raise WeightsError(f"{path} is damaged or no safetensors file: {error}.") from error


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a file; an interrupted write leaves none.

    Raises:
      ImportError: safetensors is not installed.
      WeightsError: safetensors does not know the type of a tensor.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError("This needs safetensors: `pip install safetensors` (the extra [export]).") from error
    arrays = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in tensors.items()}
    try:
        with whole(path) as half:
            save_file(arrays, half, dict(metadata))
    except SafetensorError as error:
        raise WeightsError(f"{path} cannot be written: {error}") from error


class _Entry(NamedTuple):
    """A tensor as the header describes it; `begin` and `end` count from the end of the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _header(content: memoryview) -> tuple[dict[str, Any], int]:
    """The header, and the byte after it."""
    found = stand_in(bytes(content[:200]))
    if len(content) < LENGTH + 2 or not is_safetensors(bytes(content[: LENGTH + 1])):
        raise WeightsError(f"it is {found}" if found else 'there is no JSON, which begins with "{", at byte 8')
    length = struct.unpack_from("<Q", content)[0]
    if length > len(content) - LENGTH:
        raise WeightsError(f"a header of {length} bytes is announced, but only {len(content) - LENGTH} follow")
    return strict_json.loads(content[LENGTH : LENGTH + length], MAX_HEADER), LENGTH + length


def _entry(name: str, described: Any) -> _Entry:
    """The description of a tensor, checked for itself."""
    if type(described) is not dict or described.keys() != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{name[:80]!r} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = (described[key] for key in ("dtype", "shape", "data_offsets"))
    if type(dtype) is not str or dtype not in DTYPES:
        raise WeightsError(f"{name[:80]!r} is of type {str(dtype)[:40]!r}; read are {', '.join(DTYPES)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if type(numbers) is not list or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise WeightsError(f"{name[:80]!r}: {what} {str(numbers)[:80]} is no list of whole numbers from 0 on")
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise WeightsError(f"{name[:80]!r} has {len(shape)} dimensions or {len(offsets)} offsets")
    if math.prod(max(n, 1) for n in shape) >= 2**48:  # also of an empty one: NumPy does not make it
        raise WeightsError(f"{name[:80]!r} of shape {str(shape)[:80]} is too large")
    needed, given = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if needed != given:
        said = f"of type {dtype} and shape {str(shape)[:80]}"
        raise WeightsError(f"{name[:80]!r} {said} needs {needed} bytes, not {given}")
    return _Entry(DTYPES[dtype], tuple(shape), *offsets)


def _check_tiling(entries: dict[str, _Entry], size: int) -> None:
    """Raises WeightsError unless the tensors fill the bytes behind the header, each byte once."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != at:
            what = "overlaps another tensor" if entry.begin < at else "follows a hole"
            raise WeightsError(f"{name[:80]!r} begins at byte {entry.begin} of the data instead of {at}: it {what}")
        at = entry.end
    if at != size:
        raise WeightsError(f"the tensors take {at} bytes, but {size} follow the header")


def _array(content: memoryview, begin: int, name: str, entry: _Entry) -> np.ndarray:
    try:
        return elements(content, entry.dtype, math.prod(entry.shape), begin + entry.begin).reshape(entry.shape)
    except WeightsError as error:
        raise WeightsError(f"{name[:80]!r}: {error}") from error
