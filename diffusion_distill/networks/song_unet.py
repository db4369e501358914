"""The U-Nets of score-based models, DDPM++ and NCSN++ (Song et al. 2021), as EDM trains them (Karras et al. 2022).

    emb = swish(dense1(swish(dense0(features(time) + class_emb(√n·labels) + augment_emb(augment)))) [+ guidance_emb])
    down   per level: num_res_blocks x {residual, attention?}, every output kept; then a residual that halves, kept too
    middle residual, attention, residual
    up     per level: (num_res_blocks + 1) x {join the kept one, residual}, attention after the last?; then a
           residual that doubles
    out    norm, swish, conv

The skeleton and the names of parameters are those of `unet`; what differs: the embedding is added to a block
instead of modulating it, sums of two branches are divided by √2, a resampling block has a projection in its
shortcut, and attention has one head. Two further paths:

    encoder 'skip'       the image is halved beside the network and, through a 1x1 convolution, added to each level
    encoder 'residual'   halved with a 3x3 convolution; (h + aux) / √2 is both the new h and the next aux
    decoder 'skip'       each level has an output of its own; doubled, it is added to the next one's

    DDPM++  embedding 'positional', encoder and decoder 'standard', resample_filter (1, 1)
    NCSN++  embedding 'fourier', noise_mult 2, encoder 'residual', resample_filter (1, 3, 3, 1)

Filters and Fourier frequencies are parameters without a gradient, see `layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

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
    Attention,
    Conv,
    FourierFeatures,
    FusedConv,
    GroupNorm,
    NormSettings,
    Resample,
    Resampling,
    ResidualBlock,
    ScaleEmbedding,
    initial,
    norm_groups,
    remat,
    sinusoidal_features,
)

#: The choices of EDM's program.
EMBEDDINGS = {name: name for name in ("positional", "fourier")}
ENCODERS = {name: name for name in ("standard", "skip", "residual")}
DECODERS = {name: name for name in ("standard", "skip")}

NORM = NormSettings(num_groups=32, epsilon=1e-6, fewest=4)
INIT_RULE = "xavier"


class SongUNet(nn.Module):
    """DDPM++, NCSN++ and everything between them.

    Args:
      ch, emb_ch, out_ch, ch_mult: as in `UNet`; a width must have equal norm groups, min(32, width // 4) of them.
      num_res_blocks, num_classes, dropout, label_dropout, augment_dim, dtype, remat: as in `UNet`.
      attn_resolutions: heights at which attention follows each block on the way down and the last one on the
        way up; the middle always has one.
      noise_mult: the features of the time are ch * noise_mult wide.
      embedding: 'positional' (sinusoids) or 'fourier' (random frequencies).
      encoder: 'standard', 'skip' or 'residual'.
      decoder: 'standard' or 'skip'.
      resample_filter: taps of the filter that halves and doubles images, an even number of them.
      skip_scale: factor of each sum of two branches.

    Raises:
      ValueError: at construction, for unknown choices and settings that contradict each other.
    """

    ch: int
    emb_ch: int
    out_ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    attn_resolutions: Sequence[int]
    noise_mult: int = 1
    embedding: str = "positional"
    encoder: str = "standard"
    decoder: str = "standard"
    resample_filter: Sequence[float] = (1, 1)
    skip_scale: float = sqrt(0.5)
    dropout: float = 0.0
    num_classes: int = 1
    label_dropout: float = 0.0
    augment_dim: int = 0
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        # Tuples, so that a network built from a list (a config, JSON) is hashable and compares equal.
        for name in ("ch_mult", "attn_resolutions", "resample_filter"):
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
          time: [batch] float32, the number whose features are embedded.
          labels: [batch] int32 in [0, num_classes) or [batch, num_classes] float; None is the zero vector. Of
            a guided student, the tree of `base.guided`.
          train: apply dropout; needs the "dropout" random stream if a rate is positive.
          augment: [batch, augment_dim] float; None, as in sampling, is all zeros.

        Returns:
          [batch, height, width, out_ch] float32.

        Raises:
          ValueError, TypeError: while tracing, for shapes or dtypes other than these.
        """
        check_images(x, time, len(self.ch_mult))
        emb = self._embed(time, labels, augment)
        h, kept = self._encode(x, emb, train)
        h = self._residual("mid.block_1", h, emb, train, features=h.shape[-1])
        h = self._attention("mid.attn_1", h, always=True)
        h = self._residual("mid.block_2", h, emb, train, features=h.shape[-1])
        return self._decode(h, kept, emb, train)

    # Below, the network from front to back.

    def _embed(self, time: Array, labels: Array | None, augment: Array | None) -> Array:
        """[batch, emb_ch] float32."""
        batch, width, (scale, labels) = len(time), self.ch * self.noise_mult, parts(labels)
        check_augment(augment, batch, self.augment_dim)
        if self.embedding == "fourier":
            features = FourierFeatures(width, name="fourier")(time)
        else:
            features = sinusoidal_features(time, width)
        if self.num_classes > 1:
            check_labels(labels, batch, self.num_classes, optional=True)
            vectors = label_vectors(labels, batch, self.num_classes)
            features += self._dense("class_emb", sqrt(self.num_classes) * vectors, width)
        if self.augment_dim:
            augment = (
                jnp.zeros((batch, self.augment_dim), jnp.float32) if augment is None else augment.astype(jnp.float32)
            )
            features += self._dense("augment_emb", augment, width, bias=False)
        emb = self._dense("dense1", nn.swish(self._dense("dense0", features, self.emb_ch)), self.emb_ch)
        return nn.swish(ScaleEmbedding(name="guidance_emb")(emb, scale))

    def _encode(self, x: Array, emb: Array, train: bool) -> tuple[Array, list[Array]]:
        """The coarsest image and all that are kept."""
        h, aux = Conv(self.ch, init_rule=INIT_RULE, dtype=self.dtype, name="conv_in")(x), x
        kept = [h]
        for level, mult in enumerate(self.ch_mult):
            for block in range(self.num_res_blocks):
                h = self._residual(f"down_{level}.block_{block}", h, emb, train, features=self.ch * mult)
                h = self._attention(f"down_{level}.attn_{block}", h)
                kept.append(h)
            if level < len(self.ch_mult) - 1:
                h = self._residual(f"down_{level}.downsample", h, emb, train, h.shape[-1], resample="down")
                h, aux = self._add_aux(level, h, aux)
                kept.append(h)
        return h, kept

    def _add_aux(self, level: int, h: Array, aux: Array) -> tuple[Array, Array]:
        """The image after adding the path beside the encoder, and the input of that path at the next level."""
        if self.encoder == "standard":
            return h, aux
        width, taps = h.shape[-1], self.resample_filter
        if self.encoder == "skip":
            aux = Resampling("down", taps, name=f"down_{level}.aux_down")(aux)
            conv = Conv(width, 1, init_rule=INIT_RULE, dtype=self.dtype, name=f"down_{level}.aux_skip")
            return h + conv(aux), aux
        name = f"down_{level}.aux_residual"
        conv = FusedConv(width, "down", taps, init_rule=INIT_RULE, dtype=self.dtype, name=name)
        h = self.skip_scale * (h + conv(aux))
        return h, h

    def _decode(self, h: Array, kept: list[Array], emb: Array, train: bool) -> Array:
        """The output."""
        aux = None
        for level, mult in reversed(list(enumerate(self.ch_mult))):
            for block in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, kept.pop()], axis=-1)
                h = self._residual(f"up_{level}.block_{block}", h, emb, train, features=self.ch * mult)
            h = self._attention(f"up_{level}.attn_{self.num_res_blocks}", h)
            if level == 0 or self.decoder == "skip":
                out = GroupNorm(*NORM, name=f"up_{level}.norm_out").swish(h)
                out = Conv(self.out_ch, init_rule=INIT_RULE, role="last", name=f"up_{level}.conv_out")(out)
                aux = out if aux is None else out + aux
            if level > 0:
                h = self._residual(f"up_{level}.upsample", h, emb, train, h.shape[-1], resample="up")
                if aux is not None:
                    aux = Resampling("up", self.resample_filter, name=f"up_{level}.aux_up")(aux)
        assert aux is not None  # level 0 is the last one
        return aux

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
            resample=resample,
            taps=self.resample_filter,
            project=True,
            film=False,
            skip_scale=self.skip_scale,
            norm=NORM,
            init_rule=INIT_RULE,
            dtype=self.dtype,
            name=name,
        )
        return block(h, emb, train)

    def _attention(self, name: str, h: Array, always: bool = False) -> Array:
        if not (always or h.shape[1] in self.attn_resolutions):
            return h
        block = remat(Attention, self.remat)
        return block(1, self.skip_scale, norm=NORM, init_rule=INIT_RULE, dtype=self.dtype, name=name)(h)

    def _dense(self, name: str, x: Array, features: int, bias: bool = True) -> Array:
        rules = initial(INIT_RULE, x.shape[-1], features)
        return nn.Dense(features, use_bias=bias, name=name, **rules)(x)  # type: ignore[arg-type]


def _check_settings(net: SongUNet) -> None:
    """Raise ValueError where the settings of `net` are unknown or contradict each other."""
    choices = {"embedding": EMBEDDINGS, "encoder": ENCODERS, "decoder": DECODERS, "dtype": DTYPES}
    for name, known in choices.items():
        errors.choose(name, getattr(net, name), known)
    for name in ("ch", "emb_ch", "out_ch", "num_res_blocks", "num_classes", "noise_mult"):
        errors.positive_int(name, getattr(net, name))
    if not net.ch_mult:
        raise ValueError("ch_mult is empty; give one factor per level, e.g. (1, 2).")
    for width in (net.ch, *(net.ch * mult for mult in net.ch_mult)):
        norm_groups(width, NORM)
    taps = net.resample_filter
    if not taps or not sum(taps) or (len(taps) % 2 and len(net.ch_mult) > 1):
        raise ValueError(
            f"resample_filter is {taps}; it must be an even number of taps (an odd one does not double an image) "
            "whose sum is not zero, e.g. (1, 1) or (1, 3, 3, 1)."
        )
    check_rates(net)
    if net.augment_dim < 0:
        raise ValueError(f"augment_dim is {net.augment_dim}; it must be 0 or more.")
