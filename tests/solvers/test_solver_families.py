"""Every solver on the host, in float64: its order, its evaluations, what it reduces to, and where D-ODE's lambdas act.

The data are the smooth mixture of golden/solvers/order_smooth.npz, for which the file has the end of the exact flow
(DOP853 at 1e-12) from the same noise, on a VP schedule and on EDM's levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import chex
import numpy as np
import places
import pytest
import toys

from diffusion_distill.process import edm_grids, grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import LinearBeta, Process
from diffusion_distill.process.vp_discrete import LinearAlphaDiscrete
from diffusion_distill.solvers import SOLVERS, Table, ddim, deis, dpm_solver, dpm_solver_pp, heun, ipndm, unipc
from diffusion_distill.solvers.dpm_solver import order_plan
from diffusion_distill.solvers.engine import run_host
from diffusion_distill.solvers.table import Directions

pytestmark = pytest.mark.fast

LINEAR, FITTED = LinearBeta(t_min=0.0), edm_grids.fitted_beta(0.002, 80.0)
#: From most noise to little: kind -> (steps -> levels), the ends those of the recorded references.
GRIDS: dict[str, Callable[[int], Level]] = {
    "VP": lambda steps: grids.make_grid(LINEAR, steps, "logsnr", end=1e-3),
    "VE": lambda steps: edm_grids.edm(steps + 1).at(slice(None, -1)),
}
with np.load(places.SMALL / "solvers" / "order_smooth.npz") as recorded:
    START, ENDS = recorded["x_T"], {"VP": recorded["ref/linear"], "VE": recorded["ref/edm"]}
    WEIGHTS, MEANS, STDS = (recorded[name] for name in ("weights", "means", "stds"))


def mixture(z: np.ndarray, level: Level, labels: Any = None) -> np.ndarray:
    """E[x | z] of the mixture of diagonal Gaussians, by Bayes' rule."""
    alpha, sigma = (a.reshape(-1, *[1] * MEANS.ndim) for a in level)
    variance, off = alpha**2 * STDS**2 + sigma**2, z[:, None] - alpha * MEANS
    log_p = np.log(WEIGHTS) - 0.5 * (off**2 / variance + np.log(variance)).sum(axis=(2, 3, 4))
    share = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    share = (share / share.sum(axis=1, keepdims=True)).reshape(*share.shape, 1, 1, 1)
    return (share * (MEANS + alpha * STDS**2 / variance * off)).sum(axis=1)


class Case(NamedTuple):
    """A solver, its options (functions take the grid) and its order; None for solvers that draw noise."""

    solver: str
    options: dict[str, Any]
    order: int | None


def equal_orders(order: int) -> Callable[[Level], list[int]]:
    """Steps of one order, and of order 1 for what is left."""
    return lambda grid: [order] * (len(grid.sigma[1:]) // order) + [1] * (len(grid.sigma[1:]) % order)


def own_time(grid: Level) -> Process:
    """The schedule in whose time DEIS has its polynomials."""
    return LINEAR if grid.alpha[0] < 1 else FITTED


def noisy_end(grid: Level) -> bool:
    return bool(grid.sigma[-1] > 0)


TIME = {"process": own_time}
SINGLE = {"method": "singlestep"}
#: Orders: the papers', as the published programs have them on these data (slopes in the file). iPNDM's fixed weights,
#: those of equal steps, leave order 2, and so does what multistep DPM-Solver-3 makes of the second difference.
CASES: dict[str, Case] = {
    "ddim": Case("ddim", {}, 1),
    **{name: Case(name, {}, 1) for name in ("ddim-sep", "ddim-all", "ddim-2", "ddim-la")},
    "ddim, the other output": Case("ddim", {"output": lambda grid: "x_hat" if grid.alpha[0] < 1 else "eps"}, 1),
    "ancestral": Case("ancestral", {}, None),
    "heun": Case("heun", {}, 2),
    "heun, kept slope": Case("heun", {"keep_slope": True}, 2),
    "two_stage": Case("two_stage", {}, 2),
    "two_stage, dpm_2": Case("two_stage", {"alpha": 0.5, "trial": "log"}, 2),
    "ablation": Case("ablation", {}, 2),
    "midpoint": Case("midpoint", {}, 2),
    "rk4": Case("rk4", {}, 4),
    **{f"ipndm {n}": Case("ipndm", {"order": n}, min(n, 2)) for n in (1, 2, 3, 4)},
    **{f"deis {n}": Case("deis", {"order": n}, n) for n in (1, 2, 3, 4)},
    **{f"deis {n} in time": Case("deis", {"order": n, **TIME}, n) for n in (2, 3, 4)},
    **{
        f"{name} {n} {kind}": Case(name, {"order": n, "kind": kind}, min(n, 2))
        for name in ("dpm_solver", "dpm_solver++")
        for kind in ("dpmsolver", "taylor")
        for n in (2, 3)
    },
    **{
        f"{name} {n} {kind}, singlestep": Case(name, {"order": n, "kind": kind, **SINGLE, "plan": equal_orders(n)}, n)
        for name in ("dpm_solver", "dpm_solver++")
        for kind in ("dpmsolver", "taylor")
        for n in (2, 3)
    },
    **{
        f"unipc {n} {output} {variant}": Case("unipc", {"order": n, "output": output, "variant": variant}, n + 1)
        for n, output, variant in ((1, "x_hat", "bh1"), (2, "x_hat", "bh1"), (2, "x_hat", "bh2"), (2, "eps", "bh2"))
    },
    # The last state, predicted only, has the whole error of order 1: it is seen among errors of order 4.
    "unipc 3 x_hat bh2": Case("unipc", {"order": 3, "correct_final": noisy_end}, 4),
    "unipc 3 eps bh1": Case("unipc", {"order": 3, "output": "eps", "variant": "bh1", "correct_final": noisy_end}, 4),
}
DETERMINISTIC = [name for name, case in CASES.items() if case.order]
every_case, every_kind = pytest.mark.parametrize("name", CASES), pytest.mark.parametrize("kind", GRIDS)
every_flow = pytest.mark.parametrize("name", DETERMINISTIC)
every_end = pytest.mark.parametrize("clean", [False, True], ids=["noisy end", "clean end"])


def made(name: str, grid: Level) -> Table:
    """A case's table on a grid."""
    solver, options, _ = CASES[name]
    return SOLVERS[solver](grid, **{key: value(grid) if callable(value) else value for key, value in options.items()})


def directions(table: Table) -> Directions:
    assert table.directions is not None, "a solver without noise has directions"
    return table.directions


def ended(grid: Level, clean: bool) -> Level:
    return grids.clean_end(grid) if clean else grid


def test_every_solver_is_proven() -> None:
    assert {case.solver for case in CASES.values()} == set(SOLVERS) - {"euler"}
    assert SOLVERS["euler"] is ddim


# --- the contract on the host


@every_kind
@every_flow
def test_order_of_convergence_to_the_exact_flow(name: str, kind: str) -> None:
    errors = []
    for steps in (96, 192):
        end = run_host(made(name, GRIDS[kind](steps)).plain(), mixture, START)
        errors.append(np.sqrt(np.mean((end - ENDS[kind]) ** 2)))
    order = CASES[name].order
    assert order is not None
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3, errors
    assert errors[1] < 0.02


@every_end
@every_kind
@every_case
def test_evaluations_are_the_rows(name: str, kind: str, clean: bool) -> None:
    steps, calls = 7, []

    def counting(z: np.ndarray, level: Level, labels: Any = None) -> np.ndarray:
        calls.append(level)
        return mixture(z, level)

    grid = ended(GRIDS[kind](steps), clean)
    for table in (made(name, grid), made(name, grid).plain()):
        calls.clear()
        run_host(table, counting, START, row_noise=np.zeros((table.nfe, *START.shape)))
        stages = {"heun": 2, "two_stage": 2, "ablation": 2, "midpoint": 2, "rk4": 4}.get(CASES[name].solver, 1)
        corrected = bool(CASES[name].options.get("correct_final"))
        assert len(calls) == table.nfe == stages * steps - clean * (stages - 1) + (corrected and not clean)
        assert all(level.sigma[0] > 0 for level in calls), "no estimate is asked for where there is no noise"


@every_end
@every_kind
@every_flow
def test_levels_reached_are_those_told_next(name: str, kind: str, clean: bool) -> None:
    grid = ended(GRIDS[kind](7), clean)
    table = made(name, grid)
    where = directions(table)
    for told, start, reached, end in zip(table.level, where.start, where.reached, grid.at(-1), strict=True):
        np.testing.assert_allclose([start, *reached], [*told, end], rtol=1e-13)
    assert where.weights.shape == (*where.published.shape, table.weights.shape[2])
    assert where.published.shape[0] == table.nfe


@every_end
@pytest.mark.parametrize(
    ("name", "kind"),  # of z, not of z/alpha, a step of Euler is not exact
    [(name, kind) for name in DETERMINISTIC for kind in GRIDS if (name, kind) != ("ablation", "VP")],
)
def test_exact_for_a_single_point(name: str, kind: str, clean: bool) -> None:
    """Its eps and its x_hat stay as they are along the flow, and so do their combinations, whatever lambda is.

    The first difference of eps is not one of outputs, so its lambda is 0. Sums of Sep and All are no differences.
    """
    point, grid = toys.Gaussian(mean=0.7, std=0.0), ended(GRIDS[kind](7), clean)
    table, (first, last) = made(name, grid), (grid.at(0), grid.at(-1))
    expected = last.alpha * 0.7 + last.sigma * (table.init * START - first.alpha * 0.7) / first.sigma
    lambdas = np.random.default_rng(0).normal(size=directions(table).published.shape)
    lambdas[slice(None) if name in ("ddim-sep", "ddim-all") else 0] = 0
    for some in (table.plain(), table.distilled(lambdas)):
        seen = run_host(some, lambda z, level, labels=None: point.raw((), z, level, None, None), START)
        np.testing.assert_allclose(seen, expected, rtol=1e-9, atol=1e-9)


@every_kind
@every_flow
def test_without_lambda_a_solver_is_itself(name: str, kind: str) -> None:
    table = made(name, GRIDS[kind](7))
    none = np.zeros_like(directions(table).published)
    chex.assert_trees_all_equal(table.distilled(none), table.plain())
    ends = [run_host(some, mixture, START) for some in (table, table.plain())]
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-12)
    assert table.plain().weights.shape[1] <= table.weights.shape[1]
    moved = run_host(table.distilled(none + 0.1), mixture, START)
    assert np.abs(moved - ends[0]).max() > 1e-6, "lambda must do something"


# --- reductions


@every_end
@every_kind
@pytest.mark.parametrize(
    "solver",
    [
        partial(ipndm, order=1),
        partial(deis, order=1),
        partial(deis, order=1, quadrature="ends"),
        partial(dpm_solver, order=1),
        partial(dpm_solver_pp, order=1),
        partial(dpm_solver, order=1, method="singlestep"),
        partial(dpm_solver_pp, order=1, method="singlestep"),
        partial(dpm_solver, order=3, method="singlestep", plan=[1] * 6),
        *(SOLVERS[f"ddim-{variant}"] for variant in ("sep", "all", "2", "la")),
    ],
)
def test_order_one_is_ddim(solver: Callable[..., Table], kind: str, clean: bool) -> None:
    grid = ended(GRIDS[kind](6), clean)
    chex.assert_trees_all_close(solver(grid).plain(), ddim(grid).plain(), rtol=1e-11, atol=1e-13)


@every_kind
@pytest.mark.parametrize(
    ("order", "variant", "single"),
    [(1, "bh1", ddim), (1, "bh2", ddim), (2, "bh2", partial(dpm_solver_pp, lower_order_final=True))],
)
def test_unipcs_predictor(order: int, variant: str, single: Callable[..., Table], kind: str) -> None:
    """From the corrected state it is DDIM, or DPM-Solver++(2M) with B of the second kind; one step is DDIM."""
    grid = GRIDS[kind](6)
    table, other = unipc(grid, order, variant=variant), single(grid, output="x_hat") if order == 1 else single(grid)
    past = other.weights.shape[1] - 1 if order == 2 else 0  # memories that the predictor reads
    for row, also in zip(table.weights, other.weights[:, 0], strict=True):
        from_state, from_past, from_x_hat = also[0], also[1 : 1 + past], also[-1]
        expected = from_state * row[1]
        expected[2 : 2 + past] += from_past
        expected[-1] += from_x_hat
        np.testing.assert_allclose(row[0], expected, rtol=1e-11, atol=1e-13)
    short = grid.at(slice(0, 2))
    chex.assert_trees_all_close(unipc(short, order, variant=variant).plain(), ddim(short).plain(), rtol=1e-11)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_on_equal_steps_of_sigma_is_ipndm(order: int) -> None:
    grid = Level(np.ones(9), np.linspace(5.0, 1.0, 9))
    chex.assert_trees_all_close(deis(grid, order).plain(), ipndm(grid, order).plain(), rtol=1e-10, atol=1e-12)


@every_kind
def test_deis_of_two_points_is_adams_bashforth_of_variable_steps(kind: str) -> None:
    grid = GRIDS[kind](6)
    alone, table, step = ddim(grid, "eps").plain(), deis(grid, 2).plain(), np.diff(grid.sigma / grid.alpha)
    for k in range(1, 6):
        # z_s = ... + alpha_s·h·((1 + h/2h')·eps_t - h/2h'·eps_{t+1}); a memory holds eps_{t+1}
        extra = grid.alpha[k + 1] * step[k] ** 2 / (2 * step[k - 1])
        moved = table.weights[k, 0] - np.insert(alone.weights[k, 0], 1, 0.0)
        expected = extra * np.array([1 / grid.sigma[k], -1, -grid.alpha[k] / grid.sigma[k]])
        np.testing.assert_allclose(moved, expected, rtol=1e-9, atol=1e-12)


def test_published_sums_of_deis_are_near_the_integrals() -> None:
    """10,000 nodes leave about 1e-4 of the integral (arXiv:2309.16421's code); a single output is exact in 'ends'."""
    grid = GRIDS["VP"](6)
    exact, *sums = (deis(grid, 3, process=LINEAR, quadrature=name).plain() for name in ("exact", "left", "ends"))
    for table in sums:
        error = np.abs(table.weights - exact.weights).max() / np.abs(exact.weights).max()
        assert 1e-7 < error < 1e-3
    np.testing.assert_allclose(sums[1].weights[0], exact.weights[0], rtol=1e-9)
    assert np.abs(sums[0].weights[0, 0] - exact.weights[0, 0]).max() > 1e-7


@pytest.mark.parametrize("quadrature", ["exact", "left", "ends"])
def test_deis_of_a_schedule_with_knots(quadrature: str) -> None:
    """Coefficients of eps = t and of eps = 1 are integrals that are known by parts, knot by knot."""
    schedule = LinearAlphaDiscrete(logsnr_max=math.inf)
    times = np.linspace(1, 0.001, 5)
    grid = schedule.level(times)
    table = deis(grid, 2, process=schedule, quadrature=quadrature)
    for k in range(1, 4):
        t, s = times[k : k + 2]
        inside = [s, *schedule.knots[(schedule.knots > s) & (schedule.knots < t)], t]
        ends = ratio(schedule.level(times[k : k + 2]))
        integral = ends[1] * s - ends[0] * t + gauss(lambda time: ratio(schedule.level(time)), inside)  # ∫ t dq
        newest, last = -table.weights[k, 0, -1] * grid.sigma[k] / grid.alpha[k], table.weights[k, 0, 1]
        rtol = 1e-11 if quadrature == "exact" else 5e-4
        assert newest * t + last * times[k - 1] == pytest.approx(integral * grid.alpha[k + 1], rel=rtol)
        assert newest + last == pytest.approx((ends[1] - ends[0]) * grid.alpha[k + 1], rel=rtol)


# --- exponential integrators and quadratures are exact for what their order says

Curve = Callable[[np.ndarray], np.ndarray]


@every_kind
@pytest.mark.parametrize(
    ("solver", "output", "degree"),
    [
        *((partial(f, order=n, kind="taylor"), out, min(n - 1, 1)) for n in (1, 2, 3) for f, out in
          ((dpm_solver, "eps"), (dpm_solver_pp, "x_hat"))),
        *((partial(f, order=n, kind="taylor", method="singlestep", plan=[n] * (12 // n)), out, n - 1)
          for n in (2, 3) for f, out in ((dpm_solver, "eps"), (dpm_solver_pp, "x_hat"))),
    ],
)  # fmt: skip
def test_dpm_solver_integrates_polynomials_of_log_snr(
    solver: Callable[..., Table], output: str, degree: int, kind: str
) -> None:
    """D of degree `degree` in L = log(alpha/sigma): z/alpha adds up exp(-L)·eps dL, and z/sigma exp(L)·x_hat dL."""
    curve, (grid, half) = np.polynomial.Polynomial([0.3, -0.7, 0.4][: degree + 1]), uneven(kind)
    steps, options = len(half) - 1, getattr(solver, "keywords", {})
    single = options.get("method") == "singlestep"
    table = solver(grid) if single else solver(grid, lower_order_final=False)
    seen = run_host(table.plain(), level_only(curve, output), START, states=True)
    stops = range(0, steps + 1, options["order"]) if single else range(options["order"] - 1, steps + 1)
    sign, own = (-1, grid.alpha) if output == "eps" else (1, grid.sigma)
    for a, b in pairwise(stops):
        added = seen[b] / own[b] - seen[a] / own[a]
        integral = sign * gauss(lambda u: np.exp(sign * u) * curve(u), half[[a, b]])
        np.testing.assert_allclose(added, np.full_like(added, integral), rtol=1e-8, atol=1e-9)


@every_kind
@pytest.mark.parametrize(("solver", "output"), [(dpm_solver, "eps"), (dpm_solver_pp, "x_hat")])
def test_multistep_3_as_published(solver: Callable[..., Table], output: str, kind: str) -> None:
    """D and D' enter exactly, D'' with half its weight: psi_3 belongs to D''·h², of which D2 is one half."""
    curve, (grid, half) = np.polynomial.Polynomial([0.3, -0.7, 0.4]), uneven(kind)
    seen = run_host(solver(grid, 3, lower_order_final=False).plain(), level_only(curve, output), START, states=True)
    sign, own = (-1, grid.alpha) if output == "eps" else (1, grid.sigma)
    for k in range(2, len(half) - 1):
        at = half[k]
        expansion = np.polynomial.Polynomial([curve(at), curve.deriv()(at), curve.deriv(2)(at) / 4])
        added = seen[k + 1] / own[k + 1] - seen[k] / own[k]
        integral = sign * gauss(lambda u: np.exp(sign * u) * expansion(u - at), half[k : k + 2])
        np.testing.assert_allclose(added, np.full_like(added, integral), rtol=1e-8, atol=1e-9)


@every_kind
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("in_time", [False, True], ids=["rho", "t"])
def test_deis_integrates_polynomials(in_time: bool, order: int, kind: str) -> None:
    """Of eps in sigma/alpha, or in time: z/alpha adds up eps dq, by parts."""
    grid, curve = GRIDS[kind](8), np.polynomial.Polynomial([0.3, -0.7, 0.4, 0.2][:order])
    schedule, q = own_time(grid), grid.sigma / grid.alpha
    variable = schedule.time if in_time else lambda level: ratio(level) / q[0]
    table = deis(grid, order, process=schedule if in_time else None)
    seen = run_host(table.plain(), level_only(curve, "eps", variable), START, states=True)
    for k in range(order - 1, 8):
        added, (ends, u) = (
            seen[k + 1] / grid.alpha[k + 1] - seen[k] / grid.alpha[k],
            (q[k : k + 2], variable(grid)[k : k + 2]),
        )
        if in_time:
            rest = gauss(lambda t: ratio(schedule.level(t)) * curve.deriv()(t), u)
            integral = ends[1] * curve(u[1]) - ends[0] * curve(u[0]) - rest
        else:
            integral = q[0] * np.diff(curve.integ()(u))[0]
        np.testing.assert_allclose(added, np.full_like(added, integral), rtol=1e-8, atol=1e-11 * q[0])


def ratio(level: Level) -> np.ndarray:
    return np.asarray(level.sigma / level.alpha)


def uneven(kind: str) -> tuple[Level, np.ndarray]:
    """A grid whose steps in half log-SNR differ, and that."""
    grid = (
        grids.make_grid(LINEAR, 12, "rho", end=1e-3) if kind == "VP" else edm_grids.edm(13, 0.1, 8.0).at(slice(0, 13))
    )
    return grid, grid.logsnr / 2


def level_only(curve: Curve, output: str, variable: Callable[[Level], np.ndarray] | None = None) -> Callable[..., Any]:
    """A denoiser whose eps or x_hat is a function of the level (by default of its half log-SNR) alone."""

    def denoise(z: np.ndarray, level: Level, labels: Any = None) -> np.ndarray:
        value = curve(level.logsnr / 2 if variable is None else variable(level)).reshape(-1, 1, 1, 1)
        alpha, sigma = level.expand(z)
        return (z - sigma * value) / alpha if output == "eps" else value + 0 * z

    return denoise


def gauss(f: Curve, ends: Sequence[float] | np.ndarray) -> float:
    """An integral from the first of rising or falling ends to the last, by NumPy's nodes on 20 parts of each panel."""
    nodes, share = np.polynomial.legendre.leggauss(16)
    edges = np.interp(np.arange(20 * len(ends) - 19) / 20, np.arange(len(ends)), ends)
    middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    return float(np.sum(half[:, None] * share * f(middle[:, None] + half[:, None] * nodes)))


# --- D-ODE: lambdas act where arXiv:2309.16421 says

Paper = Callable[[Level, np.ndarray], np.ndarray]


def eps_of(z: np.ndarray, level: Level) -> np.ndarray:
    return (z - level.alpha * x_hat_of(z, level)) / level.sigma


def x_hat_of(z: np.ndarray, level: Level) -> np.ndarray:
    return mixture(z, Level(*(np.full(len(z), a) for a in level)))


def levels(grid: Level) -> list[Level]:
    return [grid.at(k) for k in range(len(grid.sigma))]


def d_ddim(grid: Level, lambdas: np.ndarray) -> np.ndarray:
    """Eq. 10 and 17 to 19, of eps: the first difference is from x_T, the unit noise."""
    z, last = START * (1 if grid.alpha[0] < 1 else grid.sigma[0]), START
    for (t, s), factor in zip(pairwise(levels(grid)), lambdas, strict=True):
        newest = eps_of(z, t)
        moved = newest + factor * (newest - last)
        z, last = s.alpha * (z - t.sigma * moved) / t.alpha + s.sigma * moved, newest
    return z


def d_ddim_of_data(grid: Level, lambdas: np.ndarray) -> np.ndarray:
    """Eq. 39 to 41, of x_hat at alpha = 1: the first step is Euler's."""
    z, last = START * grid.sigma[0], None
    for (t, s), factor in zip(pairwise(levels(grid)), lambdas, strict=True):
        newest = x_hat_of(z, t)
        moved = newest if last is None else newest + factor * (newest - last)
        z, last = z + (s.sigma - t.sigma) * (z - moved) / t.sigma, newest
    return z


def d_variant(
    combine: Callable[[list[np.ndarray], np.ndarray], np.ndarray], grid: Level, lambdas: np.ndarray
) -> np.ndarray:
    """Eq. 53 to 57, of eps: history before the first output is x_T, from then on outputs only."""
    z, outputs = START, [START]
    for k, (t, s) in enumerate(pairwise(levels(grid))):
        outputs = [eps_of(z, t), *outputs][: k + 1 if k else 2]
        moved = combine(outputs, lambdas[k])
        z = s.alpha * (z - t.sigma * moved) / t.alpha + s.sigma * moved
    return z


def sep(d: list[np.ndarray], factors: np.ndarray) -> np.ndarray:
    return (1 + factors[0]) * d[0] + factors[1] * d[1]


def all_outputs(d: list[np.ndarray], factors: np.ndarray) -> np.ndarray:
    return d[0] + sum(factor * each for factor, each in zip(factors, d, strict=False))


def two(d: list[np.ndarray], factors: np.ndarray) -> np.ndarray:
    return d[0] + sum(factor * (d[0] - each) for factor, each in zip(factors, d[1:], strict=False))


def lookahead(grid: Level, lambdas: np.ndarray) -> np.ndarray:
    """x_hat is moved, eps is not; the first step is DDIM's."""
    z, last = START, None
    for (t, s), factor in zip(pairwise(levels(grid)), lambdas, strict=True):
        x_hat, eps = x_hat_of(z, t), eps_of(z, t)
        moved = x_hat if last is None else x_hat + factor * (x_hat - last)
        z, last = s.alpha * moved + s.sigma * eps, x_hat
    return z


def d_ipndm(grid: Level, lambdas: np.ndarray) -> np.ndarray:
    """Eq. 20 to 25: lambda acts along the difference of combinations."""
    z, outputs, last = START, [], START
    for (t, s), factor in zip(pairwise(levels(grid)), lambdas, strict=True):
        outputs.insert(0, eps_of(z, t))
        d = outputs
        combined = (
            d[0] if len(d) == 1 else
            (3 * d[0] - d[1]) / 2 if len(d) == 2 else
            (23 * d[0] - 16 * d[1] + 5 * d[2]) / 12 if len(d) == 3 else
            (55 * d[0] - 59 * d[1] + 37 * d[2] - 9 * d[3]) / 24
        )  # fmt: skip
        moved = combined + factor * (combined - last)
        z, last = s.alpha * (z - t.sigma * moved) / t.alpha + s.sigma * moved, combined
    return z


def d_dpm_solver_2(grid: Level, lambdas: np.ndarray) -> np.ndarray:
    """Eq. 26 to 32: nodes half way in log-SNR."""
    z, last, of_step = START, START, levels(grid)
    for k in range(0, len(lambdas), 2):
        t, node, s = of_step[k : k + 3]
        h = (s.logsnr - t.logsnr) / 2
        first = eps_of(z, t)
        moved = first + lambdas[k] * (first - last)
        at_node = node.alpha / t.alpha * z - node.sigma * (math.exp(h / 2) - 1) * moved
        last = eps_of(at_node, node)
        moved = last + lambdas[k + 1] * (last - first)
        z = s.alpha / t.alpha * z - s.sigma * (math.exp(h) - 1) * moved
    return z


def d_dpm_solver_3(grid: Level, lambdas: np.ndarray) -> np.ndarray:
    """Three evaluations per step; the first output enters unmoved, the differences are moved."""
    z, last, of_step = START, START, levels(grid)
    for k in range(0, len(lambdas), 3):
        t, s1, s2, s = of_step[k : k + 4]
        h, h1, h2 = ((level.logsnr - t.logsnr) / 2 for level in (s, s1, s2))
        r1, r2 = h1 / h, h2 / h
        first = eps_of(z, t)
        u1 = s1.alpha / t.alpha * z - s1.sigma * math.expm1(h1) * (first + lambdas[k] * (first - last))
        second = eps_of(u1, s1)
        change = (1 + lambdas[k + 1]) * (second - first)
        u2 = s2.alpha / t.alpha * z - s2.sigma * math.expm1(h2) * first
        u2 = u2 - s2.sigma * r2 / r1 * (math.expm1(h2) / h2 - 1) * change
        last = eps_of(u2, s2)
        change = last - first + lambdas[k + 2] * (last - second)
        z = s.alpha / t.alpha * z - s.sigma * math.expm1(h) * first
        z = z - s.sigma / r2 * (math.expm1(h) / h - 1) * change
    return z


def d_edm(grid: Level, lambdas: np.ndarray, keep: bool = False) -> np.ndarray:
    """Eq. 46 to 51; the published code keeps the slope at t as it was (`keep`)."""
    z, last, k = START * grid.sigma[0], None, 0
    for t, s in pairwise(levels(grid)):
        h, first = s.sigma - t.sigma, x_hat_of(z, t)
        moved = first if last is None else first + lambdas[k] * (first - last)
        slope = (z - moved) / t.sigma
        trial = z + h * slope
        if s.sigma == 0:
            return trial
        last = x_hat_of(trial, s)
        again = (trial - last - lambdas[k + 1] * (last - first)) / s.sigma
        slope = (z - first) / t.sigma if keep else slope
        z, k = z + h * (slope + again) / 2, k + 2
    return z


NODES_2, NODES_3 = (grids.singlestep(LINEAR, [n] * 3, "logsnr") for n in (2, 3))
VE = GRIDS["VE"](5)
FROM_THE_PAPER: dict[str, tuple[Callable[..., Table], Paper, Level]] = {
    "D-DDIM": (ddim, d_ddim, GRIDS["VP"](3)),
    "D-DDIM to zero noise": (ddim, d_ddim, grids.clean_end(GRIDS["VP"](3))),
    "D-DDIM of eps at alpha = 1": (partial(ddim, output="eps"), d_ddim, GRIDS["VE"](3)),
    "D-DDIM of x_hat": (ddim, d_ddim_of_data, GRIDS["VE"](3)),
    "D-DDIM of x_hat to zero noise": (ddim, d_ddim_of_data, edm_grids.edm(4)),
    "Sep": (SOLVERS["ddim-sep"], partial(d_variant, sep), GRIDS["VP"](4)),
    "All": (SOLVERS["ddim-all"], partial(d_variant, all_outputs), GRIDS["VP"](4)),
    "D-DDIM-2": (SOLVERS["ddim-2"], partial(d_variant, two), GRIDS["VP"](4)),
    "LA-DDIM": (SOLVERS["ddim-la"], lookahead, GRIDS["VP"](4)),
    "D-iPNDM": (ipndm, d_ipndm, GRIDS["VP"](6)),
    "D-DPM-Solver-2": (partial(dpm_solver, method="singlestep"), d_dpm_solver_2, NODES_2),
    "D-DPM-Solver-3": (partial(dpm_solver, order=3, method="singlestep", plan=[3] * 3), d_dpm_solver_3, NODES_3),
    "D-EDM": (heun, d_edm, VE),
    "D-EDM to zero noise": (heun, d_edm, grids.clean_end(VE)),
    "D-EDM, published": (partial(heun, keep_slope=True), partial(d_edm, keep=True), grids.clean_end(VE)),
}


@pytest.mark.parametrize(("solver", "paper", "grid"), FROM_THE_PAPER.values(), ids=FROM_THE_PAPER)
def test_lambdas_act_as_in_the_paper(solver: Callable[..., Table], paper: Paper, grid: Level) -> None:
    table = solver(grid)
    lambdas = np.random.default_rng(1).normal(scale=0.3, size=directions(table).published.shape)
    found = run_host(table.distilled(lambdas), mixture, START)
    np.testing.assert_allclose(
        found, paper(grid, lambdas[:, 0] if lambdas.shape[1] == 1 else lambdas), rtol=1e-9, atol=1e-11
    )
    assert np.abs(found - run_host(table, mixture, START)).max() > 1e-3


def test_published_lambdas_contain_the_update() -> None:
    """sigma_s - (alpha_s/alpha_t)·sigma_t of eps, -(sigma_s - sigma_t)/sigma_t of x_hat; not those of D-DPM-Solver."""
    vp, ve = GRIDS["VP"](4), GRIDS["VE"](4)
    b = vp.sigma[1:] - vp.alpha[1:] / vp.alpha[:-1] * vp.sigma[:-1]
    for solver in (ddim, ipndm, deis):
        np.testing.assert_allclose(published(solver(vp)), b, rtol=1e-12)
    euler = -np.diff(ve.sigma) / ve.sigma[:-1]
    np.testing.assert_allclose(published(ddim(ve)), [1, *euler[1:]], rtol=1e-12)  # the first step has no direction
    both = np.stack([euler, -np.diff(ve.sigma) / (2 * ve.sigma[1:])], axis=1).ravel()
    np.testing.assert_allclose(published(heun(ve)), [1, *both[1:]], rtol=1e-12)
    for order in (1, 2, 3):
        for solver in (dpm_solver, dpm_solver_pp, partial(dpm_solver, method="singlestep")):
            np.testing.assert_array_equal(published(solver(vp, order)), 1)


def published(table: Table) -> np.ndarray:
    return directions(table).published[:, 0]


# --- order plans


@pytest.mark.parametrize(
    ("order", "nfe", "plan"),
    [
        (1, 3, [1, 1, 1]), (2, 10, [2] * 5), (2, 15, [2] * 7 + [1]), (2, 1, [1]),
        (3, 9, [3, 3, 2, 1]), (3, 10, [3, 3, 3, 1]), (3, 11, [3, 3, 3, 2]), (3, 3, [2, 1]), (3, 1, [1]), (3, 2, [2]),
    ],
)  # fmt: skip
def test_order_plans_are_those_published(order: int, nfe: int, plan: list[int]) -> None:
    assert order_plan(nfe, order) == plan
    table = dpm_solver(GRIDS["VP"](nfe), order, method="singlestep")
    assert table.nfe == nfe
    clean = grids.clean_end(GRIDS["VP"](nfe + 1))  # the step to zero noise is of order 1
    also = dpm_solver(clean, order, method="singlestep", plan=[*plan, 1])
    chex.assert_trees_all_equal(also, dpm_solver(clean, order, method="singlestep"))


@pytest.mark.parametrize("solver", [ipndm, deis, partial(deis, process=LINEAR)])
def test_a_network_told_other_levels_is_asked_there(solver: Callable[..., Table]) -> None:
    """Published iPNDM and DEIS ask one index lower: the steps stay those of the grid."""
    times = np.linspace(1, 0.01, 7)
    grid, told = LINEAR.level(times), LINEAR.level(times[:-1] - 1e-3)
    table, asked = solver(grid, told=told), []

    def constant(z: np.ndarray, level: Level, labels: Any = None) -> np.ndarray:
        """Its eps is 1/2 where it is asked."""
        asked.append(level.at(0))
        return (z - 0.5 * level.sigma[0]) / level.alpha[0]

    end = run_host(table, constant, START)
    np.testing.assert_allclose(np.transpose(asked), np.stack(told), rtol=1e-14)
    exact = grid.alpha[-1] * (START / grid.alpha[0] + 0.5 * np.subtract(*ratio(grid)[[-1, 0]]))
    np.testing.assert_allclose(end, exact, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(directions(table).reached.sigma, grid.sigma[1:])
