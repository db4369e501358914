"""Solver tables and the engine that runs them, against the closed-form flow of Gaussian data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import struct

from diffusion_distill import sampling
from diffusion_distill.diffusion import forward, grids
from diffusion_distill.diffusion.schedules import Cosine, VarianceExploding
from diffusion_distill.levels import Level
from diffusion_distill.model import Denoiser, Model
from diffusion_distill.solvers import SOLVERS, Table, ancestral, ddim
from diffusion_distill.solvers.table import build
from diffusion_distill.training.sharding import data_mesh, replicated, split

#: Every solver as it comes, and its variants.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in SOLVERS},
    "ancestral, small variance": ("ancestral", {"gamma": 0.0}),
}
every_solver = pytest.mark.parametrize("variant", VARIANTS)
SHAPE = (2, 2, 1)


def table_of(variant: str, steps: int, clean: bool = True, schedule: Cosine | None = None) -> Table:
    """The solver's table on a uniform grid."""
    name, options = VARIANTS[variant]
    grid = grids.uniform(schedule or Cosine(), steps)
    return SOLVERS[name](grids.clean_end(grid) if clean else grid, **options)


@pytest.fixture(params=["rows one by one", "one scan"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways the engine runs a table."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu" if request.param == "rows one by one" else "gpu")
    return request.param


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
        assert table.nfe == 5
        sampling.sample(jax.random.key(0), counting, table, (3, *SHAPE))
        jax.effects_barrier()
        assert counting.calls.count == calls * table.nfe
    assert counting.traces.count == 1


@pytest.mark.fast
@every_solver
def test_a_sample_does_not_depend_on_its_batch(variant: str, tiny_model: Model) -> None:
    denoise = tiny_model.denoiser(toys.parameters(tiny_model))
    table, key = table_of(variant, 4), jax.random.key(2)
    many = sampling.sample(key, denoise, table, (64, *SHAPE))
    for number in (0, 17, 63):
        one = sampling.sample(key, denoise, table, (1, *SHAPE), first=number)
        chex.assert_trees_all_close(one[0], many[number], rtol=0, atol=1e-5)
    assert float(jnp.std(many, axis=0).min()) > 1e-2, "samples must differ for this to mean anything"


@every_solver
def test_a_sample_does_not_depend_on_the_devices(variant: str, tiny_model: Model) -> None:
    params, table = toys.parameters(tiny_model), table_of(variant, 4)
    keys = sampling.sample_keys(jax.random.key(3), np.arange(16))
    found = []
    for devices in (1, 8):
        mesh = data_mesh(jax.devices()[:devices])
        denoise = tiny_model.denoiser(jax.device_put(params, replicated(mesh)))
        own = jax.device_put(keys, split(mesh))
        start = sampling.noise(own, 0, SHAPE)
        assert len(start.devices()) == devices
        drawn = sampling.integrate(denoise, table, start, row_noise=None if table.deterministic else own)
        assert len(drawn.devices()) == devices
        found.append((np.asarray(start), np.asarray(drawn)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=0, atol=1e-5)


@every_solver
def test_states_are_what_the_network_saw(variant: str, loop: str, exact: Denoiser) -> None:
    table, key, steps = table_of(variant, 6), jax.random.key(4), 6
    seen = sampling.sample(key, exact, table, (3, *SHAPE), states=True)
    chex.assert_shape(seen, (steps + 1, 3, *SHAPE))
    start = sampling.noise(sampling.sample_keys(key, np.arange(3)), 0, SHAPE)
    # other programs of the compiler may round otherwise
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    close(seen[-1], sampling.sample(key, exact, table, (3, *SHAPE)))
    close(seen[0], start)
    short = jax.tree.map(lambda a: a[:4] if np.ndim(a) else a, table)
    close(seen[:4], sampling.sample(key, exact, short, (3, *SHAPE), states=True)[:4])


@every_solver
def test_both_loops_agree(variant: str, exact: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    table, found = table_of(variant, 7), []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        found.append(sampling.sample(jax.random.key(5), exact, table, (4, *SHAPE), states=True))
    chex.assert_trees_all_close(*found, rtol=0, atol=2e-6)


@every_solver
def test_recorded_noise_replaces_drawn_noise(variant: str, loop: str, exact: Denoiser) -> None:
    table, keys = table_of(variant, 5), sampling.sample_keys(jax.random.key(6), np.arange(4))
    start = sampling.noise(keys, 0, SHAPE)
    recorded = jnp.stack([sampling.noise(keys, k + 1, SHAPE) for k in range(table.nfe)])
    from_keys = sampling.integrate(exact, table, start, row_noise=keys)
    chex.assert_trees_all_close(
        sampling.integrate(exact, table, start, row_noise=recorded), from_keys, rtol=0, atol=1e-6
    )
    moved = sampling.integrate(exact, table, start, row_noise=recorded + 1)
    assert bool(jnp.allclose(moved, from_keys)) == table.deterministic


@every_solver
def test_one_step_to_zero_noise_is_the_estimate(variant: str, exact: Denoiser) -> None:
    table, key = table_of(variant, 1), jax.random.key(7)
    start = sampling.noise(sampling.sample_keys(key, np.arange(2)), 0, SHAPE)
    level = Level(*(jnp.full(2, a, jnp.float32) for a in Cosine().level(np.float64(1.0))))
    chex.assert_trees_all_close(sampling.sample(key, exact, table, (2, *SHAPE)), exact(start, level), rtol=0, atol=1e-6)


def test_labels_reach_the_network(loop: str) -> None:
    class Label(struct.PyTreeNode):
        def __call__(self, z: Any, level: Level, labels: Any = None) -> Any:
            return jnp.broadcast_to(labels[:, None, None, None].astype(z.dtype), z.shape)

    drawn = sampling.sample(jax.random.key(0), Label(), table_of("ddim", 2), (3, *SHAPE), jnp.array([4, 0, 2]))
    np.testing.assert_array_equal(drawn, np.broadcast_to(np.reshape([4.0, 0, 2], (3, 1, 1, 1)), (3, *SHAPE)))


# --- DDIM


@pytest.mark.fast
def test_ddim_converges_with_order_one(gaussian: toys.Gaussian, exact: Denoiser) -> None:
    start = jax.random.normal(jax.random.key(0), (64, *SHAPE))
    ends = (Cosine().level(np.float64(t)) for t in (1.0, 0.0))
    truth = gaussian.flow(np.asarray(start, np.float64), *ends)
    counts = np.array([16, 32, 64, 128, 256])
    errors = [
        float(np.sqrt(np.mean((sampling.integrate(exact, table_of("ddim", n, clean=False), start) - truth) ** 2)))
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
    found = sampling.integrate(point, table_of("ddim", steps, clean=False), start)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7)
    clean = sampling.integrate(point, table_of("ddim", steps), start)
    np.testing.assert_allclose(clean, np.full_like(clean, 0.7), rtol=1e-7)


@pytest.mark.fast
def test_ddim_for_variance_exploding_levels_is_euler() -> None:
    sigma = np.array([3.0, 2.0, 0.5, 0.0])
    table = ddim(VarianceExploding().level(sigma))
    # y + (sigma_s - sigma_t)·(y - x_hat)/sigma_t
    slope = np.diff(sigma) / sigma[:-1]
    np.testing.assert_allclose(table.weights[:, 0, :], np.stack([1 + slope, -slope], axis=1), rtol=1e-15)


@pytest.mark.fast
def test_tables_compose(exact: Denoiser) -> None:
    grid = grids.clean_end(grids.uniform(Cosine(), 12))
    start = jax.random.normal(jax.random.key(0), (4, *SHAPE))
    whole = sampling.integrate(exact, ddim(grid), start)
    first, second = ddim(grid.at(slice(None, 6))), ddim(grid.at(slice(5, None)))
    assert first.nfe + second.nfe == 12
    np.testing.assert_array_equal(sampling.integrate(exact, second, sampling.integrate(exact, first, start)), whole)


# --- the ancestral sampler


@pytest.mark.fast
@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_ancestral_steps_are_draws_from_the_posterior(gamma: float, exact: Denoiser) -> None:
    grid = grids.uniform(Cosine(-9, 9), 5)
    recorded = jax.random.normal(jax.random.key(1), (5, 3, *SHAPE))
    start = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    seen = sampling.integrate(exact, ancestral(grid, gamma), start, row_noise=recorded, states=True)
    for k in range(4):
        t, s = (Level(*(jnp.full(3, a, jnp.float32) for a in grid.at(j))) for j in (k, k + 1))
        posterior = forward.posterior(seen[k], exact(seen[k], t), t, s, gamma)
        np.testing.assert_allclose(seen[k + 1], posterior.mean + posterior.std * recorded[k + 1], atol=3e-6)
    last = Level(*(jnp.full(3, a, jnp.float32) for a in grid.at(4)))
    np.testing.assert_allclose(seen[-1], exact(seen[4], last), atol=1e-6)


@pytest.mark.parametrize(("gamma", "steps"), [(0.0, 8), (0.0, 256), (1.0, 256)])
def test_ancestral_has_the_moments_of_the_data(
    gamma: float, steps: int, gaussian: toys.Gaussian, exact: Denoiser
) -> None:
    grid = grids.clean_end(grids.uniform(Cosine(-9, 9), steps))
    count = 40_000
    drawn = np.asarray(sampling.sample(jax.random.key(8), exact, ancestral(grid, gamma), (count // 4, *SHAPE)))
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
    assert table.weights.shape == (4, 2, 3) and table.deterministic
    seen = sampling.integrate(LevelItself(), table, jnp.ones((1, 1, 1, 1)), states=True)
    np.testing.assert_allclose(np.ravel(seen), [3, 3, 0.9, 0.5, 2 * 0.5 - 0.3], rtol=1e-6)


GRID = grids.uniform(Cosine(), 4)
TWO = GRID.at(slice(0, 2))
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "an unknown register": (lambda: build(TWO, [{"y": {"y": 1}}, {"m": {"y": 1}}]), r"Row 1 sets 'm'.*registers:.*y"),
    "an unknown term": (lambda: build(TWO, [{"y": {"eps": 1}}] * 2), r"Row 0 .*\['eps'\].*x_hat"),
    "writing to x_hat": (lambda: build(TWO, [{"x_hat": {"y": 1}}] * 2), r"sets 'x_hat'"),
    "too few levels": (lambda: build(TWO, [{}] * 3), r"3 rows needs as many levels, got \(2,\)"),
    "gamma above 1": (lambda: ancestral(GRID, 1.5), r"gamma must be in \[0, 1\].*got 1.5"),
    "gamma below 0": (lambda: ancestral(GRID, -0.1), r"gamma must be in \[0, 1\].*got -0.1"),
    "gamma not a number": (lambda: ancestral(GRID, float("nan")), r"got nan"),
    **{
        f"a rising grid for {name}": (lambda s=solver: s(GRID.at(slice(None, None, -1))), "must decrease in noise")
        for name, solver in SOLVERS.items()
    },
    "no samples": (
        lambda: sampling.sample(jax.random.key(0), lambda z, level, labels=None: z, ddim(GRID), (0, 2, 2, 1)),
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
        sampling.integrate(exact, table_of("ancestral", 4), start, row_noise=jnp.zeros((3, 2, *SHAPE)))
