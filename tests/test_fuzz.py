"""tests/fuzz.py: a few hundred damaged files of each format, always the same ones."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import fuzz
import pytest


@pytest.mark.fast
@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path, toy_networks: None) -> None:
    counts = fuzz.fuzz(name, 200, 5, 0, tmp_path)
    assert sum(counts.values()) == 200 and set(counts) <= {"read", "refused"}


@pytest.mark.fast
def test_what_a_reader_must_not_do_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    for bad in (lambda path: os.system("true"), lambda path: eval("1"), lambda path: path.write_text("y")):
        with pytest.raises(AssertionError):
            fuzz.attempt(fuzz.Format(lambda path: None, bad), path)
    with pytest.raises(KeyError):
        fuzz.attempt(fuzz.Format(lambda path: None, lambda path: {}["a"]), path)
    tracemalloc.start()
    try:
        with pytest.raises(AssertionError, match="MiB for 1 bytes"):
            fuzz.attempt(fuzz.Format(lambda path: None, lambda path: bytes(2**28)), path)
    finally:
        tracemalloc.stop()


@pytest.mark.fast
def test_an_image_that_claims_more_bytes_than_its_zip_has(tmp_path: Path) -> None:
    """Found by fuzzing: 503 bytes asked for a gigabyte."""
    path = tmp_path / "file.zip"
    fuzz.FORMATS["image-zip"].make(path)
    content = bytearray(path.read_bytes())
    listed = content.rindex(b"PK\x01\x02")
    content[listed + 20 : listed + 28] = (2**32 - 2**24).to_bytes(4, "little") + (2**24).to_bytes(4, "little")
    path.write_bytes(content)
    assert fuzz.attempt(fuzz.FORMATS["image-zip"], path) == "refused"


@pytest.mark.fast
@pytest.mark.parametrize("alpha", [-1, 0.5, [[0.1, 0.6, 1.0]], [], "0.1"])
def test_a_fitted_solver_whose_levels_are_no_list(alpha: object, tmp_path: Path) -> None:
    """Found by fuzzing: a number in place of the list was an IndexError."""
    path = tmp_path / "file.json"
    fuzz.FORMATS["solver"].make(path)
    content = json.loads(path.read_text())
    content["grid"]["alpha"] = alpha
    path.write_text(json.dumps(content))
    assert fuzz.attempt(fuzz.FORMATS["solver"], path) == "refused"


@pytest.mark.fast
def test_a_name_that_is_very_long_is_not_said_in_full(tmp_path: Path) -> None:
    """Found by fuzzing: a message of 14934 letters."""
    path = tmp_path / "model.json"
    fuzz.FORMATS["model"].make(path)
    content = json.loads(path.read_text())
    content["model"]["process"]["name"] = "[" * 20000
    path.write_text(json.dumps(content))
    assert fuzz.attempt(fuzz.FORMATS["model"], path) == "refused"


@pytest.mark.fast
@pytest.mark.parametrize("part", ["grid", "format"])
def test_what_a_fitted_solver_says_of_a_long_name_is_short(part: str, tmp_path: Path) -> None:
    """Found by fuzzing: a message of 14968 letters."""
    path, long = tmp_path / "file.json", "[" * 20000
    fuzz.FORMATS["solver"].make(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | ({"grid": {long: [1]}} if part == "grid" else {"format": long})))
    assert fuzz.attempt(fuzz.FORMATS["solver"], path) == "refused"


@pytest.mark.fast
@pytest.mark.parametrize("field", ["cond", "null"])
@pytest.mark.parametrize(
    "written",
    [{}, [], 1, "a", {"shape": [1]}, {"shape": 1, "dtype": "f4"}, {"shape": [], "dtype": "f4,(2"}, {"tree": [1]},
     {"list": 1}, {"shape": [2], "dtype": "f4", "values": ["a", "b"]}, {"tree": {"": {"shape": [-1], "dtype": "f4"}}},
     {"shape": [1.5], "dtype": "f4"}, {"shape": [], "dtype": []}],
    ids=lambda written: str(written)[:30],
)  # fmt: skip
def test_a_condition_that_is_no_tree_of_arrays(field: str, written: object, tmp_path: Path) -> None:
    """Found by fuzzing: a KeyError."""
    path = tmp_path / "model.json"
    fuzz.FORMATS["model"].make(path)
    content = json.loads(path.read_text())
    content["model"][field] = written
    path.write_text(json.dumps(content))
    assert fuzz.attempt(fuzz.FORMATS["model"], path) == "refused"


@pytest.mark.fast
def test_an_array_with_a_long_damaged_header_is_refused_in_few_words(tmp_path: Path) -> None:
    """Found by fuzzing: a message of 5028 letters."""
    path = tmp_path / "file.npz"
    header = b"{'descr': '<i8', 'shape': (4,), }" + b"\0" * 9000
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    for form in ("npz", "reference"):
        assert fuzz.attempt(fuzz.FORMATS[form], path) == "refused"
