"""experiments/: every item says its cost at every scale, and each kind of cell runs once, resumes, and is collected."""

from __future__ import annotations

import importlib
import json
import runpy
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toys
from places import ROOT

import diffusion_distill as dd
from diffusion_distill.base.arrays import stratified
from diffusion_distill.evaluation.measuring import EvaluationSettings
from diffusion_distill.process.levels import Level
from experiments import results_page
from experiments.common import cells as kinds
from experiments.common import collect, costs, runner, scales
from experiments.common.cells import Distilled, Pictured, Place, Sampled, Trained
from experiments.common.scales import CPU, PAPER, SCALES, Scale, Teacher

STEMS = sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if "EXPERIMENT = " in p.read_text("utf-8"))
pytestmark = pytest.mark.usefixtures("toy_networks")


def experiment(name: str) -> runner.Experiment:
    return importlib.import_module(f"experiments.{name}").EXPERIMENT


def toy_scale() -> Scale:
    """Eight updates of a perceptron where the papers have 96M images."""
    model = dd.Model(toys.Perceptron(1), (8, 8, 1), prediction="v")
    teacher = Teacher("ddim", 16, model=model, method=dd.Denoising(32), settings=dd.Settings(8))
    source = dd.data.from_arrays(np.random.default_rng(0).normal(size=(32, 8, 8, 1)).astype(np.float32).clip(-1, 1))
    return Scale(
        name="toy",
        title="a toy",
        teachers={"vp": teacher},
        source=lambda teacher, split, path: source,
        share=64 / (96 * 2**20),
        settings=dd.Settings(8),
        evaluation=EvaluationSettings(count=32, repetitions=1, batch_size=16),
    )


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scale:
    """The scale 'toy', measured by pixels, with results in tmp_path."""
    found = toy_scale()
    monkeypatch.setitem(scales.SCALES, "toy", found)
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(Place, "features", lambda place, teacher: "pixels")
    for name in ("use_cpu_devices", "keep_compiled"):
        monkeypatch.setattr(runner, name, lambda *arguments: None)
    return found


def picture(place: Place, seed: int, folder: Path) -> dict[str, str]:
    dd.report.image_grid({"": np.zeros((2, 8, 8, 1), np.float32)}, folder / "black.png")
    return {"black.png": "Nothing."}


def toy_cells(scale: Scale) -> list[kinds.Cell]:
    first = Distilled("TRACT", scale.tract("vp", (16, 4), "48M"), (4,))
    model = scale.teachers["vp"].described
    return [
        first,
        Distilled("TRACT", scale.tract("vp", (4, 1), "48M"), after=first),
        Distilled("BTD", scale.btd("vp", 4, "96M"), (2, 1)),
        Trained("x", 2, replace(model, prediction="x"), dd.Denoising(16), steps=2),
        Sampled("solvers", {"DDIM": "ddim"}, (2,), dd.FitSettings(batch_size=8), options={"clip": False}),
        Pictured("picture", picture),
    ]


def toy_experiment() -> runner.Experiment:
    return runner.Experiment("toy", "A toy", "nothing.", toy_cells, paper={("TRACT", 1): 5.02}, scales=("toy",))


#: One of them stands for all; together they take a minute and a half.
ITEMS = [pytest.param(n, marks=pytest.mark.fast if n == "tract_phases" else pytest.mark.slow) for n in STEMS]


@pytest.mark.parametrize("name", ITEMS)
def test_every_item_says_what_it_costs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At every scale it has; a cell's name is a file's, and its teacher is the scale's."""
    found = experiment(name)
    assert found.name == name
    for scale in found.scales:
        made = found.cells(SCALES[scale])
        names = [cell.name for cell in made]
        assert names and len(set(names)) == len(names)
        assert all(kinds.file_name(n) == n for n in names) and {c.teacher for c in made} <= set(SCALES[scale].teachers)
        tried = SCALES[scale].tried()
        work = [(cell.work(tried), tried.running(cell.teacher).batch_size) for cell in found.cells(tried)]
        phases = [w.method.phases(w.model, batch) for w, batch in work if w.method]
        assert all(sum(phase.updates for phase in each) <= 20 for each in phases)
        if scale == "cpu":  # others trace large networks
            found.main([f"--scale={scale}", "--dry_run"])
            said = capsys.readouterr().out
            assert found.title in said and all(n in said for n in names)


@pytest.mark.fast
def test_the_teacher_of_noise_is_trained_as_ddpm_trains() -> None:
    """Of the 1000 betas from 1e-4 to 0.02 it knows the indices, and its loss is that of eps, everywhere alike."""
    described, index = CPU.teachers["eps"], np.array([0, 1, 500, 999])
    model, method = described.described, described.method
    assert method and (model.prediction, model.discrete_steps) == ("eps", 1000)
    level = Level(*(np.float32(part) for part in model.process.level((index + 1) / 1000)))
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[index]
    np.testing.assert_allclose(level.alpha**2, abar, rtol=1e-5)
    told = model.time_input.time(Level(*map(jax.numpy.asarray, level)), model.process)
    np.testing.assert_allclose(told, index, atol=0.02)
    drawn = np.asarray(method.times(stratified(jax.random.key(0), 5000)))
    assert (drawn.min(), drawn.max()) == (np.float32(1e-3), 1) and len(np.unique(drawn)) > 900
    x, eps = np.random.default_rng(0).normal(size=(2, 4, 8, 8, 1)).astype(np.float32)
    toy = dd.Model(toys.Perceptron(1), model.shape, model.process, prediction="eps", time_input=model.time_input)
    params = toys.parameters(toy)
    z = np.sqrt(abar).reshape(4, 1, 1, 1) * x + np.sqrt(1 - abar).reshape(4, 1, 1, 1) * eps
    raw = toy.raw(params, np.float32(z), level, None, None)
    found = method.losses_at(toy.denoiser(params), level, x, eps)
    np.testing.assert_allclose(found, np.mean((raw - eps) ** 2, axis=(1, 2, 3)), rtol=1e-4)


@pytest.mark.fast
def test_costs_are_counted_from_the_work() -> None:
    """TRACT's 96M in batches of 256; twice the images are twice the FLOPs."""
    cell = Distilled("TRACT", PAPER.tract("vp", (1024, 32, 1), "96M"))
    model = toy_scale().teachers["vp"].described
    scale = replace(PAPER, teachers={"vp": Teacher("ddim", 1024, model=model)})
    cost = costs.cost_of(cell, scale)
    assert (cost.updates, cost.images) == (393_216, 96 * 2**20) and cost.phases == "1024→32, 32→1"
    longer = costs.cost_of(Distilled("TRACT", PAPER.tract("vp", (1024, 32, 1), "192M")), scale)
    sampling = costs.cost_of(Sampled("", {"DDIM": "ddim"}, (1,), truth=("ddim", 0)), scale).flops
    assert longer.flops - sampling == pytest.approx(2 * (cost.flops - sampling))
    assert (
        cost.parameters * 4 * 7 <= cost.state < cost.parameters * 4 * 9
    )  # student, Adam, averages, teacher, gradients
    adapters = costs.cost_of(replace(cell, running={"low_rank": 1}), scale)
    assert adapters.updates == cost.updates and adapters.state < cost.state / 2


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["tract", "btd"])
def test_a_speed_is_that_of_the_fastest_stretch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 images in 2 s + 1 s of waiting, then in 1 s; the first stretch compiles. One phase is trained, not ten."""
    spent = [(32, 9.0, 0.0), (64, 11.0, 1.0), (96, 12.0, 1.0)]
    records = [{"samples": n, "seconds": {"training": t, "data": d}} for n, t, d in spent]
    asked: list[Any] = []
    monkeypatch.setattr(dd, "distill", lambda teacher, source, method, *given: asked.append(method))
    monkeypatch.setattr(costs, "read_json_lines", lambda path: records)
    scale = toy_scale()
    method = scale.tract("vp", (16, 4, 1), "96M") if kind == "tract" else scale.btd("vp", 16, "96M")
    work = Distilled("", method).work(scale)
    assert costs.images_per_second(work, scale.settings, batch=8) == 32.0
    [phase] = asked[0].phases(work.model, 8)
    assert (phase.teacher_steps, phase.student_steps, phase.updates) == ((16, 1, 12) if kind == "tract" else (2, 1, 12))


@pytest.mark.fast
def test_lengths_and_momenta_come_to_a_scale_as_the_papers_mean_them() -> None:
    """A shorter training keeps the same share of images, and its average the same share of its start."""
    assert PAPER.length("96M") == 96 * 2**20 and CPU.length("96M") == CPU.share * 96 * 2**20
    assert PAPER.momentum(0.99995, "48M") == pytest.approx(0.99995)
    updates = CPU.length("48M") / CPU.settings.batch_size
    assert CPU.momentum(0.99995, "48M") ** updates == pytest.approx(0.99995 ** (48 * 2**20 / 256))
    phases = CPU.btd("vp", 1024, "96M").phases(CPU.teachers["vp"].described, CPU.settings.batch_size)
    assert sum(phase.updates for phase in phases) == pytest.approx(768, rel=0.02) and len(phases) == 10


@pytest.mark.fast
@pytest.mark.parametrize(
    ("teacher", "config"),
    {
        "vp": "cifar10_tract",
        "edm": "cifar10_edm_tract",
        "vp_imagenet64": "imagenet64_tract",
        "edm_imagenet64": "imagenet64_edm_tract",
    }.items(),
)
def test_the_papers_scale_is_that_of_the_configs(teacher: str, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, clipping of gradients, steps, and the teacher's own images, with which samples are compared too."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setitem(dd.data.SOURCES, "tfds", lambda **named: asked.append(named))  # type: ignore[arg-type]
    told = runpy.run_path(str(ROOT / "configs" / f"{config}.py"))["get_config"]()
    settings, method = PAPER.running(teacher), PAPER.tract(teacher, tuple(told.method.schedule), "96M")
    assert (settings.batch_size, settings.optimizer.grad_clip) == (told.run.batch_size, told.run.optimizer.grad_clip)
    for name in ("learning_rate", "warmup", "weighting", "clip", "teacher_solver"):
        assert getattr(method, name) == told.method[name], name
    assert PAPER.teachers[teacher].steps == told.method.schedule[0]
    Place(PAPER, ROOT, "any").source(teacher)
    assert asked[-1]["dataset"] == told.data.dataset and asked[-1].get("size") == told.data.get("size")


def test_cells_run_once_go_on_and_are_collected(
    toy: Scale, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell alone, then all with two seeds: nothing runs twice, and tables have mean and deviation."""
    found, runs = toy_experiment(), f"--runs={tmp_path / 'runs'}"
    found.main(["--scale=toy", "--only", "btd_2-1", runs])
    assert "[1/1] btd_2-1, seed 0" in capsys.readouterr().out
    found.main(["--scale=toy", "--seeds=2", runs])
    said = capsys.readouterr().out
    assert said.count(", seed 0\n") == 5 and said.count(", seed 1\n") == 6 and "btd_2-1, seed 0\n" not in said
    monkeypatch.setattr(dd, "distill", None)
    found.main(["--scale=toy", "--seeds=2", runs])  # all is done
    folder = tmp_path / "results" / "toy" / "toy"
    results = [json.loads(path.read_text("utf-8")) for path in folder.glob("*_[01].json")]
    assert len(results) == 12 and {r["seed"] for r in results} == {0, 1}
    one = [r["rows"][0]["frechet"] for r in results if r["cell"] == "tract_1"]
    table = (folder / "table.md").read_text("utf-8")
    assert f"{statistics.mean(one):.3g} ± {statistics.stdev(one):.2g} [5.02]" in table
    assert {"TRACT", "BTD", "x", "DDIM", "D-DDIM"} <= {row["row"] for r in results for row in r["rows"] if "row" in row}
    page = (folder / "report.html").read_text("utf-8")
    assert "Nothing." in page and (folder / "picture_0" / "black.png").is_file()
    with pytest.raises(SystemExit, match="No such cell: nothing"):
        found.main(["--scale=toy", "--only", "nothing"])


def test_a_trial_is_short_and_kept_apart(toy: Scale, tmp_path: Path) -> None:
    """Two updates of the teacher, ten of a distillation, 16 samples; the scale's own results stay away."""
    runs, found = tmp_path / "runs", replace(toy_experiment(), cells=lambda scale: toy_cells(scale)[:1])
    found.main(["--scale=toy", "--trial", f"--runs={runs}"])
    assert {path.name for path in (tmp_path / "results" / "toy").iterdir()} == {"toy_trial"}
    updates = {
        path.parent.relative_to(runs).parts[-1]: json.loads(path.read_text("utf-8").splitlines()[-1])["update"]
        for path in runs.rglob("metrics.jsonl")
    }
    assert updates == {"vp": 2, "tract_4_0": 10}
    assert "numbers mean nothing" in (tmp_path / "results" / "toy" / "toy_trial" / "table.md").read_text("utf-8")
    [results] = (path for path in runs.rglob("results.json"))
    assert json.loads(results.read_text("utf-8"))["count"] == 16


@pytest.mark.fast
def test_images_come_from_a_path_in_place_of_tfds(tmp_path: Path) -> None:
    """MNIST at 14x14 from two files; area means of 2x2 pixels."""
    images = {name: np.full((2, 28, 28), value, np.uint8) for name, value in {"train": 255, "test": 0}.items()}
    for name, array in images.items():
        array[0, :2, :2] = [[0, 100], [100, 200]]
        np.savez(tmp_path / f"{name}.npz", images=array, labels=np.array([3, 4]))
    place = Place(CPU, tmp_path, "any", {"mnist": f"{tmp_path / 'train.npz'},{tmp_path / 'test.npz'}"})
    for split, value in {"train": 1, "test": -1}.items():
        batch = place.source("vp_mnist", split).gather(np.arange(2))
        assert batch["x"].shape == (2, 14, 14, 1) and (batch["x"][1] == value).all()
        assert batch["x"][0, 0, 0, 0] == pytest.approx(100 / 127.5 - 1, abs=1e-6)


@pytest.mark.fast
def test_data_sets_stand_apart_in_a_figure() -> None:
    """A panel for each teacher, in which rows have the same names, and all data in the conventions."""
    made = [("vp", "BTD", 1.0), ("vp_mnist", "BTD, mnist", 2.0)]
    rows = [{"teacher": t, "row": r, "column": 4, "frechet": v, "seed": 0} for t, r, v in made]
    panels = collect.panels_of(experiment("btd_steps"), CPU, rows)
    drawn = {
        title: {name: np.asarray(line.y).tolist() for name, line in panel.lines.items()}
        for title, panel in panels.items()
    }
    assert drawn == {"digits 8x8": {"BTD": [1.0]}, "mnist 14x14": {"BTD": [2.0]}}
    assert "U-Net of width 16; mnist 14x14. 1794 samples" in collect.conventions(CPU, rows)
    assert list(collect.panels_of(experiment("tract_phases"), CPU, rows)) == [experiment("tract_phases").title]


@pytest.mark.fast
def test_the_time_to_a_distance_is_that_of_the_fastest_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A training of 100 s pays for itself in the samples of 1 s each, or does not."""
    module = importlib.import_module("experiments.dode_time_to_fid")
    place, way = Place(replace(toy_scale(), name="cpu"), tmp_path, "any"), module.Way
    monkeypatch.setattr(module, "seconds_of_call", lambda place, teacher: 1.0)
    monkeypatch.setattr(
        module, "of_solvers", lambda *given: [way("DDIM", "", 0.9, 0.0, 4.0), way("DDIM", "", 0.4, 0.0, 8.0)]
    )
    students = [way("TRACT", "short", 0.8, 50.0, 1.0), way("TRACT", "long", 0.3, 100.0, 1.0)]
    monkeypatch.setattr(module, "of_students", lambda *given: students)
    rows = {(row["row"], row["column"]): row["seconds"] for row in module.Times().run(place, 0)}
    count = place.scale.evaluation.count
    assert rows == {
        **{("DDIM", target): seconds * count for target, seconds in {1.0: 4, 0.5: 8}.items()},
        **{("TRACT", target): before + count for target, before in {1.0: 50, 0.5: 100, 0.35: 100}.items()},
        **{("TRACT, before the first sample", t): before for t, before in {1.0: 50, 0.5: 100, 0.35: 100}.items()},
    }


@pytest.mark.fast
def test_students_on_the_way_take_the_phases_before_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """BTD 16→1 in four phases, of which the last two are twice as long: 1, 2, 4 and 6 of six parts of the images."""
    module = importlib.import_module("experiments.dode_time_to_fid")
    scale = toy_scale()
    cell = Distilled("BTD, 24M", dd.Progressive(16, 1, phase_length=80), (8, 4, 2, 1))
    home = toy_experiment()
    found = [{"row": cell.row, "nfe": steps, "frechet": 1.0} for steps in cell.ends]
    monkeypatch.setattr(runner.Experiment, "rows_of", lambda *given: found)
    monkeypatch.setattr(module, "distillations", lambda scale: [(home, cell)])
    monkeypatch.setattr(module, "images_per_second", lambda *given: 10.0)
    ways = list(module.of_students(Place(scale, tmp_path, "any"), 0, call=0.5))
    assert [(way.method, way.before, way.each) for way in ways] == [
        ("BTD", 8.0 * parts, 0.5 * steps) for steps, parts in zip((8, 4, 2, 1), (1, 2, 4, 6), strict=True)
    ]


@pytest.mark.fast
def test_tables_say_what_is_missing() -> None:
    """A number of the paper without one of ours is there, and a single seed has no deviation."""
    rows: list[dict[str, Any]] = [
        {"row": "A", "column": 1, "frechet": 2.0},
        {"row": "B", "column": "x", "frechet": 3.0},
    ]
    text = collect.markdown(collect.summarised(rows, "frechet"), {("A", "x"): 5.0})
    assert text.splitlines() == ["|  | 1 | x |", "| --- | --- | --- |", "| A | 2 | – [5] |", "| B | – | 3 |"]


@pytest.mark.fast
def test_the_docs_have_the_tables_of_the_results() -> None:
    """docs/results.md names every item, and its tables are those of experiments/results (experiments.results_page)."""
    text = results_page.PAGE.read_text("utf-8")
    assert results_page.filled(text) == text
    assert all(f"`experiments.{name}`" in text for name in STEMS)
