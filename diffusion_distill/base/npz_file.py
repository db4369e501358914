"""NumPy's .npz and .npy files, read without trusting what their headers announce.

An .npz is a zip, stored or compressed, with an entry NAME.npy per array: a line with type, order of axes and shape, and
then the elements. Pickled objects are refused. Before anything is read, the shape must need as many bytes as follow it,
and the whole may not unpack to much more than the file is: a few kilobytes can announce any size.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Container
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from diffusion_distill.base.zip_end import directory_size

#: What NumPy and zipfile raise for a file that is damaged, encrypted or another kind of file.
UNREADABLE = (
    ValueError, TypeError, AttributeError, EOFError, OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile,
    zlib.error, MemoryError, SyntaxError, TokenError, ArithmeticError,
)  # fmt: skip
MAX_ENTRIES = 2**14
MAX_DIRECTORY = 2**22  # bytes of the list of entries
#: An archive may unpack to so many times its size, and as many bytes more: pictures of one colour shrink a lot.
UNPACKED, UNPACKED_MORE = 32, 2**25
ENDING = ".npy"


def read(path: Path, wanted: Container[str | None] | None = None) -> dict[str, np.ndarray]:
    """The wanted arrays of an .npz file, by default all; of any others only the names, with empty arrays.

    Raises:
      UNREADABLE: it is damaged, no such file, or unpacks to more than is plausible.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        if directory_size(file, size) > MAX_DIRECTORY:
            raise ValueError(f"the archive's list of entries is longer than {MAX_DIRECTORY} bytes")
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no archive of arrays")
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename.removesuffix(ENDING): entry for entry in archive.infolist()}
        wanted = entries if wanted is None else wanted
        taken = [entry for name, entry in entries.items() if name in wanted]
        if len(archive.infolist()) > MAX_ENTRIES:
            raise ValueError(f"the archive has more than {MAX_ENTRIES} entries")
        if (whole := sum(entry.file_size for entry in taken)) > UNPACKED * size + UNPACKED_MORE:
            raise ValueError(f"the {size} bytes of the archive would become {whole}, which is not plausible")
        return {name: _entry(archive, entry) if name in wanted else np.empty(0) for name, entry in entries.items()}


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy file; errors as `read`."""
    with open(path, "rb") as file:
        return _array(file, path.stat().st_size)


def _entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as file:
        found = _array(file, entry.file_size)
        if file.read(1):  # the end of an entry is where its checksum is compared
            raise ValueError(f"bytes follow the array {entry.filename}")
        return found


def _array(file: Any, size: int) -> np.ndarray:
    """The array in `size` bytes, whose header must announce exactly what follows it."""
    counted = _Counted(file)
    version = np.lib.format.read_magic(counted)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in headers:
        raise ValueError(f"an array of format {version}; read are 1.0 and 2.0")
    try:
        shape, by_columns, dtype = headers[version](counted)
    except ValueError as error:  # NumPy repeats the whole header
        raise ValueError(str(error)[:300]) from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are pickles, and a pickle is a program; none is run")
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != size - counted.read_so_far:
        raise ValueError(f"an array of shape {shape} and type {dtype} is not in {size} bytes")
    space = np.empty(math.prod(shape), dtype)
    empty = not (space.size and dtype.itemsize)
    filled, places = 0, memoryview(bytearray() if empty else space.view(np.uint8))  # type: ignore[arg-type]
    while filled < len(places):
        piece = file.read(min(2**20, len(places) - filled))
        if not piece:
            raise EOFError("the array is cut short")
        places[filled : filled + len(piece)] = piece
        filled += len(piece)
    return space.reshape(shape[::-1]).T if by_columns else space.reshape(shape)


class _Counted:
    """A file that counts the bytes read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.read_so_far = file, 0

    def read(self, size: int = -1) -> bytes:
        found = self._file.read(size)
        self.read_so_far += len(found)
        return found
