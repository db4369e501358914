"""A small convolutional classifier of images, whose features metrics can be computed on.

    h        = conv(x)
    level i  i > 0: 3x3 convolution of stride 2; then num_res_blocks x  h + conv(swish(norm(conv(swish(norm(h))))))
    features = mean over pixels of swish(h)                          [batch, width]
    logits   = W features + b                                        [batch, num_classes]

The blocks are those of pre-activation residual networks (He et al., arXiv:1603.05027) with group norm (Wu & He 2018),
which has no running statistics: an image's features depend on nothing but the image. The last activation is not
normalised, so that a faint image has other features than a strong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distill.base.errors import positive_int
from diffusion_distill.networks.layers import Conv, GroupNorm, NormSettings, norm_groups, residual_stream

Array = jax.Array


class Classified(NamedTuple):
    """The outputs of a classifier: logits [batch, num_classes] and features [batch, width], both float32."""

    logits: Array
    features: Array


class Classifier(nn.Module):
    """Classifier of images of any size; level i is ch * ch_mult[i] channels wide, at 2^-i of the size, rounded up.

    Args:
      num_classes: at least 2.
      ch: width of the first level's unit.
      ch_mult: width of each level in units of ch, finest level first; the last gives the number of features.
      num_res_blocks: residual blocks per level.
      norm_groups: groups of each norm, a divisor of every level's width.

    Raises:
      ValueError: at construction, for settings that contradict each other.
    """

    num_classes: int
    ch: int = 16
    ch_mult: Sequence[int] = (1, 2, 4)
    num_res_blocks: int = 1
    norm_groups: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))  # a list, from JSON, has no hash
        super().__post_init__()
        _check_settings(self)

    @property
    def width(self) -> int:
        """The number of features."""
        return self.ch * self.ch_mult[-1]

    @nn.compact
    def __call__(self, x: Array) -> Classified:
        """Evaluate the network on x [batch, height, width, channels] in [-1, 1].

        Raises:
          ValueError: while tracing, for another rank.
        """
        if x.ndim != 4:
            raise ValueError(f"x has shape {x.shape}; it must be [batch, height, width, channels].")
        h = Conv(self.ch * self.ch_mult[0], name="conv_in")(x.astype(jnp.float32))
        for level, mult in enumerate(self.ch_mult):
            if level:
                h = Conv(self.ch * mult, stride=2, name=f"level_{level}.downsample")(h)
            for block in range(self.num_res_blocks):
                h = _Residual(self.norm_groups, name=f"level_{level}.block_{block}")(h)
        features = jnp.mean(nn.swish(h), axis=(1, 2))
        return Classified(nn.Dense(self.num_classes, name="dense_out")(features), features)


class _Residual(nn.Module):
    """x + branch(x) without a change of shape; the branch is zero at first."""

    num_groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x, channels = residual_stream(x), x.shape[-1]
        h = GroupNorm(self.num_groups, name="norm1").swish(x)
        h = GroupNorm(self.num_groups, name="norm2").swish(Conv(channels, name="conv1")(h))
        return x + Conv(channels, role="last", name="conv2")(h)


def _check_settings(network: Classifier) -> None:
    for name in ("ch", "num_res_blocks", "norm_groups"):
        positive_int(name, getattr(network, name))
    if positive_int("num_classes", network.num_classes) < 2:
        raise ValueError("num_classes is 1; there is nothing to tell apart. Use data with at least 2 classes.")
    if not network.ch_mult:
        raise ValueError("ch_mult is empty; name the width of at least one level, for example (1, 2, 4).")
    for mult in network.ch_mult:
        norm_groups(network.ch * positive_int("Every entry of ch_mult", mult), NormSettings(network.norm_groups))


#: Classifiers by the name under which they are written down; no diffusion model is built from them.
CLASSIFIERS = {"classifier": Classifier}
