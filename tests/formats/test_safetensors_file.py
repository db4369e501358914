"""Safetensors files: read exactly as the package reads them, or refused where they break a rule of the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors_files

from diffusion_distill.formats import safetensors_file
from diffusion_distill.weights import WeightsError

ARRAYS = {
    "double": np.linspace(0, 1, 5),
    "single": np.arange(6, dtype="f4").reshape(2, 3),
    "half": np.arange(3, dtype="f2"),
    "brain": np.arange(3).astype(jnp.bfloat16),
    **{kind: np.arange(4).astype(kind) for kind in ("int64", "int32", "int16", "int8", "uint8", "bool")},
    "0-d": np.array(3.5, "f4"),
    "empty": np.zeros((0, 3), "f4"),
    "odd number of bytes before it": np.arange(2.0),
}


@pytest.mark.fast
def test_all_types_by_hand_and_as_the_package_writes_them(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "package"
    save_file(ARRAYS, path, {"format": "pt"})
    assert safetensors_file.read_with_metadata(path)[1] == {"format": "pt"}
    for file in (path, safetensors_files.write(tmp_path / "by hand", ARRAYS)):
        found = safetensors_file.read(file)
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found[name], array)
            assert not found[name].flags.writeable


def good(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes}


def two(first: tuple[int, int], second: tuple[int, int]) -> dict[str, Any]:
    return {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in {"a": first, "b": second}.items()
    }


TWICE = json.dumps(good()).encode()
DATA = np.arange(4, dtype="f4").tobytes()
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "a page": (b"<html><body>not found</body></html>", "an HTML page"),
    "no JSON": (safetensors_files.joined(b"hello", DATA), 'no JSON, which begins with "{"'),
    "a list": (safetensors_files.joined([1], DATA), 'no JSON, which begins with "{"'),
    "cut JSON": (safetensors_files.joined(b'{"w": ', DATA), "the JSON is damaged"),
    "not UTF-8": (safetensors_files.joined(b'{"\xff": 1}', DATA), "the JSON is damaged"),
    "deep JSON": (safetensors_files.joined(b'{"w":' + b"[" * 10**5, DATA), "the JSON is damaged"),
    "a long header": (safetensors_files.joined(good(), DATA, 2**63), "header of 9223372036854775808 bytes"),
    "a huge header": (safetensors_files.joined(b"{" + b" " * 2**21 + b"}", DATA), "bytes of JSON; at most 2097152"),
    "a name twice": (safetensors_files.joined(TWICE[:-1] + b", " + TWICE[1:], DATA), "the name 'w' stands twice"),
    "a part twice": (
        safetensors_files.joined(b'{"w": {"dtype": "F32", "dtype": "I32"}}', DATA),
        "'dtype' stands twice",
    ),
    "another part": (safetensors_files.joined(good(more=1), DATA), "alone"),
    "another type": (safetensors_files.joined(good(dtype="F8_E4M3"), DATA), "of type 'F8_E4M3'; read are"),
    "a list for a type": (safetensors_files.joined(good(dtype=["F32"]), DATA), "read are"),
    "a negative shape": (safetensors_files.joined(good(shape=[-2, -2]), DATA), "no list of whole numbers"),
    "a shape of reals": (safetensors_files.joined(good(shape=[2.0, 2]), DATA), "no list of whole numbers"),
    "a shape of truths": (safetensors_files.joined(good(shape=[True, 4]), DATA), "no list of whole numbers"),
    "a shape beyond numbers": (safetensors_files.joined(good(shape=[2**61, 4, 2]), DATA), "is too large"),
    "none of a huge shape": (
        safetensors_files.joined(good(shape=[0, 2**61], data_offsets=[0, 0]), b""),
        "is too large",
    ),
    "many dimensions": (safetensors_files.joined(good(shape=[1] * 9), DATA), "9 dimensions"),
    "another size": (safetensors_files.joined(good(data_offsets=[0, 12]), DATA), "needs 16 bytes, not 12"),
    "an end before the beginning": (safetensors_files.joined(good(data_offsets=[16, 0]), DATA), "not -16"),
    "one offset": (safetensors_files.joined(good(data_offsets=[0]), DATA), "1 offsets"),
    "beyond the end": (safetensors_files.joined(good(), DATA[:-1]), "take 16 bytes, but 15 follow"),
    "bytes at the end": (safetensors_files.joined(good(), DATA + b"x"), "take 16 bytes, but 17 follow"),
    "an overlap": (safetensors_files.joined(two((0, 3), (2, 4)), DATA[:4]), "overlaps another tensor"),
    "a hole": (safetensors_files.joined(two((0, 1), (2, 4)), DATA[:4]), "follows a hole"),
    "metadata that are no text": (safetensors_files.joined({"__metadata__": {"a": 1}}, b""), "dictionary of texts"),
    "a truth that is 2": (
        safetensors_files.joined(good(dtype="BOOL", shape=[2], data_offsets=[0, 2]), b"\1\2"),
        "neither 0 nor 1",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", BAD)
def test_files_that_break_a_rule(name: str, tmp_path: Path) -> None:
    content, said = BAD[name]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        safetensors_file.read(tmp_path / "file")
