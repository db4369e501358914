"""One contract for every mesh of devices: the same numbers, each device with its share, checkpoints for all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import jax
import numpy as np
import places
import pytest
import toys
from jax.sharding import Mesh
from toys import equal

from diffusion_distill import api
from diffusion_distill.api import monitor
from diffusion_distill.api.sampling import sample_keys
from diffusion_distill.base.seeds import key_of
from diffusion_distill.data.sources import from_arrays
from diffusion_distill.denoisers.model import Model
from diffusion_distill.evaluation.measuring import Part, as_features, distances
from diffusion_distill.methods import Denoising, Tract
from diffusion_distill.process.processes import Cosine
from diffusion_distill.solvers import engine
from diffusion_distill.studies.comparison import Comparison, Setting, compare_solvers
from diffusion_distill.studies.subject import run, subject
from diffusion_distill.training import dispatch, ema, loop, sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.checkpoint import Checkpoints
from diffusion_distill.training.logs import read_figures
from diffusion_distill.training.optimizers import OptimizerSettings, make_clip, make_optimizer
from diffusion_distill.training.settings import Settings
from diffusion_distill.training.state import TrainState, create
from diffusion_distill.training.step import StepInputs, make_step

#: (data, params); the first is the one device that the others are compared with.
MESHES = ((1, 1), (2, 1), (8, 1), (1, 8), (2, 4), (4, 2))
UPDATES, BATCH = 10, 16
METHOD = Tract((8, 4, 1), length="1K")
every_mesh = pytest.mark.parametrize("sizes", MESHES, ids=str)
every_other = pytest.mark.parametrize("sizes", MESHES[1:], ids=str)


@pytest.fixture(autouse=True, scope="module")
def _small_arrays_are_split() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "LEAST_SPLIT", 64)
        yield


def mesh_of(sizes: tuple[int, int]) -> Mesh:
    return sharding.make_mesh(*sizes, jax.devices()[: sizes[0] * sizes[1]])


def tiny() -> Model:
    return Model(toys.Perceptron(out_ch=1, width=64), (2, 2, 1), Cosine(), prediction="v")


class Run:
    """Updates of a TRACT student on a mesh."""

    def __init__(self, sizes: tuple[int, int], parts: int = 1, clip_scope: str = "global"):
        self.mesh, model, settings = mesh_of(sizes), tiny(), OptimizerSettings(clip_scope=clip_scope)
        optimizer, phase = make_optimizer(settings), METHOD.phases(model, BATCH)[0]
        state = create(toys.parameters(model), optimizer, METHOD.averages, toys.parameters(model, 1))
        self.state: TrainState = sharding.place(state, self.mesh)
        self.places = sharding.places(state, self.mesh)
        clip = make_clip(settings) if clip_scope == "shard" else None
        self.step = make_step(
            METHOD.losses, model, model, optimizer, self.mesh, parts=parts, shard_clip=clip, places=self.places
        )
        averaging = ema.Averaging([phase], 0, METHOD.averages).at
        self.inputs = lambda update: StepInputs(loop.rows_of(phase), np.float32(1e-3), averaging(update))

    def images(self, update: int) -> dict[str, Any]:
        """The same on every mesh."""
        return {"x": np.random.default_rng(update).uniform(-1, 1, (BATCH, 2, 2, 1)).astype(np.float32)}

    def update(self, number: int) -> float:
        """Makes an update; its loss."""
        batch = sharding.put_batch(self.images(number), self.mesh)
        self.state, metrics = self.step(self.state, batch, self.inputs(number), jax.random.key(3))
        return float(metrics["loss"])


@dataclass(frozen=True)
class Done:
    """What ten updates gave."""

    run: Run
    losses: list[float]
    checkpoints: Path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Done]:
    found = {}
    for sizes in MESHES:
        run, folder = Run(sizes), tmp_path_factory.mktemp("mesh")
        losses = [run.update(number) for number in range(UPDATES)]
        kept = Checkpoints(folder)
        kept.save(UPDATES, run.state)
        kept.close()
        found[sizes] = Done(run, losses, folder)
    return found


def bytes_of_a_device(state: TrainState) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))


@every_other
def test_ten_updates_are_those_of_one_device(sizes: tuple[int, int], done: dict) -> None:
    one, other = done[MESHES[0]], done[sizes]
    np.testing.assert_allclose(other.losses, one.losses, rtol=2e-6)
    chex.assert_trees_all_close(other.run.state.params, one.run.state.params, rtol=0, atol=2e-6)
    chex.assert_trees_all_close(other.run.state.averages, one.run.state.averages, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("parts", "scope"), [(2, "global"), (1, "shard")])
def test_parts_and_clipping_by_share_do_not_see_which_axis_is_split(parts: int, scope: str) -> None:
    plain, split = (Run(sizes, parts, scope) for sizes in ((8, 1), (2, 4)))
    for number in range(2):
        assert split.update(number) == pytest.approx(plain.update(number), rel=2e-6)
    chex.assert_trees_all_close(split.state.params, plain.state.params, rtol=0, atol=2e-6)
    assert jax.tree.map(lambda leaf: leaf.sharding, split.state) == split.places


def test_several_updates_in_one_dispatch_keep_the_places_of_the_state(done: dict) -> None:
    run = Run((2, 4))
    several = dispatch.several(run.step, run.mesh, run.places)
    batches = dispatch.put([run.images(number) for number in range(UPDATES)], run.mesh)
    inputs = dispatch.stacked([run.inputs(number) for number in range(UPDATES)])
    state, _ = several(run.state, batches, inputs, jax.random.key(3))
    chex.assert_trees_all_close(state.params, done[2, 4].run.state.params, rtol=0, atol=1e-6)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == run.places


@every_mesh
def test_a_device_has_its_share_of_the_state_and_an_update_puts_out_no_more(sizes: tuple[int, int], done: dict) -> None:
    run, whole = done[sizes].run, bytes_of_a_device(done[MESHES[0]].run.state)
    share = bytes_of_a_device(run.state)
    assert share == whole if sizes[1] == 1 else whole / sizes[1] <= share < 1.25 * whole / sizes[1]
    batch = sharding.put_batch(run.images(0), run.mesh)
    compiled = run.step.lower(run.state, batch, run.inputs(0), jax.random.key(3)).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == share  # the new state takes the place of the old one
    assert memory.output_size_in_bytes < share + 1000  # and the metrics
    assert ("all-gather" in (compiled.as_text() or "")) == (sizes[1] > 1)


@every_other
def test_noise_samples_and_fits_are_those_of_one_device(sizes: tuple[int, int]) -> None:
    one, mesh, teacher = mesh_of(MESHES[0]), mesh_of(sizes), Artefact(tiny(), toys.parameters(tiny()))
    noise = [
        engine.noise(sample_keys(key_of(7), np.arange(BATCH), sharding.split(where)), 0, (2, 2, 1))
        for where in (one, mesh)
    ]
    assert equal(*noise)
    drawn = [api.sample(teacher, 64, 4, seed=5, mesh=where) for where in (one, mesh)]
    np.testing.assert_allclose(*drawn, rtol=0, atol=2e-6)
    real = Part.of(as_features(None, (2, 2, 1)), np.random.default_rng(0).uniform(-1, 1, (64, 2, 2, 1)))
    parts = [Part.of(as_features(None, (2, 2, 1)), images) for images in drawn]
    frechet = [distances(part, real, k=3, limit=64)["frechet"] for part in parts]
    assert frechet[1] == pytest.approx(frechet[0], rel=1e-5)
    settings = api.FitSettings(scale=3, batch_size=BATCH)
    fits = [api.fit_solver(teacher, "ddim", 3, settings, mesh=where) for where in (one, mesh)]
    np.testing.assert_allclose(fits[1].lambdas, fits[0].lambdas, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_studies_are_those_of_one_device(sizes: tuple[int, int], tmp_path: Path) -> None:
    """A comparison of solvers and a trajectory; none of the devices has all parameters."""
    teacher, real = Artefact(tiny(), toys.parameters(tiny())), toys.GaussianSource(toys.Gaussian(0.1, 0.4), size=40)
    comparison, fit = Comparison(("ddim",), (2,), truth_steps=4), api.FitSettings(scale=2, batch_size=BATCH)
    rows, paths = [], []
    for where in (mesh_of(MESHES[0]), mesh_of(sizes)):
        setting = Setting(teacher, 2 * BATCH, batch_size=BATCH, mesh=where)
        shares = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(setting.sampler(steps=2).denoise)]
        assert all(shares) == (where.shape["params"] == 1)
        rows.append(compare_solvers(setting, comparison, fit, real, tmp_path / str(where.size), lambda line: None))
        seen = subject(teacher, steps=2, count=BATCH, mesh=where)
        paths.append([run(seen.denoise, table, seen.start, seen.cond) for table in seen.tables.values()])
    chex.assert_trees_all_close(*paths, rtol=0, atol=2e-6)
    for one, other in zip(*rows, strict=True):
        # A rounding of lambdas by 1e-8 moves what a fitted solver draws by up to 5e-4, and then bytes by one.
        near = 1e-2 if one["fitted"] else 1e-5
        for name in ("frechet", "error"):
            assert other[name] == pytest.approx(one[name], rel=near)


def test_an_evaluation_draws_on_the_mesh_of_its_run(
    tmp_path: Path, toy_networks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, draw, where = toys.GaussianSource(toys.Gaussian(0.1, 0.4), size=40), monitor.sample, []
    monkeypatch.setattr(
        monitor, "sample", lambda *args, mesh, **how: where.append(mesh) or draw(*args, mesh=mesh, **how)
    )
    figures = []
    for number in (1, 4):
        settings = Settings(batch_size=BATCH, evaluate_every="32", evaluate_count=20, params_parallel=number)
        api.train(tiny(), source, Denoising(length="32"), settings, tmp_path / str(number))
        records = read_figures(tmp_path / str(number) / "metrics.jsonl")
        figures.append({name: value for name, value in records[-1].items() if name.startswith("frechet")})
    assert [mesh.shape["params"] for mesh in where] == [1, 1, 4, 4]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4) and set(figures[0]) == {"frechet/eval", "frechet/raw"}


@every_mesh
def test_a_checkpoint_of_a_mesh_is_read_on_every_other(sizes: tuple[int, int], done: dict) -> None:
    kept = Checkpoints(done[sizes].checkpoints)
    for other in MESHES:
        like = Run(other).state
        found = kept.restore(like)
        assert equal(found, done[sizes].run.state)
        assert jax.tree.map(lambda a: a.sharding, found.params) == jax.tree.map(lambda a: a.sharding, like.params)
    kept.close()


def train(length: str, folder: Path | None, **numbers: int) -> Artefact:
    """On all devices there are."""
    source = from_arrays(np.random.default_rng(0).normal(0.1, 0.3, (64, 2, 2, 1)).clip(-1, 1).astype(np.float32))
    how = Denoising(length=length, momentum=0.9), Settings(batch_size=BATCH, **numbers)  # type: ignore[arg-type]
    return api.train(tiny(), source, *how, folder)


def test_a_run_goes_on_on_fewer_devices(tmp_path: Path, toy_networks: None) -> None:
    """Begun on eight devices, ended by a process that has one."""
    plain = train("0.25K", None)
    train("0.125K", tmp_path, params_parallel=4)
    rooms = (places.ROOT, places.ROOT / "tests", Path(__file__).parent)
    end = (
        "import jax, pathlib, sys, toys, diffusion_distill as dd, test_meshes; dd.NETWORKS['perceptron'] = "
        "toys.Perceptron; test_meshes.train('0.25K', pathlib.Path(sys.argv[1])); print(jax.device_count())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, rooms))}
    told = subprocess.run([sys.executable, "-c", end, tmp_path], env=environment, capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.endswith("\n1\n"), told.stderr
    assert "going on after update 8" in told.stdout
    chex.assert_trees_all_close(Artefact.load(tmp_path / "teacher").params, plain.params, rtol=0, atol=1e-5)


def test_a_run_goes_on_on_another_mesh(tmp_path: Path, toy_networks: None) -> None:
    """Training itself: begun with its state split over four devices, ended with a whole state on each."""
    plain = train("0.25K", None)
    begun = train("0.125K", tmp_path, params_parallel=4)
    assert {leaf.sharding.mesh.shape["params"] for leaf in jax.tree.leaves(begun.params)} == {4}
    assert equal(Artefact.load(tmp_path / "teacher").params, begun.params)
    ended = train("0.25K", tmp_path)
    chex.assert_trees_all_close(ended.params, plain.params, rtol=0, atol=1e-5)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


REFUSED: dict[str, tuple[Any, str]] = {
    "numbers that do not multiply": (lambda: sharding.make_mesh(3, 2), r"times params_parallel=2 must be .* is 8"),
    "what is left is no whole number": (lambda: sharding.make_mesh(-1, 3), r"number of devices, which is 8"),
    "more than there are": (lambda: sharding.make_mesh(-1, 16), r"number of devices, which is 8"),
    "both left": (lambda: Settings(data_parallel=-1, params_parallel=-1), "both -1"),
    "zero": (lambda: Settings(params_parallel=0), "params_parallel, if not -1"),
    "a batch": (lambda: sharding.check_batch(12, sharding.make_mesh(2, 4)), r"devices \(8\), got 12"),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", REFUSED)
def test_a_mesh_that_cannot_be_is_refused_in_words(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def hosts(count: int, each: int) -> list[Any]:
    """Devices of several hosts."""
    return [
        SimpleNamespace(id=k, process_index=k // each, platform="gpu", device_kind="GPU") for k in range(count * each)
    ]


@pytest.mark.fast
def test_a_state_lies_within_a_host() -> None:
    found = sharding.arranged(4, 2, hosts(2, 4))
    assert [[device.id for device in row] for row in found] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match=r"params_parallel=8 must divide the devices of each host .* 4 of 8"):
        sharding.arranged(1, 8, hosts(2, 4))
