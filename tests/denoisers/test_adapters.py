"""One door: networks of every library do everything that the library's own do. The same tests for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import equal

import diffusion_distill as dd
from diffusion_distill.base.arrays import Array
from diffusion_distill.denoisers.network import Network
from diffusion_distill.process.levels import Level

SHAPE, WIDTH, RATE = (3, 2), 12, 0.5
SETTINGS = dd.Settings(batch_size=16, seed=1)


def features(z: Array, time: Array) -> Array:
    """What a small network sees of samples [..., 3, 2] and times [...]."""
    return jnp.concatenate([z.reshape(*z.shape[:-2], -1), time[..., None] / 1000], axis=-1)


class LinenNetwork(nn.Module):
    """In Flax Linen."""

    dropout: float = RATE

    @nn.compact
    def __call__(self, z: Array, time: Array, cond: None = None, train: bool = False) -> Array:
        hidden = nn.tanh(nn.Dense(WIDTH)(features(z, time)))
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return nn.Dense(6)(hidden).reshape(z.shape)


def linen_plain() -> nn.Module:
    """One that takes neither a condition nor `train`."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, z: Array, time: Array) -> Array:
            return nn.Dense(6)(nn.tanh(nn.Dense(WIDTH)(features(z, time)))).reshape(z.shape)

    return Plain()


def nnx_network() -> Any:
    """In Flax NNX; it holds its parameters, and means of batch normalisation that stay as they are."""
    nnx = pytest.importorskip("flax.nnx")

    class NnxNetwork(nnx.Module):
        def __init__(self, rngs: Any):
            self.first, self.second = nnx.Linear(7, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
            self.dropout = nnx.Dropout(RATE, rngs=rngs)

        def __call__(self, z: Array, time: Array) -> Array:
            hidden = self.dropout(self.norm(nnx.tanh(self.first(features(z, time)))))
            return self.second(hidden).reshape(z.shape)

    return NnxNetwork(nnx.Rngs(0))


def equinox_network() -> Any:
    """In Equinox, for one sample."""
    eqx = pytest.importorskip("equinox")

    class EquinoxNetwork(eqx.Module):
        layers: list
        dropout: Any
        order: Any

        def __init__(self, key: Any):
            first, second = jax.random.split(key)
            self.layers = [eqx.nn.Linear(7, WIDTH, key=first), jnp.tanh, eqx.nn.Linear(WIDTH, 6, key=second)]
            self.dropout = eqx.nn.Dropout(RATE)
            self.order = jnp.arange(6)

        def __call__(self, z: Array, time: Array, cond: None = None, *, key: Any = None) -> Array:
            assert z.shape == SHAPE and time.shape == ()
            first, activation, second = self.layers
            hidden = self.dropout(activation(first(features(z, time))), key=key)
            return second(hidden)[self.order].reshape(z.shape)

    return EquinoxNetwork(jax.random.key(0))


def haiku_network() -> Any:
    """In Haiku."""
    hk = pytest.importorskip("haiku")

    def network(z: Array, time: Array, cond: None = None, train: bool = False) -> Array:
        hidden = jnp.tanh(hk.Linear(WIDTH)(features(z, time)))
        hidden = hk.dropout(hk.next_rng_key(), RATE, hidden) if train else hidden
        return hk.nets.MLP([6], name="a_net")(hidden).reshape(z.shape)

    return hk.transform(network)


def functions() -> Network:
    """Two functions, whose parameters are a tuple with a list in it."""

    def init(key: Any, z: Array, time: Array) -> Any:
        first, second = jax.random.split(key)
        draw = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5  # noqa: E731
        return draw(first, 7, WIDTH), [draw(second, WIDTH, 6), jnp.zeros(6)]

    def apply(params: Any, z: Array, time: Array, cond: None = None, dropout: Any = None) -> Array:
        first, (second, shift) = params
        hidden = jnp.tanh(features(z, time) @ first)
        if dropout is not None:
            hidden *= jax.random.bernoulli(dropout, 1 - RATE, hidden.shape) / (1 - RATE)
        return (hidden @ second + shift[None]).reshape(z.shape)

    return dd.Functions(init, apply)


NETWORKS: dict[str, Callable[[], Any]] = {
    "linen": LinenNetwork,
    "linen without options": linen_plain,
    "nnx": nnx_network,
    "equinox": equinox_network,
    "haiku": haiku_network,
    "functions": functions,
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


class Counts:
    """Signals in the two corners of a cube, as a source that is written by hand."""

    shape, num_classes = SHAPE, 0

    def __len__(self) -> int:
        return 64

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Signals by index."""
        signs = np.where(np.asarray(indices) % 2, 0.5, -0.5)
        return {"x": (np.ones((1, *SHAPE)) * signs[:, None, None]).astype(np.float32)}


def model_of(network: Any, **fields: Any) -> dd.Model:
    """A model of signals that predicts v."""
    return dd.Model(network, SHAPE, prediction="v", **fields)


@pytest.mark.fast
@pytest.mark.packages
@every_network
def test_a_network_of_any_library_is_a_network(make: Callable[[], Any]) -> None:
    model = model_of(make())
    params = model.init(jax.random.key(0))
    assert jax.tree.leaves(params) and all(isinstance(a, jax.Array) for a in jax.tree.leaves(params))
    z = jax.random.normal(jax.random.key(1), (5, *SHAPE))
    level = Level(jnp.full(5, 0.6), jnp.linspace(0.2, 0.8, 5))
    traced = []

    @jax.jit
    def x_hat(denoise: Any, z: Array) -> Array:
        traced.append(denoise)
        return denoise(z, level)

    plain = x_hat(model.denoiser(params), z)
    assert plain.shape == z.shape
    np.testing.assert_allclose(x_hat(model.denoiser(params), z[::-1]).shape, z.shape)
    same = model_of(model.network)
    x_hat(same.denoiser(jax.tree.map(lambda a: 2 * a, params)), z)
    assert len(traced) == 1 and same == model and hash(same) == hash(model), "compiled once for all parameters"
    alone = model.denoiser(params)(z[2:3], Level(level.alpha[2:3], level.sigma[2:3]))
    np.testing.assert_allclose(alone[0], plain[2], rtol=2e-5, atol=2e-6)
    drops = [model.denoiser(params, jax.random.key(seed))(z, level) for seed in (0, 0, 1)]
    if model.adapter.drops:
        assert not equal(drops[0], plain) and equal(drops[0], drops[1]) and not equal(drops[0], drops[2])
    silent = dataclasses.replace(model, network=model.adapter.with_dropout(0.0))
    assert not silent.adapter.drops
    np.testing.assert_allclose(silent.denoiser(params, jax.random.key(0))(z, level), plain, rtol=2e-5, atol=2e-6)


@every_network
def test_a_network_of_any_library_is_trained_distilled_and_kept(
    make: Callable[[], Any], tmp_path: Path, one_device: None
) -> None:
    model, source = model_of(make()), Counts()
    how = dd.Denoising(length=320, learning_rate=3e-2, warmup=0, momentum=0.5)
    teacher = dd.train(model, source, how, SETTINGS, tmp_path / "whole")
    assert loss(teacher) < 0.8 * loss(dd.Artefact(model, model.init(jax.random.key(1))))

    begun = dd.train(model, source, dataclasses.replace(how, length=160), SETTINGS, tmp_path / "parts")
    again = dd.train(model_of(model.network), source, how, SETTINGS, tmp_path / "parts")
    assert equal(again.params, teacher.params) and not equal(begun.params, teacher.params), "a run that went on"

    methods = (dd.Tract((4, 1), length=32), dd.Progressive(4, 2, 32), dd.Knowledge(4, length=32))
    for method in methods:
        [student] = dd.distill(teacher, source, method, SETTINGS).values()
        drawn = dd.sample(student, 6)
        assert drawn.shape == (6, *SHAPE) and np.isfinite(drawn).all() and abs(drawn).max() <= 1
    fitted = dd.fit_solver(teacher, "ddim", 3, dd.FitSettings(batch_size=8, scale=2))
    assert np.isfinite(dd.sample(teacher, 6, fitted=fitted)).all()

    folder = tmp_path / "whole" / "teacher"
    with pytest.raises(ValueError, match=r"model\.json: The network is a .* Artefact\.load\(folder, network=\.\.\.\)"):
        dd.Artefact.load(folder)
    loaded = dd.Artefact.load(folder, network=model.network)
    assert equal(loaded.params, teacher.params) and loaded.model == model
    assert jax.tree.structure(loaded.params) == jax.tree.structure(teacher.params)


def loss(artefact: dd.Artefact) -> float:
    """Of the method that trains teachers, over the same noise."""
    x = jnp.asarray(Counts().gather(np.arange(256) % 64)["x"])
    eps = jax.random.normal(jax.random.key(5), x.shape)
    u = (jnp.arange(256) + 0.5) / 256
    level = artefact.model.process.level(u)
    return float(dd.Denoising().losses_at(artefact.denoiser(clip=False), level, x, eps).mean())  # type: ignore[arg-type]
