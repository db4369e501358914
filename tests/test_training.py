"""Training: averages, the step on any number of devices, what is skipped, and runs that stop and go on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from diffusion_distill import runs
from diffusion_distill.diffusion.schedules import Cosine
from diffusion_distill.distillation import Denoising, Progressive, Tract
from diffusion_distill.distillation.phases import Phase
from diffusion_distill.model import Model
from diffusion_distill.networks import UNet
from diffusion_distill.training import ema, sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.optimizers import OptimizerSettings, make_optimizer
from diffusion_distill.training.progress import read_json_lines
from diffusion_distill.training.state import TrainState, create, next_phase
from diffusion_distill.training.step import StepInputs, make_step

DATA = toys.Gaussian(mean=0.1, std=0.4)


def equal(a: Any, b: Any) -> bool:
    """Whether two trees are the same, bit for bit."""
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(same))


# --- averages


@pytest.mark.fast
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 0.9999, 0.999993])
def test_an_average_is_its_closed_form(momentum: float) -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, (60, 5)).astype(np.float32)
    log_mu = jnp.float32(ema.log_momentum(momentum))
    update = jax.jit(ema.update)
    average = ema.init({"w": jnp.full(5, 1e6)})  # where it starts from must never count
    for k, value in enumerate(values, start=1):
        average = update(average, {"w": value}, log_mu)
        ages = np.arange(k - 1, -1, -1)
        weights = momentum**ages
        expected = (weights[:, None] * values[:k].astype(np.float64)).sum(0) / weights.sum()
        np.testing.assert_allclose(average.params["w"], expected, rtol=2e-6, err_msg=f"update {k}")
    assert int(average.count) == len(values)


@pytest.mark.fast
@pytest.mark.parametrize("momentum", [0.0, 0.9999])
def test_the_first_value_and_momentum_0_are_copied_bit_for_bit(momentum: float) -> None:
    values = np.random.default_rng(0).normal(0, 1, (3, 1000)).astype(np.float32)
    average = ema.update(
        ema.init(jnp.asarray(values[0])), jnp.asarray(values[1]), jnp.float32(ema.log_momentum(momentum))
    )
    np.testing.assert_array_equal(average.params, values[1])
    again = ema.update(average, jnp.asarray(values[2]), jnp.float32(ema.log_momentum(momentum)))
    assert bool((again.params == values[2]).all()) == (momentum == 0)


@pytest.mark.fast
def test_decays_are_accurate_in_float32() -> None:
    counts = np.unique(np.int64(np.logspace(0, 6, 60)))
    for momentum in (0.5, 0.99, 0.9999, 0.999993, 0.9999999):
        log_mu = ema.log_momentum(momentum)
        exact = np.expm1(log_mu) / np.expm1(counts * log_mu)
        found = jax.jit(ema.decay)(jnp.float32(log_mu), jnp.asarray(counts, jnp.int32))
        np.testing.assert_allclose(found, exact, rtol=1e-6)


@pytest.mark.fast
def test_reset_forgets_at_the_next_value() -> None:
    average = ema.update(ema.init(jnp.zeros(2)), jnp.ones(2), jnp.float32(-0.1))
    emptied = ema.reset(average)
    np.testing.assert_array_equal(emptied.params, average.params)
    np.testing.assert_array_equal(ema.update(emptied, jnp.full(2, 5.0), jnp.float32(-0.1)).params, 5.0)


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
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.fast
def test_weight_decay_is_decoupled() -> None:
    params = {"w": jnp.array([2.0, -4.0])}
    optimizer = make_optimizer(OptimizerSettings(weight_decay=0.1))
    update, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(jax.tree.leaves(update)[0], 0.1 * params["w"], rtol=1e-6)


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

    def __init__(self, model: Model, method: Any, devices: int = 1, **optimizer: Any):
        self.mesh = sharding.data_mesh(jax.devices()[:devices])
        self.optimizer = make_optimizer(OptimizerSettings(**optimizer))
        distils = not isinstance(method, Denoising)
        self.step = make_step(method.losses, model, model if distils else None, self.optimizer, self.mesh)
        phase = method.phases(model, BATCH)[0]
        momenta = {"eval": phase.momentum, **method.averages}
        log_momenta = {name: np.float32(ema.log_momentum(mu)) for name, mu in momenta.items()}
        single = lambda a: np.asarray(a, np.int32 if np.asarray(a).dtype.kind == "i" else np.float32)  # noqa: E731
        self.inputs = StepInputs(jax.tree.map(single, phase.inputs), np.float32(1e-2), log_momenta)
        teacher = toys.parameters(model, 1) if distils else ()
        state = create(toys.parameters(model), self.optimizer, method.averages, teacher)
        self.state = jax.device_put(state, sharding.replicated(self.mesh))

    def __call__(self, images: np.ndarray, **extra: np.ndarray) -> dict[str, float]:
        """One update; returns the metrics."""
        batch = sharding.put_batch({"image": images, **extra}, self.mesh)
        self.state, metrics = self.step(self.state, batch, self.inputs, jax.random.key(3))
        return {name: float(value) for name, value in jax.block_until_ready(metrics).items()}


def batch(model: Model, seed: int = 0) -> np.ndarray:
    """Clean images [16, ...]."""
    shape = (BATCH, *model.image_shape)
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
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)  # Adam's first steps follow signs


def test_a_step_of_a_unet_with_labels_and_dropout_is_the_same_on_eight_devices() -> None:
    network = UNet(ch=32, emb_ch=8, out_ch=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_heads=1,
                   dropout=0.3, num_classes=3)  # fmt: skip
    model = Model(network, (4, 4, 1), Cosine(), prediction="both")
    found = [
        Run(model, METHODS["teacher"], devices)(batch(model), label=np.arange(BATCH, dtype=np.int32) % 3)
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
    assert equal(before.replace(step=0, skipped=0), run.state.replace(step=0, skipped=0))
    metrics = run(batch(tiny_model, 2))
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
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
            np.testing.assert_allclose(a, p, rtol=0, atol=1e-7)  # of one value
    assert equal(run.state.teacher, before.teacher)
    student = jax.tree.map(np.array, run.state.params)
    run(batch(tiny_model, 1))
    fast, new, old = (
        jax.tree.leaves(t)[0] for t in (run.state.averages["self_teacher"].params, run.state.params, student)
    )
    np.testing.assert_allclose(fast, old / 3 + new * 2 / 3, rtol=0, atol=1e-6)  # weights 0.5 and 1 over 1.5


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


# --- runs

SETTINGS = runs.Settings(batch_size=8, log_every=1, checkpoint_every=1)
TRACT = Tract((4, 2, 1), length=4 * 8, warmup=2)  # two phases of two updates


class Stopped(Exception):
    """The power goes out."""


@dataclasses.dataclass(frozen=True, eq=False)
class Failing:
    """A source that fails at the batch of a given update."""

    inner: toys.GaussianSource
    at: int
    seen: list[int] = dataclasses.field(default_factory=list)
    num_classes: int = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """As the source's."""
        return self.inner.image_shape

    def __len__(self) -> int:
        return len(self.inner)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As the source's, `at` times."""
        if len(self.seen) == self.at:
            raise Stopped
        self.seen.append(1)
        return self.inner.gather(indices)


@pytest.fixture(scope="module")
def source() -> toys.GaussianSource:
    """A few Gaussian images."""
    return toys.GaussianSource(DATA, size=20)


@pytest.fixture
def teacher(tiny_model: Model) -> Artefact:
    """An untrained teacher."""
    return Artefact(tiny_model, toys.parameters(tiny_model), provenance={"method": "none"})


def test_a_run_that_stops_and_goes_on_is_the_same_run(
    teacher: Artefact, source: toys.GaussianSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = runs.distill(teacher, source, TRACT, SETTINGS, tmp_path / "whole")
    for stop in (2, 3):  # at the border of the phases, inside the second
        folder = tmp_path / f"stopped_{stop}"
        with pytest.raises(Stopped):
            runs.distill(teacher, Failing(source, stop), TRACT, SETTINGS, folder)
        rest = Failing(source, 99)
        resumed = runs.distill(teacher, rest, TRACT, SETTINGS, folder)
        assert len(rest.seen) == 4 - stop, "only what was missing is trained"
        assert set(resumed) == {2, 1}
        for steps in (2, 1):
            assert equal(resumed[steps].params, whole[steps].params), (stop, steps)
        assert not equal(resumed[1].params, resumed[2].params)
        updates = [record["update"] for record in read_json_lines(folder / "metrics.jsonl")]
        assert updates == [1, 2, 3, 4], "each update is logged once"


def test_a_finished_run_is_not_trained_again(teacher: Artefact, source: toys.GaussianSource, tmp_path: Path) -> None:
    first = runs.distill(teacher, source, TRACT, SETTINGS, tmp_path)
    again = runs.distill(teacher, Failing(source, 0), TRACT, SETTINGS, tmp_path)
    assert set(again) == {2, 1}
    assert all(equal(again[n].params, first[n].params) and again[n].steps == n for n in again)


def test_a_run_that_dies_while_it_saves_a_student_has_it_after_the_restart(
    teacher: Artefact, source: toys.GaussianSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Artefact, folder: Path) -> Path:
        raise Stopped

    with monkeypatch.context() as broken:
        broken.setattr(Artefact, "save", dies)
        with pytest.raises(Stopped):
            runs.distill(teacher, source, TRACT, SETTINGS, tmp_path)
    assert set(runs.distill(teacher, source, TRACT, SETTINGS, tmp_path)) == {2, 1}
    assert Artefact.load(tmp_path / "student_2").steps == 2


def test_a_run_leaves_its_metrics_and_artefacts(tiny_model: Model, source: toys.GaussianSource, tmp_path: Path) -> None:
    method = Denoising(length=6 * 8, learning_rate=4e-3, warmup=2, anneal=True, momentum=0.9)
    settings = dataclasses.replace(SETTINGS, log_every=2, checkpoint_every=100)
    made = runs.train(tiny_model, source, method, settings, tmp_path)
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert [record["update"] for record in records] == [2, 4, 6]
    assert [record["samples"] for record in records] == [16, 32, 48]
    np.testing.assert_allclose(
        [record["learning_rate"] for record in records], [4e-3 * r / 6 for r in (5, 3, 1)], rtol=1e-6
    )
    for record in records:
        assert record["phase"] == "teacher" and record["skipped"] == 0
        assert record["loss"] > 0 and record["grad_norm"] > 0 and record["images_per_second"] > 0
    found = Artefact.load(tmp_path / "teacher")
    assert equal(found.params, made.params) and found.model == tiny_model and found.steps == 0
    facts = found.provenance
    assert (facts["method"], facts["updates"], facts["skipped"]) == ("Denoising", 6, 0)
    assert facts["method_settings"]["learning_rate"] == 4e-3 and facts["settings"]["batch_size"] == 8
    assert {"jax", "diffusion_distill"} <= set(facts["versions"])


def test_a_skipped_update_does_not_hide_the_others_in_the_metrics(
    tiny_model: Model, source: toys.GaussianSource, tmp_path: Path
) -> None:
    class Spoilt(Failing):
        def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            self.seen.append(1)
            return {"image": self.inner.gather(indices)["image"] * (np.nan if len(self.seen) == self.at else 1)}

    settings = dataclasses.replace(SETTINGS, log_every=3)
    runs.train(tiny_model, Spoilt(source, 2), Denoising(length=3 * 8, warmup=0), settings, tmp_path)
    [record] = read_json_lines(tmp_path / "metrics.jsonl")
    assert record["skipped"] == 1
    assert np.isfinite(record["loss"]) and np.isfinite(record["grad_norm"])


def test_a_workdir_that_cannot_serve_is_refused_before_training(
    teacher: Artefact, source: toys.GaussianSource, tmp_path: Path
) -> None:
    nothing = Failing(source, 0)  # raises Stopped as soon as a batch is asked for
    with pytest.raises(Stopped):
        runs.distill(teacher, nothing, TRACT, SETTINGS, tmp_path / "run")
    other = dataclasses.replace(TRACT, learning_rate=1e-3)
    with pytest.raises(
        ValueError, match=r"another run.*method_settings\.learning_rate.*0\.0002.*0\.001.*Choose another"
    ):
        runs.distill(teacher, nothing, other, SETTINGS, tmp_path / "run")
    with pytest.raises(ValueError, match=r"another run.*settings\.batch_size.*8.*16"):
        runs.distill(teacher, nothing, TRACT, dataclasses.replace(SETTINGS, batch_size=16), tmp_path / "run")
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"Cannot write to the workdir.*Choose another folder"):
            runs.distill(teacher, nothing, TRACT, SETTINGS, folder)


def test_another_teacher_is_another_run(teacher: Artefact, source: toys.GaussianSource, tmp_path: Path) -> None:
    """Two teachers of one model and one provenance that differ in their parameters alone."""
    with pytest.raises(Stopped):
        runs.distill(teacher, Failing(source, 1), TRACT, SETTINGS, tmp_path)
    other = dataclasses.replace(teacher, params=toys.parameters(teacher.model, 7))
    with pytest.raises(ValueError, match=r"another run.*teacher"):
        runs.distill(other, Failing(source, 0), TRACT, SETTINGS, tmp_path)


@pytest.mark.fast
def test_what_does_not_fit_is_refused_before_training(teacher: Artefact, source: toys.GaussianSource) -> None:
    nothing = Failing(source, 0)
    with pytest.raises(ValueError, match=r"multiple of the number of devices \(8\), got 12"):
        runs.distill(teacher, nothing, TRACT, dataclasses.replace(SETTINGS, batch_size=12))
    with pytest.raises(ValueError, match=r"student of 8 steps, but the method starts from 4"):
        runs.distill(dataclasses.replace(teacher, steps=8), nothing, TRACT, SETTINGS)
    wide = dataclasses.replace(teacher.model, image_shape=(2, 4, 1))
    with pytest.raises(ValueError, match=r"shape \(2, 2, 1\).*takes \(2, 4, 1\)"):
        runs.train(wide, nothing, METHODS["teacher"], SETTINGS)
    labelled = dataclasses.replace(teacher.model, network=toys.Perceptron(1, num_classes=3))
    with pytest.raises(ValueError, match=r"conditioned on 3 classes, but the data have 0"):
        runs.train(labelled, nothing, METHODS["teacher"], SETTINGS)
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"steps must be .*at least 1, got {steps}"):
            runs.sample(teacher, 4, steps=steps)


def test_a_network_of_the_callers_own_can_be_trained(source: toys.GaussianSource) -> None:
    """One that no registry knows: in memory at least."""
    model = Model(toys.Perceptron(1), (2, 2, 1), prediction="v")
    made = runs.train(model, source, Denoising(length=8), SETTINGS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made.params))


# --- artefacts


@pytest.mark.fast
def test_an_artefact_survives_the_disk(tmp_path: Path, toy_networks: None) -> None:
    model = Model(toys.Perceptron(2, width=8), (3, 2, 1), Cosine(-9, 8), prediction="both")
    artefact = Artefact(model, toys.parameters(model), steps=4, provenance={"method": "by hand"})
    found = Artefact.load(artefact.save(tmp_path / "a" / "b"))
    assert (found.model, found.steps, found.provenance["method"]) == (model, 4, "by hand")
    assert equal(found.params, artefact.params)
    z, level = jnp.ones((1, 3, 2, 1)), model.schedule.level(jnp.full(1, 0.3))
    np.testing.assert_array_equal(found.denoiser()(z, level), artefact.denoiser()(z, level))
    other = dataclasses.replace(artefact, params=toys.parameters(model, 5))
    assert equal(Artefact.load(other.save(tmp_path / "a" / "b")).params, other.params), "it can be replaced"


SPOIL: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no folder": (shutil.rmtree, FileNotFoundError, r"not an artefact.*no model\.json.*student_1"),
    "no model": (lambda f: (f / "model.json").unlink(), FileNotFoundError, r"not an artefact.*no model\.json"),
    "no parameters": (lambda f: shutil.rmtree(f / "params"), FileNotFoundError, r"params"),
    "another width": (lambda f: edit(f, "network", width=9), ValueError, r"16|9|shape"),
    "an unknown network": (lambda f: edit(f, "network", name="perceptrn"), ValueError, r"'perceptrn'.*'perceptron'"),
    "an unknown field": (lambda f: edit(f, "network", widht=8), ValueError, r"'widht'.*'width'"),
    "an unknown schedule": (lambda f: edit(f, "schedule", name="cosin"), ValueError, r"'cosin'.*'cosine'"),
    "a mistyped field": (lambda f: edit(f, "schedule", logsnr_min="low"), TypeError, r"logsnr_min.*float.*'low'"),
}


def edit(folder: Path, part: str, **changes: Any) -> None:
    """Changes fields of an artefact's description."""
    content = json.loads((folder / "model.json").read_text())
    content["model"][part].update(changes)
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
    "a momentum of 1": (lambda: ema.log_momentum(1.0), r"momentum must be in \[0, 1\), got 1\.0"),
    "a negative momentum": (lambda: ema.log_momentum(-0.1), r"got -0\.1"),
    "a momentum that is no number": (lambda: ema.log_momentum(float("nan")), r"got nan"),
    "a negative clip": (lambda: OptimizerSettings(grad_clip=-1.0), r"must not be negative.*grad_clip=-1\.0"),
    "b2 of 1": (lambda: OptimizerSettings(b2=1.0), r"b1 and b2 below 1.*b2=1\.0"),
    "a batch of zero": (lambda: runs.Settings(batch_size=0), r"batch_size must be .*at least 1, got 0"),
    "half a batch": (lambda: runs.Settings(batch_size=1.5), r"batch_size.*1\.5"),  # type: ignore[arg-type]
    "logging never": (lambda: runs.Settings(log_every=0), r"log_every.*got 0"),
    "a batch that does not split": (lambda: sharding.check_batch(12, sharding.data_mesh()), r"devices \(8\), got 12"),
    "too many output channels": (lambda: Model(toys.Perceptron(2), (2, 2, 1)), r"network with 1 .*out_ch=2.*Set"),
    "images without channels": (lambda: Model(toys.Perceptron(1), (2, 2)), r"width, channels\), got \(2, 2\)"),  # type: ignore[arg-type]
    "an unknown prediction": (lambda: Model(toys.Perceptron(1), (2, 2, 1), prediction="epsilon"), r"'epsilon'"),
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_told_what_it_is_and_what_is_allowed(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
