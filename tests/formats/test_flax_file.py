"""Checkpoints of flax are read exactly; whatever else is refused by name."""

from __future__ import annotations

import pickle
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization
from weight_files import (
    DENSE,
    KERNEL,
    MODEL,
    NORM,
    SHAPES,
    UNET,
    Bomb,
    Flat,
    assert_same,
    content_of,
    random_arrays,
    spoil,
    write,
)

from diffusion_distill.denoisers.model import Model
from diffusion_distill.formats import flax_file
from diffusion_distill.networks import UNet
from diffusion_distill.weights import (
    WeightsError,
    exchange,
    match,
    matching,
    progressive,
)


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


@pytest.mark.fast
def test_a_large_array_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its place, and not by way of msgpack, which would hold it three times; what follows it is read too."""
    large = np.arange(2**21, dtype=np.float32).reshape(2, -1)
    content = {"a": 1, "large": large, "inside": {"also": -large, "small": np.ones(3)}, "z": "the end"}
    path = write(tmp_path / "file", content)
    tracemalloc.start()
    found = flax_file.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * large.nbytes + 8 * 2**20
    np.testing.assert_array_equal(found["large"], large)
    np.testing.assert_array_equal(found["inside"]["also"], -large)
    assert found["z"] == "the end" and found["inside"]["small"].sum() == 3
    for cut in (8 * 2**20 - 100, 8 * 2**20 + 100):
        (tmp_path / "cut").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(WeightsError, match="cannot be read as a flax checkpoint"):
            flax_file.read(tmp_path / "cut")
    monkeypatch.setattr(flax_file, "MAX_ENTRIES", 5)
    with pytest.raises(WeightsError, match="more than 5 entries"):
        flax_file.read(path)


# ---------------------------------------------------------------- files for another model


def changed(**changes: Any) -> Callable[[Flat], None]:
    return lambda params: params.update({name.replace("__", "/"): value for name, value in changes.items()})


def set_value(path: str, value: Any) -> Callable[[Flat], None]:
    return lambda params: params.update({path: value(params[path]) if callable(value) else value})


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
