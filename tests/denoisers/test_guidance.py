"""Guidance and thresholding against the exact denoisers of a mixture of Gaussians, one per class: `toys.Classes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import struct
from toys import MEANS, NULL, STDS, Classes

from diffusion_distill.base.arrays import expand
from diffusion_distill.denoisers.clipping import Clipped, Thresholded
from diffusion_distill.denoisers.guidance import AtScale, ClassifierFree, ClassifierGuided
from diffusion_distill.denoisers.model import Denoiser, Model
from diffusion_distill.process.grids import make_grid
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import eps_from_x
from diffusion_distill.process.processes import VE, Cosine
from diffusion_distill.solvers import dpm_solver_pp, engine
from diffusion_distill.training.sharding import data_mesh, replicated, split

LABELS = np.array([0, 1, 2, 2, 1, 0, 1, 2], np.int32)
Z = np.random.default_rng(0).normal(size=(8, 2, 2, 1))
#: One level per sample, from nearly clean to nearly noise.
LEVELS = {"VP": Cosine(-8, 8).level(np.arange(8) / 7), "VE": VE(1.0).level(np.geomspace(0.05, 20, 8))}
every_level = pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)


class Classifier(struct.PyTreeNode):
    """The exact classifier, a JAX tree."""

    data: Classes

    def __call__(self, z: Any, level: Level, labels: Any) -> Any:
        return self.data.log_prob(z, level, labels)


class Watched(struct.PyTreeNode):
    """A denoiser that notes the labels of its calls."""

    denoise: Any
    calls: list = struct.field(pytree_node=False, default_factory=list)

    def __call__(self, z: Any, level: Level, labels: Any = None) -> Any:
        assert labels is None or len(labels) == len(z)
        self.calls.append((len(z), None if labels is None else list(labels)))
        return self.denoise(z, level, labels)


def classes(device: bool) -> Classes:
    """On the device, in float32, or on the host."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), Classes()) if device else Classes()


def on_device(*values: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.int32 if a.dtype == np.int32 else jnp.float32), values)


# --- closed forms


@pytest.mark.fast
@every_level
@pytest.mark.parametrize("device", [False, True], ids=["NumPy float64", "JAX float32"])
def test_the_exact_classifier_makes_the_unconditional_denoiser_conditional(level: Level, device: bool) -> None:
    z, levels, labels = on_device(Z, level, LABELS) if device else (Z, level, LABELS)
    exact = classes(device)
    guided = ClassifierGuided(ClassifierFree(exact, 0.0, NULL), Classifier(exact), 1.0)
    found, wanted = guided(z, levels, labels), Classes()(Z, level, LABELS)
    assert isinstance(found, jax.Array if device else np.ndarray)
    assert found.dtype == (np.float32 if device else np.float64)
    chex.assert_trees_all_close(found, wanted, rtol=0, atol=2e-5 if device else 1e-12)
    assert np.abs(wanted - Classes()(Z, level)).max() > 0.3, "there must be something to guide"


@pytest.mark.fast
@every_level
@pytest.mark.parametrize("network", ["one", "two"])
def test_classifier_free_scales(level: Level, network: str) -> None:
    exact = Classes()
    own: dict[str, Any] = {"null": NULL} if network == "one" else {"unconditional": exact}
    free = lambda s: ClassifierFree(exact, s, **own)(Z, level, LABELS)  # noqa: E731
    x_u, x_c = exact(Z, level), exact(Z, level, LABELS)
    chex.assert_trees_all_equal(free(1), x_c)
    chex.assert_trees_all_close(free(np.ones(8)), x_c, rtol=0, atol=1e-14)
    chex.assert_trees_all_close(free(0.0), x_u, rtol=0, atol=1e-14)
    eps_u, eps_c = eps_from_x(Z, x_u, level), eps_from_x(Z, x_c, level)
    scales = np.linspace(-1, 4, 8)
    wanted = eps_u + expand(scales, Z) * (eps_c - eps_u)  # as the papers write it
    chex.assert_trees_all_close(eps_from_x(Z, free(scales), level), wanted, rtol=0, atol=1e-10)


@pytest.mark.fast
@every_level
@pytest.mark.parametrize("scale", [0, 0.7, 2.5, np.linspace(0, 7, 8)], ids=str)
def test_classifier_guidance_of_noise(level: Level, scale: Any) -> None:
    exact, step = Classes(), 1e-5
    found = ClassifierGuided(exact, exact.log_prob, scale)(Z, level, LABELS)
    gradient = np.zeros_like(Z)
    for pixel in np.ndindex(Z.shape[1:]):  # by differences
        move = np.zeros(Z.shape[1:])
        move[pixel] = step
        ahead, back = (exact.parts(z, level)[0] for z in (Z + move, Z - move))
        slope = [log_softmax(a)[np.arange(8), LABELS] for a in (ahead, back)]
        gradient[:, *pixel] = (slope[0] - slope[1]) / (2 * step)
    sigma = level.expand(Z).sigma
    wanted = eps_from_x(Z, exact(Z, level, LABELS), level) - expand(scale, Z) * sigma * gradient
    chex.assert_trees_all_close(eps_from_x(Z, found, level), wanted, rtol=1e-6, atol=1e-6)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


# --- calls of the network


@pytest.mark.fast
@pytest.mark.parametrize("scale", [2.0, 0, np.full(8, 3.0), np.array(1.0)], ids=str)
def test_both_estimates_come_from_one_call(scale: Any) -> None:
    watched = Watched(Classes())
    ClassifierFree(watched, scale, NULL)(Z, LEVELS["VP"], LABELS)
    assert watched.calls == [(16, [NULL] * 8 + list(LABELS))]


@pytest.mark.fast
@pytest.mark.parametrize("scale", [1, 1.0, None])
def test_no_guidance_needs_no_unconditional_estimate(scale: Any) -> None:
    watched, other = Watched(Classes()), Watched(Classes())
    guided = ClassifierFree(watched, scale, NULL, other)
    jax.jit(lambda d, z, labels: d(z, Level(0.6, 0.8), labels))(guided, Z, LABELS)
    assert len(watched.calls) == 1
    assert not other.calls
    assert guided.replace(scale=2.0).scale == 2.0
    with pytest.raises(AssertionError, match="classifier"):
        ClassifierGuided(watched, _unwanted, 2.0)(Z, LEVELS["VP"], LABELS)
    ClassifierGuided(watched, _unwanted, 0.0)(Z, LEVELS["VP"], LABELS)


def _unwanted(z: Any, level: Level, labels: Any) -> Any:
    raise AssertionError("the classifier was asked")


@pytest.mark.fast
@pytest.mark.parametrize(("null", "told"), [(None, None), (7, [7] * 8)])
def test_an_unconditional_network_of_its_own(null: int | None, told: Any) -> None:
    watched, other = Watched(Classes()), Watched(lambda z, level, labels: 0 * z)
    found = ClassifierFree(watched, 3.0, null, other)(Z, LEVELS["VP"], LABELS)
    assert other.calls == [(8, told)]
    assert watched.calls == [(8, list(LABELS))]
    chex.assert_trees_all_close(found, 3 * Classes()(Z, LEVELS["VP"], LABELS), rtol=1e-14)


@pytest.mark.fast
@pytest.mark.parametrize(
    "guide",
    [
        lambda scale: ClassifierFree(Classes(), scale, NULL),
        lambda scale: ClassifierFree(Classes(), scale, None, Classes()),
        lambda scale: ClassifierGuided(Classes(), Classifier(Classes()), scale),
        lambda scale: Thresholded(ClassifierFree(Classes(), scale, NULL), 0.8),
    ],
    ids=["free", "free, two networks", "classifier", "thresholded"],
)
def test_a_sample_does_not_depend_on_its_batch(guide: Callable[[Any], Any]) -> None:
    level, scales = LEVELS["VP"], np.linspace(0, 6, 8)
    together = guide(scales)(Z, level, LABELS)
    for i in range(8):
        one = slice(i, i + 1)
        alone = guide(float(scales[i]))(Z[one], level.at(one), LABELS[one])
        chex.assert_trees_all_close(alone, together[one], rtol=0, atol=1e-13)
    same = Level(*(a[3] for a in level))  # a level of all samples
    chex.assert_trees_all_close(guide(scales)(Z, same, LABELS)[3], together[3], rtol=0, atol=1e-13)


# --- conditions of any kind

TEXT = {"tokens": np.random.default_rng(3).normal(size=(8, 4, 3)), "length": np.arange(8, dtype=np.int32)}
NO_TEXT = {"tokens": np.zeros((4, 3)), "length": np.int32(0)}


class Texts(struct.PyTreeNode):
    """Its estimate is 1 where there is no text, else a mean of the tokens and the length."""

    model: Any = struct.field(pytree_node=False, default=None)

    @property
    def data_range(self) -> Any:
        return self.model.data_range

    def __call__(self, z: Any, level: Level, cond: Any = None) -> Any:
        told = cond["tokens"].mean(axis=(1, 2)) + cond["length"] + (abs(cond["tokens"]).sum(axis=(1, 2)) == 0)
        return told.reshape(-1, 1, 1, 1) + 0 * z


@pytest.mark.fast
@pytest.mark.parametrize("wrap", [lambda d: d, Clipped, Thresholded], ids=["alone", "clipped", "thresholded"])
@pytest.mark.parametrize("named_by", ["the guidance", "the model"])
def test_conditions_are_trees_with_a_null_condition(named_by: str, wrap: Any) -> None:
    """Wrappers inside and outside find the model: its null condition, and that its data have no bounds."""
    model = Model(toys.Perceptron(1), (2, 2, 1), cond=jax.tree.map(lambda a: a[0], TEXT), null=NO_TEXT, data_range=None)
    scales = np.linspace(-1, 3, 8)
    null = NO_TEXT if named_by == "the guidance" else None
    found = wrap(ClassifierFree(wrap(Texts(model)), scales, null))(Z, LEVELS["VP"], TEXT)
    wanted = 1 + scales * (TEXT["tokens"].mean(axis=(1, 2)) + TEXT["length"] - 1)
    assert np.abs(wanted).max() > 10
    chex.assert_trees_all_close(found[:, 0, 0, 0], wanted, rtol=1e-5, atol=1e-5)


# --- sampling


NOISY_TO_CLEAN = Cosine(-8, 8)


def multistep(steps: int) -> Any:
    """A table of second order."""
    return dpm_solver_pp(make_grid(NOISY_TO_CLEAN, steps, "logsnr"), order=2)


GUIDED = {
    # (guided denoiser, means, standard deviations) of the distribution that its samples have
    "classifier": (lambda e: ClassifierGuided(ClassifierFree(e, 0.0, NULL), Classifier(e), 1.0), MEANS, STDS),
    "classifier, a function": (lambda e: ClassifierGuided(ClassifierFree(e, 0.0, NULL), e.log_prob, 1.0), MEANS, STDS),
    "free": (lambda e: ClassifierFree(e, 1.0, NULL), MEANS, STDS),
    # Between Gaussians of one width guidance shifts the mean: mu_u + s·(mu_c - mu_u).
    "free, scale 2.5": (
        lambda e: ClassifierFree(e.replace(stds=0 * e.stds + 0.4), 2.5, None, Denoiser((), toys.Gaussian(0.2, 0.4))),
        0.2 + 2.5 * (MEANS - 0.2),
        0 * STDS + 0.4,
    ),
}


@pytest.mark.parametrize("guided", GUIDED)
def test_samples_come_from_the_conditional_distribution(guided: str) -> None:
    make, means, stds = GUIDED[guided]
    exact, labels = jax.tree.map(jnp.float32, Classes()), np.repeat(np.arange(3, dtype=np.int32), 8)
    start = np.random.default_rng(1).normal(size=(24, 2, 2, 1)).astype(np.float32)
    first, last = (NOISY_TO_CLEAN.level(np.array(t)) for t in (1.0, 0.0))
    wanted = np.zeros(start.shape)
    for k in range(3):  # the exact flow of the class alone
        own = labels == k
        wanted[own] = toys.Gaussian(means[k], stds[k]).flow(start[own].astype(np.float64), first, last)
    found = [np.asarray(engine.integrate(make(exact), multistep(steps), start, labels)) for steps in (20, 40)]
    coarse, fine = (np.abs(images - wanted).max() for images in found)
    assert fine < 0.004
    assert fine < coarse / 3, "of second order"
    for k in range(3):
        mean = float(found[1][labels == k].mean())
        assert abs(mean - means[k]) < 4 * stds[k] / 32**0.5


def test_guided_sampling_compiles_once_for_all_scales() -> None:
    watched = Watched(jax.tree.map(jnp.float32, Classes()))
    results = []
    for scale in (0.0, 2.0, 3.5):
        guided = Clipped(ClassifierFree(watched, scale, NULL))
        results.append(engine.sample(jax.random.key(0), guided, multistep(4), (4, 2, 2, 1), LABELS[:4]))
    assert [n for n, _ in watched.calls] == [8]
    assert float(jnp.abs(results[1] - results[2]).max()) > 1e-2
    assert float(jnp.abs(results[1] - results[0]).max()) > 1e-2


def test_guidance_on_all_devices(toy_networks: None) -> None:
    model = Model(toys.Perceptron(out_ch=1, num_classes=3), (2, 2, 1), prediction="v")
    denoise = model.denoiser(toys.parameters(model))
    found = []
    for devices in (1, 8):
        mesh = data_mesh(jax.devices()[:devices])
        guided = jax.device_put(ClassifierFree(denoise, 2.0, NULL), replicated(mesh))
        z, level, labels = jax.device_put(on_device(Z, LEVELS["VP"], LABELS), split(mesh))
        found.append(np.asarray(jax.jit(lambda d, *inputs: d(*inputs))(guided, z, level, labels)))
    chex.assert_trees_all_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    unguided = denoise(*on_device(Z, LEVELS["VP"], LABELS))
    assert np.abs(found[0] - unguided).max() > 1e-2


# --- thresholding


@pytest.mark.fast
@pytest.mark.parametrize("device", [False, True], ids=["NumPy", "JAX"])
@pytest.mark.parametrize("quantile", [0.0, 0.35, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("floor", [0.25, 1.0, 2.5])
def test_dynamic_thresholding(quantile: float, floor: float, device: bool) -> None:
    rows = np.arange(25.0) * np.array([0.02, 0.05, 0.1, 0.5])[:, None]  # 0, step, ... 24·step
    rng = np.random.default_rng(2)
    images = rng.permuted(rows * rng.choice([-1, 1], rows.shape), axis=1).reshape(4, 5, 5, 1)
    exact = Watched(lambda z, level, labels: z)
    x = jnp.asarray(images, jnp.float32) if device else images
    found = Thresholded(exact, quantile, floor)(x, Level(1.0, 0.0))
    size = 24 * quantile * np.array([0.02, 0.05, 0.1, 0.5])  # of equally spaced values, by linear interpolation
    size = np.maximum(size, floor)[:, None, None, None]
    wanted = np.where(np.abs(images) < size, images / size, np.sign(images))
    chex.assert_trees_all_close(found, wanted, rtol=0, atol=1e-6 if device else 1e-15)
    assert found.dtype == x.dtype
    assert np.abs(found).max() <= 1


@pytest.mark.fast
def test_thresholding_leaves_images_in_range_alone_and_can_be_jitted() -> None:
    denoise = Denoiser(params=(), model=toys.Gaussian(0.1, 0.1))
    z, level = on_device(0.3 * Z, Level(np.ones(8), 0 * np.ones(8) + 0.1))
    plain = denoise(z, level)
    found = jax.jit(lambda d, z, level: d(z, level))(Thresholded(denoise), z, level)
    chex.assert_trees_all_close(found, plain, rtol=0, atol=1e-7)
    assert np.abs(plain).max() > 0.1


# --- errors

SIZED = Denoiser(params=(), model=Model(toys.Perceptron(out_ch=1, num_classes=3), (2, 2, 1)))
NAMELESS = Denoiser(params=(), model=Model(toys.Perceptron(out_ch=1), (2, 2, 1), cond=np.zeros(3)))
ALONE = Denoiser(params=(), model=Model(toys.Perceptron(out_ch=1), (2, 2, 1)))
STUDENT = Denoiser(params=(), model=Model(toys.Perceptron(out_ch=1, num_classes=3), (2, 2, 1), guided=(1, 4)))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ClassifierFree(Classes(), 2.0), "needs `null`"),
        (lambda: ClassifierFree(Classes(), 2.0, -1), "whole number at least 0, got -1"),
        (lambda: ClassifierFree(Classes(), 2.0, 1.5), "whole number at least 0, got 1.5"),  # type: ignore[arg-type]
        (lambda: ClassifierFree(Clipped(SIZED), 2.0, 4), r"in \[0, 3\], where 3 is the zero vector, got 4"),
        (lambda: ClassifierFree(Classes(), 2.0, 4, SIZED), r"in \[0, 3\]"),
        (lambda: ClassifierFree(ALONE, 2.0, 0), "unconditional"),
        (lambda: ClassifierFree(NAMELESS, 2.0), "A model can name its own"),
        (lambda: ClassifierFree(Clipped(STUDENT), 2.0), "guided already"),
        (lambda: ClassifierFree(AtScale(STUDENT, 2.0), 1.0, NULL), "guided already"),
        (lambda: ClassifierGuided(STUDENT, Classes().log_prob, 2.0), "guided already"),
        (lambda: ClassifierFree(Classes(), float("nan"), NULL), "finite"),
        (lambda: ClassifierFree(Classes(), np.array([1, np.inf]), NULL), "finite"),
        (lambda: ClassifierFree(Classes(), "2", NULL), "finite number.*'2'"),
        (lambda: ClassifierGuided(Classes(), Classes().log_prob, float("inf")), "finite"),
        (lambda: Thresholded(Classes(), -0.1), r"in \[0, 1\], got -0.1"),
        (lambda: Thresholded(Classes(), 1.1), r"in \[0, 1\], got 1.1"),
        (lambda: Thresholded(Classes(), float("nan")), r"in \[0, 1\], got nan"),
        (lambda: Thresholded(Classes(), 0.9, 0.0), "positive and finite, got 0.0"),
        (lambda: Thresholded(Classes(), 0.9, float("inf")), "positive and finite, got inf"),
    ],
)
def test_what_cannot_be_made_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("guided", "labels", "said"),
    [
        (ClassifierFree(Classes(), 2.0, NULL), None, "cond is missing"),
        (ClassifierFree(Classes(), 1.0, NULL), None, "cond is missing"),
        (ClassifierGuided(Classes(), Classes().log_prob, 2.0), None, "cond is missing"),
        (ClassifierFree(Classes(), 2.0, NULL), LABELS[:3], r"\[batch\] = \(8,\), got shape \(3,\)"),
        (ClassifierFree(Classes(), 2.0, NULL), LABELS.astype(float), "type float64"),
        (ClassifierFree(Classes(), 2.0, NULL), np.eye(8), r"shape \(8, 8\)"),
        (ClassifierFree(Texts(), 2.0, NO_TEXT), TEXT["tokens"], "tree like the null condition"),
        (ClassifierFree(Texts(), 2.0, {**NO_TEXT, "tokens": np.zeros((5, 3))}), TEXT, r"shape \(5, 3\).*\(8, 4, 3\)"),
        (ClassifierFree(Classes(), np.ones(3), NULL), LABELS, r"scale must be a number or \[batch\] = \(8,\)"),
        (ClassifierGuided(Classes(), Classes().log_prob, np.ones((8, 1))), LABELS, "scale must be"),
        (AtScale(STUDENT, np.ones(3)), LABELS, r"scale must be a number or \[batch\] = \(8,\)"),
        (AtScale(STUDENT, 2.0), None, "cond is missing"),
        (STUDENT, LABELS, 'called with cond={"guidance": scale'),
        (
            ClassifierGuided(Classes(), lambda z, level, labels: Classes().parts(z, level)[0], 2.0),
            LABELS,
            r"got \(8, 3\)\. From logits .*label_log_prob",
        ),
    ],
)
def test_calls_with_other_shapes_are_refused(guided: Any, labels: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        guided(Z, LEVELS["VP"], labels)
