"""A CPU's gradient of a convolution by its kernel is the gradient, in both modes of differentiation."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distill.networks import layers
from diffusion_distill.networks.layers import kernel_gradient

SHAPES = [(2, 16, 16, 32, 48), (1, 32, 24, 40, 32), (3, 17, 19, 32, 32)]  # batch, height, width, in, out


def arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def in_float64(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The gradient by its definition."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    shifted = [[padded[:, i : i + height, j : j + width] for j in range(3)] for i in range(3)]
    return np.stack([[np.tensordot(s, g.astype(np.float64), ([0, 1, 2], [0, 1, 2])) for s in row] for row in shifted])


@pytest.mark.parametrize("form", [kernel_gradient.by_products, kernel_gradient.by_convolution])
@pytest.mark.parametrize(("batch", "height", "width", "inputs", "outputs"), SHAPES)
def test_both_forms_are_the_gradient(form, batch: int, height: int, width: int, inputs: int, outputs: int) -> None:
    x, g = arrays((batch, height, width, inputs), (batch, height, width, outputs))
    want = in_float64(np.asarray(x), np.asarray(g))
    np.testing.assert_allclose(form(x, g), want, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_are_those_of_the_plain_convolution(shape: tuple[int, ...]) -> None:
    batch, height, width, inputs, outputs = shape
    image, kernels = (batch, height, width, inputs), (3, 3, inputs, outputs)
    x, kernel, x_dot, kernel_dot, g = arrays(image, kernels, image, kernels, (*image[:3], outputs))
    assert kernel_gradient.is_faster(x, kernel)
    found, wanted = (
        (
            jax.vjp(f, x, kernel)[1](g),
            jax.vjp(lambda x, f=f: f(x, kernel), x)[1](g),
            jax.vjp(lambda kernel, f=f: f(x, kernel), kernel)[1](g),
            jax.jvp(f, (x, kernel), (x_dot, kernel_dot)),
            jax.jit(jax.grad(lambda k, f=f: jnp.sum(jnp.sin(f(x, k)))))(kernel),
        )
        for f in (layers.convolution, kernel_gradient.plain)
    )
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5 * float(jnp.abs(wanted[0][1]).max()))


def test_which_convolutions_have_it() -> None:
    def takes(*, size: int = 3, pixels: int = 16, channels: int = 32, dtype=jnp.float32) -> bool:
        x, kernel = jnp.zeros((1, pixels, pixels, channels), dtype), jnp.zeros((size, size, channels, 32), dtype)
        return kernel_gradient.is_faster(x, kernel)

    assert takes()
    assert not any((takes(size=1), takes(pixels=8), takes(channels=3), takes(dtype=jnp.bfloat16)))


def test_programs_for_other_machines_keep_xlas_form() -> None:
    x, g = arrays((1, 16, 16, 32), (1, 16, 16, 32))
    traced = jax.jit(kernel_gradient.kernel_gradient).trace(x, g)
    for platform, word, other in (("cpu", "dot_general", "convolution"), ("cuda", "convolution", "dot_general")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert word in text and other not in text
