"""Toys: data and networks so simple that the right answer is a closed formula.

Gaussian data, x ~ N(mu, s²) in every pixel. With z = alpha·x + sigma·eps and var = alpha²·s² + sigma²:

    optimal denoiser   E[x | z] = mu + (alpha·s² / var)·(z - alpha·mu)
    flow               (z_t - alpha_t·mu) / sqrt(var_t) is the same at all levels t
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from scipy import special

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.denoisers.guidance import label_log_prob
from diffusion_distill.denoisers.model import Model
from diffusion_distill.process import noising, predictions
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Cosine, Process, RectifiedFlow
from diffusion_distill.process.time_input import LogsnrInput, TimeOfProcess
from diffusion_distill.training import ema
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.state import TrainState, create


@dataclass(frozen=True)
class Gaussian:
    """Gaussian data and, as what a `Denoiser` takes for a model, their optimal denoiser; it has no parameters."""

    mean: float
    std: float
    process: Process = field(default_factory=Cosine)
    prediction: str = "x"

    def variance(self, level: Level) -> Array:
        """Variance of z."""
        return level.alpha**2 * self.std**2 + level.sigma**2

    def raw(self, params: Any, z: Array, level: Level, labels: Any, dropout: Any) -> Array:
        """E[x | z]."""
        level = level.expand(z)
        return self.mean + level.alpha * self.std**2 / self.variance(level) * (z - level.alpha * self.mean)

    def flow(self, z: Array, level_t: Level, level_s: Level) -> Array:
        """Where the exact flow leads from z at level t to level s."""
        scale = namespace(z).sqrt(self.variance(level_s) / self.variance(level_t))
        return level_s.alpha * self.mean + scale * (z - level_t.alpha * self.mean)


@dataclass(frozen=True)
class Mixture:
    """Data whose pixels are independent draws from a mixture of two normal distributions; as `Gaussian` is used.

    Pixels do not know of each other, so the flow keeps the quantile of each: F_s(z_s) = F_t(z_t).
    """

    weights: tuple[float, float] = (0.4, 0.6)
    means: tuple[float, float] = (-0.5, 0.6)
    stds: tuple[float, float] = (0.3, 0.2)
    prediction: str = "x"

    def draw(self, count: int, seed: int = 0) -> np.ndarray:
        """Independent pixels [count]."""
        rng = np.random.default_rng(seed)
        of = rng.choice(len(self.weights), size=count, p=self.weights)
        return np.take(self.means, of) + np.take(self.stds, of) * rng.standard_normal(count)

    def raw(self, params: Any, z: Array, level: Level, labels: Any, dropout: Any) -> Array:
        """E[x | z], by Bayes' rule."""
        xp, (alpha, sigma) = namespace(z), level.expand(z)
        found = []
        for weight, mean, std in zip(self.weights, self.means, self.stds, strict=True):
            variance, off = alpha**2 * std**2 + sigma**2, z - alpha * mean
            found.append(
                (
                    np.log(weight) - 0.5 * xp.log(variance) - off**2 / variance / 2,
                    mean + alpha * std**2 / variance * off,
                )
            )
        first = 1 / (1 + xp.exp(found[1][0] - found[0][0]))
        return first * found[0][1] + (1 - first) * found[1][1]

    def flow(self, z: np.ndarray, level_t: Level, level_s: Level) -> np.ndarray:
        """Where the exact flow leads from z at level t to level s, in float64, by bisection."""
        quantile = self._below(z, level_t)
        low, high = (np.full_like(z, level_s.alpha * end + end * 20 * level_s.sigma) for end in (-3.0, 3.0))
        for _ in range(80):
            middle = (low + high) / 2
            below = self._below(middle, level_s) < quantile
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2

    def _below(self, z: np.ndarray, level: Level) -> np.ndarray:
        """F(z)."""
        parts = zip(self.weights, self.means, self.stds, strict=True)
        return sum(  # type: ignore[return-value]
            w * special.ndtr((z - level.alpha * m) / np.hypot(level.alpha * std, level.sigma)) for w, m, std in parts
        )


#: The classes of `Classes`, and the label of none.
SHARES, MEANS, STDS = np.array([0.5, 0.2, 0.3]), np.array([-0.6, 0.1, 0.5]), np.array([0.3, 0.5, 0.2])
NULL = len(SHARES)


class Classes(struct.PyTreeNode):
    """The exact denoiser of a mixture of Gaussians, one per class; and its exact classifier.

    Class k has x ~ N(mu_k, s_k²) in every pixel and the share w_k of all images. With var_k = alpha²·s_k² + sigma²:

        log p(z, k)    = log w_k - sum (z - alpha·mu_k)² / (2·var_k) - (pixels / 2)·log var_k + const
        conditional      E[x | z, k] = mu_k + (alpha·s_k² / var_k)·(z - alpha·mu_k), for labels 0 .. 2
        unconditional    E[x | z] = sum_k p(k | z)·E[x | z, k], for the label NULL or without labels
    """

    shares: Any = struct.field(default_factory=lambda: SHARES)
    means: Any = struct.field(default_factory=lambda: MEANS)
    stds: Any = struct.field(default_factory=lambda: STDS)

    def parts(self, z: Any, level: Level) -> tuple[Any, Any]:
        """(log p(z, k) [batch, classes], E[x | z, k] [batch, classes, ...])."""
        xp, many = namespace(z), z[:, None]
        alpha, sigma = level.expand(many)
        means, stds = (a.reshape(1, -1, 1, 1, 1) for a in (self.means, self.stds))
        variance, off = alpha**2 * stds**2 + sigma**2, many - alpha * means
        log_density = -0.5 * (off**2 / variance + xp.log(variance)).sum(axis=(2, 3, 4))
        return xp.log(self.shares).reshape(1, -1) + log_density, means + alpha * stds**2 / variance * off

    def __call__(self, z: Any, level: Level, labels: Any = None) -> Any:
        joint, x = self.parts(z, level)
        xp = namespace(z)
        chance = xp.exp(joint - joint.max(axis=1, keepdims=True))
        if labels is not None:
            own = xp.asarray(labels)[:, None] == xp.arange(NULL)[None]
            chance = xp.where(xp.asarray(labels)[:, None] == NULL, chance, own)
        chance = chance / chance.sum(axis=1, keepdims=True)
        return (chance[:, :, None, None, None] * x).sum(axis=1)

    def log_prob(self, z: Any, level: Level, labels: Any) -> Any:
        """log p(label | z)."""
        return label_log_prob(self.parts(z, level)[0], labels)


@dataclass(frozen=True)
class Curved:
    """A denoiser that no solver can integrate exactly."""

    prediction: str = "x"

    def raw(self, params: Any, z: Array, level: Level, labels: Any, dropout: Any) -> Array:
        """Something smooth of the image and the level."""
        xp, (alpha, sigma) = namespace(z), level.expand(z)
        return xp.tanh(z / xp.sqrt(1 + sigma**2) + 0.3 * xp.sin(3 * z) * alpha + 0.2 * xp.log(1 + sigma))


@dataclass(frozen=True, eq=False)
class GaussianSource:
    """Endless-looking Gaussian images: number i is drawn from a generator seeded with i // block."""

    data: Gaussian
    shape: tuple[int, int, int] = (2, 2, 1)
    size: int = 4096
    num_classes: int = 0

    def __post_init__(self) -> None:
        noise = np.random.default_rng(0).standard_normal((self.size, *self.shape))
        object.__setattr__(self, "images", np.float32(self.data.mean + self.data.std * noise))

    def __len__(self) -> int:
        return self.size

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The images at indices [batch]."""
        return {"x": self.images[indices]}  # type: ignore[attr-defined]


class PixelSource(GaussianSource):
    """Samples made of given pixels."""

    def __init__(self, pixels: np.ndarray, shape: tuple[int, int, int] = (2, 2, 1)) -> None:
        images = np.float32(pixels).reshape(-1, *shape)
        for name, value in {"images": images, "shape": shape, "size": len(images)}.items():
            object.__setattr__(self, name, value)


class AffinePerLevel(nn.Module):
    """One free affine map v = a·z + b for each of `steps` times i / steps: all a student of Gaussian data needs.

    The time it is given is 1000·angle/(pi/2), which is 1000·t for the cosine process cut far out.
    """

    steps: int

    @nn.compact
    def __call__(self, x: Array, time: Array, labels: Array | None = None, train: bool = False) -> Array:
        slope = self.param("slope", nn.initializers.zeros, (self.steps + 1,))
        shift = self.param("shift", nn.initializers.zeros, (self.steps + 1,))
        row = jnp.round(time / 1000 * self.steps).astype(jnp.int32)
        return slope[row][:, None, None, None] * x + shift[row][:, None, None, None]


class Perceptron(nn.Module):
    """A small network that mixes all pixels, the time and the label."""

    out_ch: int
    width: int = 16
    dropout: float = 0.0
    num_classes: int = 1

    @nn.compact
    def __call__(self, x: Array, time: Array, labels: Array | None = None, train: bool = False) -> Array:
        time = time[:, None] / 1000
        parts = [x.reshape(len(x), -1), jnp.cos(3 * time), jnp.sin(3 * time)]
        if labels is not None:
            parts.append(jax.nn.one_hot(labels, self.num_classes))
        hidden = nn.swish(nn.Dense(self.width)(jnp.concatenate(parts, axis=1)))
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        outputs = x.shape[1] * x.shape[2] * self.out_ch
        return nn.Dense(outputs)(nn.swish(nn.Dense(self.width)(hidden))).reshape(*x.shape[:-1], self.out_ch)


class CurvePerLevel(nn.Module):
    """One free curve, the same for every value of a sample, for each of `steps` times i / steps; told 1000·i / steps.

    The curve is a straight line and narrow bumps between -4 and 4, enough for the one-step map of a `Mixture`.
    """

    steps: int
    bumps: int = 41

    @nn.compact
    def __call__(self, x: Array, time: Array, labels: Array | None = None, train: bool = False) -> Array:
        weights = self.param("weights", nn.initializers.zeros, (self.steps + 1, self.bumps + 2))
        row = jnp.round(time / 1000 * self.steps).astype(jnp.int32)
        return jnp.einsum("bhwcj,bj->bhwc", bumps(x, self.bumps), weights[row])


def bumps(z: Array, count: int) -> Array:
    """The features of `CurvePerLevel`, [..., count + 2]."""
    xp, at = namespace(z), np.linspace(-4, 4, count, dtype=z.dtype).reshape((1,) * z.ndim + (-1,))
    curved = xp.exp(-0.5 * ((z[..., None] - at) * ((count - 1) / 8)) ** 2)
    return xp.concatenate([curved, z[..., None], xp.ones_like(z[..., None])], axis=-1)


NETWORKS = {"affine_per_level": AffinePerLevel, "curve_per_level": CurvePerLevel, "perceptron": Perceptron}


def exact_teacher(data: Gaussian, steps: int, shape: tuple[int, int, int] = (2, 2, 1)) -> Artefact:
    """An `AffinePerLevel` model that is optimal at all times i / steps; it predicts v, or of a flow the velocity."""
    process, flow = data.process, isinstance(data.process, RectifiedFlow)
    level, prediction = process.level(np.arange(steps + 1) / steps).off_ends(), "velocity" if flow else "v"
    # x_hat = gain·z + rest, eps_hat = (z - alpha·x_hat) / sigma
    gain = level.alpha * data.std**2 / data.variance(level)
    rest = data.mean * (1 - gain * level.alpha)
    of_z = predictions.raw_of(prediction, gain, (1 - level.alpha * gain) / level.sigma, level)
    free = predictions.raw_of(prediction, rest, -level.alpha * rest / level.sigma, level)
    params = {"slope": jnp.asarray(of_z, jnp.float32), "shift": jnp.asarray(free, jnp.float32)}
    told = TimeOfProcess() if flow else LogsnrInput()
    return Artefact(Model(AffinePerLevel(steps), shape, process, prediction, told), params)


def mixture_teacher(data: Mixture, process: Process, steps: int, shape: tuple[int, int, int] = (2, 2, 1)) -> Artefact:
    """A `CurvePerLevel` model of the velocity, fitted to the optimal denoiser at the times i / steps, i > 0."""
    network, weights = CurvePerLevel(steps), [np.zeros(CurvePerLevel(steps).bumps + 2)]
    x = np.repeat(data.draw(2000), 3)
    for i in range(1, steps + 1):
        level = Level(*(np.full(1, a) for a in process.level(np.float64(i / steps))))
        z = noising.diffuse(x, np.random.default_rng(i).standard_normal(len(x)), level)
        x_hat = data.raw(None, z, level, None, None)
        raw = predictions.raw_of("velocity", x_hat, predictions.eps_from_x(z, x_hat, level), level)
        features = bumps(z, network.bumps)
        kept = features.T @ features / len(z) + 1e-9 * np.eye(features.shape[-1])
        weights.append(np.linalg.solve(kept, features.T @ raw / len(z)))
    model = Model(network, shape, process, "velocity", TimeOfProcess())
    return Artefact(model, {"weights": jnp.asarray(np.stack(weights), jnp.float32)})


def parameters(model: Model, seed: int = 0) -> Any:
    """Random parameters of a model, none of them zero, without compiling anything."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.5 / a.shape[0] ** 0.5, a.shape), jnp.float32), shapes)


def equal(a: Any, b: Any) -> bool:
    """Whether two trees are the same, bit for bit."""
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(same))


def trained_state(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """A state in which every part differs from every other."""
    state = create(parameters(model, 1), optimizer, ["self_teacher"], parameters(model, 2))
    averages = {name: ema.Average(parameters(model, k), jnp.int32(9)) for k, name in enumerate(state.averages, 3)}
    opt_state = jax.tree.map(lambda a: a + 1, state.opt_state)
    return state.replace(averages=averages, opt_state=opt_state, step=jnp.int32(9), skipped=jnp.int32(2))
