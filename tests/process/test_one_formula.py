"""One formula for what networks predict: every prediction on every process, in NumPy float64 and in JAX float32.

What a perfect network returns is written down here a second time, by hand, from the definitions in the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distill.methods import loss
from diffusion_distill.process import noising, predictions, weighting
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import PREDICTIONS
from diffusion_distill.process.processes import (
    VE,
    Cosine,
    DiscreteBetas,
    IDDPMCosine,
    LinearBeta,
    LinearBetaDiscrete,
    Process,
    RectifiedFlow,
)

pytestmark = pytest.mark.fast


@dataclass(frozen=True)
class Odd:
    """alpha = (1 - t)², sigma = 2·t: of no family; time 1 is pure noise."""

    def level(self, t: Any) -> Level:
        return Level((1 - t) ** 2, 2 * t)

    def time(self, level: Level) -> Any:
        half = level.alpha / level.sigma  # (1 - t)² / (2·t)
        return 1 / (1 + half + (half * (half + 2)) ** 0.5)


PROCESSES: dict[str, Process] = {
    "cosine": Cosine(),
    "cosine, logsnr in [-9, 9]": Cosine(-9, 9),
    "linear beta": LinearBeta(),
    "linear beta to zero noise": LinearBeta(t_min=0.0),
    "discrete linear beta": LinearBetaDiscrete(),
    "discrete cosine": DiscreteBetas("cosine", logsnr_min=-10.2),
    "zero SNR": DiscreteBetas("scaled_linear", 1000, 8.5e-4, 0.012, zero_snr=True),
    "iDDPM cosine": IDDPMCosine(),
    "VE": VE(),
    "rectified flow": RectifiedFlow(),
    "rectified flow, shift 3": RectifiedFlow(3.0),
    "odd": Odd(),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
ONE_OUTPUT = [name for name, prediction in PREDICTIONS.items() if prediction.outputs == 1]
ONE_HEAD = [name for name, prediction in PREDICTIONS.items() if prediction.second is None]
SIGMA_DATA = 0.7
#: Times, both ends among them. Outputs that are infinite at zero noise are left out there, see `times_of`.
TIMES = np.array([0.0, 1e-4, 0.02, 0.2, 0.5, 0.8, 0.98, 0.9999, 1.0])

#: prediction -> (x, eps, alpha, sigma) -> what a perfect network returns, as its paper defines it
DEFINITIONS: dict[str, Callable[..., list[Any]]] = {
    "x": lambda x, eps, alpha, sigma: [x],
    "eps": lambda x, eps, alpha, sigma: [eps],
    "v": lambda x, eps, alpha, sigma: [alpha * eps - sigma * x],
    "velocity": lambda x, eps, alpha, sigma: [eps - x],
    "score": lambda x, eps, alpha, sigma: [-eps / sigma],
    "scaled_score": lambda x, eps, alpha, sigma: [-eps],
    "eps_var": lambda x, eps, alpha, sigma: [eps, 0 * eps],
    "both": lambda x, eps, alpha, sigma: [x, eps],
    # EDM, Table 1, for y = z/alpha at noise s = sigma/alpha, cleared of its divisions by alpha and sigma:
    # F = (x - c_skip·y) / c_out, c_skip = sd²/(s² + sd²), c_out = s·sd/sqrt(s² + sd²)
    "edm": lambda x, eps, alpha, sigma: [
        (sigma * x - SIGMA_DATA**2 * alpha * eps) / (SIGMA_DATA * np.sqrt(sigma**2 + (SIGMA_DATA * alpha) ** 2))
    ],
    "consistency": lambda x, eps, alpha, sigma: [consistency(x, eps, alpha, sigma)],
}


def consistency(x: Any, eps: Any, alpha: Any, sigma: Any) -> Any:
    """Consistency models, appendix C: EDM's F with s - 0.002 in place of s in c_skip and before the root of c_out.

    F = (x - c_skip·y) / c_out, c_skip = sd²/((s - e)² + sd²), c_out = (s - e)·sd/sqrt(s² + sd²), cleared as above.
    """
    from_identity = sigma - 0.002 * alpha
    mixture = from_identity**2 * x - SIGMA_DATA**2 * alpha * sigma * eps
    whole = from_identity**2 + (SIGMA_DATA * alpha) ** 2
    return np.sqrt(sigma**2 + (SIGMA_DATA * alpha) ** 2) * mixture / (SIGMA_DATA * from_identity * whole)


def times_of(prediction: str) -> np.ndarray:
    """All times at which a perfect network is finite."""
    return TIMES[{"score": 1, "consistency": 2}.get(prediction, 0) :]  # the latter is z itself at s = 0.002


def samples(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x in [-1, 1] and noise, one of each per time, of two channels."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (count, 3, 2)), rng.standard_normal((count, 3, 2))


def perfect(prediction: str, x: np.ndarray, eps: np.ndarray, level: Level) -> np.ndarray:
    """What a perfect network returns."""
    return np.concatenate(DEFINITIONS[prediction](x, eps, *level.expand(x)), axis=-1)


def on_device(*values: Any) -> Any:
    """As JAX arrays in float32."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), values)


def condition(prediction: str, level: Level, like: np.ndarray) -> np.ndarray:
    """How much rounding of z and of the output can be in x_hat: the sum of the sizes of both factors."""
    inside = level.off_ends()
    used = predictions.heads(prediction, inside, SIGMA_DATA)
    factors = sum(np.abs(head.p) * (1 + np.abs(head.a) + np.abs(head.b)) for head in used)
    return Level(factors + np.abs(sum(head.q for head in used)), 0 * inside.sigma).expand(like).alpha + 1


def test_every_prediction_has_a_definition_here() -> None:
    assert set(DEFINITIONS) == set(PREDICTIONS)


@every_process
@every_prediction
def test_a_perfect_network_gives_x(prediction: str, process: Process) -> None:
    """To the rounding of z and raw in what they are multiplied with: exactly where x_hat is well determined."""
    t = times_of(prediction)
    level, (x, eps) = process.level(t), samples(len(t))
    z, raw = noising.diffuse(x, eps, level), perfect(prediction, x, eps, level)
    slack = condition(prediction, level, x) * (1 + np.abs(z))
    np.testing.assert_array_less(np.abs(predictions.to_x(prediction, raw, z, level, SIGMA_DATA) - x), 4e-15 * slack)
    np.testing.assert_allclose(predictions.raw_of(prediction, x, eps, level, SIGMA_DATA), raw, rtol=1e-13, atol=1e-15)
    x32, eps32, z32, raw32, level32 = on_device(x, eps, z, raw, level)
    found = jax.jit(lambda *a: predictions.to_x(prediction, *a, sigma_data=SIGMA_DATA))(raw32, z32, level32)
    assert found.dtype == jnp.float32
    np.testing.assert_array_less(np.abs(found - x), 2e-6 * slack)
    stays = jax.jit(lambda *a: predictions.raw_of(prediction, *a, sigma_data=SIGMA_DATA))(x32, eps32, level32)
    np.testing.assert_allclose(stays, raw, rtol=1e-5, atol=2e-6 * np.abs(raw).max())


@every_process
@pytest.mark.parametrize("prediction", ONE_OUTPUT)
def test_any_output_comes_back_from_its_x_hat(prediction: str, process: Process) -> None:
    """raw -> x_hat -> eps -> raw, for outputs that have nothing to do with z."""
    t = TIMES[2:-2]
    level, (raw, z) = process.level(t), samples(len(t), seed=1)
    x_hat = predictions.to_x(prediction, raw, z, level, SIGMA_DATA)
    eps = predictions.eps_from_x(z, x_hat, level)
    again = predictions.raw_of(prediction, x_hat, eps, level, SIGMA_DATA)
    inverse = 1 / np.abs(predictions.heads(prediction, level, SIGMA_DATA)[0].p).reshape(-1, 1, 1)
    assert (np.abs(again - raw) < 1e-13 * (1 + inverse) * (1 + np.abs(x_hat)) * (1 + 1 / level.expand(z).sigma)).all()


@every_process
def test_times_come_back_from_levels(process: Process) -> None:
    np.testing.assert_allclose(process.time(process.level(TIMES[1:])), TIMES[1:], rtol=1e-12, atol=1e-14)
    inside = jnp.asarray(TIMES[1:-2], jnp.float32)
    np.testing.assert_allclose(jax.jit(lambda t: process.time(process.level(t)))(inside), inside, rtol=1e-5, atol=1e-6)
    back = process.level(process.time(process.level(TIMES[1:])))
    np.testing.assert_allclose(np.stack(back), np.stack(process.level(TIMES[1:])), rtol=1e-9, atol=1e-14)


class Recorded:
    """A student that returns a given output."""

    sigma_data = SIGMA_DATA

    def __init__(self, prediction: str, output: Any) -> None:
        self.prediction, self.output = prediction, output

    def raw(self, z: Any, level: Level, cond: Any = None) -> Any:
        """The output."""
        return self.output


def losses(prediction: str, raw: Any, level: Level, x: Any, eps: Any) -> dict[str, Any]:
    """The loss of an output with every weighting, summed over a sample."""
    student: Any = Recorded(prediction, raw)
    z = noising.diffuse(x, eps, level)
    return {name: loss.losses(student, z, level, x, eps, weight=name, reduction="sum") for name in weighting.WEIGHTINGS}


def outputs(prediction: str, process: Process, t: np.ndarray) -> tuple[Any, ...]:
    """(level, x, eps, a perfect output, what a wrong one is off by)."""
    level, (x, eps) = process.level(t), samples(len(t))
    exact = predictions.raw_of(prediction, x, eps, level, SIGMA_DATA)
    size = 0.1 * np.abs(exact).max(axis=(1, 2), keepdims=True)
    return level, x, eps, exact, size * samples(len(t), seed=2)[0].repeat(exact.shape[-1] // 2, axis=-1)


@every_process
@every_prediction
def test_the_loss_is_zero_for_the_perfect_network_alone(prediction: str, process: Process) -> None:
    """Zero and finite at both ends too, and elsewhere the weighted squared error of x_hat."""
    level, x, eps, exact, off = outputs(prediction, process, times_of(prediction))
    of = partial(losses, prediction)
    for tolerance, found in (
        (1e-20, [of(raw, level, x, eps) for raw in (exact, exact + off)]),
        (1e-8, [jax.jit(of)(*on_device(raw, level, x, eps)) for raw in (exact, exact + off)]),
    ):
        for name in weighting.WEIGHTINGS:
            zero, other = (np.asarray(values[name]) for values in found)
            assert np.isfinite(zero).all() and np.isfinite(other).all(), name
            assert (zero <= tolerance * other).all() and (other[1:-1] > 0).all(), name
    inside = slice(2, -2)
    z, here = noising.diffuse(x, eps, level)[inside], level.at(inside)
    error = predictions.to_x(prediction, (exact + off)[inside], z, here, SIGMA_DATA) - x[inside]
    for name, found in of(exact + off, level, x, eps).items():
        expected = weighting.of(name, here, SIGMA_DATA) * (error**2).sum(axis=(1, 2))
        np.testing.assert_allclose(found[inside], expected, rtol=1e-9, err_msg=name)


@every_process
@pytest.mark.parametrize("prediction", ONE_HEAD)
def test_the_gradient_has_the_weightings_factor(prediction: str, process: Process) -> None:
    """d loss / d raw = 2·weighting·p²·(raw - raw_true), p by which a change of raw changes x_hat."""
    level, x, eps, exact, off = outputs(prediction, process, TIMES[2:-2])
    raw, z = exact + off, noising.diffuse(x, eps, level)
    slope = predictions.to_x(prediction, raw + 1, z, level, SIGMA_DATA)
    slope = (slope - predictions.to_x(prediction, raw, z, level, SIGMA_DATA))[:, :1, :1]
    off = off * (np.arange(raw.shape[-1]) < 2)  # a variance that is dropped has no gradient

    def total(raw: Any, *given: Any) -> Any:
        return {name: values.sum() for name, values in losses(prediction, raw, *given).items()}

    gradients = jax.jit(jax.jacrev(total))(*on_device(raw, level, x, eps))
    for name, gradient in gradients.items():
        expected = 2 * weighting.of(name, level, SIGMA_DATA).reshape(-1, 1, 1) * slope**2 * off
        size = np.abs(expected).max(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(gradient / size, expected / size, rtol=0, atol=1e-3, err_msg=name)


@every_process
def test_two_heads_are_reconciled(process: Process) -> None:
    """x_hat is the mean of both heads' estimates with weights sigma² : alpha²; the x head alone can be asked for."""
    level, (x, eps) = process.level(TIMES), samples(len(TIMES))
    z, (off_x, off_eps) = noising.diffuse(x, eps, level), samples(len(TIMES), seed=4)
    alpha, sigma = level.expand(x)
    whole = alpha**2 + sigma**2
    raw = np.concatenate([x + off_x, eps + off_eps], axis=-1)
    found = predictions.to_x("both", raw, z, level)
    expected = x + (sigma**2 * off_x - alpha * sigma * off_eps) / whole
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-12)
    np.testing.assert_allclose(predictions.x_head("both", raw, z, level), x + off_x, rtol=0, atol=1e-12)
    error = predictions.x_error("both", raw, x, eps, level)
    np.testing.assert_allclose(error, expected - x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("prediction", ONE_HEAD)
def test_the_x_head_of_one_head_is_x_hat(prediction: str) -> None:
    """Also for data of another standard deviation than the default."""
    level, (raw, z) = Cosine().level(TIMES[2:-2]), samples(len(TIMES) - 4, seed=5)
    raw = raw.repeat(PREDICTIONS[prediction].outputs, axis=-1)
    arguments = prediction, raw, z, level, SIGMA_DATA
    np.testing.assert_array_equal(predictions.x_head(*arguments), predictions.to_x(*arguments))


@every_process
def test_a_new_prediction_is_one_line(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PREDICTIONS, "difference", predictions.Prediction(lambda level, sigma_data: (2.0, -1.0)))
    level, (x, eps) = process.level(TIMES), samples(len(TIMES))
    found = predictions.to_x("difference", 2 * x - eps, noising.diffuse(x, eps, level), level)
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-13)
