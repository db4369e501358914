"""tests/fuzz.py: a few hundred damaged files of each format, always the same ones."""

from __future__ import annotations

import os
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
    with pytest.raises(AssertionError, match="MiB for 1 bytes"):
        fuzz.attempt(fuzz.Format(lambda path: None, lambda path: bytes(2**28)), path)
