"""The diffusion transformer DiT with adaLN-Zero blocks (Peebles & Xie, arXiv:2212.09748).

    tokens  patches of patch x patch pixels through one matrix product, plus a fixed sin-cos embedding of their place
    c       mlp(sinusoid(time)) [+ class_emb(one_hot(label))] [+ guidance_emb(scale)]
    block   a, b, g, a', b', g' = dense(swish(c)), zero at first
            h += g  * attention((1 + a)  * norm(h) + b)
            h += g' * mlp((1 + a') * norm(h) + b')
    out     (1 + a) * norm(h) + b, then each token becomes the pixels of its patch again

Since the gates g start at zero, each block is the identity at first, and the last product makes the output zero. The
network takes images or latents of any size that its patches divide and any number of channels. No parameter depends on
the size.

`SIZES` has the sizes of the paper: DiT-S/2 is DiT(out_ch=..., patch=2, **SIZES["S"]).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn.initializers import Initializer, normal, zeros

from diffusion_distill.base import errors
from diffusion_distill.base.guided import parts
from diffusion_distill.networks.inputs import DTYPES, check_labels, check_patches, check_rates, label_vectors
from diffusion_distill.networks.layers import ScaleEmbedding, attend, initial, remat, sinusoidal_features

#: The paper's sizes, in Table 1.
SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 384, "depth": 12, "num_heads": 6},
    "B": {"width": 768, "depth": 12, "num_heads": 12},
    "L": {"width": 1024, "depth": 24, "num_heads": 16},
    "XL": {"width": 1152, "depth": 28, "num_heads": 16},
}
FREQUENCIES = 256  # features of the time
EPSILON = 1e-6  # of the norms


class DiT(nn.Module):
    """Transformer on the patches of an image, a number per image (the time) and, if num_classes > 1, a label per image.

    Args:
      width: of a token, a multiple of 4 and of num_heads.
      depth: number of blocks.
      num_heads: of each attention.
      out_ch: channels of the output.
      patch: height and width of a patch in pixels.
      mlp_ratio: width of the hidden layer of a block's perceptron, in units of `width`.
      dropout: rate in [0, 1) at the end of both branches of a block, applied only if `train`.
      num_classes: 1 means unconditional: no `class_emb`, labels are ignored.
      label_dropout: rate at which training replaces labels by the null label, num_classes; kept here because it
        belongs to a trained network. The network itself drops no label.
      frequency_shift: frequency k of the time's sinusoids is 10000^(-k / (128 - shift)); 0 in the paper's program, 1 in
        diffusers.
      mlp_norm_epsilon: added to the variance by the norm before each perceptron; the other norms add 1e-6.
      dtype: "float32", "bfloat16" or "float16", what the products in the blocks are computed in. Parameters,
        embeddings and what they modulate blocks with, norms, softmax and the output are float32.
      remat: computes each block a second time in the backward pass, which then needs less memory.

    Raises:
      ValueError: at construction, for settings that contradict each other.
    """

    width: int
    depth: int
    num_heads: int
    out_ch: int
    patch: int = 2
    mlp_ratio: int = 4
    dropout: float = 0.0
    num_classes: int = 1
    label_dropout: float = 0.0
    frequency_shift: float = 0.0
    mlp_norm_epsilon: float = EPSILON
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_settings(self)

    @nn.compact
    def __call__(self, x: Array, time: Array, labels: Array | None = None, train: bool = False) -> Array:
        """Evaluate the network.

        Args:
          x: [batch, height, width, channels]; height and width divisible by `patch`.
          time: [batch] float32, the number whose sinusoid is embedded.
          labels: [batch] int32 in [0, num_classes] or [batch, num_classes] float; None is the null label for all. Of a
            guided student, the tree of `base.guided`.
          train: apply dropout; needs the "dropout" random stream if the rate is positive.

        Returns:
          [batch, height, width, out_ch] float32.

        Raises:
          ValueError, TypeError: while tracing, for shapes or dtypes other than these.
        """
        check_patches(x, time, self.patch)
        rows, columns = (n // self.patch for n in x.shape[1:3])
        condition = nn.swish(self._condition(time, labels))
        h = _dense("patch_emb", self.width)(patches(x.astype(jnp.float32), self.patch))
        h = h + place_features(rows, columns, self.width)[None]
        block = remat(_Block, self.remat)
        for number in range(self.depth):
            settings = (self.num_heads, self.mlp_ratio, self.dropout, self.mlp_norm_epsilon, self.dtype)
            h = block(*settings, name=f"block_{number}")(h, condition, train)
        [shift, scale] = _modulation("modulation_out", 2, condition)
        h = _dense("dense_out", self.patch**2 * self.out_ch, zeros)(modulated(h, shift, scale))
        return image_of(h, rows, columns, self.patch)

    def _condition(self, time: Array, labels: Array | None) -> Array:
        """What the blocks are told about time and label: [batch, width] float32."""
        scale, labels = parts(labels)
        features = sinusoidal_features(time, FREQUENCIES, shift=self.frequency_shift, cos_first=True)
        hidden = nn.swish(_dense("dense0", self.width, normal(0.02))(features))
        condition = _dense("dense1", self.width, normal(0.02))(hidden)
        if self.num_classes > 1:
            check_labels(labels, len(time), self.num_classes, optional=True)
            # Kernel and bias are the paper's table of num_classes + 1 rows: the null label has the bias alone.
            vectors = label_vectors(labels, len(time), self.num_classes)
            condition += _dense("class_emb", self.width, normal(0.02))(vectors)
        return ScaleEmbedding(name="guidance_emb")(condition, scale)


class _Block(nn.Module):
    """Attention and a perceptron, each behind a gate that is zero at first."""

    num_heads: int
    mlp_ratio: int
    dropout: float
    mlp_norm_epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, h: Array, condition: Array, train: bool) -> Array:
        """h [batch, tokens, width], condition [batch, width] -> the shape of h, float32."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _modulation("modulation", 6, condition)
        h = h + gate * drop(self._attention(modulated(h, shift, scale))).astype(jnp.float32)
        normed = modulated(h, mlp_shift, mlp_scale, self.mlp_norm_epsilon)
        return h + mlp_gate * drop(self._mlp(normed)).astype(jnp.float32)

    def _attention(self, h: Array) -> Array:
        width = h.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        rules: dict[str, Any] = initial("xavier", width, 3 * width)
        q, k, v = (nn.DenseGeneral(heads, dtype=self.dtype, name=name, **rules)(h) for name in ("q", "k", "v"))
        rules = initial("xavier", width, width)
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="proj_out", **rules)(attend(q, k, v))

    def _mlp(self, h: Array) -> Array:
        hidden = nn.Dense(self.mlp_ratio * h.shape[-1], dtype=self.dtype, kernel_init=XAVIER, name="mlp0")(h)
        return nn.Dense(h.shape[-1], dtype=self.dtype, kernel_init=XAVIER, name="mlp1")(nn.gelu(hidden))


# ---------------------------------------------------------------- parts

XAVIER = nn.initializers.xavier_uniform()


def patches(x: Array, patch: int) -> Array:
    """The patches of images, row by row: [batch, h, w, c] -> [batch, (h / patch) * (w / patch), patch * patch * c]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, -1, patch * patch * channels)


def image_of(tokens: Array, rows: int, columns: int, patch: int) -> Array:
    """The inverse of `patches`, for rows x columns patches."""
    x = tokens.reshape(len(tokens), rows, columns, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(len(tokens), rows * patch, columns * patch, -1)


def place_features(rows: int, columns: int, width: int) -> np.ndarray:
    """Where each patch is: [rows * columns, width] float32, sinusoids of the column, then of the row.

    Frequency k of width / 4 is 10000^(-4k / width), as in the paper's program.
    """
    frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = (grid.reshape(-1, 1) * frequencies for grid in np.indices((rows, columns)))
    return np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=-1).astype(np.float32)


def modulated(h: Array, shift: Array, scale: Array, epsilon: float = EPSILON) -> Array:
    """(1 + scale) * norm(h) + shift, where the norm is over the last axis and has no parameters of its own."""
    mean = jnp.mean(h, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(h - mean), axis=-1, keepdims=True)
    return (h - mean) / jnp.sqrt(variance + epsilon) * (1 + scale) + shift


def _modulation(name: str, count: int, condition: Array) -> list[Array]:
    """`count` vectors [batch, 1, width] from the condition, zero at first."""
    vectors = _dense(name, count * condition.shape[-1], zeros)(condition)
    return jnp.split(vectors[:, None], count, axis=-1)


def _dense(name: str, features: int, rule: Initializer = XAVIER) -> nn.Dense:
    return nn.Dense(features, kernel_init=rule, name=name)


def _check_settings(net: DiT) -> None:
    """Raises ValueError where the settings of `net` contradict each other."""
    errors.choose("dtype", net.dtype, DTYPES)
    for name in ("width", "depth", "num_heads", "out_ch", "patch", "mlp_ratio", "num_classes"):
        errors.positive_int(name, getattr(net, name))
    if net.width % 4 or net.width % net.num_heads:
        raise ValueError(
            f"width is {net.width}; it must be a multiple of 4, for the sinusoids of the places, and of "
            f"num_heads={net.num_heads}."
        )
    check_rates(net)
