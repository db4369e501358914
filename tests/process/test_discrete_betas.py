"""Discrete betas by the name of their rule: closed forms, views between knots, times told, variances."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distill.process import noising, variances
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import DiscreteBetas, LinearBetaDiscrete
from diffusion_distill.process.time_input import TimeOfProcess
from diffusion_distill.process.vp_discrete import BETAS, LinearAlphaDiscrete

pytestmark = pytest.mark.fast

LOW, HIGH = 1e-3, 0.05
every_rule = pytest.mark.parametrize("kind", BETAS)
#: DPM-Solver's cut, lambda = -5.1.
CUT = -10.2


def test_betas_are_their_closed_forms() -> None:
    """Of 50: arithmetic and geometric sums, and what alpha² comes to."""
    k, n = np.arange(50), 50
    found = {kind: DiscreteBetas(kind, n, LOW, HIGH, logsnr_max=math.inf) for kind in BETAS}
    alpha2 = {kind: process.level(process.knots).alpha ** 2 for kind, process in found.items()}
    roots = math.sqrt(LOW) + k * (math.sqrt(HIGH) - math.sqrt(LOW)) / 49
    expected = {
        "linear": LOW + k * (HIGH - LOW) / 49,
        "scaled_linear": roots**2,
        "quad": roots**2,
        "sigmoid": (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * np.tanh(-3 + 6 * k / 49),
    }
    for kind, betas in expected.items():
        chex.assert_trees_all_close(found[kind].betas, betas, rtol=1e-12)
    chex.assert_trees_all_close(alpha2["const"], (1 - HIGH) ** np.arange(51), rtol=1e-12)
    chex.assert_trees_all_close(alpha2["jsd"], 1 - np.arange(51) / n, rtol=0, atol=1e-14)
    angle = (np.arange(50) / n + 0.008) / 1.008 * math.pi / 2  # the last beta is cut at 0.999
    chex.assert_trees_all_close(alpha2["cosine"][:-1], np.cos(angle) ** 2 / np.cos(angle[0]) ** 2, rtol=1e-10)
    assert found["cosine"].betas[-1] == 0.999 and alpha2["cosine"][-1] == pytest.approx(1e-3 * alpha2["cosine"][-2])


@every_rule
def test_zero_snr_takes_the_signal_from_the_last_knot_alone(kind: str) -> None:
    """Algorithm 1 of arXiv:2305.08891: the first alpha stays, the others keep the ratios of their distances."""
    given, rescaled = (DiscreteBetas(kind, 60, LOW, HIGH, logsnr_max=math.inf, zero_snr=zero) for zero in (False, True))
    before, after = (process.level(process.knots).alpha[1:] for process in (given, rescaled))
    assert after[-1] == pytest.approx(2**-12) and after[0] == pytest.approx(before[0], rel=1e-12)
    share = (before - before[-1]) / (before[0] - before[-1])
    chex.assert_trees_all_close(after[:-1] / after[0], share[:-1], rtol=1e-7)
    chex.assert_trees_all_close(np.cumprod(1 - rescaled.betas), after**2, rtol=1e-7)


@every_rule
def test_without_its_last_signal_the_noise_of_a_rule_still_rises_at_every_knot(kind: str) -> None:
    assert (DiscreteBetas(kind, 1000, zero_snr=True).betas > 0).all()


@every_rule
@pytest.mark.parametrize("between", ["log_alpha", "alpha2"])
def test_networks_of_no_signal_are_told_the_index_of_every_knot(kind: str, between: str) -> None:
    """Of 1000, the last being 999; also on the device."""
    process, index = DiscreteBetas(kind, 1000, between=between, zero_snr=True), np.arange(1000)
    level, told = process.level((index + 1) / 1000), TimeOfProcess(1000.0, -1.0)
    chex.assert_trees_all_close(told.time(level, process), index, rtol=0, atol=1e-6)
    on_device = jax.jit(lambda level: told.time(level, process))(jax.tree.map(jnp.float32, level))
    chex.assert_trees_all_close(on_device, index, rtol=0, atol=1e-3)


@every_rule
@pytest.mark.parametrize("between", ["log_alpha", "alpha2"])
def test_every_rule_is_a_process(kind: str, between: str) -> None:
    """alpha² is the product of (1 - beta) at knots, its line is straight between them, and times come back."""
    process = DiscreteBetas(kind, 60, LOW, HIGH, between=between)
    knots = process.knots
    product = np.cumprod(1 - process.betas)
    inside = product > 1e-7
    chex.assert_trees_all_close((process.level(knots).alpha ** 2)[1:][inside], product[inside], rtol=1e-7)
    assert process.level(np.float64(0)).logsnr == pytest.approx(20, rel=1e-6)
    straight = np.log if between == "log_alpha" else np.square
    ends = straight(process.level(knots).alpha)[:-5]
    middles = straight(process.level((knots[:-6] + knots[1:-5]) / 2).alpha)
    chex.assert_trees_all_close(middles, (ends[1:] + ends[:-1]) / 2, rtol=1e-12)
    t = np.linspace(0.01, 0.97, 97)
    chex.assert_trees_all_close(process.time(process.level(t)), t, rtol=0, atol=1e-12)
    on_device = jax.jit(lambda t: process.time(process.level(t)))(jnp.asarray(t, jnp.float32))
    chex.assert_trees_all_close(on_device, t, rtol=0, atol=3e-6)
    h = 1e-7
    slope = (np.log(process.level(t - h).alpha) - np.log(process.level(t + h).alpha)) / (2 * h)
    off_knots = np.abs(t * 60 - np.round(t * 60)) > 1e-3
    chex.assert_trees_all_close(process.rate(t)[off_knots], slope[off_knots], rtol=1e-5)
    assert np.isfinite(np.stack(process.level(np.array([0.0, 0.99, 1.0])))).all()


def test_a_named_linear_rule_is_ddpms_process_bit_for_bit() -> None:
    t = np.linspace(0, 1, 777)
    for between, same in (("log_alpha", LinearBetaDiscrete()), ("alpha2", LinearAlphaDiscrete())):
        named = DiscreteBetas(between=between)
        chex.assert_trees_all_equal(named.level(t), same.level(t))
        chex.assert_trees_all_equal(named.time(named.level(t)), same.time(same.level(t)))


@pytest.mark.parametrize(
    ("kind", "steps", "left"), [("cosine", 4000, 3984), ("cosine", 1000, 996), ("linear", 1000, 1000)]
)
def test_dpm_solvers_cut(kind: str, steps: int, left: int) -> None:
    """Its number of steps left, at whose last knot time is 1; all of them have lambda above -5.1, and no other has."""
    whole, cut = DiscreteBetas(kind, steps), DiscreteBetas(kind, steps, logsnr_min=CUT)
    assert (whole.count, cut.count, cut.steps) == (steps, left, steps)
    logsnr = whole.level(whole.knots).logsnr
    chex.assert_trees_all_close(cut.level(cut.knots).logsnr, logsnr[: left + 1], rtol=1e-9)
    assert logsnr[left] >= CUT and (logsnr[left + 1 :] < CUT).all()


@every_rule
def test_without_a_knot_at_time_0_the_first_line_goes_on(kind: str) -> None:
    process = DiscreteBetas(kind, 40, LOW, HIGH, logsnr_max=None)
    below, first, second = np.log(process.level(np.array([0.6, 1.0, 2.0]) / 40).alpha)
    assert below == pytest.approx(first - 0.4 * (second - first), rel=1e-12)
    assert process.time(process.level(np.float64(0.6 / 40))) == pytest.approx(0.6 / 40, rel=1e-10)


#: DDPM.md's rows: process, factor and offset, (index, what the network is told).
TOLD: dict[str, tuple[DiscreteBetas, float, float, list[tuple[float, float]]]] = {
    "DDPM and DDIM": (DiscreteBetas(), 1000, -1, [(0, 0), (499, 499), (999, 999)]),
    "DPM-Solver": (DiscreteBetas(logsnr_min=CUT), 1000, -1, [(0, 0), (499, 499), (999, 999)]),
    "DEIS and iPNDM": (DiscreteBetas(between="alpha2"), 1000, -2, [(0, -1), (999, 998)]),
    "iDDPM as trained": (DiscreteBetas("cosine", 4000), 1000, -0.25, [(0, 0), (1, 0.25), (3983, 995.75)]),
    "iDDPM as trained, cut": (DiscreteBetas("cosine", 4000, logsnr_min=CUT), 996, -0.25, [(0, 0), (3983, 995.75)]),
    "iDDPM in DPM-Solver": (
        DiscreteBetas("cosine", 4000, logsnr_min=CUT), 1000, -1000 / 3984, [(0, 0), (3983, 1000 - 1000 / 3984)]),
    "iDDPM in DDIM": (DiscreteBetas("cosine", 4000), 4000, -1, [(0, 0), (3999, 3999)]),
}  # fmt: skip


@pytest.mark.parametrize("row", TOLD)
def test_what_networks_of_discrete_betas_are_told(row: str) -> None:
    process, factor, offset, rows = TOLD[row]
    index, told = np.array(rows).T
    level = process.level((index + 1) / process.count)
    chex.assert_trees_all_close(TimeOfProcess(factor, offset).time(level, process), told, rtol=1e-9, atol=1e-8)


@every_rule
def test_variances_are_those_of_the_posterior_between_knots(kind: str) -> None:
    """Small and large are gamma 0 and 1 of `noising.posterior_coefficients`; a learned one is a gamma per value."""
    process = DiscreteBetas(kind, 60, LOW, HIGH, logsnr_max=math.inf)
    knots = process.level(process.knots)
    later, earlier = knots.at(slice(2, -1)), knots.at(slice(1, -2))
    small, large = (noising.posterior_coefficients(later, earlier, gamma)[2] for gamma in (0.0, 1.0))
    betas, rest = process.betas, slice(1, -1)
    chex.assert_trees_all_close(variances.posterior_log_variance(betas)[rest], small, rtol=1e-10)
    chex.assert_trees_all_close(variances.log_variance_fixed_small(betas)[rest], small, rtol=1e-10)
    chex.assert_trees_all_close(variances.log_variance_fixed_large(betas)[rest], large, rtol=1e-10)
    assert variances.posterior_variance(betas)[0] == 0
    assert variances.posterior_log_variance(betas)[0] == variances.posterior_log_variance(betas)[1]
    v, index = np.random.default_rng(0).uniform(-1, 1, (3, 4, 2)), np.array([1, 20, 58])
    here, there = (Level(*(part[index - 1, None, None] for part in level)) for level in (later, earlier))
    expected = noising.posterior_coefficients(here, there, (v + 1) / 2)[2]
    chex.assert_trees_all_close(variances.learned_log_variance(v, index, betas), expected, rtol=1e-10)
    single = variances.learned_log_variance(jnp.float32(v), jnp.asarray(index), betas)
    chex.assert_trees_all_close(single, np.float32(expected), rtol=1e-6)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "an unknown rule": (lambda: DiscreteBetas("cosin"), r"rule of betas 'cosin'.*Did you mean 'cosine'"),
    "an unknown line": (lambda: DiscreteBetas(between="alpha"), r"between knots 'alpha'.*alpha2"),
    "no betas": (lambda: DiscreteBetas(steps=0), r"number of betas must be .*at least 1, got 0"),
    "a beta of 0": (lambda: DiscreteBetas(beta_start=0.0), r"between 0 and 1, got .*beta_start=0\.0"),
    "more noise at time 0": (lambda: DiscreteBetas(logsnr_max=9.0), r"above the logsnr 9\.21.*logsnr_max=9\.0"),
    "one beta and no signal": (lambda: DiscreteBetas(steps=1, zero_snr=True), r"last of two or more betas"),
    "nothing left": (lambda: DiscreteBetas(logsnr_min=10.0), r"below the logsnr 9\.21.*logsnr_min=10\.0"),
    "one beta and no time 0": (lambda: DiscreteBetas(steps=1, logsnr_max=None), r"two betas' knots"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_told_what_it_is_and_what_is_allowed(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_other_fields_make_other_processes() -> None:
    """Tables are kept per process: equal fields of other rules must not share them."""
    t = np.float64(0.37)
    processes = [DiscreteBetas(kind, 60, LOW, HIGH) for kind in ("linear", "quad", "const", "cosine")]
    processes += [dataclasses.replace(processes[0], between="alpha2"), LinearBetaDiscrete(60, LOW, 0.06)]
    assert len({float(process.level(t).alpha) for process in processes}) == len(processes)
