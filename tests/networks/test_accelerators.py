"""What matters on a GPU or TPU, seen in the traced programs: recomputed blocks, 16-bit products, fused attention."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import operations, products
from small_networks import NCSNPP, SKIPS, TINY_ADM, images, parameters

from diffusion_distill.base.registry import from_mapping, to_mapping
from diffusion_distill.networks import NETWORKS, DiT, SongUNet, UNet, layers
from diffusion_distill.networks.layers import attention

SMALL: dict[str, Any] = dict(emb_ch=8, out_ch=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_classes=5)
DIT = DiT(width=16, depth=1, num_heads=2, out_ch=2, num_classes=5)
#: One of each kind, in the size that compiles fastest.
SMALLEST = {"unet": UNet(ch=32, num_heads=1, **SMALL), "song_unet": SongUNet(ch=4, **SMALL), "dit": DIT}
#: What JAX has called the operation that computes a block again.
REMAT = ("checkpoint", "remat", "remat2")
#: Every kind of layer there is.
EVERY_LAYER = {"adm": TINY_ADM, "ncsnpp": NCSNPP, "skips": SKIPS, "dit": DIT}


def loss_of(net: Any) -> Any:
    """The sum of squares of a network's outputs in training, as a function of its parameters and input."""

    def loss(params: Any, x: Any) -> Any:
        time, labels, rngs = images()[1], jnp.array([0, 3, 4]), {"dropout": jax.random.key(0)}
        return jnp.sum(net.apply({"params": params}, x, time, labels, train=True, rngs=rngs) ** 2)

    return loss


# ---------------------------------------------------------------- recomputed blocks


@pytest.mark.parametrize("name", [pytest.param("song_unet", marks=pytest.mark.slow), "unet", "dit"])
def test_recomputed_blocks_change_neither_parameters_nor_results(name: str) -> None:
    net = SMALLEST[name].clone(dropout=0.3)
    again, params, x = net.clone(remat=True), parameters(net, size=4), images(size=4)[0]
    chex.assert_trees_all_equal_shapes(params, parameters(again, size=4))
    chex.assert_trees_all_equal_structs(params, parameters(again, size=4))
    kept, computed = (jax.jit(jax.value_and_grad(loss_of(n), argnums=(0, 1)))(params, x) for n in (net, again))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(kept))
    chex.assert_trees_all_close(computed, kept, rtol=0, atol=2e-6 * largest)  # rounding: 9e-7


@pytest.mark.parametrize("name", NETWORKS)
def test_descriptions_without_the_field_are_those_of_networks_that_keep_everything(name: str) -> None:
    described = to_mapping(SMALLEST[name])
    assert described.pop("remat") is False
    assert from_mapping(NETWORKS[name], "network", described) == SMALLEST[name]
    assert from_mapping(NETWORKS[name], "network", {**described, "remat": True}).remat is True


# ---------------------------------------------------------------- recomputed blocks and 16 bits in the program

#: Layers outside of the blocks, and what they tell the blocks, stay float32.
FLOAT32 = {"conv_out", "dense0", "dense1", "class_emb", "augment_emb"}
FLOAT32 |= {"patch_emb", "modulation", "modulation_out", "dense_out"}  # of the transformer
FLOAT32 |= {"per_channel"}  # the statistics of a group norm, on a CPU


@pytest.mark.parametrize("name", EVERY_LAYER)
def test_each_block_is_recomputed_and_products_have_16_bit_factors_forwards_and_backwards(name: str) -> None:
    net, x = EVERY_LAYER[name].clone(dtype="bfloat16", dropout=0.1), images()[0]
    params, counts = jax.eval_shape(lambda: parameters(net)), []
    for remat in (False, True):
        traced = jax.make_jaxpr(jax.grad(loss_of(net.clone(remat=remat))))(params, x)
        assert {str(gradient.dtype) for gradient in traced.out_avals} == {"float32"}
        found = products(traced.jaxpr)
        factors = [{str(factor.aval.dtype) for factor in product.invars} for product in found]
        layers_of = [re.split("[/.]", str(product.source_info.name_stack))[-1] for product in found]
        assert {layer for layer, types in zip(layers_of, factors, strict=True) if types != {"bfloat16"}} <= FLOAT32
        recomputed = sum(operation.primitive.name in REMAT for operation in operations(traced.jaxpr))
        counts.append((recomputed, factors.count({"bfloat16"})))
    (none, once), (blocks, twice) = counts
    resampled = isinstance(net, SongUNet) or getattr(net, "resblock_resample", False)
    kinds = ("block_", "attn_", *(("downsample", "upsample") if resampled else ()))
    assert (none, blocks) == (0, sum(any(kind in name for kind in kinds) for name in params))
    assert twice > once > 20


# ---------------------------------------------------------------- fused attention


@pytest.mark.fast
@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "fits"),
    [
        ("bfloat16", 64, None, False),  # no NVIDIA GPU
        ("bfloat16", 64, (7, 5), False),  # before Ampere
        ("bfloat16", 64, (8, 0), True),
        ("float16", 64, (8, 6), True),
        ("float32", 64, (9, 0), False),
        ("bfloat16", 60, (9, 0), False),
        ("bfloat16", 8, (8, 0), True),
        ("bfloat16", 128, (8, 0), True),
        ("bfloat16", 136, (8, 9), False),
        ("bfloat16", 256, (9, 0), True),  # Hopper
        ("bfloat16", 264, (9, 0), False),
        ("bfloat16", 256, (10, 0), False),  # Blackwell
        ("bfloat16", 128, (12, 0), True),
    ],
)
def test_where_attention_is_fused(dtype: str, head_dim: int, capability: tuple[int, int] | None, fits: bool) -> None:
    assert layers.fused_fits(jnp.dtype(dtype), head_dim, capability) == fits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_and_its_gradient_are_those_of_jax(dtype: str) -> None:
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, 2, 9, 2, 8)).astype(dtype)
    reference = partial(jax.nn.dot_product_attention, implementation="xla")

    def both(function: Any, *arguments: Any) -> Any:
        value, pull = jax.vjp(function, *arguments)
        return value, pull(cotangent.astype(value.dtype))

    ours = jax.jit(partial(both, layers.attend))(q, k, v)
    chex.assert_type(jax.tree.leaves(ours), q.dtype)
    theirs = jax.jit(partial(both, reference))(*(a.astype(jnp.float32) for a in (q, k, v)))
    ours = jax.tree.map(lambda a: np.asarray(a, np.float32), ours)
    chex.assert_trees_all_close(ours, theirs, rtol=0, atol=1e-5 if dtype == "float32" else 0.05)


def test_programs_for_nvidia_gpus_have_fused_attention_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowered, not run: as on a machine with a GPU."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention, "_compute_capability", lambda: (8, 0))
    q, k, v = jnp.ones((3, 2, 16, 2, 64), jnp.bfloat16)
    gradient = jax.grad(lambda *a: layers.attend(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    traced = jax.jit(gradient).trace(q, k, v)
    calls = [traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu", "tpu")]
    assert [text.count("@__cudnn$fmha") for text in calls] == [2, 0, 0]
    assert "dot_general" not in calls[0]
