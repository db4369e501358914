"""D-ODE solvers: what is fitted, to what, and that it does not depend on what it should not depend on."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import places
import pytest
import toys
from flax import struct

from diffusion_distill import api
from diffusion_distill.api import evaluation
from diffusion_distill.api.fitting import FIRST, FitSettings, fit_solver
from diffusion_distill.api.sampling import sampler_of
from diffusion_distill.data import from_arrays
from diffusion_distill.data.quantise import quantise
from diffusion_distill.denoisers.model import Denoiser, Model
from diffusion_distill.evaluation.features import Pixels
from diffusion_distill.evaluation.measuring import EvaluationSettings
from diffusion_distill.process import grids
from diffusion_distill.process.grids import make_grid
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import VE, Cosine, LinearBetaDiscrete
from diffusion_distill.process.time_input import IDDPMInput
from diffusion_distill.solvers import SOLVERS, Table, ancestral, ddim, dode, engine, heun, registry, tabulate
from diffusion_distill.solvers.engine import run_host
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.least_squares import least_squares
from diffusion_distill.solvers.pairing import Teacher, nested, teacher_steps
from diffusion_distill.solvers.search import search
from diffusion_distill.studies import comparison as comparison_run
from diffusion_distill.studies.comparison import Comparison, Setting, compare_solvers
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.sharding import data_mesh, devices_for, replicated, split

SHAPE = (2, 2, 1)
SCHEDULE = Cosine(-6, 9)
EXPLODING = VE(20.0)
#: name -> (solver, process): every kind of table with directions.
STUDENTS: dict[str, tuple[str, Any]] = {
    "ddim": ("ddim", SCHEDULE),
    "ddim, VE": ("ddim", EXPLODING),
    "heun, VE": ("heun", EXPLODING),
    "heun, published": ("heun keep_slope=true", EXPLODING),
    "ipndm": ("ipndm", SCHEDULE),
    "deis": ("deis", SCHEDULE),
    "deis, VE": ("deis", EXPLODING),
    "singlestep": ("dpm_solver order=3 method=singlestep", SCHEDULE),
    "multistep": ("dpm_solver++ order=3", SCHEDULE),
    "unipc": ("unipc", SCHEDULE),
    "two lambdas": ("ddim-2", SCHEDULE),
    "all outputs": ("ddim-all", SCHEDULE),
}
every_student = pytest.mark.parametrize("name", STUDENTS)


def student_of(name: str, steps: int = 5) -> tuple[Table, Any]:
    """The table on a grid to zero noise, and its process."""
    solver, process = STUDENTS[name]
    return tabulate(solver, grids.clean_end(make_grid(process, steps)), process), process


class Curved(struct.PyTreeNode):
    """A smooth denoiser that no solver integrates exactly, on both sides of NumPy and JAX."""

    def __call__(self, z: Any, level: Level, labels: Any = None) -> Any:
        return toys.Curved().raw((), z, level, labels, None)


def noise(batch: int = 24) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((batch, *SHAPE))


# --------------------------------------------------------------------------------------------- least squares


@pytest.mark.fast
@pytest.mark.parametrize("count", [1, 2, 7])
def test_least_squares_is_numpys(count: int) -> None:
    rng = np.random.default_rng(count)
    columns, target = rng.standard_normal((count, 30, 4)), rng.standard_normal((30, 4))
    expected = np.linalg.lstsq(columns.reshape(count, -1).T, target.ravel(), rcond=None)[0]
    chex.assert_trees_all_close(least_squares(list(columns), target), expected, rtol=1e-11)
    single = [jnp.asarray(c, jnp.float32) for c in columns]
    chex.assert_trees_all_close(least_squares(single, jnp.asarray(target, jnp.float32)), expected, rtol=1e-7, atol=2e-6)


@pytest.mark.fast
def test_least_squares_of_nearly_parallel_columns_keeps_its_digits() -> None:
    """Normal equations would square the condition 1e4, which leaves nothing in float32."""
    rng = np.random.default_rng(0)
    base, other = rng.standard_normal((2, 400))
    columns = [base, base + 1e-4 * other]
    target = 3 * columns[0] - 2 * columns[1]
    single = [jnp.asarray(c, jnp.float32) for c in columns]
    found = least_squares(single, jnp.asarray(target, jnp.float32))
    chex.assert_trees_all_close(found, np.array([3, -2]), rtol=2e-2)


@pytest.mark.fast
def test_least_squares_leaves_out_what_says_nothing_new() -> None:
    column = np.arange(1.0, 9).reshape(2, 4)
    found = least_squares([column, np.zeros_like(column), 2 * column], 5 * column)
    chex.assert_trees_all_close(found, np.array([5, 0, 0]), rtol=1e-7, atol=1e-12)


# --------------------------------------------------------------------------------------------------- fitting


@pytest.mark.fast
@every_student
def test_a_fit_is_the_least_squares_solution_of_each_row(name: str) -> None:
    """By hand: the student's states with the lambdas found so far, against the teacher's, by numpy.linalg.lstsq."""
    student, process = student_of(name)
    teacher = nested(student, process, 4, ddim)
    fit = dode.fit_host(Curved(), student, teacher, noise())
    states = run_host(teacher.table.plain(), Curved(), noise(), states=True)
    assert student.directions is not None
    registers = np.stack([student.init * noise()] * student.weights.shape[1])
    for k, target in enumerate(teacher.targets):
        level = Level(*(np.full(24, a[k]) for a in student.level))
        operands = np.stack([*registers, Curved()(registers[0], level)])
        registers = np.tensordot(student.weights[k], operands, axes=1)
        moves = np.tensordot(student.directions.weights[k], operands, axes=1)
        moving = [j for j, move in enumerate(moves) if np.abs(move).max() > 1e-12]
        expected = np.zeros(len(moves))
        if moving:
            columns = moves[moving].reshape(len(moving), -1).T
            expected[moving] = np.linalg.lstsq(columns, (states[target] - registers[0]).ravel(), rcond=None)[0]
        chex.assert_trees_all_close(fit.lambdas[k], expected, rtol=1e-6, atol=1e-6)
        before = np.sqrt(np.mean((states[target] - registers[0]) ** 2))
        registers[0] += np.tensordot(fit.lambdas[k], moves, axes=1)
        after = np.sqrt(np.mean((states[target] - registers[0]) ** 2))
        chex.assert_trees_all_close(np.array([fit.plain[k], fit.fitted[k]]), np.array([before, after]), rtol=1e-9)
        assert after <= before
    chex.assert_trees_all_close(fit.result, registers[0], rtol=1e-9, atol=1e-9)
    chex.assert_trees_all_close(
        run_host(student.distilled(fit.lambdas), Curved(), noise()), fit.result, rtol=1e-7, atol=1e-9
    )


@pytest.mark.fast
@every_student
def test_the_teacher_passes_through_the_levels_of_the_student(name: str) -> None:
    student, process = student_of(name)
    assert student.directions is not None
    for make in (ddim, heun):
        teacher = nested(student, process, 3, make)
        reached = teacher.table.directions.reached  # type: ignore[union-attr]
        for k, target in enumerate(teacher.targets):
            ratio = reached.sigma[target - 1] / reached.alpha[target - 1]
            wanted = student.directions.reached.sigma[k] / student.directions.reached.alpha[k]
            assert ratio == pytest.approx(wanted, rel=1e-9)
        assert teacher.targets[-1] == teacher.table.nfe
        if make is ddim:
            assert teacher.table.nfe == 3 * student.nfe


@pytest.mark.fast
def test_a_student_that_is_its_teacher_needs_no_lambdas() -> None:
    student, process = student_of("ddim")
    fit = dode.fit_host(Curved(), student, nested(student, process, 1, ddim), noise())
    chex.assert_trees_all_close(fit.lambdas, 0, rtol=1e-7, atol=1e-10)
    chex.assert_trees_all_close(fit.plain, 0, rtol=1e-7, atol=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["ddim", "ddim, VE", "heun, VE", "singlestep"])
def test_fitted_solvers_follow_the_exact_flow_better(name: str) -> None:
    """On noise the lambdas have not seen, against the closed-form flow of Gaussian data."""
    data = toys.Gaussian(mean=0.2, std=0.3)
    optimal = lambda z, level, labels=None: data.raw((), z, level, labels, None)  # noqa: E731
    student, process = student_of(name, 6)
    fit = dode.fit_host(optimal, student, nested(student, process, 20, ddim), noise(200))
    fresh = np.random.default_rng(9).standard_normal((64, *SHAPE))
    start = student.directions.start  # type: ignore[union-attr]
    truth = data.flow(student.init * fresh, start, Level(np.float64(1), np.float64(0)))
    errors = [
        np.sqrt(np.mean((run_host(table, optimal, fresh) - truth) ** 2))
        for table in (student.plain(), student.distilled(fit.lambdas))
    ]
    assert errors[1] < 0.6 * errors[0]


@every_student
def test_the_engine_fits_what_the_host_fits(name: str) -> None:
    student, process = student_of(name)
    teacher = nested(student, process, 4, ddim)
    host = dode.fit_host(Curved(), student, teacher, noise())
    device = dode.fit(Curved(), student, teacher, jnp.asarray(noise(), jnp.float32))
    chex.assert_trees_all_close(device.plain, host.plain, rtol=2e-2, atol=1e-5)
    chex.assert_trees_all_close(device.fitted, host.fitted, rtol=2e-2, atol=1e-5)
    # Lambdas of short directions are not determined by float32 states; what they do to the states is.
    chex.assert_trees_all_close(device.result, host.result, rtol=1e-7, atol=1e-4)
    if name in ("ddim", "ipndm", "multistep"):
        chex.assert_trees_all_close(device.lambdas, host.lambdas, rtol=2e-3, atol=2e-3)


def test_a_fit_does_not_depend_on_the_number_of_devices(tiny_model: Model) -> None:
    student, process = student_of("ddim")
    teacher, found = nested(student, process, 3, ddim), []
    for count in (1, 2, 8):
        mesh = data_mesh(jax.devices()[:count])
        denoise = tiny_model.denoiser(jax.device_put(toys.parameters(tiny_model), replicated(mesh)))
        start = jax.device_put(jnp.asarray(noise(), jnp.float32), split(mesh))
        fit = dode.fit(denoise, student, teacher, start)
        assert len(fit.result.devices()) == count
        found.append(fit.lambdas)
    chex.assert_trees_all_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(found[2], found[0], rtol=1e-4, atol=1e-5)
    assert np.abs(found[0][1:]).min() > 1e-2, "lambdas must be something for this to mean anything"


@pytest.mark.fast
def test_batches_are_split_over_as_many_devices_as_divide_them() -> None:
    assert [len(devices_for(batch)) for batch in (100, 96, 7, 1)] == [5, 8, 7, 1]


def test_a_fit_costs_one_batch_for_each_evaluation(exact: Denoiser) -> None:
    calls: list[int] = []

    class Counting(struct.PyTreeNode):
        def __call__(self, z: Any, level: Level, labels: Any = None) -> Any:
            jax.debug.callback(lambda: calls.append(len(z)))
            return exact(z, level, labels)

    student, process = student_of("ddim")
    dode.fit(Counting(), student, nested(student, process, 4, ddim), jnp.asarray(noise(), jnp.float32))
    jax.effects_barrier()
    assert len(calls) == (4 + 1) * student.nfe and set(calls) == {24}


def test_conditional_models_are_fitted_as_they_are_sampled() -> None:
    class Labelled(struct.PyTreeNode):
        def __call__(self, z: Any, level: Level, labels: Any = None) -> Any:
            return jnp.tanh(z + (labels[:, None, None, None] - 1))

    student, process = student_of("ddim")
    teacher, start = nested(student, process, 4, ddim), jnp.asarray(noise(), jnp.float32)
    zero, two = (dode.fit(Labelled(), student, teacher, start, jnp.full(24, c)).lambdas for c in (0, 2))
    assert np.abs(zero - two).max() > 1e-3


def test_guided_models_are_sampled_and_fitted(toy_networks: None) -> None:
    model = Model(toys.Perceptron(out_ch=1, num_classes=3), SHAPE, Cosine(), prediction="v")
    conditional = Artefact(model, toys.parameters(model))
    guidances: list[dict[str, Any]] = [{}, {"scale": 3.0, "null": 2}]
    settings, labels, drawn = FitSettings(scale=3, batch_size=24), np.arange(16) % 2, []
    fits = [fit_solver(conditional, "ddim", 4, settings, guidance=guidance) for guidance in guidances]
    for fit, guidance in zip(fits, guidances, strict=True):
        drawn.append(api.sample(conditional, 16, fitted=fit, cond=labels, guidance=guidance))
    assert np.abs(fits[0].lambdas - fits[1].lambdas).max() > 1e-3 and fits[1].provenance["guidance"] == guidances[1]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-2
    one = api.sample(conditional, 16, fitted=fits[0], cond=labels, guidance={"scale": 1.0})
    chex.assert_trees_all_equal(one, drawn[0])
    with pytest.raises(ValueError, match="unconditional"):
        unconditional = Model(toys.Perceptron(out_ch=1), SHAPE, Cosine(), prediction="v")
        api.sample(Artefact(unconditional, toys.parameters(unconditional)), 8, 2, guidance=guidances[1])


@pytest.mark.fast
def test_one_lambda_for_all_rows_is_searched(exact: Denoiser) -> None:
    student, process = student_of("ddim", 4)
    start, teacher = jnp.asarray(noise(), jnp.float32), nested(student, process, 50, ddim)
    target = engine.integrate(exact, teacher.table, start)
    candidates = (0.25, 0.5, 0.75, 1.0)
    found = search(student, candidates, dode.distance_from(teacher, exact, start))
    ends = [engine.integrate(exact, student.distilled(np.full((4, 1), c)), start) for c in (0.0, *candidates)]
    errors = [float(jnp.sqrt(jnp.mean((end - target) ** 2))) for end in ends]
    assert found.metric == "l2" and found.best == candidates[int(np.argmin(errors[1:]))]
    np.testing.assert_allclose(found.values, errors[1:], rtol=1e-5)
    assert min(found.values) < 0.6 * errors[0]


@pytest.mark.fast
def test_a_search_takes_the_lowest_or_the_highest_finite_value() -> None:
    """Of a parabola around 0.3 and of its negative; candidates whose images are not finite are never the best."""
    student = student_of("ddim")[0]
    lambda_of = lambda table: float(table.weights[1, 0, -1] - student.weights[1, 0, -1])  # noqa: E731
    unit = lambda_of(student.distilled(np.ones((5, 1))))
    parabola = lambda table: (lambda_of(table) / unit - 0.3) ** 2  # noqa: E731
    candidates = (0.4, 0.1, 0.31, 0.2)
    lowest = search(student, candidates, parabola, "frechet")
    highest = search(student, candidates, lambda table: -parabola(table), "recall", highest=True)
    assert (lowest.best, highest.best) == (0.31, 0.31) and not lowest.at_edge
    np.testing.assert_allclose(lowest.values, (np.array(candidates) - 0.3) ** 2, atol=1e-12)
    assert search(student, (0.4, 0.5), parabola).at_edge and not search(student, (0.4,), parabola).at_edge
    values = iter([np.nan, np.inf, 3.0])
    assert search(student, (0.1, 0.2, 0.3), lambda table: next(values)).best == 0.3
    with pytest.raises(ValueError, match=r"No candidate of \(0.1, 0.2\) gives finite images"):
        search(student, (0.1, 0.2), lambda table: np.nan)


REFERENCE = np.clip(np.random.default_rng(0).normal(0.1, 0.4, (60, *SHAPE)), -1, 1).astype(np.float32)
TRIED = FitSettings(scale=2, batch_size=24, candidates=(-0.3, 0.1, 0.5, 0.2), search_images=40)


@pytest.mark.parametrize("metric", ["frechet", "kid", "recall"])
def test_a_search_chooses_by_the_numbers_of_an_evaluation(teacher: Artefact, metric: str) -> None:
    """By hand: the images of every candidate, drawn as samples are, in 8 bits, and what an evaluation says of them."""
    settings = dataclasses.replace(TRIED, search_metric=metric)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit_solver(teacher, "ddim", 4, settings, reference=REFERENCE)
    features, how = Pixels(SHAPE), EvaluationSettings(40, 1, 24)
    real = evaluation.reference_of(from_arrays(REFERENCE), features, how)
    values = []
    for candidate in TRIED.candidates:
        table = found.base.distilled(np.full((4, 1), candidate))
        drawn = dataclasses.replace(sampler_of(teacher, steps=4, seed=settings.seed), table=table)
        part = evaluation.Part.empty()
        part.add(evaluation.outputs_of(features, quantise(drawn.draw(FIRST, 40))), how.kept)
        values.append(evaluation.scores(part, real, how)[metric])
    assert found.search is not None and found.search.metric == metric
    np.testing.assert_allclose(found.search.values, values, rtol=1e-3, atol=1e-3)
    best = np.argmax(values) if metric == "recall" else np.argmin(values)
    assert (found.lambdas == TRIED.candidates[int(best)]).all()


@pytest.mark.filterwarnings("ignore:The best lambda")
def test_searched_solvers_are_artefacts_too(teacher: Artefact, tmp_path: Path) -> None:
    found = fit_solver(teacher, "ddim-la", 4, TRIED, reference=from_arrays(REFERENCE))
    assert found.search is not None and found.search.best in TRIED.candidates
    assert found.lambdas.shape == (4, 1) and (found.lambdas == found.search.best).all()
    assert found.table().nfe == 4 and found.plain.shape == found.fitted.shape == (1,)
    assert (found.provenance["search images"], found.provenance["features"]) == (40, "pixels")
    values = np.array([1.0, np.nan, 3.0, 4.0])
    again = FittedSolver.load(
        dataclasses.replace(found, search=found.search._replace(values=values)).save(tmp_path / "solver.json")
    )
    assert again.search is not None and (again.search.metric, again.search.best) == ("frechet", found.search.best)
    np.testing.assert_array_equal(again.search.candidates, TRIED.candidates)
    np.testing.assert_array_equal(again.search.values, values)
    assert "NaN" not in (tmp_path / "solver.json").read_text()
    path = found.save(tmp_path / "old.json")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "search"}))
    assert FittedSolver.load(path).search is None, "files of before are read"


def test_a_best_candidate_at_the_edge_is_warned_of(teacher: Artefact) -> None:
    """By the distance from the teacher, 0.3 is better than 100 and than -100."""
    settings = FitSettings(scale=4, batch_size=24, search_metric="l2")
    with pytest.warns(
        UserWarning, match=r"best lambda by l2, 0.3, stands at the edge of the candidates \(0.3, 100.0\)"
    ):
        fit_solver(teacher, "ddim", 4, dataclasses.replace(settings, candidates=(0.3, 100.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner = fit_solver(teacher, "ddim", 4, dataclasses.replace(settings, candidates=(-100.0, 0.3, 100.0)))
        fit_solver(teacher, "ddim", 4, dataclasses.replace(settings, candidates=(0.3,)))
    assert inner.search is not None and inner.search.best == 0.3


def test_a_search_needs_what_it_measures_against(teacher: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "noise", None)  # nothing is drawn before
    with pytest.raises(
        ValueError, match=r"chosen by 'frechet'.*reference=images.*config.reference.*search_metric='l2'"
    ):
        fit_solver(teacher, "ddim", 4, TRIED)
    for metric in ("sfid", "inception_score"):
        with pytest.raises(ValueError, match=f"'pixels' do not allow the metric '{metric}'"):
            fit_solver(teacher, "ddim", 4, dataclasses.replace(TRIED, search_metric=metric), reference=REFERENCE)


# ------------------------------------------------------------------------------------------- lambdas without meaning


@pytest.mark.fast
def test_lambdas_beyond_the_bound_are_left_out() -> None:
    """Two directions that differ by 1e-6 of themselves ask for huge lambdas: the row keeps 0, and others theirs."""
    student, process = student_of("two lambdas")
    teacher = nested(student, process, 4, ddim)
    assert student.directions is not None
    weights = student.directions.weights.copy()
    weights[3, 1] = weights[3, 0] + 1e-6 * weights[3, 1]
    student = student._replace(directions=student.directions._replace(weights=weights))
    free = dode.fit_host(Curved(), student, teacher, noise())
    bounded = dode.fit_host(Curved(), student, teacher, noise(), largest=1000.0)
    assert np.abs(free.lambdas[3]).max() > 1e4 and np.abs(free.lambdas[:3]).max() < 1000
    np.testing.assert_array_equal(bounded.lambdas[3], 0)
    np.testing.assert_array_equal(bounded.lambdas[:3], free.lambdas[:3])
    np.testing.assert_allclose(bounded.asked[3], free.lambdas[3])
    assert bounded.fitted[3] == bounded.plain[3] == free.plain[3], "the row is the plain solver's"


def test_a_row_beyond_the_bound_is_warned_of(teacher: Artefact) -> None:
    settings = FitSettings(scale=4, batch_size=24, largest=1e-3)
    with pytest.warns(
        UserWarning, match=r"Row \d keeps lambda 0: its least squares ask for -?\d.*largest=0.001"
    ) as told:
        found = fit_solver(teacher, "ddim", 4, settings)
    free = fit_solver(teacher, "ddim", 4, dataclasses.replace(settings, largest=1000.0))
    first = next(k for k in range(4) if abs(free.lambdas[k, 0]) > 1e-3)
    row, asked = re.findall(r"Row (\d) .* ask for (\S+),", str(told[0].message))[0]
    assert int(row) == first and float(asked) == pytest.approx(free.lambdas[first, 0], rel=1e-3)
    assert (np.abs(found.lambdas) <= 1e-3).all()


# --------------------------------------------------------------------------------------------- clipped samples


SAMPLED = [*SOLVERS, "unipc output=eps", "ablation schedule=ve", "ddim ending=x_hat", "two_stage trial=log"]


@pytest.mark.parametrize("process", [SCHEDULE, EXPLODING], ids=["VP", "VE"])
@pytest.mark.parametrize("solver", SAMPLED)
def test_clipped_samples_are_in_range(solver: str, process: Any, toy_networks: None) -> None:
    """Of every solver, and of lambdas that lead far beyond; without clipping, these do."""
    model = Model(toys.Perceptron(1), SHAPE, process, prediction="x")
    artefact = Artefact(model, jax.tree.map(lambda a: 4 * a, toys.parameters(model)))
    drawn = api.sample(artefact, 16, 3, solver=solver)
    assert np.abs(drawn).max() <= 1
    grid = api.grid_for(artefact, 3)
    base = tabulate(solver, grid, process)
    if base.directions is None:
        return
    lambdas = np.full(base.directions.published.shape, 50.0)
    fitted = FittedSolver(solver, process, grid, lambdas, np.zeros(1), np.zeros(1))
    assert np.abs(api.sample(artefact, 16, fitted=fitted)).max() <= 1
    assert np.abs(api.sample(artefact, 16, fitted=fitted, clip=False)).max() > 1


# --------------------------------------------------------------------------------------------- discrete models


def test_teachers_take_no_more_steps_than_a_discrete_model_has(toy_networks: None) -> None:
    """C = 20 and C = 30 share one at 50 evaluations of 1000 times, or at 3 of 60; in continuous time they do not."""
    discrete = Model(toys.Perceptron(1), SHAPE, LinearBetaDiscrete(), prediction="eps")
    assert (discrete.discrete_steps, teacher_steps(50, 20, 1000), teacher_steps(50, 30, 1000)) == (1000,) * 3
    assert teacher_steps(15, 100, 1000) == 1000 and teacher_steps(10, 10, 1000) == 100
    continuous = dataclasses.replace(discrete, process=Cosine())
    assert continuous.discrete_steps is None and teacher_steps(50, 30, None) == 1500
    assert dataclasses.replace(continuous, time_input=IDDPMInput(steps=400)).discrete_steps == 400
    few = dataclasses.replace(discrete, process=LinearBetaDiscrete(60, 2e-3, 0.2))
    artefact = Artefact(few, toys.parameters(few))
    found = [fit_solver(artefact, "ddim", 3, FitSettings(scale=scale, batch_size=8)) for scale in (20, 30, 10)]
    assert [fit.provenance["teacher's evaluations"] for fit in found] == [60, 60, 30]
    np.testing.assert_array_equal(found[0].lambdas, found[1].lambdas)
    assert abs(found[0].lambdas[1] - found[2].lambdas[1]) > 1e-3


@pytest.mark.parametrize(("pairing", "evaluations"), [("nested", 9), ("published", 10)])
def test_capped_teachers_of_both_pairings(pairing: str, evaluations: int, toy_networks: None) -> None:
    """Of 10 discrete times: nested steps are whole parts of the student's, 3·3; the published count is the model's."""
    model = Model(toys.Perceptron(1), SHAPE, LinearBetaDiscrete(10, 0.01, 0.3), prediction="eps")
    found = fit_solver(Artefact(model, toys.parameters(model)), "ddim", 3, FitSettings(5, 8, pairing=pairing))
    assert found.provenance["teacher's evaluations"] == evaluations


# -------------------------------------------------------------------------------------------------- artefacts


@pytest.fixture
def fitted(teacher: Artefact) -> FittedSolver:
    """A solver fitted to an untrained teacher."""
    return fit_solver(teacher, "deis order=2", 4, FitSettings(scale=3, batch_size=24))


def test_a_fitted_solver_is_what_it_was_after_saving(fitted: FittedSolver, tmp_path: Path) -> None:
    again = FittedSolver.load(fitted.save(tmp_path / "new" / "solver.json"))
    chex.assert_trees_all_equal(again.table(), fitted.table())
    assert again.provenance == fitted.provenance and again.process == fitted.process
    assert fitted.provenance["evaluations"] == 4 and fitted.provenance["teacher's evaluations"] == 12
    assert fitted.provenance["teacher's solver"] == "deis order=2"
    assert (fitted.fitted <= fitted.plain * (1 + 1e-5)).all()


def test_samples_of_a_fitted_solver_are_those_of_its_table(fitted: FittedSolver, teacher: Artefact) -> None:
    drawn = api.sample(teacher, 16, fitted=fitted, seed=5)
    denoise, keys = teacher.denoiser(), engine.sample_keys(jax.random.key(5), np.arange(16))
    expected = engine.integrate(denoise, fitted.table(), engine.noise(keys, 0, SHAPE))
    assert np.abs(expected).max() > 1, "lambda moves the last state beyond x_hat"
    np.testing.assert_allclose(drawn, np.clip(expected, -1, 1), atol=1e-5)
    other = Artefact(teacher.model, toys.parameters(teacher.model, seed=1))
    with pytest.warns(UserWarning, match="fitted on another model"):
        api.sample(other, 8, fitted=fitted)


def test_the_noise_of_a_fit_is_not_that_of_samples(teacher: Artefact) -> None:
    """Lambdas of the first samples' own noise would look better than they are."""
    seed = FitSettings().seed
    of_fit, of_samples = (
        engine.noise(engine.sample_keys(jax.random.key(seed), first + np.arange(8)), 0, SHAPE) for first in (FIRST, 0)
    )
    assert float(jnp.abs(of_fit - of_samples).min(axis=(1, 2, 3)).min()) > 0


@pytest.mark.parametrize("pairing", ["nested", "published"])
@pytest.mark.parametrize("teacher_solver", ["", "unipc order=2"])
def test_any_solver_teaches(teacher: Artefact, pairing: str, teacher_solver: str) -> None:
    settings = FitSettings(scale=4, batch_size=24, pairing=pairing, teacher_solver=teacher_solver)
    found = fit_solver(teacher, "ddim", 4, settings)
    assert found.provenance["teacher's solver"] == (teacher_solver or "ddim")
    assert found.provenance["teacher's evaluations"] == 16
    chex.assert_shape(found.lambdas, (4, 1))


def test_distilled_students_are_fitted_to_the_model_they_come_from(teacher: Artefact) -> None:
    student = Artefact(teacher.model, toys.parameters(teacher.model, seed=2), steps=4)
    with pytest.raises(ValueError, match=r"made for 4 steps.*--config.teacher=FOLDER"):
        fit_solver(student, "ddim")
    found = fit_solver(student, "ddim", settings=FitSettings(scale=4, batch_size=24), teacher=teacher)
    chex.assert_shape(found.lambdas, (4, 1))
    assert found.provenance["model"] != found.provenance["teacher's model"]


def changed(content: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: "not json", "is damaged or cut short.*fit it again"),
        (lambda c: changed(c, format=9), "format is 9, this version reads 1"),
        (lambda c: changed(c, solver="dimm"), "Did you mean 'ddim'"),
        (lambda c: changed(c, lambdas=[[1.0]]), r"takes lambdas of shape \(4, 1\)"),
        (lambda c: changed(c, grid={"alpha": [1, 1], "sigma": [0, 1]}), "must decrease"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "process"}), "it has no 'process'"),
    ],
)
def test_spoilt_files_are_refused_in_words(
    fitted: FittedSolver, tmp_path: Path, spoil: Callable[[dict], str], said: str
) -> None:
    path = fitted.save(tmp_path / "solver.json")
    path.write_text(spoil(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=said):
        FittedSolver.load(path)


NOT_FITTED: dict[str, tuple[Callable[[Artefact], Any], str]] = {
    "a solver that draws noise": (partial(fit_solver, solver="ancestral", steps=3), "draw no noise"),
    "a teacher that draws noise": (
        lambda a: fit_solver(a, "ddim", 3, FitSettings(teacher_solver="ancestral")),
        "draw no noise",
    ),
    "an unknown teacher": (lambda a: fit_solver(a, "ddim", 3, FitSettings(teacher_solver="huen")), "mean 'heun'"),
    "an unknown option": (lambda a: fit_solver(a, "ddim ordr=3", 3), "no option .ordr."),
    "an option without a value": (lambda a: fit_solver(a, "deis 3", 3), "option=value, got '3'"),
    "no file": (lambda a: api.sample(a, 8, fitted="nothing.json"), "--mode=fit writes one"),
}


@pytest.mark.parametrize(("make", "said"), NOT_FITTED.values(), ids=NOT_FITTED)
def test_what_cannot_be_fitted_is_refused(make: Callable[[Artefact], Any], said: str, teacher: Artefact) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=said):
        make(teacher)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FitSettings(scale=0), "scale must be"),
        (lambda: FitSettings(pairing="matched"), "Known: nested, published"),
        (lambda: FitSettings(search_metric="fid"), "metric of a search 'fid'.*Known: frechet"),
        (lambda: FitSettings(search_images=0), "search_images must be"),
        (lambda: FitSettings(largest=0.0), "bound of lambdas, must be positive"),
        (lambda: FitSettings(candidates=(0.1, 0.1)), "there twice"),
        (lambda: FitSettings(candidates=(float("nan"),)), "finite numbers"),
        (lambda: FitSettings(candidates=("0.1",)), "finite numbers"),  # type: ignore[arg-type]
        (lambda: FitSettings(teacher_solver="dimm"), "mean 'ddim'"),
        (lambda: Comparison(solvers=()), "needs solvers"),
        (lambda: Comparison(nfe=(0,)), "at least 1"),
        (lambda: Comparison(truth="fine"), "Unknown solver 'fine'"),
        (lambda: nested(student_of("ddim")[0], SCHEDULE, 0, ddim), "scale must be"),
        (lambda: nested(student_of("ddim")[0], SCHEDULE, 2, ancestral), "draw no noise"),
        (lambda: dode.fit_host(Curved(), student_of("ddim")[0].plain(), Teacher(None, []), noise()), "nothing"),  # type: ignore[arg-type]
        (lambda: student_of("ddim")[0].plain().distilled(np.zeros((5, 1))), "no D-ODE variant"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.fast
def test_targets_are_checked() -> None:
    student, process = student_of("ddim")
    teacher = nested(student, process, 2, ddim)
    for targets in ([1], [*teacher.targets[:-1], 99]):
        with pytest.raises(ValueError, match="needs one state, 0 to 10"):
            dode.fit_host(Curved(), student, teacher._replace(targets=targets), noise())


def test_the_solver_of_the_documentation(teacher: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (places.ROOT / "docs" / "solvers.md").read_text()
    code = re.search(r"```python\n(from diffusion_distill.process import grids.*?)```", text, re.DOTALL)
    assert code is not None
    monkeypatch.setattr(registry, "SOLVERS", dict(registry.SOLVERS))
    exec(code[1].replace("from diffusion_distill.solvers import SOLVERS", "from test_dode import registry"
         ).replace('SOLVERS["', 'registry.SOLVERS["'), {})  # fmt: skip
    found = fit_solver(teacher, "extrapolated weight=0.3", 4, FitSettings(scale=3, batch_size=24))
    assert (found.lambdas[1:] != 0).all() and (found.fitted <= found.plain * (1 + 1e-5)).all()
    grid = grids.clean_end(make_grid(SCHEDULE, 4))
    none, ddims = tabulate("extrapolated weight=0", grid).plain(), ddim(grid).plain()
    chex.assert_trees_all_close(none, ddims, rtol=1e-12)


# ------------------------------------------------------------------------------------------------- comparisons


def test_a_comparison_goes_on_where_it_was(teacher: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = Comparison(("ddim", "heun", "deis order=2"), (2, 3), truth_steps=8)
    setting, fit = Setting(teacher, 24, batch_size=24), FitSettings(scale=2, batch_size=24)
    reference = np.clip(np.random.default_rng(0).normal(0, 0.4, (40, *SHAPE)), -1, 1).astype(np.float32)
    drawn: list[dict[str, Any]] = []
    compare = partial(compare_solvers, setting, fit=fit, reference=reference, workdir=tmp_path, log=drawn.append)
    few = compare(Comparison(("ddim",), (2,), truth_steps=8))
    assert len(few) == len(drawn) == 2
    rows = compare(comparison)
    assert [(row["solver"], row["nfe"], row["fitted"]) for row in rows] == [
        *((name, n, fitted) for name in ("ddim",) for n in (2, 3) for fitted in (False, True)),
        ("heun", 3, False),
        ("heun", 3, True),
        *(("deis order=2", n, fitted) for n in (2, 3) for fitted in (False, True)),
    ]
    assert rows[:2] == few and len(drawn) == len(rows), "what was measured is not measured again"
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    monkeypatch.setattr(comparison_run, "sampler_of", None)
    assert compare(comparison) == rows
    with pytest.raises(ValueError, match=r"holds another comparison.*seed \(there 0, asked 1\)"):
        compare_solvers(Setting(teacher, 24, seed=1), comparison, fit, reference, tmp_path)


def test_another_grid_beside_a_fitted_solver_is_refused(teacher: Artefact) -> None:
    """The fitted solver brings its grid, so that a spacing or an end beside it would be ignored."""
    made = fit_solver(teacher, "ddim", 2, FitSettings(scale=2, batch_size=8), spacing="logsnr", end=0.1)
    drawn = api.sample(teacher, 2, fitted=made)
    np.testing.assert_array_equal(drawn, api.sample(teacher, 2, fitted=made, spacing="logsnr", end=0.1))
    with pytest.raises(ValueError, match=r"grid with spacing='logsnr', but spacing='quadratic' was asked for"):
        api.sample(teacher, 2, fitted=made, spacing="quadratic")
    with pytest.raises(ValueError, match=r"grid with end=0\.1, but end=0\.2 was asked for"):
        api.sample(teacher, 2, fitted=made, end=0.2)


@pytest.mark.parametrize("batch", [0, -1, 1.5, None])
def test_batches_of_no_images_are_refused(batch: Any, teacher: Artefact) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be a whole number of at least 1, got {batch}"):
        api.sample(teacher, 2, 1, batch_size=batch)
