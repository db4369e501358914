"""NumPy's files: read as NumPy reads them, and refused where their headers announce more than there is."""

from __future__ import annotations

import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_distill import data, evaluation
from diffusion_distill.base import npz_file
from diffusion_distill.base.zip_end import directory_size

pytestmark = pytest.mark.fast

ARRAYS = {
    "floats": np.arange(12, dtype=np.float64).reshape(3, 4),
    "by columns": np.asfortranarray(np.arange(24, dtype=np.int32).reshape(2, 3, 4)),
    "number": np.asarray(7),
    "nothing": np.zeros((0, 3), np.float32),
    "text": np.asarray("meta"),
    "big-endian": np.arange(5, dtype=">f4"),
    "truths": np.array([True, False]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_by_numpy(save: Callable, tmp_path: Path) -> None:
    save(tmp_path / "file.npz", **ARRAYS)
    with np.load(tmp_path / "file.npz") as theirs:
        ours = npz_file.read(tmp_path / "file.npz")
        assert list(ours) == theirs.files
        for name in theirs.files:
            np.testing.assert_array_equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
    assert npz_file.read(tmp_path / "file.npz", ("floats",))["text"].size == 0
    np.save(tmp_path / "file.npy", ARRAYS["by columns"])
    np.testing.assert_array_equal(npz_file.read_npy(tmp_path / "file.npy"), ARRAYS["by columns"])


def header(shape: str, dtype: str = "'<f4'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


HOSTILE: dict[str, Any] = {
    "a shape of 256 GiB": header(f"({2**36},)"),
    "a shape beyond all numbers": header(f"({2**62}, {2**62})"),
    "a negative shape": header("(-4,)"),
    "a shape that is none": header("(1.5,)"),
    "objects": header("(1,)", "'|O'") + b"\x80\x04N.",
    "a type that is none": header("(1,)", "'<q9'"),
    "brackets": b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 8999 + b"\n",
    "an array that is too short": header("(4,)") + bytes(8),
    "an array that is too long": header("(4,)") + bytes(20),
    "no array": b"PK and so on",
    "nothing": b"",
    "another version": b"\x93NUMPY\3\0" + bytes(20),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_lie_are_refused_before_they_cost_anything(name: str, tmp_path: Path) -> None:
    for key, read in (("mu", evaluation.read_reference), ("images", data.npz)):
        path = tmp_path / f"{key}.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{key}.npy", HOSTILE[name])
            archive.writestr("sigma.npy", header("(1, 1)") + bytes(4))
        tracemalloc.start()
        with pytest.raises(ValueError, match=rf"{key}\.npz is not an \.npz file of plain arrays"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()
    path = tmp_path / "x_mean.npy"
    path.write_bytes(HOSTILE[name])
    (tmp_path / "x_std.npy").write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=r"x_mean\.npy is not an \.npy file"):
        evaluation.read_reference(path)


def test_archives_that_unpack_to_anything_are_refused(tmp_path: Path) -> None:
    bomb, many = tmp_path / "bomb.npz", tmp_path / "many.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w") as file:
        file.write(header(f"({2**26},)"))
        for _ in range(256):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match=r"bomb\.npz .* would become 268435\d+, which is not plausible"):
        data.npz(bomb)
    with zipfile.ZipFile(many, "w") as archive:
        for k in range(npz_file.MAX_ENTRIES + 1):
            archive.writestr(f"{k}.npy", b"")
    with pytest.raises(ValueError, match=r"many\.npz .*more than 16384 entries"):
        data.npz(many)


def test_the_end_of_an_archive_is_found_wherever_its_signature_stands_again(tmp_path: Path) -> None:
    """An end record whose own fields, or whose comment, spell its signature: which one counts differs in Python."""
    end = lambda size, offset, comment: struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, size, offset, comment)  # noqa: E731
    long = 5 * 10**6
    for record in (end(long, 0x06054B50, 0), end(long, 0, 4) + b"PK\5\6", end(9, 0, 22) + end(long, 0, 0)):
        path = tmp_path / "file"
        path.write_bytes(bytes(100) + record)
        with open(path, "rb") as file:
            assert directory_size(file, path.stat().st_size) == long
