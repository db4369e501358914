"""Training: the step on any number of devices and in parts, what is skipped, phases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
from diffusion_distill.methods.phases import Phase
from diffusion_distill.networks import UNet
from diffusion_distill.process.processes import Cosine
from diffusion_distill.training import ema, loop, sharding
from diffusion_distill.training.logs import JsonLines
from diffusion_distill.training.optimizers import OptimizerSettings, make_clip, make_optimizer
from diffusion_distill.training.state import create, next_phase
from diffusion_distill.training.step import StepInputs, make_step

DATA = toys.Gaussian(mean=0.1, std=0.4)


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


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(("devices", "method"), [(1, Denoising(length="1K")), (2, Tract((8, 1), length="1K"))])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    parts: int, devices: int, method: Any, tiny_model: Model
) -> None:
    """Times and noise are drawn as for the whole batch, so its parts have the same losses."""
    whole, in_parts = Run(tiny_model, method), Run(tiny_model, method, devices, parts)
    first, second = (run(batch(tiny_model)) for run in (whole, in_parts))
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


# --- phases follow one another


@pytest.mark.fast
def test_the_next_phase_starts_afresh_from_the_teacher(tiny_model: Model) -> None:
    optimizer = make_optimizer(OptimizerSettings())
    old = toys.trained_state(tiny_model, optimizer)
    new = next_phase(old, optimizer, restart=True, reset_average=True)
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
    old = toys.trained_state(tiny_model, optimizer)
    new = next_phase(old, optimizer, restart=False, reset_average=reset)
    assert equal(new.teacher, old.averages["eval"].params)
    assert equal(new.params, old.params) and equal(new.opt_state, old.opt_state)
    assert equal(new.averages["self_teacher"], old.averages["self_teacher"])
    assert equal(new.averages["eval"].params, old.averages["eval"].params)
    assert int(new.averages["eval"].count) == (0 if reset else 9)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a momentum of 1": (lambda: ema.rule("corrected", 1.0), r"momentum must be in \[0, 1\), got 1\.0"),
    "a negative momentum": (lambda: ema.rule("corrected", -0.1), r"got -0\.1"),
    "a momentum that is no number": (lambda: ema.rule("corrected", float("nan")), r"got nan"),
    "a negative clip": (lambda: OptimizerSettings(grad_clip=-1.0), r"grad_clip must be .*at least 0, got -1\.0"),
    "a clip that is no number": (lambda: OptimizerSettings(grad_clip=float("nan")), r"grad_clip must.*got nan"),
    "a decay that is no number": (lambda: OptimizerSettings(weight_decay=float("nan")), r"weight_decay must.*got nan"),
    "a learning rate that is no number": (lambda: Phase("", 1, float("nan")), r"learning_rate.*got nan"),
    "a learning rate below 0": (lambda: Phase("", 1, -1.0), r"learning_rate.*got -1\.0"),
    "a part of an image to evaluate": (lambda: api.Settings(evaluate_count=1.5), r"evaluate_count.*got 1\.5"),  # type: ignore[arg-type]
    "b2 of 1": (lambda: OptimizerSettings(b2=1.0), r"b1 and b2 must be below 1.*b2=1\.0"),
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
def test_an_optimizer_that_is_no_settings_is_refused() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be OptimizerSettings\(\.\.\.\), got {'grad_clip': 1\.0}"):
        api.Settings(optimizer={"grad_clip": 1.0})  # type: ignore[arg-type]
