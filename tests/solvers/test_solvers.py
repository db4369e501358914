"""Solver tables, the engine that runs them and EDM's grids, against the closed-form flow of Gaussian data.

Orders, reductions and D-ODE directions of every solver, on the host, are in test_solver_families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import struct

from diffusion_distill.denoisers.model import Denoiser, Model
from diffusion_distill.process import edm_grids, grids, noising
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import VE, Cosine, LinearBeta
from diffusion_distill.solvers import (
    SOLVERS,
    Table,
    ablation,
    ancestral,
    ddim,
    deis,
    dpm_solver,
    dpm_solver_pp,
    engine,
    heun,
    ipndm,
    two_stage,
    unipc,
)
from diffusion_distill.solvers.dpm_solver import order_plan
from diffusion_distill.solvers.engine import run_host
from diffusion_distill.solvers.forms import X_HAT, ZERO, Form, Y, eps_hat, estimate, move, register
from diffusion_distill.solvers.general.ablation import SCALINGS, TIME_SCHEDULES
from diffusion_distill.solvers.general.runge_kutta import runge_kutta
from diffusion_distill.solvers.kinds import own_output
from diffusion_distill.solvers.table import Direction, build
from diffusion_distill.training.sharding import data_mesh, replicated, split

#: Every solver as it comes, and its variants. (The tables of DDIM's variants are DDIM's.)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in SOLVERS if name != "euler" and not name.startswith("ddim-")},
    "ancestral, small variance": ("ancestral", {"gamma": 0.0}),
    "heun, churn": ("heun", {"s_churn": 2.0, "s_noise": 1.007}),
    "deis in another schedule's time": ("deis", {"order": 4, "process": LinearBeta(t_min=0.0)}),
    "dpm_solver++, singlestep": ("dpm_solver++", {"order": 3, "method": "singlestep"}),
    "ablation, churn in VP's time": ("ablation", {"schedule": "vp", "s_churn": 2.0, "s_max": 10.0}),
}
every_solver = pytest.mark.parametrize("variant", VARIANTS)
SHAPE = (2, 2, 1)


def stages_of(variant: str) -> int:
    """Evaluations per step."""
    name, options = VARIANTS[variant]
    stages = {"heun": 2, "two_stage": 2, "ablation": 2, "midpoint": 2, "rk4": 4}
    return stages.get(name, 1) if options.get("solver") != "euler" else 1


def table_of(variant: str, steps: int, clean: bool = True, schedule: Cosine | None = None) -> Table:
    """The solver's table on a uniform grid, by default one that the solver's steps can follow."""
    name, options = VARIANTS[variant]
    grid = grids.make_grid(schedule or (Cosine() if stages_of(variant) == 1 else Cosine(-6, 9)), steps)
    return SOLVERS[name](grids.clean_end(grid) if clean else grid, **options)


@pytest.fixture(params=["rows one by one", "one scan"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways the engine runs a table."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu" if request.param == "rows one by one" else "gpu")
    return request.param


#: Every solver in one of the ways, in turn: `test_both_loops_agree` compares the ways.
every_solver_in_a_loop = pytest.mark.parametrize(
    ("variant", "loop"),
    [(variant, ("rows one by one", "one scan")[k % 2]) for k, variant in enumerate(VARIANTS)],
    indirect=["loop"],
)


class Tally:
    """A count that a traced function can raise."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, *_: Any) -> None:
        self.count += 1


class Counting(struct.PyTreeNode):
    """A denoiser that counts how often it is traced and how often it is run."""

    denoise: Any
    traces: Tally = struct.field(pytree_node=False)
    calls: Tally = struct.field(pytree_node=False)

    def __call__(self, z: Any, level: Level, labels: Any = None) -> Any:
        self.traces.add()
        jax.debug.callback(self.calls.add)
        return self.denoise(z, level, labels)


# --- the contract of every solver


@pytest.mark.fast
@every_solver
def test_nfe_is_the_number_of_network_calls_and_grids_do_not_recompile(
    variant: str, loop: str, exact: Denoiser
) -> None:
    counting = Counting(exact, Tally(), Tally())
    for calls, schedule in enumerate((Cosine(), Cosine(-9, 11), Cosine(-5, 5)), start=1):
        table = table_of(variant, 5, schedule=schedule)
        assert table.nfe == 4 * stages_of(variant) + 1
        engine.sample(jax.random.key(0), counting, table, (3, *SHAPE))
        jax.effects_barrier()
        assert counting.calls.count == calls * table.nfe
    assert counting.traces.count == 1


@pytest.mark.fast
@every_solver
def test_a_sample_does_not_depend_on_its_batch(variant: str, tiny_model: Model) -> None:
    denoise = tiny_model.denoiser(toys.parameters(tiny_model))
    table, key = table_of(variant, 4), jax.random.key(2)
    many = engine.sample(key, denoise, table, (64, *SHAPE))
    for number in (0, 17, 63):
        one = engine.sample(key, denoise, table, (1, *SHAPE), first=number)
        chex.assert_trees_all_close(one[0], many[number], rtol=0, atol=1e-5)
    assert float(jnp.std(many, axis=0).min()) > 1e-2, "samples must differ for this to mean anything"


@every_solver
def test_a_sample_does_not_depend_on_the_devices(variant: str, tiny_model: Model) -> None:
    params, table = toys.parameters(tiny_model), table_of(variant, 4)
    keys = engine.sample_keys(jax.random.key(3), np.arange(16))
    found = []
    for devices in (1, 8):
        mesh = data_mesh(jax.devices()[:devices])
        denoise = tiny_model.denoiser(jax.device_put(params, replicated(mesh)))
        own = jax.device_put(keys, split(mesh))
        start = engine.noise(own, 0, SHAPE)
        assert len(start.devices()) == devices
        drawn = engine.integrate(denoise, table, start, row_noise=None if table.deterministic else own)
        assert len(drawn.devices()) == devices
        found.append((np.asarray(start), np.asarray(drawn)))
    chex.assert_trees_all_equal(found[0][0], found[1][0])
    chex.assert_trees_all_close(found[0][1], found[1][1], rtol=0, atol=1e-5)


@every_solver_in_a_loop
def test_states_are_what_the_network_saw(variant: str, loop: str, exact: Denoiser) -> None:
    table, key = table_of(variant, 6), jax.random.key(4)
    seen = engine.sample(key, exact, table, (3, *SHAPE), states=True)
    chex.assert_shape(seen, (table.nfe + 1, 3, *SHAPE))
    keys = engine.sample_keys(key, np.arange(3))
    start = float(table.init) * engine.noise(keys, 0, SHAPE) + float(table.noise[0]) * engine.noise(keys, 1, SHAPE)
    # other programs of the compiler may round otherwise
    close = partial(chex.assert_trees_all_close, rtol=0, atol=1e-6)
    close(seen[-1], engine.sample(key, exact, table, (3, *SHAPE)))
    close(seen[0], start)
    short = jax.tree.map(lambda a: a[:4] if np.ndim(a) else a, table)
    close(seen[:4], engine.sample(key, exact, short, (3, *SHAPE), states=True)[:4])


@every_solver
def test_both_loops_agree(variant: str, exact: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    table, found = table_of(variant, 6), []  # as above, so that its programs are compiled
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        found.append(engine.sample(jax.random.key(5), exact, table, (3, *SHAPE), states=True))
    chex.assert_trees_all_close(*found, rtol=0, atol=2e-6)


@every_solver_in_a_loop
def test_recorded_noise_replaces_drawn_noise(variant: str, loop: str, exact: Denoiser) -> None:
    table, keys = table_of(variant, 6), engine.sample_keys(jax.random.key(6), np.arange(3))
    start = engine.noise(keys, 0, SHAPE)
    recorded = jnp.stack([engine.noise(keys, k + 1, SHAPE) for k in range(table.nfe)])
    from_keys = engine.integrate(exact, table, start, row_noise=keys)
    chex.assert_trees_all_close(engine.integrate(exact, table, start, row_noise=recorded), from_keys, rtol=0, atol=1e-6)
    moved = engine.integrate(exact, table, start, row_noise=recorded + 1)
    assert bool(jnp.allclose(moved, from_keys)) == table.deterministic


@pytest.mark.parametrize("variant", [name for name, (solver, _) in VARIANTS.items() if solver != "ablation"])
def test_one_step_to_zero_noise_is_the_estimate(variant: str, exact: Denoiser) -> None:
    table = table_of(variant, 1, schedule=Cosine())
    assert table.nfe == 1
    seen, drawn = engine.sample(jax.random.key(7), exact, table, (2, *SHAPE), states=True)
    level = Level(*(jnp.full(2, a[0], jnp.float32) for a in table.level))
    chex.assert_trees_all_close(drawn, exact(seen, level), rtol=0, atol=1e-6)


def test_labels_reach_the_network(loop: str) -> None:
    class Label(struct.PyTreeNode):
        def __call__(self, z: Any, level: Level, labels: Any = None) -> Any:
            return jnp.broadcast_to(labels[:, None, None, None].astype(z.dtype), z.shape)

    drawn = engine.sample(jax.random.key(0), Label(), table_of("ddim", 2), (3, *SHAPE), jnp.array([4, 0, 2]))
    chex.assert_trees_all_equal(drawn, np.broadcast_to(np.reshape([4.0, 0, 2], (3, 1, 1, 1)), (3, *SHAPE)))


# --- DDIM


@pytest.mark.fast
def test_ddim_converges_with_order_one(gaussian: toys.Gaussian, exact: Denoiser) -> None:
    start = jax.random.normal(jax.random.key(0), (64, *SHAPE))
    ends = (Cosine().level(np.float64(t)) for t in (1.0, 0.0))
    truth = gaussian.flow(np.asarray(start, np.float64), *ends)
    counts = np.array([16, 32, 64, 128, 256])
    errors = [
        float(np.sqrt(np.mean((engine.integrate(exact, table_of("ddim", n, clean=False), start) - truth) ** 2)))
        for n in counts
    ]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -1.1 < slope < -0.9, errors
    assert errors[-1] < 0.02 * gaussian.std


@pytest.mark.fast
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ddim_is_exact_for_a_single_point(steps: int) -> None:
    point = Denoiser(params=(), model=toys.Gaussian(mean=0.7, std=0.0))
    start = jax.random.normal(jax.random.key(0), (4, *SHAPE))
    first, last = (Cosine().level(np.float64(t)) for t in (1.0, 0.0))
    expected = last.alpha * 0.7 + last.sigma * (start - first.alpha * 0.7) / first.sigma
    found = engine.integrate(point, table_of("ddim", steps, clean=False), start)
    chex.assert_trees_all_close(found, expected, rtol=0, atol=5e-7)
    clean = engine.integrate(point, table_of("ddim", steps), start)
    chex.assert_trees_all_close(clean, np.full_like(clean, 0.7), rtol=1e-7)


@pytest.mark.fast
def test_ddim_for_variance_exploding_levels_is_euler() -> None:
    sigma = np.array([3.0, 2.0, 0.5, 0.0])
    table = ddim(VE(1.0).level(sigma)).plain()
    # y + (sigma_s - sigma_t)·(y - x_hat)/sigma_t
    slope = np.diff(sigma) / sigma[:-1]
    chex.assert_trees_all_close(table.weights[:, 0, :], np.stack([1 + slope, -slope], axis=1), rtol=1e-15)


@pytest.mark.fast
def test_tables_compose(exact: Denoiser) -> None:
    grid = grids.clean_end(grids.make_grid(Cosine(), 12))
    start = jax.random.normal(jax.random.key(0), (4, *SHAPE))
    whole = engine.integrate(exact, ddim(grid), start)
    first, second = ddim(grid.at(slice(None, 6))), ddim(grid.at(slice(5, None)))
    assert first.nfe + second.nfe == 12
    chex.assert_trees_all_equal(engine.integrate(exact, second, engine.integrate(exact, first, start)), whole)


# --- the ancestral sampler


@pytest.mark.fast
@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_ancestral_steps_are_draws_from_the_posterior(gamma: float, exact: Denoiser) -> None:
    grid = grids.make_grid(Cosine(-9, 9), 5)
    recorded = jax.random.normal(jax.random.key(1), (5, 3, *SHAPE))
    start = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    seen = engine.integrate(exact, ancestral(grid, gamma), start, row_noise=recorded, states=True)
    for k in range(4):
        t, s = (Level(*(jnp.full(3, a, jnp.float32) for a in grid.at(j))) for j in (k, k + 1))
        posterior = noising.posterior(seen[k], exact(seen[k], t), t, s, gamma)
        chex.assert_trees_all_close(seen[k + 1], posterior.mean + posterior.std * recorded[k + 1], rtol=1e-7, atol=3e-6)
    last = Level(*(jnp.full(3, a, jnp.float32) for a in grid.at(4)))
    chex.assert_trees_all_close(seen[-1], exact(seen[4], last), rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize(("gamma", "steps"), [(0.0, 8), (0.0, 256), (1.0, 256)])
def test_ancestral_has_the_moments_of_the_data(
    gamma: float, steps: int, gaussian: toys.Gaussian, exact: Denoiser
) -> None:
    grid = grids.clean_end(grids.make_grid(Cosine(-9, 9), steps))
    count = 40_000
    drawn = np.asarray(engine.sample(jax.random.key(8), exact, ancestral(grid, gamma), (count // 4, *SHAPE)))
    mean, variance = moments_of_ancestral(gaussian, grid, gamma)
    assert abs(drawn.mean() - mean) < 4 * np.sqrt(variance / count)
    assert abs(drawn.var() - variance) < 4 * variance * np.sqrt(2 / count)
    if steps == 256:  # many steps sample the data themselves
        assert mean == pytest.approx(gaussian.mean, abs=2e-3)
        assert variance == pytest.approx(gaussian.std**2, rel=0.06)


def moments_of_ancestral(data: toys.Gaussian, grid: Level, gamma: float) -> tuple[float, float]:
    """Mean and variance of the samples, carried through the steps by hand (every step is affine in z)."""
    mean, variance = 0.0, 1.0
    for k in range(len(grid.alpha) - 1):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = grid.at(k), grid.at(k + 1)
        gain = alpha_t * data.std**2 / (alpha_t**2 * data.std**2 + sigma_t**2)
        rest = data.mean * (1 - gain * alpha_t)  # x_hat = gain·z + rest
        keep = (alpha_t / alpha_s) * (sigma_s / sigma_t) ** 2  # z's factor in the posterior mean
        from_x = alpha_s - keep * alpha_t
        small = sigma_s**2 - keep * (alpha_t / alpha_s) * sigma_s**2
        added = small * (sigma_t / sigma_s) ** (2 * gamma) if sigma_s else 0.0
        factor = keep + from_x * gain
        mean, variance = factor * mean + from_x * rest, factor**2 * variance + added
    return mean, variance


# --- Heun's method, its relatives and churn

#: Grids on which the flow is smooth: kind -> (steps -> levels).
SMOOTH: dict[str, Callable[[int], Level]] = {
    "cosine": lambda steps: grids.make_grid(Cosine(-6, 6), steps),
    "linear beta": lambda steps: grids.make_grid(LinearBeta(t_min=0.05), steps),
    "VE": lambda steps: edm_grids.edm(steps + 1, 0.05, 20.0).at(slice(None, -1)),
}
smooth = pytest.mark.parametrize("kind", SMOOTH)


def order(table: Callable[[int], Table], end: Level, data: toys.Gaussian, counts: Sequence[int]) -> float:
    """Order of convergence to the exact flow, in float64.

    (The midpoint method, a = 1/2, happens to be of order 3 for Gaussian data.)
    """
    start, errors = np.random.default_rng(0).standard_normal((16, *SHAPE)), []
    for steps in counts:
        made = table(steps)
        truth = data.flow(made.init * start, made.level.at(0), end)
        errors.append(np.sqrt(np.mean((run_host(made, optimal(data), start) - truth) ** 2)))
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


def optimal(data: toys.Gaussian) -> Callable[..., np.ndarray]:
    """The optimal denoiser in NumPy."""
    return lambda z, level, labels=None: data.raw((), z, level, labels, None)


@pytest.mark.fast
@smooth
@pytest.mark.parametrize(
    ("solver", "expected"), [(ddim, 1), *((partial(two_stage, alpha=a), 2) for a in (0.6, 2 / 3, 1, 1.1))]
)
def test_order_of_convergence(kind: str, solver: Callable[..., Table], expected: int, gaussian: toys.Gaussian) -> None:
    end = SMOOTH[kind](2).at(-1)
    found = order(lambda steps: solver(SMOOTH[kind](steps)), end, gaussian, (32, 64, 128, 256))
    assert abs(found - expected) < 0.12


@pytest.mark.fast
@pytest.mark.parametrize("schedule", TIME_SCHEDULES)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("solver", "expected"), [("euler", 1), ("heun", 2)])
def test_order_of_the_ablation(
    schedule: str, scaling: str, solver: str, expected: int, gaussian: toys.Gaussian
) -> None:
    options: dict[str, Any] = {"alpha": 0.8} if solver == "heun" else {}
    if schedule == "vp":
        options |= {"epsilon_s": 0.05, "sigma_range": (0.05, 20.0)}
    make = lambda steps: ablation(SMOOTH["VE"](steps), schedule, scaling, solver, **options)  # noqa: E731
    end = SMOOTH["VE"](2).at(-1)
    end = Level(end.alpha, end.sigma) if scaling == "none" else Level(1 / np.hypot(1, end.sigma), np.sin(end.angle))
    assert abs(order(make, end, gaussian, (64, 128, 256, 512)) - expected) < 0.12


@pytest.mark.fast
@smooth
def test_heun_tries_a_step_of_ddim_and_shares_its_start(kind: str) -> None:
    grid = SMOOTH[kind](9)
    table, first = heun(grid).plain(), ddim(grid).plain()
    chex.assert_trees_all_close(table.weights[::2, 0, [0, 2]], first.weights[:, 0], rtol=1e-12)
    chex.assert_trees_all_close(np.stack(table.level)[:, ::2], np.stack(first.level), rtol=1e-15)
    chex.assert_trees_all_close(np.stack(table.level)[:, 1::2], np.stack(grid)[:, 1:], rtol=1e-15)
    assert table.init == pytest.approx(first.init, rel=1e-15)
    assert SOLVERS["euler"] is ddim


@pytest.mark.fast
@pytest.mark.parametrize("make", [heun, partial(two_stage, alpha=0.6), partial(heun, s_churn=3.0, s_noise=0.9)])
def test_in_vp_it_is_what_it_is_in_ve_of_z_over_alpha(make: Callable[..., Table], gaussian: toys.Gaussian) -> None:
    grid = grids.clean_end(SMOOTH["cosine"](8))
    rng = np.random.default_rng(1)
    start, row_noise = rng.standard_normal((3, *SHAPE)), rng.standard_normal((15, 3, *SHAPE))
    vp, ve = make(grid), make(Level(np.ones(9), grid.sigma / grid.alpha))
    seen = run_host(vp, optimal(gaussian), start * vp.level.alpha[0] / vp.init, row_noise=row_noise, states=True)
    also = run_host(ve, optimal(gaussian), start / ve.init, row_noise=row_noise, states=True)
    scale = np.append(vp.level.alpha, 1.0).reshape(-1, 1, 1, 1, 1)
    chex.assert_trees_all_close(seen / scale, also, rtol=1e-10)
    chex.assert_trees_all_close(vp.level.sigma / vp.level.alpha, ve.level.sigma, rtol=1e-14)


@pytest.mark.fast
@smooth
def test_a_table_of_two_levels_is_one_step(kind: str) -> None:
    """What distillation takes for a teacher's step. The weights of its two estimates are those of TRACT.md, 7."""
    grid, whole = SMOOTH[kind](6), heun(SMOOTH[kind](6)).plain()
    for k in range(6):
        step = heun(grid.at(slice(k, k + 2))).plain()
        assert step.nfe == 2 and step.deterministic
        chex.assert_trees_all_close(step.weights, whole.weights[2 * k : 2 * k + 2], rtol=1e-12)
        sigma = (grid.sigma / grid.alpha)[k : k + 2]
        weight = sigma[0] / (2 * sigma[1])
        (first, second), (to_first, _, to_second) = step.weights[0], step.weights[1][0]
        from_first, total = to_first * first[2], to_first * first[2] + to_second
        chex.assert_trees_all_close(
            np.array([from_first / total, to_second / total]), np.array([1 - weight, weight]), rtol=1e-11
        )
        assert second[0] == 1
    last = grids.clean_end(grid.at(slice(5, None)))
    chex.assert_trees_all_equal(heun(last).plain().weights[:, 0], np.array([[0, 1]]))
    assert (heun(grids.clean_end(grid)).nfe, whole.nfe) == (11, 12)


@pytest.mark.fast
@pytest.mark.parametrize("alpha", [0.5, 1.0])
@smooth
def test_second_order_steps_are_exact_for_a_single_point(kind: str, alpha: float) -> None:
    point = toys.Gaussian(mean=0.7, std=0.0)
    grid, start = SMOOTH[kind](3), np.random.default_rng(2).standard_normal((4, *SHAPE))
    first, last = grid.at(0), grid.at(-1)
    table = two_stage(grid, alpha)
    expected = last.alpha * 0.7 + last.sigma * (table.init * start - first.alpha * 0.7) / first.sigma
    chex.assert_trees_all_close(run_host(table, optimal(point), start), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (heun, {}),
        (heun, {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}),
        (partial(two_stage, alpha=1.0), {}),
        (two_stage, {"alpha": 0.7}),
    ],
)
def test_ablation_defaults_are_heun_on_edms_grid(make: Callable[..., Table], options: dict[str, Any]) -> None:
    """And Heun's method is the two-stage method whose trial lies at the end of the step."""
    grid = edm_grids.edm(18)
    chex.assert_trees_all_close(ablation(grid, **options), make(grid, **options), rtol=1e-12, atol=1e-15)


@pytest.mark.fast
def test_eulers_ablation_is_ddim() -> None:
    grid = edm_grids.edm(18)
    euler = ablation(grid, solver="euler").plain()
    chex.assert_trees_all_close(euler, ddim(grid).plain(), rtol=1e-12)
    assert (euler.nfe, ablation(grid).nfe) == (18, 35)


@pytest.mark.fast
def test_churn_raises_the_noise_where_it_should() -> None:
    churn: dict[str, Any] = {"s_churn": 3.0, "s_min": 0.1, "s_max": 30.0, "s_noise": 1.01}
    grid = edm_grids.edm(10)
    table, sigma = heun(grid, **churn), grid.sigma[:-1]
    inside = (sigma >= 0.1) & (sigma <= 30)
    assert 0 < inside.sum() < 9
    raised = np.where(inside, sigma * 1.3, sigma)  # gamma = 3/10
    chex.assert_trees_all_close(table.level.sigma[::2], raised, rtol=1e-14)
    chex.assert_trees_all_close(table.noise[::2], 1.01 * np.sqrt(raised**2 - sigma**2), rtol=1e-14)
    assert not table.noise[1::2].any()
    strongest = heun(grid, s_churn=1e3).level.sigma[::2]
    chex.assert_trees_all_close(strongest, sigma * np.sqrt(2), rtol=1e-14)
    for quiet in (heun(grid, s_churn=0.0, s_noise=2.0), heun(grid, s_churn=3.0, s_min=100.0)):
        assert quiet.deterministic
        chex.assert_trees_all_equal(quiet, heun(grid))
    levels = np.geomspace(90, 0.001, 200)
    known = heun(edm_grids.rounded(grid, levels), s_churn=3.0, known=levels).level.sigma
    assert np.abs(known[:, None] - levels).min(axis=1).max() == 0


@pytest.mark.fast
@pytest.mark.parametrize("make", [heun, partial(ablation, schedule="vp", scaling="vp", sigma_range=(0.002, 80.0))])
def test_churned_samples_have_the_moments_of_the_data(make: Callable[..., Table]) -> None:
    """Every step is affine in noise for Gaussian data, so the variance is what unit impulses of noise leave."""
    data = toys.Gaussian(mean=0.0, std=0.3)
    table = make(edm_grids.edm(300), s_churn=20.0)
    impulses = np.eye(1 + table.nfe).reshape(1 + table.nfe, 1 + table.nfe, 1, 1, 1)
    left = run_host(table, optimal(data), impulses[0], row_noise=impulses[1:])
    assert float((left**2).sum()) == pytest.approx(data.std**2, rel=0.01)
    assert abs(float(left[0, 0, 0, 0])) < 1e-3, "the start must be forgotten for this to mean anything"


@pytest.mark.fast
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_host_and_the_engine_agree(variant: str, exact: Denoiser, gaussian: toys.Gaussian) -> None:
    table, rng = table_of(variant, 5), np.random.default_rng(3)
    start, row_noise = rng.standard_normal((3, *SHAPE)), rng.standard_normal((table.nfe, 3, *SHAPE))
    on_host = run_host(table, optimal(gaussian), start, row_noise=row_noise, states=True)
    arrays = (jnp.asarray(a, jnp.float32) for a in (start, row_noise))
    on_device = engine.integrate(exact, table, next(arrays), row_noise=next(arrays), states=True)
    chex.assert_trees_all_close(on_device, on_host, rtol=0, atol=2e-5 * max(1.0, float(table.init)))


@pytest.mark.fast
@pytest.mark.parametrize("solver", [ddim, heun, ablation])
def test_sampling_of_ve_levels_starts_at_their_noise(solver: Callable[..., Table], exact: Denoiser) -> None:
    seen = engine.sample(jax.random.key(0), exact, solver(edm_grids.edm(3)), (256, *SHAPE), states=True)
    assert float(jnp.std(seen[0])) == pytest.approx(80, rel=0.1)


# --- EDM's grids


@pytest.mark.fast
@pytest.mark.parametrize("name", edm_grids.DISCRETIZATIONS)
def test_discretizations_run_from_the_most_noise_to_none(name: str) -> None:
    grid = edm_grids.discretized(name, 20, 0.01, 40.0)
    chex.assert_shape(grid.sigma, (21,))
    assert grid.sigma[-1] == 0
    assert (grid.alpha == 1).all()
    grids.check(grid)
    slack = 0.25 if name == "iddpm" else 1e-9  # its levels are given
    chex.assert_trees_all_close(grid.sigma[[0, -2]], np.array([40.0, 0.01]), rtol=slack)
    within = edm_grids.discretized(name, 20, 0.01, 40.0, within=(0.5, 3.0))
    chex.assert_trees_all_close(within.sigma[[0, -2]], np.array([3.0, 0.5]), rtol=slack)


@pytest.mark.fast
def test_shapes_of_the_discretizations() -> None:
    linear = edm_grids.edm(9, 1.0, 9.0, rho=1.0)
    chex.assert_trees_all_close(linear.sigma, np.arange(9, -1, -1), rtol=1e-14)
    geometric = edm_grids.discretized("ve", 7).sigma[:-1]
    chex.assert_trees_all_close(geometric, np.geomspace(100, 0.02, 7), rtol=1e-13)
    # exp of the integral of beta from 0 to t is 1 + sigma²: beta is linear, so second differences are constant
    growth = np.log1p(edm_grids.discretized("vp", 30, 0.01, 50.0, epsilon_s=0.02).sigma[:-1] ** 2)
    second = np.diff(growth, 2)
    chex.assert_trees_all_close(second, second[0], rtol=1e-8)
    default = edm_grids.VP_BETA.level(np.array([1.0, 1e-3]))
    chex.assert_trees_all_close(edm_grids.discretized("vp", 5).sigma[[0, -2]], default.sigma / default.alpha, rtol=1e-9)


@pytest.mark.fast
def test_iddpm_levels() -> None:
    """Without the bound c_1 the recurrence telescopes to u_j² + 1 = abar(steps) / abar(j)."""
    u = edm_grids.iddpm_sigmas(500, c_2=0.008)
    abar = np.sin(0.5 * np.pi * np.arange(501) / 500 / 1.008) ** 2
    chex.assert_trees_all_close(u[1:] ** 2 + 1, abar[-1] / abar[1:], rtol=1e-12)
    assert u[-1] == 0 and (np.diff(u) < 0).all() and u[0] == pytest.approx(np.sqrt((u[1] ** 2 + 1) / 1e-3 - 1))
    chex.assert_type(edm_grids.iddpm_sigmas(dtype=np.float32), np.float32)


@pytest.mark.fast
def test_levels_are_rounded_to_the_nearest() -> None:
    known, grid = np.array([50.0, 10.0, 1.0, 0.1, 0.0]), edm_grids.exploding(np.array([80.0, 29.0, 4.0, 0.06, 0.04]))
    chex.assert_trees_all_equal(edm_grids.rounded(grid, known).sigma, np.array([50, 10, 1, 0.1, 0, 0]))
    chex.assert_trees_all_equal(edm_grids.rounded(grid, known[:-1]).sigma, np.array([50, 10, 1, 0.1, 0.1, 0]))
    chosen = edm_grids.nearest(jnp.asarray(grid.sigma), jnp.asarray(known))
    chex.assert_trees_all_equal(chosen, np.array([0, 1, 2, 3, 4, 4]))


# --- tables


def test_registers_remember(loop: str) -> None:
    """A table of two registers: y is always x_hat of the row before the last."""

    class LevelItself(struct.PyTreeNode):
        def __call__(self, z: Any, level: Level, labels: Any = None) -> Any:
            return z * 0 + level.expand(z).sigma

    sigma = np.array([0.9, 0.5, 0.3, 0.1])
    table = build(
        Level(np.ones(4), sigma),
        [{"y": {"memory": 1.0}, "memory": {"x_hat": 1.0}}] * 3 + [{"y": {"y": 2.0, "memory": -1.0}}],
        registers=("y", "memory"),
        init=3.0,
    )
    chex.assert_shape(table.weights, (4, 2, 3))
    assert table.deterministic
    seen = engine.integrate(LevelItself(), table, jnp.ones((1, 1, 1, 1)), states=True)
    chex.assert_trees_all_close(np.ravel(seen), np.array([3, 3, 0.9, 0.5, 2 * 0.5 - 0.3]), rtol=1e-6)


@pytest.mark.fast
def test_memories_that_never_reach_y_are_dropped(loop: str, exact: Denoiser, gaussian: toys.Gaussian) -> None:
    """One that is read by itself only, one that only the other reads, and a chain of two that ends in y."""
    grid, a, b, dead = GRID, register("a"), register("b"), register("dead")
    row = {"y": 0.5 * Y + 0.3 * b + 0.1 * X_HAT, "b": a, "a": X_HAT, "dead": dead + X_HAT, "fed": dead + Y}
    names = ("y", "dead", "a", "fed", "b")
    table = build(grid.at(slice(0, 4)), [row] * 4, registers=names)
    chex.assert_shape(table.weights, (4, 5, 6))
    chex.assert_shape(table.plain().weights, (4, 3, 4))
    chex.assert_trees_all_equal(table.plain().plain(), table.plain())
    start = np.random.default_rng(0).standard_normal((2, *SHAPE))
    whole = run_host(table, optimal(gaussian), start, states=True)
    chex.assert_trees_all_close(run_host(table.plain(), optimal(gaussian), start, states=True), whole, rtol=1e-14)
    on_device = engine.integrate(exact, table, jnp.asarray(start, jnp.float32), states=True)
    chex.assert_trees_all_close(on_device, whole, rtol=1e-7, atol=2e-6)
    # what a direction alone reads is kept where lambda is not 0
    along = [[Direction(dead - X_HAT, 0.5)], [], [Direction(Y - X_HAT, 1.0), Direction(dead, 2.0)], []]
    table = build(grid.at(slice(0, 4)), [row] * 4, registers=names, directions=along, path=grid)
    assert table.directions is not None
    chex.assert_shape(table.directions.weights, (4, 2, 6))
    chex.assert_trees_all_equal(table.directions.published, np.array([[0.5, 1], [1, 1], [1, 2], [1, 1]]))
    for where, registers in (((0, 0), 4), ((2, 0), 3), ((2, 1), 4), ((0, 1), 3), ((3, 0), 3)):
        lambdas = np.zeros((4, 2))
        lambdas[where] = 1.0
        chex.assert_shape(table.distilled(lambdas).weights, (4, registers, registers + 1))
    moved = table.distilled([[0.0, 0.0], [0.0, 0.0], [0.25, 0.0], [0.0, 0.0]])  # type: ignore[arg-type]
    chex.assert_trees_all_close(moved.weights[2, 0], np.array([0.5 + 0.25, 0.0, 0.3, 0.1 - 0.25]), rtol=1e-14)


@pytest.mark.fast
def test_linear_forms_are_linear() -> None:
    rng = np.random.default_rng(0)
    values: dict[str, float] = dict(zip(("y", "x_hat", "last"), rng.normal(size=3).tolist(), strict=True))

    def value(form: Form) -> float:
        return sum(factor * values[name] for name, factor in form.items())

    last = register("last")
    one, two = 0.3 * Y - last / 0.7, X_HAT * 2.0 + Y
    assert value(one) == pytest.approx(0.3 * values["y"] - values["last"] / 0.7)
    assert value(one + two) == pytest.approx(value(one) + value(two))
    assert value(two - one) == pytest.approx(value(two) - value(one))
    assert value(one * -1.5) == value(-1.5 * one) == pytest.approx(-1.5 * value(one))
    assert value(one / 4) == pytest.approx(value(one) / 4)
    assert sum([one, two], ZERO) == one + two == two + one
    assert ZERO == {} and one == {"y": 0.3, "last": -1 / 0.7}, "forms are left as they are"
    for t, s in ((GRID.at(1), GRID.at(3)), (Level(1.0, 3.0), Level(1.0, 0.0)), (GRID.at(2), Level(1.0, 0.0))):
        z, x_hat = values["y"], values["x_hat"]
        eps = (z - t.alpha * x_hat) / t.sigma
        assert value(eps_hat(t)) == value(estimate("eps", t)) == pytest.approx(eps)
        assert value(estimate("x_hat", t)) == x_hat
        for output in ("eps", "x_hat"):
            there = s.alpha * x_hat + s.sigma * eps
            assert value(move(t, s, output, estimate(output, t))) == pytest.approx(there)
    assert (own_output(GRID, None), own_output(edm_grids.edm(3), None), own_output(GRID, "x_hat")) == (
        "eps",
        "x_hat",
        "x_hat",
    )


GRID = grids.make_grid(Cosine(), 4)
CLEAN = grids.clean_end(GRID)
TWO = GRID.at(slice(0, 2))
ITSELF = lambda z, level, labels=None: z  # noqa: E731
MIXED = Level(np.array([0.5, 0.6, 0.7]), np.array([2.0, 1.0, 0.5]))
#: For both solvers: what is wrong, with which options, and what is said.
DPM_SOLVERS_ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("order 4", {"order": 4}, r"orders 1, 2 and 3, got order=4"),
    ("order 0", {"order": 0}, r"orders 1, 2 and 3, got order=0"),
    ("an unknown method", {"method": "single"}, r"method of DPM-Solver 'single'.*singlestep"),
    ("an unknown kind", {"kind": "heun"}, r"kind .* must be one of \('dpmsolver', 'taylor'\), got 'heun'"),
    ("a plan of multistep", {"plan": [2, 2]}, r"plan of orders is for method='singlestep', got plan=\[2, 2\]"),
    ("a plan too long", {"method": "singlestep", "plan": [2, 3]}, r"plan \[2, 3\] .* sum to the grid's 4"),
    ("no plan", {"method": "singlestep", "plan": []}, r"plan \[\] must be of orders 1 to 3"),
    ("a plan of order 4", {"method": "singlestep", "plan": [4]}, r"plan \[4\] must be of orders 1 to 3"),
]  # fmt: skip
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "an unknown register": (lambda: build(TWO, [{"y": {"y": 1}}, {"m": {"y": 1}}]), r"Row 1 sets 'm'.*registers:.*y"),
    "an unknown term": (lambda: build(TWO, [{"y": {"eps": 1}}] * 2), r"Row 0 .*\['eps'\].*x_hat"),
    "writing to x_hat": (lambda: build(TWO, [{"x_hat": {"y": 1}}] * 2), r"sets 'x_hat'"),
    "a direction from an unknown register": (
        lambda: build(TWO, [{}] * 2, directions=[[Direction({"m": 1.0}, 1.0)], []], path=GRID.at(slice(0, 3))),
        r"Row 0 has a direction from \['m'\]; registers:.*'x_hat', 'y'"),
    "lambdas without directions": (lambda: ancestral(GRID).distilled(np.zeros((4, 1))), r"no directions.*no D-ODE"),
    "lambdas of a plain table": (lambda: ddim(GRID).plain().distilled(np.zeros((4, 1))), r"no directions"),
    "too few lambdas": (lambda: ddim(GRID).distilled(np.zeros((3, 1))), r"shape \(4, 1\).*got \(3, 1\)"),
    "lambdas without an axis": (lambda: ddim(GRID).distilled(np.zeros(4)), r"shape \(4, 1\).*got \(4,\)"),
    "an unknown output": (lambda: ddim(GRID, "v"), r"'eps' or 'x_hat'.*got 'v'"),
    "an unknown output of UniPC": (lambda: unipc(GRID, output="x"), r"'eps' or 'x_hat'.*got 'x'"),
    "iPNDM of order 0": (lambda: ipndm(GRID, 0), r"1 to 4 outputs, got order=0"),
    "iPNDM of order 5": (lambda: ipndm(GRID, 5), r"1 to 4 outputs, got order=5"),
    "too many levels told": (lambda: ipndm(GRID, told=GRID), r"one level per step, 4 of them; got \(5,\)"),
    "DEIS of order 0": (lambda: deis(GRID, 0), r"DEIS.*at least 1, got 0"),
    "an unknown quadrature": (lambda: deis(GRID, quadrature="right"), r"quadrature 'right'.*'?left'?"),
    "published sums without a rate": (
        lambda: deis(GRID, process=Cosine(), quadrature="left"), r"'left' sums .* a process with a rate, got Cosine"),
    **{
        f"{what} of {name}": (lambda s=solver, o=options: s(GRID, **o), said)
        for name, solver in (("DPM-Solver", dpm_solver), ("DPM-Solver++", dpm_solver_pp))
        for what, options, said in DPM_SOLVERS_ERRORS
    },
    "a plan of order 2 to zero noise": (
        lambda: dpm_solver(CLEAN, method="singlestep", plan=[2, 2]), r"plan \[2, 2\] .*order 1 for a step to zero"),
    "a plan of no evaluations": (lambda: order_plan(0, 2), r"number of evaluations must be .*at least 1, got 0"),
    "UniPC of order 0": (lambda: unipc(GRID, 0), r"UniPC must be .*at least 1, got 0"),
    "an unknown variant of UniPC": (lambda: unipc(GRID, variant="bh3"), r"one of \('bh1', 'bh2'\), got 'bh3'"),
    "a correction at zero noise": (lambda: unipc(CLEAN, correct_final=True), r"zero noise cannot be corrected.*leave"),
    "an unknown place of a trial": (lambda: two_stage(GRID, trial="lin"), r"place of a trial 'lin'.*Known: log, sigma"),
    "too few levels": (lambda: build(TWO, [{}] * 3), r"3 rows needs as many levels, got \(2,\)"),
    "gamma above 1": (lambda: ancestral(GRID, 1.5), r"gamma must be in \[0, 1\].*got 1.5"),
    "gamma below 0": (lambda: ancestral(GRID, -0.1), r"gamma must be in \[0, 1\].*got -0.1"),
    "gamma not a number": (lambda: ancestral(GRID, float("nan")), r"got nan"),
    **{
        f"a rising grid for {name}": (lambda s=solver: s(GRID.at(slice(None, None, -1))), "must decrease in noise")
        for name, solver in SOLVERS.items()
    },
    "a trial at the start": (lambda: two_stage(GRID, 0.0), r"alpha.*above 0.*got 0.0"),
    "a trial beyond zero noise": (lambda: two_stage(GRID, 1.5), r"alpha=1.5 a trial passes zero noise"),
    "negative churn": (lambda: heun(GRID, s_churn=-1.0), r"s_churn >= 0.*s_churn=-1.0"),
    "an empty window of churn": (lambda: heun(GRID, s_churn=1.0, s_min=2.0, s_max=1.0), r"s_min <= s_max.*s_min=2.0"),
    "levels between levels of no kind": (lambda: two_stage(MIXED), r"neither: give the process"),
    "levels between levels of no kind, rk4": (lambda: SOLVERS["rk4"](MIXED), r"neither: give the process"),
    "an unknown tableau": (lambda: runge_kutta(GRID, "rk5"), r"Runge–Kutta tableau 'rk5'.*midpoint, rk4"),
    "an unknown schedule": (lambda: ablation(GRID, "cosine"), r"schedule of the ablation 'cosine'.*linear, ve, vp"),
    "an unknown scaling": (lambda: ablation(GRID, scaling="ve"), r"scaling of the ablation 've'.*none, vp"),
    "an unknown solver": (lambda: ablation(GRID, solver="rk4"), r"solver of the ablation 'rk4'.*euler, heun"),
    "an unknown discretization": (lambda: edm_grids.discretized("ddpm", 5), r"discretization 'ddpm'.*'iddpm'"),
    "one step from sigma_max to sigma_min": (lambda: edm_grids.discretized("ve", 1), r"at least 2 steps, got 1"),
    "no range": (lambda: edm_grids.sigma_range("edm", within=(90.0, 99.0)), r"sigma_min < sigma_max.*got 90 and 80"),
    "a range without room": (lambda: edm_grids.fitted_beta(2.0, 1.0), r"sigma_min < sigma_max.*got 2, 1"),
    "no noise on the host": (lambda: run_host(ancestral(GRID), ITSELF, np.zeros((1, 1))), r"one per row.*None"),
    "no samples": (
        lambda: engine.sample(jax.random.key(0), ITSELF, ddim(GRID), (0, 2, 2, 1)),
        r"number of samples must be .*at least 1, got 0",
    ),
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_told_what_it_is_and_what_is_allowed(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_noise_of_the_wrong_number_of_rows_is_refused(loop: str, exact: Denoiser) -> None:
    start = jnp.zeros((2, *SHAPE))
    with pytest.raises(ValueError, match=r"4.*3"):
        engine.integrate(exact, table_of("ancestral", 4), start, row_noise=jnp.zeros((3, 2, *SHAPE)))
