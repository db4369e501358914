"""Parameterizations: the network predicts x, eps, v, both x and eps, or EDM's mixture of them.

With z = alpha·x + sigma·eps (VP, alpha² + sigma² = 1), arXiv:2202.00512 section 4:

    v = alpha·eps - sigma·x           x = alpha·z - sigma·v         eps = sigma·z + alpha·v
    x = (z - sigma·eps) / alpha       eps = (z - alpha·x) / sigma
    both: two heads on the channel axis, x first; x = sigma²·x_head + alpha²·(z - sigma·eps_head)/alpha

and for any alpha, with n² = sigma² + (sd·alpha)² and sd the standard deviation of the data (arXiv:2206.00364, Table 1):

    edm      x = (sd²·alpha / n²)·z + (sigma·sd / n)·F             F = (sigma·x - sd²·alpha·eps) / (sd·n)
    score    F = sigma·score = -eps                                (networks of the VE process)
    eps_var  eps, then a variance that deterministic samplers drop, on the channel axis

Levels are [batch] or scalar, images [batch, height, width, channels].
"""

from __future__ import annotations

from typing import NamedTuple

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.base.errors import choose
from diffusion_distill.base.typing import Image
from diffusion_distill.process.levels import Level

#: The predictions and how many image-sized outputs each needs.
PREDICTIONS = {"x": 1, "eps": 1, "v": 1, "both": 2, "edm": 1, "score": 1, "eps_var": 2}
#: Standard deviation of the data where nobody says otherwise.
SIGMA_DATA = 0.5


class Estimate(NamedTuple):
    """One network output read as all three quantities."""

    x: Image
    eps: Image
    v: Image


def x_from_eps(z: Image, eps: Image, level: Level) -> Image:
    """(z - sigma·eps) / alpha."""
    alpha, sigma = level.expand(z)
    return (z - sigma * eps) / alpha


def eps_from_x(z: Image, x: Image, level: Level) -> Image:
    """(z - alpha·x) / sigma."""
    alpha, sigma = level.expand(z)
    return (z - alpha * x) / sigma


def x_from_v(z: Image, v: Image, level: Level) -> Image:
    """alpha·z - sigma·v."""
    alpha, sigma = level.expand(z)
    return alpha * z - sigma * v


def eps_from_v(z: Image, v: Image, level: Level) -> Image:
    """sigma·z + alpha·v."""
    alpha, sigma = level.expand(z)
    return sigma * z + alpha * v


def v_from_x_and_eps(x: Image, eps: Image, level: Level) -> Image:
    """alpha·eps - sigma·x."""
    alpha, sigma = level.expand(x)
    return alpha * eps - sigma * x


def x_from_both(z: Image, x_head: Image, eps_head: Image, level: Level) -> Image:
    """The reconciled estimate of two heads; the division by alpha cancels."""
    alpha, sigma = level.expand(z)
    return sigma**2 * x_head + alpha * (z - sigma * eps_head)


def x_from_edm(z: Image, raw: Image, level: Level, sigma_data: float = SIGMA_DATA) -> Image:
    """c_skip·z + c_out·F."""
    alpha, sigma = level.expand(z)
    n = namespace(*level).hypot(sigma, sigma_data * alpha)
    return (sigma_data / n) * (sigma_data * alpha / n * z + sigma * raw)


def edm_from_x_and_eps(x: Image, eps: Image, level: Level, sigma_data: float = SIGMA_DATA) -> Image:
    """F of the clean image and the noise that make up z, without the cancellation of (x - c_skip·z) / c_out."""
    alpha, sigma = level.expand(x)
    n = namespace(*level).hypot(sigma, sigma_data * alpha)
    return (sigma / sigma_data * x - sigma_data * alpha * eps) / n


def x_logvar_from_eps_logvar(logvar: Array, level: Level) -> Array:
    """Log-variance of x given that of eps: x is eps scaled by sigma / alpha."""
    return logvar - level.logsnr


def eps_logvar_from_x_logvar(logvar: Array, level: Level) -> Array:
    """The inverse of `x_logvar_from_eps_logvar`."""
    return logvar + level.logsnr


def output_channels(prediction: str, channels: int) -> int:
    """The number of channels that the network must return for images of `channels` channels."""
    return choose("prediction", prediction, PREDICTIONS) * channels


def heads(raw: Array) -> tuple[Image, Image]:
    """The x and eps halves of a 'both' output, split on the channel axis."""
    half = raw.shape[-1] // 2
    return raw[..., :half], raw[..., half:]


def x_head(prediction: str, raw: Array, z: Image, level: Level) -> Image:
    """The network's estimate of x; for 'both', the x head alone (TRACT's BTD baseline at zero noise)."""
    return heads(raw)[0] if prediction == "both" else to_x(prediction, raw, z, level)


def to_x(prediction: str, raw: Array, z: Image, level: Level, sigma_data: float = SIGMA_DATA) -> Image:
    """The estimate x_hat of the clean image that a network output stands for."""
    choose("prediction", prediction, PREDICTIONS)
    if prediction == "x":
        return raw
    if prediction == "v":
        return x_from_v(z, raw, level)
    if prediction == "both":
        return x_from_both(z, *heads(raw), level)
    if prediction == "edm":
        return x_from_edm(z, raw, level, sigma_data)
    return x_from_eps(z, EPS[prediction](raw), level)


#: eps of networks that predict it in one form or another.
EPS = {"eps": lambda raw: raw, "score": lambda raw: -raw, "eps_var": lambda raw: heads(raw)[0]}


def estimate(prediction: str, raw: Array, z: Image, level: Level, clip: bool = False) -> Estimate:
    """Reads a network output as (x, eps, v).

    The predicted quantity is kept as it is and the others derive from it; with clip, x is clipped to
    [-1, 1] and eps and v are derived from the clipped x.
    """
    x = to_x(prediction, raw, z, level)
    if clip:
        x = namespace(x).clip(x, -1, 1)
    eps = EPS[prediction](raw) if prediction in EPS and not clip else eps_from_x(z, x, level)
    v = raw if prediction == "v" and not clip else v_from_x_and_eps(x, eps, level)
    return Estimate(x, eps, v)


def x_error(prediction: str, raw: Array, x: Image, eps: Image, level: Level, sigma_data: float = SIGMA_DATA) -> Image:
    """x_hat - x for the clean image x and noise eps that make up z, computed in the predicted quantity.

    Forming x_hat first and subtracting would cancel: near zero noise x_hat - x is sigma times the error
    of a v or eps network, far below the rounding of x itself.
    """
    choose("prediction", prediction, PREDICTIONS)
    alpha, sigma = level.expand(x)
    if prediction == "x":
        return raw - x
    if prediction == "v":
        return sigma * (v_from_x_and_eps(x, eps, level) - raw)
    if prediction == "edm":
        n = namespace(*level).hypot(sigma, sigma_data * alpha)
        return (sigma * sigma_data / n) * (raw - edm_from_x_and_eps(x, eps, level, sigma_data))
    if prediction != "both":
        return (sigma / alpha) * (eps - EPS[prediction](raw))
    raw_x, raw_eps = heads(raw)
    return sigma**2 * (raw_x - x) + alpha * sigma * (eps - raw_eps)
