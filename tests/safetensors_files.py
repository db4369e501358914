"""Writes safetensors files by hand, so that they can break each of the format's rules."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def header_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The description of arrays that follow each other."""
    header, at = {}, 0
    for name, array in arrays.items():
        offsets = [at, at := at + array.nbytes]
        header[name] = {"dtype": NAMES[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
    return header


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A file; the header may be bytes, and its length a lie."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """A good file."""
    path.write_bytes(joined(header_of(arrays), b"".join(array.tobytes() for array in arrays.values())))
    return path
