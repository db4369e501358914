"""A CPU's form of a convolution is the convolution, and so are its derivatives, in both modes."""

from __future__ import annotations

from functools import partial

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion_distill.networks import layers
from diffusion_distill.networks.layers import winograd
from diffusion_distill.training.sharding import data_mesh

pytestmark = pytest.mark.fast

SHAPES = [
    (2, 8, 8, 64, 80),
    (1, 32, 24, 70, 64),
    (3, 17, 6, 64, 64),
    (2, 6, 11, 64, 64),
    (0, 8, 8, 64, 64),
]  # batch, height, width, in, out


def arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def in_float64(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The convolution by its definition."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    (height, width), kernel = x.shape[1:3], kernel.astype(np.float64)
    places = [(i, j) for i in range(3) for j in range(3)]
    return np.sum([padded[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in places], axis=0)


@pytest.mark.parametrize(
    # XLA adds up in an order that depends on the machine; on cores with AVX2 it errs by 1.2e-6.
    ("form", "atol"),
    [(winograd.by_four_products, 1e-6), (winograd.plain, 2e-6)],
)
@pytest.mark.parametrize(("batch", "height", "width", "inputs", "outputs"), SHAPES)
def test_both_forms_are_the_convolution(
    form, atol: float, batch: int, height: int, width: int, inputs: int, outputs: int
) -> None:
    x, kernel = arrays((batch, height, width, inputs), (3, 3, inputs, outputs))
    want = in_float64(np.asarray(x), np.asarray(kernel))
    np.testing.assert_allclose(form(x, kernel), want, atol=atol * np.abs(want).max(initial=0))


@pytest.mark.parametrize("shape", [*SHAPES, (6, 16, 16, 64, 64)])  # the last in several parts
def test_the_gradient_by_the_kernel_is_that_of_the_convolution(shape: tuple[int, ...]) -> None:
    *image, inputs, outputs = shape
    x, g = arrays((*image, inputs), (*image, outputs))
    padded, wide = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0))), np.asarray(g, np.float64)
    seen = np.lib.stride_tricks.sliding_window_view(padded, image[1:], (1, 2))  # [batch, 3, 3, in, h, w]
    want = np.einsum("nijchw,nhwo->ijco", seen, wide, optimize=True)
    np.testing.assert_allclose(winograd.kernel_gradient(g, x), want, atol=1e-6 * np.abs(want).max(initial=0))


def along(function, point: jax.Array) -> jax.Array:
    """The derivative of a function at a point, along a direction."""
    return jax.jvp(function, (point,), (jnp.cos(point),))[1]


def wave(f, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A number that depends on a convolution f in a way that is not linear."""
    return jnp.sum(jnp.sin(f(x, kernel)))


def squared_gradient(f, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.sum(jax.grad(partial(wave, f), 1)(x, kernel) ** 2)


def one_by_one(f):
    """A convolution that takes one image, mapped over the batch."""
    return jax.vmap(lambda image, kernel: f(image[None], kernel)[0], (0, None))


#: From a convolution, x and its kernel.
DERIVATIVES = {
    "gradients": lambda f, x, k: jax.jit(jax.grad(partial(wave, f), (0, 1)))(x, k),
    "by x": lambda f, x, k: jax.grad(partial(wave, f))(x, k),
    "by the kernel": lambda f, x, k: jax.grad(partial(wave, f), 1)(x, k),
    "of each image": lambda f, x, k: jax.vmap(jax.grad(partial(wave, f), (0, 1)), (0, None))(x[:, None], k),
    "of images mapped over": lambda f, x, k: jax.grad(partial(wave, one_by_one(f)), (0, 1))(x, k),
    "of several kernels": lambda f, x, k: jax.vmap(jax.grad(partial(wave, f), 1), (None, 0))(x, jnp.stack([k, 2 * k])),
    "forward, x": lambda f, x, k: along(lambda x: f(x, k), x),
    "forward, kernel": lambda f, x, k: along(lambda k: f(x, k), k),
    "Hessian, kernel": lambda f, x, k: along(jax.grad(partial(wave, f, x)), k),
    "Hessian, mixed": lambda f, x, k: along(lambda x: jax.grad(partial(wave, f), 1)(x, k), x),
    "of a squared gradient": lambda f, x, k: jax.grad(partial(squared_gradient, f), (0, 1))(x, k),
    "of a forward derivative": lambda f, x, k: jax.grad(lambda k: along(lambda x: wave(f, x, k), x))(k),
}


#: The gradients of every shape, and every derivative of one of them; the rules do not know the shape.
PAIRS = [("gradients", shape) for shape in SHAPES]
PAIRS += [(name, SHAPES[k % len(SHAPES)]) for k, name in enumerate(DERIVATIVES) if name != "gradients"]


@pytest.mark.parametrize(("name", "shape"), PAIRS)
def test_every_derivative_is_that_of_the_plain_convolution(name: str, shape: tuple[int, ...]) -> None:
    derivative, (*image, inputs, outputs) = DERIVATIVES[name], shape
    x, kernel = arrays((*image, inputs), (3, 3, inputs, outputs))
    kernel = 0.05 * kernel
    assert winograd.is_faster(x, kernel)
    found, wanted = (derivative(f, x, kernel) for f in (layers.convolution, winograd.plain))
    largest = max(float(jnp.abs(a).max(initial=0)) for a in jax.tree.leaves(wanted))
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("checked", [True, False])
def test_shares_of_a_batch(checked: bool) -> None:
    x, kernel = arrays((2, 8, 8, 64), (3, 3, 64, 64))
    kernel = 0.05 * kernel
    mesh, whole, share = data_mesh(jax.devices()[:2]), PartitionSpec(), PartitionSpec("data")

    def of_share(f, x: jax.Array, kernel: jax.Array) -> jax.Array:
        gradient = jax.grad(partial(wave, f), 1)(x, kernel)
        return gradient if checked else jax.lax.psum(gradient, "data")  # with checks the sum is part of the gradient

    found, wanted = (
        jax.jit(
            jax.shard_map(partial(of_share, f), mesh=mesh, in_specs=(share, whole), out_specs=whole, check_vma=checked)
        )(x, kernel)
        for f in (layers.convolution, winograd.plain)
    )
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_shares_of_the_channels() -> None:
    """The devices have different kernels, and all the same images, whose gradient is a sum over the devices."""
    x, kernel = arrays((2, 8, 8, 64), (3, 3, 64, 128))
    kernel = 0.05 * kernel
    mesh, whole, share = data_mesh(jax.devices()[:2]), PartitionSpec(), PartitionSpec(None, None, None, "data")
    gradients, plain = (jax.grad(partial(wave, f), (0, 1)) for f in (winograd.convolution, winograd.plain))
    split = jax.shard_map(gradients, mesh=mesh, in_specs=(whole, share), out_specs=(whole, share))
    for found, wanted in zip(jax.jit(split)(x, kernel), plain(x, kernel), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("shape", ["b, 8, 8, 64", "1, h, w, 64"])
def test_exports_of_sizes_not_known_yet(shape: str) -> None:
    x, kernel = arrays((1, 8, 8, 64), (3, 3, 64, 64))
    kernel = 0.05 * kernel
    unknown = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
    gradient, plain = (jax.jit(jax.grad(partial(wave, f), 1)) for f in (layers.convolution, winograd.plain))
    exported = jax.export.export(gradient)(unknown, kernel)
    want = plain(x, kernel)
    np.testing.assert_allclose(exported.call(x, kernel), want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


def test_gradients_step_by_step_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    gradient = winograd.kernel_gradient
    monkeypatch.setattr(winograd, "kernel_gradient", lambda g, x: traced.append(g.shape) or gradient(g, x))
    x, kernel = arrays((1, 9, 13, 66), (3, 3, 66, 65))  # of no other test
    for _ in range(3):
        jax.grad(partial(wave, winograd.convolution), 1)(x, kernel)
    assert len(traced) == 1


def test_images_mapped_over_have_the_form_of_a_batch() -> None:
    arguments = arrays((2, 8, 8, 64), (3, 3, 64, 64))
    forms = (partial(wave, f) for f in (winograd.convolution, one_by_one(winograd.convolution)))
    batch, mapped = (jax.jit(jax.grad(form, 1)).lower(*arguments).as_text() for form in forms)
    assert mapped.count("stablehlo.dot_general") == batch.count("stablehlo.dot_general") > 0


@pytest.mark.parametrize("devices", [2, 4])
def test_of_a_split_batch_only_the_gradient_moves(devices: int) -> None:
    """Every device works on its own images, whether the mesh has all devices or fewer."""
    x, kernel, g = arrays((8, 16, 16, 64), (3, 3, 64, 64), (8, 16, 16, 64))
    mesh = data_mesh(jax.devices()[:devices])
    share, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    gradient = jax.jit(winograd.kernel_gradient, in_shardings=(share, share), out_shardings=whole)
    text = gradient.lower(g, x).compile().as_text() or ""
    assert "all-reduce" in text
    assert not [word for word in ("all-gather", "all-to-all", "collective-permute") if word in text]
    [want] = jax.linear_transpose(partial(winograd.plain, x), kernel)(g)
    np.testing.assert_allclose(gradient(g, x), want, atol=3e-6 * float(jnp.abs(want).max()))


def test_which_convolutions_have_it() -> None:
    def takes(*, size: int = 3, height: int = 8, width: int = 8, channels: int = 64, dtype=jnp.float32) -> bool:
        x, kernel = jnp.zeros((1, height, width, channels), dtype), jnp.zeros((size, size, channels, 64), dtype)
        return winograd.is_faster(x, kernel)

    assert takes() and takes(height=11, width=6) and takes(width=9)
    others = {"size": 1, "height": 4, "width": 7, "channels": 32, "dtype": jnp.bfloat16}
    assert not any(takes(**{name: value}) for name, value in others.items())


def test_programs_for_other_machines_keep_xlas_form() -> None:
    gradients = jax.jit(jax.value_and_grad(partial(wave, winograd.convolution), (0, 1)))
    traced = gradients.trace(*arrays((1, 8, 8, 64), (3, 3, 64, 64)))
    for platform, convolutions in (("cpu", 8), ("cuda", 3), ("tpu", 3)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == convolutions, platform
