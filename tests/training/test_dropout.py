"""Dropout in training: only where it is asked for, and labels as often as it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from toys import equal

from diffusion_distill import api
from diffusion_distill.data import from_arrays
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising, Knowledge, Progressive, Tract
from diffusion_distill.networks import UNet
from diffusion_distill.training import dropout, ema, loop, sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.optimizers import OptimizerSettings, make_optimizer
from diffusion_distill.training.state import create
from diffusion_distill.training.step import StepInputs, make_step

DATA = toys.Gaussian(mean=0.1, std=0.4)
SETTINGS = api.Settings(batch_size=8)
BATCH, CLASSES = 16, 3


def model_of(num_classes: int = 1, **network: Any) -> Model:
    """A perceptron on 2x2 images."""
    return Model(toys.Perceptron(1, num_classes=num_classes, **network), (2, 2, 1), prediction="v")


def distil(teacher: Artefact, method: Any, student: Model | None = None) -> Artefact:
    """The last student on Gaussian images."""
    students = api.distill(teacher, toys.GaussianSource(DATA, size=20), method, SETTINGS, student=student)
    return students[min(students)]


# --- dropout of activations


@pytest.mark.parametrize(
    "method",
    [Tract((4, 2, 1), length=32), Progressive(4, 1, 16, last_two_longer=1.0), Knowledge(2, length=16)],
    ids=lambda method: type(method).__name__,
)
def test_students_train_without_their_teachers_dropout(method: Any, one_device: None) -> None:
    """As if the teacher had none, bit for bit."""
    plain, dropping = model_of(), model_of(dropout=0.5)
    student = distil(Artefact(dropping, toys.parameters(plain)), method)
    assert equal(student.params, distil(Artefact(plain, toys.parameters(plain)), method).params)
    assert student.model == dropping, "an artefact tells the teacher's rate"


def test_students_train_with_the_rate_that_is_asked_for(one_device: None) -> None:
    """By the method, or by a student that differs from the teacher's network in it: then in several phases too."""
    method, plain, dropping = Tract((4, 2, 1), length=32), model_of(), model_of(dropout=0.5)
    params = toys.parameters(plain)
    student, asked = distil(Artefact(plain, params), method), dataclasses.replace(method, dropout=0.5)
    dropped = distil(Artefact(plain, params), asked)
    assert not equal(dropped.params, student.params) and dropped.model == plain
    assert equal(dropped.params, distil(Artefact(dropping, params), method, student=dropping).params), "its own rate"
    silenced = distil(Artefact(plain, params), dataclasses.replace(method, dropout=0.0), student=dropping)
    assert equal(silenced.params, student.params), "the method's rate goes before the student's own"


@pytest.mark.fast
def test_a_student_that_differs_in_dropout_only_is_the_teachers_network() -> None:
    network = UNet(32, 16, 1, (1,), 1, (), num_heads=1, num_classes=3)
    model = Model(network, (4, 4, 1))
    other = model.with_network(dropout=0.3, label_dropout=0.1)
    assert dropout.same_but_for_dropout(model, other)
    assert dropout.same_but_for_dropout(model, other.with_network(remat=True))
    assert not dropout.same_but_for_dropout(model, other.with_network(emb_ch=8))
    assert not dropout.same_but_for_dropout(model, dataclasses.replace(model, prediction="v"))


@pytest.mark.fast
def test_a_run_recomputes_the_blocks_of_networks_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained recomputes; what is saved is the model as it was given."""
    model, trained = Model(UNet(32, 16, 1, (1,), 1, (), num_heads=1), (4, 4, 1)), []
    monkeypatch.setattr(
        "diffusion_distill.api.beginning.make_step", lambda _, model, *rest, **options: trained.append(model)
    )
    monkeypatch.setattr(loop, "run", lambda state, *_, **options: state)
    source, settings = from_arrays(np.zeros((8, 4, 4, 1), np.uint8)), api.Settings(batch_size=8, remat=True)
    api.distill(Artefact(model, toys.parameters(model)), source, Tract((2, 1), length=8), settings)
    assert trained == [model.with_network(remat=True)]
    other = Model(toys.Perceptron(1), (4, 4, 1))
    with pytest.raises(ValueError, match="the network Perceptron has no field 'remat'"):
        api.distill(Artefact(other, toys.parameters(other)), source, Tract((2, 1), length=8), settings)


class Plain(nn.Module):
    """A network of a user's own, without any rate."""

    num_classes: int = 1

    @nn.compact
    def __call__(self, x: Any, time: Any, labels: Any = None, train: bool = False) -> Any:
        table = self.param("table", nn.initializers.zeros, (self.num_classes,))
        shift = 0.0 if labels is None else (jax.nn.one_hot(labels, self.num_classes) * table[None]).sum(1)
        return x * self.param("slope", nn.initializers.ones, (1, 1, 1, 1)) + jnp.reshape(shift, (-1, 1, 1, 1))


def unlabelled(**fields: Any) -> Any:
    """Distils a toy with fields of the method."""
    return distil(Artefact(model_of(), toys.parameters(model_of())), Tract((2, 1), length=16, **fields))


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a rate of 1": (lambda: Tract(dropout=1.0), r"dropout must be a number in \[0, 1\), got 1\.0"),
    "a negative rate": (lambda: Progressive(dropout=-0.1), r"dropout must be .* got -0\.1"),
    "a rate that is no number": (lambda: Knowledge(dropout="0.1"), r"dropout must be .* got '0\.1'"),  # type: ignore[arg-type]
    "a label rate of nan": (lambda: Denoising(label_dropout=float("nan")), r"label_dropout must be .* got nan"),
    "a network that cannot": (
        lambda: distil(Artefact(Model(Plain(), (2, 2, 1)), {}), Tract((2, 1), length=16, dropout=0.1)),
        r"network Plain has no field 'dropout'",
    ),
    "no labels to drop": (lambda: unlabelled(label_dropout=0.1), r"label_dropout=0\.1 .* unconditional"),
}


@pytest.mark.fast
@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_rates_that_cannot_act_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# --- dropout of labels


@dataclasses.dataclass(frozen=True)
class Counting(Denoising):
    """Its loss is 1 for an image with the null label, so that the mean loss is the part of labels dropped."""

    def losses(self, denoisers: Any, inputs: Any, batch: Any, key: Any) -> Any:
        """Per-image losses [batch]."""
        labels = batch["cond"]
        null = labels == CLASSES if labels.dtype == jnp.int32 else ~labels.any(axis=1)
        student = denoisers["student"]
        nothing = 0 * student(batch["x"], student.model.process.level(jnp.full(len(labels), 0.5)), labels)
        return null + nothing.sum(axis=(1, 2, 3))


def steps(model: Model, method: Any, labels: np.ndarray, count: int, rate: float, devices: int = 1) -> tuple[Any, Any]:
    """(state, losses) after updates with the same labels."""
    mesh = sharding.data_mesh(jax.devices()[:devices])
    optimizer = make_optimizer(OptimizerSettings())
    [phase, *_] = method.phases(model, BATCH)
    averaging, rows = ema.Averaging([phase], 0, method.averages), loop.rows_of(phase)
    teacher = (model, toys.parameters(model, 1)) if not isinstance(method, Denoising) else (None, ())
    step = make_step(method.losses, model, teacher[0], optimizer, mesh, label_dropout=rate)  # type: ignore[arg-type]
    state = create(toys.parameters(model), optimizer, method.averages, teacher[1])
    state, losses = jax.device_put(state, sharding.replicated(mesh)), []
    images = np.random.default_rng(0).uniform(-1, 1, (len(labels), 2, 2, 1)).astype(np.float32)
    for k in range(count):
        batch = sharding.put_batch({"x": images, "cond": labels}, mesh)
        inputs = StepInputs(rows, np.float32(1e-2), averaging.at(k))
        state, metrics = step(state, batch, inputs, jax.random.key(5))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.fast
@pytest.mark.parametrize("network", [toys.Perceptron(1, num_classes=CLASSES), Plain(CLASSES)], ids=["toy", "plain"])
def test_labels_are_dropped_as_often_as_the_rate_says(network: Any) -> None:
    """Whatever the network: a binomial of 40·400 draws, one count on any number of devices."""
    model, rate = Model(network, (2, 2, 1)), 0.15
    labels = np.arange(400, dtype=np.int32) % CLASSES
    _, found = steps(model, Counting(length="1K"), labels, 40, rate)
    assert np.mean(found) == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / (40 * 400)))
    assert len(set(found)) > 10, "other labels in every update"
    _, spread = steps(model, Counting(length="1K"), labels, 3, rate, devices=8)
    np.testing.assert_allclose(spread, found[:3], rtol=1e-6)


@pytest.mark.fast
def test_label_vectors_are_dropped_whole() -> None:
    vectors = np.random.default_rng(0).uniform(1, 2, (4000, CLASSES)).astype(np.float32)
    found = conditions.drop(model_of(CLASSES), jnp.asarray(vectors), 0.25, jax.random.key(0))
    kept = np.any(np.asarray(found), axis=1)
    np.testing.assert_array_equal(found, vectors * np.reshape(kept, (-1, 1)))
    assert np.mean(~kept) == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 4000))


@pytest.mark.parametrize("method", [Denoising(length="1K"), Tract((4, 1), length="1K")], ids=lambda m: type(m).__name__)
def test_dropping_every_label_is_training_without_classes(method: Any) -> None:
    """For all roles alike, with the noise and the dropout that an update has without it, bit for bit."""
    model, labels = model_of(CLASSES, dropout=0.3), np.arange(BATCH, dtype=np.int32) % CLASSES
    dropped, first = steps(model, method, labels, 2, 1 - 1e-9)
    null, second = steps(model, method, np.full_like(labels, CLASSES), 2, 0.0)
    kept, third = steps(model, method, labels, 2, 0.0)
    assert equal(dropped, null) and first == second
    assert not equal(dropped.params, kept.params) and first != third


@pytest.mark.fast
def test_the_rate_is_the_methods_or_else_the_networks() -> None:
    network = UNet(32, 16, 1, (1,), 1, (), num_heads=1, num_classes=3, label_dropout=0.1)
    model = Model(network, (4, 4, 1))
    assert dropout.label_dropout_of(model, None) == 0.1 and dropout.label_dropout_of(model, 0.0) == 0.0
    assert dropout.label_dropout_of(model, 0.3) == 0.3
    assert dropout.label_dropout_of(model_of(CLASSES), None) == 0.0
    assert dropout.label_dropout_of(model.with_network(num_classes=1), None) == 0.0, "a file may say so"


class Labelled(toys.Perceptron):
    """A network with a rate of its own for its labels, and no other dropout."""

    label_dropout: float = 0.0


def test_a_networks_own_rate_acts_in_training_and_in_distillation(one_device: None) -> None:
    """Weights of labels that are all dropped stay as they are: their gradient is zero."""
    model = Model(Labelled(1, num_classes=2, label_dropout=1 - 1e-9), (2, 2, 1), prediction="v")
    of_labels = lambda params: np.asarray(params["Dense_0"]["kernel"])[-2:]  # noqa: E731
    source = from_arrays(np.random.default_rng(0).uniform(-1, 1, (16, 2, 2, 1)), np.arange(16) % 2)
    begun, method = model.init(jax.random.key(SETTINGS.seed)), Denoising(length=24, learning_rate=1e-2, warmup=0)
    teacher = api.train(model, source, method, SETTINGS)
    np.testing.assert_array_equal(of_labels(teacher.params), of_labels(begun))
    assert not equal(teacher.params, begun)
    [student] = api.distill(teacher, source, Tract((2, 1), length=24, learning_rate=1e-2), SETTINGS).values()
    np.testing.assert_array_equal(of_labels(student.params), of_labels(begun))
    assert not equal(student.params, teacher.params) and student.model == model
    learned = api.train(model, source, dataclasses.replace(method, label_dropout=0.0), SETTINGS)
    assert np.abs(of_labels(learned.params) - of_labels(begun)).min() > 1e-4, "the method's rate goes before it"
