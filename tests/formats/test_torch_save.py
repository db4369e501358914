"""Files of PyTorch and of TensorFlow: read exactly, or refused in bounded work."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch_files

from diffusion_distill.formats import graph_def, torch_save
from diffusion_distill.weights import WeightsError

Flat = dict[str, np.ndarray]

# ---------------------------------------------------------------- formats

ARRAYS: Flat = {
    "a.single": np.arange(6, dtype="f4").reshape(2, 3),
    "a.double": np.linspace(0, 1, 5),
    "b.half": np.arange(3, dtype="f2"),
    "b.count": np.array(3),
    "b.brain": np.arange(3).astype(jnp.bfloat16),
    "b.empty": np.zeros((0, 3), "f4"),
    **{f"c.{kind}": np.arange(3).astype(kind) for kind in ("i4", "i2", "i1", "u1", "bool")},
}


@pytest.mark.fast
@pytest.mark.parametrize("how", ["write_zip", "write_legacy", "write_script"])
def test_tensors_of_all_types(how: str, tmp_path: Path) -> None:
    content = ARRAYS if how == "write_script" else torch_files.state_dict(ARRAYS)
    found = torch_save.read(getattr(torch_files, how)(tmp_path / "file", content))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)
        assert not found[name].flags.writeable


@pytest.mark.fast
@pytest.mark.parametrize("how", ["write_zip", "write_legacy"])
def test_tensors_may_be_views_of_one_storage(how: str, tmp_path: Path) -> None:
    elements = np.arange(24, dtype="f4")
    storage = torch_files.Storage(elements, "0")
    views = {"t": torch_files.Tensor(storage, 4, (3, 2), (1, 3)), "row": torch_files.Tensor(storage, 20, (4,), (1,))}
    found = torch_save.read(getattr(torch_files, how)(tmp_path / "file", OrderedDict(views)))
    np.testing.assert_array_equal(found["t"], elements[4:10].reshape(2, 3).T)
    np.testing.assert_array_equal(found["row"], elements[20:])


@pytest.mark.fast
def test_tensors_may_repeat_elements_and_be_part_of_a_part(tmp_path: Path) -> None:
    elements = np.arange(24, dtype="f4")
    storage, view = torch_files.Storage(elements, "0"), torch_files.Storage(elements, "0", ("7", 4, 10))
    row = torch_files.Tensor(storage, 2, (3, 30), (1, 0))
    found = torch_save.read(torch_files.write_zip(tmp_path / "file", {"row": row}))
    np.testing.assert_array_equal(found["row"], np.repeat(elements[2:5, None], 30, axis=1))
    content = {"row": row, "part": torch_files.Tensor(view, 1, (3,), (3,))}
    found = torch_save.read(torch_files.write_legacy(tmp_path / "file", content))
    np.testing.assert_array_equal(found["part"], elements[4 + 1 : 4 + 8 : 3])
    for size, other in (((4,), ("7", 4, 10)), ((3,), ("7", 20, 10)), ((3,), ("7", -1, 10)), ((3,), ("7", 4))):
        storage = torch_files.Storage(elements, "0", other)  # type: ignore[arg-type]
        with pytest.raises(WeightsError, match=r"is not in its storage|not \(key, begin, count\)"):
            torch_save.read(
                torch_files.write_legacy(tmp_path / "file", {"t": torch_files.Tensor(storage, 1, size, (3,))})
            )


@pytest.mark.fast
@pytest.mark.parametrize("how", ["write_zip", "write_legacy"])
def test_objects_are_read_whole(how: str, tmp_path: Path) -> None:
    arrays = {"a": np.arange(4, dtype="f4"), "b": np.ones((2, 2), "f2")}
    made = torch_files.tensors(arrays)
    plain = {"lr": 1e-3, "betas": (0.9, 0.999), "name": "adam", "amsgrad": False, "hook": None, "params": [0, 1]}
    content = [
        OrderedDict(made),
        {"state": {0: {"step": 3, "first": made["a"]}}, "param_groups": [plain]},
        {"a": torch_files.Parameter(made["a"])},
        17,
    ]
    weights, optimizer, parameters, step = torch_save.read_object(getattr(torch_files, how)(tmp_path / "file", content))
    assert (step, optimizer["param_groups"], optimizer["state"][0]["step"]) == (17, [plain], 3)
    for array in (weights["a"], optimizer["state"][0]["first"], parameters["a"]):
        np.testing.assert_array_equal(array, arrays["a"])
    np.testing.assert_array_equal(weights["b"], arrays["b"])


@pytest.mark.fast
@pytest.mark.parametrize("shift", range(8))
def test_entries_may_begin_at_any_byte(shift: int, tmp_path: Path) -> None:
    arrays = {"a": np.arange(5.0), "b": np.arange(3).astype(jnp.bfloat16)}
    path = torch_files.write_zip(tmp_path / "file", torch_files.state_dict(arrays), folder="x" * (8 + shift))
    for name, array in torch_save.read(path).items():
        np.testing.assert_array_equal(array, arrays[name])


def view(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> dict[str, Any]:
    return {"t": torch_files.Tensor(torch_files.Storage(np.arange(6, dtype="f4"), "0"), offset, size, stride)}


class Bomb:
    """What an ordinary reader would run."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("MARKER",)


def entry(name: str, content: bytes | None) -> Callable[[dict[str, bytes]], Any]:
    return lambda entries: entries.pop(name) if content is None else entries.update({name: content})


def nested(depth: int, width: int) -> Any:
    """Few lists that stand in each other very often."""
    found: Any = [1]
    for _ in range(depth):
        found = [found] * width
    return found


def conjugated() -> dict[str, Any]:
    found = view((6,), (1,))
    found["t"].arguments += ({"neg": True},)
    return found


def wide(count: int) -> dict[str, Any]:
    """Many tensors that are the same bytes."""
    storage = torch_files.Storage(np.arange(600, dtype="f4"), "0")
    return {str(i): torch_files.Tensor(storage, 0, (600,), (1,)) for i in range(count)}


#: content, change of the archive's entries, what the refusal says
BAD_ZIPS: dict[str, tuple[Any, Callable[[dict[str, bytes]], Any] | None, str]] = {
    "a call": ({"t": Bomb()}, None, "'mkdir' is not among what such a file may name"),
    "a call below a module": ({"a": [Bomb()]}, None, "nothing of it is run"),
    "beyond its storage": (view((2, 4), (4, 1)), None, r"'t': a tensor of size \(2, 4\).* is not in its storage of 6"),
    "before its storage": (view((2,), (1,), -1), None, "from element -1"),
    "empty, and beyond its storage": (view((0,), (1,), 7), None, "is not in its storage"),
    "huge": (view((2**62,), (0,)), None, "is not in its storage"),
    "negated": (conjugated(), None, "a tensor of \\(Part, 0, tuple, tuple, False, Ordered, dict\\)"),
    "no boolean": (
        torch_files.state_dict({"t": np.ones(3, "bool")}),
        entry("data/0", b"\0\1\2"),
        "'t': a boolean that is neither 0 nor 1",
    ),
    "lists in lists": ({"a": nested(15, 10)}, None, "more than 131072 values"),
    "deep lists": ({"a": nested(20, 1)}, None, "more than 16 deep"),
    "a negative key": ({-1: 1}, None, "a name that stands twice, is no text"),
    "a large key": ({2**40: 1}, None, "a name that stands twice, is no text"),
    "more than the file": (wide(1000), None, "all tensors together are larger than the file"),
    "no tensor": ({"t": 3}, None, "'t' is 3, not a tensor"),
    "no dictionary": ([1], None, "the file holds list"),
    "no tensors": ({}, None, "there are 0 tensors"),
    "no pickle": (view((6,), (1,)), entry("data.pkl", None), "has 0 entries NAME/data.pkl"),
    "no storage": (view((6,), (1,)), entry("data/0", None), "no entry 'archive/data/0' of 24 bytes"),
    "a shorter storage": (view((6,), (1,)), entry("data/0", b"\0" * 20), "no entry 'archive/data/0' of 24 bytes"),
    "big-endian": (view((6,), (1,)), entry("byteorder", b"big"), "byte order is not little-endian"),
    "another protocol": (view((6,), (1,)), entry("data.pkl", pickle.dumps({}, 4)), "protocol 4; only 2 is read"),
    "bytes after the pickle": (
        view((6,), (1,)),
        lambda e: e.update({"data.pkl": e["data.pkl"] + b"x"}),
        "1 bytes follow",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", BAD_ZIPS)
def test_hostile_archives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, change, said = BAD_ZIPS[name]
    path = torch_files.write_zip(tmp_path / "file.pth", content, change=change)
    with pytest.raises(WeightsError, match=said):
        torch_save.read(path)
    assert [found.name for found in tmp_path.iterdir()] == ["file.pth"]


@pytest.mark.fast
def test_archives_that_are_compressed_damaged_or_ambiguous(tmp_path: Path) -> None:
    good = torch_files.write_zip(tmp_path / "good", view((6,), (1,)))
    with zipfile.ZipFile(good) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for said, compression, names in (
        ("is compressed", zipfile.ZIP_DEFLATED, {}),
        ("stands twice", zipfile.ZIP_STORED, {"archive/data/0": "archive/data.pkl"}),
        ("has 2 entries NAME/data.pkl", zipfile.ZIP_STORED, {"archive/version": "other/data.pkl"}),
    ):
        with zipfile.ZipFile(tmp_path / "bad", "w", compression) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an entry twice
            for name, content in entries.items():
                archive.writestr(names.get(name, name), content)
        with pytest.raises(WeightsError, match=said):
            torch_save.read(tmp_path / "bad")
    content = bytearray(good.read_bytes())
    content[content.index(np.arange(6, dtype="f4").tobytes()) + 5] ^= 1
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(WeightsError, match="'archive/data/0' is damaged: its checksum differs"):
        torch_save.read(tmp_path / "bad")


@pytest.mark.fast
def test_entries_may_not_share_bytes_nor_be_listed_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"a": np.ones(6, "f4"), "b": np.ones(6, "f4")}
    good = torch_files.write_zip(tmp_path / "good", torch_files.state_dict(arrays))
    content = good.read_bytes()
    with zipfile.ZipFile(good) as archive:
        first, second = (archive.getinfo(f"archive/data/{k}").header_offset for k in (0, 1))
    at = content.rindex(struct.pack("<I", second))  # in the list of entries
    (tmp_path / "bad").write_bytes(content[:at] + struct.pack("<I", first) + content[at + 4 :])
    with pytest.raises(WeightsError, match=r"'archive/data/0' and 'archive/data/1' share bytes"):
        torch_save.read(tmp_path / "bad")
    monkeypatch.setattr(torch_save, "MAX_DIRECTORY", 100)
    with pytest.raises(WeightsError, match="list of entries is longer than 100 bytes"):
        torch_save.read(good)


@pytest.mark.fast
def test_modules_may_be_shared_but_not_without_end(tmp_path: Path) -> None:
    root = torch_files.script({"a.t": np.arange(6, dtype="f4")})
    root.b = root.a
    found = torch_save.read(torch_files.write_zip(tmp_path / "file", root))
    np.testing.assert_array_equal(found["b.t"], found["a.t"])
    below = root
    for _ in range(12):  # two ways down at each of them
        below.l = below.r = below = torch_files.script({"t": np.arange(6, dtype="f4")})
    with pytest.raises(WeightsError, match="or after 8192 others"):
        torch_save.read(torch_files.write_zip(tmp_path / "file", root))
    below.l = root
    with pytest.raises(WeightsError, match="more than 16 deep"):
        torch_save.read(torch_files.write_zip(tmp_path / "file", root))


def legacy(change: Callable[[list[bytes]], Any]) -> bytes:
    parts = torch_files.legacy_parts(view((6,), (1,)))
    change(parts)
    return b"".join(parts)


def replaced(index: int, value: Any) -> Callable[[list[bytes]], Any]:
    return lambda parts: parts.__setitem__(index, value if isinstance(value, bytes) else pickle.dumps(value, 2))


BAD_LEGACY: dict[str, tuple[Callable[[list[bytes]], Any], str]] = {
    "another magic number": (replaced(0, 0x1950A86A20F9469CFC6D), "another format than number 1001"),
    "big-endian": (replaced(2, {"protocol_version": 1001, "little_endian": False}), "little-endian"),
    "no storages": (lambda parts: parts.pop(), "storage 0 of 6 elements is not at byte"),
    "other storages": (replaced(4, ["1"]), "storages that follow are not those"),
    "a shorter storage": (lambda parts: parts.append(parts.pop()[:-4]), "or not whole"),
    "another count": (lambda parts: parts.append(b"\7" + parts.pop()[1:]), "storage 0 of 6 elements is not"),
    "bytes at the end": (lambda parts: parts.append(b"xy"), "2 bytes follow the last storage"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", BAD_LEGACY)
def test_hostile_legacy_files(name: str, tmp_path: Path) -> None:
    change, said = BAD_LEGACY[name]
    (tmp_path / "file").write_bytes(legacy(lambda parts: None))
    np.testing.assert_array_equal(torch_save.read(tmp_path / "file")["t"], np.arange(6))
    (tmp_path / "file").write_bytes(legacy(change))
    with pytest.raises(WeightsError, match=said):
        torch_save.read(tmp_path / "file")


field, constant = torch_files.field, torch_files.constant
FOUR = np.arange(4, dtype="f4").reshape(2, 2)
BAD_GRAPHS = {
    "no node": (field(4, 3), "there are 0 nodes"),
    "cut": (constant("a", FOUR)[:-3], "reaches beyond its message"),
    "too few bytes": (constant("a", FOUR, b"\0" * 12), r"'a' of shape \(2, 2\) has 12 bytes"),
    "no whole number": (b"\x0a" + b"\xff" * 11, "no whole number at byte 1"),
    "a group": (b"\x0a\x02\x0b\x0c", "of type 3"),
    "twice": (constant("a", FOUR) * 2, "'a' stands twice"),
    "a number for a node": (field(1, 5), "a number stands where bytes are needed"),
    "a long name": (constant("a" * 1000, FOUR), "a name of 1000 bytes"),
    "not UTF-8": (field(1, field(1, b"\xff\xfe")), "cannot be read as a graph"),
    "one number for 2^36": (
        constant("a", np.broadcast_to(np.float32(0), (2**36,)), bytes(4)),
        "'a' repeats one number",
    ),
    "one number for many": (
        b"".join(constant(f"a{k}", np.broadcast_to(np.float32(0), (2**23,)), bytes(4)) for k in range(3)),
        "'a2' repeats one number",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", BAD_GRAPHS)
def test_hostile_graphs(name: str, tmp_path: Path) -> None:
    content, said = BAD_GRAPHS[name]
    (tmp_path / "file.pb").write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        graph_def.read(tmp_path / "file.pb")


@pytest.mark.fast
def test_constants_of_a_graph(tmp_path: Path) -> None:
    path = torch_files.write_graph(tmp_path / "file.pb", {"a": FOUR, "b/c": np.ones(3, "f4")})
    one = constant("one", np.zeros((2, 3), "f4"), np.float32(7).tobytes())
    path.write_bytes(path.read_bytes() + one)
    found = graph_def.read(path)  # the other nodes, and the shape in whole numbers, are passed over
    assert list(found) == ["a", "b/c", "one"]
    np.testing.assert_array_equal(found["a"], FOUR)
    np.testing.assert_array_equal(found["one"], np.full((2, 3), 7))
