"""Checkpoints: a damaged one is put aside for the one before it."""

from __future__ import annotations

import json
import os
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
from diffusion_distill.training.state import TrainState

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


def numbered_states(model: Model, *steps: int) -> dict[int, TrainState]:
    """States that differ, by their update numbers."""
    state = toys.trained_state(model, make_optimizer(OptimizerSettings()))
    return {step: state.replace(step=jnp.int32(step), params=toys.parameters(model, step)) for step in steps}


def files_in(folder: Path) -> dict[str, bytes]:
    """Their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.fast
@pytest.mark.parametrize("cores", [1, 16])
def test_a_checkpoint_on_another_disk_is_read_and_never_deleted(
    cores: int, tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more than three cores Orbax deletes files in parallel, also those behind a link."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    states, folder = numbered_states(tiny_model, 3, 6, 9, 12, 15), tmp_path / "run" / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (3, 6):
        checkpoints.save(step, states[step])
    checkpoints.close()
    (tmp_path / "disk").mkdir()
    (folder / "6").rename(tmp_path / "disk" / "6")
    (folder / "6").symlink_to(Path("..", "..", "disk", "6"))
    before = files_in(tmp_path / "disk")
    with pytest.warns(UserWarning, match=r"checkpoints/6 is a link to \.\./\.\./disk/6\. It stays"):
        checkpoints = Checkpoints(folder)
    assert checkpoints.latest == checkpoint.latest_in(folder) == 6
    assert equal(checkpoints.restore(states[3]), states[6])
    for step in (9, 12, 15):
        checkpoints.save(step, states[step])
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"6", "12", "15"}
    assert before and files_in(tmp_path / "disk") == before


@pytest.mark.fast
def test_a_damaged_checkpoint_on_another_disk_stays_there(tiny_model: Model, tmp_path: Path) -> None:
    states, folder = numbered_states(tiny_model, 3, 6), tmp_path / "run" / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step, at in states.items():
        checkpoints.save(step, at)
    checkpoints.close()
    (folder / "6").rename(tmp_path / "disk")
    (folder / "6").symlink_to(tmp_path / "disk")
    spoil(tmp_path / "disk", "flip")
    before = files_in(tmp_path / "disk")
    with pytest.warns(UserWarning, match=r"is a link to"):
        checkpoints = Checkpoints(folder)
    with pytest.warns(UserWarning, match="Checkpoint 6 is damaged"):
        assert equal(checkpoints.restore(states[3]), states[3])
    checkpoints.close()
    assert (tmp_path / "run" / "damaged_checkpoints" / "6").is_symlink() and files_in(tmp_path / "disk") == before


@pytest.mark.fast
@pytest.mark.parametrize("what", ["a link to nothing", "a file"])
def test_what_stands_where_a_checkpoint_belongs_is_told_before_training(
    what: str, tiny_model: Model, tmp_path: Path
) -> None:
    """Else a run would begin anew whose disk is not mounted, and fail as soon as it comes to that update again."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, numbered_states(tiny_model, 3)[3])
    checkpoints.close()
    for step in ("2", "6"):
        (tmp_path / step).symlink_to("nowhere") if what == "a link to nothing" else (tmp_path / step).write_text("")
    with pytest.raises(ValueError, match=f"6 is {what}, where a checkpoint belongs.*goes on from update 3"):
        Checkpoints(tmp_path)
    (tmp_path / "6").unlink()
    Checkpoints(tmp_path).close()  # what is older than the newest checkpoint is in nobody's way


@pytest.mark.fast
def test_an_update_damaged_twice_is_moved_aside_twice(tmp_path: Path) -> None:
    for taken in ("20", "20_2"):
        assert checkpoint._free(tmp_path / "20") == tmp_path / taken
        (tmp_path / taken).mkdir()
