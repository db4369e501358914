"""Distillation: targets against exact arithmetic, methods among each other, and phases as values."""

from __future__ import annotations

import dataclasses
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

from diffusion_distill.base.arrays import enable_x64, namespace, stratified
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.denoisers.clipping import Clipped
from diffusion_distill.denoisers.model import Denoiser, Model
from diffusion_distill.methods import (
    Denoising,
    Knowledge,
    Progressive,
    Tract,
    phases,
    progressive,
    targets,
    tract,
)
from diffusion_distill.process import grids, noising, predictions
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import (
    VE,
    Cosine,
    LinearBeta,
    LinearBetaDiscrete,
    Process,
    RectifiedFlow,
)
from diffusion_distill.process.time_input import LogsnrInput
from diffusion_distill.solvers import ddim, engine, tabulate
from diffusion_distill.solvers.engine import run_host

VP: list[Process] = [Cosine(), Cosine(-9, 9), LinearBeta(), LinearBetaDiscrete()]
#: Their time 0 is zero noise.
TO_ZERO: list[Process] = [VE(1.0), LinearBeta(t_min=0.0), LinearBetaDiscrete(logsnr_max=np.inf)]


def bend(z: Any, level: Level, labels: Any = None) -> Any:
    """A smooth estimate in [-1, 1] that depends on everything; NumPy in, NumPy out."""
    return namespace(z).tanh(z + 0.3 * level.expand(z).sigma)


def bend_otherwise(z: Any, level: Level, labels: Any = None) -> Any:
    """Another one."""
    return namespace(z).sin(2 * z) * level.expand(z).alpha


def single(rows: targets.Rows) -> targets.Rows:
    """The rows as the training step sees them: float32."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.int32 if np.asarray(a).dtype.kind == "i" else jnp.float32), rows)


def inverted(rows: targets.Rows, s: Level, z: np.ndarray, first: Any, second: Any) -> np.ndarray:
    """The published form of the target, in float64: make both steps, then invert the one step t -> s."""
    t, m = rows.t, rows.m
    z_m = noising.ddim_step(z, first(z, t), t, m)
    z_s = noising.ddim_step(z_m, second(z_m, m), m, s)
    r, d = noising.step_coefficients(t.expand(z), s.expand(z))
    return (z_s - r * z) / d


# --- weights and rows


def precise(process: Process, i: int, steps: int) -> tuple[Decimal, Decimal]:
    """(alpha, sigma) at time i/steps in as many digits as the context has."""
    t = Decimal(i) / steps
    if isinstance(process, RectifiedFlow):
        return (1 - t) / (1 - t + Decimal(process.shift) * t), Decimal(process.shift) * t / (
            1 - t + Decimal(process.shift) * t
        )
    if isinstance(process, VE):
        return Decimal(1), Decimal(process.sigma_max) * t
    assert isinstance(process, LinearBeta)
    low, high, cut = map(Decimal, (process.beta_min, process.beta_max, process.t_min))
    tau = cut + (1 - cut) * t
    alpha = (-(low * tau / 2 + (high - low) * tau**2 / 4)).exp()
    return alpha, (1 - alpha**2).sqrt()


@pytest.mark.fast
@pytest.mark.parametrize("process", [LinearBeta(), VE(), RectifiedFlow(), RectifiedFlow(3.0)], ids=str)
def test_weights_from_differences_have_eleven_digits(process: Process) -> None:
    """Against 50 digits, for steps of one and of many levels of the finest grids."""
    with localcontext(prec=50):
        for steps in (8, 1024, 8192):
            i = np.unique(np.linspace(2, steps, 9).astype(int))
            grid = grids.make_grid(process, steps, "time")
            for s in (i - 2, i // 2, 0 * i):
                with np.errstate(divide="ignore"):
                    found = targets.chain_weights(grid.at(steps - np.stack([i, np.maximum(i - 1, s), s])))
                for k in range(len(i)):
                    levels = [precise(process, int(n), steps) for n in (i[k], max(i[k] - 1, s[k]), s[k])]
                    if levels[2][1] == 0:
                        expected = [1.0, 0.0] if levels[1][1] == 0 else [0.0, 1.0]
                    else:
                        q = [alpha / sigma for alpha, sigma in levels]
                        expected = [float((q[1] - q[0]) / (q[2] - q[0])), float((q[2] - q[1]) / (q[2] - q[0]))]
                    np.testing.assert_allclose(found[:, k], expected, rtol=1e-11, err_msg=f"{i[k]} {s[k]} of {steps}")


@pytest.mark.fast
@pytest.mark.parametrize("process", [*VP, *TO_ZERO], ids=str)
@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_chain_is_one_step_with_the_weighted_mean(process: Process, n: int) -> None:
    times = np.sort(np.random.default_rng(n).uniform(0.05, 1, n + 1))[::-1]
    weights = targets.chain_weights(process.level(times))
    assert weights.sum() == pytest.approx(1, abs=1e-13)
    estimates = np.random.default_rng(0).uniform(-1, 1, (n, 1, 4, 4, 1))
    z = start = np.random.default_rng(1).standard_normal((1, 4, 4, 1))
    levels = [process.level(np.array([t])) for t in times]
    for (t, s), x_hat in zip(pairwise(levels), estimates, strict=True):
        z = noising.ddim_step(z, x_hat, t, s)
    mean = targets.weighted_mean(list(weights), list(estimates))
    chex.assert_trees_all_close(noising.ddim_step(start, mean, levels[0], levels[-1]), z, rtol=1e-7, atol=1e-12)
    # closing two steps at a time, from the end, is the same
    folded = estimates[-1]
    for k in range(n - 2, -1, -1):
        pair = targets.chain_weights(process.level(times[[k, k + 1, n]]))
        folded = targets.weighted_mean(list(pair), (estimates[k], folded))
    chex.assert_trees_all_close(folded, mean, rtol=1e-7, atol=1e-12)


@pytest.mark.fast
def test_a_solver_table_makes_the_step_of_its_chain() -> None:
    levels = grids.make_grid(Cosine(), 8).at(slice(0, 6))
    by_level = Denoiser(params=(), model=LevelOnly())
    start = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))
    found = engine.integrate(by_level, ddim(levels), start)
    x_hat = targets.weighted_mean(list(targets.chain_weights(levels)), list(levels.sigma[:-1, None]))
    r, d = noising.step_coefficients(levels.at(0), levels.at(-1))
    chex.assert_trees_all_close(found, r * np.asarray(start) + d * x_hat, rtol=1e-7, atol=1e-6)


class LevelOnly:
    """A model whose x_hat is sigma, whatever z is."""

    prediction = "x"

    def raw(self, params: Any, z: Any, level: Level, labels: Any, dropout: Any) -> Any:
        """sigma in every pixel."""
        return z * 0 + level.expand(z).sigma


@pytest.mark.fast
@pytest.mark.parametrize("process", [*VP, *TO_ZERO], ids=str)
def test_steps_of_length_zero_and_to_zero_noise(process: Process) -> None:
    grid, (t, m, s) = grids.make_grid(process, 4, "time"), np.array([[2, 2, 3], [3, 3, 4], [3, 4, 4]])
    at_rest, to_end, both = range(3)
    published = targets.make_rows(grid, t, m, s)
    assert (published.first[at_rest], published.second[at_rest]) == (1, 0)
    assert (published.first[both], published.second[both]) == (1, 0)
    assert published.first[to_end] == 0 if process in TO_ZERO else 0 < published.first[to_end] < 2e-2
    clean = targets.make_rows(grid, t, m, s, clean_end=True)
    assert (clean.first[to_end], clean.second[to_end]) == (0, 1)
    assert (clean.first[both], clean.second[both]) == (1, 0), "an empty second step takes precedence"
    for rows in (published, clean):
        chex.assert_tree_all_finite(rows)
        chex.assert_trees_all_close(rows.first + rows.second, 1, rtol=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("process", VP, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 512])
def test_rows_of_btd(steps: int, process: Process) -> None:
    rows, i = progressive.rows(grids.make_grid(process, 2 * steps)), np.arange(1, steps + 1)
    assert rows.count == steps
    for found, time in ((rows.t, 2 * i / (2 * steps)), (rows.m, (2 * i - 1) / (2 * steps))):
        chex.assert_trees_all_close(process.time(found), time, rtol=1e-7, atol=1e-13)
    # every t is on the student's own grid, bit for bit
    chex.assert_trees_all_equal(rows.t.sigma, grids.make_grid(process, steps).sigma[:-1][::-1])
    assert (rows.first[0], rows.second[0]) == (0, 1)
    assert np.all(rows.second[1:] < 1)


@pytest.mark.fast
@pytest.mark.parametrize("process", VP, ids=str)
@pytest.mark.parametrize(("start", "end"), [(8, 2), (12, 4), (6, 1), (1024, 32)])
def test_rows_of_tract(start: int, end: int, process: Process) -> None:
    rows, i = tract.rows(grids.make_grid(process, start), end), np.arange(1, start + 1)
    assert rows.count == start
    chex.assert_trees_all_close(process.time(rows.t), i / start, rtol=1e-7, atol=1e-13)
    chex.assert_trees_all_close(process.time(rows.m), (i - 1) / start, rtol=1e-7, atol=1e-13)
    last_of_group = (i - 1) % (start // end) == 0
    chex.assert_trees_all_equal(rows.second == 0, last_of_group)
    chex.assert_trees_all_equal(rows.first[last_of_group], 1)


@pytest.mark.fast
@pytest.mark.parametrize(
    "make",
    [
        lambda: progressive.rows(grids.make_grid(Cosine(), 8192)),
        lambda: tract.rows(grids.make_grid(Cosine(), 8192), 4096),
        lambda: tract.rows(grids.make_grid(Cosine(), 4096), 1),
        lambda: progressive.rows(grids.make_grid(Cosine(-9, 9), 8192)),
        lambda: progressive.rows(grids.make_grid(LinearBeta(), 8192)),
        lambda: tract.rows(grids.make_grid(LinearBetaDiscrete(), 8192), 4096),
        lambda: tract.rows(grids.make_grid(RectifiedFlow(3.0), 8192), 4096),
    ],
    ids=["btd", "tract 8192-4096", "tract 4096-1", "btd, logsnr in [-9, 9]", "btd, linear beta",
         "tract, discrete beta", "tract, rectified flow"],
)  # fmt: skip
def test_targets_are_exact_in_float32(make: Callable[[], targets.Rows]) -> None:
    rows = make()
    z = np.random.default_rng(0).standard_normal((len(rows.r), 2, 2, 1)).astype(np.float32)
    exact_z_m = noising.ddim_step(z.astype(np.float64), bend(z.astype(np.float64), rows.t), rows.t, rows.m)
    exact = targets.weighted_mean(
        (rows.first, rows.second), (bend(z.astype(np.float64), rows.t), bend_otherwise(exact_z_m, rows.m))
    )
    found = jax.jit(lambda rows, z: targets.target(rows, z, bend, bend_otherwise))(single(rows), jnp.asarray(z))
    chex.assert_type(found, jnp.float32)
    assert np.abs(found - exact).max() < 5e-7


@pytest.mark.fast
@pytest.mark.parametrize("process", [Cosine(), LinearBeta(), LinearBetaDiscrete()], ids=str)
@pytest.mark.parametrize("steps", [2, 64, 1024])
def test_targets_are_the_published_ones_inverted(steps: int, process: Process) -> None:
    z = np.random.default_rng(0).standard_normal((2 * steps, 2, 2, 1))
    rows = tract.rows(grids.make_grid(process, 2 * steps), steps)
    s = process.level((np.arange(2 * steps) // 2) / steps)
    with np.errstate(invalid="ignore"):
        expected = inverted(rows, s, z, bend, bend_otherwise)
    z_m = noising.ddim_step(z, bend(z, rows.t), rows.t, rows.m)
    found = targets.weighted_mean((rows.first, rows.second), (bend(z, rows.t), bend_otherwise(z_m, rows.m)))
    chex.assert_trees_all_close(found, expected, rtol=1e-7, atol=1e-8)


# --- what the methods are, among each other


def batch_for(rows: targets.Rows | Level, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Clean images and noise, float32, one of each per row or level."""
    rng = np.random.default_rng(seed)
    shape = (len(rows.r if isinstance(rows, targets.Rows) else rows.sigma), 2, 2, 1)
    return rng.uniform(-1, 1, shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32)


def students(model: Model) -> dict[str, Denoiser]:
    """Three unrelated networks in the roles of teacher, student and self-teacher."""
    roles = ("teacher", "student", "self_teacher")
    return {role: model.denoiser(toys.parameters(model, seed)) for seed, role in enumerate(roles)}


def losses_of(method: Any, roles: dict[str, Any], rows: targets.Rows, x: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """The method's losses of given rows, compiled as in training."""
    return np.asarray(jax.jit(method.losses_at)(roles, single(rows), x, eps, None))


CURVED = Denoiser(params=(), model=toys.Curved())


@pytest.mark.fast
@pytest.mark.parametrize("solver", ["ddim", "heun", "rk4"])
@pytest.mark.parametrize(
    "process", [Cosine(-9, 9), LinearBeta(), VE(), VE(3.0, 0.1), RectifiedFlow(), RectifiedFlow(3.0)], ids=str
)
def test_one_step_to_the_target_is_two_steps_of_the_solver(process: Process, solver: str) -> None:
    """For every row of BTD, and of TRACT with the teacher as self-teacher, in float64."""
    steps = 16
    grid, i = grids.make_grid(process, steps), np.arange(steps, -1, -1)
    for rows, t, m, s in (
        (progressive.rows(grid, solver, process), i[2::2], i[1:-1:2], i[0:-2:2]),
        (tract.rows(grid, 2, solver, process), i[1:], i[:-1], i[np.arange(steps) // 8 * 8]),
    ):
        x, eps = (a.astype(np.float64) for a in batch_for(rows))
        z = noising.diffuse(x, eps, rows.t)
        with enable_x64(True):
            found = np.asarray(targets.target(rows, z, CURVED, CURVED))
        for k in range(len(t)):
            if s[k] == steps and grid.sigma[-1] > 0:
                continue  # BTD sets what is a step to a little noise
            start, middle, end = (grid.at(n) for n in (t[k], m[k], s[k]))
            state, here = z[k : k + 1], lambda level: Level(*(np.full(1, a) for a in level))
            second = solver if rows.second_stages is not None else "ddim"
            for name, a, b in ((solver, start, middle), (second, middle, end)):
                if a != b:
                    table = tabulate(name, Level(*np.stack([a, b], axis=1)), process).plain()
                    state = run_host(table, CURVED, state / table.init)
            jumped = noising.ddim_step(z[k : k + 1], found[k : k + 1], here(start), here(end))
            chex.assert_trees_all_close(jumped, state, rtol=1e-10, atol=1e-10, custom_message=f"{t[k]}→{m[k]}→{s[k]}")


@pytest.mark.fast
def test_a_heun_step_extrapolates_as_its_closed_form_says() -> None:
    """alpha = 1: weights (1 - w, w), w = sigma_t / (2·sigma_m); a step to zero noise has one stage."""
    grid = grids.make_grid(VE(), 12)
    sigma = grid.sigma[::-1]
    stages = tract.rows(grid, 1, "heun").stages
    assert stages is not None
    mix = stages.mix
    chex.assert_trees_all_close(mix[1:, 1], sigma[2:] / (2 * sigma[1:-1]), rtol=1e-12)
    chex.assert_trees_all_equal(mix[0], np.array([1, 0]))
    chex.assert_trees_all_close(mix.sum(1), 1, rtol=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("steps", [1, 4, 64])
def test_tract_with_groups_of_two_is_btd(steps: int, tiny_model: Model) -> None:
    roles = students(tiny_model)
    roles["self_teacher"] = roles["teacher"]
    pairs, halves = (
        tract.rows(grids.make_grid(Cosine(), 2 * steps), steps),
        progressive.rows(grids.make_grid(Cosine(), 2 * steps)),
    )
    firsts = jax.tree.map(lambda a: a[1::2] if np.ndim(a) else a, pairs)  # rows 2i of 1 .. 2N: where a group begins
    # away from zero noise the tables are the same numbers; there BTD sets what TRACT computes
    for ours, theirs in zip(jax.tree.leaves(firsts[:-1]), jax.tree.leaves(halves[:-1]), strict=True):
        chex.assert_trees_all_equal(ours[1:], theirs[1:])
    same_rule = firsts._replace(first=halves.first, second=halves.second)
    assert 0 < 1 - firsts.second[0] < 1e-4 * steps

    x, eps = batch_for(halves)
    by_btd = losses_of(Progressive(2 * steps, steps), roles, halves, x, eps)
    by_tract = losses_of(Tract((2 * steps, steps), clip="none", reduction="mean"), roles, same_rule, x, eps)
    chex.assert_trees_all_close(by_btd, by_tract, rtol=1e-6)
    assert by_btd.min() > 0


@pytest.mark.fast
@pytest.mark.parametrize("process", [Cosine(), *TO_ZERO], ids=str)
def test_one_group_that_ends_at_zero_noise_is_consistency_distillation(process: Process, tiny_model: Model) -> None:
    steps = 16
    grid, t = grids.make_grid(process, steps, "time"), np.arange(steps)[::-1]
    if process in TO_ZERO:  # nothing has to be set
        rows = tract.rows(grid, 1)
    else:
        rows = targets.make_rows(grid, t, t + 1, 0 * t + steps, clean_end=True)
    roles = students(tiny_model)
    z = jax.random.normal(jax.random.key(0), (steps, 2, 2, 1))
    t = single(rows).t
    z_m = noising.ddim_step(z, bend(z, t), t, single(rows).m)
    found = jax.jit(lambda second: targets.target(single(rows), z, bend, second))(roles["self_teacher"])
    consistency = jax.jit(lambda second: second(z_m, single(rows).m))(roles["self_teacher"])
    chex.assert_trees_all_close(found[1:], consistency[1:], rtol=0, atol=1e-6)
    chex.assert_trees_all_close(
        found[0], bend(z, t)[0], rtol=1e-6
    )  # the first step above zero noise is the teacher's alone


@pytest.mark.fast
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("process", [Cosine(-9, 9), LinearBetaDiscrete()], ids=str)
def test_tract_at_the_ends_of_its_groups_is_knowledge_distillation(
    process: Process, clip: bool, tiny_model: Model
) -> None:
    small = dataclasses.replace(tiny_model, network=toys.Perceptron(1, width=4), process=process)
    teacher = dataclasses.replace(tiny_model, process=process)
    roles = students(teacher) | {"student": small.denoiser(toys.parameters(small))}
    table, [phase] = tract.rows(grids.make_grid(process, 32), 8), Knowledge(8, length="1K").phases(small, 64)
    ends = jax.tree.map(lambda a: a[::4] if np.ndim(a) else a, table)  # t = 1, 5, ... 29 of 32
    x, eps = batch_for(ends)
    both = {"self_teacher": roles.pop("self_teacher"), **roles}  # which Knowledge must not ask for
    by_knowledge = losses_of(Knowledge(8, clip=clip), roles, ends, x, eps)
    chex.assert_trees_all_equal(
        by_knowledge, losses_of(Tract((32, 8), clip="both" if clip else "none"), both, ends, x, eps)
    )
    assert by_knowledge.min() > 0
    # its own rows are the student's grid, and the teacher has nothing to learn from itself
    chex.assert_trees_all_equal(phase.inputs.t.sigma[:8], grids.make_grid(process, 8).sigma[:-1][::-1])
    assert set(phase.inputs.first) == {1.0} and set(phase.inputs.second) == {0.0}
    itself = losses_of(Knowledge(8, clip=False), roles | {"student": roles["teacher"]}, ends, x, eps)
    assert itself.max() < 1e-6 * by_knowledge.min()


@pytest.mark.fast
def test_zero_noise_rules_of_btd_differ_for_two_heads_at_zero_noise_only(toy_networks: None) -> None:
    model = Model(toys.Perceptron(out_ch=2), (2, 2, 1), prediction="both")
    roles, rows = students(model), progressive.rows(grids.make_grid(Cosine(-6, 6), 8))
    x, eps = batch_for(rows)
    losses = {
        rule: losses_of(Progressive(8, 4, zero_noise=rule), roles, rows, x, eps)
        for rule in progressive.ZERO_NOISE_RULES
    }
    chex.assert_trees_all_close(losses["x_head"][1:], losses["reconciled"][1:], rtol=1e-6)
    assert abs(losses["x_head"][0] / losses["reconciled"][0] - 1) > 1e-3


@pytest.mark.fast
def test_tract_clips_the_estimates_it_says() -> None:
    huge = Denoiser(params=(), model=toys.Gaussian(mean=5.0, std=0.0))
    rows = single(tract.rows(grids.make_grid(Cosine(), 8), 2))
    roles: dict[str, Any] = {"teacher": huge, "self_teacher": huge, "student": huge}
    for clip, expected in (("both", (1.0, 1.0)), ("self_teacher", (5.0, 1.0)), ("none", (5.0, 5.0))):
        first, second = Tract((8, 2), clip=clip).estimators(roles, rows)
        found = targets.target(rows, jnp.zeros((8, 1, 1, 1)), first, second)
        mean = rows.first * expected[0] + rows.second * expected[1]
        chex.assert_trees_all_close(found[:, 0, 0, 0], mean, rtol=1e-6)
    assert isinstance(Tract((8, 2)).estimators(roles, rows)[0], Clipped)


@pytest.mark.fast
@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("method", [Denoising(), Progressive(4, 2), Tract((4, 2)), Knowledge(4)],
                         ids=lambda m: type(m).__name__)  # fmt: skip
def test_losses_are_the_weighted_squared_error(method: Any, prediction: str, toy_networks: None) -> None:
    model = Model(toys.Perceptron(predictions.PREDICTIONS[prediction].outputs), (2, 2, 1), Cosine(-6, 6), prediction)
    rows = single(tract.rows(grids.make_grid(model.process, 4), 4 if isinstance(method, Knowledge) else 2))
    x, eps = batch_for(rows)

    @jax.jit
    def both(roles: dict[str, Denoiser]) -> tuple[Any, Any]:
        z, student = noising.diffuse(x, eps, rows.t), roles["student"]
        if isinstance(method, Denoising):
            return method.losses_at(student, rows.t, x, eps), student(z, rows.t) - x
        second = roles["self_teacher" if isinstance(method, Tract) else "teacher"]
        estimators = (
            (roles["teacher"], second) if isinstance(method, Progressive) else map(Clipped, (roles["teacher"], second))
        )
        return method.losses_at(roles, rows, x, eps, None), student(z, rows.t) - targets.target(rows, z, *estimators)

    found, error = both(students(model))
    reduce = np.sum if method.reduction == "sum" else np.mean
    expected = np.maximum(np.exp(rows.t.logsnr), 1) * reduce(np.float64(error) ** 2, axis=(1, 2, 3))
    chex.assert_trees_all_close(found, expected, rtol=2e-3)


@pytest.mark.fast
@pytest.mark.parametrize("method", [Progressive(4, 2), Tract((4, 2)), Knowledge(4)], ids=lambda m: type(m).__name__)
def test_no_gradient_flows_through_the_target(method: Any, tiny_model: Model) -> None:
    roles, rows = students(tiny_model), single(tract.rows(grids.make_grid(Cosine(), 4), 2))
    x, eps = batch_for(rows)

    def total(params: Any, role: str) -> Any:
        denoisers = {**roles, role: tiny_model.denoiser(params)}
        return method.losses_at(denoisers, rows, x, eps, None).sum()

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    size = {role: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient(roles[role].params, role)))
            for role in roles}  # fmt: skip
    assert size["teacher"] == size["self_teacher"] == 0 < size["student"]


@pytest.mark.fast
@pytest.mark.parametrize(("prediction", "time_input"), [("x", "inv_cos"), ("eps", "sigmoid"), ("v", "linear"),
                                                        ("both", "linear")])  # fmt: skip
@pytest.mark.parametrize("process", [LinearBeta(), LinearBetaDiscrete()], ids=lambda s: type(s).__name__)
def test_losses_are_finite_at_all_times(process: Process, prediction: str, time_input: str, toy_networks: None) -> None:
    network = toys.Perceptron(predictions.PREDICTIONS[prediction].outputs)
    model = Model(network, (2, 2, 1), process, prediction, LogsnrInput(time_input))
    roles, rows = students(model), single(tract.rows(grids.make_grid(process, 4), 2))
    u = jnp.array([0.0, 1e-7, 1e-4, 0.5, 1 - 1e-7, 1.0])

    @jax.jit
    @jax.value_and_grad
    def total(params: Any) -> Any:
        denoisers, level = {**roles, "student": model.denoiser(params)}, process.level(u)
        losses = Denoising().losses_at(denoisers["student"], level, *batch_for(level)).sum()
        for method in (Progressive(4, 2), Tract((4, 2))):
            losses += method.losses_at(denoisers, rows, *batch_for(rows), None).sum()
        return losses

    chex.assert_tree_all_finite(total(roles["student"].params))


@pytest.mark.fast
@pytest.mark.parametrize("count", [3, 8])
def test_padding_rows_are_never_drawn(count: int) -> None:
    table, longer = targets.pad(
        [progressive.rows(grids.make_grid(Cosine(), 2 * count)), progressive.rows(grids.make_grid(Cosine(), 64))],
        unit=32,
    )
    chex.assert_shape([table.r, longer.r], (32,))
    assert (table.count, longer.count) == (count, 32)
    index, eps = targets.draw_rows(table, {"x": np.zeros((4000, 1, 1, 1), np.float32)}, jax.random.key(0))
    assert np.bincount(index, minlength=count).min() > 4000 / count * 0.8
    assert int(index.max()) == count - 1
    assert abs(float(eps.mean())) < 0.07 and abs(float(eps.std()) - 1) < 0.05


# --- training times of a teacher


@pytest.mark.fast
def test_training_times() -> None:
    discrete = np.asarray(Denoising(steps=4).times(stratified(jax.random.key(0), 4000)))
    values, counts = np.unique(discrete, return_counts=True)
    chex.assert_trees_all_equal(values, np.array([0.25, 0.5, 0.75, 1.0]))
    assert counts.min() > 850
    continuous = np.asarray(Denoising().times(stratified(jax.random.key(0), 4000)))
    assert 0 <= continuous.min() < 0.01 and 0.99 < continuous.max() < 1
    assert abs(continuous.mean() - 0.5) < 0.03


@pytest.mark.fast
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_batch_covers_all_times_evenly(size: int) -> None:
    """Any stretch of a quarter of the range holds a quarter of the batch, to within one draw at either end."""
    for seed in range(20):
        drawn = np.asarray(stratified(jax.random.key(seed), size))
        assert drawn.min() >= 0 and drawn.max() < 1
        for low in (0.0, 0.3, 0.75):
            assert abs(np.sum((drawn >= low) & (drawn < low + 0.25)) - size / 4) <= 2
    singles = [float(stratified(jax.random.key(seed), 1)[0]) for seed in range(500)]
    assert abs(np.mean(singles) - 0.5) < 0.05 and abs(np.var(singles) - 1 / 12) < 0.01


# --- phases


@pytest.mark.fast
def test_phases_may_have_unequal_shares(tiny_model: Model) -> None:
    plan = Tract((16, 4, 1), length="4K", shares=(1, 3)).phases(tiny_model, 32)
    assert [p.updates for p in plan] == [32, 96]
    # each phase's average forgets its own beginning: momentum^updates is the residual
    assert [p.momentum**p.updates for p in plan] == pytest.approx([1e-3, 1e-3])


@pytest.mark.fast
def test_phases_of_btd(tiny_model: Model) -> None:
    method = Progressive(64, 1, phase_length="1K", learning_rate=3e-4)
    plan = method.phases(tiny_model, batch_size=32)
    assert [(p.teacher_steps, p.student_steps) for p in plan] == [(64, 32), (32, 16), (16, 8), (8, 4), (4, 2), (2, 1)]
    assert [p.updates for p in plan] == [32, 32, 32, 32, 64, 64]
    assert all(p.anneal and p.restart and p.learning_rate == 3e-4 and p.momentum == 0 for p in plan)
    assert [int(p.inputs.count) for p in plan] == [32, 16, 8, 4, 2, 1]
    assert {p.inputs.r.shape for p in plan} == {(1024,)}  # padded, so that all runs share one compiled step
    even = dataclasses.replace(method, last_two_longer=1.0)
    assert {p.updates for p in even.phases(tiny_model, 32)} == {32}


@pytest.mark.fast
@pytest.mark.parametrize("schedule", [(1024, 32, 1), (8, 4, 2, 1), (6, 1)])
def test_phases_of_tract(schedule: tuple[int, ...], tiny_model: Model) -> None:
    plan = Tract(schedule, length="10000", residual=1e-2).phases(tiny_model, batch_size=16)
    count = len(schedule) - 1
    assert [(p.teacher_steps, p.student_steps) for p in plan] == list(pairwise(schedule))
    assert sum(p.updates for p in plan) == 10000 // 16
    assert max(p.updates for p in plan) - min(p.updates for p in plan) <= 1
    assert [int(p.inputs.count) for p in plan] == list(schedule[:-1])
    for p in plan:
        assert p.momentum ** (10000 / 16 / count) == pytest.approx(1e-2)
        assert p.restart and not p.anneal
    following = Tract(schedule, length="10000", phase_start="continue", reset_average=True)
    assert all(p.reset_average and not p.restart for p in following.phases(tiny_model, 16))
    assert Tract(self_momentum=0.3).averages == {"self_teacher": 0.3}
    for momentum in (0, 0.9, 0.9999):  # Table 4 and Figure 5: whatever the length of a phase
        fixed = Tract(schedule, length="10000", shares=tuple(range(1, count + 1)), momentum=momentum)
        assert [p.momentum for p in fixed.phases(tiny_model, 16)] == [momentum] * count


@pytest.mark.fast
def test_phase_of_knowledge_distillation(tiny_model: Model) -> None:
    method = Knowledge(32, length="1K", learning_rate=3e-4, residual=1e-2, warmup=3, anneal=True)
    [plan] = method.phases(tiny_model, batch_size=16)
    assert (plan.name, plan.updates, plan.teacher_steps, plan.student_steps) == ("knowledge 32", 64, 32, 32)
    assert (plan.learning_rate, plan.warmup, plan.anneal) == (3e-4, 3, True)
    assert plan.momentum**64 == pytest.approx(1e-2)
    assert plan.inputs.count == 32 and not method.averages
    # one compiled step serves it and the phases in time
    assert plan.inputs.r.shape == Tract((32, 1), length="1K").phases(tiny_model, 16)[0].inputs.r.shape


@pytest.mark.fast
def test_phase_of_a_teacher(tiny_model: Model) -> None:
    [plan] = Denoising(length="1K", warmup=4, residual=1e-3).phases(tiny_model, 64)
    assert (plan.updates, plan.warmup, plan.teacher_steps, plan.student_steps) == (16, 4, 0, 0)
    assert plan.momentum**16 == pytest.approx(1e-3)
    assert Denoising(momentum=0.9).phases(tiny_model, 64)[0].momentum == 0.9


@pytest.mark.fast
def test_learning_rates() -> None:
    def rates(**fields: Any) -> list[float]:
        phase = phases.Phase("p", updates=4, learning_rate=2.0, **fields)
        return [phase.rate(k) for k in range(4)]

    assert rates() == [2, 2, 2, 2]
    assert rates(anneal=True) == [2, 1.5, 1, 0.5]
    assert rates(warmup=2) == [1, 2, 2, 2]
    assert rates(warmup=2, anneal=True) == [1, 1.5, 1, 0.5]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("length", "count"),
    [
        (96, 96),
        ("96", 96),
        ("1.5K", 1536),
        ("96M", 96 * 2**20),
        ("2g", 2 * 2**30),
        ("3*2M", 6 * 2**20),
        ("2**10", 1024),
    ],
)
def test_lengths(length: str | int, count: int) -> None:
    assert parse_length(length) == count


@pytest.mark.fast
def test_a_plan_can_be_read() -> None:
    text = phases.describe([phases.Phase("one", 7, 1e-3, anneal=True, momentum=0.5), phases.Phase("two", 9, 2e-3)])
    assert text.splitlines() == [
        "phase 1/2: one, 7 updates, learning rate 0.001 falling to 0, average momentum 0.5",
        "phase 2/2: two, 9 updates, learning rate 0.002, average momentum 0",
    ]


def plan(method: Any, batch_size: int = 16) -> Any:
    """The method's phases for a tiny model."""
    return method.phases(Model(toys.Perceptron(1), (2, 2, 1), prediction="v"), batch_size)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "BTD from 10 to 4": (lambda: Progressive(10, 4), r"must be 2, 4, 8.*got 10 / 4"),
    "BTD from 12 to 4": (lambda: Progressive(12, 4), r"must be 2, 4, 8.*got 12 / 4"),
    "BTD to more steps": (lambda: Progressive(4, 8), r"got 4 / 8"),
    "BTD to as many steps": (lambda: Progressive(8, 8), r"got 8 / 8"),
    "BTD to zero steps": (lambda: Progressive(8, 0), r"got 8 / 0"),
    "BTD from negative steps": (lambda: Progressive(-8, 1), r"got -8 / 1"),
    "BTD to negative steps": (lambda: Progressive(-8, -1), r"got -8 / -1"),
    "BTD from half a step": (lambda: Progressive(8.5, 1), r"got 8.5"),  # type: ignore[arg-type]
    "BTD with shrinking phases": (lambda: Progressive(8, 1, last_two_longer=-1), r"last_two_longer.*-1"),
    "an unknown rule at zero noise": (lambda: Progressive(zero_noise="xhead"), r"'xhead'.*'x_head'"),
    "TRACT that does not divide": (lambda: Tract((1024, 30, 1)), r"1024→30 does not divide.*proper divisor of 1024"),
    "TRACT that rises": (lambda: Tract((4, 8)), r"4→8 does not divide"),
    "TRACT that stays": (lambda: Tract((8, 8)), r"8→8 does not divide"),
    "TRACT to zero steps": (lambda: Tract((8, 0)), r"positive step counts.*\(8, 0\)"),
    "TRACT to negative steps": (lambda: Tract((8, -1)), r"positive step counts.*\(8, -1\)"),
    "TRACT of one count": (lambda: Tract((8,)), r"at least two.*got \(8,\)"),
    "TRACT with half steps": (lambda: Tract((8, 2.5)), r"positive step counts.*2\.5"),  # type: ignore[arg-type]
    "TRACT's momentum": (lambda: Tract(self_momentum=1.0), r"self_momentum must be a number in \[0, 1\), got 1.0"),
    "TRACT's phase start": (lambda: Tract(phase_start="paper"), r"phase_start 'paper'.*Known: continue, teacher"),
    "TRACT's residual of 0": (lambda: plan(Tract((2, 1), residual=0.0, length=640)), r"residual.*\(0, 1\).*0\.0"),
    "TRACT's fixed momentum of 1": (lambda: Tract(momentum=1.0), r"momentum must be .*\[0, 1\), got 1\.0"),
    "TRACT's momentum twice": (lambda: Tract(momentum=0.9, residual=1e-4), r"momentum=0\.9 and residual=0\.0001 both"),
    "TRACT shares of another process": (
        lambda: Tract((1024, 1), shares=(1, 3)),
        r"\(1024, 1\) has 1 phase, but shares=\(1, 3\) are for 2.*shares=\(1,\).*--config\.method\.shares='\(\)'",
    ),
    "TRACT share that is no number": (lambda: plan(Tract((4, 2, 1), shares=("", 1))), "positive numbers"),  # type: ignore[arg-type]
    "TRACT shares": (lambda: Tract((4, 2, 1), shares=(1, 2, 3)), r"has 2 phases, but shares=\(1, 2, 3\) are for 3"),
    "TRACT share of 0": (lambda: plan(Tract((4, 2, 1), shares=(1, 0))), "must be positive"),
    "TRACT too short": (lambda: plan(Tract((4, 2, 1), length=16)), r"16 samples in batches of 16.*2 phase"),
    "knowledge in zero steps": (lambda: Knowledge(0), r"number of steps must be .*at least 1, got 0"),
    "knowledge in half a step": (lambda: Knowledge(2.5), r"whole number.*got 2\.5"),  # type: ignore[arg-type]
    "knowledge with an unknown weighting": (lambda: Knowledge(weighting="sn"), r"weighting 'sn'.*'snr'"),
    "knowledge of no length": (lambda: Knowledge(length="long"), r"Cannot read 'long'"),
    "knowledge for no time": (lambda: plan(Knowledge(8, length=0)), r"0 samples in batches of 16 are 0 updates"),
    "a teacher for no time": (lambda: plan(Denoising(length=0)), r"0 samples in batches of 16 are 0 updates"),
    "BTD for no time": (lambda: plan(Progressive(8, 1, phase_length=0)), r"0 samples in batches of 16 are 0 updates"),
    "an unknown weighting": (lambda: Tract(weighting="sn"), r"weighting 'sn'.*'snr'"),
    "an unknown reduction": (lambda: Denoising(reduction="avg"), r"reduction 'avg'.*Known: mean, sum"),
    "negative training steps": (lambda: Denoising(steps=-1), r"steps must be 0.*got -1"),
    "an unreadable length": (lambda: Denoising(length="96 M samples"), r"Cannot read '96 M samples'.*'96M'"),
    "a negative length": (lambda: Tract(length="-5K"), r"Cannot read '-5K'"),
    "an empty length": (lambda: parse_length(""), r"Cannot read ''"),
    "a unit alone": (lambda: parse_length("M"), r"Cannot read 'M'"),
    "an infinite length": (lambda: parse_length("1e999"), r"Cannot read '1e999'"),
    "a residual of 1": (lambda: phases.momentum_for(1.0, 10), r"residual must be in \(0, 1\).*1\.0"),
    "no updates": (lambda: phases.momentum_for(0.5, 0), r"updates positive.*0"),
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_told_what_it_is_and_what_is_allowed(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
