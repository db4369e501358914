"""Students as low-rank adapters: against the plain parameters that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_networks
import toys
from toys import equal

from diffusion_distill import api
from diffusion_distill.api.ahead import Ahead
from diffusion_distill.base import interrupts
from diffusion_distill.data.sources import from_arrays
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising, Knowledge, Tract
from diffusion_distill.networks import DiT, UNet
from diffusion_distill.training import checkpoint, loop, low_rank, sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.optimizers import OptimizerSettings, make_optimizer
from diffusion_distill.training.state import TrainState, create, next_phase
from diffusion_distill.training.step import mean_loss_of

SOURCE = toys.GaussianSource(toys.Gaussian(mean=0.1, std=0.4), size=64)
METHOD = Tract((8, 4, 1), length=1024, learning_rate=1e-2)  # two phases of 32 updates
SETTINGS = api.Settings(batch_size=16, log_every=1, low_rank=2)
UNET = Model(UNet(32, 64, 1, (1,), 1, (8,), num_heads=2), (8, 8, 1), prediction="v")


def trained_adapters(base: Any, seed: int, rank: int = 4) -> Any:
    """Adapters that change the base, by random numbers."""
    rng, zero = np.random.default_rng(seed), low_rank.init(jax.random.key(0), base, rank)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32), zero)


# --- trees of parameters


@pytest.mark.fast
@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((5, 7), (5, 7)),
        ((3, 3, 8, 16), (72, 16)),
        ((3, 3, 256, 3), (2304, 3)),
        ((64, 4, 16), (64, 64)),  # attention's q, k, v
        ((4, 16, 64), (64, 64)),  # and its output
        ((64, 1, 64), (64, 64)),  # one head
        ((3, 16, 32), (48, 32)),  # a convolution along one axis
    ],
)
def test_a_kernel_is_a_matrix(shape: tuple[int, ...], sides: tuple[int, int]) -> None:
    assert low_rank.sides(shape) == sides


@pytest.mark.fast
def test_fresh_adapters_change_nothing_and_are_where_kernels_are() -> None:
    base = toys.parameters(UNET)
    adapters = low_rank.init(jax.random.key(0), base, 40)
    chex.assert_trees_all_equal(low_rank.merged(base, adapters), base)
    chex.assert_tree_all_finite(adapters)
    conv = adapters["down_0.block_0"]["conv1"]["kernel"]
    assert conv["down"].shape == (9 * 32, 32) and conv["up"].shape == (32, 32)  # clipped to the shorter side
    assert conv["down"].std() == pytest.approx((3 * 9 * 32) ** -0.5, rel=0.05)  # that of U(-b, b), b = fan_in^-1/2
    kernels = [path for path, leaf in jax.tree_util.tree_flatten_with_path(base)[0] if path[-1].key == "kernel"]
    assert len(jax.tree.leaves(adapters)) == 2 * len(kernels) > 20


NETWORKS: dict[str, Any] = {
    "unet": small_networks.UNet(**small_networks.LABELLED),
    **small_networks.EDM_NETWORKS,
    "dit": DiT(width=32, depth=1, num_heads=2, out_ch=2),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_adapters_for_all_it_learns_in_matrices(name: str) -> None:
    """The rest are biases, scales, and the fixed filters of resampling."""
    base = jax.eval_shape(Model(NETWORKS[name], (8, 8, 2)).init, jax.random.key(0))
    adapters = jax.eval_shape(lambda base: low_rank.init(jax.random.key(0), base, 2), base)
    adapted = {place.rpartition("/")[0] for place in small_networks.flatten(adapters)}
    rest = {place: leaf for place, leaf in small_networks.flatten(base).items() if place not in adapted}
    assert {place.rpartition("/")[2] for place, leaf in rest.items() if leaf.ndim > 1} <= {"bias", "filter"}
    assert len(adapted) > 10 and jax.eval_shape(low_rank.merged, base, adapters) == base


@pytest.mark.fast
def test_a_pattern_chooses_and_the_rest_stays_frozen() -> None:
    base = toys.parameters(UNET)
    adapters = low_rank.init(jax.random.key(0), base, 2, r"attn_\d+/[qkv]/")
    moved = low_rank.merged(base, jax.tree.map(jnp.ones_like, adapters))
    changed = jax.tree.map(lambda a, b: float(jnp.abs(a - b).min()), moved, base)
    for path, change in jax.tree_util.tree_flatten_with_path(changed)[0]:
        place = "/".join(key.key for key in path)
        assert change == pytest.approx(
            2 if "attn" in place and place.split("/")[1] in "qkv" and "kernel" in place else 0
        )


@pytest.mark.fast
def test_full_rank_reaches_every_kernel() -> None:
    """The singular value decomposition of a difference is an adapter that makes it."""
    base, wanted = toys.parameters(UNET, 1), toys.parameters(UNET, 2)
    pattern = "conv_in/kernel|q/kernel|block_0/conv1/kernel"
    adapters = low_rank.init(jax.random.key(0), base, 10**6, pattern)
    for name, layer in (("down_0.block_0", "conv1"), ("mid.attn_1", "q")):
        kernel, pair = base[name][layer]["kernel"], adapters[name][layer]["kernel"]
        change = (wanted[name][layer]["kernel"] - kernel).reshape(pair["down"].shape[0], -1)
        u, s, vt = np.linalg.svd(change, full_matrices=False)
        adapters[name][layer]["kernel"] = {"down": jnp.asarray(u * s), "up": jnp.asarray(vt)}
        found = low_rank.merged(base, adapters)[name][layer]["kernel"]
        chex.assert_trees_all_close(found, wanted[name][layer]["kernel"], atol=1e-5)


# --- the update


def loss_and_gradient(model: Model, state: TrainState, phase: int = 0) -> tuple[float, Any]:
    """Those of a phase, for a fixed batch."""
    rows = jax.tree.map(jnp.asarray, loop.rows_of(METHOD.phases(model, 16)[phase]))
    arguments = state.params, state, SOURCE.gather(np.arange(64)), rows, jax.random.key(3)
    loss, gradient = jax.jit(jax.value_and_grad(mean_loss_of(METHOD.losses, model, model)))(*arguments)
    return float(loss), gradient


def test_loss_and_gradient_are_those_of_the_merged_parameters(tiny_model: Model) -> None:
    """dL/d down = G·upᵀ, dL/d up = downᵀ·G, where G is the gradient of the plain parameters."""
    base, optimizer = toys.parameters(tiny_model), make_optimizer(OptimizerSettings())
    student, teacher = trained_adapters(base, 1), trained_adapters(base, 2)
    adapted = create(student, optimizer, METHOD.averages, teacher, base)
    plain = create(low_rank.merged(base, student), optimizer, METHOD.averages, low_rank.merged(base, teacher))
    (low, by_adapters), (full, by_kernels) = (loss_and_gradient(tiny_model, state) for state in (adapted, plain))
    assert low == pytest.approx(full, rel=1e-5)
    for layer, pair in student.items():
        g, down, up = np.asarray(by_kernels[layer]["kernel"]), pair["kernel"]["down"], pair["kernel"]["up"]
        expected = {"down": g @ np.asarray(up).T, "up": np.asarray(down).T @ g}
        assert np.abs(g).max() > 0
        chex.assert_trees_all_close(by_adapters[layer]["kernel"], expected, rtol=1e-4, atol=1e-4 * np.abs(g).max())


@pytest.mark.fast
def test_a_later_phase_starts_from_the_teachers_adapters(tiny_model: Model) -> None:
    base, optimizer = toys.parameters(tiny_model), make_optimizer(OptimizerSettings())
    first = low_rank.init(jax.random.key(0), base, 4)
    state = create(first, optimizer, METHOD.averages, first, base)
    average = state.averages["eval"].replace(params=trained_adapters(base, 5))
    state = state.replace(averages={**state.averages, "eval": average}, step=jnp.int32(8))
    for restart in (True, False):
        later = next_phase(state, optimizer, restart, reset_average=False)
        assert equal(later.teacher, average.params) and equal(later.base, base) and int(later.step) == 8
        assert equal(later.params, average.params if restart else first)


# --- runs


def stored(folder: Path) -> set[str]:
    """The names of what a checkpoint has."""
    return {
        path.name for path in (folder / "checkpoints" / str(checkpoint.latest_in(folder / "checkpoints"))).iterdir()
    }


def test_a_run_keeps_adapters_and_gives_plain_students(
    teacher: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, one_device: None
) -> None:
    """Two phases, at once and interrupted in the second: the same bits."""
    before = jax.tree.map(np.array, teacher.params)
    whole = api.distill(teacher, SOURCE, METHOD, SETTINGS, tmp_path / "whole")
    said = capsys.readouterr().out
    made, asked = Ahead(teacher.model, METHOD, SETTINGS, teacher), iter(range(1000))
    assert f"state: {made.state_bytes():,} bytes" in said and f"base {nbytes(before):,}" in said
    with monkeypatch.context() as stopped:
        stopped.setattr(interrupts, "check", lambda: interrupted() if next(asked) == 40 else None)
        with pytest.raises(interrupts.Interrupted):
            api.distill(teacher, SOURCE, METHOD, SETTINGS, tmp_path / "stopped")
    assert 32 < checkpoint.latest_in(tmp_path / "stopped" / "checkpoints") < 64
    resumed = api.distill(teacher, SOURCE, METHOD, SETTINGS, tmp_path / "stopped")
    for steps in (4, 1):
        assert equal(resumed[steps].params, whole[steps].params)
        assert equal(Artefact.load(tmp_path / "whole" / f"student_{steps}").params, whole[steps].params)
        assert jax.tree.structure(whole[steps].params) == jax.tree.structure(before)
        change = whole[steps].params["Dense_1"]["kernel"] - before["Dense_1"]["kernel"]
        values = np.linalg.svd(change, compute_uv=False)
        assert values[1] > 100 * values[2], "its rank is 2"
        chex.assert_trees_all_equal(whole[steps].params["Dense_1"]["bias"], before["Dense_1"]["bias"])
    assert equal(teacher.params, before)
    four, one = whole[4].params, whole[1].params
    ended = create(one, make_optimizer(OptimizerSettings()), METHOD.averages, four)
    first, last = (loss_and_gradient(teacher.model, ended.replace(params=p), 1)[0] for p in (four, one))
    assert last < 0.8 * first, "the second phase has learned"
    assert stored(tmp_path / "whole") >= {"params", "teacher"} and "base" not in stored(tmp_path / "whole")


def interrupted() -> None:
    """As a signal would."""
    raise interrupts.Interrupted("a test")


def nbytes(tree: Any) -> int:
    """Of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.fast
def test_what_is_saved_is_small() -> None:
    """A checkpoint of the U-Net at rank 1 against one of all its parameters."""
    base, optimizer = toys.parameters(UNET), make_optimizer(OptimizerSettings())
    first = low_rank.init(jax.random.key(0), base, 1)
    plain = checkpoint._items(create(base, optimizer, METHOD.averages, base))
    adapted = checkpoint._items(create(first, optimizer, METHOD.averages, first, base))
    assert plain.keys() == adapted.keys()
    assert nbytes(adapted) < 0.05 * nbytes(plain)


def test_adapters_on_a_mesh_are_those_of_one_device(teacher: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "LEAST_SPLIT", 64)
    pixels = from_arrays(np.random.default_rng(0).normal(0.1, 0.3, (64, 2, 2, 1)).clip(-1, 1).astype(np.float32))
    method = Tract((4, 1), length=64)
    split, plain = (
        api.distill(teacher, pixels, method, dataclasses.replace(SETTINGS, params_parallel=number))[1]
        for number in (4, 1)
    )
    chex.assert_trees_all_close(split.params, plain.params, rtol=0, atol=1e-5)


@pytest.mark.fast
def test_without_adapters_a_state_is_what_it_was(tiny_model: Model, teacher: Artefact) -> None:
    state = Ahead(tiny_model, METHOD, api.Settings(batch_size=16), teacher).state
    assert state.base == () and jax.tree.structure(state.params) == jax.tree.structure(teacher.params)
    assert state.whole(state.params) is state.params


# --- what is refused

OTHER = Model(toys.Perceptron(1, width=8), (2, 2, 1), prediction="v")
REFUSED: dict[str, tuple[Callable[[Artefact], Any], str]] = {
    "training": (lambda teacher: api.train(teacher.model, SOURCE, Denoising(256), SETTINGS), "has no teacher"),
    "another network": (
        lambda teacher: api.distill(teacher, SOURCE, Knowledge(steps=4, length=256), SETTINGS, student=OTHER),
        "the student has another network",
    ),
    "ahead": (lambda teacher: Ahead.of(teacher.model, None, Denoising(256), SETTINGS).state, "has no teacher"),
    "no match": (
        lambda teacher: api.distill(
            teacher, SOURCE, METHOD, dataclasses.replace(SETTINGS, low_rank_pattern="attention")
        ),
        r"matches low_rank_pattern='attention'. There are: Dense_0/kernel, Dense_1/kernel",
    ),
    "a pattern": (lambda teacher: api.Settings(low_rank_pattern="("), "must be a regular expression, got '\\('"),
    "a rank": (lambda teacher: api.Settings(low_rank=-1), "low_rank, if not 0"),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_be_are_refused_in_words(case: str, teacher: Artefact) -> None:
    make, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        make(teacher)
