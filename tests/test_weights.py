"""Weights: files that flax, PyTorch and safetensors wrote are read exactly; whatever else is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pickle
import re
import socket
import struct
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError

import golden_check
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import snapshots
from flax import serialization

from diffusion_distill import weights
from diffusion_distill.api import import_weights
from diffusion_distill.denoisers.model import Model
from diffusion_distill.formats import flax_file, torch_pickle
from diffusion_distill.networks import UNet
from diffusion_distill.process import grids
from diffusion_distill.process.processes import Karras
from diffusion_distill.process.time_input import VPInput
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.weights import (
    PUBLISHED,
    Fetched,
    WeightsError,
    digest,
    download,
    edm,
    edm_layout,
    exchange,
    fetch,
    match,
    matching,
    progressive,
    shapes_of,
)

BTD = Path(__file__).parent / "golden" / "btd"
UNET = {"ch": 32, "emb_ch": 8, "out_ch": 1, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()}
MODEL = Model(UNet(**UNET, num_heads=2), (4, 4, 1))
SHAPES = shapes_of(MODEL)
KERNEL = "mid.block_1/conv1/kernel"  # a 3x3 convolution, (3, 3, 32, 32)
DENSE = "dense0/kernel"  # (32, 8)
NORM = "norm_out/scale"  # (32,)
Flat = dict[str, Any]


def random_arrays(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Flat:
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape, dtype=np.float32) for path, shape in shapes.items()}


def content_of(params: Flat, **others: Any) -> dict[str, Any]:
    """A checkpoint's content in the layout of the released files."""
    content = {"step": np.asarray(7, np.int32), "num_sample_steps": 8, "optimizer": None}
    return {**content, "ema_params": matching.unflatten(params), **others}


def write(path: Path, content: Any) -> Path:
    """Writes as the published program did."""
    path.write_bytes(content if isinstance(content, bytes) else serialization.msgpack_serialize(content))
    return path


def assert_same(tree: Any, flat: Flat) -> None:
    found = matching.flatten(tree)
    assert found.keys() == flat.keys()
    for path, array in flat.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], array)


# ---------------------------------------------------------------- good files


@pytest.mark.fast
def test_every_tree_of_a_checkpoint_is_read_as_written(tmp_path: Path) -> None:
    ema, target, first, second = map(random_arrays, range(4))
    moments = {f"{path}/grad_ema": array for path, array in first.items()}
    moments |= {f"{path}/grad_sq_ema": array for path, array in second.items()}
    state = {"step": np.asarray(7, np.int32), "param_states": matching.unflatten(moments)}
    optimizer = {"target": matching.unflatten(target), "state": state}
    path = write(tmp_path / "checkpoint", content_of(ema, optimizer=optimizer))
    written = {"ema_params": ema, "optimizer_target": target, "grad_ema": first, "grad_sq_ema": second}
    for which, arrays in written.items():
        checkpoint = progressive.read(path, MODEL, which)
        assert_same(checkpoint.params, arrays)
        assert (checkpoint.steps, checkpoint.step) == (8, 7)


@pytest.mark.fast
def test_items_are_read_as_by_flax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)  # instead of 1 GiB
    content: dict[str, Any] = {name: np.arange(6).reshape(2, 3).astype(name) for name in flax_file.DTYPES}
    content |= {
        "in pieces": np.arange(60.0).reshape(3, 4, 5),
        "empty": np.zeros((0, 2)),
        "none": None,
        "zero-d": np.array(3),
    }
    content |= {
        "scalar": np.float32(1.5),
        "text": "ünï",
        "deep.er": {"a": {"b": np.ones(2)}},
        "numbers": {"a": -1, "b": 2.5},
    }
    path = write(tmp_path / "file", content)
    found, expected = flax_file.read(path), dict(serialization.msgpack_restore(path.read_bytes()))  # type: ignore[arg-type]
    assert CHUNKED_MARK in path.read_bytes()
    found, expected = matching.flatten(found), matching.flatten(expected)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert getattr(found[name], "dtype", None) == getattr(value, "dtype", None), name
        np.testing.assert_array_equal(found[name], value)


CHUNKED_MARK = flax_file.CHUNKED.encode()


def old_layout(params: Flat) -> Flat:
    """Group norms of old flax and flat heads, written down independently of the rules."""
    old = dict(params)
    for path, array in params.items():
        module, name = path.split("/")[-2:]
        if re.fullmatch("norm.*", module):
            old[path] = array[None, None, None]
        elif re.fullmatch("[qkv]", module):
            old[path] = array.reshape(32, 32) if name == "kernel" else array.reshape(32)
        elif module == "proj_out" and name == "kernel":
            old[path] = array.reshape(32, 32)
    return old


@pytest.mark.fast
def test_old_layouts_are_read(tmp_path: Path) -> None:
    params = random_arrays(0)
    old = old_layout(params)
    assert params["mid.attn_1/q/kernel"].shape == (32, 2, 16)
    assert sum(old[path].shape != params[path].shape for path in params) > 15
    assert_same(progressive.read(write(tmp_path / "file", content_of(old)), MODEL).params, params)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("stored", "steps"),
    [
        (0, 0),
        (np.asarray(4, np.int32), 4),
        (np.full(8, 16, np.int32), 16),
        (np.full(1, 2, np.uint32), 2),
        ("left out", 0),
    ],
)
def test_steps(tmp_path: Path, stored: Any, steps: int) -> None:
    content = content_of(random_arrays(0), num_sample_steps=stored)
    if isinstance(stored, str):
        del content["num_sample_steps"]
    assert progressive.read(write(tmp_path / "file", content), MODEL).steps == steps


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_other_floats_become_float32(dtype: Any) -> None:
    stored = {path: array.astype(dtype) for path, array in random_arrays(0).items()}
    filled = match(stored, SHAPES, "file")
    assert all(array.dtype == np.float32 for array in filled.values())
    np.testing.assert_array_equal(filled[KERNEL], stored[KERNEL].astype(np.float32))


@pytest.mark.fast
def test_what_is_not_asked_for_takes_no_memory(tmp_path: Path) -> None:
    mib = lambda: np.zeros(2**18, np.float32)  # noqa: E731
    wanted = {f"w{k}": mib() for k in range(8)}
    path = write(tmp_path / "file", {"optimizer": {f"o{k}": mib() for k in range(24)}, "ema_params": wanted})
    tracemalloc.start()
    found = flax_file.read(path, lambda location: location[0] == "ema_params")
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert found.keys() == {"ema_params"}
    assert peak < 8 + 8  # all that is kept and a few times the largest item, but not the 24 others


# ---------------------------------------------------------------- files for another model


def changed(**changes: Any) -> Callable[[Flat], None]:
    return lambda params: params.update({name.replace("__", "/"): value for name, value in changes.items()})


def set_value(path: str, value: Any) -> Callable[[Flat], None]:
    return lambda params: params.update({path: value(params[path]) if callable(value) else value})


def spoil(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[3] = value
    return array


UNFIT = {
    "a transposed matrix": (set_value(DENSE, lambda a: a.T), [DENSE, "(8, 32)", "(32, 8)", "transposed"]),
    "a kernel of PyTorch's order": (set_value("conv_in/kernel", lambda a: a.transpose(3, 2, 0, 1)), ["(32, 1, 3, 3)"]),
    "the same size in another shape": (
        set_value("conv_in/kernel", lambda a: a.reshape(9, 32)),
        ["(9, 32)", "(3, 3, 1, 32)"],
    ),
    "another size": (set_value(KERNEL, lambda a: a[..., :31]), [KERNEL, "(3, 3, 32, 31)", "(3, 3, 32, 32)"]),
    "a norm with two leading ones": (set_value(NORM, lambda a: a[None, None]), [NORM, "(1, 1, 32)"]),
    "a norm as a column": (set_value(NORM, lambda a: a[:, None]), [NORM, "(32, 1)"]),
    "leading ones elsewhere": (
        set_value("conv_in/bias", lambda a: a[None, None, None]),
        ["conv_in/bias", "(1, 1, 1, 32)"],
    ),
    "heads last": (
        set_value("mid.attn_1/q/kernel", lambda a: a.swapaxes(1, 2)),
        ["mid.attn_1/q/kernel", "(32, 16, 2)"],
    ),
    "flat proj_out the wrong way": (set_value("mid.attn_1/proj_out/kernel", lambda a: a.reshape(-1)), ["(1024,)"]),
    "a missing array": (lambda params: params.pop(KERNEL), [f"missing (1): {KERNEL}"]),
    "an array too much": (set_value("extra/kernel", np.zeros(3)), ["unknown to the model (1): extra/kernel"]),
    "another name": (
        lambda params: params.update({"norm_aut/scale": params.pop(NORM)}),
        [f"{NORM} Did you mean 'norm_aut/scale'?", "unknown to the model (1): norm_aut/scale"],
    ),
    "not a number": (set_value(KERNEL, lambda a: spoil(a, np.nan)), ["not finite", KERNEL]),
    "infinite": (set_value(NORM, lambda a: spoil(a, -np.inf)), ["not finite", NORM]),
    "beyond float32": (set_value(NORM, lambda a: a.astype(np.float64) * 1e300), ["not finite", NORM]),
    "whole numbers": (set_value(KERNEL, lambda a: a.astype(np.int32)), ["another type", f"{KERNEL} (int32)"]),
    "no array": (set_value(KERNEL, 1.5), [f"{KERNEL} (float)"]),
    "nothing": (set_value(KERNEL, None), [f"{KERNEL} (NoneType)"]),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", UNFIT)
def test_arrays_that_do_not_fit_are_refused_by_name(tmp_path: Path, name: str) -> None:
    change, said = UNFIT[name]
    params = random_arrays(0)
    change(params)
    path = write(tmp_path / "file", content_of(params))
    with pytest.raises(WeightsError) as error:
        progressive.read(path, MODEL)
    assert not [part for part in (str(path), "ema_params", *said) if part not in str(error.value)]


@pytest.mark.fast
def test_one_error_names_everything_and_stays_short(tmp_path: Path) -> None:
    other = Model(UNet(**{**UNET, "ch": 64, "num_res_blocks": 3}, num_heads=2), (4, 4, 1))
    path = write(tmp_path / "file", content_of(random_arrays(0)))
    with pytest.raises(WeightsError) as error:
        progressive.read(path, other)
    said = str(error.value)
    assert re.search(r"of another shape \(\d\d\): .*; and \d+ more\.", said)
    assert re.search(r"missing \(\d\d\): .*; and \d+ more\.", said)
    assert len(said) < 3000


WRONG_ENTRIES = {
    "unequal steps": ({"num_sample_steps": np.asarray([8, 4])}, "num_sample_steps"),
    "negative steps": ({"num_sample_steps": -1}, "num_sample_steps"),
    "half a step": ({"num_sample_steps": 0.5}, "num_sample_steps"),
    "a table of steps": ({"num_sample_steps": np.full((2, 2), 8)}, "num_sample_steps"),
    "steps of no devices": ({"num_sample_steps": np.zeros(0, np.int32)}, "num_sample_steps"),
    "no number of steps": ({"num_sample_steps": None}, "num_sample_steps"),
    "an unknown entry": ({"num_sampling_steps": 8}, "num_sampling_steps"),
    "no parameters": ({"ema_params": None}, "no parameters at ema_params"),
    "an array for parameters": ({"ema_params": np.zeros(3)}, "no parameters at ema_params: there is ndarray"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", WRONG_ENTRIES)
def test_other_entries_are_checked(tmp_path: Path, name: str) -> None:
    entries, said = WRONG_ENTRIES[name]
    path = write(tmp_path / "file", content_of(random_arrays(0), **entries))
    with pytest.raises(WeightsError, match=said):
        progressive.read(path, MODEL)


@pytest.mark.fast
def test_a_student_has_no_optimizer_to_read(tmp_path: Path) -> None:
    path = write(tmp_path / "file", content_of(random_arrays(0)))
    with pytest.raises(WeightsError, match="no parameters at optimizer"):
        progressive.read(path, MODEL, "grad_ema")
    with pytest.raises(ValueError, match="Did you mean 'ema_params'"):
        progressive.read(path, MODEL, "ema_param")


# ---------------------------------------------------------------- damaged and hostile files


def array(shape: Any, dtype: Any, content: Any, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, content)))


class Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("something was executed",))


def nested(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + b"\xc0"


TEXT_A = b"\x81\xa1a"  # a map of one entry called "a", up to its value
DAMAGED = {
    "empty": (b"", "it is empty"),
    "random": (np.random.default_rng(1).bytes(3000), "flax checkpoint"),
    "a pickle": (pickle.dumps(Bomb()), "it is a pickle"),
    "a list": (msgpack.packb([1, 2]), "a map was expected"),
    "bytes after the end": (b"\x81\xa1a\x01" + b"\x00\x01", "2 bytes follow the end"),
    "an array of objects": (msgpack.packb({"a": array((1,), "object", b"12345678")}), "a, at byte 3: an array of type"),
    "an array of records": (msgpack.packb({"a": array((1,), "V8", b"12345678")}), "type 'V8'"),
    "an array of text": (msgpack.packb({"a": array((1,), "<U2", b"12345678")}), "type '<U2'"),
    "a type that is no text": (msgpack.packb({"a": array((2,), 5, b"12345678")}), "is not"),
    "too few bytes": (msgpack.packb({"a": array((3,), "float32", b"12345678")}), "needs 12 bytes, not 8"),
    "too many bytes": (msgpack.packb({"a": array((1,), "float32", b"12345678")}), "needs 4 bytes, not 8"),
    "an absurd shape": (msgpack.packb({"a": array((2**40, 2**40), "float32", b"1234")}), "needs 48357032784585166988"),
    "a negative shape": (msgpack.packb({"a": array((-1, -2), "float32", b"12345678")}), "an array of shape"),
    "a broken shape": (msgpack.packb({"a": array((1.0, True), "float32", b"1234")}), "an array of shape"),
    "many dimensions": (msgpack.packb({"a": array((1,) * 33, "float32", b"1234")}), "max_array_len"),
    "an array of two parts": (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "int8")))}), "is not"),
    "an array of nothing": (msgpack.packb({"a": msgpack.ExtType(1, b"")}), "a, at byte 3"),
    "a complex number": (serialization.msgpack_serialize({"a": 1j}), "an extension of type 2"),
    "an unknown extension": (msgpack.packb({"a": msgpack.ExtType(99, b"x")}), "an extension of type 99"),
    "a list inside": (msgpack.packb({"a": [1, 2]}), "max_array_len"),
    "a number as a name": (msgpack.packb({1: 2}), "a name that is no text"),
    "a map as a name": (b"\x81\x81\xa1a\x01\x02", "a name that is no text"),
    "a broken name": (b"\x81\xa1\xff\x01", "at byte"),
    "a name twice": (b"\x82\xa1a\x01\xa1a\x02", "a, at byte 4: the name stands twice"),
    "a reserved byte": (TEXT_A + b"\xc1", "a, at byte 3"),
    "4 GiB of bytes": (TEXT_A + b"\xc6\xff\xff\xff\xff" + b"x" * 50, "ends in the middle"),
    "4 GiB of an array": (TEXT_A + b"\xc9\xff\xff\xff\xff\x01" + b"x" * 50, "exceeds max_ext_len"),
    "4 GiB of text": (TEXT_A + b"\xdb\xff\xff\xff\xff" + b"x" * 50, "ends in the middle"),
    "4 billion entries": (b"\xdf\xff\xff\xff\xff\xa1a\x01", "ends"),
    "maps in maps": (nested(100), "more than 32 maps"),
    "very many maps in maps": (nested(10_000), "more than 32 maps"),
    "an array with a list of 4 billion": (TEXT_A + b"\xc7\x05\x01\xdd\xff\xff\xff\xff", "max_array_len"),
    "pieces without a shape": (msgpack.packb({"a": {flax_file.CHUNKED: True, "chunks": {}}}), "not numbered"),
    "pieces of another size": (
        msgpack.packb({"a": {flax_file.CHUNKED: True, "shape": {"0": 3}, "chunks": {"0": array((1,), "int8", b"1")}}}),
        "do not make up the shape",
    ),
    "pieces that are no arrays": (
        msgpack.packb({"a": {flax_file.CHUNKED: True, "shape": {"0": 1}, "chunks": {"0": 1}}}),
        "not all one-dimensional",
    ),
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_saying_where(tmp_path: Path, name: str) -> None:
    content, said = DAMAGED[name]
    path = write(tmp_path / "file", content)
    with pytest.raises(WeightsError) as error:
        flax_file.read(path)
    assert str(path) in str(error.value)
    assert said in str(error.value)


@pytest.mark.fast
def test_a_file_that_is_not_there_is_no_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        progressive.read(tmp_path / "nothing", MODEL)
    with pytest.raises(FileNotFoundError):
        exchange.load(tmp_path / "nothing")


def small_checkpoint() -> bytes:
    """A good file of few bytes, so that changes hit its structure as well as its numbers."""
    few = {"conv_in/kernel": (1, 1, 1, 2), "conv_in/bias": (2,), "mid.block_1/norm1/scale": (2,)}
    params = random_arrays(0, few)
    content = content_of(params, optimizer={"target": matching.unflatten(params), "state": {"step": np.asarray(1)}})
    return serialization.msgpack_serialize(content)


@pytest.mark.fast
def test_cut_anywhere_a_file_is_refused(tmp_path: Path) -> None:
    content = small_checkpoint()
    path = write(tmp_path / "file", content)
    assert flax_file.read(path).keys() == {"step", "num_sample_steps", "optimizer", "ema_params"}
    for want in (lambda location: True, lambda location: location[0] == "ema_params"):
        for length in range(len(content)):
            with pytest.raises(WeightsError):
                flax_file.read(write(path, content[:length]), want)


@pytest.mark.fast
def test_changed_anywhere_a_file_is_read_or_refused(tmp_path: Path) -> None:
    content, rng, refused = small_checkpoint(), np.random.default_rng(0), 0
    for _ in range(200):
        bad = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(len(bad))
            kind = rng.integers(4)
            bad[at : at + kind] = rng.bytes(int(rng.integers(1, 4)))  # replaces, inserts and removes bytes
        path = write(tmp_path / "file", bytes(bad))
        try:
            progressive.read(path, MODEL)
        except WeightsError:
            refused += 1
        try:
            flax_file.read(path)
        except WeightsError:
            refused += 1
    assert 200 < refused < 400  # what only changes a number is read


# ---------------------------------------------------------------- names and published models


@pytest.mark.fast
def test_flatten_and_back() -> None:
    tree = {"down_0.block_1": {"conv1": {"kernel": 1, "bias": 2}}, "scale": 3}
    flat = {"down_0.block_1/conv1/kernel": 1, "down_0.block_1/conv1/bias": 2, "scale": 3}
    assert matching.flatten(tree) == flat
    assert matching.unflatten(flat) == tree


@pytest.mark.fast
@pytest.mark.parametrize("tree", [{"a/b": 1}, {"": 1}, {"a": {"b/c": 1}}, {1: 2}])
def test_names_that_cannot_be_joined(tree: Any) -> None:
    with pytest.raises(WeightsError, match="is called"):
        matching.flatten(tree)


@pytest.mark.fast
@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 1, "a": 2}, {"a//b": 1}, {"": 1}, {"a": 1, "a/b/c": 2}])
def test_paths_that_exclude_each_other(flat: Any) -> None:
    with pytest.raises(WeightsError, match="does not go with"):
        matching.unflatten(flat)


def test_published_models_have_the_published_trees() -> None:
    manifests = json.loads((BTD / "manifests.json").read_text())
    keys = {"cifar": "cifar", "imagenet": "imagenet64", "bedroom": "bedroom128", "church": "church128"}
    for family, key in keys.items():
        manifest = manifests[f"{key}_base"]
        model = PUBLISHED[f"{family}_original"].model
        shapes = shapes_of(model)
        assert digest(shapes) == manifest["digest"]
        assert sum(np.prod(shape) for shape in shapes.values()) == manifest["num_params"]
        assert (list(model.shape), model.num_classes) == (manifest["data_shape"], manifest["num_classes"])
        listed = manifests[manifest.get("same_params_as", f"{key}_base")]["params"]
        assert shapes == {path: tuple(shape) for path, shape in listed.items()}
        students = [entry for entry in PUBLISHED.values() if entry.name.startswith(f"{family}_")]
        assert [entry.model for entry in students] == [model] * 8
        assert [entry.steps for entry in students] == [0, 64, 32, 16, 8, 4, 2, 1]


@pytest.mark.fast
def test_published_names_are_the_released_ones_and_describe_themselves() -> None:
    released = json.loads((BTD / "released_checkpoints.json").read_text())
    published = {name: entry for name, entry in PUBLISHED.items() if entry.format == "progressive"}
    assert list(published) == released["names"]
    for name, entry in published.items():
        assert entry.name == name
        assert entry.url == f"https://storage.googleapis.com/{released['bucket'].removeprefix('gs://')}{name}"
        assert Model.from_dict(json.loads(json.dumps(entry.model.to_dict()))) == entry.model


# ---------------------------------------------------------------- EDM: good snapshots

EDM = Path(__file__).parent / "golden" / "edm"
FULL_EDM = Path(__file__).parents[2] / "shared" / "golden" / "edm"
needs_full = pytest.mark.skipif(not FULL_EDM.is_dir(), reason="needs the optional sibling folder ../shared/golden")
RECORDED = ("ddpmpp_edm", "ncsnpp_edm", "adm_edm", "ddpmpp_vp", "ncsnpp_ve", "adm_iddpm", "views_edm")


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


@needs_full
@pytest.mark.fast
@pytest.mark.parametrize("name", [*RECORDED, "ddpmpp_edm_torch2"])
def test_recorded_snapshots_are_read_bit_for_bit(name: str) -> None:
    facts = json.loads((FULL_EDM / "pickles" / "expected.json").read_text())["files"][f"{name}.pkl"]
    wrapper = torch_pickle.read(FULL_EDM / "pickles" / f"{name}.pkl")
    assert (wrapper.class_name, wrapper.modules["model"].class_name) == (facts["precond_class"], facts["model_class"])
    assert wrapper.init_kwargs == facts["init_kwargs"]
    assert {n: float(wrapper.attributes[n]) for n in ("sigma_min", "sigma_max")} == {
        n: float(facts[n]) for n in ("sigma_min", "sigma_max")
    }
    tensors = wrapper.tensors()
    assert list(tensors) == list(facts["tensors"])
    for tensor, array in tensors.items():
        expected = facts["tensors"][tensor]
        assert [list(array.shape), str(array.dtype)] == [expected["shape"], expected["dtype"]]
        assert sha256(array) == expected["sha256"], tensor
        assert not array.flags.writeable


@pytest.mark.fast
def test_views_are_the_elements_that_size_and_strides_say() -> None:
    rng = np.random.default_rng(0)
    storage = np.arange(100, dtype=np.float32)
    for _ in range(200):
        size = tuple(rng.integers(1, 5, rng.integers(0, 4)).tolist())
        stride = tuple(rng.integers(0, 12, len(size)).tolist())
        offset = int(rng.integers(0, 20))
        wanted = np.full(size, np.float32(offset))
        for index in np.ndindex(size):
            wanted[index] += sum(n * step for n, step in zip(index, stride, strict=True))
        if wanted.max() > 99:
            with pytest.raises(WeightsError, match="not in its storage of 100 elements"):
                torch_pickle.as_tensor(storage, offset, size, stride)
        else:
            np.testing.assert_array_equal(torch_pickle.as_tensor(storage, offset, size, stride), wanted)
    assert torch_pickle.as_tensor(storage, 99, (1, 1), (2**70, 5)).item() == 99  # steps that are never taken


KWARGS = {"model_channels": 4, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1}
KWARGS |= {"img_resolution": 8, "img_channels": 3, "label_dim": 2}
#: What wrappers are made with, and what they then tell of their range: EDM.md, section 1, in golden/edm.
CONSTANTS = {
    "EDMPrecond": {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000},
}
RANGES = {"VPPrecond": (0.0009765625, 152.16697692871094), "iDDPMPrecond": (0.006422337144613266, 20291.169921875)}


@cache
def shapes_in(wrapper: str, network: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a network made with `KWARGS`."""
    model = edm.model_of(wrapper, {**KWARGS, "model_type": network})
    return edm_layout.tensor_shapes(model.network, model.shape)


class Snapshot:
    """What goes into a file, to be changed before it is written."""

    def __init__(self, wrapper: str = "EDMPrecond", network: str = "SongUNet", **kwargs: Any) -> None:
        self.wrapper, self.network = wrapper, network
        self.kwargs = {**KWARGS, "model_type": network, **kwargs}  # of the wrapper
        self.inner: Flat = {}  # of the network, where they differ
        self.attributes: Flat = {**CONSTANTS[wrapper]}  # of the wrapper
        self.attributes |= dict(zip(("sigma_min", "sigma_max"), RANGES.get(wrapper, ()), strict=False))
        self.buffers = {"u": grids.iddpm_sigmas(dtype=np.float32)} if wrapper == "iDDPMPrecond" else {}
        self.late: list[Callable[[Any], None]] = []  # what is changed in the pickled wrapper
        self.tensors = random_arrays(0, shapes_in(wrapper, network))
        filters = [name for name in self.tensors if name.endswith("resample_filter")]
        self.tensors |= dict.fromkeys(filters, np.full((1, 1, 2, 2), 0.25, np.float32))

    def write(self, path: Path) -> Path:
        own = {"model_type", "img_channels", "use_fp16", *CONSTANTS[self.wrapper]}
        inner = {name: value for name, value in self.kwargs.items() if name not in own}
        inner |= {"in_channels": 3, "out_channels": 6 if self.wrapper == "iDDPMPrecond" else 3} | self.inner
        network = snapshots.network(self.network, inner, self.tensors)
        made = snapshots.wrapped(self.wrapper, self.kwargs, network, self.attributes, self.buffers)
        for change in self.late:
            change(made)
        return snapshots.write(path, snapshots.snapshot(made))


@pytest.mark.fast
@pytest.mark.parametrize("network", ["SongUNet", "DhariwalUNet"])
@pytest.mark.parametrize(
    ("wrapper", "prediction", "low", "high"),
    [
        ("EDMPrecond", "edm", 0.002, 80),
        ("VPPrecond", "eps", 0.002, 80),
        ("VEPrecond", "score", 0.02, 80),
        ("iDDPMPrecond", "eps_var", 0.006422337, 80),
    ],
)
def test_the_file_decides_the_model(
    tmp_path: Path, network: str, wrapper: str, prediction: str, low: float, high: float
) -> None:
    content = Snapshot(wrapper, network)
    found = edm.read(content.write(tmp_path / "file.pkl"))
    model = found.model
    assert (model.prediction, model.shape, model.num_classes) == (prediction, (8, 8, 3), 2)
    assert isinstance(model.process, Karras)
    np.testing.assert_allclose([model.process.sigma_min, model.process.sigma_max], [low, high], rtol=1e-6)
    assert (model.network.dropout, found.facts["arguments"]["dropout"]) == (0.0, 0.1)  # type: ignore[attr-defined]
    stored = edm_layout.to_state_dict(model.network, model.shape, found.params)
    assert stored.keys() == content.tensors.keys()
    for name, array in content.tensors.items():
        np.testing.assert_array_equal(stored[name], array)
    for array in matching.flatten(found.params).values():
        assert array.flags.owndata or array.base.flags.owndata  # nothing hangs on the file


@pytest.mark.fast
def test_constants_of_a_wrapper_are_used(tmp_path: Path) -> None:
    content = Snapshot(sigma_data=0.6, sigma_max=50.0, use_fp16=True)
    content.attributes |= {"sigma_data": 0.6, "sigma_max": 50.0, "use_fp16": True}
    model = edm.read(content.write(tmp_path / "file.pkl")).model
    assert (model.sigma_data, model.process) == (0.6, Karras(sigma_max=50.0))
    content = Snapshot("VPPrecond", beta_d=10.0, M=500, epsilon_t=0.01)
    low, high = (float(np.sqrt(np.expm1(5 * t**2 + 0.1 * t))) for t in (0.01, 1))
    content.attributes |= {"beta_d": 10.0, "M": 500, "epsilon_t": 0.01, "sigma_min": low, "sigma_max": high}
    model = edm.read(content.write(tmp_path / "file.pkl")).model
    assert model.time_input == VPInput(10.0, 0.1, 500)
    found = [model.process.sigma_min, model.process.sigma_max]  # type: ignore[attr-defined]
    np.testing.assert_allclose(found, [low, high])


# ---------------------------------------------------------------- EDM: snapshots of another model


def put(field: str, **values: Any) -> Callable[[Snapshot], None]:
    return lambda snapshot: getattr(snapshot, field).update(values)


def both(**values: Any) -> Callable[[Snapshot], None]:
    """Arguments of wrapper and network."""

    def change(snapshot: Snapshot) -> None:
        snapshot.kwargs |= values
        snapshot.inner |= values

    return change


def without(field: str, name: str) -> Callable[[Snapshot], None]:
    return lambda snapshot: getattr(snapshot, field).pop(name)


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Snapshot], None]:
    return lambda snapshot: snapshot.tensors.update({name: change(snapshot.tensors[name])})


def part(path: str, **facts: Any) -> Callable[[Snapshot], None]:
    """Other facts of a part, or attributes of it if they are no facts."""

    def late(made: Any) -> None:
        there = snapshots.facts_of(made, path)
        for name, value in facts.items():
            (there if name in there else there["state"])[name] = value

    return lambda snapshot: snapshot.late.append(late)


WEIGHT, BLOCK, FILTER = "map_layer0.weight", "model.enc.8x8_block0", "enc.4x4_down.conv0.resample_filter"
EDM_NAMES = "sigma_min, sigma_max|sigma_max, sigma_min"
UNFIT_SNAPSHOTS: dict[str, tuple[str, Callable[[Snapshot], None], str]] = {
    "an unknown wrapper": ("EDMPrecond", part("", class_name="EDMPrecomp"), "Did you mean 'EDMPrecond'"),
    "an unknown network": ("EDMPrecond", put("kwargs", model_type="SongVNet"), "model_type is 'SongVNet'"),
    "both unknown": (
        "EDMPrecond",
        lambda s: (put("kwargs", model_type="SongVNet")(s), part("model", class_name="SongVNet")(s)),  # type: ignore[func-returns-value]
        "Did you mean 'SongUNet'",
    ),
    "an argument of another wrapper": ("EDMPrecond", put("kwargs", beta_d=19.9), "Unknown argument 'beta_d'"),
    "an unknown argument": ("EDMPrecond", both(attention="flash"), "argument of SongUNet.* 'attention'"),
    "an argument of the wrapper only": (
        "EDMPrecond",
        lambda s: (put("kwargs", augment_dim=9)(s), put("inner", augment_dim=0)(s)),  # type: ignore[func-returns-value]
        "augment_dim 9 and 0",
    ),
    "an argument of the network only": ("EDMPrecond", put("inner", num_blocks=2), "num_blocks 1 and 2"),
    "no resolution": ("EDMPrecond", without("kwargs", "img_resolution"), "img_resolution"),
    "a resolution that is none": ("EDMPrecond", both(img_resolution="8"), "img_resolution"),
    "a truth for a number": ("EDMPrecond", both(num_blocks=True), "num_blocks"),
    "a huge width": ("EDMPrecond", both(model_channels=2**30), "model_channels"),
    "a huge number of blocks": ("EDMPrecond", both(num_blocks=2**30), "num_blocks"),
    "more blocks than there are": ("EDMPrecond", both(num_blocks=64), "128 blocks, but 10"),
    "a huge resolution": ("EDMPrecond", both(img_resolution=2**40), "img_resolution"),
    "a list without end": ("EDMPrecond", both(channel_mult=[1] * 1000), "channel_mult"),
    "one class": ("EDMPrecond", both(label_dim=1), "label_dim"),
    "use_fp16 in words": ("EDMPrecond", put("kwargs", use_fp16="no"), "use_fp16"),
    "no number of steps": ("VPPrecond", put("kwargs", M=1000.0), "M is 1000.0"),
    "a million steps": ("iDDPMPrecond", put("kwargs", M=10**6), "M is 1000000"),
    "a constant that is none": ("EDMPrecond", put("kwargs", sigma_data=float("nan")), "sigma_data"),
    "a constant below zero": ("VPPrecond", put("kwargs", beta_min=-0.1), "beta_min is -0.1, out of range"),
    "another constant than told": ("EDMPrecond", put("attributes", sigma_data=0.6), "sigma_data is 0.6.* give 0.5"),
    "another range than told": ("VEPrecond", put("attributes", sigma_min=0.03), "sigma_min is 0.03.* give 0.02"),
    "another range of the VP levels": ("VPPrecond", put("attributes", sigma_max=100.0), "sigma_max"),
    "an unknown attribute": ("EDMPrecond", put("attributes", sigma_dat=0.5), "'sigma_dat' Did you mean 'sigma_data'"),
    "no table": ("iDDPMPrecond", without("buffers", "u"), "buffers none instead of u"),
    "another table": ("iDDPMPrecond", lambda s: s.buffers.update(u=s.buffers["u"] * 1.001), "buffer u"),
    "a shorter table": ("iDDPMPrecond", lambda s: s.buffers.update(u=s.buffers["u"][1:]), "buffer u"),
    "a table that is not asked for": ("EDMPrecond", put("buffers", u=np.ones(3)), "buffers u instead of none"),
    "another eps of a norm": ("EDMPrecond", part(f"{BLOCK}.norm0", eps=1e-5), "enc.8x8_block0.norm0 has eps 1e-05"),
    "other groups": ("EDMPrecond", part(f"{BLOCK}.norm0", num_groups=2), "norm0 has num_groups 2"),
    "no scale of the sums": ("EDMPrecond", part(BLOCK, skip_scale=1), "skip_scale 1, but SongUNet computes with 0.7"),
    "two heads": ("EDMPrecond", part("model.enc.4x4_block0", num_heads=2), "num_heads 2"),
    "another embedding": ("EDMPrecond", part("model.map_noise", max_positions=1000), "max_positions 1000"),
    "an unknown part": ("EDMPrecond", part(BLOCK, class_name="UNetBlock2"), "unknown class 'UNetBlock2'"),
    "a version": ("EDMPrecond", part(BLOCK, version=7), "version 7"),
    "a type": ("EDMPrecond", part(BLOCK, type="klass"), "type 'klass'"),
    "arguments without names": ("EDMPrecond", part(BLOCK, _init_args=(4, 4)), "arguments without names"),
    "an array as an attribute": ("EDMPrecond", part(BLOCK, mask=snapshots.tensor(np.ones(3))), "mask is ndarray"),
    "a module as an attribute": ("EDMPrecond", part("", other=snapshots.persistent("Linear", {})), "other is _Object"),
    "a missing tensor": ("EDMPrecond", without("tensors", WEIGHT), f"missing .1.: {WEIGHT}"),
    "a tensor too much": (
        "EDMPrecond",
        put("tensors", **{"map_layer0.weight2": np.ones(3)}),
        "unknown .*weight2",
    ),
    "a transposed tensor": ("EDMPrecond", tensor(WEIGHT, lambda a: a.T), r"\(4, 16\), the model has \(16, 4\)"),
    "no number": ("EDMPrecond", tensor(WEIGHT, lambda a: spoil(a, np.nan)), f"not finite .1.: {WEIGHT}"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", UNFIT_SNAPSHOTS)
def test_snapshots_of_another_model_are_refused_saying_why(tmp_path: Path, name: str) -> None:
    wrapper, change, said = UNFIT_SNAPSHOTS[name]
    content = Snapshot(wrapper)
    change(content)
    path = content.write(tmp_path / "file.pkl")
    with pytest.raises(WeightsError, match=said) as error:
        edm.read(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 3000


@pytest.mark.fast
def test_filters_of_a_file_are_used_or_refused(tmp_path: Path) -> None:
    other = np.array([[[[0.4, 0.1], [0.3, 0.2]]]], np.float32)
    for network in ("SongUNet", "DhariwalUNet"):
        content = Snapshot(network=network)
        content.tensors[FILTER] = other
        path = content.write(tmp_path / "file.pkl")
        if network == "SongUNet":
            found = edm.read(path)
            stored = edm_layout.to_state_dict(found.model.network, found.model.shape, found.params)
            np.testing.assert_array_equal(stored[FILTER], other)
        else:
            with pytest.raises(WeightsError, match=FILTER):
                edm.read(path)


@pytest.mark.fast
def test_a_given_model_must_be_the_one_in_the_file(tmp_path: Path) -> None:
    path = Snapshot().write(tmp_path / "file.pkl")
    model = edm.read(path).model
    other_grid = dataclasses.replace(model.with_network(dropout=0.3), process=Karras(40))
    assert edm.read(path, other_grid).model is other_grid
    wider = edm.model_of("EDMPrecond", {**KWARGS, "model_type": "SongUNet", "model_channels": 8})
    with pytest.raises(WeightsError, match=r"network.ch is 4 instead of 8; network.emb_ch is 16 instead of 32.*path"):
        edm.read(path, wider)
    eps = dataclasses.replace(model, prediction="eps", time_input=VPInput())
    with pytest.raises(WeightsError, match=r"prediction is 'edm' instead of 'eps'"):
        edm.read(path, eps)


# ---------------------------------------------------------------- EDM: damaged and hostile snapshots

HOSTILE = zipfile.ZipFile(EDM / "hostile.zip")
EXPECT = json.loads(HOSTILE.read("expect.json"))
MIB = 2**20


@contextlib.contextmanager
def bounded(peak: int | None) -> Iterator[None]:
    """What happens inside takes no more memory; None does not ask, as asking takes several times longer.

    Work is bounded by `pickle_stream`'s own limits, of which "too many operations" below are tests.
    """
    if peak:
        tracemalloc.start()
    try:
        yield
        assert not peak or tracemalloc.get_traced_memory()[1] < peak
    finally:
        tracemalloc.stop()


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


# ---------------------------------------------------------------- EDM: published models


@pytest.mark.slow
@needs_full
def test_published_models_of_edm_have_the_published_trees() -> None:
    published = json.loads((FULL_EDM / "published_models.json").read_text())
    manifests = json.loads((FULL_EDM / "manifests.json").read_text())["manifests"]
    assert {f"{name}.pkl" for name, entry in PUBLISHED.items() if entry.format == "edm"} == published.keys()
    for name, facts in published.items():
        entry = PUBLISHED[name.removesuffix(".pkl")]
        assert entry.url == facts["url"]
        assert edm.model_of(facts["precond_class"], facts["init_kwargs"]) == entry.model
        shapes = edm_layout.tensor_shapes(entry.model.network, entry.model.shape)
        manifest = {n.removeprefix("model."): tuple(s) for n, (s, _) in manifests[facts["manifest"]]["tensors"].items()}
        manifest.pop("u", None)
        assert shapes == manifest


@pytest.mark.fast
def test_published_models_of_edm_describe_themselves() -> None:
    entries = [entry for entry in PUBLISHED.values() if entry.format == "edm"]
    assert len(entries) == 12
    for entry in entries:
        assert entry.url.startswith("https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/")
        assert entry.url.endswith(f"/{entry.name}.pkl")
        assert "CC BY-NC-SA 4.0" in entry.source
        assert Model.from_dict(json.loads(json.dumps(entry.model.to_dict()))) == entry.model


def test_import_of_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Snapshot().write(tmp_path / "edm-ffhq-64x64-uncond-vp.pkl")
    artefact = import_weights(path, tmp_path / "artefact")  # what the file holds, whatever it is called
    loaded = Artefact.load(tmp_path / "artefact")
    assert (loaded.model, loaded.steps) == (edm.read(path).model, 0)
    assert_same(loaded.params, matching.flatten(edm.read(path).params))
    assert_same(artefact.params, matching.flatten(loaded.params))
    told = loaded.provenance["imported_from"]
    assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (told["class"], told["arguments"]["dropout"]) == ("EDMPrecond", 0.1)
    fetched = Fetched(path, told["sha256"], path.stat().st_size)
    monkeypatch.setattr(weights, "fetch", lambda *args, **options: fetched)
    with pytest.raises(WeightsError, match=r"network.ch is 4 instead of 128"):
        import_weights("edm-ffhq-64x64-uncond-vp", tmp_path / "other")


# ---------------------------------------------------------------- download


@dataclass
class Site:
    """A server of one file, with what it does wrong."""

    content: bytes
    etag: str = '"one"'
    ranges: bool = True  # answers Range requests
    if_range: bool = True  # minds If-Range
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    status: int = 0  # answers with this error
    location: str = ""  # redirects there
    asked: list[str | None] = field(default_factory=list)  # the Range of each request
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        site, asked, condition = self.site, self.headers["Range"], self.headers["If-Range"]
        site.asked.append(asked)
        if site.status or site.location:
            self.send_response(site.status or 302)
            self.send_header("Location", site.location)
            self.end_headers()
            return
        partial = bool(asked and site.ranges and not (site.if_range and condition not in (None, site.etag)))
        begin = int(asked[6:-1]) if asked and partial else 0
        if begin >= len(site.content):
            self.send_response(416)
            self.end_headers()
            return
        body = site.content[begin:]
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {begin}-{len(site.content) - 1}/{len(site.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", site.etag)
        self.end_headers()
        self.wfile.write(body[: site.cuts.pop(0)] if site.cuts else body)


CONTENT = np.random.default_rng(0).bytes(100_000)
OTHER = np.random.default_rng(1).bytes(90_000)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    site = Site(CONTENT)
    server = HTTPServer(("127.0.0.1", 0), type("OneSite", (Handler,), {"site": site}))
    site.url = f"http://127.0.0.1:{server.server_port}/folder/cifar_1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


DONE = ["cifar_1", "cifar_1.json"]


@pytest.mark.fast
def test_download_reports_pins_and_leaves_nothing_else(site: Site, tmp_path: Path) -> None:
    reports: list[tuple[int, int | None]] = []
    found = fetch(site.url, tmp_path / "new", report=lambda done, total: reports.append((done, total)))
    assert found == (tmp_path / "new" / "cifar_1", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
    assert found.path.read_bytes() == CONTENT
    assert reports[-1] == (len(CONTENT), len(CONTENT))
    assert files_in(tmp_path / "new") == DONE
    pin = json.loads((tmp_path / "new" / "cifar_1.json").read_text())
    assert pin == {"url": site.url, "size": len(CONTENT), "sha256": found.sha256}
    assert fetch(site.url, tmp_path / "new", size=len(CONTENT), sha256=found.sha256) == found
    assert len(site.asked) == 1  # found, not fetched again


@pytest.mark.fast
@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(site: Site, tmp_path: Path, ranges: bool) -> None:
    site.ranges, site.cuts = ranges, [40_000, 20_000]
    assert fetch(site.url, tmp_path).path.read_bytes() == CONTENT
    second = 60_000 if ranges else 20_000  # without ranges each answer begins at the beginning
    assert site.asked == [None, "bytes=40000-", f"bytes={second}-"]
    assert files_in(tmp_path) == DONE


@pytest.mark.fast
def test_after_too_many_interruptions_the_next_call_goes_on(site: Site, tmp_path: Path) -> None:
    site.cuts = [10_000] * download.ATTEMPTS
    with pytest.raises(WeightsError, match="the next call goes on"):
        fetch(site.url, tmp_path)
    assert len(site.asked) == download.ATTEMPTS
    assert fetch(site.url, tmp_path).path.read_bytes() == CONTENT
    assert site.asked[-1] == "bytes=30000-"


@pytest.mark.fast
@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("new", [OTHER, OTHER[:5000]])
def test_two_versions_of_a_file_are_never_mixed(site: Site, tmp_path: Path, if_range: bool, new: bytes) -> None:
    site.cuts = [10_000] * download.ATTEMPTS
    with pytest.raises(WeightsError):
        fetch(site.url, tmp_path)
    site.content, site.etag, site.if_range = new, '"two"', if_range
    assert fetch(site.url, tmp_path).path.read_bytes() == new
    assert files_in(tmp_path) == DONE


@pytest.mark.fast
def test_a_complete_part_is_used(site: Site, tmp_path: Path) -> None:
    found = fetch(site.url, tmp_path)
    found.path.rename(tmp_path / "cifar_1.part")
    (tmp_path / "cifar_1.json").unlink()
    record = {"url": site.url, "total": len(CONTENT), "validator": site.etag}
    (tmp_path / "cifar_1.part.json").write_text(json.dumps(record))
    assert fetch(site.url, tmp_path) == found
    assert len(site.asked) == 1


@pytest.mark.fast
@pytest.mark.parametrize("expected", [{"sha256": "0" * 64}, {"size": 99_999}, {"size": 100_001}])
def test_another_file_than_expected_is_refused(site: Site, tmp_path: Path, expected: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="expected"):
        fetch(site.url, tmp_path, **expected)
    assert files_in(tmp_path) == []


@pytest.mark.fast
def test_a_pinned_file_must_stay_the_same(site: Site, tmp_path: Path) -> None:
    found = fetch(site.url, tmp_path)
    found.path.write_bytes(OTHER)
    with pytest.raises(WeightsError, match=r"changed or damaged. Delete"):
        fetch(site.url, tmp_path)
    found.path.unlink()
    site.content = CONTENT[:-1] + b"?"
    with pytest.raises(WeightsError, match=r"sha256 .* is expected.*cifar_1\.json"):
        fetch(site.url, tmp_path)
    assert files_in(tmp_path) == ["cifar_1.json"]
    site.content = CONTENT
    assert fetch(site.url, tmp_path) == found
    with pytest.raises(WeightsError, match="pins sha256"):
        fetch(site.url, tmp_path, sha256="0" * 64)
    with pytest.raises(WeightsError, match="pins a file from"):
        fetch(site.url.replace("folder", "elsewhere"), tmp_path)


@pytest.mark.fast
@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/file",
        "ftp://example.com/file",
        "file:///etc/passwd",
        "https://example.com/",
        "https://e.com/.x",
    ],
)
def test_addresses_that_are_not_fetched(url: str, tmp_path: Path) -> None:
    def never(*args: Any, **options: Any) -> None:
        pytest.fail("a connection was opened")

    with pytest.raises(WeightsError, match=r"not fetched|does not end"):
        fetch(url, tmp_path, opener=never)


@pytest.mark.fast
@pytest.mark.parametrize("location", ["http://example.com/cifar_1", "file:///etc/passwd"])
def test_redirections_are_checked(site: Site, tmp_path: Path, location: str) -> None:
    site.location = location
    with pytest.raises(WeightsError, match=r"not fetched|Could not download"):
        fetch(site.url, tmp_path)
    assert len(site.asked) == 1


@pytest.mark.fast
@pytest.mark.parametrize(("status", "calls"), [(404, 1), (403, 1), (503, 3)])
def test_errors_of_the_server(site: Site, tmp_path: Path, status: int, calls: int) -> None:
    site.status = status
    with pytest.raises(WeightsError, match=f"{site.url}.*{status}.*path of the file"):
        fetch(site.url, tmp_path)
    assert len(site.asked) == calls


def answers(headers: dict[str, str], body: list[bytes], pause: float = 0.0) -> Any:
    """An opener whose server sends these headers and pieces, then closes the connection."""

    def serve(connection: socket.socket) -> None:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode())
        with contextlib.suppress(OSError):  # the client has had enough
            for piece in body:
                connection.sendall(piece)
                time.sleep(pause)
        connection.close()

    def opener(request: Any, timeout: float) -> Any:
        ours, theirs = socket.socketpair()
        threading.Thread(target=serve, args=(theirs,), daemon=True).start()
        response = HTTPResponse(ours)
        ours.close()  # the response has a file of its own
        response.begin()
        return response

    return opener


CHUNKS = [b"%x\r\n%s\r\n" % (len(part), part) for part in (CONTENT[:70_000], CONTENT[70_000:], b"")]
ADDRESS = "https://example.com/cifar_1"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("headers", "body", "message"),
    [
        ({"Content-Encoding": "gzip", "Content-Length": "100000"}, [CONTENT], "encoding 'gzip'"),
        ({}, [CONTENT[:5000]], "how long"),
        ({"Content-Length": "9" * 5000}, [CONTENT], "how long"),
        ({"Transfer-Encoding": "chunked"}, CHUNKS[:1], "Could not download"),
        ({"Content-Length": "100000"}, [CONTENT[:5000]], "ended early"),
    ],
)
def test_a_transfer_that_may_not_be_whole_is_not_pinned(
    headers: dict[str, str], body: list[bytes], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with pytest.raises(WeightsError, match=message):
        fetch(ADDRESS, tmp_path, opener=answers(headers, body))
    assert not {"cifar_1", "cifar_1.json"} & set(files_in(tmp_path))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("headers", "body", "known"),
    [
        ({"Transfer-Encoding": "chunked"}, CHUNKS, {}),
        ({}, [CONTENT], {"size": len(CONTENT)}),
        ({}, [CONTENT], {"sha256": hashlib.sha256(CONTENT).hexdigest()}),
    ],
)
def test_a_transfer_without_a_length_whose_end_is_known(
    headers: dict[str, str], body: list[bytes], known: dict[str, Any], tmp_path: Path
) -> None:
    assert fetch(ADDRESS, tmp_path, opener=answers(headers, body), **known).path.read_bytes() == CONTENT


@pytest.mark.fast
def test_a_server_that_sends_next_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(download, "TIMEOUT", 0.02)
    drip = answers({"Content-Length": "100000"}, [b"x"] * 100_000, pause=0.005)
    with pytest.raises(WeightsError, match=r"only \d+ bytes"):
        fetch(ADDRESS, tmp_path, opener=drip)


@pytest.mark.fast
def test_a_part_without_a_version_is_not_gone_on_with(site: Site, tmp_path: Path) -> None:
    site.etag, site.cuts = "", [10_000]
    assert fetch(site.url, tmp_path).path.read_bytes() == CONTENT
    assert site.asked == [None, None]


@pytest.mark.fast
def test_two_downloads_of_one_file_wait_for_each_other(site: Site, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: fetch(site.url, tmp_path), range(4)))
    assert len(found) == len(site.asked) == 1
    assert files_in(tmp_path) == DONE


@pytest.mark.fast
def test_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    calls = []

    def offline(request: Any, timeout: float) -> None:
        calls.append(request.full_url)
        raise URLError("Name or service not known")

    url = PUBLISHED["cifar_1"].url
    with pytest.raises(WeightsError, match=f"{url}.*not known.*give the path of the file"):
        fetch(url, tmp_path, opener=offline)
    assert calls == [url] * download.ATTEMPTS


# ---------------------------------------------------------------- exchange


@pytest.mark.fast
def test_export_and_back(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    params = random_arrays(0)
    params |= {
        "half.precision/kernel": params[DENSE].astype(jnp.bfloat16),
        "transposed": params[DENSE].T,
        "zero-d": jnp.ones(()),
    }
    description = {"model": MODEL.to_dict(), "steps": 8, "provenance": {"text": "ünï"}}
    path = exchange.save(tmp_path / "new" / "model.safetensors", matching.unflatten(params), description)
    assert files_in(path.parent) == ["model.safetensors"]
    found, described = exchange.load(path)
    assert described == json.loads(json.dumps(description))
    assert Model.from_dict(described["model"]) == MODEL
    for arrays in (matching.flatten(found), load_file(path)):  # also in plain Python
        assert arrays.keys() == params.keys()
        for name, value in params.items():
            assert arrays[name].dtype == value.dtype
            np.testing.assert_array_equal(arrays[name], value)


@pytest.mark.fast
def test_an_export_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exchange.save(tmp_path / "model.safetensors", {"a": np.zeros(2)}, {})
    for params, description in (
        ({"a/b": np.zeros(2)}, {}),
        ({"a": np.zeros(2)}, {"x": float("nan")}),
        ({"a": np.array("x")}, {}),
    ):
        with pytest.raises(ValueError):
            exchange.save(path, params, description)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        exchange.save(path, {"a": np.ones(2)}, {})
    assert files_in(tmp_path) == ["model.safetensors"]
    np.testing.assert_array_equal(exchange.load(path)[0]["a"], np.zeros(2))


@pytest.mark.fast
def test_files_that_were_not_exported_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save

    path = tmp_path / "file"
    arrays = {"a": np.zeros(2, np.float32)}
    good = exchange.save(path, arrays, {"x": 1}).read_bytes()
    foreign = [save(arrays), save(arrays, {"format": "pt"}), save(arrays, {exchange.KEY: "{"})]
    foreign += [save(arrays, {exchange.KEY: text}) for text in ("[1]", "[" * 100_000)]
    clash = save({"a": arrays["a"], "a/b": arrays["a"]}, {exchange.KEY: "{}"})
    garbage = [b"", b"12345678", np.random.default_rng(0).bytes(500), b"\xff" * 8 + b"{}", pickle.dumps(Bomb())]
    for content in (*foreign, clash, *garbage, *(good[:length] for length in range(len(good))), good + b"x"):
        with pytest.raises(WeightsError):
            exchange.load(write(path, content))


@pytest.mark.fast
def test_changed_anywhere_an_export_is_read_or_refused(tmp_path: Path) -> None:
    path, rng = tmp_path / "file", np.random.default_rng(0)
    good = exchange.save(path, {"a": np.zeros(2, np.float32)}, {"x": 1}).read_bytes()
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] = rng.integers(256)
        try:
            exchange.load(write(path, bytes(bad)))
        except WeightsError:
            continue


ABOUT = {"model": MODEL.to_dict(), "steps": 8, "provenance": {"text": "x"}}


def test_an_exported_model_is_read_as_written(tmp_path: Path) -> None:
    params = random_arrays(0)
    path = exchange.save(tmp_path / "model.safetensors", matching.unflatten(params), ABOUT)
    found = exchange.read(path, MODEL)
    assert_same(found.params, params)
    assert (found.model, found.steps, found.facts) == (MODEL, 8, {"text": "x"})
    with pytest.raises(WeightsError, match="another model"):
        exchange.read(path, dataclasses.replace(MODEL, prediction="eps"))


NETWORK = ABOUT["model"]["network"]
WRONG_DESCRIPTIONS: list[tuple[dict[str, Any], str]] = [
    *(({name: None}, f"has {name} None") for name in ABOUT),
    *(({"steps": steps}, "steps") for steps in (-1, 2**40, True, 1.5, "8")),
    ({"model": {}}, "no model"),
    ({"model": ABOUT["model"] | {"shape": 4}}, "no model"),
    ({"model": ABOUT["model"] | {"prediction": ["x"]}}, "no model"),
    ({"model": ABOUT["model"] | {"network": NETWORK | {"num_res_blocks": 60_000}}}, "60000 blocks"),
    ({"model": ABOUT["model"] | {"network": NETWORK | {"ch": 2**40}}}, "plausible"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_DESCRIPTIONS)
def test_descriptions_of_no_plausible_model_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = exchange.save(tmp_path / "x.safetensors", matching.unflatten(random_arrays(0)), ABOUT | change)
    with pytest.raises(WeightsError, match=message):
        exchange.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({DENSE: None}, "missing"),
        ({"more": np.zeros(1, np.float32)}, "unknown to the model"),
        ({DENSE: np.zeros((8, 32), np.float32)}, "transposed"),
        ({DENSE: np.zeros((32, 8), np.int32)}, "another type"),
        ({DENSE: np.full((32, 8), np.inf, np.float32)}, "not finite"),
    ],
)
def test_exports_that_do_not_fit_their_model_are_refused(tmp_path: Path, change: Flat, message: str) -> None:
    params = {name: value for name, value in (random_arrays(0) | change).items() if value is not None}
    exchange.save(tmp_path / "x.safetensors", matching.unflatten(params), ABOUT)
    with pytest.raises(WeightsError, match=message):
        import_weights(tmp_path / "x.safetensors", tmp_path / "artefact")
    assert not (tmp_path / "artefact" / "model.json").exists()


# ---------------------------------------------------------------- the golden check of weights


def variants(layout: str) -> Any:
    """Published trees beside their hyper-parameters, in some layouts that a file of them may have."""
    manifests = json.loads((BTD / "manifests.json").read_text())
    tree = manifests["cifar_base"]
    arguments = {"ch": 256, "emb_ch": 1024, "ch_mult": [1, 1, 1], "num_res_blocks": 3, "attn_resolutions": [8, 16]}
    arguments |= {"num_heads": 1, "head_dim": None, "dropout": 0.2, "resblock_resample": True}
    arguments |= {"logsnr_input_type": "linear", "logsnr_scale_range": [-10.0, 10.0]}
    return {
        "flat": {"one": tree | arguments},
        "nested": {"one": tree | {"args": arguments}},
        "list": {
            "note": "words",
            "variants": [tree | {"name": "one", "config": {"mean_type": "x", "args": arguments}}],
        },
        "another width": {"one": tree | {"args": arguments | {"ch": 128}}},
    }[layout]


@pytest.mark.parametrize("layout", ["flat", "nested", "list", "another width"])
def test_golden_check_of_trees_with_hyper_parameters(tmp_path: Path, layout: str) -> None:
    (tmp_path / "manifest_variants.json").write_text(json.dumps(variants(layout)))
    tally = golden_check.check(tmp_path)
    assert tally.count("NOT HANDLED") == 0
    assert tally.count("PASS") >= 3
    assert bool(tally.count("FAIL")) == (layout == "another width")


def test_golden_check_of_checkpoints_can_fail(tmp_path: Path) -> None:
    good, bad = BTD / "checkpoints" / "old_layout.msgpack", tmp_path / "garbage.msgpack"
    (tmp_path / "expected.npz").write_bytes((BTD / "checkpoints" / "expected.npz").read_bytes())
    write(bad, good.read_bytes())  # listed as one that must be refused
    content = flax_file.read(good)
    params = matching.flatten(content["ema_params"])
    params["conv_out/bias"] = params["conv_out/bias"] + 1
    write(tmp_path / "old_layout.msgpack", {**content, "ema_params": matching.unflatten(params)})
    failed = {
        (line.file, line.array)
        for line in golden_check.check(tmp_path, only=["*.msgpack"]).lines
        if line.verdict == "FAIL"
    }
    assert ("garbage.msgpack", "garbage: refused") in failed
    assert ("old_layout.msgpack", "f64/out_ema") in failed
    assert ("old_layout.msgpack", "params/conv_out/bias") in failed
