"""The command line: whole journeys at a tiny size, and what a mistake is answered with."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_files
import toys
from absl import flags
from ml_collections import ConfigDict
from PIL import Image
from places import ROOT
from toys import equal

from diffusion_distill import api, data, main, weights
from diffusion_distill.api.features import features_named
from diffusion_distill.base import interrupts
from diffusion_distill.cli import build, modes
from diffusion_distill.data import image_writer
from diffusion_distill.denoisers.model import Model
from diffusion_distill.networks import UNet
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.weights import inception

flags.FLAGS.mark_as_parsed()
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def config_of(name: str, run: str = "", **changes):
    """The config of a file in configs/, with changes by dotted name; `run` is what follows the file and a colon."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(run) if run else module.get_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.fast
@pytest.mark.parametrize("name", CONFIGS)
def test_configs_describe_a_run(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    if config.data.name == "tfds":
        config.data.data_dir = str(tmp_path)
        with pytest.raises(FileNotFoundError, match=rf"(?s)not prepared in .*tfds build {config.data.dataset} "):
            build.source(config)
    else:
        assert len(build.source(config)) > 0
    plain = lambda description: json.loads(json.dumps(description))  # noqa: E731
    for part, made in (("model", build.model), ("student", build.student)):
        if part in config:
            assert plain(made(config).to_dict()) == plain(config[part].to_dict())  # type: ignore[union-attr]
    build.fitting(config)
    assert build.spec(config).clip == config.sample.clip
    if "method" in config:
        method, settings = build.method(config), build.settings(config)
        phases = method.phases(toys.Gaussian(0.0, 1.0), settings.batch_size)  # type: ignore[arg-type]
        assert all(phase.updates > 50 for phase in phases)
    else:
        with pytest.raises(ValueError, match="describes no training"):
            build.method(config)


@pytest.mark.slow
def test_train_distill_sample_evaluate(tmp_path: Path) -> None:
    # 8 devices are simulated, so batches and samples are multiples of 8
    small = {"run.batch_size": 16, "run.log_every": 1}
    modes.train(config_of("digits_teacher", **small, **{"method.length": "32"}), tmp_path / "teacher")
    teacher = str(tmp_path / "teacher" / "teacher")
    distilled = config_of(
        "digits_tract", **small, **{"method.length": "64", "teacher": teacher, "method.schedule": (4, 2, 1)}
    )
    modes.distill(distilled, tmp_path / "tract")
    student = str(tmp_path / "tract" / "student_1")
    used = config_of("digits_tract", **{"artefact": student, "sample.count": 16, "sample.batch_size": 16})
    modes.sample(used, tmp_path / "out")
    images = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    assert images.shape == (16, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 0
    assert (tmp_path / "out" / "samples.png").stat().st_size > 0
    modes.evaluate(used, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["count"] == 16 and results["reference images"] == 900 and results["rows"][0]["nfe"] == 1
    assert results["rows"][0]["frechet"] > 0 and results["artefacts"][student]["steps"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    {
        "a misspelt field": (["--config.run.batch_sise=8"], "batch_size"),
        "a mistyped field": (["--config.run.batch_size=many"], "run.batch_size"),
        "an unknown mode": (["--mode=trane"], "train"),
        "an unknown data set": (["--config.data.name=digitz"], "Did you mean 'digits'"),
        "an unknown weighting": (["--config.method.weighting=snr_trunk"], "Did you mean 'snr_trunc'"),
        "zero batch": (["--config.run.batch_size=0"], "at least 1"),
    }.values(),
)
def test_mistakes_are_answered_before_any_compute(arguments: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffusion_distill.main", "--mode=train", f"--workdir={tmp_path}"]
    command += [f"--config={ROOT / 'configs' / 'digits_teacher.py'}", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode != 0
    assert said in ended.stderr, ended.stderr
    assert not list(tmp_path.glob("checkpoints/*"))


def test_fit_sample_compare_and_look(tmp_path: Path, teacher: Artefact) -> None:
    folder = str(teacher.save(tmp_path / "teacher"))
    small = {"artefact": folder, "fit.batch_size": 16, "fit.scale": 2, "sample.count": 24, "sample.batch_size": 24}
    config = config_of("digits_solvers", **small, **{"sample.steps": 3, "sample.solver": "deis order=2"})
    modes.fit(config, tmp_path / "fit")
    fitted = str(tmp_path / "fit" / "solver.json")
    config.sample.fitted = fitted
    modes.sample(config, tmp_path / "fit")
    images = np.load(tmp_path / "fit" / "samples.npz")["arr_0"].astype(np.float32)
    drawn = api.sample(teacher, 24, fitted=fitted, batch_size=24)
    np.testing.assert_allclose(images, np.clip(127.5 * (drawn + 1), 0, 255), atol=0.6)  # rounded
    for mode in ("trajectories", "similarity", "lambdas"):
        modes.MODES[mode](config, tmp_path / "look")
        assert (tmp_path / "look" / f"{mode}.png").stat().st_size > 5_000
    labels = list(json.loads((tmp_path / "look" / "similarity.json").read_text())["tables"])
    assert labels == ["deis order=2, 3 NFE", "D-deis order=2, 3 NFE", "ddim, 30 NFE"]
    np.savez(tmp_path / "reference.npz", images=np.zeros((30, 2, 2, 1), np.uint8))
    compared = config_of(
        "digits_solvers", **small, **{"solvers.solvers": ("ddim",), "solvers.nfe": (2,), "solvers.truth_steps": 5}
    )
    compared.reference = {"name": "npz", "path": str(tmp_path / "reference.npz")}
    modes.solvers(compared, tmp_path / "compared")
    rows = json.loads((tmp_path / "compared" / "results.json").read_text())["rows"]
    assert [(row["solver"], row["fitted"]) for row in rows] == [("ddim", False), ("ddim", True)]


@pytest.mark.parametrize("mode", ["distill", "sample", "evaluate", "fit", "solvers", "trajectories", "similarity"])
def test_modes_that_need_an_artefact_say_so(mode: str, tmp_path: Path) -> None:
    part = "teacher" if mode == "distill" else "artefact"
    with pytest.raises(ValueError, match=f"--config.{part}=FOLDER"):
        modes.MODES[mode](config_of("digits_tract"), tmp_path)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Killed twice, once while it evaluates, and then the same students as an uninterrupted run."""
    command = [sys.executable, "-m", "diffusion_distill.main", "--mode=train", "--cpu_devices=1"]
    command += [f"--config={ROOT / 'configs' / 'digits_teacher.py'}", "--config.run.batch_size=8"]
    command += ["--config.method.length=240", "--config.run.evaluate_every=120", "--config.run.log_every=1"]
    place = {"cwd": ROOT, "text": True}
    for workdir, stops in ((tmp_path / "whole", []), (tmp_path / "killed", [4, 15])):
        for update in stops:
            process = subprocess.Popen([*command, f"--workdir={workdir}"], stderr=subprocess.PIPE, **place)
            _wait_for(workdir / "metrics.jsonl", update, process)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate()
            assert process.returncode == interrupts.EXIT_STATUS == 143, said
            assert "The same command goes on" in said and "Traceback" not in said
            assert any((workdir / "checkpoints").iterdir())
        last = [*command, f"--workdir={workdir}"]
        ended = subprocess.run(last, capture_output=True, **place)
        assert ended.returncode == 0, ended.stderr
    whole, killed = (Artefact.load(tmp_path / name / "teacher") for name in ("whole", "killed"))
    assert equal(whole.params, killed.params)
    pictures = [sorted(p.name for p in (tmp_path / name / "samples").iterdir()) for name in ("whole", "killed")]
    assert pictures[0] == pictures[1] == ["00000015.png", "00000030.png"]


def _wait_for(metrics: Path, update: int, process: subprocess.Popen) -> None:
    """Until a run has made an update, however long that takes; a run that ends before is an error."""
    while not metrics.exists() or f'"update": {update},' not in metrics.read_text():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)


def test_classifier_features_measure_samples(tmp_path: Path, toy_networks: None) -> None:
    config = config_of("digits_classifier", **{"classifier.length": "640", "classifier.ch": 8})
    modes.classifier(config, tmp_path / "classifier")
    folder = str(tmp_path / "classifier" / "classifier")
    model = Model(toys.Perceptron(out_ch=1), (8, 8, 1), prediction="v")
    student = Artefact(model, toys.parameters(model), steps=2)
    student.save(tmp_path / "student_2")
    changes = {"artefact": str(tmp_path / "student_2"), "evaluation.features": folder, "evaluation.count": 40}
    modes.evaluate(config_of("digits_tract", **changes), tmp_path / "results")
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["features"].startswith("classifier ") and "held-out accuracy" in results["features"]
    assert set(results["rows"][0]) >= {"frechet", "precision", "recall", "kid"}
    with pytest.raises(ValueError, match="describes no classifier"):
        modes.classifier(config_of("digits_tract"), tmp_path)


def test_inception_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout, rng, arrays = inception.LAYOUTS["pytorch_fid"], np.random.default_rng(0), {}
    for path, shape in inception.shapes().items():
        axes = layout.axes.get(len(shape), tuple(range(len(shape))))
        size = [shape[axes.index(axis)] for axis in range(len(shape))]
        arrays[layout.name(path)] = rng.random(size, np.float32)
    file = torch_files.write_zip(tmp_path / "weights.pth", torch_files.state_dict(arrays))
    modes.import_weights(None, tmp_path / "inception", modes.Asked(str(file)))
    assert "InceptionV3 (pytorch_fid, input rule pytorch_fid)" in capsys.readouterr().out
    found = features_named(f"{tmp_path / 'inception'}:tensorflow", (32, 32, 3))
    assert found.name.startswith("inception, tensorflow")
    kernel = np.asarray(found.params["Conv2d_1a_3x3"]["conv"]["weight"])  # type: ignore[union-attr]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), arrays["Conv2d_1a_3x3.conv.weight"])


@pytest.mark.parametrize("form", ["npz", "png", "zip"])
def test_samples_as_files(form: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1002, 4, 4, 3), np.uint8)
    labels = np.arange(1002) % 7
    path = image_writer.save_images(images, tmp_path, form, labels)
    if form == "npz":
        stored = np.load(path)
        again, classes = stored["arr_0"], stored["arr_1"]
    else:
        source = data.folder(path)
        found = source.gather(np.arange(len(source)))
        again = np.rint(127.5 * (found["x"] + 1)).astype(np.uint8)
        named = json.loads((zipfile.ZipFile(path).read("dataset.json") if form == "zip"
                            else (path / "dataset.json").read_bytes()).decode())  # fmt: skip
        classes = np.array([label for _, label in named["labels"]])
        assert named["labels"][1001][0] == "00001/img00001001.png"
    np.testing.assert_array_equal(again, images)
    np.testing.assert_array_equal(classes, labels)
    with pytest.raises(ValueError, match="form of images 'gif'"):
        image_writer.save_images(images, tmp_path, "gif")
    with pytest.raises(ValueError, match="need as many labels"):
        image_writer.save_images(images, tmp_path, form, labels[:3])


def test_import_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in the published layout to an artefact, to safetensors, and back; for diffusers there is no such model."""
    network = UNet(ch=32, emb_ch=8, out_ch=1, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_heads=1,
                   resblock_resample=True)  # fmt: skip
    config = ConfigDict({"model": Model(network, (4, 4, 1)).to_dict()})
    file = ROOT / "tests" / "golden" / "btd" / "checkpoints" / "old_layout.msgpack"
    modes.import_weights(config, tmp_path / "imported", modes.Asked(str(file)))
    artefact = Artefact.load(tmp_path / "imported")
    assert artefact.steps == 0 and artefact.provenance["imported_from"]["file"] == file.name
    modes.export_weights(None, tmp_path / "out", modes.Asked(str(tmp_path / "imported")))
    assert capsys.readouterr().out.endswith("imported.safetensors; read back: largest difference 0\n")
    with pytest.raises(weights.WeightsError, match="the index of a step"):
        modes.export_weights(None, tmp_path / "out", modes.Asked(str(tmp_path / "imported"), format="diffusers"))
    modes.import_weights(None, tmp_path / "again", modes.Asked(str(tmp_path / "out" / "imported.safetensors")))
    again = Artefact.load(tmp_path / "again")
    assert equal(again.params, artefact.params) and (again.model, again.steps) == (artefact.model, 0)
    with pytest.raises(FileNotFoundError, match="mean 'cifar_original'"):
        modes.import_weights(None, tmp_path / "nothing", modes.Asked("cifar_orginal"))
    with pytest.raises(ValueError, match=r"Which network does .* hold"):
        modes.import_weights(None, tmp_path / "nothing", modes.Asked(str(file)))


def test_fitted_solvers_are_measured_as_what_they_are(tmp_path: Path, teacher: Artefact) -> None:
    """Label, solver, steps and NFE are the file's, and what contradicts it is refused before anything is drawn."""
    folder, fit = str(teacher.save(tmp_path / "teacher")), api.FitSettings(scale=2, batch_size=16)
    fitted = str(api.fit_solver(teacher, "deis order=2", 3, fit).save(tmp_path / "solver.json"))
    images = np.random.default_rng(0).integers(0, 256, (30, 2, 2, 1), np.uint8)
    np.savez(tmp_path / "reference.npz", images=images)

    def config(**changes: Any) -> ConfigDict:
        asked = {"artefact": folder, "sample.count": 24, "sample.fitted": fitted, "sample.steps": 0, **changes}
        made = config_of("digits_solvers", **asked)
        made.reference = {"name": "npz", "path": str(tmp_path / "reference.npz")}
        return made

    for number, same in enumerate(({}, {"sample.steps": 3, "sample.solver": "deis order=2"})):
        modes.evaluate(config(**same), tmp_path / str(number))
        results = json.loads((tmp_path / str(number) / "results.json").read_text())
        [row] = results["rows"]
        assert {name: row[name] for name in ("sampler", "solver", "steps", "nfe", "fitted")} == {
            "sampler": "teacher D-deis order=2 3 steps", "solver": "deis order=2", "steps": 3, "nfe": 3, "fitted": True
        }  # fmt: skip
        own = api.evaluate(api.sample(teacher, 24, fitted=fitted), images)
        assert {name: row[name] for name in own} == own, "to the last digit"
        assert results["sample"]["lambdas"] == FittedSolver.load(fitted).lambdas.tolist()
    for change in (
        {"sample.steps": 4},
        {"sample.solver": "ddim"},
        {"sample.solver": "deis order=3"},
        {"evaluation.solvers": ("ddim", "heun")},
        {"evaluation.steps": (3, 5)},
    ):
        with pytest.raises(ValueError, match=r"'deis order=2' with 3 steps.*out"):
            modes.evaluate(config(**change), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match=r"'deis order=2' with 3 steps, but 5 steps were asked for"):
        api.sample(teacher, 8, 5, fitted=fitted)
    several = {"evaluation.solvers": ("ddim", "heun"), "evaluation.steps": (2, 3)}
    plain = config(**{"sample.fitted": "", "sample.solver": "ddim", **several})
    modes.evaluate(plain, tmp_path / "plain")
    rows = json.loads((tmp_path / "plain" / "results.json").read_text())["rows"]
    found = [tuple(row[name] for name in ("sampler", "solver", "steps", "nfe", "fitted")) for row in rows]
    assert found == [
        (f"teacher {solver} {steps} steps", solver, steps, nfe, False)
        for solver, steps, nfe in (("ddim", 2, 2), ("ddim", 3, 3), ("heun", 2, 3), ("heun", 3, 5))
    ]


#: What the papers say of these runs, by config.
STATED = {
    "cifar10_btd": ("FID 2.57 at 8 steps, 3.0 at 4, 4.51 at 2 and 9.12 at one",),
    "cifar10_tract": ("5.02", "4.45", "TRACT has 6.8 and BTD 5.95", "section 4.3", "--config.method.shares"),
    "cifar10_edm_tract": (
        "NCSN++, unconditional",
        "edm-cifar10-32x32-uncond-ve",
        "several steps",
        "learning_rate=RATE",
    ),
    "cifar10_edm_solvers": ("18.85, 9.79 and 7.17, D-DDIM 8.67, 8.18 and 6.55 (Tables 2 and 4)",),
    "dode_solvers": ("DDIM 18.85, 9.79, 7.17; D-DDIM 8.67, 8.18, 6.55", "batch B = 100 (25 for bedroom)", "3 seeds"),
}


@pytest.mark.fast
def test_configs_state_the_papers_numbers() -> None:
    headers = {path.stem: " ".join((path.read_text().split('"""')[1]).split()) for path in ROOT.glob("configs/*.py")}
    for name, stated in STATED.items():
        for words in stated:
            assert words in headers[name], (name, words)
    dode = [header for header in headers.values() if "2309.16421" in header]
    assert len(dode) == 3 and not any(f"Table{s} {n}" in header for header in dode for s in ("", "s") for n in "56789")
    published = weights.PUBLISHED["edm-cifar10-32x32-uncond-ve"].model
    assert published.num_classes <= 1 and published.shape == (32, 32, 3)
    assert config_of("cifar10_edm_solvers").solvers.repetitions == 3


@pytest.mark.fast
def test_the_data_sets_of_dode(tmp_path: Path) -> None:
    """Teachers can be imported and are of images of that size; sets that TFDS lacks are asked for."""
    (tmp_path / "train").mkdir()
    Image.fromarray(np.zeros((140, 130, 3), np.uint8)).save(tmp_path / "train" / "0.png")
    module = importlib.import_module("configs.dode_solvers")
    header = module.__doc__ or ""
    for name, row in module.ROWS.items():
        config = config_of("dode_solvers", run=f"{name},{tmp_path}")
        shape = (row.size, row.size, 3)
        assert build.source(config).shape == shape and not build.spec(config).clip
        assert build.fitting(config).batch_size == (25 if name == "bedroom256" else 100)
        assert f" {name} " in header and row.teacher in header
        assert not row.teacher or weights.PUBLISHED[row.teacher].model.shape == shape
    with pytest.raises(ValueError, match="ffhq64 needs a folder or zip"):
        config_of("dode_solvers", run="ffhq64")


@pytest.mark.fast
@pytest.mark.parametrize("name", ["lsun128_btd", "lsun128_teacher"])
def test_lsun_configs_take_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "church, all" / "train").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (130, 140, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "church, all" / "train" / "0.png")
    source = build.source(config_of(name, run=f"church,{tmp_path / 'church, all'}"))
    assert (len(source), source.shape, source.num_classes) == (1, (128, 128, 3), 0)
    assert config_of(name, run="church").data.dataset == "lsun/church_outdoor"
    with pytest.raises(ValueError, match=r"Unknown LSUN set 'churches'\. Did you mean 'church'"):
        config_of(name, run="churches")


@pytest.mark.filterwarnings("ignore:The best lambda")
def test_a_search_by_frechet_distance_from_the_command_line(
    tmp_path: Path, teacher: Artefact, capsys: pytest.CaptureFixture
) -> None:
    np.savez(tmp_path / "reference.npz", images=np.random.default_rng(0).integers(0, 256, (30, 2, 2, 1), np.uint8))
    fit: Any = {"fit.batch_size": 16, "fit.scale": 2, "fit.candidates": (-0.5, 0.0, 0.5), "fit.search_images": 24}
    changes = {"artefact": str(teacher.save(tmp_path / "teacher")), "sample.steps": 3, **fit}
    config = config_of("digits_solvers", **changes)
    config.reference = {"name": "npz", "path": str(tmp_path / "reference.npz")}
    modes.fit(config, tmp_path / "fit")
    found = FittedSolver.load(tmp_path / "fit" / "solver.json")
    assert found.search is not None and found.search.metric == "frechet"
    drawn = json.loads((tmp_path / "fit" / "candidates.json").read_text())["searches"]["ddim"]
    np.testing.assert_allclose(drawn["values"], found.search.values, rtol=1e-6)
    assert drawn["values"][1] != drawn["values"][0] and "frechet" in capsys.readouterr().out
    config.sample.fitted = str(tmp_path / "fit")  # the folder, in which the candidates are no fitted solver
    modes.lambdas(config, tmp_path / "look")
    assert {path.name for path in (tmp_path / "look").iterdir()} == {
        f"{name}.{kind}" for name in ("lambdas", "candidates") for kind in ("json", "png")
    }
    config.reference = {"name": "npz", "path": str(tmp_path / "missing.npz")}
    config.fit.search_metric = "l2"  # for which no reference is opened
    modes.fit(config, tmp_path / "distance")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError('\'runn\'\nDid you mean "run" instead of "runn"?'), r"no field 'runn'\nDid you mean \"run\""),
        (SyntaxError("'{' was never closed"), "SyntaxError: '{' was never closed"),
        (IsADirectoryError(21, "Is a directory", "configs"), "configs: Is a directory"),
        (flags.IllegalFlagValueError("flag --mode=x: value should be one of"), "--mode=x: value .*\nPass --helpshort"),
    ],
)
def test_flags_that_cannot_be_read_end_the_program_in_words(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What absl and ml_collections raise while they read the command line."""

    def fails(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr(main.flags, "FLAGS", fails)
    with pytest.raises(SystemExit, match=said):
        main.read_flags(["program"])


def test_the_status_mode_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    modes.show_status(None, tmp_path, modes.Asked(""))
    assert "holds no run" in capsys.readouterr().out and not list(tmp_path.iterdir())
    (tmp_path / "run.json").write_text("{}")
    modes.show_status(None, tmp_path, modes.Asked(""))
    assert "last checkpoint: none" in capsys.readouterr().out
