"""The U-Net of Ho et al. (2020) and what was made of it: DDPM, improved DDPM, ADM, progressive distillation.

    emb    swish(dense1(swish(dense0(sinusoid(time)))) [+ class_emb(one_hot(label))] [+ guidance_emb(scale)])
    down   per level: num_res_blocks x {residual, attention?}, every output kept; then downsample, kept too
    middle residual, attention, residual
    up     per level: (num_res_blocks + 1) x {join the kept one, residual, attention?}; then upsample
    out    norm, swish, conv

Level i is int(ch * ch_mult[i]) channels wide, at 2^-i of the image's size. Parameter names and shapes are those of
progressive distillation's checkpoints (Salimans & Ho 2022): `down_0.block_1/conv1/kernel`, `mid.attn_1/q/kernel`,
`up_2.upsample/...`, ... (the dots belong to the names).

The defaults are that program's. What other published networks do differently has one place each: `_embed` (features,
label table), `_norm`, `_heads`, `_resample`, and `ResidualBlock`, `Attention` in `layers`. EDM's DhariwalUNet (Karras
et al. 2022) is the network with the settings `ADM`; `weights.families` has the settings of DDPM, improved DDPM (Nichol
& Dhariwal 2021), ADM (Dhariwal & Nichol 2021) and diffusers' UNet2DModel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from diffusion_distill.base import errors
from diffusion_distill.base.guided import parts
from diffusion_distill.networks.inputs import (
    DTYPES,
    check_augment,
    check_images,
    check_labels,
    check_rates,
    label_vectors,
)
from diffusion_distill.networks.layers import (
    INIT_RULES,
    RESAMPLE,
    Attention,
    Conv,
    GroupNorm,
    NormSettings,
    Resample,
    ResidualBlock,
    Role,
    ScaleEmbedding,
    initial,
    norm_groups,
    remat,
    sinusoidal_features,
    upsample,
)

#: The settings of EDM's DhariwalUNet: UNet(..., **ADM).
ADM: dict[str, Any] = {
    "head_dim": 64,
    "whole_heads": False,
    "resblock_resample": True,
    "cos_first": True,
    "frequency_shift": 0.0,
    "norm_epsilon": 1e-5,
    "norm_fewest": 4,
    "wide_conv_in": True,
    "label_bias": False,
    "init_rule": "uniform",
}
DOWN_PADDINGS = ((0, 1), (1, 1))


class UNet(nn.Module):
    """U-Net on images, a number per image (the time) and, if num_classes > 1, a label per image.

    Args:
      ch: unit of the widths; int(ch * ch_mult[i]) must be a multiple of 32 on every level.
      emb_ch: width of the time embedding.
      out_ch: channels of the output.
      ch_mult: width of each level in units of ch, finest level first; may be fractions.
      num_res_blocks: residual blocks per level on the way down (one more on the way up).
      attn_resolutions: heights at which attention follows each block; the middle always has one.
      num_heads, head_dim: exactly one of the two: the number of heads, or the channels of each.
      num_heads_up: another number of heads on the way up.
      dropout: rate in [0, 1) inside the residual blocks, applied only if `train`.
      film: the embedding modulates the second norm of each residual block (FiLM); False adds it before that norm.
      resblock_resample: resample in a residual block (2x2 mean, nearest) instead of a 3x3 convolution.
      conv_resample: False resamples by 2x2 mean and nearest alone, without convolution or residual block.
      down_padding: zeros before and after the image where a convolution halves it: (0, 1) as in DDPM and progressive
        distillation, (1, 1) as in improved DDPM and ADM.
      num_classes: 1 means unconditional: no `class_emb`, labels are ignored.
      dtype: "float32", "bfloat16" or "float16", what convolutions and products are computed in. Parameters,
        embedding, norm statistics, softmax, the last convolution and the output are float32.
      whole_heads: False gives channels // head_dim heads, and no attention where that is none, not even in
        the middle; True refuses channels that head_dim does not divide.
      cos_first, frequency_shift: see `sinusoidal_features`.
      norm_groups, norm_epsilon, norm_fewest: see `GroupNorm`.
      wide_conv_in: the first convolution is as wide as the first level, instead of ch.
      label_bias: `class_emb` has a bias, and labels are required. Without, a missing label is the zero
        vector, and labels may be real vectors.
      label_dropout: rate at which training replaces labels by the null label, num_classes; kept here because
        it belongs to a trained network, and read by `training.dropout`. The network itself drops no label.
      augment_dim: length of the vector that describes how an image was augmented; 0 takes none.
      init_rule: initial values, see `layers.initial`.
      remat: computes residual and attention blocks a second time in the backward pass, which then needs less memory.

    Raises:
      ValueError: at construction, for settings that contradict each other.
    """

    ch: int
    emb_ch: int
    out_ch: int
    ch_mult: Sequence[float]
    num_res_blocks: int
    attn_resolutions: Sequence[int]
    num_heads: int | None = None
    head_dim: int | None = None
    dropout: float = 0.0
    resblock_resample: bool = False
    num_classes: int = 1
    dtype: str = "float32"
    whole_heads: bool = True
    cos_first: bool = False
    frequency_shift: float = 1.0
    norm_groups: int = 32
    norm_epsilon: float = 1e-6
    norm_fewest: int = 0
    wide_conv_in: bool = False
    label_bias: bool = True
    label_dropout: float = 0.0
    augment_dim: int = 0
    init_rule: str = "lecun"
    remat: bool = False
    film: bool = True
    conv_resample: bool = True
    down_padding: Sequence[int] = (0, 1)
    num_heads_up: int | None = None

    def __post_init__(self) -> None:
        # Tuples, so that a network built from a list (a config, JSON) is hashable and compares equal.
        for name in ("ch_mult", "attn_resolutions", "down_padding"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()
        _check_settings(self)

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        labels: Array | None = None,
        train: bool = False,
        augment: Array | None = None,
    ) -> Array:
        """Evaluate the network.

        Args:
          x: [batch, height, width, channels]; height and width divisible by 2^(levels - 1).
          time: [batch] float32, the number whose sinusoid is embedded (BTD: 1000 * f(logsnr)).
          labels: [batch] int32 in [0, num_classes), required if num_classes > 1. A label outside the range
            is no error: its one-hot vector is zero. Without label_bias also [batch, num_classes] float, or
            None for zeros. Of a guided student, the tree of `base.guided`.
          train: apply dropout; needs the "dropout" random stream if a rate is positive.
          augment: [batch, augment_dim] float; None, as in sampling, is all zeros.

        Returns:
          [batch, height, width, out_ch] float32.

        Raises:
          ValueError, TypeError: while tracing, for shapes or dtypes other than these.
        """
        check_images(x, time, len(self.ch_mult))
        emb = self._embed(time, labels, augment)
        h, kept = self._down(x, emb, train)
        h = self._up(self._middle(h, emb, train), kept, emb, train)
        h = GroupNorm(*self._norm, name="norm_out").swish(h)
        return Conv(self.out_ch, init_rule=self.init_rule, role="last", name="conv_out")(h)

    def _down(self, x: Array, emb: Array, train: bool) -> tuple[Array, list[Array]]:
        """The coarsest image, and those that are kept for the way up."""
        h = self._conv("conv_in", x, self.widths[0] if self.wide_conv_in else self.ch)
        kept = [h]
        for level, width in enumerate(self.widths):
            for block in range(self.num_res_blocks):
                h = self._residual(f"down_{level}.block_{block}", h, emb, train, width)
                h = self._attention(f"down_{level}.attn_{block}", h)
                kept.append(h)
            if level < len(self.widths) - 1:
                h = self._resample(f"down_{level}.downsample", "down", h, emb, train)
                kept.append(h)
        return h, kept

    def _middle(self, h: Array, emb: Array, train: bool) -> Array:
        h = self._residual("mid.block_1", h, emb, train, h.shape[-1])
        h = self._attention("mid.attn_1", h, always=True)
        return self._residual("mid.block_2", h, emb, train, h.shape[-1])

    def _up(self, h: Array, kept: list[Array], emb: Array, train: bool) -> Array:
        for level, width in reversed(list(enumerate(self.widths))):
            for block in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, kept.pop()], axis=-1)
                h = self._residual(f"up_{level}.block_{block}", h, emb, train, width)
                h = self._attention(f"up_{level}.attn_{block}", h, up=True)
            if level > 0:
                h = self._resample(f"up_{level}.upsample", "up", h, emb, train)
        return h

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(int(self.ch * mult) for mult in self.ch_mult)

    # Below, what is between the blocks; each returns an image, or the embedding.

    def _embed(self, time: Array, labels: Array | None, augment: Array | None) -> Array:
        """[batch, emb_ch] float32, the swish before every residual block's own projection applied."""
        batch, (scale, labels) = len(time), parts(labels)
        features = sinusoidal_features(time, self.ch, shift=self.frequency_shift, cos_first=self.cos_first)
        check_augment(augment, batch, self.augment_dim)
        if self.augment_dim:
            augment = (
                jnp.zeros((batch, self.augment_dim), jnp.float32) if augment is None else augment.astype(jnp.float32)
            )
            features += self._dense("augment_emb", augment, self.ch, "augment", bias=False)
        emb = self._dense("dense1", nn.swish(self._dense("dense0", features, self.emb_ch)), self.emb_ch)
        if self.num_classes > 1:
            check_labels(labels, batch, self.num_classes, optional=not self.label_bias)
            vectors = label_vectors(labels, batch, self.num_classes)
            emb += self._dense("class_emb", vectors, self.emb_ch, "label", bias=self.label_bias)
        return nn.swish(ScaleEmbedding(name="guidance_emb")(emb, scale))

    def _dense(self, name: str, x: Array, features: int, role: Role = "layer", bias: bool = True) -> Array:
        rules = initial(self.init_rule, x.shape[-1], features, role)
        return nn.Dense(features, use_bias=bias, name=name, **rules)(x)  # type: ignore[arg-type]

    def _conv(self, name: str, x: Array, features: int, **settings: Any) -> Array:
        return Conv(features, init_rule=self.init_rule, dtype=self.dtype, name=name, **settings)(x)

    def _residual(
        self,
        name: str,
        h: Array,
        emb: Array,
        train: bool,
        features: int,
        resample: Resample = "none",
    ) -> Array:
        block = remat(ResidualBlock, self.remat)(
            features,
            dropout=self.dropout,
            film=self.film,
            resample=resample,
            norm=self._norm,
            init_rule=self.init_rule,
            dtype=self.dtype,
            name=name,
        )
        return block(h, emb, train)

    def _attention(self, name: str, h: Array, always: bool = False, up: bool = False) -> Array:
        heads = self._heads(h.shape[-1], up) if always or h.shape[1] in self.attn_resolutions else 0
        if not heads:
            return h
        block = remat(Attention, self.remat)
        return block(heads, norm=self._norm, init_rule=self.init_rule, dtype=self.dtype, name=name)(h)

    @property
    def _norm(self) -> NormSettings:
        return NormSettings(self.norm_groups, self.norm_epsilon, self.norm_fewest)

    def _heads(self, channels: int, up: bool = False) -> int:
        """Number of heads of an attention `channels` wide; 0 means that there is no attention."""
        given = {"num_heads": self.num_heads, "head_dim": self.head_dim}
        if up and self.num_heads_up is not None:
            given = {"num_heads": self.num_heads_up}
        name, size = next((name, size) for name, size in given.items() if size is not None)
        heads = channels // size if size > 0 and name == "head_dim" else size
        divisor = size if self.whole_heads else max(heads, 1)
        if size < 1 or channels % divisor:
            raise ValueError(f"{name}={size} must divide the {channels} channels of each level with attention.")
        return heads

    def _resample(self, name: str, direction: Literal["down", "up"], h: Array, emb: Array, train: bool) -> Array:
        features = h.shape[-1]
        if self.resblock_resample:
            return self._residual(name, h, emb, train, features, resample=direction)
        if not self.conv_resample:
            return RESAMPLE[direction](h)
        if direction == "down":
            return self._conv(name, h, features, stride=2, padding=self.down_padding)
        return self._conv(name, upsample(h), features)


def _check_settings(net: UNet) -> None:
    """Raise ValueError where the settings of `net` contradict each other."""
    errors.choose("dtype", net.dtype, DTYPES)
    errors.choose("init_rule", net.init_rule, INIT_RULES)
    for name in ("ch", "emb_ch", "out_ch", "num_res_blocks", "num_classes", "norm_groups"):
        errors.positive_int(name, getattr(net, name))
    if not net.ch_mult:
        raise ValueError("ch_mult is empty; give one factor per level, e.g. (1, 2).")
    widths = [net.ch] * (not net.wide_conv_in) + list(net.widths)
    if not net.norm_fewest and any(width < 1 or width % net.norm_groups for width in widths):
        raise ValueError(
            f"Widths {widths} (ch={net.ch}, then ch * ch_mult, ch_mult={net.ch_mult}) must all be multiples "
            f"of {net.norm_groups}, the number of groups of the norm; choose ch accordingly."
        )
    for width in widths:
        norm_groups(width, net._norm)
    if (net.num_heads is None) == (net.head_dim is None):
        raise ValueError(f"num_heads={net.num_heads} and head_dim={net.head_dim}; give exactly one of the two.")
    if net.num_heads_up is not None and net.num_heads is None:
        raise ValueError(f"num_heads_up={net.num_heads_up} needs num_heads; head_dim holds for all attention.")
    if net.resblock_resample and not net.conv_resample:
        raise ValueError("resblock_resample=True resamples in residual blocks; leave conv_resample at True.")
    if net.down_padding not in DOWN_PADDINGS:
        raise ValueError(f"down_padding is {net.down_padding}; it must be one of {DOWN_PADDINGS}, (before, after).")
    net._heads(widths[-1])  # the middle always has attention; other levels are known once an image is
    check_rates(net)
    if net.augment_dim < 0:
        raise ValueError(f"augment_dim is {net.augment_dim}; it must be 0 or more.")
