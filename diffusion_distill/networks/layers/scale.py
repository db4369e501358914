"""The scale of guidance as a vector, for students of guided teachers (Meng et al., arXiv:2210.03142, section 3)."""

from __future__ import annotations

import flax.linen as nn
from jax import Array
from jax.nn.initializers import zeros

from diffusion_distill.networks.layers.features import sinusoidal_features

#: Number of features of a scale, and their longest wave over the shortest. The shortest is 2 pi long: guided estimates
#: change smoothly with scales, which lie between 1 and 10 or so.
FEATURES, SLOWEST = 64, 100.0


class ScaleEmbedding(nn.Module):
    """Adds a perceptron's output on sinusoids of the scale. It is zero at first: a student begins as its teacher."""

    @nn.compact
    def __call__(self, emb: Array, scale: Array | None) -> Array:
        """The embedding [batch, width] for scales [batch]; as it is, and without parameters, for None.

        Raises:
          ValueError: while tracing, for scales of another shape.
        """
        if scale is None:
            return emb
        batch, width = emb.shape
        if scale.shape != (batch,):
            raise ValueError(f"The scale of guidance has shape {scale.shape}; it must be [batch] = ({batch},).")
        hidden = nn.Dense(width, name="dense0")(sinusoidal_features(scale, FEATURES, max_period=SLOWEST))
        return emb + nn.Dense(width, kernel_init=zeros, name="dense1")(nn.swish(hidden))
