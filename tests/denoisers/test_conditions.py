"""Conditions of every kind, data of every shape, and denoisers that are given as they are."""

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

import diffusion_distill as dd
from diffusion_distill.base.arrays import Array, expand
from diffusion_distill.denoisers import conditions
from diffusion_distill.process.processes import Cosine

SETTINGS = dd.Settings(batch_size=16, seed=1)
STRUCT = jax.ShapeDtypeStruct


class Sees(nn.Module):
    """A network that adds up its condition, so that every part of it counts."""

    @nn.compact
    def __call__(self, z: Array, time: Array, cond: Any = None) -> Array:
        hidden = nn.Dense(z.shape[-1])(z) + expand(self.param("slope", nn.initializers.ones, ()) * time / 1000, z)
        for k, leaf in enumerate(jax.tree.leaves(cond)):
            flat = leaf.reshape(len(leaf), -1).astype(jnp.float32)
            hidden += expand((flat @ self.param(f"of_{k}", nn.initializers.normal(1), (flat.shape[1], 1)))[:, 0], z)
        return hidden


#: One sample's condition, and its null condition.
KINDS: dict[str, tuple[Any, Any]] = {
    "a label without classes": (STRUCT((), jnp.int32), -1),
    "a number": (1.0, 0.0),
    "tokens": (np.zeros((3, 4), np.float32), np.full((3, 4), 0.25)),
    "an image and a mask": (
        {"image": STRUCT((2, 2, 1), jnp.float32), "mask": STRUCT((2,), jnp.bool_)},
        {"image": np.zeros((2, 2, 1)), "mask": np.array([False, True])},
    ),
}
every_kind = pytest.mark.parametrize(("cond", "null"), KINDS.values(), ids=KINDS)


def drawn(model: dd.Model, count: int, seed: int = 0) -> Any:
    """Conditions of samples, none of them the null condition."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.integers(2, 9, a.shape).astype(a.dtype), conditions.structs(model, count))


@every_kind
def test_conditions_of_every_kind_are_dropped_whole_and_as_often_as_the_rate_says(cond: Any, null: Any) -> None:
    model = dd.Model(Sees(), (2, 2, 1), cond=cond, null=null)
    given, rate = drawn(model, 2000), 0.3
    found = jax.jit(lambda cond: conditions.drop(model, cond, rate, jax.random.key(0)))(given)
    empty = conditions.null_like(model, given)
    of = lambda tree, k: jax.tree.map(lambda a: np.asarray(a)[k], tree)  # noqa: E731
    dropped = np.array([equal(of(found, k), of(empty, k)) for k in range(2000)])
    assert all(equal(of(found, k), of(given, k)) for k in np.flatnonzero(~dropped))
    assert dropped.mean() == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / 2000))
    assert equal(conditions.drop(model, given, 0.0, jax.random.key(0)), given)


@every_kind
def test_conditions_of_every_kind_are_trained_sampled_distilled_and_kept(
    cond: Any, null: Any, tmp_path: Any, one_device: None
) -> None:
    model = dd.Model(Sees(), (3, 2), prediction="v", cond=cond, null=null)
    given = drawn(model, 32)
    source = dd.data.from_arrays(np.random.default_rng(0).uniform(-1, 1, (32, 3, 2)), given, num_classes=0)
    method = dd.Denoising(length=64, label_dropout=0.2)
    teacher = dd.train(model, source, method, SETTINGS, tmp_path)
    [student] = dd.distill(teacher, source, dd.Tract((2, 1), length=32), SETTINGS).values()
    images = dd.sample(student, 4, cond=drawn(model, 4), clip=False)
    assert images.shape == (4, 3, 2)
    assert not np.allclose(images, dd.sample(student, 4, cond=drawn(model, 4, seed=1), clip=False), atol=1e-4), (
        "it is heard"
    )
    assert dd.Artefact.load(tmp_path / "teacher", model.network).model == model
    with pytest.raises(ValueError, match="cond is missing: the model takes"):
        dd.sample(student, 4)


LABELS = dd.Model(toys.Perceptron(1, num_classes=3), (2, 2, 1))
TOKENS = dd.Model(Sees(), (2, 2, 1), cond={"tokens": STRUCT((3, 4), jnp.float32)})
NONE = dd.Model(Sees(), (2, 2, 1))
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "unwanted": (lambda: conditions.check(NONE, [1, 2], 2), "model is unconditional. Leave it out"),
    "labels out of range": (lambda: conditions.check(LABELS, [0, 3], 2), r"in \[0, 2\], got values from 0 to 3"),
    "too few labels": (lambda: conditions.check(LABELS, [0], 2), r"2 whole numbers, got shape \(1,\)"),
    "labels of floats": (lambda: conditions.check(LABELS, [0.0, 1.0], 2), "whole numbers, got .* float64"),
    "missing": (lambda: conditions.for_samples(TOKENS, 2, None, 0), r"the model takes tokens float32\[2, 3, 4\]"),
    "another name": (
        lambda: conditions.check(TOKENS, {"text": np.zeros((2, 3, 4))}, 2),
        r"must be tokens float32\[2, 3, 4\].*Got text float32\[2, 3, 4\]",
    ),
    "another shape": (
        lambda: conditions.check(TOKENS, {"tokens": np.zeros((3, 4))}, 2),
        r"one per sample, for 2 samples\. Got shape \[3, 4\], type float64 for tokens",
    ),
    "another kind": (
        lambda: conditions.check(TOKENS, {"tokens": np.zeros((2, 3, 4), bool)}, 2),
        "type bool for tokens",
    ),
    "no null condition": (
        lambda: conditions.null_like(TOKENS, {"tokens": np.zeros((2, 3, 4))}),
        r"no null condition.*null=\.\.\.",
    ),
    "null without cond": (lambda: dd.Model(Sees(), (2,), null=1), "null was given without cond"),
    "another null": (
        lambda: dd.Model(Sees(), (2,), cond=np.zeros(3), null=np.zeros(2)),
        r"null must be float32\[3\].*Got shape \[2\]",
    ),
    "a source of other conditions": (
        lambda: dd.train(TOKENS, dd.data.from_arrays(np.zeros((8, 2, 2, 1))), None, SETTINGS),
        "the data's cond is missing: the model takes tokens",
    ),
    "a source without bounds": (
        lambda: dd.train(NONE, dd.data.from_arrays(np.ones((8, 2, 2, 1)), value_range=None), None, SETTINGS),
        r"no bounds.*Model\(data_range=None\)",
    ),
    "no network": (lambda: dd.Model(len, (2,)), r"A network must be .* dd\.Functions\(init, apply\).* got <built-in"),
    "an output of another shape": (
        lambda: dd.Model(dd.Functions(lambda key, z, t: (), lambda p, z, t: z[:, 0]), (2, 3)).denoiser(())(
            jnp.zeros((1, 2, 3)), Cosine().level(jnp.full(1, 0.5))
        ),
        r"gives \(1, 3\) for a batch \(1, 2, 3\).* must be \(1, 2, 3\): channels last",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_told(make: Callable[[], Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        make()


@pytest.mark.fast
def test_labels_are_drawn_where_none_are_given() -> None:
    found = conditions.for_samples(LABELS, 6, None, 3)
    np.testing.assert_array_equal(found, np.random.default_rng(3).integers(3, size=6))
    assert conditions.for_samples(NONE, 6, None, 0) is None
    assert conditions.null_of(LABELS) == 3 and conditions.null_of(NONE) is None


@pytest.mark.parametrize("shape", [(5,), (4, 2), (2, 2, 2, 3)], ids=str)
def test_data_of_every_rank_without_bounds(shape: tuple[int, ...], one_device: None) -> None:
    """Standardised data: nothing is clipped on the way, and the student's samples leave [-1, 1]."""
    model = dd.Model(Sees(), shape, prediction="v", data_range=None)
    data = np.random.default_rng(0).normal(3, 0.1, (32, *shape)).astype(np.float32)
    source = dd.data.from_arrays(data, value_range=None)
    np.testing.assert_array_equal(source.gather(np.arange(32))["x"], data)
    teacher = dd.train(model, source, dd.Denoising(length=640, learning_rate=0.1, warmup=0, momentum=0.5), SETTINGS)
    for method in (dd.Tract((2, 1), length=32, clip="both"), dd.Knowledge(1, length=32)):
        [student] = dd.distill(teacher, source, method, SETTINGS).values()
        drawn = dd.sample(student, 64)
        assert drawn.shape == (64, *shape) and np.mean(drawn > 1) > 0.9
    exact = dd.sample(teacher, 64, steps=8)
    assert np.mean(exact) == pytest.approx(3, abs=1)


def optimal(z: Array, level: Any, cond: Any = None) -> Array:
    """E[x | z] of Gaussian data, as a plain function."""
    return toys.Gaussian(0.2, 0.3).raw((), z, level, None, None)


def test_a_plain_function_is_sampled_fitted_and_distilled(one_device: None) -> None:
    """Everything is as with a denoiser that the library made."""
    plain = dd.Artefact.of(optimal, (2, 2, 1), Cosine(), data_range=None)
    images = dd.sample(plain, 256, 200)
    assert np.mean(images) == pytest.approx(0.2, abs=0.05) and np.std(images) == pytest.approx(0.3, abs=0.05)
    fitted = dd.fit_solver(plain, "ddim", 4, dd.FitSettings(batch_size=16, scale=4))
    exact, solved, bare = (dd.sample(plain, 64, steps=s, fitted=f) for s, f in ((400, None), (None, fitted), (4, None)))
    assert np.abs(solved - exact).mean() < 0.5 * np.abs(bare - exact).mean()
    network = toys.AffinePerLevel(2)
    student = dd.Model(network, (2, 2, 1), prediction="v")
    source = toys.GaussianSource(toys.Gaussian(0.2, 0.3))
    with pytest.raises(ValueError, match="give the student a network of its own"):
        dd.train(plain.model, source, None, SETTINGS)
    [made] = dd.distill(plain, source, dd.Knowledge(2, length=16), SETTINGS, student=student).values()
    assert np.isfinite(dd.sample(made, 4)).all()
    with pytest.raises(ValueError, match="function cannot be saved"):
        plain.save("anywhere")


def test_a_stream_is_trained_on_and_goes_on_where_it_stopped(tmp_path: Any, one_device: None) -> None:
    """A function of the step, with a condition; watched, without pictures, which vectors have none of."""

    def at(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(step)
        return {"x": rng.normal(0, 1, (16, 5)).astype(np.float32), "cond": rng.normal(0, 1, 16).astype(np.float32)}

    source = dd.data.from_batches(at, (5,), value_range=None)
    model = dd.Model(Sees(), (5,), prediction="v", cond=0.0, null=0.0, data_range=None)
    method = dd.Denoising(length=96)
    settings = dataclasses.replace(SETTINGS, evaluate_every="48", evaluate_count=0)
    whole = dd.train(model, source, method, settings, tmp_path / "whole")
    dd.train(model, source, dataclasses.replace(method, length=48), settings, tmp_path / "parts")
    assert equal(dd.train(model, source, method, settings, tmp_path / "parts").params, whole.params)
    assert not list((tmp_path / "whole" / "samples").glob("*"))
    with pytest.raises(ValueError, match="measured against a stream"):
        dd.train(model, source, method, dataclasses.replace(settings, evaluate_count=8))


@dataclasses.dataclass(frozen=True)
class Odd:
    """A process of the test's own, which no registry knows."""

    def level(self, t: Array) -> Any:
        """alpha and sigma."""
        return Cosine().level(t)

    def time(self, level: Any) -> Array:
        """The inverse."""
        return Cosine().time(level)


def test_a_process_of_the_users_own_is_trained_in_memory(one_device: None) -> None:
    model = dd.Model(Sees(), (5,), Odd(), prediction="v", data_range=None)
    source = dd.data.from_arrays(np.ones((16, 5)), value_range=None)
    teacher = dd.train(model, source, dd.Denoising(length=32), SETTINGS)
    assert np.isfinite(dd.sample(teacher, 4, steps=3)).all()
