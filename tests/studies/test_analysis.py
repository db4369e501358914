"""Figures of solvers: their numbers are those of the exact flow, and what is drawn is what is written beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import struct

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Data, Labels
from diffusion_distill.denoisers.model import Denoiser
from diffusion_distill.process import edm_grids, grids
from diffusion_distill.process.flow import RectifiedFlow
from diffusion_distill.process.levels import Level, from_logsnr
from diffusion_distill.process.processes import Cosine
from diffusion_distill.solvers import ancestral, ddim, tabulate
from diffusion_distill.solvers.search import Search
from diffusion_distill.studies import lambdas, similarity, trajectories
from diffusion_distill.training import sharding

pytestmark = pytest.mark.fast

SHAPE = (4, 3, 2)
START = np.random.default_rng(0).standard_normal((8, *SHAPE), np.float32)
GRIDS = {
    "VP": grids.clean_end(grids.make_grid(Cosine(), 6)),
    "VP fine": grids.make_grid(Cosine(), 16),
    "VE": edm_grids.edm(7),
}
TABLES = {label: ddim(grid) for label, grid in GRIDS.items()}


class Turning(struct.PyTreeNode):
    """A denoiser whose eps is a unit vector that turns by an angle of label·logsnr / 10."""

    speed: float = 0.1

    def angle(self, logsnr: Array, labels: Array) -> Array:
        """Of a batch."""
        return self.speed * labels * logsnr

    def __call__(self, z: Data, level: Level, labels: Labels | None = None) -> Data:
        """The x_hat that belongs to eps."""
        angle = self.angle(level.logsnr, labels)
        eps = jnp.stack([jnp.cos(angle), jnp.sin(angle), *[jnp.zeros_like(angle)] * (z[0].size - 2)], axis=1)
        alpha, sigma = level.expand(z)
        return (z - sigma * eps.reshape(z.shape)) / alpha


class Broken(struct.PyTreeNode):
    """A denoiser that does not answer with numbers."""

    def __call__(self, z: Data, level: Level, labels: Labels | None = None) -> Data:
        """NaN."""
        return z * jnp.nan


def exact_walk(data: toys.Gaussian, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States [nfe + 1, ...], x_hat and eps [nfe, ...] of DDIM on Gaussian data, all multiples of one deviation w.

    x_hat - mean is a multiple g of w = z - alpha·mean, so that a step multiplies w by sigma_s/sigma_t + d·g; and
    eps = w·sigma/variance.
    """
    grid = GRIDS[label]
    t, s = grid.at(slice(None, -1)), grid.at(slice(1, None))
    r, gain = s.sigma / t.sigma, t.alpha * data.std**2 / data.variance(t)
    factor = np.cumprod([1.0, *(r + (s.alpha - t.alpha * r) * gain)])
    w = factor[:, None, None, None, None] * (TABLES[label].init * START.astype(np.float64) - grid.alpha[0] * data.mean)
    column = (-1, 1, 1, 1, 1)
    states = grid.alpha.reshape(column) * data.mean + w
    return states, data.mean + gain.reshape(column) * w[:-1], (t.sigma / data.variance(t)).reshape(column) * w[:-1]


def norms(values: np.ndarray) -> np.ndarray:
    """Mean norm of images [rows, batch, ...]: [rows]."""
    return np.sqrt((values**2).sum(axis=(2, 3, 4))).mean(axis=1)


def cosines(values: np.ndarray) -> np.ndarray:
    """Mean cosine of the angles between rows [rows, batch, ...]: [rows, rows]."""
    flat = values.reshape(*values.shape[:2], -1)
    flat /= np.linalg.norm(flat, axis=2, keepdims=True)
    return (flat[:, None] * flat[None]).sum(axis=3).mean(axis=2)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that are saved."""
    from matplotlib.figure import Figure

    seen, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (seen.append(self), save(self, path)))
    return seen


def written(folder: Path, name: str) -> dict:
    """The numbers beside a picture."""
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_trajectories_of_gaussian_data(exact: Denoiser, gaussian: toys.Gaussian, tmp_path: Path, figures: list) -> None:
    numbers = trajectories.trajectories(exact, TABLES, jnp.asarray(START), tmp_path / "new" / "folder", pixels=3)
    assert written(tmp_path / "new" / "folder", "trajectories") == numbers
    assert (numbers["images"], numbers["shape"], list(numbers["tables"])) == (8, [4, 3, 2], list(TABLES))
    # Every x_hat is a multiple of the deviation from the mean at the start, and so is its spread over the rows.
    first = START[0] - GRIDS["VP fine"].alpha[0] * gaussian.mean
    farthest = np.unravel_index(np.argsort(-np.abs(first), axis=None)[:3], SHAPE)
    np.testing.assert_array_equal(numbers["places"], np.stack(farthest, axis=1))
    for label, found in numbers["tables"].items():
        states, x_hat, eps = exact_walk(gaussian, label)
        assert found["nfe"] == len(eps)
        np.testing.assert_allclose(found["logsnr"], GRIDS[label].logsnr[:-1], rtol=1e-6, atol=1e-12)
        for name, values in (("state", states), ("x_hat", x_hat), ("eps", eps)):
            atol = 1e-4 if (label, name) == ("VE", "eps") else 0  # float32's 1e-7 of z over sigma, 0.002
            np.testing.assert_allclose(found[name], norms(values), rtol=2e-5, atol=atol, err_msg=f"{label} {name}")
        np.testing.assert_allclose(found["pixels"], states[:, 0, *farthest].T, rtol=2e-5, atol=2e-6)

    [figure] = figures
    drawn = {axes.get_title(loc="left"): [line.get_xydata().T for line in axes.lines[:3]] for axes in figure.axes}
    place = "pixel ({}, {}), channel {}".format(*numbers["places"][0])
    assert list(drawn)[:4] == ["norm of state", "norm of x_hat", "norm of eps", place] and len(drawn) == 6
    end = max(max(found["logsnr"]) for found in numbers["tables"].values())
    for k, found in enumerate(numbers["tables"].values()):
        for title, y in (("norm of state", found["state"]), ("norm of eps", found["eps"]), (place, found["pixels"][0])):
            np.testing.assert_array_equal(drawn[title][k][1], y)
            np.testing.assert_array_equal(drawn[title][k][0][: found["nfe"]], found["logsnr"])
            assert len(y) == found["nfe"] or drawn[title][k][0][-1] > end


def test_trajectories_against_the_fraction_of_the_rows(exact: Denoiser, tmp_path: Path, figures: list) -> None:
    trajectories.trajectories(exact, {"VP": TABLES["VP"]}, jnp.asarray(START[..., :1]), tmp_path, axis="fraction")
    state, x_hat, *_, pixel = figures[0].axes
    np.testing.assert_allclose(state.lines[0].get_xdata(), np.arange(7) / 6)
    np.testing.assert_allclose(x_hat.lines[0].get_xdata(), np.arange(6) / 6)
    assert "channel" not in pixel.get_title(loc="left")


def test_similarity_of_gaussian_data(exact: Denoiser, gaussian: toys.Gaussian, tmp_path: Path, figures: list) -> None:
    start = jnp.asarray(START)
    numbers = similarity.similarity(exact, TABLES, start, tmp_path, output="x_hat")
    assert written(tmp_path, "similarity") == numbers and numbers["output"] == "x_hat"
    for axes, (label, found) in zip(figures[0].axes, numbers["tables"].items(), strict=False):
        np.testing.assert_allclose(found["similarity"], cosines(exact_walk(gaussian, label)[1]), atol=2e-6)
        np.testing.assert_array_equal(axes.images[0].get_array(), found["similarity"])
        assert np.min(found["similarity"]) < 0.9 and axes.get_title() == label
    # The flow of Gaussian data is straight in eps: all of them point the same way.
    eps = similarity.similarity(exact, {"VP": TABLES["VP"]}, start, tmp_path)["tables"]["VP"]["similarity"]
    np.testing.assert_allclose(eps, 1, atol=2e-6)


@pytest.mark.parametrize("split", [False, True])
def test_similarity_of_turning_outputs(tmp_path: Path, split: bool) -> None:
    logsnr, speeds = np.array([-4.0, -2.5, -1.0, 0.5, 3.0, 5.0]), np.arange(8, dtype=np.int32)
    place = sharding.split(sharding.data_mesh()) if split else None
    start, labels = jax.device_put(START, place), jax.device_put(speeds, place)
    table = ddim(from_logsnr(logsnr))
    found = similarity.similarity(Turning(), {"a": table}, start, tmp_path, labels)["tables"]["a"]
    angles = Turning().angle(logsnr[:5, None], speeds)
    np.testing.assert_allclose(found["similarity"], np.cos(angles[:, None] - angles[None]).mean(axis=2), atol=1e-5)


def test_outputs_of_zero_are_like_none(tmp_path: Path) -> None:
    zero = Denoiser(params=(), model=toys.Gaussian(mean=0.0, std=0.0))
    found = similarity.similarity(zero, {"a": TABLES["VP"]}, jnp.asarray(START), tmp_path, output="x_hat")
    np.testing.assert_array_equal(found["tables"]["a"]["similarity"], np.zeros((6, 6)))


def test_lambdas_of_all_directions(tmp_path: Path, figures: list) -> None:
    rng = np.random.default_rng(0)
    fits = {
        "D-DDIM": (rng.normal(size=(5, 1)), np.arange(5.0)),
        "D-DDIM-2": (np.float32(rng.normal(size=(3, 2))), jnp.array([-20.0, 0.0, 3.0])),
        "D-DDIM-All": (rng.normal(size=(6, 6)) * [1e3, 1, 1, 1, 1, 1], np.arange(6.0)),
    }
    numbers = lambdas.lambdas(fits, tmp_path)
    assert written(tmp_path, "lambdas") == numbers
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == ["D-DDIM", "D-DDIM-2, 1", "D-DDIM-2, 2", *(f"D-DDIM-All, {j}" for j in range(1, 7))]
    row, level = figures[0].axes
    assert row.get_yscale() == level.get_yscale() == "asinh"  # thousands beside ones
    j = 0
    for label, (values, logsnr) in fits.items():
        np.testing.assert_allclose(numbers["fits"][label]["lambdas"], values, rtol=1e-6)
        for column in np.array(numbers["fits"][label]["lambdas"]).T:
            np.testing.assert_array_equal(row.lines[j].get_xydata().T, [np.arange(len(column)), column])
            np.testing.assert_array_equal(level.lines[j].get_xydata().T, [logsnr, column])
            j += 1
    looks = [(line.get_color(), line.get_linestyle()) for line in row.lines]
    assert len(set(looks)) == 9 and looks[1][0] == looks[2][0] != looks[0][0]


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    lambdas.lambdas({"a": (np.ones((2, 1)), np.arange(2.0))}, tmp_path / "a")
    assert not list(tmp_path.iterdir())


A = jnp.asarray(START)
NOISY = {"noisy": ancestral(GRIDS["VP"])}
BAD: dict[str, tuple[Callable, tuple, dict, str]] = {
    "no tables": (trajectories.trajectories, ({}, A), {}, "no tables"),
    "no tables to compare": (similarity.similarity, ({}, A), {}, "no tables"),
    "noise": (trajectories.trajectories, (NOISY, A), {}, "Table 'noisy' draws noise of its own"),
    "noise to compare": (similarity.similarity, (NOISY, A), {}, "Table 'noisy' draws noise of its own"),
    "one image": (
        similarity.similarity,
        (TABLES, A[0, 0, 0]),
        {},
        r"batch, ...\], got shape \(2,\)",
    ),
    "no pixels": (trajectories.trajectories, (TABLES, A), {"pixels": 0}, "number of pixels"),
    "pixels": (trajectories.trajectories, (TABLES, A), {"pixels": 25}, r"\(4, 3, 2\) has 24 values; got pixels=25"),
    "axis": (trajectories.trajectories, (TABLES, A), {"axis": "snr"}, "Unknown axis 'snr'. Did you mean 'logsnr'"),
    "output": (similarity.similarity, (TABLES, A), {"output": "x"}, "Unknown output 'x'"),
    "values": (trajectories.trajectories, (TABLES, A), {}, "'VP' has values that are not finite"),
    "values to compare": (similarity.similarity, (TABLES, A), {}, "'VP' has values that are not finite"),
}


@pytest.mark.parametrize(("function", "given", "options", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_drawn_is_refused(
    tmp_path: Path, function: Callable, given: tuple, options: dict, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        function(Broken(), *given, tmp_path, **options)
    assert not list(tmp_path.iterdir())


BAD_FITS: dict[str, tuple[dict, str]] = {
    "none": ({}, "no fits"),
    "one axis": ({"a": (np.ones(3), np.ones(3))}, r"Fit 'a' needs lambdas \[rows, D\].*got \(3,\)"),
    "lengths": ({"a": (np.ones((3, 1)), np.ones(2))}, r"got \(3, 1\) and \(2,\)"),
    "values": ({"a": (np.full((3, 1), np.nan), np.ones(3))}, "'a' has values that are not finite"),
}


@pytest.mark.parametrize(("fits", "said"), BAD_FITS.values(), ids=BAD_FITS)
def test_fits_that_cannot_be_drawn_are_refused(tmp_path: Path, fits: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lambdas.lambdas(fits, tmp_path)
    assert not list(tmp_path.iterdir())


def test_candidates_of_searches(tmp_path: Path, figures: list) -> None:
    """The value against lambda, sorted; a panel for each metric, and a gap where images were not finite."""
    values = np.array([3.0, np.nan, 1.0, 2.0])
    searches = {
        "Fixed": Search("frechet", np.array([0.4, 0.5, 0.1, 0.2]), values, 0.1),
        "LA": Search("frechet", np.array([0.1, 0.2, 0.3]), np.array([5.0, 4.0, 6.0]), 0.2),
        "LA by distance": Search("l2", np.array([0.1, 0.2]), np.array([0.5, 0.4]), 0.2),
    }
    numbers = lambdas.candidates(searches, tmp_path)
    assert written(tmp_path, "candidates") == numbers
    fixed = numbers["searches"]["Fixed"]
    assert fixed["candidates"] == [0.1, 0.2, 0.4, 0.5] and fixed["values"] == [1.0, 2.0, 3.0, None]
    assert [entry["at edge"] for entry in numbers["searches"].values()] == [True, False, True]
    by_frechet, by_distance = figures[0].axes
    assert (by_frechet.get_ylabel(), by_distance.get_ylabel()) == ("frechet", "l2")
    np.testing.assert_array_equal(by_frechet.lines[0].get_xydata()[:3], [[0.1, 1], [0.2, 2], [0.4, 3]])
    np.testing.assert_array_equal(by_frechet.lines[1].get_xydata(), [[0.1, 5], [0.2, 4], [0.3, 6]])
    np.testing.assert_array_equal(by_distance.lines[0].get_xydata(), [[0.1, 0.5], [0.2, 0.4]])
    with pytest.raises(ValueError, match="no searches"):
        lambdas.candidates({}, tmp_path / "none")


@pytest.mark.parametrize("shape", [(5,), (6, 2), (3, 3, 3, 1)])
def test_samples_of_any_shape_from_pure_noise(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A rectified flow begins without signal: its first log-SNR, -inf, is drawn at the left, and null in JSON."""
    data, process = toys.Gaussian(0.2, 0.3), RectifiedFlow()
    grid = process.level(np.linspace(1, 0.1, 5))
    tables = {"flow": tabulate("ddim", grid, process).plain()}
    start = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    exact = Denoiser(params=(), model=data)  # type: ignore[arg-type]
    found = trajectories.trajectories(exact, tables, start, tmp_path, pixels=2)["tables"]["flow"]
    assert found["logsnr"][0] is None and len(found["pixels"]) == 2
    np.testing.assert_allclose(found["state"][0], np.linalg.norm(start.reshape(3, -1), axis=1).mean(), rtol=1e-5)
    alike = np.array(similarity.similarity(exact, tables, start, tmp_path)["tables"]["flow"]["similarity"])
    np.testing.assert_allclose(np.diag(alike), 1, rtol=1e-5)
    assert (tmp_path / "trajectories.png").is_file()
