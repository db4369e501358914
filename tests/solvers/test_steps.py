"""Single solver steps: their orders on exact flows, the tables' numbers, with and without jit and over devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_solver_families as families
import toys
from absl.testing import parameterized

import diffusion_distill as dd
from diffusion_distill.base.arrays import enable_x64
from diffusion_distill.denoisers.model import Denoiser
from diffusion_distill.process import grids
from diffusion_distill.process.flow import RectifiedFlow
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import VE, Cosine
from diffusion_distill.solvers import SOLVERS, Table, engine, tabulate
from diffusion_distill.solvers.engine import run_host
from diffusion_distill.solvers.general.runge_kutta import TABLEAUX, runge_kutta
from diffusion_distill.training.sharding import data_mesh, split

pytestmark = pytest.mark.fast

#: name -> (step, its order, its network calls)
STEPS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "ddim": (dd.ddim_step, 1, 1),
    "heun": (dd.heun_step, 2, 2),
    "midpoint": (dd.midpoint_step, 2, 2),
    "rk4": (dd.rk4_step, 4, 4),
}
every_step = pytest.mark.parametrize("name", STEPS)
GAUSSIAN = toys.Gaussian(mean=0.2, std=0.3)
EXACT = Denoiser(params=(), model=GAUSSIAN)  # type: ignore[arg-type]
CURVED = Denoiser(params=(), model=toys.Curved())
#: From most noise to little, [9]: the steps that tables and single steps are compared on.
GRIDS = {
    "VP": grids.make_grid(Cosine(-7, 7), 8),
    "VE": VE(1.0).level(np.geomspace(20.0, 0.05, 9)),
}
every_kind = pytest.mark.parametrize("kind", GRIDS)
SHAPE = (2, 2, 1)


def unit_noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *SHAPE)).astype(np.float32)


def in_float64() -> AbstractContextManager[Any]:
    return enable_x64(True)


def on_device(level: Level) -> Level:
    return Level(*map(jnp.asarray, level))


def walk(name: str, denoise: Any, z: Any, grid: Level, place: Callable[[Level], Level] = lambda level: level) -> Any:
    """Single steps through a grid [steps + 1] or [steps + 1, batch]."""
    for k in range(len(grid.sigma) - 1):
        z = STEPS[name][0](denoise, z, place(grid.at(k)), place(grid.at(k + 1)))
    return z


# --- orders


@every_kind
@every_step
@pytest.mark.parametrize("place", [lambda level: level, on_device], ids=["levels on the host", "levels on the device"])
def test_order_on_gaussian_data_with_levels_of_their_own(name: str, kind: str, place: Callable[[Level], Level]) -> None:
    """Half the step, 2**order of the error, sample by sample, against the closed flow, in float64."""
    first, last = {"VP": ([2.0, 0.8, 0.5], [0.4, 1.0, 0.1]), "VE": ([2.0, 0.9, 0.3], [0.4, 1.5, 0.1])}[
        kind
    ]  # one rises
    alpha = (lambda tau: 1 / np.hypot(1, tau)) if kind == "VP" else np.ones_like
    z, errors = np.float64(unit_noise(3)), []
    with in_float64():
        for steps in (16, 32):
            tau = np.linspace(first, last, steps + 1)
            grid = Level(alpha(tau), alpha(tau) * tau)
            found = walk(name, EXACT, z, grid, place)
            chex.assert_type(found, jnp.float64)
            expected = GAUSSIAN.flow(z, grid.at(0).expand(z), grid.at(-1).expand(z))
            errors.append(np.abs(found - expected).max(axis=(1, 2, 3)))
    order = 3 if name == "midpoint" else STEPS[name][1]  # its term of order 2 vanishes on these data
    chex.assert_trees_all_close(np.log2(errors[0] / errors[1]), np.full(3, float(order)), rtol=0, atol=0.3)
    assert errors[1].max() < 0.02


@every_kind
@every_step
def test_order_on_a_mixture(name: str, kind: str) -> None:
    """Against the recorded end of the exact flow (DOP853 at 1e-12) of test_solver_families.py."""
    errors = []
    for steps in (96, 192):
        grid = families.GRIDS[kind](steps)
        table = SOLVERS[name](grid)
        with in_float64():
            z = np.asarray(walk(name, mixture, table.init * np.float64(families.START), grid))
        errors.append(np.sqrt(np.mean((z - families.ENDS[kind]) ** 2)))
    assert abs(math.log2(errors[0] / errors[1]) - STEPS[name][1]) < 0.3, errors
    assert errors[1] < 0.02


def mixture(z: Any, level: Level, labels: Any = None) -> Any:
    """The optimal denoiser of test_solver_families.py, for JAX."""
    alpha, sigma = (a.reshape(-1, *[1] * families.MEANS.ndim) for a in level)
    means, stds, weights = families.MEANS[None], families.STDS[None], families.WEIGHTS[None]
    variance, off = alpha**2 * stds**2 + sigma**2, z[:, None] - alpha * means
    log_p = jnp.log(weights) - 0.5 * (off**2 / variance + jnp.log(variance)).sum(axis=(2, 3, 4))
    share = jax.nn.softmax(log_p, axis=1).reshape(*log_p.shape, 1, 1, 1)
    return (share * (means + alpha * stds**2 / variance * off)).sum(axis=1)


# --- the same numbers as the tables


@every_kind
@every_step
@pytest.mark.parametrize("clean", [False, True], ids=["noisy end", "clean end"])
@pytest.mark.parametrize("place", [lambda level: level, on_device], ids=["levels on the host", "levels on the device"])
def test_steps_are_the_tables_steps(name: str, kind: str, clean: bool, place: Callable[[Level], Level]) -> None:
    grid = grids.clean_end(GRIDS[kind]) if clean else GRIDS[kind]
    table, start = SOLVERS[name](grid), unit_noise(3)
    found = walk(name, CURVED, table.init * start, grid, place)
    chex.assert_shape(found, start.shape)
    chex.assert_type(found, jnp.float32)
    chex.assert_trees_all_close(found, engine.integrate(CURVED, table, start), rtol=2e-5, atol=2e-5)
    assert table.nfe == 8 * STEPS[name][2] - clean * (STEPS[name][2] - 1)


def curved(z: np.ndarray, level: Level, labels: Any = None) -> np.ndarray:
    return toys.Curved().raw((), z, level, None, None)


@pytest.mark.parametrize("steps", [1, 1024, 1025])
def test_as_many_steps_as_one_likes_run_in_the_engine(steps: int) -> None:
    """On CPUs tables have room for a multiple of 1024 rows, and what is beyond their own never runs."""
    table, start = SOLVERS["ddim"](grids.make_grid(Cosine(-7, 7), steps)), unit_noise(3)
    found = engine.integrate(CURVED, table, start)
    chex.assert_trees_all_close(found, run_host(table, curved, start).astype(np.float32), rtol=1e-5, atol=1e-5)


def test_tables_of_all_lengths_share_one_program() -> None:
    """A program for each number of steps would compile a network again and again."""
    start = jnp.asarray(unit_noise(3))
    run = lambda steps: engine.integrate(CURVED, SOLVERS["ddim"](grids.make_grid(Cosine(-7, 7), steps)), start)  # noqa: E731
    run(3)
    programs = engine._jitted_row._cache_size()  # type: ignore[attr-defined]
    run(7)
    assert engine._jitted_row._cache_size() == programs  # type: ignore[attr-defined]


@every_kind
@pytest.mark.parametrize(
    ("tableau", "same"),
    [("euler", SOLVERS["ddim"]), ("heun", SOLVERS["heun"]), ("midpoint", SOLVERS["two_stage"])],
)
def test_tableaux_are_the_solvers_of_their_names(tableau: str, same: Callable[[Level], Table], kind: str) -> None:
    for grid in (GRIDS[kind], grids.clean_end(GRIDS[kind])):
        found, expected = runge_kutta(grid, tableau).plain(), same(grid).plain()
        chex.assert_trees_all_close(found.level, expected.level, rtol=1e-13)
        ends = [run_host(table, curved, np.float64(unit_noise(3))) for table in (found, expected)]
        chex.assert_trees_all_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tableau", TABLEAUX)
def test_conditions_of_order(tableau: str) -> None:
    """Butcher's, up to the method's own order: 1, 2, 4."""
    rows = TABLEAUX[tableau]
    n = len(rows) - 1
    a, b = np.array([[*row, *[0.0] * (n - len(row))] for row in rows[:-1]]), np.array(rows[-1])
    c = a.sum(axis=1)
    conditions = {
        1: [(b.sum(), 1)],
        2: [(b @ c, 1 / 2)],
        3: [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
        4: [(b @ c**3, 1 / 4), (b @ (c * (a @ c)), 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)],
    }
    for order in range(1, {"euler": 1, "rk4": 4}.get(tableau, 2) + 1):
        found, expected = np.array(conditions[order]).T
        chex.assert_trees_all_close(found, expected, rtol=1e-15)


@every_step
def test_a_step_in_vp_is_the_step_in_ve_of_z_over_alpha(name: str) -> None:
    z, (start, end) = unit_noise(3), (Cosine().level(t) for t in (0.7, 0.4))

    def as_exploding(y: Any, level: Level, labels: Any = None) -> Any:
        alpha = 1 / jnp.hypot(1, level.sigma)
        return CURVED(alpha[:, None, None, None] * y, Level(alpha, alpha * level.sigma))

    ve = [Level(1.0, level.sigma / level.alpha) for level in (start, end)]
    found = STEPS[name][0](CURVED, z, start, end) / end.alpha
    chex.assert_trees_all_close(found, STEPS[name][0](as_exploding, z / start.alpha, *ve), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_any_levels_will_do_where_none_is_needed_between(name: str) -> None:
    """Levels alpha + sigma = 1 (rectified flows): in z/alpha they are those of VE."""
    z, start, end = unit_noise(3), Level(0.4, 0.6), Level(0.7, 0.3)

    def as_exploding(y: Any, level: Level, labels: Any = None) -> Any:
        alpha = 1 / (1 + level.sigma)
        return CURVED(alpha[:, None, None, None] * y, Level(alpha, alpha * level.sigma))

    ve = [Level(1.0, level.sigma / level.alpha) for level in (start, end)]
    found = STEPS[name][0](CURVED, z, start, end) / end.alpha
    chex.assert_trees_all_close(found, STEPS[name][0](as_exploding, z / start.alpha, *ve), rtol=2e-5, atol=2e-5)


@every_step
def test_digits_are_kept_where_there_is_hardly_any_signal(name: str) -> None:
    """From alpha = 5e-5 down in one step: float32 with levels on the host, and on the device, against float64."""
    start, end = (Cosine().level(t) for t in (1.0, 0.6))
    z = unit_noise(8)
    with in_float64():
        exact = np.asarray(STEPS[name][0](EXACT, np.float64(z), start, end))
    scale = np.abs(exact).max()
    chex.assert_trees_all_close(STEPS[name][0](EXACT, z, start, end) / scale, exact / scale, rtol=0, atol=1e-5)
    found = STEPS[name][0](EXACT, z, *map(on_device, (start, end)))
    chex.assert_trees_all_close(found / scale, exact / scale, rtol=0, atol=1e-5)


# --- zero noise, no step, and up again


@every_kind
@every_step
def test_a_step_to_zero_noise_is_x_hat_for_the_samples_that_take_it(name: str, kind: str) -> None:
    z, start = unit_noise(3), GRIDS[kind].at(np.array([2, 3, 4]))
    end = Level(*(np.array([clean, noisy, clean]) for clean, noisy in zip((1.0, 0.0), GRIDS[kind].at(5), strict=True)))
    x_hat = jax.jit(CURVED)(z, on_device(start))
    for place in (lambda level: level, on_device):
        found = STEPS[name][0](CURVED, z, place(start), place(end))
        chex.assert_tree_all_finite(found)
        chex.assert_trees_all_close(found[::2], x_hat[::2], rtol=0, atol=2e-7)
        alone = STEPS[name][0](CURVED, z[1:2], place(start.at(slice(1, 2))), place(end.at(slice(1, 2))))
        chex.assert_trees_all_close(found[1:2], alone, rtol=0, atol=1e-6)


@every_step
def test_no_step_stays(name: str) -> None:
    z, level = unit_noise(3), GRIDS["VP"].at(4)
    chex.assert_trees_all_close(STEPS[name][0](CURVED, z, level, level), jnp.asarray(z), rtol=0, atol=1e-6)


@every_kind
def test_up_and_down_again(kind: str) -> None:
    grid = GRIDS[kind]
    fine = Level(*(np.interp(np.arange(2, 4.01, 1 / 16), np.arange(9), a) for a in grid))
    if kind == "VP":
        fine = Level(*(a / np.hypot(*fine) for a in fine))
    z = np.float64(unit_noise(3))
    with in_float64():
        down = np.asarray(walk("rk4", CURVED, z, fine))
        up = np.asarray(walk("rk4", CURVED, down, fine.at(slice(None, None, -1))))
    assert np.abs(down - z).max() > 0.05
    chex.assert_trees_all_close(up, z, rtol=0, atol=1e-5)


# --- as JAX functions


class Variants(chex.TestCase):
    """The same end with and without jit, from NumPy and from device arrays, and on several devices."""

    @chex.all_variants
    @parameterized.named_parameters(*((name, name) for name in STEPS))
    def test_value_and_shape(self, name: str) -> None:
        z, levels = unit_noise(2), [Level(*(np.full(2, a, np.float32) for a in GRIDS["VP"].at(k))) for k in (4, 5)]
        step = self.variant(partial(STEPS[name][0], CURVED))
        found = step(z, *levels)
        chex.assert_shape(found, z.shape)
        chex.assert_type(found, jnp.float32)
        expected = run_host(SOLVERS[name](GRIDS["VP"].at(slice(4, 6))), curved, z)
        chex.assert_trees_all_close(found, np.float32(expected), rtol=1e-5, atol=2e-6)

    @chex.all_variants(with_pmap=False)  # type: ignore[call-arg]
    @parameterized.named_parameters(*((name, name) for name in STEPS))
    def test_gradient(self, name: str) -> None:
        """Of Gaussian data a step is affine in z, so its slope is that between any two points."""
        start, end = (Level(*(np.full(2, a, np.float32) for a in GRIDS["VP"].at(k))) for k in (4, 5))
        step = partial(STEPS[name][0], EXACT)
        z = unit_noise(2)
        slope = self.variant(jax.grad(lambda z, start, end: step(z, start, end).sum()))(z, start, end)
        chex.assert_equal_shape([slope, z])
        chex.assert_trees_all_close(slope, step(z + 1, start, end) - step(z, start, end), rtol=1e-4, atol=1e-5)


@every_step
def test_gradients_are_finite_down_to_zero_noise_and_for_levels_too(name: str) -> None:
    z, start = unit_noise(2), on_device(GRIDS["VP"].at(np.array([3, 4])))
    end = Level(jnp.array([1.0, 0.9]), jnp.array([0.0, math.sqrt(0.19)]))
    loss = lambda z, start, end: (STEPS[name][0](CURVED, z, start, end) ** 2).sum()  # noqa: E731
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(z, start, end)
    chex.assert_trees_all_equal_shapes(found, (z, start, end))
    chex.assert_tree_all_finite(found)
    assert np.abs(found[0]).min(axis=(1, 2, 3)).max() > 0


@every_step
@pytest.mark.parametrize("place", [lambda level: level, on_device], ids=["levels on the host", "levels on the device"])
def test_other_levels_do_not_recompile_and_calls_are_as_documented(name: str, place: Callable[[Level], Level]) -> None:
    calls = []

    def counted(z: Any, level: Level, labels: Any = None) -> Any:
        chex.assert_shape(level, (2,))
        calls.append(labels)
        return CURVED(z, level) + 0.01 * labels[:, None, None, None]

    z, labels = unit_noise(2), np.arange(2, dtype=np.int32)
    for k in range(8):
        STEPS[name][0](counted, z, place(GRIDS["VP"].at(k)), place(GRIDS["VP"].at(k + 1)), labels)
    assert len(calls) == STEPS[name][2]


@every_step
def test_devices_do_not_matter(name: str) -> None:
    start, end = (GRIDS["VP"].at(np.arange(8) // 2 + k) for k in (1, 2))
    z = unit_noise(8)
    spread = jax.device_put(z, split(data_mesh()))
    found = STEPS[name][0](CURVED, spread, start, end)
    chex.assert_devices_available(8, "cpu")
    assert len(found.devices()) == 8
    chex.assert_trees_all_close(np.asarray(found), STEPS[name][0](CURVED, z, start, end), rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", [jnp.bfloat16, jnp.float32, jnp.int32])
def test_images_are_float32_under_every_switch(given: Any) -> None:
    z, (start, end) = jnp.ones((2, *SHAPE), given), (GRIDS["VP"].at(k) for k in (4, 5))
    with in_float64(), jax.numpy_dtype_promotion("strict"):
        for step in (dd.ddim_step, dd.midpoint_step):
            chex.assert_type(step(half, z, start, end), jnp.float32)
            chex.assert_type(step(half, z, *map(on_device, (start, end))), jnp.float32)


def half(z: Any, level: Level, labels: Any = None) -> Any:
    return 0.5 * z


# --- errors


Z = np.zeros((2, *SHAPE), np.float32)
GOOD = Level(0.6, 0.8)
BAD = {
    "no noise at the start": (dd.ddim_step, Level(1.0, 0.0), GOOD, r"sigma > 0 at its start; got.*\(1\.0, 0\.0\)"),
    "infinite noise": (dd.ddim_step, GOOD, Level(1.0, math.inf), r"finite levels.*inf"),
    "negative noise": (dd.rk4_step, GOOD, Level(1.0, -0.1), r"sigma >= 0.*-0\.1"),
    "no signal": (dd.heun_step, Level(0.0, 1.0), GOOD, r"alpha > 0 \(ddim_step takes 0 too\)"),
    "one level too many": (dd.ddim_step, Level(np.ones(3), np.ones(3)), GOOD, r"'start'.*\(3,\).*scalars or \(2,\)"),
    "levels of images": (dd.heun_step, GOOD, Level(Z + 1, Z + 1), r"'end'.*\(2, 2, 2, 1\).*scalars or \(2,\)"),
    "no kind of level": (dd.midpoint_step, Level(0.4, 0.6), Level(0.7, 0.3), r"these are neither: give the process"),
    "no kind of level, rk4": (dd.rk4_step, Level(0.4, 0.6), Level(0.7, 0.3), r"these are neither: give the process"),
}


@pytest.mark.parametrize(("step", "start", "end", "said"), BAD.values(), ids=BAD)
def test_levels_between_which_there_is_no_step(step: Any, start: Level, end: Level, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        step(EXACT, Z, start, end)


@pytest.mark.parametrize("name", ["midpoint", "rk4"])
@pytest.mark.parametrize("place", [lambda level: level, on_device], ids=["levels on the host", "levels on the device"])
def test_a_process_says_where_levels_between_are(name: str, place: Callable[[Level], Level]) -> None:
    """A rectified flow's, in one step as in the solver's table."""
    flow, z = RectifiedFlow(), unit_noise(3)
    grid = flow.level(np.array([0.6, 0.3]))
    table = tabulate(name, grid, flow)
    found = STEPS[name][0](CURVED, z, place(grid.at(0)), place(grid.at(1)), process=flow)
    expected = run_host(table, curved, np.float64(z) / table.init)
    chex.assert_trees_all_close(found, np.float32(expected), rtol=1e-5, atol=2e-6)


def test_levels_of_no_kind_give_nan_where_they_are_traced() -> None:
    found = dd.midpoint_step(EXACT, Z, Level(jnp.array([0.4, 0.6]), jnp.array([0.6, 0.8])), on_device(Level(0.8, 0.6)))
    assert np.isnan(found[0]).all()
    chex.assert_tree_all_finite(found[1])


def test_from_no_signal_ddim_steps() -> None:
    z = unit_noise(2)
    found = dd.ddim_step(EXACT, z, Level(0.0, 1.0), GOOD)
    chex.assert_trees_all_close(found, 0.8 * z + 0.6 * 0.2, rtol=1e-6, atol=1e-6)  # all that is known of x is its mean
