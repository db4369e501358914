"""Grids: what is equal in them, their ends, refinement, and the indices that published programs visit."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from diffusion_distill.process import edm_grids, grids
from diffusion_distill.process.grids import (
    SPACINGS,
    ddim_indices,
    default_rule,
    make_grid,
    refine,
    singlestep,
    spaced_times,
)
from diffusion_distill.process.levels import Level
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
from diffusion_distill.process.vp_discrete import LinearAlphaDiscrete

pytestmark = pytest.mark.fast

PROCESSES: list[Process] = [
    Cosine(),
    LinearBeta(),
    LinearBeta(t_min=0.0),
    LinearBetaDiscrete(),
    LinearAlphaDiscrete(),
    IDDPMCosine(),
    DiscreteBetas("cosine", 4000, logsnr_min=-10.2),
    VE(),
]
FLOWS = [RectifiedFlow(), RectifiedFlow(3.0)]
every_schedule = pytest.mark.parametrize("process", PROCESSES, ids=str)
every_spacing = pytest.mark.parametrize("spacing", SPACINGS)


def in_equal_steps(process: Process, times: np.ndarray, spacing: str, rho: float = 7.0) -> np.ndarray:
    """What has equal steps, at a process's times."""
    alpha, sigma = process.level(times)
    return {
        "time": times,
        "quadratic": np.sqrt(times),
        "logsnr": 2 * np.log(alpha / sigma),
        "rho": (sigma / alpha) ** (1 / rho),
    }[spacing]


@every_schedule
@every_spacing
@pytest.mark.parametrize(("start", "end", "steps"), [(1.0, 1e-3, 1), (1.0, 1e-3, 12), (0.9, 0.25, 7), (1.0, 0.5, 64)])
def test_steps_are_equal_and_ends_exact(process: Process, spacing: str, start: float, end: float, steps: int) -> None:
    times = spaced_times(process, steps, spacing, start=start, end=end)
    assert times.shape == (steps + 1,) and (times[0], times[-1]) == (start, end)
    assert (np.diff(times) < 0).all()
    along = in_equal_steps(process, times, spacing)
    np.testing.assert_allclose(along, np.linspace(along[0], along[-1], steps + 1), rtol=1e-9, atol=1e-9)
    level = make_grid(process, steps, spacing, start=start, end=end)
    np.testing.assert_array_equal(np.stack(level), np.stack(process.level(times)))
    np.testing.assert_array_equal(np.stack(level.at([0, -1])), np.stack(process.level(np.array([start, end]))))
    grids.check(level)


@every_schedule
@pytest.mark.parametrize("spacing", ["time", "quadratic"])
def test_time_zero_is_an_end(process: Process, spacing: str) -> None:
    times = spaced_times(process, 8, spacing)
    expected = np.arange(8, -1, -1) / 8
    np.testing.assert_allclose(times, expected if spacing == "time" else expected**2, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_equal_steps_of_rho_are_edms(rho: float) -> None:
    """arXiv:2206.00364 Eq. 5; the rule 'karras' ends at zero noise after it."""
    i, low, high = np.arange(13) / 12, 0.002 ** (1 / rho), 80 ** (1 / rho)
    expected = (high + i * (low - high)) ** rho
    for process, start, end in ((VE(1.0), 80.0, 0.002), (VE(), 1.0, 0.002 / 80)):
        found = make_grid(process, 12, "rho", start=start, end=end, rho=rho)
        np.testing.assert_allclose(found.sigma, expected, rtol=1e-11)
    for found in (make_grid(VE(), 13, rho=rho), edm_grids.edm(13, rho=rho)):
        np.testing.assert_allclose(found.sigma, [*expected, 0], rtol=1e-11)
        np.testing.assert_array_equal(found.alpha, 1)
    assert make_grid(VE(), 1).sigma.tolist() == [80, 0]


def test_edms_rule_on_other_processes() -> None:
    """Equal in rho down to what the process has at time 0, and then zero noise."""
    vp = make_grid(Cosine(), 6, "karras")
    rho = (vp.sigma / vp.alpha)[:-1] ** (1 / 7)
    np.testing.assert_allclose(np.diff(rho), np.diff(rho)[0], rtol=1e-9)
    assert vp.logsnr[-2] == pytest.approx(20) and (vp.alpha[-1], vp.sigma[-1]) == (1, 0)
    np.testing.assert_array_equal(make_grid(VE(), 5, "karras", end=0.1).sigma, make_grid(VE(), 5, "rho", end=0.1).sigma)
    assert [default_rule(process) for process in (VE(), Cosine(), RectifiedFlow())] == ["karras", "time", "time"]


@pytest.mark.parametrize("k", [2, 3, 5, 10, 49])
@pytest.mark.parametrize("steps", [1, 3, 10, 49])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (1.0, 1e-3), (0.7, 0.1)])
def test_grids_equal_in_time_nest_bit_for_bit(k: int, steps: int, start: float, end: float) -> None:
    for process in [*PROCESSES[1:5], *FLOWS]:
        coarse, fine = (make_grid(process, n, start=start, end=end) for n in (steps, k * steps))
        for some, all_ in zip(coarse, fine, strict=True):
            np.testing.assert_array_equal(all_[::k], some)
    if (start, end) == (1.0, 0.0):
        np.testing.assert_array_equal(spaced_times(Cosine(), k * steps), np.arange(k * steps, -1, -1) / (k * steps))


@every_schedule
@every_spacing
def test_other_grids_nest_but_for_rounding(process: Process, spacing: str) -> None:
    coarse, fine = (make_grid(process, n, spacing, end=0.01) for n in (6, 30))
    np.testing.assert_allclose(fine.at(slice(None, None, 5)).logsnr, coarse.logsnr, rtol=0, atol=1e-9)


# --- refinement

REFINED: dict[str, tuple[Process, Level]] = {
    **{str(process): (process, make_grid(process, 6, end=0.05)) for process in [*PROCESSES, *FLOWS]},
    "a whole flow": (FLOWS[1], make_grid(FLOWS[1], 6)),
    "clean end": (LinearBeta(), grids.clean_end(grids.make_grid(LinearBeta(), 6))),
    "clean end, zero noise at time 0": (LinearBeta(t_min=0.0), grids.make_grid(LinearBeta(t_min=0.0), 6)),
    "cosine, clean end": (Cosine(), grids.clean_end(grids.make_grid(Cosine(), 6))),
    "EDM's grid": (VE(), edm_grids.edm(6)),
    "EDM's grid, in sigma": (VE(1.0), edm_grids.edm(6)),
    "EDM's grid, noisy end": (VE(), edm_grids.edm(7).at(slice(0, 7))),
    "levels of another process": (Cosine(), make_grid(LinearBeta(), 6, "logsnr", start=0.9, end=0.05)),
}
every_grid = pytest.mark.parametrize(("process", "grid"), REFINED.values(), ids=REFINED)


@every_grid
@pytest.mark.parametrize("parts", [1, 2, 10, [1, 4, 2, 1, 3, 5]], ids=str)
def test_refinement_keeps_the_levels_there_are(process: Process, grid: Level, parts: int | list[int]) -> None:
    counts = [parts] * 6 if isinstance(parts, int) else parts
    fine = refine(process, grid, parts)
    assert fine.alpha.shape == fine.sigma.shape == (sum(counts) + 1,)
    for own, all_ in zip(grid, fine, strict=True):
        np.testing.assert_array_equal(all_[np.cumsum([0, *counts])], own)
    grids.check(fine)
    times = np.where(fine.sigma > 0, process.time(Level(fine.alpha, np.where(fine.sigma > 0, fine.sigma, 1.0))), 0.0)
    for k, begin in enumerate(np.cumsum([0, *counts])[:-1]):
        inner = times[begin : begin + counts[k] + 1]
        np.testing.assert_allclose(inner, np.linspace(inner[0], inner[-1], len(inner)), rtol=0, atol=1e-10 * times[0])


@pytest.mark.parametrize("spacing", ["logsnr", "rho", "quadratic"])
def test_refinement_in_another_spacing(spacing: str) -> None:
    for process in (LinearBeta(), VE()):
        grid = make_grid(process, 4, spacing, end=0.2)
        fine, whole = refine(process, grid, 3, spacing), make_grid(process, 12, spacing, end=0.2)
        np.testing.assert_array_equal(fine.sigma[::3], grid.sigma)
        np.testing.assert_allclose(fine.logsnr, whole.logsnr, rtol=0, atol=1e-10)


def test_a_step_to_zero_noise_is_divided_down_to_time_zero() -> None:
    process = LinearBeta()
    fine = refine(process, grids.clean_end(grids.make_grid(process, 3)), 4)
    whole = grids.clean_end(grids.make_grid(process, 12))
    np.testing.assert_allclose(np.stack(fine), np.stack(whole), rtol=1e-12)
    edm = refine(VE(), edm_grids.edm(3), 4)
    np.testing.assert_allclose(edm.sigma[8:], edm.sigma[8] * np.arange(4, -1, -1) / 4, rtol=1e-12)


# --- singlestep

PLANS = [[1, 1, 1], [2, 2, 1], [3, 3, 2, 1], [3, 3, 2]]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("process", PROCESSES[:6], ids=str)
def test_nodes_of_singlestep(plan: list[int], process: Process) -> None:
    """Equal in time, steps and nodes are one uniform grid; equal in log-SNR, whatever the order of a step is."""
    ends = np.cumsum([0, *plan])
    found = singlestep(process, plan)
    np.testing.assert_allclose(found.logsnr, make_grid(process, sum(plan), end=1e-3).logsnr, rtol=1e-9, atol=1e-9)
    logsnr = singlestep(process, plan, "logsnr", end=0.01).logsnr
    first, last = process.level(np.array([1.0, 0.01])).logsnr
    np.testing.assert_allclose(logsnr[ends], np.linspace(first, last, len(plan) + 1), rtol=1e-9, atol=1e-9)
    quadratic = singlestep(process, plan, "quadratic", end=0.01)
    np.testing.assert_array_equal(
        quadratic.sigma[ends], make_grid(process, sum(plan), "quadratic", end=0.01).sigma[ends]
    )
    roots = np.sqrt(process.time(quadratic))
    for k, count in enumerate(plan):
        for along in (logsnr, roots):
            inside = along[ends[k] : ends[k + 1] + 1]
            np.testing.assert_allclose(inside, np.linspace(inside[0], inside[-1], count + 1), rtol=1e-8, atol=1e-8)


# --- indices of published DDIM programs


def test_indices_cut_off_in_float32() -> None:
    """Facts of the published program: 84 of the step counts have entries one below the exact ones."""
    off = {}
    for steps in range(1, 1001):
        found = ddim_indices("uniform_torch", steps)
        exact = np.array([int(Fraction(1000 * k, steps)) for k in range(steps)])[::-1]
        if (found != exact).any():
            assert set(exact - found) == {0, 1}
            off[steps] = found[found != exact].tolist()
    assert len(off) == 84
    assert off[60] == [449, 249] and off[120][-3:] == [249, 224, 124]
    np.testing.assert_array_equal(ddim_indices("uniform_torch", 1000), np.arange(999, -1, -1))


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50, 300, 1000])
def test_other_indices(steps: int) -> None:
    uniform, quad = (ddim_indices(rule, steps) for rule in ("uniform", "quad"))
    assert uniform.tolist() == list(range(0, 1000, 1000 // steps))[:steps][::-1]
    assert quad.shape == (steps,) and quad[-1] == 0 and (np.diff(quad) <= 0).all()
    roots = (800**0.5) * np.arange(steps)[::-1] / max(steps - 1, 1)
    assert ((roots**2 - quad > -1e-9) & (roots**2 - quad < 1 + 1e-9)).all()


def test_indices_of_other_numbers_of_betas() -> None:
    assert ddim_indices("uniform", 5, 50).tolist() == [40, 30, 20, 10, 0]
    assert ddim_indices("uniform_torch", 4, 50).tolist() == [37, 25, 12, 0]
    assert ddim_indices("quad", 3, 500).tolist() == [400, 100, 0]


# --- bad input

SIX = grids.make_grid(Cosine(), 6)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "an unknown rule of a grid": (lambda: make_grid(Cosine(), 4, "logSNR"), r"rule of a grid 'logSNR'.*logsnr"),
    "log-SNR from pure noise": (
        lambda: make_grid(RectifiedFlow(), 4, "logsnr", end=0.1), r"need some signal at their start.*below 1"),
    "half a grid": (lambda: grids.from_numbers({"alpha": [1, 1]}), r"'sigma': .*got {'alpha'"),
    "a file in place of a grid": (lambda: grids.from_numbers("levels.json"), r"'sigma': .*got 'levels.json'"),
    "numbers that are no grid": (lambda: grids.from_numbers({"alpha": ["a"], "sigma": [1]}), r"'sigma': .*but:"),
    "an unknown spacing of a refinement": (lambda: refine(Cosine(), SIX, 2, "log"), r"spacing 'log'"),
    "no steps": (lambda: make_grid(Cosine(), 0), r"number of steps must be .*at least 1, got 0"),
    "an end at the start": (lambda: make_grid(Cosine(), 4, start=0.5, end=0.5), r"down from .* got 0.5 and 0.5"),
    "an end above the start": (lambda: make_grid(Cosine(), 4, start=0.1, end=0.5), r"got 0.1 and 0.5"),
    "a negative end": (lambda: make_grid(Cosine(), 4, end=-0.1), r"got 1.0 and -0.1"),
    "a start that is no number": (lambda: make_grid(Cosine(), 4, start=float("nan")), r"got nan and 0.0"),
    "log-SNR to zero noise": (lambda: make_grid(LinearBeta(t_min=0.0), 4, "logsnr"), r"need noise at their end"),
    "rho to zero noise": (lambda: make_grid(VE(), 4, "rho"), r"need noise at their end.*later end"),
    "parts for other steps": (lambda: refine(Cosine(), SIX, [1, 2]), r"grid of 6 steps.* got 2 num"),
    "no parts": (lambda: refine(Cosine(), SIX, 0), r"at least 1, got 0"),
    "a rising grid": (
        lambda: refine(Cosine(), SIX.at(slice(None, None, -1)), 2), r"must decrease in noise"),
    "an unknown rule": (lambda: ddim_indices("linspace", 10), r"rule of DDIM's indices 'linspace'.*quad, uniform"),
    "more steps than betas": (lambda: ddim_indices("uniform", 1001), r"1000 betas has at most 1000 steps, got 1001"),
    "no indices": (lambda: ddim_indices("quad", 0), r"number of steps must be .*at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_told_what_it_is_and_what_is_allowed(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
