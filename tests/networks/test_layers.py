"""Layers against closed forms and against their definitions, term by term."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import images

from diffusion_distill.networks import layers


@pytest.mark.parametrize("width", [8, 9])
def test_sinusoidal_features(width: int) -> None:
    time = np.array([0.0, 1.0, 700.0])
    features = layers.sinusoidal_features(jnp.asarray(time, jnp.float32), width)
    angles = time[:, None] * 10_000.0 ** (-np.arange(4) / 3)
    expected = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((3, width - 8))], axis=-1)
    chex.assert_trees_all_close(features, expected, rtol=1e-7, atol=1e-4)


def test_group_norm_with_film_is_the_formula_and_survives_a_large_mean() -> None:
    rng = np.random.default_rng(2)
    x = 300 + rng.normal(size=(2, 4, 4, 64)).astype(np.float32)
    scale, shift = rng.normal(size=(2, 2, 64))
    groups = x.astype(np.float64).reshape(2, 16, 32, 2)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    normal = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    expected = normal * scale[:, None, None] + shift[:, None, None]
    out = layers.group_norm(jnp.asarray(x), jnp.asarray(scale, jnp.float32), jnp.asarray(shift, jnp.float32))
    chex.assert_trees_all_close(out, expected, rtol=1e-7, atol=1e-3)  # float32 rounds x = 300 to 3e-5


@pytest.mark.parametrize("swish", [False, True], ids=["", "swish"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_group_norm_derivatives_are_those_of_the_plain_formula(dtype: str, swish: bool) -> None:
    """Backwards, forwards, and of second order; the same numbers, which bfloat16 holds, in both types."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(1.0, 1.0, shape), jnp.bfloat16).astype(jnp.float32)  # noqa: E731
    x, cotangent = draw(2, 4, 4, 64), draw(2, 4, 4, 64)
    scale, shift = draw(2, 64), draw(2, 64)

    def plain(x, scale, shift):
        groups = x.reshape(2, 16, 32, 2)
        mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (jnp.mean, jnp.var))
        normal = ((groups - mean) / jnp.sqrt(variance + 1e-6)).reshape(x.shape)
        u = normal * scale[:, None, None] + shift[:, None, None]
        return jnp.sum(cotangent * (u * jax.nn.sigmoid(u) if swish else u))

    norm = layers.group_norm_swish if swish else layers.group_norm

    def ours(x, scale, shift):
        return jnp.sum(cotangent * norm(x.astype(dtype), scale, shift))

    def squared(f):
        return lambda x, scale, shift: jnp.sum(jax.grad(f, argnums=1)(x, scale, shift) ** 2)

    arguments, change = (x, scale, shift), (draw(2, 4, 4, 64), draw(2, 64), draw(2, 64))
    (by_x, *by_others), (wanted, *others) = (jax.grad(f, argnums=(0, 1, 2))(*arguments) for f in (ours, plain))
    # The gradient by x is a sum of terms as coarse as x.
    rounded = 0.0 if dtype == "float32" else 2**-8 * float(jnp.max(jnp.abs(wanted)))
    chex.assert_trees_all_close(by_x, wanted, rtol=1e-3, atol=1e-4 + rounded)
    chex.assert_trees_all_close(by_others, others, rtol=1e-4, atol=1e-3)
    forwards = (jax.jvp(f, arguments, change)[1] for f in (ours, plain))
    chex.assert_trees_all_close(*forwards, rtol=1e-4, atol=1e-3)
    second = (jax.grad(squared(f), argnums=2)(*arguments) for f in (ours, plain))
    chex.assert_trees_all_close(*second, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 100.0, 1e4], ids=lambda r: f"mean {r:g} deviations")
def test_group_norm_of_bfloat16_is_that_of_the_rounded_numbers(ratio: float) -> None:
    """Its variance is E[x^2] - E[x]^2, which must not show in numbers that bfloat16 can tell apart, nor give NaN."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(ratio + rng.normal(size=(2, 8, 8, 64)), jnp.bfloat16)
    scale, shift = jnp.ones(64), jnp.zeros(64)
    gradient = jax.grad(lambda x: jnp.sum(layers.group_norm_swish(x, scale, shift)))(x)
    chex.assert_tree_all_finite(gradient)
    wanted = layers.group_norm_swish(x.astype(jnp.float32), scale, shift)
    got = layers.group_norm_swish(x, scale, shift)
    chex.assert_trees_all_close(got, wanted, rtol=2e-2, atol=2e-2)


def test_upsample_then_downsample_is_the_identity() -> None:
    x, _ = images(size=4)
    chex.assert_trees_all_equal(layers.downsample(layers.upsample(x)), x)
    chex.assert_trees_all_equal(layers.upsample(x)[:, 2:4, 6:8], np.broadcast_to(x[:, 1:2, 3:4], (3, 2, 2, 2)))


def test_strided_convolution_pads_after_the_image() -> None:
    """Stride 2 at even sizes: the first window starts on the first pixel (BTD, DDPM), not before it."""
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)
    chex.assert_trees_all_equal(layers.convolution(x, kernel, stride=2)[0, :, :, 0], np.array([[0, 2], [8, 10]]))


def test_attention_heads_are_separate() -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8))
    both = layers.attend(q, k, v)
    single = [layers.attend(*(a[:, :, [head]] for a in (q, k, v))) for head in range(2)]
    chex.assert_trees_all_close(both, jnp.concatenate(single, axis=2), atol=1e-6)


FILTERS = {"box": (1, 1), "cubic": (1, 3, 3, 1), "asymmetric": (1, 2, 3, 4), "odd": (1, 2, 1), "single": (1,)}


@pytest.mark.parametrize("taps", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("padding", [None, 0])
def test_filters_are_their_definition(taps: tuple[int, ...], padding: int | None) -> None:
    """Every term of the sums one by one, with a filter that is no outer product."""
    rng = np.random.default_rng(5)
    filter = rng.normal(size=(len(taps), len(taps)))
    x: Any = rng.normal(size=(2, 4, 6, 3))
    p = (len(taps) - 1) // 2 if padding is None else padding
    down = np.zeros((2, *((n + 2 * p - len(taps)) // 2 + 1 for n in x.shape[1:3]), 3))
    up: Any = np.zeros((2, *(2 * n - 2 + len(taps) - 2 * p for n in x.shape[1:3]), 3))
    for j, k in np.ndindex(filter.shape):
        for a, b in np.ndindex(down.shape[1:3]):
            if 0 <= (y := 2 * a + j - p) < 4 and 0 <= (z := 2 * b + k - p) < 6:
                down[:, a, b] += filter[j, k] * x[:, y, z]
        for a, b in np.ndindex(4, 6):
            if 0 <= (y := 2 * a + j - p) < up.shape[1] and 0 <= (z := 2 * b + k - p) < up.shape[2]:
                up[:, y, z] += 4 * filter[j, k] * x[:, a, b]
    filter, x = jnp.asarray(filter, jnp.float32), jnp.asarray(x, jnp.float32)
    chex.assert_trees_all_close(layers.filter_down(x, filter, padding), down, rtol=1e-7, atol=1e-5)
    chex.assert_trees_all_close(layers.filter_up(x, filter, padding), up, rtol=1e-7, atol=1e-5)


def test_the_box_filter_is_the_mean_of_four_and_four_equal_pixels() -> None:
    x, box = images(size=4)[0], jnp.asarray(layers.filter_of((1, 1)))
    chex.assert_trees_all_close(layers.filter_down(x, box), layers.downsample(x), atol=1e-6)
    chex.assert_trees_all_equal(layers.filter_up(x, box), layers.upsample(x))


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_fused_convolution_differs_at_the_border_only(direction: Any) -> None:
    x = images(size=16)[0]
    taps = (1, 3, 3, 1)
    conv = layers.FusedConv(4, direction, taps)
    params = conv.init(jax.random.key(0), x)["params"]
    rest = {name: value for name, value in params.items() if name != "filter"}
    apart: Any = x
    for step in [layers.Resampling(direction, taps), layers.Conv(4)][:: 1 if direction == "up" else -1]:
        own = {"filter": params["filter"]} if isinstance(step, layers.Resampling) else rest
        apart = step.apply({"params": own}, apart)
    together: Any = conv.apply({"params": params}, x)
    difference = jnp.abs(together - apart).max(axis=(0, 3))
    assert float(difference[2:-2, 2:-2].max()) < 1e-6 < 1e-2 < float(difference.max())


def test_fourier_features() -> None:
    time, frequencies = np.array([0.0, 0.3, -1.1]), np.array([0.5, -20.0])
    angles = 2 * np.pi * time[:, None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    out = layers.fourier_features(*(jnp.asarray(a, jnp.float32) for a in (time, frequencies)))
    chex.assert_trees_all_close(out, expected, rtol=1e-7, atol=5e-5)


def test_groups_of_a_norm() -> None:
    groups = {width: layers.norm_groups(width, layers.NormSettings(32, 1e-5, 4)) for width in (4, 12, 128, 384)}
    assert groups == {4: 1, 12: 3, 128: 32, 384: 32}
    for width in (3, 130):
        with pytest.raises(ValueError, match=f"over {width} channels"):
            layers.norm_groups(width, layers.NormSettings(32, 1e-5, 4))


@pytest.mark.parametrize(
    ("rule", "role", "kernel", "bias"),
    [
        ("lecun", "layer", 1 / 40, 0.0),
        ("lecun", "last", 0.0, 0.0),
        ("uniform", "layer", 1 / 3 / 40, 1 / 3 / 40),
        ("uniform", "last", 0.0, 0.0),
        ("uniform", "augment", 0.0, 0.0),
        ("uniform", "label", 1.0, 1.0),
        ("xavier", "layer", 2 / (40 + 60), 0.0),
        ("xavier", "qkv", 0.2 * 2 / (40 + 60), 0.0),
        ("xavier", "last", 1e-10 * 2 / (40 + 60), 0.0),
    ],
)
def test_initial_values_have_the_variance_of_their_rule(rule: str, role: Any, kernel: float, bias: float) -> None:
    """Variances from EDM's fact sheet: a uniform number within ±a has a²/3."""
    rules = layers.initial(rule, 40, 60, role)
    for name, variance in {"kernel_init": kernel, "bias_init": bias}.items():
        values = np.asarray(rules[name](jax.random.key(0), (40, 600), jnp.float32), np.float64)
        chex.assert_trees_all_close(values.var(), variance, rtol=0.05)
        chex.assert_trees_all_close(values.mean(), 0, rtol=1e-7, atol=0.03 * variance**0.5)
