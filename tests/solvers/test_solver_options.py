"""Solvers by name: each with each of its options, on VP and on alpha = 1, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import numpy as np
import pytest
import toys

from diffusion_distill import api
from diffusion_distill.denoisers.model import Model
from diffusion_distill.process import edm_grids, grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import VE, Cosine, LinearBeta, Process
from diffusion_distill.solvers import SOLVERS, registry, spelled, steps_for, tabulate
from diffusion_distill.solvers.options import known
from diffusion_distill.studies.comparison import Comparison
from diffusion_distill.training.artefact import Artefact

pytestmark = pytest.mark.fast

LINEAR, TWICE = LinearBeta(t_min=0.0), LinearBeta(beta_max=30.0, t_min=0.0)
#: kind -> (grid to zero noise, the model's schedule)
KINDS: dict[str, tuple[Level, Process]] = {
    "VP": (grids.clean_end(grids.make_grid(LINEAR, 6)), LINEAR),
    "VE": (edm_grids.edm(6), VE()),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def other_output(kind: str) -> str:
    return "x_hat" if kind == "VP" else "eps"


def lowered(kind: str) -> Level:
    grid = KINDS[kind][0]
    return Level(grid.alpha[:-1], 0.9 * grid.sigma[:-1])


CHURN: dict[str, Any] = {"s_churn": 2.0}
TIMES: dict[str, Any] = {"schedule": "vp"}
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "s_churn": (2.0, {}),
    "s_min": (2.0, CHURN),
    "s_max": (2.0, CHURN),
    "s_noise": (1.1, CHURN),
    "known": ([0.01, 0.1, 1.0, 10.0, 200.0], CHURN),
}
DPM: dict[str, tuple[Any, dict[str, Any]]] = {
    "order": (3, {}),
    "method": ("singlestep", {}),
    "kind": ("taylor", {}),
    "plan": ([1, 2, 2, 1], {"method": "singlestep"}),
    "lower_order_final": (False, {"order": 3}),
}
VARIANT: dict[str, tuple[Any, dict[str, Any]]] = {"output": (other_output, {})}
#: solver -> option -> (a value that is not the default's, or its function of the kind; options that it needs beside it)
OPTIONS: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "ddim": VARIANT,
    "euler": VARIANT,
    "ancestral": {"gamma": (0.3, {})},
    "heun": {**OTHERS, "keep_slope": (True, {})},
    "two_stage": {"alpha": (1.0, {}), **OTHERS, "trial": ("log", {}), "keep_slope": (True, {"alpha": 0.7})},
    "ablation": {
        "schedule": ("ve", {}),
        "scaling": (lambda kind: "none" if kind == "VP" else "vp", {}),
        "solver": ("euler", {}),
        "alpha": (0.5, {}),
        "epsilon_s": (0.01, TIMES),
        "sigma_range": ([0.001, 300.0], TIMES),
        **OTHERS,
    },
    "ipndm": {"order": (2, {}), "told": (lowered, {})},
    "deis": {
        "order": (2, {}),
        "process": (lambda kind: TWICE if kind == "VP" else edm_grids.fitted_beta(0.002, 80.0), {}),
        "quadrature": ("left", {}),
        "told": (lowered, {}),
    },
    "dpm_solver": DPM,
    "dpm_solver++": DPM,
    "unipc": {
        "order": (2, {}),
        "variant": ("bh1", {}),
        "output": ("eps", {}),
        "lower_order_final": (False, {}),
        "correct_final": (True, {}),
    },
    "midpoint": {},
    "rk4": {},
    "ddim-sep": VARIANT,
    "ddim-all": VARIANT,
    "ddim-2": VARIANT,
    "ddim-la": {"output": ("eps", {})},
}
#: These values are refused, because nothing is there for them to act on.
REFUSED = {
    ("unipc", "correct_final"): "zero noise cannot be corrected",
    ("ddim-la", "output"): "leave out output='eps'",
}
CASES = [(solver, option) for solver, options in OPTIONS.items() for option in options]


def given(solver: str, kind: str) -> dict[str, Any]:
    """What `tabulate` gives a solver beside its options."""
    takes = "process" in known(SOLVERS[solver]) and not (solver == "deis" and kind == "VE")
    return {"process": KINDS[kind][1]} if takes else {}


def test_every_option_of_every_solver_is_tried() -> None:
    assert {solver: set(registry.options_of(solver)) for solver in SOLVERS} == {s: set(o) for s, o in OPTIONS.items()}
    passed = {"clean", "spacing", "end", *registry.COMMON}
    assert not passed & {option for _, option in CASES}, "of functions that pass the options of a solver on"


@every_kind
@pytest.mark.parametrize(("solver", "option"), CASES)
def test_an_option_acts_by_name_as_it_does_directly_or_is_refused(solver: str, option: str, kind: str) -> None:
    (grid, schedule), (value, others) = KINDS[kind], OPTIONS[solver][option]
    options = {**others, option: value(kind) if callable(value) and not isinstance(value, Process) else value}
    if (solver, option) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[solver, option]):
            tabulate(solver, grid, schedule, **options)
        return
    expected = SOLVERS[solver](grid, **{**given(solver, kind), **options})
    chex.assert_trees_all_equal(tabulate(solver, grid, schedule, **options), expected)
    if all(isinstance(v, str | int | float | list) for v in options.values()):
        text = " ".join([solver, *(f"{name}={str(v).replace(' ', '')}" for name, v in options.items())])
        chex.assert_trees_all_equal(tabulate(text, grid, schedule), expected)
    without = tabulate(solver, grid, schedule, **others)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(expected, without)


@every_kind
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_by_name_is_itself(solver: str, kind: str) -> None:
    grid, schedule = KINDS[kind]
    chex.assert_trees_all_equal(tabulate(solver, grid, schedule), SOLVERS[solver](grid, **given(solver, kind)))


def test_options_of_the_same_names_as_parameters() -> None:
    """The ablation's `solver` and `schedule`, through every function that passes options on."""
    (vp, schedule), (ve, _) = KINDS["VP"], KINDS["VE"]
    euler = SOLVERS["ablation"](ve, schedule="vp", solver="euler")
    chex.assert_trees_all_equal(tabulate("ablation", ve, solver="euler", schedule="vp"), euler)
    assert tabulate("ablation", vp, schedule, solver="euler", schedule="ve").nfe == 6
    assert steps_for("ablation", 6, solver="euler", schedule="ve") == 6 and steps_for("ablation", 7) == 4
    assert spelled("ablation", solver="euler") == ("ablation", {"solver": "euler"})
    model = Model(toys.Perceptron(1), (2, 2, 1), schedule)
    assert api.table_for(model, 6, "ablation", solver="euler").nfe == 6
    assert api.table_for(model, 6, solver="heun").nfe == 11, "without one by place, it names the solver"


def test_deis_in_time_or_in_sigma() -> None:
    """null asks for no schedule; at alpha = 1 the model's own is sigma, and another one may be asked for."""
    (vp, schedule), (ve, karras) = KINDS["VP"], KINDS["VE"]
    chex.assert_trees_all_equal(tabulate("deis process=null", vp, schedule), SOLVERS["deis"](vp))
    chex.assert_trees_all_equal(tabulate("deis", ve, karras), SOLVERS["deis"](ve))


WRONG: dict[str, str] = {
    "dpm_solver++ ordr=3": r"'dpm_solver\+\+' has no option 'ordr'. Did you mean 'order'\?",
    "dpm_solver output=x_hat": "has no option 'output'",
    "ddim-sep variant=all": "has no option 'variant'",
    "ddim grid=3": "has no option 'grid'",
    **{
        f"{solver} order={value}": f"'order' of the solver {solver!r} must be a whole number, got {said}"
        for solver in ("ipndm", "deis", "dpm_solver", "unipc")
        for value, said in (("abc", "'abc'"), ("2.5", "2.5"), ("True", "True"), ("2.0", "2.0"), ("", "''"))
    },
    "ancestral gamma=small": "'gamma' .* must be a number, got 'small'",
    "dpm_solver lower_order_final=abc": "must be true or false or null, got 'abc'",
    "heun keep_slope=1": "must be true or false, got 1",
    "dpm_solver method=singlestep plan=3": r"must be a list \[a whole number, ...\] or null, got 3",
    "dpm_solver method=singlestep plan=[2,1.5]": r"got \[2, 1.5\]",
    "ablation schedule=vp sigma_range=[1]": r"must be a list \[a number, a number\] or null, got \[1\]",
    "heun s_churn=2 known=abc": "'known' .* got 'abc'",
    "deis process=linear": "'process' of the solver 'deis' must be Process or null, got 'linear'",
    "unipc variant=3": "must be a text, got 3",
    "deis order=2 order=3": "'order' is written twice",
    "deis order": "option=value.*got 'order'",
    "deis order = 3": "Leave out blanks",
    "deis =3": "option=value.*got '=3'",
    "deis ending=last": "Unknown ending 'last'.*published, x_hat",
    "dies": "Did you mean 'deis'",
    "": "Unknown solver ''",
    "ablation epsilon_s=0.01": "for schedule='vp'",
    "ablation solver=euler alpha=0.5": "for solver='heun'",
    "dpm_solver method=singlestep lower_order_final=true": "lower_order_final is for method='multistep'",
}  # fmt: skip


@every_kind
@pytest.mark.parametrize(("name", "said"), WRONG.items(), ids=WRONG)
def test_wrong_options_are_refused_by_name(name: str, said: str, kind: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        tabulate(name, *KINDS[kind])


def test_what_else_is_refused() -> None:
    grid, schedule = KINDS["VP"]
    with pytest.raises(ValueError, match="'order' is given behind the name, in 'deis order=2', and by keyword"):
        tabulate("deis order=2", grid, schedule, order=3)
    with pytest.raises(ValueError, match="Unknown solver 3"):
        tabulate(3, grid)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"one solver.*\('deis', 3\)"):
        api.table_for(Model(toys.Perceptron(1), (2, 2, 1)), 6, "deis", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no option 'ordr'"):
        Comparison(("ddim", "deis ordr=2"))


@pytest.mark.parametrize("order", [True, 2.0])
@pytest.mark.parametrize("solver", ["ipndm", "deis", "dpm_solver", "dpm_solver++", "unipc"])
def test_orders_are_whole_numbers(solver: str, order: Any) -> None:
    with pytest.raises(ValueError, match=f"got .*{order}"):
        SOLVERS[solver](KINDS["VP"][0], order=order)


def test_solvers_of_users_need_no_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda grid, weight=0.5, mode=None: SOLVERS["ddim"](grid)  # noqa: E731
    monkeypatch.setitem(SOLVERS, "mine", make)
    assert spelled("mine weight=1 mode=fast") == ("mine", {"weight": 1, "mode": "fast"})
    with pytest.raises(TypeError, match="'weight' of the solver 'mine' must be a number, got 'half'"):
        spelled("mine weight=half")
    monkeypatch.setitem(SOLVERS, "anything", lambda grid, **options: SOLVERS["ddim"](grid))
    assert spelled("anything weight=half") == ("anything", {"weight": "half"})


# ------------------------------------------------------------------------------------------------- the last step

#: Solvers whose published step to zero noise is not x_hat: on every kind, or on VP only.
EXTRAPOLATE = {"ipndm": None, "deis": None, "unipc output=eps": None, "ablation schedule=ve": None, "ablation": "VP"}


@every_kind
@pytest.mark.parametrize("name", sorted({*SOLVERS, *EXTRAPOLATE}))
def test_a_step_to_zero_noise_can_end_in_x_hat(name: str, kind: str) -> None:
    grid, schedule = KINDS[kind]
    published, ended = (tabulate(name, grid, schedule, ending=ending) for ending in ("published", "x_hat"))
    x_hat = np.eye(published.weights.shape[2])[-1]
    np.testing.assert_array_equal(ended.weights[-1, 0], x_hat)
    for part in (slice(None, -1), (slice(None), slice(1, None))):  # nothing else has changed
        np.testing.assert_array_equal(ended.weights[part], published.weights[part])
    is_x_hat = np.allclose(published.weights[-1, 0], x_hat, atol=1e-12)
    assert is_x_hat == (name not in EXTRAPOLATE or EXTRAPOLATE[name] not in (None, kind))
    with pytest.raises(ValueError, match="ends at zero noise"):
        tabulate(name, grid.at(slice(None, -1)), schedule, ending="x_hat")


@pytest.mark.parametrize("make", [partial(SOLVERS["ipndm"], order=1), partial(SOLVERS["deis"], order=1)])
def test_of_order_one_the_published_ending_is_x_hat(make: Callable[..., Any]) -> None:
    table = make(KINDS["VP"][0]).plain()
    np.testing.assert_allclose(table.weights[-1, 0], [0, 1], atol=1e-12)


# ------------------------------------------------------------------------------------------------ grids of models


def test_a_table_has_as_many_steps_as_asked_for() -> None:
    """EDM's levels depend on their number: a model's table is on the grid of that many, a student's on its own."""
    model = Model(toys.Perceptron(1), (2, 2, 1), VE(), prediction="x")
    for steps in (5, 9, 18):
        np.testing.assert_array_equal(api.table_for(model, steps).level.sigma, edm_grids.edm(steps).sigma[:-1])
        chex.assert_trees_all_equal(api.grid_for(model, steps), edm_grids.edm(steps))
    teacher, student = (Artefact(model, {}, steps=steps) for steps in (0, 9))
    chex.assert_trees_all_equal(api.grid_for(teacher, 9), edm_grids.edm(9))
    chex.assert_trees_all_equal(api.grid_for(student, 9), edm_grids.edm(9))
    own = dataclasses.replace(student, grid=edm_grids.edm(18).at(slice(None, None, 2)))
    assert own.grid is not None
    chex.assert_trees_all_equal(api.grid_for(own, 9), own.grid)
    chex.assert_trees_all_equal(api.grid_for(own, 3), edm_grids.edm(18).at(slice(None, None, 6)))
    chex.assert_trees_all_equal(api.grid_for(own, 9, "rho", 0.1), grids.make_grid(VE(), 9, "rho", end=0.1))
    cosine = Model(toys.Perceptron(1), (2, 2, 1), Cosine())
    chex.assert_trees_all_equal(api.grid_for(cosine, 5), grids.clean_end(grids.make_grid(Cosine(), 5)))
