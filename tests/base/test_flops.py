"""FLOPs against closed forms: of single operations, of what calls them, and of networks by hand from their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec

from diffusion_distill.base.flops import count_flops
from diffusion_distill.denoisers.adapters import adapt
from diffusion_distill.denoisers.network import Network
from diffusion_distill.networks import DiT, UNet, layers
from diffusion_distill.training.sharding import data_mesh


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def convolution(strides: int = 1, **options: Any) -> Callable[..., jax.Array]:
    numbers = ("NHWC", "HWIO", "NHWC")
    padding = options.pop("padding", "SAME")
    return lambda x, w: lax.conv_general_dilated(x, w, (strides,) * 2, padding, dimension_numbers=numbers, **options)


IMAGE = shape(2, 8, 8, 6)
OPERATIONS = {
    "product": (lambda a, b: a @ b, [shape(3, 4), shape(4, 5)], 3 * 4 * 5),
    "batched": (
        lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b), [shape(2, 5, 3, 7), shape(2, 6, 3, 7)], 2 * 3 * 5 * 6 * 7
    ),
    "two axes": (lambda a, b: jnp.einsum("bhd,hdo->bo", a, b), [shape(2, 3, 4), shape(3, 4, 5)], 2 * 12 * 5),
    "convolution": (convolution(), [IMAGE, shape(3, 3, 6, 10)], 2 * 64 * 9 * 6 * 10),
    "strided": (convolution(2), [IMAGE, shape(3, 3, 6, 10)], 2 * 16 * 9 * 6 * 10),
    "spread kernel": (convolution(rhs_dilation=(2, 2)), [IMAGE, shape(3, 3, 6, 10)], 2 * 64 * 9 * 6 * 10),
    "groups": (convolution(feature_group_count=3), [IMAGE, shape(3, 3, 2, 12)], 2 * 64 * 9 * 2 * 12),
    "each channel": (convolution(feature_group_count=6), [IMAGE, shape(5, 5, 1, 6)], 2 * 64 * 25 * 6),
    "groups of the batch": (convolution(batch_group_count=2), [IMAGE, shape(3, 3, 6, 10)], 64 * 9 * 6 * 10),
    # Of a 2x2 kernel on an image with a zero between any two pixels, one place in four meets a pixel.
    "transposed": (
        convolution(lhs_dilation=(2, 2), padding=((1, 1), (1, 1))), [IMAGE, shape(2, 2, 6, 10)], 2 * 16 * 16 * 6 * 10
    ),
    # One product forward and one for each gradient, in a CPU's form of its own too.
    "gradients": (
        jax.grad(lambda x, w: jnp.sum(layers.convolution(x, w) ** 2), (0, 1)),
        [shape(2, 8, 8, 64), shape(3, 3, 64, 70)],
        3 * 2 * 64 * 9 * 64 * 70,
    ),
    "nothing": (lambda a: jnp.sum(jnp.sin(a) ** 2), [IMAGE], 0),
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation(name: str) -> None:
    function, arguments, multiply_adds = OPERATIONS[name]
    assert count_flops(function, *arguments) == 2 * multiply_adds


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    return a @ b


def with_rules(make: Callable[..., Any]) -> Callable[..., jax.Array]:
    function = make(product)
    if make is jax.custom_vjp:
        function.defvjp(lambda a, b: (a @ b, (a, b)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    else:
        function.defjvp(lambda primals, tangents: (product(*primals), product(*tangents)))
    return function


def scanned(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.scan(lambda c, _: (c + jnp.sum(a @ b), None), jnp.zeros(()), None, length=5)[0]


def on_this_device(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.platform_dependent(a, b, cpu=lambda a, b: product(a, b) + product(2 * a, b), default=product)


def switched(a: jax.Array, b: jax.Array) -> jax.Array:
    many = lambda: jnp.sum((a @ b) @ b)  # noqa: E731
    return lax.switch(jnp.argmax(a[0]), [lambda: jnp.sum(a @ b), many, lambda: jnp.sum(a)])


def sharded(a: jax.Array, b: jax.Array) -> jax.Array:
    split, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(product, mesh=data_mesh(), in_specs=(split, whole), out_specs=split)(a, b)


def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
    def block(a_part: Any, b_part: Any, out: Any) -> None:
        out[...] = a_part[...] @ b_part[...]

    rows = pallas.BlockSpec((4, 8), lambda k: (k, 0))
    whole = pallas.BlockSpec((8, 8), lambda k: (0, 0))
    return pallas.pallas_call(block, shape(16, 8), grid=(4,), in_specs=[rows, whole], out_specs=rows)(a, b)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("function", "times"),
    [
        (jax.jit(product), 1),
        (jax.checkpoint(product), 1),  # type: ignore[attr-defined]
        (with_rules(jax.custom_vjp), 1),
        (with_rules(jax.custom_jvp), 1),
        (jax.grad(lambda a, b: jnp.sum(with_rules(jax.custom_vjp)(a, b)), argnums=(0, 1)), 3),
        (jax.vmap(product, in_axes=(0, None)), 1),
        (scanned, 5),
        (lambda a, b: lax.fori_loop(0, 3, lambda k, c: c + jnp.sum(a @ b), 0.0), 3),
        (switched, 2),
        (on_this_device, 1),
        (sharded, 1),
        (kernel, 1),
        (lambda a, b: lax.while_loop(lambda c: c < 3, lambda c: c + 1, jnp.sum(a @ b)), 1),
    ],
)
def test_what_calls_operations(function: Callable[..., Any], times: int) -> None:
    assert count_flops(function, shape(16, 8), shape(8, 8)) == times * 2 * 16 * 8 * 8


@pytest.mark.fast
def test_a_loop_of_unknown_length_is_refused() -> None:
    loop = lambda a: lax.while_loop(lambda c: jnp.sum(c) < 3, lambda c: c @ c, a)  # noqa: E731
    with pytest.raises(ValueError, match="in a while loop, whose number of rounds is not known"):
        count_flops(loop, shape(4, 4))


@pytest.mark.fast
def test_attention_of_cudnn_counts_as_its_products() -> None:
    """JAX binds it under this name, and only where there is cuDNN."""
    primitive = Primitive("dot_product_attention_fwd_wrapper")
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda q, k, v: [q])
    plain = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="xla")  # noqa: E731
    arguments = shape(2, 5, 3, 8), shape(2, 7, 3, 8), shape(2, 7, 3, 8)
    assert (
        count_flops(lambda *a: primitive.bind(*a)[0], *arguments)
        == count_flops(plain, *arguments)
        == 2 * 2 * 2 * 3 * 5 * 7 * 8
    )


# ---------------------------------------------------------------- networks by hand


def by_hand_unet(net: UNet, size: int, channels: int, resampled_by: Callable[[int, int], int]) -> int:
    """Multiply-adds of an image.

    Args:
      resampled_by: (pixels after the change of size, width) -> those of what changes the size.
    """
    total, width = net.ch * net.emb_ch + net.emb_ch**2 + 9 * size**2 * channels * net.ch, net.ch
    kept = [width]

    def block(pixels: int, features: int) -> None:
        nonlocal total, width
        shortcut = pixels * width * features * (width != features)
        total += 9 * pixels * (width * features + features**2) + net.emb_ch * 2 * features + shortcut
        width = features

    def attention(height: int, always: bool = False) -> None:
        nonlocal total
        if always or height in net.attn_resolutions:
            total += 4 * height**2 * width**2 + 2 * height**4 * width

    last = len(net.ch_mult) - 1
    for level, features in enumerate(net.widths):
        for _ in range(net.num_res_blocks):
            block(size**2, features)
            attention(size)
            kept.append(width)
        if level < last:
            size //= 2
            total += resampled_by(size**2, width)
            kept.append(width)
    block(size**2, width)
    attention(size, always=True)
    block(size**2, width)
    for level, features in reversed(list(enumerate(net.widths))):
        for _ in range(net.num_res_blocks + 1):
            width += kept.pop()
            block(size**2, features)
            attention(size)
        if level > 0:
            size *= 2
            total += resampled_by(size**2, width)
    return total + 9 * size**2 * width * net.out_ch


def by_hand_dit(net: DiT, size: int, channels: int) -> int:
    """Multiply-adds of an image: 12 L d² for L tokens of width d in each block, and what is around it."""
    d, tokens = net.width, (size // net.patch) ** 2
    block = 12 * tokens * d**2 + 2 * tokens**2 * d + 6 * d**2
    ends = tokens * net.patch**2 * (channels + net.out_ch) * d
    return net.depth * block + ends + (256 + d) * d + 2 * d**2


SETTINGS: dict[str, Any] = dict(
    ch=32, emb_ch=48, out_ch=2, ch_mult=(1, 2, 1), num_res_blocks=2, attn_resolutions=(8,), num_heads=1
)
PLAIN, IN_BLOCKS = UNet(**SETTINGS), UNet(**SETTINGS, resblock_resample=True)
TRANSFORMER = DiT(width=32, depth=3, num_heads=2, out_ch=2)
NETWORKS = {
    "convolutions resample": (PLAIN, by_hand_unet(PLAIN, 16, 2, lambda pixels, width: 9 * pixels * width**2)),
    "blocks resample": (
        IN_BLOCKS, by_hand_unet(IN_BLOCKS, 16, 2, lambda pixels, width: 18 * pixels * width**2 + 96 * width)
    ),
    "transformer": (TRANSFORMER, by_hand_dit(TRANSFORMER, 16, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_by_hand(name: str) -> None:
    module, multiply_adds = NETWORKS[name]
    network: Network = adapt(module)
    inputs = lambda batch: (shape(batch, 16, 16, 2), shape(batch), None)  # noqa: E731
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs(1))
    for batch in (1, 5):
        assert count_flops(network.apply, params, *inputs(batch)) == 2 * batch * multiply_adds
