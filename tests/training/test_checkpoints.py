"""Checkpoints: a damaged one is put aside for the one before it."""

from __future__ import annotations

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from toys import equal

from diffusion_distill.denoisers.model import Model
from diffusion_distill.training import checkpoint, checksum, sharding
from diffusion_distill.training.checkpoint import Checkpoints
from diffusion_distill.training.optimizers import OptimizerSettings, make_optimizer

# --- checkpoints


@pytest.mark.fast
def test_a_checksum_sees_every_bit_and_not_the_devices() -> None:
    tree = {"a": np.random.default_rng(0).normal(size=(8, 50)).astype(np.float32), "b": np.arange(5, dtype=np.int32)}
    before = np.asarray(checksum.checksums(tree))
    spread = jax.device_put(tree["a"], sharding.split(sharding.data_mesh()))
    chex.assert_trees_all_equal(checksum.checksums({"a": spread, "b": tree["b"]}), before)
    rng = np.random.default_rng(1)
    for _ in range(50):
        bits = tree["a"].copy().view(np.uint32)
        bits[rng.integers(8), rng.integers(50)] ^= np.uint32(1 << rng.integers(32))
        changed = np.asarray(checksum.checksums({"a": bits.view(np.float32), "b": tree["b"]}))
        assert changed[0] != before[0] and changed[1] == before[1]
    assert checksum.checksums({"a": tree["a"][::-1], "b": tree["b"]})[0] != before[0]
    assert checksum.fingerprint(tree) != checksum.fingerprint({"a": tree["a"], "b": tree["b"][::-1]})


@pytest.mark.fast
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_devices_and_the_host_compute_one_checksum(dtype: str) -> None:
    """That of the equation, in whole numbers of Python; so checkpoints may be read where they were not written."""
    for shape in [(), (0,), (3, 5), (70, 1001)]:  # the last has more elements than are summed together on the host
        array = np.random.default_rng(0).integers(0, 200, shape).astype(jnp.dtype(dtype))
        bits = array.ravel().view(f"uint{8 * array.dtype.itemsize}").tolist()
        expected = sum((2 * i + 1) * element for i, element in enumerate(bits)) % 2**32
        assert int(checksum._on_host(array)) == int(checksum._checksum(array)) == expected


@pytest.mark.fast
@pytest.mark.parametrize("params", [1, 2, 8])
def test_on_cpus_saving_compiles_nothing(
    params: int, tiny_model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program for each shape, and for each device that has a copy, made the first save take as long as ten others."""
    monkeypatch.setattr(sharding, "LEAST_SPLIT", 64)
    mesh = sharding.make_mesh(params=params)
    state = sharding.place(toys.trained_state(tiny_model, make_optimizer(OptimizerSettings())), mesh)
    checkpoints, odd = Checkpoints(tmp_path), {"odd": jnp.zeros((17 * mesh.size, 3))}
    state = state.replace(params={**state.params, **sharding.place(odd, mesh)})
    with jax.log_compiles():
        checkpoints.save(1, state)
        checkpoints.close()
    compiled = [record.message for record in caplog.records if "ompil" in record.message]
    assert not compiled
    with jax.log_compiles():
        checksum._checksum(state.params["odd"])
    assert [record for record in caplog.records if "ompil" in record.message], "compiling would have been seen"
    checkpoints = Checkpoints(tmp_path)
    assert equal(checkpoints.restore(state), state)
    checkpoints.close()


@pytest.mark.fast
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("PERMISSION_DENIED: Error")])
def test_a_checkpoint_that_may_not_be_read_is_not_damaged(
    error: Exception, tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python and TensorStore say it; it would be moved aside, and the one before it taken."""

    def refuse(*_: object) -> None:
        raise error

    state = toys.trained_state(tiny_model, make_optimizer(OptimizerSettings()))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_read", refuse)
        with pytest.raises(type(error)) as raised:
            checkpoints.restore(state)
    assert raised.value is error
    assert equal(checkpoints.restore(state), state)
    checkpoints.close()


def spoil(folder: Path, how: str) -> None:
    """Damages the largest array file of a checkpoint."""
    file = max(folder.glob("params/**/d/*"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 255
    file.write_bytes(content[: len(content) // 2] if how == "truncate" else content)


@pytest.mark.parametrize("how", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(how: str, tiny_model: Model, tmp_path: Path) -> None:
    state = toys.trained_state(tiny_model, make_optimizer(OptimizerSettings()))
    states = {step: state.replace(step=jnp.int32(step), params=toys.parameters(tiny_model, step)) for step in (3, 6, 9)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3, about={"method": "by hand"})
    for step, at in states.items():
        checkpoints.save(step, at, phase="first")
    checkpoints.close()
    about = json.loads((tmp_path / "checkpoints" / "9" / "about" / "metadata").read_text())
    assert about == {"update": 9, "phase": "first", "method": "by hand"}
    spoil(tmp_path / "checkpoints" / "9", how)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    with pytest.warns(UserWarning, match=r"Checkpoint 9 is damaged .*damaged_checkpoints/9"):
        found = checkpoints.restore(state)
    assert equal(found, states[6])
    assert (tmp_path / "damaged_checkpoints" / "9" / "params").is_dir(), "nothing is thrown away"
    checkpoints.save(8, states[9].replace(step=jnp.int32(8)))  # older than the damaged one, and yet saved
    assert checkpoints.latest == 8
    checkpoints.close()
    for step in (3, 6, 8):
        spoil(tmp_path / "checkpoints" / str(step), how)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    with pytest.raises(ValueError, match=r"None of the checkpoints .* can be read.*Delete the folder"):
        checkpoints.restore(state)
    checkpoints.close()


@pytest.mark.fast
def test_an_update_damaged_twice_is_moved_aside_twice(tmp_path: Path) -> None:
    for taken in ("20", "20_2"):
        assert checkpoint._free(tmp_path / "20") == tmp_path / taken
        (tmp_path / taken).mkdir()
