"""Training: averages, the step on any number of devices and in parts, what is skipped, checkpoints, artefacts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from toys import equal

from diffusion_distill import api
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising, Progressive, Tract
from diffusion_distill.methods.phases import AVERAGING, Phase
from diffusion_distill.networks import UNet
from diffusion_distill.process.processes import Cosine
from diffusion_distill.training import checkpoint, checksum, ema, loop, sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.checkpoint import Checkpoints
from diffusion_distill.training.logs import JsonLines
from diffusion_distill.training.optimizers import OptimizerSettings, make_clip, make_optimizer
from diffusion_distill.training.state import TrainState, create, next_phase
from diffusion_distill.training.step import StepInputs, make_step

DATA = toys.Gaussian(mean=0.1, std=0.4)


# --- averages


@pytest.mark.fast
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.9999, 0.999993])
def test_an_average_is_its_closed_form(momentum: float) -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, (60, 5)).astype(np.float32)
    rule, update = ema.rule("corrected", momentum), jax.jit(ema.update)
    average = ema.init({"w": jnp.full(5, 1e6)})  # where it starts from must never count
    for k, value in enumerate(values, start=1):
        average = update(average, {"w": value}, np.float32(rule(k)))
        ages = np.arange(k - 1, -1, -1)
        weights = momentum**ages
        expected = (weights[:, None] * values[:k].astype(np.float64)).sum(0) / weights.sum()
        chex.assert_trees_all_close(average.params["w"], expected, rtol=2e-6, custom_message=f"update {k}")
    assert int(average.count) == len(values)


@pytest.mark.fast
@pytest.mark.parametrize("momentum", [0.0, 0.9999])
def test_the_first_value_and_momentum_0_are_copied_bit_for_bit(momentum: float) -> None:
    values = np.random.default_rng(0).normal(0, 1, (3, 1000)).astype(np.float32)
    first, second = (np.float32(ema.rule("corrected", momentum)(k)) for k in (1, 2))
    average = ema.update(ema.init(jnp.asarray(values[0])), jnp.asarray(values[1]), first)
    chex.assert_trees_all_equal(average.params, values[1])
    again = ema.update(average, jnp.asarray(values[2]), second)
    assert bool((again.params == values[2]).all()) == (momentum == 0)


@pytest.mark.fast
def test_weights_of_every_rule_are_exact_and_the_first_value_is_copied() -> None:
    assert set(ema.RULES) == set(AVERAGING)
    for kind in AVERAGING:
        assert ema.rule(kind, 0.999)(1) == 1 and ema.rule(kind, 0.0)(7) == 1
    for momentum in (Fraction(1, 2), Fraction(9999, 10_000), Fraction(9_999_999, 10_000_000)):
        for k in (1, 2, 17, 1000):
            exact = float((1 - momentum) / (1 - momentum**k))
            assert ema.rule("corrected", float(momentum))(k) == pytest.approx(exact, rel=1e-8)  # of float(momentum)


@pytest.mark.fast
def test_averages_count_from_the_last_phase_that_began_them_anew() -> None:
    going_on = {"restart": False, "momentum": 0.5}
    phases = [
        Phase("first", 3, 1e-3, momentum=0.5),
        Phase("goes on", 4, 1e-3, **going_on),
        Phase("eval anew", 5, 1e-3, reset_average=True, **going_on),
        Phase("all anew", 2, 1e-3, momentum=0.5),
        Phase("goes on", 2, 1e-3, **going_on),
    ]
    rule, own = ema.rule("corrected", 0.5), ema.rule("corrected", 0.9)
    for number, done, counts in ((0, 0, (1, 1)), (1, 5, (6, 6)), (2, 7, (1, 8)), (3, 12, (1, 1)), (4, 14, (3, 3))):
        found = ema.Averaging(phases, number, {"own": 0.9}).at(done)
        assert found == {"eval": np.float32(rule(counts[0])), "own": np.float32(own(counts[1]))}


@pytest.mark.fast
def test_an_average_whose_first_update_was_skipped_copies_the_next_value() -> None:
    average = ema.update(ema.init(jnp.full(2, 1e6)), jnp.ones(2), np.float32(0.5))
    chex.assert_trees_all_equal(average.params, jnp.ones(2))


@pytest.mark.fast
def test_published_rules_of_averages() -> None:
    """BTD's: plain from the second value on; the mean since a window of n = 1/(1 - mu) began."""
    values = np.random.default_rng(0).normal(0, 1, (11, 3))
    plain, window = ema.init(jnp.full(3, 1e6)), ema.init(jnp.full(3, 1e6))
    expected = values[0]
    for k, value in enumerate(values):
        plain, window = (
            ema.update(average, jnp.float32(value), np.float32(ema.rule(kind, 0.75)(k + 1)))
            for average, kind in ((plain, "plain"), (window, "window"))
        )
        expected = 0.75 * expected + 0.25 * value
        chex.assert_trees_all_close(plain.params, expected, rtol=1e-7, atol=1e-6)
        chex.assert_trees_all_close(window.params, values[k // 4 * 4 : k + 1].mean(0), rtol=1e-7, atol=1e-6)


@pytest.mark.fast
def test_a_ramped_average_remembers_a_twentieth_of_the_past() -> None:
    """EDM's rule: beta = 0.5^(1/h) per update with a half-life h of at most 0.05 times the updates made before."""
    values, momentum = np.random.default_rng(0).normal(0, 1, (200, 3)), 0.5 ** (1 / 4)
    average, expected = ema.init(jnp.full(3, 1e6)), values[0]
    for made, value in enumerate(values):
        average = ema.update(average, jnp.float32(value), np.float32(ema.rule("ramped", momentum)(made + 1)))
        beta = 0.5 ** (1 / min(4, 0.05 * made)) if made else 0.0
        expected = beta * expected + (1 - beta) * value
        chex.assert_trees_all_close(average.params, expected, rtol=1e-7, atol=2e-6)


@pytest.mark.fast
def test_reset_forgets_at_the_next_value() -> None:
    average = ema.update(ema.init(jnp.zeros(2)), jnp.ones(2), np.float32(0.5))
    emptied = ema.reset(average)
    chex.assert_trees_all_equal(emptied.params, average.params)
    chex.assert_trees_all_equal(ema.update(emptied, jnp.full(2, 5.0), np.float32(0.5)).params, 5.0)


# --- the optimizer


@pytest.mark.fast
@pytest.mark.parametrize(("norm", "limit", "kept"), [(10.0, 1.0, 1.0), (0.5, 1.0, 0.5), (10.0, 0.0, 10.0)])
def test_the_global_norm_is_clipped(norm: float, limit: float, kept: float) -> None:
    optimizer = make_optimizer(OptimizerSettings(grad_clip=limit))
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    gradient = jax.tree.map(lambda g: g * norm / 5, gradient)
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    first_moment = optax.tree.get(state, "mu")
    scaled = jax.tree.map(lambda g: 0.1 * g * kept / norm, gradient)
    for found, expected in zip(jax.tree.leaves(first_moment), jax.tree.leaves(scaled), strict=True):
        chex.assert_trees_all_close(found, expected, rtol=1e-6)


@pytest.mark.fast
def test_weight_decay_is_decoupled() -> None:
    params = {"w": jnp.array([2.0, -4.0])}
    optimizer = make_optimizer(OptimizerSettings(weight_decay=0.1))
    update, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    chex.assert_trees_all_close(jax.tree.leaves(update)[0], 0.1 * params["w"], rtol=1e-6)


# --- the step

METHODS: dict[str, Any] = {
    "teacher": Denoising(length="1K", momentum=0.9),
    "btd": Progressive(8, 2, phase_length="1K"),
    "tract": Tract((8, 4, 1), length="1K"),
}
#: One of them stands for all in the fast set.
every_method = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.fast) if name == "tract" else name for name in METHODS]
)
BATCH = 16


class Run:
    """A model, a method and its compiled step on a number of devices."""

    def __init__(self, model: Model, method: Any, devices: int = 1, parts: int = 1, **optimizer: Any):
        self.mesh = sharding.data_mesh(jax.devices()[:devices])
        self.optimizer = make_optimizer(OptimizerSettings(**optimizer))
        distils = not isinstance(method, Denoising)
        settings = OptimizerSettings(**optimizer)
        clip = make_clip(settings) if settings.clip_scope == "shard" else None
        teacher = model if distils else None
        self.step = make_step(method.losses, model, teacher, self.optimizer, self.mesh, parts=parts, shard_clip=clip)
        phase = method.phases(model, BATCH)[0]
        self.rows, self.averaging = loop.rows_of(phase), ema.Averaging([phase], 0, method.averages)
        teacher = toys.parameters(model, 1) if distils else ()
        state = create(toys.parameters(model), self.optimizer, method.averages, teacher)
        self.state = jax.device_put(state, sharding.replicated(self.mesh))

    def __call__(self, images: np.ndarray, **extra: np.ndarray) -> dict[str, float]:
        """One update; returns the metrics."""
        batch = sharding.put_batch({"x": images, **extra}, self.mesh)
        inputs = StepInputs(self.rows, np.float32(1e-2), self.averaging.at(int(self.state.step)))
        self.state, metrics = self.step(self.state, batch, inputs, jax.random.key(3))
        return {name: float(value) for name, value in jax.block_until_ready(metrics).items()}


def batch(model: Model, seed: int = 0) -> np.ndarray:
    """Clean images [16, ...]."""
    shape = (BATCH, *model.shape)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@every_method
def test_a_step_on_one_and_on_eight_devices_is_the_same(name: str, tiny_model: Model) -> None:
    one, eight = (Run(tiny_model, METHODS[name], devices) for devices in (1, 8))
    for update in range(2):
        images = batch(tiny_model, update)
        first, second = one(images), eight(images)
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-6 if update == 0 else 1e-4)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5 if update == 0 else 1e-3)
    assert len(jax.tree.leaves(eight.state.params)[0].devices()) == 8
    for ours, theirs in zip(jax.tree.leaves(one.state.params), jax.tree.leaves(eight.state.params), strict=True):
        chex.assert_trees_all_close(ours, theirs, rtol=0, atol=2e-4)  # Adam's first steps follow signs


@pytest.mark.slow
def test_a_step_of_a_unet_with_labels_and_dropout_is_the_same_on_eight_devices() -> None:
    network = UNet(ch=32, emb_ch=8, out_ch=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_heads=1,
                   dropout=0.3, num_classes=3)  # fmt: skip
    model = Model(network, (4, 4, 1), Cosine(), prediction="both")
    found = [
        Run(model, METHODS["teacher"], devices)(batch(model), cond=np.arange(BATCH, dtype=np.int32) % 3)
        for devices in (1, 8)
    ]
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)


@every_method
def test_an_update_that_is_not_finite_changes_nothing(name: str, tiny_model: Model) -> None:
    run = Run(tiny_model, METHODS[name])
    run(batch(tiny_model))
    before = jax.tree.map(np.array, run.state)
    bad = batch(tiny_model, 1)
    bad[3, 0, 0, 0] = np.nan
    metrics = run(bad)
    assert np.isnan(metrics["loss"]) and metrics["skipped"] == 1
    assert (int(run.state.step), int(run.state.skipped)) == (2, 1)
    assert int(run.state.nonfinite) == metrics["nonfinite"] == 1
    counts = {"step": 0, "skipped": 0, "nonfinite": 0}
    assert equal(before.replace(**counts), run.state.replace(**counts))
    metrics = run(batch(tiny_model, 2))
    assert np.isfinite(metrics["loss"]) and (metrics["skipped"], metrics["nonfinite"]) == (1, 0)
    assert not equal(before.params, run.state.params)


def test_a_step_moves_by_the_rate_and_averages_follow(tiny_model: Model) -> None:
    run = Run(tiny_model, METHODS["tract"])
    before = jax.tree.map(np.array, run.state)
    run(batch(tiny_model))
    moved = [
        np.abs(new - old).max()
        for new, old in zip(jax.tree.leaves(run.state.params), jax.tree.leaves(before.params), strict=True)
    ]
    assert max(moved) == pytest.approx(1e-2, rel=1e-3), "Adam's first update has length one"
    for average in run.state.averages.values():
        for a, p in zip(jax.tree.leaves(average.params), jax.tree.leaves(run.state.params), strict=True):
            chex.assert_trees_all_close(a, p, rtol=0, atol=1e-7)  # of one value
    assert equal(run.state.teacher, before.teacher)
    student = jax.tree.map(np.array, run.state.params)
    run(batch(tiny_model, 1))
    fast, new, old = (
        jax.tree.leaves(t)[0] for t in (run.state.averages["self_teacher"].params, run.state.params, student)
    )
    chex.assert_trees_all_close(fast, old / 3 + new * 2 / 3, rtol=0, atol=1e-6)  # weights 0.5 and 1 over 1.5


@dataclasses.dataclass(frozen=True)
class Recorded(Denoising):
    """Teacher training with times and noise of the batch's own, so that nothing is drawn."""

    def losses(self, denoisers: Any, inputs: Any, batch: Any, key: Any) -> Any:
        """Per-image losses [batch]."""
        student = denoisers["student"]
        return self.losses_at(student, student.model.process.level(batch["u"]), batch["x"], batch["eps"])


def recorded(model: Model) -> dict[str, np.ndarray]:
    """A batch for `Recorded`; the first half is much noisier than the second."""
    rng = np.random.default_rng(5)
    eps = rng.normal(0, 1, (BATCH, *model.shape)).astype(np.float32)
    return {"eps": eps, "u": np.linspace(0.9, 0.2, BATCH, dtype=np.float32)}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts: int, devices: int, tiny_model: Model) -> None:
    whole = Run(tiny_model, Recorded(length="1K"))
    in_parts = Run(tiny_model, Recorded(length="1K"), devices, parts)
    first, second = (run(batch(tiny_model), **recorded(tiny_model)) for run in (whole, in_parts))
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)


def test_each_shard_is_clipped_on_its_own(tiny_model: Model) -> None:
    """BTD's program: with one device as ever; with two the mean of two clipped gradients."""
    limit, images, extra = 0.05, batch(tiny_model), recorded(tiny_model)
    method, rule = Recorded(length="1K"), {"rule": "momentum", "b1": 0.0}  # an update is its clipped gradient
    halves = [slice(0, BATCH // 2), slice(BATCH // 2, None)]
    alone = [Run(tiny_model, method, grad_clip=limit, **rule) for _ in halves]
    norms = [
        run(images[half], **{k: v[half] for k, v in extra.items()})["grad_norm"]
        for run, half in zip(alone, halves, strict=True)
    ]
    assert min(norms) > 2 * limit and abs(norms[0] / norms[1] - 1) > 0.1
    shards = Run(tiny_model, method, 2, clip_scope="shard", grad_clip=limit, **rule)
    joint = Run(tiny_model, method, 2, clip_scope="global", grad_clip=limit, **rule)
    assert shards(images, **extra)["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
    joint(images, **extra)
    start = toys.parameters(tiny_model)
    moved = lambda run: jax.tree.leaves(jax.tree.map(lambda a, b: np.asarray(a - b), run.state.params, start))  # noqa: E731
    for ours, first, second, other in zip(*map(moved, (shards, *alone, joint)), strict=True):
        chex.assert_trees_all_close(ours, (first + second) / 2, rtol=0, atol=2e-7)
        assert np.abs(other - ours).max() > 1e-6, "another algorithm"


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


def spoil(folder: Path, how: str) -> None:
    """Damages the largest array file of a checkpoint."""
    file = max(folder.glob("params/**/d/*"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 255
    file.write_bytes(content[: len(content) // 2] if how == "truncate" else content)


@pytest.mark.parametrize("how", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(how: str, tiny_model: Model, tmp_path: Path) -> None:
    state = trained_state(tiny_model, make_optimizer(OptimizerSettings()))
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


# --- phases follow one another


def trained_state(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """A state in which every part differs from every other."""
    state = create(toys.parameters(model, 1), optimizer, ["self_teacher"], toys.parameters(model, 2))
    averages = {name: ema.Average(toys.parameters(model, k), jnp.int32(9)) for k, name in enumerate(state.averages, 3)}
    opt_state = jax.tree.map(lambda a: a + 1, state.opt_state)
    return state.replace(averages=averages, opt_state=opt_state, step=jnp.int32(9), skipped=jnp.int32(2))


@pytest.mark.fast
def test_the_next_phase_starts_afresh_from_the_teacher(tiny_model: Model) -> None:
    optimizer = make_optimizer(OptimizerSettings())
    old = trained_state(tiny_model, optimizer)
    new = next_phase(old, Phase("next", 5, 1e-3, restart=True), optimizer)
    handed_on = old.averages["eval"].params
    assert equal(new.teacher, handed_on) and equal(new.params, handed_on)
    assert equal(new.opt_state, optimizer.init(handed_on))
    assert set(new.averages) == {"eval", "self_teacher"}
    assert all(int(a.count) == 0 and equal(a.params, handed_on) for a in new.averages.values())
    assert (int(new.step), int(new.skipped)) == (9, 2)


@pytest.mark.fast
@pytest.mark.parametrize("reset", [False, True])
def test_the_next_phase_goes_on_with_another_teacher(reset: bool, tiny_model: Model) -> None:
    optimizer = make_optimizer(OptimizerSettings())
    old = trained_state(tiny_model, optimizer)
    new = next_phase(old, Phase("next", 5, 1e-3, restart=False, reset_average=reset), optimizer)
    assert equal(new.teacher, old.averages["eval"].params)
    assert equal(new.params, old.params) and equal(new.opt_state, old.opt_state)
    assert equal(new.averages["self_teacher"], old.averages["self_teacher"])
    assert equal(new.averages["eval"].params, old.averages["eval"].params)
    assert int(new.averages["eval"].count) == (0 if reset else 9)


# --- artefacts


@pytest.mark.fast
def test_an_artefact_survives_the_disk(tmp_path: Path, toy_networks: None) -> None:
    model = Model(toys.Perceptron(2, width=8), (3, 2, 1), Cosine(-9, 8), prediction="both")
    artefact = Artefact(model, toys.parameters(model), steps=4, provenance={"method": "by hand"})
    found = Artefact.load(artefact.save(tmp_path / "a" / "b"))
    assert (found.model, found.steps, found.provenance["method"]) == (model, 4, "by hand")
    assert equal(found.params, artefact.params)
    z, level = jnp.ones((1, 3, 2, 1)), model.process.level(jnp.full(1, 0.3))
    chex.assert_trees_all_equal(found.denoiser()(z, level), artefact.denoiser()(z, level))
    other = dataclasses.replace(artefact, params=toys.parameters(model, 5))
    assert equal(Artefact.load(other.save(tmp_path / "a" / "b")).params, other.params), "it can be replaced"


@pytest.mark.fast
@pytest.mark.parametrize("after", range(5))
def test_killed_at_any_moment_an_artefact_is_the_old_or_the_new_one(
    after: int, teacher: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that ends after so many changes of names; the next one succeeds and leaves nothing behind."""
    folder, done = teacher.save(tmp_path / "artefact"), []
    new = dataclasses.replace(teacher, params=toys.parameters(teacher.model, 5), steps=8)

    def killed(change: Callable) -> Callable:
        def changed(*arguments: Any) -> Any:
            if Path(arguments[0]).parent == folder:  # else it is Orbax's
                if len(done) == after:
                    raise KeyboardInterrupt
                done.append(arguments[0])
            return change(*arguments)

        return changed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed(Path.rename))
        patch.setattr("os.replace", killed(os.replace))
        if after < 4:
            with pytest.raises(KeyboardInterrupt):
                new.save(folder)
        else:
            new.save(folder)
    found = Artefact.load(folder)
    assert found.steps == (8 if after == 4 else 0)
    chex.assert_trees_all_equal(found.params, (new if after == 4 else teacher).params)
    chex.assert_trees_all_equal(Artefact.load(new.save(folder)).params, new.params)
    assert {path.name for path in folder.iterdir()} == {"params", "provenance.json", "model.json"}


def test_an_artefact_can_be_read_while_another_takes_its_place(teacher: Artefact, tmp_path: Path) -> None:
    both = [dataclasses.replace(teacher, params=toys.parameters(teacher.model, k), steps=k) for k in (1, 2)]
    folder, stop = both[0].save(tmp_path / "artefact"), threading.Event()

    def write() -> None:
        for k in itertools.count():
            if stop.is_set():
                return
            both[k % 2].save(folder)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(8):
            found = Artefact.load(folder)
            chex.assert_trees_all_equal(found.params, both[found.steps - 1].params)
    finally:
        stop.set()
        writer.join()


SPOIL: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no folder": (shutil.rmtree, FileNotFoundError, r"not an artefact.*no model\.json.*student_1"),
    "no model": (lambda f: (f / "model.json").unlink(), FileNotFoundError, r"not an artefact.*no model\.json"),
    "no parameters": (lambda f: shutil.rmtree(f / "params"), FileNotFoundError, r"params"),
    "another width": (lambda f: edit(f, "network", width=9), ValueError, r"16|9|shape"),
    "an unknown network": (lambda f: edit(f, "network", name="perceptrn"), ValueError, r"'perceptrn'.*'perceptron'"),
    "a part without a name": (lambda f: forget_name(f, "process"), ValueError, r"process lacks its name.*cosine"),
    "an unknown field": (lambda f: edit(f, "network", widht=8), ValueError, r"'widht'.*'width'"),
    "an unknown process": (lambda f: edit(f, "process", name="cosin"), ValueError, r"'cosin'.*'cosine'"),
    "a mistyped field": (lambda f: edit(f, "process", logsnr_min="low"), TypeError, r"logsnr_min.*float.*'low'"),
}


def edit(folder: Path, part: str, **changes: Any) -> None:
    """Changes fields of an artefact's description."""
    content = json.loads((folder / "model.json").read_text())
    content["model"][part].update(changes)
    (folder / "model.json").write_text(json.dumps(content))


def forget_name(folder: Path, part: str) -> None:
    """Takes the name out of a part of an artefact's description."""
    content = json.loads((folder / "model.json").read_text())
    del content["model"][part]["name"]
    (folder / "model.json").write_text(json.dumps(content))


@pytest.mark.fast
@pytest.mark.parametrize(("spoil", "error", "said"), SPOIL.values(), ids=SPOIL)
def test_a_damaged_artefact_says_what_is_wrong(
    spoil: Callable[[Path], Any], error: type[Exception], said: str, teacher: Artefact, tmp_path: Path
) -> None:
    folder = teacher.save(tmp_path / "artefact")
    spoil(folder)
    with pytest.raises(error, match=said):
        Artefact.load(folder)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a momentum of 1": (lambda: ema.rule("corrected", 1.0), r"momentum must be in \[0, 1\), got 1\.0"),
    "a negative momentum": (lambda: ema.rule("corrected", -0.1), r"got -0\.1"),
    "a momentum that is no number": (lambda: ema.rule("corrected", float("nan")), r"got nan"),
    "a negative clip": (lambda: OptimizerSettings(grad_clip=-1.0), r"must not be negative.*grad_clip=-1\.0"),
    "a clip that is no number": (lambda: OptimizerSettings(grad_clip=float("nan")), r"grad_clip=nan"),
    "a decay that is no number": (lambda: OptimizerSettings(weight_decay=float("nan")), r"weight_decay=nan"),
    "a learning rate that is no number": (lambda: Phase("", 1, float("nan")), r"learning_rate.*got nan"),
    "a learning rate below 0": (lambda: Phase("", 1, -1.0), r"learning_rate.*got -1\.0"),
    "a part of an image to evaluate": (lambda: api.Settings(evaluate_count=1.5), r"evaluate_count.*got 1\.5"),  # type: ignore[arg-type]
    "b2 of 1": (lambda: OptimizerSettings(b2=1.0), r"b1 and b2 below 1.*b2=1\.0"),
    "a batch of zero": (lambda: api.Settings(batch_size=0), r"batch_size must be .*at least 1, got 0"),
    "half a batch": (lambda: api.Settings(batch_size=1.5), r"batch_size.*1\.5"),  # type: ignore[arg-type]
    "logging never": (lambda: api.Settings(log_every=0), r"log_every.*got 0"),
    "a batch that does not split": (lambda: sharding.check_batch(12, sharding.data_mesh()), r"devices \(8\), got 12"),
    "too many output channels": (lambda: Model(toys.Perceptron(2), (2, 2, 1)), r"network with 1 .*out_ch=2.*Set"),
    "samples without channels": (lambda: Model(toys.Perceptron(1), ()), r"channels\), got \(\)"),
    "a range upside down": (lambda: Model(toys.Perceptron(1), (2, 2, 1), data_range=(1, -1)), r"low < high.*\(1\.0"),
    "an unknown optimizer": (lambda: OptimizerSettings(rule="adamw"), r"'adamw'.*Did you mean 'adam'"),
    "an unknown scope": (lambda: OptimizerSettings(clip_scope="device"), r"'device'.*global, shard"),
    "an unknown average": (lambda: Denoising(averaging="simple"), r"'simple'.*corrected, plain, ramped, window"),
    "parts that do not divide": (lambda: sharding.check_batch(16, sharding.data_mesh(), 4), r"parts of a batch \(4\)"),
    "an unreadable cadence": (lambda: api.Settings(evaluate_every="often"), r"'often' as a number of samples"),
    "an unknown prediction": (lambda: Model(toys.Perceptron(1), (2, 2, 1), prediction="epsilon"), r"'epsilon'"),
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_told_what_it_is_and_what_is_allowed(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.fast
def test_damaged_lines_of_figures_are_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n' + "\0" * 300 + '\n[]\n{"update": 2}\n{"upd')
    with pytest.warns(UserWarning, match="2 of 4 lines are damaged"):
        log = JsonLines(path, keep=2)
    log.close()
    assert path.read_text() == '{"update": 1}\n{"update": 2}\n'


@pytest.mark.fast
def test_an_update_damaged_twice_is_moved_aside_twice(tmp_path: Path) -> None:
    for taken in ("20", "20_2"):
        assert checkpoint._free(tmp_path / "20") == tmp_path / taken
        (tmp_path / taken).mkdir()


@pytest.mark.fast
def test_an_optimizer_that_is_no_settings_is_refused() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be OptimizerSettings\(\.\.\.\), got {'grad_clip': 1\.0}"):
        api.Settings(optimizer={"grad_clip": 1.0})  # type: ignore[arg-type]
