"""The residual block, and the identity that keeps its gradient cheap."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from diffusion_distill.networks.layers.convolution import Conv
from diffusion_distill.networks.layers.initial import initial
from diffusion_distill.networks.layers.norm import GroupNorm, NormSettings, over_pixels
from diffusion_distill.networks.layers.resampling import RESAMPLE, Resample, Resampling


def residual_stream(x: Array) -> Array:
    """The identity; x, and backwards the gradient arriving at x, are stored before anything uses them.

    A block's input feeds its shortcut and its branch, so its gradient is a sum that runs through all later
    blocks. XLA on CPU repeats that sum, from the end of the network on, in every operation that reads it: a
    CIFAR network's gradient took 1.8 times as long.
    """
    return lax.optimization_barrier(x)


class ResidualBlock(nn.Module):
    """norm, swish, [resample], conv; FiLM norm, swish, dropout, conv (zero at first); plus the shortcut.

    Both branches are resampled, without a convolution of their own. The shortcut is a matrix product where
    the number of channels changes, else the identity. Salimans & Ho (2022), after BigGAN's block.

    Attributes:
      features: channels of the output.
      resample: halve or double the image: 2x2 mean and equal pixels, or with the filter of `taps`, one for
        each branch (Song et al. 2021).
      project: a block that resamples has a matrix product in its shortcut, also where the number of channels
        stays (Song et al. 2021).
      film: False adds the projected embedding before the second norm, instead of modulating it.
      skip_scale: factor of the sum of both branches.
    """

    features: int
    dropout: float = 0.0
    resample: Resample = "none"
    taps: Sequence[float] = ()
    project: bool = False
    film: bool = True
    skip_scale: float = 1.0
    norm: NormSettings = NormSettings()
    init_rule: str = "lecun"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, emb: Array, train: bool) -> Array:
        """x [batch, height, width, in], emb [batch, emb_ch], swish applied -> [batch, height', width', features]."""
        x = residual_stream(x)
        h = GroupNorm(*self.norm, name="norm1").swish(x)
        h = self._resampled("conv1_resample", h)
        h = Conv(self.features, init_rule=self.init_rule, dtype=self.dtype, name="conv1")(h)
        h = self._conditioned(h, emb)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.features, init_rule=self.init_rule, role="last", dtype=self.dtype, name="conv2")(h)
        shortcut = self._resampled("shortcut_resample", x)
        if x.shape[-1] != self.features or (self.project and self.resample != "none"):
            shortcut = self._dense("nin_shortcut", x.shape[-1], self.features)(shortcut)
        return self.skip_scale * (shortcut + h)

    def _conditioned(self, h: Array, emb: Array) -> Array:
        """swish(norm2) of h and the embedding."""
        width = 2 * self.features if self.film else self.features
        projected = self._dense("temb_proj", emb.shape[-1], width)(emb)
        norm = GroupNorm(*self.norm, name="norm2")
        if self.film:
            scale, shift = jnp.split(projected, 2, axis=-1)
            return norm.swish(h, film=(scale, shift))
        return norm.swish(h + over_pixels(projected))

    def _resampled(self, name: str, x: Array) -> Array:
        if self.taps and self.resample != "none":
            return Resampling(self.resample, self.taps, name=name)(x)
        return RESAMPLE[self.resample](x)

    def _dense(self, name: str, inputs: int, outputs: int) -> nn.Dense:
        return nn.Dense(outputs, dtype=self.dtype, name=name, **initial(self.init_rule, inputs, outputs))  # type: ignore[arg-type]
