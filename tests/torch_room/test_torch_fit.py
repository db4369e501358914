"""Fits in PyTorch find the lambdas that the fit on the host finds, in pipelines too; files go both ways. Chosen levels.

diffusers is asked in this Python, or in the one that the variable PEER_PYTHON names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from peers import answers_of
from torch_problems import FITS, PROCESSES, START, denoise, grid_of, whole_table

from diffusion_distill.solvers import dode, tabulate
from diffusion_distill.solvers.engine import run_host
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.least_squares import Fit
from diffusion_distill.solvers.pairing import nested, teacher_of


def on_the_host(solver: str, scale: int) -> Fit:
    student, process = whole_table(f"{solver}|discrete"), PROCESSES["discrete"]
    teacher = nested(student, process, scale, lambda grid: tabulate(teacher_of(solver), grid, process))
    return dode.fit_host(denoise, student, teacher, START, largest=1000.0)


@pytest.fixture(scope="module")
def fitted() -> FittedSolver:
    """D-DDIM, fitted here."""
    found = on_the_host("ddim", 10)
    return FittedSolver("ddim", PROCESSES["discrete"], grid_of("discrete"), found.lambdas, found.plain, found.fitted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, fitted: FittedSolver) -> Path:
    fitted.save(made := tmp_path_factory.mktemp("fits") / "fitted.json")
    return made.parent


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, np.ndarray]:
    """What PyTorch finds; see `peer_fits`."""
    return answers_of("peer_fits.py", "diffusers", folder)


@pytest.mark.parametrize(("solver", "scale"), FITS, ids=[solver for solver, _ in FITS])
def test_lambdas_are_those_of_the_fit_on_the_host(answers: dict[str, np.ndarray], solver: str, scale: int) -> None:
    expected = on_the_host(solver, scale)
    told = expected.fitted < 0.99 * expected.plain  # where directions vanish, lambdas are those of rounding errors
    assert told.sum() >= 3
    np.testing.assert_allclose(answers[f"fit/{solver}"][told], expected.lambdas[told], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(answers[f"distances/{solver}"], [expected.plain, expected.fitted], rtol=1e-5, atol=1e-7)
    assert answers[f"calls/{solver}"] == (scale + 1) * len(expected.lambdas)


def test_files_go_both_ways(answers: dict[str, np.ndarray], folder: Path, fitted: FittedSolver) -> None:
    np.testing.assert_allclose(answers["known"], run_host(fitted.table(), denoise, START), rtol=1e-9, atol=1e-9)
    own = FittedSolver.load(folder / "own.json")
    assert (own.solver, own.process) == (fitted.solver, fitted.process) and own.provenance["images"] == len(START)
    np.testing.assert_allclose(own.lambdas, fitted.lambdas, rtol=1e-6)
    assert (folder / "own.json").stat().st_size < 8192


@pytest.mark.parametrize("name", ["text", "labels", "flow", "flux"])
def test_a_fit_in_a_guided_pipeline_brings_it_nearer_to_its_teacher(answers: dict[str, np.ndarray], name: str) -> None:
    plain, fitted = answers[f"pipeline/{name}"]
    assert fitted < 0.7 * plain


def test_levels_are_the_cheapest_and_serve_schedulers_of_diffusers(answers: dict[str, np.ndarray]) -> None:
    assert answers["paths/ours"].tolist() == answers["paths/all"].tolist()
    scale = np.abs(answers["chosen/theirs"]).max()
    np.testing.assert_allclose(answers["chosen/ours"], answers["chosen/theirs"], rtol=0, atol=1e-5 * scale)
    assert answers["chosen/timesteps"].dtype == np.int64 and answers["chosen/timesteps"][0] == 999
    assert len(answers["chosen/sigmas"]) == 5 and answers["chosen/sigmas"][-1] == 0
    assert answers["chosen/cost"][0] < answers["chosen/cost"][1]
    for name in ("flow", "flux"):  # theirs moves sigmas by its shift
        np.testing.assert_allclose(answers[f"{name}/levels"], answers[f"{name}/theirs"], rtol=1e-6, atol=1e-7)
        assert np.abs(answers[f"{name}/sigmas"] - answers[f"{name}/levels"]).max() > 0.05


def test_the_command_writes_fits_and_levels(answers: dict[str, np.ndarray]) -> None:
    assert answers["command/facts"].tolist() == [2, 3, 12]
    assert len(answers["command/timesteps"]) == 3 and answers["command/timesteps"][0] == 999
    for said in ("there is a folder of that name", "has no option", "must be text in UTF-8", "Expected one of"):
        assert any(said in str(message) for message in answers["command/refused"]), said
