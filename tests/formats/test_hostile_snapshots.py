"""Damaged and hostile snapshots are refused in bounded memory, and nothing in them is run."""

from __future__ import annotations

import contextlib
import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snapshots
from weight_files import EDM, MIB, bounded, sha256, write

from diffusion_distill.formats import torch_pickle
from diffusion_distill.weights import (
    WeightsError,
    edm,
)

HOSTILE = zipfile.ZipFile(EDM / "hostile.zip")
EXPECT = json.loads(HOSTILE.read("expect.json"))


@pytest.mark.fast
@pytest.mark.parametrize("name", EXPECT["files"])
def test_hostile_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path, marker = write(tmp_path / name, HOSTILE.read(name)), tmp_path / "marker"
    monkeypatch.setenv(EXPECT["marker_env"], str(marker))
    with bounded(64 * MIB):
        if EXPECT["files"][name]["expect"] == "must_load":
            found = {tensor: sha256(array) for tensor, array in torch_pickle.read(path).tensors().items()}
            assert found == {tensor: facts["sha256"] for tensor, facts in EXPECT["base_tensors"].items()}
            edm.read(path)
        else:
            with pytest.raises(WeightsError, match=re.escape(str(path))):
                edm.read(path)
    assert not marker.exists()


def text(words: str) -> bytes:
    return b"\x8c" + bytes([len(words)]) + words.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def long_text(length: int) -> bytes:
    return b"X" + struct.pack("<I", length) + length * b"a"


def snapshot_of(state: bytes, class_name: bytes = text("EDMPrecond")) -> bytes:
    """A file whose network has a state that a stream makes."""
    facts = text("type") + text("class") + text("version") + b"K\x06" + text("module_src") + text("")
    facts += text("class_name") + class_name + text("state") + state
    made = named("torch_utils.persistence", "_reconstruct_persistent_obj") + b"}(" + facts + b"u\x85R"
    return b"\x80\x04}" + text("ema") + made + b"s."


def grown(value: bytes, width: int, times: int) -> bytes:
    """A tuple of `width` times the same tuple of ..., `times` deep."""
    again = lambda k: b"\x94" + (width - 1) * (b"j" + struct.pack("<I", k)) + b"t"  # noqa: E731
    return times * b"(" + value + b"".join(map(again, range(times)))


ORDERED, MODULES = named("collections", "OrderedDict"), named("torch.nn.modules.container", "ModuleDict")
TENSOR, STORAGE = named("torch._utils", "_rebuild_tensor_v2"), named("torch.storage", "_load_from_bytes")
FLOAT = named("numpy", "dtype") + b"(" + text("f8") + b"\x89\x88tR"
STREAMS = {
    "nothing": (b"\x80\x04.", "STOP at byte 2: the stack is empty"),
    "a mark for a value": (b"\x80\x04(.", "the stack is empty"),
    "something left": (b"\x80\x04NN.", "left on the stack"),
    "bytes after the end": (b"\x80\x04N.N", "1 bytes follow the end of the pickle, at byte 4"),
    "a mark that is not there": (b"\x80\x04t.", "no mark"),
    "a value below a mark": (b"\x80\x04N(0.", "opcode 0x30"),
    "a pair of one": (b"\x80\x04}(Nu.", "a name without a value"),
    "a number as a name": (b"\x80\x04}K\x01K\x01s.", "a very long one: 1"),
    "a list as a name": (b"\x80\x04}]Ns.", "a very long one: list"),
    "a very long name": (b"\x80\x04}" + text(101 * "a") + b"Ns.", "a very long one: 'aaaa"),
    "a name twice": (b"\x80\x04}(" + 2 * (text("a") + b"N") + b"u.", "stands twice, is no text"),
    "items of a tuple": (b"\x80\x04)Na.", "a list is needed, not tuple"),
    "a set of lists": (b"\x80\x04\x8f(]\x90.", "a set of something else"),
    "a memo that is not there": (b"\x80\x04h\x00.", "no entry 0"),
    "text that is none": (b"\x80\x04\x8c\x01\xff.", "SHORT_BINUNICODE at byte 2"),
    "4 GiB of text": (b"\x80\x04X\xff\xff\xff\xffabc", "4294967295 bytes are needed, but only 3 are left"),
    "a long integer": (b"\x80\x04\x8a\xff" + bytes(255) + b".", "an integer of 255 bytes"),
    "a call of text": (b"\x80\x04" + text("a") + b")R.", "'a' with tuple is no call"),
    "a name that is none": (b"\x80\x04NN\x93.", "None, None is not among"),
    "a name of a module below": (b"\x80\x04" + named("torch", "_utils._rebuild_tensor_v2") + b".", "not among"),
    "a call that is none": (b"\x80\x04" + MODULES + b")R.", "ModuleDict is not called like this"),
    "a thing that is none": (b"\x80\x04" + ORDERED + b")\x81.", "OrderedDict is not made like this"),
    "a dictionary of arguments": (b"\x80\x04" + ORDERED + b"]\x85R.", "an empty container of (list)"),
    "a state for a dictionary": (b"\x80\x04}}b.", "a Buildable is needed, not dict"),
    "two states": (b"\x80\x04" + MODULES + b")\x81}b}b.", "stands twice"),
    "another NumPy type": (
        b"\x80\x04" + FLOAT + b"(K\x03" + text(">") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb.",
        "not little-endian float64",
    ),
    "a number of NumPy without a type": (
        b"\x80\x04" + named("numpy.core.multiarray", "scalar") + FLOAT + b"C\x0812345678\x86R.",
        "a NumPy number that is not",
    ),
    "a storage of text": (b"\x80\x04" + STORAGE + text("a") + b"\x85R.", "a storage of ('a')"),
    "a tensor of nothing": (b"\x80\x04" + TENSOR + b"(NK\x00))\x89}tR.", "a tensor of (None, 0, tuple"),
    "no dictionary": (b"\x80\x04K\x01.", "holds 1, not a dictionary with a network called 'ema'"),
    "a very long text": (snapshot_of(b"}" + text("a") + long_text(1001) + b"s"), "texts of up to 1000"),
    "a class of a very long name": (snapshot_of(b"}", long_text(2**20)), "a persistent object of type"),
    "a list twice in a list": (snapshot_of(b"}" + text("a") + grown(b"]", 2, 60) + b"s"), "16 deep"),
    "a wide list of wide lists": (
        snapshot_of(b"}" + text("a") + grown(b"]", 90, 5) + b"s"),
        "131072 in all",
    ),
    "a list in itself": (snapshot_of(b"}" + text("a") + b"]\x94h\x00as"), "16 deep"),
    "modules in modules": (
        snapshot_of(100 * (b"}" + text("_modules") + b"}" + text("a") + MODULES + b")\x81") + b"}" + 100 * b"bss"),
        "16 deep",
    ),
    "a module twice": (
        snapshot_of(b"}" + text("_modules") + b"}(" + text("a") + MODULES + b")\x81\x94}b" + text("b") + b"h\x00us"),
        "ema.b is _ModuleDict and no module, stands twice",
    ),
    "a name with a dot": (
        snapshot_of(b"}" + text("_modules") + b"}" + text("a.b") + MODULES + b")\x81}bss"),
        "something without a name",
    ),
    "parameters in a list": (snapshot_of(b"}" + text("_parameters") + b"]s"), "not a dictionary"),
    "a parameter that is none": (snapshot_of(b"}" + text("_parameters") + b"}" + text("a") + b"K\x01ss"), "ema.a is 1"),
    "too many sets": (b"\x80\x04]\x94(" + 2 * (8193 * b"\x8f\x94" + b"e("), "more than 16384 sets"),
    "too many operations": (b"\x80\x04" + (2**20) * b"]" + b".", "16384 items on the stack"),
    "too many operations in little space": (b"\x80\x04]" + 2**19 * b"Na" + b".", "more than 1048576 operations"),
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("name", STREAMS)
def test_hostile_streams(tmp_path: Path, name: str) -> None:
    content, said = STREAMS[name]
    path = write(tmp_path / "file.pkl", content)
    with bounded(64 * MIB if len(content) < 2**16 else None), pytest.raises(WeightsError, match=re.escape(said)):
        torch_pickle.read(path)


def stored(**changes: Any) -> bytes:
    return snapshots.storage(np.arange(6, dtype=np.float32), **changes)


BAD_TENSORS = {
    "the magic number": (stored(magic=7), "another format"),
    "the protocol": (stored(protocol=1002), "another format"),
    "big-endian": (stored(little_endian=False), "NEWFALSE"),
    "another key": (stored(key="95"), "not of one storage"),
    "two keys": (stored(keys=["94", "94"]), "APPENDS"),
    "whole numbers": (stored(name="LongStorage"), "'torch', 'LongStorage'"),
    "more than there is": (stored(count=2**40, after=2**40), "1099511627776 elements of 4 bytes, in 24 bytes"),
    "less than there is": (stored(count=3, after=3), "3 or 3 elements"),
    "two counts": (stored(after=5), "6 or 5 elements"),
    "less than none": (stored(count=-1, after=-1), "-1 or -1"),
    "nothing": (snapshots.storage(np.zeros(0, np.float32)), "0 or 0"),
    "no elements": (stored()[:-25], "6 or -1 elements"),
    "nothing at all": (b"", "needed"),
}
SIZES = {
    "beyond the end": (5, (2,), (1,)),
    "before the beginning": (-1, (2,), (1,)),
    "backwards": (5, (2,), (-1,)),
    "repeated": (0, (3, 3), (0, 0)),
    "huge": (0, (2**20, 2**20), (0, 0)),
    "beyond numbers": (0, (2**62, 2**62, 2**62), (2**62,) * 3),
    "of no elements": (0, (0, 2**62), (1, 1)),
    "of another number of strides": (0, (2, 2), (1,)),
    "of many dimensions": (0, (1,) * 40, (1,) * 40),
    "of truths": (0, (True,), (1,)),
    "of halves": (0, (2.0,), (1,)),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", [*BAD_TENSORS, *SIZES])
def test_hostile_tensors(tmp_path: Path, name: str) -> None:
    content, said = BAD_TENSORS.get(name, (stored(), "a tensor"))
    offset, size, strides = SIZES.get(name, (0, (6,), (1,)))
    made = snapshots.persistent(
        "EDMPrecond", snapshots.state({}, {"a": snapshots.view(content, offset, size, strides)})
    )
    path = snapshots.write(tmp_path / "file.pkl", {"ema": made})
    with bounded(MIB), pytest.raises(WeightsError, match=re.escape(said)):
        torch_pickle.read(path)


@pytest.mark.fast
def test_tensors_of_one_storage_are_not_larger_than_the_file(tmp_path: Path) -> None:
    shared = snapshots.Call(snapshots.LOAD_FROM_BYTES, snapshots.storage(np.zeros(2**16, np.float32)))
    views = {f"a{k}": snapshots.Call(snapshots.REBUILD_TENSOR, shared, 0, (2**16,), (1,), False, {}) for k in range(3)}
    path = snapshots.write(tmp_path / "file.pkl", {"ema": snapshots.persistent("A", snapshots.state({}, views))})
    assert path.stat().st_size < 2**19
    with pytest.raises(WeightsError, match=r"ema.a1: all tensors together are larger than the file"):
        torch_pickle.read(path)


@pytest.mark.fast
def test_cut_or_changed_anywhere_a_snapshot_is_read_or_refused(tmp_path: Path) -> None:
    content, rng, refused = HOSTILE.read("valid_base.pkl"), np.random.default_rng(0), 0
    for trial in range(200):
        bad = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at, kind = rng.integers(len(bad)), rng.integers(1, 4)
            bad[at : at + kind] = rng.bytes(int(kind if trial % 2 else rng.integers(0, 4)))
        path = write(tmp_path / "file.pkl", bytes(bad if trial % 4 else content[: rng.integers(len(content))]))
        with contextlib.suppress(WeightsError):
            edm.read(path)
            refused -= 1
        refused += 1
    assert 100 < refused < 200  # what only changes a number is read


@pytest.mark.fast
def test_reading_a_snapshot_takes_the_memory_of_its_arrays(tmp_path: Path) -> None:
    arrays = {f"a{k}": snapshots.tensor(np.zeros(2**18, np.float32)) for k in range(8)}
    made = {"ema": snapshots.persistent("A", snapshots.state({}, arrays))}
    path = snapshots.write(tmp_path / "file.pkl", made)
    del arrays, made
    with bounded(MIB):  # the 8 MiB of numbers stay in the file
        assert len(torch_pickle.read(path).tensors()) == 8
