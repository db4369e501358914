"""Self-attention over all positions of an image (Ho et al. 2020)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from diffusion_distill.networks.layers.initial import initial
from diffusion_distill.networks.layers.norm import GroupNorm, NormSettings
from diffusion_distill.networks.layers.residual import residual_stream

#: Types in which cuDNN has fused attention.
FUSED_DTYPES = (jnp.bfloat16, jnp.float16)


def attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(head_dim)) v, each [batch, positions, heads, head_dim]; the softmax is float32.

    NVIDIA GPUs take cuDNN's fused form where there is one, which never stores the weights of all pairs of positions.
    """
    # JAX refuses to trace cuDNN's form on a machine without cuDNN, hence the first choice, by the machine. The second,
    # by the platform that a program is compiled for, keeps programs for the CPU of a machine with a GPU.
    if not fused_fits(q.dtype, q.shape[-1], _compute_capability()):
        return plain_attention(q, k, v)
    return lax.platform_dependent(q, k, v, cuda=_fused_attention, default=plain_attention)


def plain_attention(q: Array, k: Array, v: Array) -> Array:
    """`attend` as two matrix products, on any device and for any type.

    k is divided by the root, and rounded to its own dtype, before the product: as in EDM, and with fewer numbers to
    divide than the logits.
    """
    k = (k.astype(jnp.float32) / k.shape[-1] ** 0.5).astype(k.dtype)
    weights = jax.nn.softmax(_logits(q, k), axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def fused_fits(dtype: DTypeLike, head_dim: int, capability: tuple[int, int] | None) -> bool:
    """Whether cuDNN's fused attention takes heads of this type and width, for gradients too.

    The limits are those that JAX checks (`jax.nn.dot_product_attention`) and, beyond Hopper, cuDNN's own.

    Args:
      head_dim: channels of a head.
      capability: compute capability of the NVIDIA GPU: (8, 0) is Ampere, (9, 0) Hopper; None without one.
    """
    if capability is None or capability < (8, 0) or dtype not in FUSED_DTYPES:
        return False
    return head_dim % 8 == 0 and head_dim <= (256 if capability[0] == 9 else 128)


def _compute_capability() -> tuple[int, int] | None:
    """That of this process's first GPU; None without one by NVIDIA."""
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _fused_attention(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _logits(q: Array, k: Array) -> Array:
    """q k^T as [batch, heads, positions, positions] float32."""
    # The derivative of a product with float32 results is a product of float32 factors, slow on a GPU. For factors of
    # 16 bits it is rounded to them first, as in fused attention.
    return _product(q, k) if q.dtype == jnp.float32 else _rounded_product(q, k)


def _product(q: Array, k: Array) -> Array:
    return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _rounded_product(q: Array, k: Array) -> Array:
    return _product(q, k)


def _forward(q: Array, k: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(q, k), (q, k)


def _backward(factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    q, k = factors
    gradient = gradient.astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", gradient, k), jnp.einsum("bhqk,bqhd->bkhd", gradient, q)


_rounded_product.defvjp(_forward, _backward)


class Attention(nn.Module):
    """x + projection(attention(norm(x))) over all positions, row by row; the projection is zero at first.

    The sum is multiplied by skip_scale.
    """

    num_heads: int
    skip_scale: float = 1.0
    norm: NormSettings = NormSettings()
    init_rule: str = "lecun"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> the same shape; num_heads divides channels."""
        x = residual_stream(x)
        batch, height, width, channels = x.shape
        heads = (self.num_heads, channels // self.num_heads)
        h = GroupNorm(*self.norm, name="norm")(x).reshape(batch, height * width, channels)
        rules = initial(self.init_rule, channels, 3 * channels, "qkv")
        q, k, v = (nn.DenseGeneral(heads, dtype=self.dtype, name=name, **rules)(h) for name in ("q", "k", "v"))  # type: ignore[arg-type]
        rules = initial(self.init_rule, channels, channels, "last")
        h = nn.DenseGeneral(channels, axis=(-2, -1), dtype=self.dtype, name="proj_out", **rules)(attend(q, k, v))  # type: ignore[arg-type]
        return self.skip_scale * (x + h.reshape(x.shape))
