"""Small networks of every kind, random parameters for them, and images, for the tests of networks."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from diffusion_distill.networks import ADM, DiT, SongUNet, UNet

TINY: dict[str, Any] = dict(
    ch=32, emb_ch=16, out_ch=2, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), num_heads=1
)
LABELLED: dict[str, Any] = {**TINY, "num_classes": 5}
CONDITIONS: dict[str, Any] = {"num_classes": 5, "augment_dim": 9}
TINY_ADM = UNet(
    ch=16, emb_ch=16, out_ch=2, ch_mult=(1, 4), num_res_blocks=1, attn_resolutions=(8, 4), **CONDITIONS, **ADM
)
TINY_SONG: dict[str, Any] = dict(
    ch=8, emb_ch=16, out_ch=2, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), **CONDITIONS
)
NCSNPP = SongUNet(**TINY_SONG, noise_mult=2, embedding="fourier", encoder="residual", resample_filter=(1, 3, 3, 1))
SKIPS = SongUNet(**TINY_SONG, encoder="skip", decoder="skip", resample_filter=(1, 2, 3, 4))
EDM_NETWORKS = {"adm": TINY_ADM, "ncsnpp": NCSNPP, "skips": SKIPS}

Network = UNet | SongUNet | DiT


def flatten(tree: Any) -> dict[str, Any]:
    return {path: leaf for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def with_changes(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**settings, **changes}


def parameter_shapes(net: Network, size: int, channels: int = 3) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a network, without computing anything."""
    arguments = (jnp.zeros((1, size, size, channels)), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32))
    tree = jax.eval_shape(net.init, jax.random.key(0), *arguments)["params"]
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def parameters(net: Network, size: int = 8, channels: int = 2, seed: int = 0) -> dict:
    """Random parameters, nothing zero, so that every branch reaches the output."""
    rng = np.random.default_rng(seed)
    flat = {
        path: jnp.asarray(rng.normal(path.endswith("scale"), 0.1, shape), jnp.float32)
        for path, shape in parameter_shapes(net, size, channels).items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def images(batch: int = 3, size: int = 8, channels: int = 2) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(batch, size, size, channels)), jnp.float32)
    return x, jnp.linspace(3.0, 900.0, batch)


@partial(jax.jit, static_argnums=(0, 5), static_argnames="capture_intermediates")
def evaluate(net: Network, params: dict, *arguments, capture_intermediates: bool = False) -> Any:
    """A network's output for x, time and, if they are given, labels, whether it trains, and augment."""
    return net.apply({"params": params}, *arguments, capture_intermediates=capture_intermediates)
