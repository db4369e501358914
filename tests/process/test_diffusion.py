"""The diffusion process against closed forms: processes, grids, parameterisations, posterior, weightings."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from decimal import Decimal, localcontext
from itertools import pairwise
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from places import GOLDEN

from diffusion_distill.base.errors import choose
from diffusion_distill.denoisers.model import Model
from diffusion_distill.process import edm_grids, grids, likelihood, noising, predictions, weighting
from diffusion_distill.process.levels import Level, from_logsnr
from diffusion_distill.process.processes import (
    PROCESSES,
    VE,
    Cosine,
    DiscreteBetas,
    IDDPMCosine,
    LinearBeta,
    LinearBetaDiscrete,
    Process,
    RectifiedFlow,
)
from diffusion_distill.process.time_input import LOGSNR_INPUTS, TIME_INPUTS, FlowInput, LogsnrInput, TimeOfProcess
from diffusion_distill.process.training_levels import NOISE_LEVELS
from diffusion_distill.process.vp_discrete import LinearAlphaDiscrete

pytestmark = pytest.mark.fast

COSINES = [Cosine(), Cosine(-10, 15), Cosine(-4.5, 9.25)]
BETAS = [LinearBeta(), LinearBeta(0.5, 30.0, 1e-3), LinearBetaDiscrete(), LinearBetaDiscrete(50, 2e-3, 0.1, 12.0)]
IDDPM = [IDDPMCosine(), IDDPMCosine(0.02, 1e-3, 0.99)]
LATENT = ("scaled_linear", 1000, 8.5e-4, 0.012)
NAMED = [
    DiscreteBetas("cosine", 4000, logsnr_min=-10.2),
    *(DiscreteBetas(*LATENT, zero_snr=zero_snr) for zero_snr in (False, True)),
]
LINEAR_ALPHAS = [LinearAlphaDiscrete(), LinearAlphaDiscrete(50, 2e-3, 0.1, 12.0)]
#: Their time 0 is zero noise.
TO_ZERO = [LinearBeta(t_min=0.0), LinearBetaDiscrete(logsnr_max=math.inf), VE(1.0)]
LEVELS = from_logsnr(np.array([-18.0, -6.0, -1.0, 0.0, 0.7, 5.0, 19.0]))


def images(seed: int, channels: int = 2, count: int = len(LEVELS.alpha)) -> np.ndarray:
    """Float64 noise [count, 3, 3, channels]."""
    return np.random.default_rng(seed).standard_normal((count, 3, 3, channels))


X, EPS = images(1), images(2)
Z = noising.diffuse(X, EPS, LEVELS)


# --- processes


@pytest.mark.parametrize("process", COSINES, ids=str)
def test_cosine_is_its_closed_form(process: Cosine) -> None:
    t = np.linspace(0, 1, 101)
    level = process.level(t)
    b = math.atan(math.exp(-process.logsnr_max / 2))
    a = math.atan(math.exp(-process.logsnr_min / 2)) - b
    chex.assert_trees_all_close(level.logsnr, -2 * np.log(np.tan(a * t + b)), rtol=0, atol=1e-9)
    chex.assert_trees_all_close(level.logsnr[[0, -1]], np.array([process.logsnr_max, process.logsnr_min]), rtol=1e-12)
    chex.assert_trees_all_close(level.angle, a * t + b, rtol=1e-12)


def decay(process: LinearBeta | LinearBetaDiscrete) -> Callable[[Decimal], Decimal]:
    """-log alpha at a time, in as many digits as the context has."""
    if isinstance(process, LinearBeta):
        low, high, cut = map(Decimal, (process.beta_min, process.beta_max, process.t_min))

        def integral(t: Decimal) -> Decimal:
            tau = cut + (1 - cut) * t
            return low * tau / 2 + (high - low) * tau**2 / 4

        return integral
    betas = map(Decimal, np.linspace(process.beta_start, process.beta_end, process.steps).tolist())
    assert process.logsnr_max is not None
    knots = [(1 + (-Decimal(process.logsnr_max)).exp()).ln() / 2]
    product = Decimal(1)
    for beta in betas:
        product *= 1 - beta
        knots.append(-product.ln() / 2)

    def interpolated(t: Decimal) -> Decimal:
        k = min(int(t * process.steps), process.steps - 1)
        return knots[k] + (t * process.steps - k) * (knots[k + 1] - knots[k])

    return interpolated


@pytest.mark.parametrize("process", [*BETAS, *TO_ZERO[:2]], ids=str)
def test_linear_betas_to_all_digits(process: LinearBeta | LinearBetaDiscrete) -> None:
    """Levels of coarse and fine grids."""
    with localcontext(prec=40):
        exact = decay(process)
        for steps in (1, 32, 1000, 8192, 10**6):
            t = np.unique(np.linspace(1, steps, 17).astype(int))
            for i in {*t.tolist(), *(t // 2).tolist(), 0}:
                alpha = (-exact(Decimal(i) / steps)).exp()
                exactly = Level(alpha, (1 - alpha**2).sqrt())
                found = process.level(np.float64(i) / steps)
                for name in ("alpha", "sigma"):
                    true = float(getattr(exactly, name))
                    assert float(getattr(found, name)) == pytest.approx(true, rel=1e-14, abs=0), (i, steps, name)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the optional sibling folder ../shared/golden")
def test_linear_betas_are_those_of_published_programs() -> None:
    """DDPM's products and DPM-Solver's continuous-time view of them, below whose first knot it extrapolates."""
    discrete = LinearBetaDiscrete(logsnr_max=math.inf)
    by_name: dict[str, LinearBeta | LinearBetaDiscrete] = {"linear": LinearBeta(t_min=0.0), "discrete": discrete}
    with np.load(GOLDEN / "ddpm" / "schedules.npz") as ddpm, np.load(GOLDEN / "solvers" / "schedules.npz") as solvers:
        product = np.concatenate([[1.0], ddpm["linear1000/alphas_cumprod"]])
        chex.assert_trees_all_close(grids.make_grid(discrete, 1000).alpha[::-1] ** 2, product, rtol=1e-12)
        keys = ("t", "log_alpha_f64", "sigma_f64", "lambda_f64")
        recorded: list[tuple[Any, list[np.ndarray]]] = [(discrete, [ddpm[f"linear1000/cont_{key}"] for key in keys])]
        for name, process in by_name.items():
            recorded.append((process, [solvers[f"{name}/{key.removesuffix('_f64')}"] for key in keys]))
            times = process.time(from_logsnr(2 * solvers[f"{name}/lam_probe"]))
            chex.assert_trees_all_close(times, solvers[f"{name}/inverse_lambda"], rtol=1e-10)
    for process, (t, *expected) in recorded:
        inside = t >= (1e-3 if process is discrete else 0)
        level = process.level(t[inside])
        for found, values in zip((np.log(level.alpha), level.sigma, level.logsnr / 2), expected, strict=True):
            chex.assert_trees_all_close(found, values[inside], rtol=1e-10)


def test_time_zero_of_linear_betas() -> None:
    assert LinearBetaDiscrete().level(np.float64(0)).logsnr == pytest.approx(20, rel=1e-12)
    assert LinearBetaDiscrete(steps=1).level(np.float64(1)).alpha ** 2 == pytest.approx(1 - 1e-4, rel=1e-14)
    for t_min in (1e-5, 1e-3):
        uncut = LinearBeta(t_min=0.0).level(np.float64(t_min))
        chex.assert_trees_all_close(LinearBeta(t_min=t_min).level(np.float64(0)), uncut, rtol=1e-14)
    for process in TO_ZERO:
        assert process.level(np.float64(0)) == (1, 0)


@pytest.mark.parametrize("process", [*COSINES, *BETAS, *IDDPM, *LINEAR_ALPHAS], ids=str)
def test_levels_of_vp_schedules_lose_signal_with_time(process: Process) -> None:
    t = np.linspace(0, 1, 101)
    level = process.level(t)
    chex.assert_trees_all_close(level.alpha**2 + level.sigma**2, 1, rtol=1e-14)
    chex.assert_trees_all_close(process.time(level), t, rtol=0, atol=1e-14)
    chex.assert_trees_all_close(jax.jit(process.time)(Level(*map(jnp.float32, level))), t, rtol=0, atol=3e-7)
    assert level.sigma[0] > 0 and (np.diff(level.logsnr) < 0).all()


@pytest.mark.parametrize("process", [*COSINES, *BETAS, *NAMED[1:2], *IDDPM], ids=str)
def test_float32_levels_are_accurate_at_both_ends(process: Process) -> None:
    near = np.logspace(-7, -1, 200)
    t = np.unique(np.float32(np.concatenate([[0.0], near, np.linspace(0.1, 0.9, 100), 1 - near, [1.0]])))
    exact, level = process.level(t.astype(np.float64)), jax.jit(process.level)(jnp.asarray(t))
    chex.assert_type([level.alpha, level.sigma], jnp.float32)
    chex.assert_trees_all_close(level.logsnr, exact.logsnr, rtol=0, atol=2e-6 * np.maximum(1, abs(exact.logsnr)).max())
    # exp turns the rounding of log alpha into a relative error of alpha
    from_log = 0.0 if isinstance(process, Cosine) else 1.5e-7 * float(-np.log(exact.alpha[-1]))
    chex.assert_trees_all_close(level.alpha, exact.alpha, rtol=5e-7 + from_log)
    chex.assert_trees_all_close(level.sigma, exact.sigma, rtol=5e-7)


@pytest.mark.parametrize("process", [COSINES[1], *BETAS, *NAMED, *TO_ZERO, *IDDPM], ids=str)
def test_schedules_can_be_written_down(process: Process, tiny_model: Model) -> None:
    model = dataclasses.replace(tiny_model, process=process)
    again = Model.from_dict(json.loads(json.dumps(model.to_dict())))
    assert again == model and hash(again.process) == hash(process)
    assert type(process) in PROCESSES.values()


@pytest.mark.parametrize("process", [Cosine(-9, 9), *BETAS, *TO_ZERO, *NAMED[:1], *IDDPM, *LINEAR_ALPHAS], ids=str)
def test_ddim_goes_to_the_exact_flow(process: Process, gaussian: toys.Gaussian) -> None:
    """Ten times the steps, a tenth of the error; the last step goes from a little noise to where time 0 is."""
    z = np.random.default_rng(0).standard_normal((1, 2, 2, 1))
    errors = []
    for steps in (200, 2000):
        grid = grids.check(grids.make_grid(process, steps))
        levels = [Level(*(np.full(1, a) for a in grid.at(k))) for k in range(steps + 1)]
        end = z
        for t, s in pairwise(levels):
            end = noising.ddim_step(end, gaussian.raw(None, end, t, None, None), t, s)
        errors.append(np.abs(end - gaussian.flow(z, levels[0], levels[-1])).max())
    assert errors[1] < 2e-3
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.35)


@pytest.mark.parametrize("process", IDDPM, ids=str)
def test_iddpms_cosine_is_its_formula(process: IDDPMCosine) -> None:
    """abar = f(tau)/f(0), f = cos²((pi/2)·(tau + s)/(1 + s)): arXiv:2102.09672 Eq. 17."""
    t = np.concatenate([[0.0], np.logspace(-6, -2, 30), np.linspace(0.02, 1, 50)])
    tau = process.t_min + (process.t_max - process.t_min) * t
    angle, first = ((x + process.s) / (1 + process.s) * math.pi / 2 for x in (tau, 0.0))
    level = process.level(t)
    chex.assert_trees_all_close(level.alpha**2, np.cos(angle) ** 2 / math.cos(first) ** 2, rtol=1e-12)
    # cos²(b) - cos²(a) = sin(a - b)·sin(a + b) does not cancel
    noise = np.sin(angle - first) * np.sin(angle + first) / math.cos(first) ** 2
    chex.assert_trees_all_close(level.sigma**2, noise, rtol=2e-8)
    inside = process.time(Level(np.cos(angle) / math.cos(first), np.sqrt(noise)))
    chex.assert_trees_all_close(inside, t, rtol=0, atol=1e-11)


def test_published_ends_of_iddpms_cosine() -> None:
    """f(0) = 1 and f(1) = 0 of the paper; its betas are cut at 0.999, so of 1000 steps the last ends at f = 2e-9."""
    whole = IDDPMCosine(t_min=0.0, t_max=1.0)
    assert whole.level(np.float64(0)) == (1, 0)
    assert whole.level(np.float64(1)).alpha < 1e-15
    abar = whole.level(np.arange(1001) / 1000).alpha ** 2
    betas = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    assert betas[0] == pytest.approx(4.13e-5, rel=1e-2) and (np.diff(betas) >= 0).all() and (betas == 0.999).sum() == 1


@pytest.mark.parametrize("process", [*LINEAR_ALPHAS, LinearAlphaDiscrete(logsnr_max=math.inf)], ids=str)
def test_linear_alphas_meet_linear_betas_at_the_knots(process: LinearAlphaDiscrete) -> None:
    same = LinearBetaDiscrete(process.steps, process.beta_start, process.beta_end, process.logsnr_max)
    knots = process.knots
    chex.assert_trees_all_equal(knots, np.arange(process.steps + 1) / process.steps)
    chex.assert_trees_all_equal(same.knots, knots)
    for found, expected in zip(process.level(knots), same.level(knots), strict=True):
        chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)  # sigma² has the digits of 1
    for part in (0.25, 0.5, 0.9):
        between = process.level(knots[:-1] + part * np.diff(knots)).alpha ** 2
        abar = process.level(knots).alpha ** 2
        chex.assert_trees_all_close(between, (1 - part) * abar[:-1] + part * abar[1:], rtol=1e-13)
        logs = np.log(same.level(knots[:-1] + part * np.diff(knots)).alpha)
        ends = np.log(same.level(knots).alpha)
        chex.assert_trees_all_close(logs, (1 - part) * ends[:-1] + part * ends[1:], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize(
    "process", [*BETAS[:2], *TO_ZERO[:1], edm_grids.fitted_beta(0.002, 80.0), *LINEAR_ALPHAS], ids=str
)
def test_rates_are_derivatives_of_the_decay(process: Any) -> None:
    middles = (np.arange(50) + 0.5) / 50 + (0.2 / 1000 if process in LINEAR_ALPHAS[:1] else 0)  # between knots
    decay, h = lambda t: -np.log(process.level(t).alpha), 1e-5
    chex.assert_trees_all_close(process.rate(middles), (decay(middles + h) - decay(middles - h)) / (2 * h), rtol=1e-6)
    if process in LINEAR_ALPHAS:
        knots = process.knots[:-1]
        chex.assert_trees_all_close(process.rate(knots), (decay(knots + h) - decay(knots)) / h, rtol=1e-2)
        earlier = (decay(knots[1:6]) - decay(knots[1:6] - h)) / h
        assert (np.abs(process.rate(knots[1:6]) / earlier - 1) > 0.05).all(), "of later times, not of earlier ones"


def test_variance_exploding_keeps_the_sample() -> None:
    t = np.array([1.0, 0.25, 0.0])
    level = VE(20.0).level(t)
    chex.assert_trees_all_equal(level, Level(np.ones(3), 20 * t))
    chex.assert_trees_all_equal(VE(20.0).time(level), t)


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.15, 3.0])
def test_rectified_flow_is_a_straight_line_with_shifted_times(shift: float) -> None:
    """t' = shift·t / (1 + (shift - 1)·t) of Stable Diffusion 3; sigma/alpha is `shift` times that without a shift."""
    t = np.linspace(0, 1, 101)
    process, shifted = RectifiedFlow(shift), shift * t / (1 + (shift - 1) * t)
    level = process.level(t)
    chex.assert_trees_all_close(level, Level(1 - shifted, shifted), rtol=0, atol=1e-15)
    assert (level.alpha[0], level.sigma[0]) == (1, 0) and (level.alpha[-1], level.sigma[-1]) == (0, 1)
    chex.assert_trees_all_close(process.time(level), t, rtol=0, atol=1e-15)
    inside = level.at(slice(1, -1))
    chex.assert_trees_all_close(inside.sigma / inside.alpha, shift * (t / (1 - np.minimum(t, 0.995)))[1:-1], rtol=1e-12)


def test_levels_from_logsnr() -> None:
    logsnr = np.array([-60.0, -20.0, -1.0, 0.0, 3.0, 20.0, 60.0])
    level = from_logsnr(logsnr)
    chex.assert_trees_all_close(level.alpha, 1 / np.sqrt(1 + np.exp(-logsnr)), rtol=1e-14)
    chex.assert_trees_all_close(level.sigma, 1 / np.sqrt(1 + np.exp(logsnr)), rtol=1e-14)
    chex.assert_trees_all_close(level.logsnr, logsnr, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(level.snr, np.exp(logsnr), rtol=1e-12)
    single = from_logsnr(jnp.asarray(logsnr, jnp.float32))
    chex.assert_trees_all_close(single.sigma, level.sigma, rtol=3e-6)  # exp(-30) amplifies the rounding of its argument
    clean = Level(np.float64(1), np.float64(0))
    assert clean.snr == clean.logsnr == np.inf and clean.angle == 0


# --- grids


@pytest.mark.parametrize("k", [2, 3, 5, 7, 12, 16, 31, 1024])
@pytest.mark.parametrize("steps", [1, 3, 4, 10, 49, 128])
def test_grids_nest_bit_for_bit(k: int, steps: int) -> None:
    for process in (Cosine(), LinearBeta(), LinearBetaDiscrete(), RectifiedFlow(3.0)):
        coarse, fine = (grids.make_grid(process, n) for n in (steps, k * steps))
        chex.assert_shape(coarse.alpha, (steps + 1,))
        for some, all_ in zip(coarse, fine, strict=True):
            chex.assert_trees_all_equal(all_[::k], some)


def test_a_grid_runs_from_noise_to_clean() -> None:
    grid = grids.make_grid(Cosine(), 8)
    chex.assert_trees_all_close(grid.logsnr[[0, -1]], np.array([-20, 20]), rtol=1e-12)
    assert (np.diff(grid.logsnr) > 0).all()
    clean = grids.clean_end(grid)
    assert (clean.alpha[-1], clean.sigma[-1]) == (1.0, 0.0)
    chex.assert_trees_all_equal(clean.at(slice(None, -1)).sigma, grid.sigma[:-1])
    assert grid.sigma[-1] > 0, "clean_end must copy"
    grids.check(clean)


# --- what remains of predictions beside tests/process/test_one_formula.py


@pytest.mark.parametrize("prediction", ["eps", "v", "velocity"])
def test_x_error_does_not_cancel_near_zero_noise(prediction: str) -> None:
    level = Cosine().level(np.array([0.0, 1e-4, 1e-3]))
    x, eps = images(1, count=3), images(2, count=3)
    raw = predictions.raw_of(prediction, x, eps, level) + 0.01 * images(6, count=3)
    raw, x, eps = (a.astype(np.float32) for a in (raw, x, eps))
    exact = predictions.x_error(prediction, raw.astype(np.float64), x.astype(np.float64), eps.astype(np.float64), level)
    level32 = Level(level.alpha.astype(np.float32), level.sigma.astype(np.float32))
    careful = predictions.x_error(prediction, raw, x, eps, level32)
    naive = predictions.to_x(prediction, raw, noising.diffuse(x, eps, level32), level32) - x

    def error(found: np.ndarray) -> float:
        return float(np.max(np.linalg.norm(found - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))))

    chex.assert_type(careful, np.float32)
    assert error(careful) < 3e-5 < 3e-2 < error(naive)


# --- preconditioning


def test_time_inputs() -> None:
    t = np.linspace(0, 1, 11)
    level = Cosine().level(t)
    expected = {
        "inv_cos": np.arctan(np.exp(-level.logsnr / 2)) / (np.pi / 2),
        "sigmoid": 1 / (1 + np.exp(-level.logsnr)),
        "linear": (level.logsnr + 10) / 20,
    }
    assert set(expected) == set(LOGSNR_INPUTS)
    for kind, value in expected.items():
        chex.assert_trees_all_close(LogsnrInput(kind).fraction(level), value, rtol=1e-9, atol=1e-12)
        chex.assert_trees_all_close(LogsnrInput(kind).time(level, Cosine()), 1000 * value, rtol=1e-9, atol=1e-9)
    chex.assert_trees_all_close(LogsnrInput().fraction(level), t, rtol=1e-7, atol=6e-5)
    far = from_logsnr(np.array([-50.0, -20.0, 20.0, 50.0]))
    noisy, _, _, clean = LogsnrInput().fraction(far)
    chex.assert_trees_all_close(LogsnrInput().fraction(far), np.array([noisy, noisy, clean, clean]), rtol=1e-14)
    assert 0 < clean < 1e-4 and noisy == pytest.approx(1 - clean)


def test_time_inputs_of_times() -> None:
    """DDPM's networks are told the index of a beta, rectified flows how far on the line the sample is."""
    ddpm = LinearBetaDiscrete()
    index = np.array([0, 1, 499, 999])
    chex.assert_trees_all_close(TimeOfProcess(1000, -1).time(ddpm.level((index + 1) / 1000), ddpm), index, atol=1e-9)
    for process, t in ((RectifiedFlow(), 0.3), (RectifiedFlow(3.0), 0.9 / 1.6)):
        at = process.level(np.array([0.3, 1.0]))
        chex.assert_trees_all_close(FlowInput().time(at, process), np.array([1000 * t, 1000]), rtol=1e-12)
        chex.assert_trees_all_close(TimeOfProcess(1.0).time(at, process), np.array([0.3, 1.0]), rtol=1e-12)


@pytest.mark.parametrize("kind", TIME_INPUTS.values())
def test_time_inputs_are_finite_at_pure_noise(kind: Any) -> None:
    wide = RectifiedFlow().level(np.array([1.0, 0.5]))
    for level in (wide, Level(*map(jnp.float32, wide))):
        told = kind().time(level, RectifiedFlow())
        assert np.isfinite(told).all() or isinstance(kind(), LogsnrInput)
        scale = kind().scale(level)
        assert scale is None or np.isfinite(scale).all()


def test_logit_normal_levels() -> None:
    """Half of the times are below a half, and the logit of a share Phi(s) is below s."""
    u = np.array([0.5, 0.15865525393145707, 0.9772498680518208])
    level = NOISE_LEVELS["logit_normal"](RectifiedFlow(), jnp.asarray(u, jnp.float32))
    expected = 1 / (1 + np.exp(-np.array([0.0, -1.0, 2.0])))
    chex.assert_trees_all_close(level.sigma, np.float32(expected), rtol=1e-5)
    ends = NOISE_LEVELS["logit_normal"](RectifiedFlow(), jnp.array([0.0, 1 - 2**-24]))
    assert np.isfinite(np.stack(ends)).all()


# --- the forward process and its posterior


def test_the_deterministic_step() -> None:
    t, s = LEVELS.at(slice(None, -1)), LEVELS.at(slice(1, None))
    x, eps = X[:-1], EPS[:-1]
    moved = noising.ddim_step(noising.diffuse(x, eps, t), x, t, s)
    chex.assert_trees_all_close(moved, noising.diffuse(x, eps, s), rtol=1e-7, atol=1e-11)
    clean = Level(np.ones(len(x)), np.zeros(len(x)))
    chex.assert_trees_all_equal(noising.ddim_step(Z[:-1], x, t, clean), x)


def test_the_marginal() -> None:
    marginal = noising.marginal(X, LEVELS)
    chex.assert_trees_all_equal(marginal.mean, LEVELS.expand(X).alpha * X)
    chex.assert_trees_all_close(marginal.std, LEVELS.expand(X).sigma, rtol=1e-12)
    chex.assert_trees_all_close(marginal.var, LEVELS.expand(X).sigma ** 2, rtol=1e-12)


PAIRS = [(1.0, 0.9), (0.7, 0.2), (0.51, 0.5), (0.1, 0.0)]


def conditioned(t: Level, s: Level, x_var: float = 0.0) -> tuple[float, float, float]:
    """z_s given z_t and x ~ N(x, x_var), by brute force: (factor of z_t, factor of x, variance).

    z_t = ratio·z_s + noise for the x that is true; (z_s, z_t) are jointly Gaussian around alpha·x, and the
    uncertainty of x is carried through the conditional mean.
    """
    ratio = t.alpha / s.alpha
    joint = np.array([[s.sigma**2, ratio * s.sigma**2], [ratio * s.sigma**2, t.sigma**2]])
    gain = joint[0, 1] / joint[1, 1]
    from_x = s.alpha - gain * t.alpha
    return gain, from_x, joint[0, 0] - gain * joint[0, 1] + from_x**2 * x_var


@pytest.mark.parametrize("times", PAIRS)
def test_the_posterior_is_gaussian_conditioning(times: tuple[float, float]) -> None:
    t, s = (Cosine(-8, 8).level(np.float64(time)) for time in times)
    gain, from_x, variance = conditioned(t, s)
    found = noising.posterior(Z, X, t, s)
    chex.assert_trees_all_close(found.mean, gain * Z + from_x * X, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(found.var, variance, rtol=1e-9)
    large = noising.posterior(Z, X, t, s, gamma=1.0)
    half = noising.posterior(Z, X, t, s, gamma=0.5)
    chex.assert_trees_all_equal(large.mean, found.mean)
    chex.assert_trees_all_close(large.var, variance * t.sigma**2 / s.sigma**2, rtol=1e-9)
    chex.assert_trees_all_close(half.logvar, (large.logvar + found.logvar) / 2, rtol=1e-12)
    # 'large' is the variance of z_t given z_s
    chex.assert_trees_all_close(large.var, t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2, rtol=1e-9)
    uncertain = noising.posterior(Z, X, t, s, x_logvar=np.log(0.3))
    chex.assert_trees_all_close(uncertain.var, conditioned(t, s, x_var=0.3)[2], rtol=1e-9)


# --- likelihood


def test_kl_of_gaussians() -> None:
    rng = np.random.default_rng(0)
    p, q = (noising.Gaussian(rng.normal(size=6), rng.normal(size=6)) for _ in range(2))
    grid = np.linspace(-25, 25, 100_001)[:, None]

    def log_density(g: noising.Gaussian) -> np.ndarray:
        return -0.5 * ((grid - g.mean) ** 2 / g.var + g.logvar + math.log(2 * math.pi))

    integral = np.trapezoid(np.exp(log_density(p)) * (log_density(p) - log_density(q)), grid, axis=0)
    chex.assert_trees_all_close(likelihood.gaussian_kl(p, q), integral, rtol=1e-6)
    chex.assert_trees_all_equal(likelihood.gaussian_kl(p, p), 0)
    assert (np.asarray(likelihood.gaussian_kl(p, q)) > 0).all()


def test_the_bound_in_bits() -> None:
    t, s = (Cosine(-8, 8).level(np.full(len(X), time)) for time in (0.7, 0.4))
    z = noising.diffuse(X, EPS, t)
    chex.assert_trees_all_equal(likelihood.posterior_kl_bits(z, X, X, t, s, gamma=0.0), 0)
    x_hat = X + images(7)
    _, from_x, variance = conditioned(t.at(0), s.at(0))
    expected = from_x**2 * np.mean((x_hat - X) ** 2, axis=(1, 2, 3)) / (2 * variance * math.log(2))
    chex.assert_trees_all_close(likelihood.posterior_kl_bits(z, X, x_hat, t, s, gamma=0.0), expected, rtol=1e-9)
    bits = likelihood.posterior_kl_bits(z, X, x_hat, t, s)
    chex.assert_shape(bits, (len(X),))
    assert (bits > 0).all()


def bin_probability(x: Any, mean: Any, scale: Any) -> np.ndarray:
    """P(x | mean, scale), as a difference of the upper tails that erfc keeps all digits of; float64."""
    tail = np.vectorize(lambda distance: math.erfc(distance / math.sqrt(2)) / 2)
    off, half = np.abs(x - mean) / scale, 1 / 255 / scale
    opens = tail(np.where(x > 0, x - mean - 1 / 255, mean - x - 1 / 255) / scale)
    return np.where(np.isin(x, (-1, 1)), opens, tail(off - half) - tail(off + half))


def test_likelihood_of_8_bit_images() -> None:
    rng = np.random.default_rng(0)
    x = (rng.integers(0, 256, 4000) / 127.5 - 1).astype(np.float32)
    x[:200], x[200:400] = -1, 1
    mean, log_scale = (np.float32(rng.uniform(*of, len(x))) for of in ((-1.2, 1.2), (-6.0, 0.0)))
    wide_x, wide_mean, wide_log_scale = (a.astype(np.float64) for a in (x, mean, log_scale))
    exact = bin_probability(wide_x, wide_mean, np.exp(wide_log_scale))
    assert (exact > 1e-12).mean() > 0.3 and (exact < 1e-12).mean() > 0.1
    found = jax.jit(likelihood.discretized_gaussian_log_likelihood)(*map(jnp.asarray, (x, mean, log_scale)))
    chex.assert_trees_all_close(found, np.log(np.maximum(exact, 1e-12)), rtol=2e-5, atol=2e-5)
    # far in the tails too, where float32 has no probability left
    unbounded = likelihood.discretized_gaussian_log_likelihood(*map(jnp.asarray, (x, mean, log_scale)), least=0.0)
    tiny = (exact > 1e-300) & (exact < 1e-45)
    assert tiny.sum() > 50 and np.isfinite(unbounded).all()
    chex.assert_trees_all_close(unbounded[tiny], np.log(exact[tiny]), rtol=2e-5)


@pytest.mark.parametrize(("mean", "log_scale"), [(0.3, -2.0), (-0.9, 0.0), (1.5, -3.0), (0.2, -9.0)])
def test_probabilities_of_all_grey_levels_sum_to_one(mean: float, log_scale: float) -> None:
    x = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
    log_p = likelihood.discretized_gaussian_log_likelihood(x, jnp.float32(mean), jnp.float32(log_scale), least=0.0)
    assert float(jnp.exp(log_p).sum()) == pytest.approx(1, abs=2e-5)


# --- weightings


def test_weightings_are_errors_of_other_quantities() -> None:
    """The weighted error of x_hat is the plain error of what another network would have predicted."""
    level = LEVELS.at(slice(1, -1))
    x, eps, x_hat = X[1:-1], EPS[1:-1], (X + images(8))[1:-1]
    eps_hat = predictions.eps_from_x(Z[1:-1], x_hat, level)

    def squared(prediction: str) -> np.ndarray:
        found, true = (predictions.raw_of(prediction, *pair, level) for pair in ((x_hat, eps_hat), (x, eps)))
        return np.mean((found - true) ** 2, axis=(1, 2, 3))

    same = {"constant": "x", "snr": "eps", "snr_plus_one": "v", "edm": "edm", "velocity": "velocity"}
    errors = {name: squared(prediction) for name, prediction in same.items()}
    errors["snr_trunc"] = np.maximum(errors["constant"], errors["snr"])
    assert set(errors) == set(weighting.WEIGHTINGS)
    for name, expected in errors.items():
        weighted = weighting.of(name, level, predictions.SIGMA_DATA) * errors["constant"]
        chex.assert_trees_all_close(weighted, expected, rtol=1e-8, custom_message=name)


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("name", weighting.WEIGHTINGS)
def test_eps_networks_warn_of_truncated_snr_alone(prediction: str, name: str) -> None:
    if prediction in ("eps", "score", "scaled_score", "eps_var") and name == "snr_trunc":
        with pytest.warns(UserWarning, match=f"{name}.*diverges.*Use weighting 'snr'"):
            weighting.check(name, prediction)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weighting.check(name, prediction)


# --- bad input

SORTED = grids.make_grid(Cosine(), 4)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "an empty logsnr range": (lambda: Cosine(20, -20), r"logsnr_min must be below logsnr_max.*20"),
    "an infinite logsnr": (lambda: Cosine(-20, math.inf), r"must be finite.*inf"),
    "beta_min of 0": (lambda: LinearBeta(0.0), r"0 < beta_min <= beta_max.*beta_min=0\.0"),
    "falling betas": (lambda: LinearBeta(20.0, 0.1), r"beta_min <= beta_max.*beta_max=0\.1"),
    "a shift of 0": (lambda: RectifiedFlow(0.0), r"must be positive and finite, got 0\.0"),
    "an infinite shift": (lambda: RectifiedFlow(math.inf), r"must be positive and finite, got inf"),
    "no range of noise": (lambda: VE(0.001), r"0 < sigma_min < sigma_max.*sigma_max=0\.001"),
    "an infinite beta": (lambda: LinearBeta(0.1, math.inf), r"both finite.*inf"),
    "a beta that is no number": (lambda: LinearBeta(math.nan), r"both finite.*nan"),
    "a cut at 1": (lambda: LinearBeta(t_min=1.0), r"t_min must be in \[0, 1\).*t_min=1\.0"),
    "a negative cut": (lambda: LinearBeta(t_min=-1e-3), r"t_min must be in \[0, 1\).*-0\.001"),
    "no betas": (lambda: LinearBetaDiscrete(0), r"number of betas must be .*at least 1, got 0"),
    "a discrete beta of 1": (lambda: LinearBetaDiscrete(beta_end=1.0), r"beta_end < 1, got .*beta_end=1\.0"),
    "falling discrete betas": (lambda: LinearBetaDiscrete(10, 0.1, 0.01), r"beta_start <= beta_end.*beta_end=0\.01"),
    "more noise at time 0": (lambda: LinearBetaDiscrete(logsnr_max=9.0), r"above the logsnr 9\.21.*logsnr_max=9\.0"),
    "no number at time 0": (lambda: LinearBetaDiscrete(logsnr_max=math.nan), r"above the logsnr.*nan"),
    "no time between t_min and t_max": (lambda: IDDPMCosine(t_min=0.5, t_max=0.5), r"t_min < t_max <= 1.*t_min=0\.5"),
    "a cosine beyond 1": (lambda: IDDPMCosine(t_max=1.1), r"t_max <= 1 and s >= 0, got .*t_max=1\.1"),
    "a negative t_min": (lambda: IDDPMCosine(t_min=-0.1), r"0 <= t_min.*t_min=-0\.1"),
    "a negative offset": (lambda: IDDPMCosine(s=-0.008), r"s >= 0, got .*s=-0\.008"),
    "linear alphas of falling betas": (lambda: LinearAlphaDiscrete(10, 0.1, 0.01), r"beta_start <= beta_end.*0\.01"),
    "zero steps": (lambda: grids.make_grid(Cosine(), 0), r"at least 1, got 0"),
    "negative steps": (lambda: grids.make_grid(Cosine(), -4), r"at least 1, got -4"),
    "half a step": (lambda: grids.make_grid(Cosine(), 2.5), r"whole number.*got 2\.5"),  # type: ignore[arg-type]
    "steps that are a bool": (lambda: grids.make_grid(Cosine(), True), r"whole number.*got True"),
    "a rising grid": (lambda: grids.check(SORTED.at(slice(None, None, -1))), r"decrease in noise.*rows 0 and 1.*Sort"),
    "a repeated level": (lambda: grids.check(SORTED.at(np.array([0, 1, 1, 2]))), r"rows 1 and 2.*drop repeated"),
    "a NaN level": (lambda: grids.check(Level(SORTED.alpha * np.nan, SORTED.sigma)), r"must be finite"),
    "a single level": (lambda: grids.check(SORTED.at(slice(0, 1))), r"at least 2 levels, got \(1,\)"),
    "two shapes": (lambda: grids.check(Level(SORTED.alpha, SORTED.sigma[1:])), r"got \(5,\), \(4,\)"),
    "an unknown time input": (lambda: LogsnrInput("inv_cosine"), r"'inv_cosine'.*Did you mean 'inv_cos'"),
    "an empty input range": (lambda: LogsnrInput("linear", 1.0, 1.0), r"must not be empty, got \[1.0, 1.0\]"),
    "an unknown prediction": (
        lambda: predictions.to_x("epsilon", X, Z, LEVELS), r"prediction 'epsilon'.*Known: both, consistency, edm"),
    "an unknown prediction's error": (
        lambda: predictions.x_error("noise", X, X, X, LEVELS), r"prediction 'noise'.*Known: both, consistency, edm"),
    "an unknown weighting": (lambda: weighting.check("snr_trunk", "x"), r"'snr_trunk'.*Did you mean 'snr_trunc'"),
    "a name that is no text": (lambda: choose("solver", 3, {"ddim": 1}), r"solver 3\. Known: ddim"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_told_what_it_is_and_what_is_allowed(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
