"""Layers shared by the networks: time features, norm, convolution, attention, residual block, resampling.

Images are [batch, height, width, channels]; an embedding of the time is [batch, emb_ch] float32.

    GroupNorm      y = (x - mean_g) / sqrt(var_g + eps) * scale + shift     (Wu & He 2018, eq. 7)
    FiLM           h = GroupNorm(x) * (1 + scale(emb)) + shift(emb)         (Dhariwal & Nichol 2021, AdaGN)
    attention      softmax(q k^T / sqrt(head_dim)) v over all positions     (Ho et al. 2020)
    resampling     up    out[2 i + j - p] += 2 f[j] x[i]                    per axis, with taps f that sum to 1
                   down  out[i] = sum_j f[j] x[2 i + j - p]                 (Song et al. 2021, after Zhang 2019)

Parameters are float32, with the names and shapes of the progressive distillation program (Salimans & Ho 2022);
its initial values are the default, `init_rule` names others. `dtype` is what convolutions and matrix products are
computed in; norm statistics and softmax stay float32.

Constants that a checkpoint may set (filters of `Resampling`, frequencies of `FourierFeatures`) are parameters
without a gradient: they are read, averaged, stored and exported like the others, and training without weight
decay leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer, lecun_normal, normal, ones, zeros

from diffusion_distill.base.errors import choose

Array = jax.Array
Resample = Literal["none", "down", "up"]
#: What a layer is for, where its initial values depend on it: 'last' ends a branch or the network.
Role = Literal["layer", "last", "qkv", "label", "augment"]


class NormSettings(NamedTuple):
    """The settings of a network's group norms, see `GroupNorm`."""

    num_groups: int = 32
    epsilon: float = 1e-6
    fewest: int = 0


# ---------------------------------------------------------------- functions


def sinusoidal_features(
    time: Array, width: int, *, max_period: float = 10_000.0, shift: float = 1.0, cos_first: bool = False
) -> Array:
    """Sines, then cosines, of `time` at width // 2 frequencies falling from 1 to 1 / max_period.

    Frequency k of half = width // 2 is max_period^(-k / (half - shift)); an odd width ends with a zero.
    Salimans & Ho (2022) after Ho et al. (2020).

    Args:
        time: [batch], any real numbers (of size 1000 in the published networks).
        width: number of features, at least 4.
        max_period: ratio of the highest to the lowest frequency.
        shift: 1 spaces the frequencies so that both ends are reached, 0 leaves out the lowest.
        cos_first: cosines, then sines (Dhariwal & Nichol 2021).

    Returns:
        [batch, width] float32, whatever the compute dtype of the network.
    """
    half = width // 2
    # Rounded once from float64: angles reach 1000 rad, where a float32 exponential would cost 3e-4 rad.
    frequencies = (max_period ** (-np.arange(half) / (half - shift))).astype(np.float32)
    angles = time.astype(jnp.float32)[:, None] * frequencies[None]
    waves = [jnp.sin(angles), jnp.cos(angles)]
    features = jnp.concatenate(waves[::-1] if cos_first else waves, axis=-1)
    return jnp.pad(features, ((0, 0), (0, width % 2)))


def fourier_features(time: Array, frequencies: Array) -> Array:
    """Sines, then cosines, of 2 pi f t: time [batch], frequencies [n] -> [batch, 2 n] float32.

    Tancik et al. (2020), Song et al. (2021). 2 pi f is rounded to float32 before the product, as in the
    published networks: a phase of size 1e5 has an error of 1e-2 either way.
    """
    angles = time.astype(jnp.float32)[:, None] * (np.float32(2 * np.pi) * frequencies)[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def group_norm(x: Array, scale: Array, shift: Array, *, num_groups: int = 32, epsilon: float = 1e-6) -> Array:
    """Normalise x over height, width and the channels of a group, then scale and shift each channel.

    Written as one multiply-add per element, (x - mean) * factor + shift, where factor, [batch, channels], is
    rsqrt(var + epsilon) * scale: on a CPU a small U-Net's forward pass takes a fifth less time than when
    normalising first. The variance is taken around the mean (two passes): E[x^2] - E[x]^2 loses its digits
    when the mean dominates.

    Args:
        x: [batch, height, width, channels], any float dtype; the arithmetic is float32.
        scale, shift: [channels], or [batch, channels] where an embedding modulates them.
        num_groups: divides channels.
        epsilon: added to the variance.

    Returns:
        [batch, height, width, channels] float32.
    """
    x = x.astype(jnp.float32)
    # The derivative of a variance by its own centre is zero: stopping it there spares a reduction backwards.
    mean = _group_mean(x, num_groups)
    variance = _group_mean(jnp.square(x - _over_pixels(lax.stop_gradient(mean))), num_groups)
    scale, shift = (jnp.broadcast_to(a, mean.shape) for a in (scale, shift))
    factor = lax.rsqrt(variance + epsilon) * scale
    return (x - _over_pixels(mean)) * _over_pixels(factor) + _over_pixels(shift)


def _group_mean(x: Array, num_groups: int) -> Array:
    """Mean over pixels and the channels of a group, repeated for each channel: [batch, channels]."""
    batch, height, width, channels = x.shape
    per_channel = jnp.sum(x.reshape(batch, height * width, channels), axis=1)  # pixels first: channels are contiguous
    per_group = jnp.mean(per_channel.reshape(batch, num_groups, -1), axis=-1) / (height * width)
    return jnp.repeat(per_group, channels // num_groups, axis=-1)


def _over_pixels(per_channel: Array) -> Array:
    return per_channel[:, None, None, :]


def convolution(x: Array, kernel: Array, stride: int = 1, padding: int | None = None) -> Array:
    """[batch, h, w, in] * [kh, kw, in, out] -> [batch, ceil(h / stride), ceil(w / stride), out].

    Padding is with zeros, XLA's SAME: at stride 2 and even sizes none before, one after, as in BTD and DDPM;
    or `padding` of them on each side.
    """
    pads = "SAME" if padding is None else [(padding, padding)] * 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def downsample(x: Array) -> Array:
    """2x2 mean: [batch, h, w, c] -> [batch, h / 2, w / 2, c]; h and w are even."""
    batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def upsample(x: Array) -> Array:
    """Every pixel becomes 2x2 equal ones: [batch, h, w, c] -> [batch, 2 h, 2 w, c]."""
    batch, height, width, channels = x.shape
    blocks = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return blocks.reshape(batch, 2 * height, 2 * width, channels)


def filter_of(taps: Sequence[float]) -> np.ndarray:
    """[k, k] float32: the outer product of k taps with themselves, with sum 1."""
    line = np.asarray(taps, np.float64)
    return (np.outer(line, line) / line.sum() ** 2).astype(np.float32)


def filter_padding(size: int) -> int:
    """The p of a filter of `size` taps: up, an even filter doubles the image, an odd one gives 2 h - 1."""
    return (size - 1) // 2


def filter_down(x: Array, filter: Array, padding: int | None = None) -> Array:
    """out[i] = sum_j f[j] x[2 i + j - p] on both axes; zeros outside.

    Sums of shifted images: XLA makes one loop of them, where its grouped convolution is slow on a CPU.

    Args:
        x: [batch, h, w, c].
        filter: [k, k], any values.
        padding: p; `filter_padding(k)` if None.

    Returns:
        [batch, h', w', c] with h' = (h + 2 p - k) // 2 + 1.
    """
    size, filter = filter.shape[0], filter.astype(x.dtype)
    pad = filter_padding(size) if padding is None else padding
    height, width = ((n + 2 * pad - size) // 2 + 1 for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    taps = [(j, k) for j in range(size) for k in range(size)]
    return _sum([filter[j, k] * x[:, j : j + 2 * height - 1 : 2, k : k + 2 * width - 1 : 2] for j, k in taps])


def filter_up(x: Array, filter: Array, padding: int | None = None) -> Array:
    """out[2 i + j - p] += 2 f[j] x[i] on both axes: pixels spread over twice the size, none renormalised.

    Each of the four parities of an output's place is a sum of shifted images of its own.

    Args:
        x: [batch, h, w, c].
        filter: [k, k], any values.
        padding: p; `filter_padding(k)` if None.

    Returns:
        [batch, h', w', c] with h' = 2 h - 2 + k - 2 p.
    """
    size, filter = filter.shape[0], 4 * filter.astype(x.dtype)
    pad = filter_padding(size) if padding is None else padding
    batch, *sizes, channels = x.shape
    height, width = (2 * n - 2 + size - 2 * pad for n in sizes)
    rows, columns = (height + 1) // 2, (width + 1) // 2
    # (tap j, shift s) by parity: output 2 m + parity receives f[j] x[m + s].
    shifts = [[(j, (r + pad - j) // 2) for j in range(size) if (r + pad - j) % 2 == 0] for r in (0, 1)]
    every = [shift for phase in shifts for _, shift in phase]
    low, high = max(0, -min(every)), max(0, max(every) + max(rows - sizes[0], columns - sizes[1]))
    x = jnp.pad(x, ((0, 0), (low, high), (low, high), (0, 0)))

    def phase(row: int, column: int) -> Array:
        starts = [(j, k, low + y, low + z) for j, y in shifts[row] for k, z in shifts[column]]
        terms = [filter[j, k] * x[:, y : y + rows, z : z + columns] for j, k, y, z in starts]
        return _sum(terms) if terms else jnp.zeros((batch, rows, columns, channels), x.dtype)

    grid = jnp.stack([jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)], axis=2)
    return grid.reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width]


def _sum(terms: Sequence[Array]) -> Array:
    total, *others = terms
    for term in others:
        total = total + term
    return total


def residual_stream(x: Array) -> Array:
    """The identity; x, and backwards the gradient arriving at x, are stored before anything uses them.

    A block's input feeds its shortcut and its branch, so its gradient is a sum that runs through all later
    blocks. XLA on CPU repeats that sum, from the end of the network on, in every operation that reads it: a
    CIFAR network's gradient took 1.8 times as long.
    """
    return lax.optimization_barrier(x)


RESAMPLE = {"none": lambda x: x, "down": downsample, "up": upsample}


def attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(head_dim)) v, each [batch, positions, heads, head_dim]; the softmax is float32.

    k is divided by the root, and rounded to its own dtype, before the product: as in EDM, and with fewer numbers to
    divide than the logits.
    """
    k = (k.astype(jnp.float32) / k.shape[-1] ** 0.5).astype(k.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


# ---------------------------------------------------------------- initial values


def initial(rule: str, inputs: int, outputs: int, role: Role = "layer") -> dict[str, Initializer]:
    """kernel_init and bias_init of a layer, by the name of a rule.

        lecun     kernel normal, variance 1 / inputs, the last one zero; bias zero   (Salimans & Ho 2022)
        uniform   kernel and bias uniform in ±1 / sqrt(inputs); last and augment zero, label standard normal
                  (EDM's DhariwalUNet, Karras et al. 2022)
        xavier    kernel uniform in ±sqrt(6 / (inputs + outputs)), the last one times 1e-5, q, k, v times
                  sqrt(0.2); bias zero   (EDM's SongUNet)

    Args:
        rule: a key of `INIT_RULES`.
        inputs, outputs: numbers that a result depends on and that an input reaches; of a convolution, channels
            times the kernel's places.
        role: what the layer is for.

    Raises:
        ValueError: unknown rule.
    """
    return choose("init_rule", rule, INIT_RULES)(inputs, outputs, role)


def _lecun(inputs: int, outputs: int, role: Role) -> dict[str, Initializer]:
    return {"kernel_init": zeros if role == "last" else lecun_normal(), "bias_init": zeros}


def _uniform(inputs: int, outputs: int, role: Role) -> dict[str, Initializer]:
    rule = {"last": zeros, "augment": zeros, "label": normal(1.0)}.get(role) or _within(inputs**-0.5)
    return {"kernel_init": rule, "bias_init": rule}


def _xavier(inputs: int, outputs: int, role: Role) -> dict[str, Initializer]:
    gain = {"last": 1e-5, "qkv": 0.2**0.5}.get(role, 1.0)
    return {"kernel_init": _within(gain * (6 / (inputs + outputs)) ** 0.5), "bias_init": zeros}


def _within(limit: float) -> Initializer:
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: jax.random.uniform(key, shape, dtype, -limit, limit)


INIT_RULES: dict[str, Callable[[int, int, Role], dict[str, Initializer]]] = {
    "lecun": _lecun,
    "uniform": _uniform,
    "xavier": _xavier,
}


# ---------------------------------------------------------------- modules


class Conv(nn.Module):
    """Convolution with bias; parameters kernel [size, size, in, features], bias [features]."""

    features: int
    size: int = 3
    stride: int = 1
    init_rule: str = "lecun"
    role: Role = "layer"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x, kernel, bias = _conv_parameters(self, x)
        return convolution(x, kernel, self.stride) + bias


def _conv_parameters(conv: Conv | FusedConv, x: Array) -> tuple[Array, Array, Array]:
    """x, kernel and bias [1, 1, 1, features] of a convolution, in its dtype."""
    shape = (conv.size, conv.size, x.shape[-1], conv.features)
    places = conv.size**2
    rules = initial(conv.init_rule, places * x.shape[-1], places * conv.features, conv.role)
    kernel = conv.param("kernel", rules["kernel_init"], shape, jnp.float32)
    bias = conv.param("bias", rules["bias_init"], (conv.features,), jnp.float32)
    x, kernel, bias = (a.astype(conv.dtype) for a in (x, kernel, bias))
    return x, kernel, bias[None, None, None]


class Resampling(nn.Module):
    """Halves or doubles an image with a filter, [k, k], that starts as the outer product of its taps."""

    direction: Literal["down", "up"]
    taps: Sequence[float]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return {"down": filter_down, "up": filter_up}[self.direction](x, _filter(self))


def _filter(module: Resampling | FusedConv) -> Array:
    return lax.stop_gradient(module.param("filter", lambda key: jnp.asarray(filter_of(module.taps))))


class FusedConv(nn.Module):
    """A convolution on the finer of two images: before halving, or after doubling, with a filter.

    Inside the image the result is that of the other order; at its border the zeros lie elsewhere: padding of
    the filter and of the kernel are given at once, where the image is finer.
    """

    features: int
    direction: Literal["down", "up"]
    taps: Sequence[float]
    size: int = 3
    init_rule: str = "lecun"
    role: Role = "layer"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x, kernel, bias = _conv_parameters(self, x)
        filter, half = _filter(self), self.size // 2
        pad = filter_padding(filter.shape[0])
        if self.direction == "down":
            return filter_down(convolution(x, kernel, padding=half + pad), filter, padding=0) + bias
        x = filter_up(x, filter, padding=max(pad - half, 0))
        return convolution(x, kernel, padding=max(half - pad, 0)) + bias


class FourierFeatures(nn.Module):
    """`fourier_features` at width // 2 frequencies that start as 16 times standard normal numbers."""

    width: int

    @nn.compact
    def __call__(self, time: Array) -> Array:
        frequencies = self.param("freqs", normal(16.0), (self.width // 2,), jnp.float32)
        return fourier_features(time, lax.stop_gradient(frequencies))


class GroupNorm(nn.Module):
    """Group norm with learned scale and bias [channels], optionally modulated by an embedding (FiLM).

    Called with `film` = (scale, shift), each [batch, channels], it returns norm(x) * (1 + scale) + shift,
    folded into the same multiply-add per element. There are num_groups groups or, with `fewest`, at most so
    many and at least `fewest` channels in each: min(num_groups, channels // fewest).
    """

    num_groups: int = 32
    epsilon: float = 1e-6
    fewest: int = 0

    @nn.compact
    def __call__(self, x: Array, film: tuple[Array, Array] | None = None) -> Array:
        scale = self.param("scale", ones, (x.shape[-1],), jnp.float32)
        shift = self.param("bias", zeros, (x.shape[-1],), jnp.float32)
        if film is not None:
            film_scale, film_shift = (f.astype(jnp.float32) for f in film)
            scale, shift = scale[None] * (1 + film_scale), shift[None] * (1 + film_scale) + film_shift
        groups = norm_groups(x.shape[-1], NormSettings(self.num_groups, self.epsilon, self.fewest))
        return group_norm(x, scale, shift, num_groups=groups, epsilon=self.epsilon)


def norm_groups(channels: int, norm: NormSettings) -> int:
    """The number of groups of a norm over `channels` channels.

    Raises:
        ValueError: there would be none, or they would not be equal.
    """
    groups = min(norm.num_groups, channels // norm.fewest) if norm.fewest else norm.num_groups
    if groups < 1 or channels % groups:
        raise ValueError(f"A norm over {channels} channels cannot have {groups} equal groups; choose ch accordingly.")
    return groups


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
        h = nn.swish(GroupNorm(*self.norm, name="norm1")(x))
        h = self._resampled("conv1_resample", h)
        h = Conv(self.features, init_rule=self.init_rule, dtype=self.dtype, name="conv1")(h)
        h = nn.swish(self._conditioned(h, emb))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.features, init_rule=self.init_rule, role="last", dtype=self.dtype, name="conv2")(h)
        shortcut = self._resampled("shortcut_resample", x)
        if x.shape[-1] != self.features or (self.project and self.resample != "none"):
            shortcut = self._dense("nin_shortcut", x.shape[-1], self.features)(shortcut)
        return self.skip_scale * (shortcut + h)

    def _conditioned(self, h: Array, emb: Array) -> Array:
        """norm2 of h and the embedding."""
        width = 2 * self.features if self.film else self.features
        projected = self._dense("temb_proj", emb.shape[-1], width)(emb)
        norm = GroupNorm(*self.norm, name="norm2")
        if self.film:
            scale, shift = jnp.split(projected, 2, axis=-1)
            return norm(h, film=(scale, shift))
        return norm(h + _over_pixels(projected))

    def _resampled(self, name: str, x: Array) -> Array:
        if self.taps and self.resample != "none":
            return Resampling(self.resample, self.taps, name=name)(x)
        return RESAMPLE[self.resample](x)

    def _dense(self, name: str, inputs: int, outputs: int) -> nn.Dense:
        return nn.Dense(outputs, dtype=self.dtype, name=name, **initial(self.init_rule, inputs, outputs))  # type: ignore[arg-type]


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
