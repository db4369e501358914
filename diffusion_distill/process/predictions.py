"""What a network predicts: two coefficients of a level.

A noisy sample is z = alpha·x + sigma·eps. A network's output stands for a mixture of the clean sample and the noise,

    raw = a·x + b·eps

with an a and a b for every level. Solved for x, whatever alpha and sigma are,

    x_hat     = p·raw + q·z                      p = sigma/det,  q = -b/det,  det = sigma·a - alpha·b
    x_hat - x = p·(raw - (a·x + b·eps))

The second line is how a loss gets its error. Forming x_hat first and subtracting x would cancel: near zero noise the
error of x_hat is sigma times that of a v or eps network, far below the rounding of x itself.

    prediction     a              b              who predicts it
    x              1              0              BTD (arXiv:2202.00512)
    eps            0              1              DDPM (arXiv:2006.11239)
    v              -sigma         alpha          BTD, section 4
    velocity       -1             1              rectified flows: dz/dt of z = (1 - t)·x + t·eps (arXiv:2209.03003)
    edm            sigma/(sd·n)   -sd·alpha/n    EDM's F (arXiv:2206.00364, Table 1), n = hypot(sigma, sd·alpha)
    consistency    d·n/(sd·w)     -sd·s·n/(d·w)  consistency models (arXiv:2303.01469, Eq. 5 and appendix C): edm, but
                                                 x_hat = z at s = 0.002, with s = sigma/alpha, d = s - 0.002,
                                                 n = hypot(s, sd), w = d² + sd²
    score          0              -1/sigma       the gradient of log p(z)
    scaled_score   0              -1             sigma·score, the networks of EDM's VE wrapper
    eps_var        0              1              eps and a variance, which is not used (iDDPM, arXiv:2102.09672)
    both           1 and 0        0 and 1        x and eps; x_hat is their mean with weights sigma² : alpha²

sd is `sigma_data`, the standard deviation of the data. A new prediction is one line in `PREDICTIONS`:

    PREDICTIONS["minus_x"] = Prediction(lambda level, sigma_data: (-1.0, 0.0))

Several outputs of one network stand side by side on the last axis. Levels are [batch] or scalars, samples [batch, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from diffusion_distill.base.arrays import Array, expand, namespace
from diffusion_distill.base.errors import choose
from diffusion_distill.base.typing import Data
from diffusion_distill.process.levels import Level

#: Standard deviation of the data where nobody says otherwise.
SIGMA_DATA = 0.5

#: (level, sigma_data) -> (a, b), arrays of the level's shape or numbers
Coefficients = Callable[[Level, float], tuple[Array, Array]]


@dataclass(frozen=True)
class Prediction:
    """What the outputs of a network mean.

    Attributes:
      coefficients: (level, sigma_data) -> (a, b) of the first output.
      outputs: the number of outputs; those without coefficients are not used.
      second: the coefficients of the second output, if x_hat is the mean of two estimates, weighted sigma² : alpha².
    """

    coefficients: Coefficients
    outputs: int = 1
    second: Coefficients | None = None


def _edm(level: Level, sigma_data: float) -> tuple[Array, Array]:
    n = namespace(*level).hypot(level.sigma, sigma_data * level.alpha)
    return level.sigma / (sigma_data * n), -sigma_data * level.alpha / n


#: The level at which a consistency model is the identity, and the least distance from it that is told apart.
SIGMA_IDENTITY, LEAST_DISTANCE = 0.002, 1e-6


def _consistency(level: Level, sigma_data: float) -> tuple[Array, Array]:
    xp = namespace(*level)
    s = level.sigma / level.alpha
    distance = xp.maximum(s - SIGMA_IDENTITY, LEAST_DISTANCE)
    n, w = xp.hypot(s, sigma_data), distance**2 + sigma_data**2
    return distance * n / (sigma_data * w), -sigma_data * s * n / (distance * w)


PREDICTIONS: dict[str, Prediction] = {
    "x": Prediction(lambda level, sigma_data: (1.0, 0.0)),
    "eps": Prediction(lambda level, sigma_data: (0.0, 1.0)),
    "v": Prediction(lambda level, sigma_data: (-level.sigma, level.alpha)),
    "velocity": Prediction(lambda level, sigma_data: (-1.0, 1.0)),
    "edm": Prediction(_edm),
    "consistency": Prediction(_consistency),
    "score": Prediction(lambda level, sigma_data: (0.0, -1 / level.sigma)),
    "scaled_score": Prediction(lambda level, sigma_data: (0.0, -1.0)),
    "eps_var": Prediction(lambda level, sigma_data: (0.0, 1.0), outputs=2),
    "both": Prediction(lambda level, sigma_data: (1.0, 0.0), outputs=2, second=lambda level, sigma_data: (0.0, 1.0)),
}
#: diffusers' names of predictions -> ours.
PREDICTED = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}


class Head(NamedTuple):
    """One output at given levels: it stands for a·x + b·eps and contributes p·raw + q·z to x_hat."""

    a: Array
    b: Array
    p: Array
    q: Array


def heads(prediction: str, level: Level, sigma_data: float = SIGMA_DATA) -> list[Head]:
    """The outputs that are used, each with its share of x_hat.

    Raises:
      ValueError: an unknown prediction; near matches are named.
    """
    known, level = choose("prediction", prediction, PREDICTIONS), level.off_ends()
    first = _solved(known.coefficients, level, sigma_data)
    if known.second is None:
        return [first]
    power = level.alpha**2 + level.sigma**2
    shares = level.sigma**2 / power, level.alpha**2 / power
    both = first, _solved(known.second, level, sigma_data)
    return [Head(a, b, share * p, share * q) for (a, b, p, q), share in zip(both, shares, strict=True)]


def _solved(coefficients: Coefficients, level: Level, sigma_data: float) -> Head:
    a, b = coefficients(level, sigma_data)
    det = level.sigma * a - level.alpha * b
    return Head(a, b, level.sigma / det, -b / det)


def output_channels(prediction: str, channels: int) -> int:
    """The number of channels that a network must return for samples of `channels` channels."""
    return choose("prediction", prediction, PREDICTIONS).outputs * channels


def predicts_noise(prediction: str) -> bool:
    """Whether the output is the noise and nothing of x (a = 0), so that x_hat multiplies its errors by sigma/alpha."""
    return all(head.a == 0 for head in heads(prediction, Level(0.6, 0.8)))


def split(prediction: str, raw: Array) -> list[Data]:
    """The outputs of a network, taken apart on the last axis."""
    width = raw.shape[-1] // choose("prediction", prediction, PREDICTIONS).outputs
    return [raw[..., k : k + width] for k in range(0, raw.shape[-1], width)]


def to_x(prediction: str, raw: Array, z: Data, level: Level, sigma_data: float = SIGMA_DATA) -> Data:
    """The estimate x_hat of the clean sample, of the shape of z, that a network's output stands for."""
    return _read(heads(prediction, level, sigma_data), split(prediction, raw), z)


def x_head(prediction: str, raw: Array, z: Data, level: Level, sigma_data: float = SIGMA_DATA) -> Data:
    """The estimate of the first output alone; for 'both' it is the network's own x (TRACT's rule at zero noise)."""
    first = choose("prediction", prediction, PREDICTIONS).coefficients
    return _read([_solved(first, level.off_ends(), sigma_data)], split(prediction, raw), z)


def _read(used: list[Head], outputs: list[Data], z: Data) -> Data:
    x_hat = expand(sum(head.q for head in used), z) * z
    for head, output in zip(used, outputs, strict=False):
        x_hat = x_hat + expand(head.p, z) * output
    return x_hat


def raw_of(prediction: str, x: Data, eps: Data, level: Level, sigma_data: float = SIGMA_DATA) -> Array:
    """What a perfect network returns for the clean sample x and the noise eps; unused outputs are 0."""
    xp = namespace(x, eps, *level)
    true = [_mixture(head, x, eps) for head in heads(prediction, level, sigma_data)]
    unused = choose("prediction", prediction, PREDICTIONS).outputs - len(true)
    return xp.concatenate([*true, *[xp.zeros_like(x)] * unused], axis=-1)


def _mixture(head: Head, x: Data, eps: Data) -> Data:
    return expand(head.a, x) * x + expand(head.b, x) * eps


def x_error(
    prediction: str,
    raw: Array,
    x: Data,
    eps: Data,
    level: Level,
    sigma_data: float = SIGMA_DATA,
    scale: Array = 1.0,
) -> Data:
    """scale·(x_hat - x) for the clean sample x and noise eps that make up z, computed in the predicted quantity.

    Args:
      scale: [batch] or a number. It is multiplied into p, so that a large scale and a small p do not meet in the error.
    """
    used = heads(prediction, level, sigma_data)
    outputs = zip(used, split(prediction, raw), strict=False)
    return sum(expand(scale * head.p, x) * (output - _mixture(head, x, eps)) for head, output in outputs)


def eps_from_x(z: Data, x: Data, level: Level) -> Data:
    """The noise (z - alpha·x) / sigma that is in z if x is the clean sample."""
    alpha, sigma = level.expand(z)
    return (z - alpha * x) / sigma
