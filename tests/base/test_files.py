"""Files of people: paths with any characters, folders that cannot be written, and files that are not what they seem."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from absl import flags
from absl.testing import flagsaver

from diffusion_distill import api, data, evaluation, main, weights
from diffusion_distill.api import exchange
from diffusion_distill.api.features import features_named
from diffusion_distill.base.files import read_json, user_path, writable
from diffusion_distill.base.whole import replaced
from diffusion_distill.cli import build, modes
from diffusion_distill.data import image_writer
from diffusion_distill.data.image_writer import save_images
from diffusion_distill.denoisers.model import Model
from diffusion_distill.evaluation.references import read_reference
from diffusion_distill.formats import flax_file, strict_json, torch_save
from diffusion_distill.methods import Denoising
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.training import checkpoint, logs
from diffusion_distill.training.artefact import Artefact

pytestmark = pytest.mark.fast
flags.FLAGS.mark_as_parsed()

NAMES = (
    "run[1]", "run[!a]", "[", "*", "a*b", "a?b", "a\\b", "a b", " a ", "a,b", "a:b", "a#b", "a%20b", "a=b", "a'b",
    'a"b', "a\nb", "é 漢", "-a", "--workdir=a", "{a}", "$HOME", "a|b;c&d", "a~", "lr=1e-3,bs=[64]/sub dir",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_read_back_from_a_folder_of_any_name(name: str, tmp_path: Path) -> None:
    params = {"a": jnp.arange(6.0).reshape(2, 3)}
    checkpoint.save_params(tmp_path / name / "params", params)
    assert [path.name for path in (tmp_path / name).iterdir()] == ["params"], "nothing lands beside it"
    np.testing.assert_array_equal(checkpoint.load_params(tmp_path / name / "params", params)["a"], params["a"])


@pytest.mark.parametrize("name", ["run[1]\\b?"])
def test_a_run_goes_on_in_a_folder_of_any_name(
    name: str, tiny_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = toys.GaussianSource(toys.Gaussian(0.0, 0.5))
    settings = api.Settings(batch_size=8)
    (tmp_path / "run1\\bs").mkdir()  # what the pattern matches
    first = api.train(tiny_model, source, Denoising(length=16), settings, tmp_path / name)
    again = api.train(tiny_model, source, Denoising(length=16), settings, tmp_path / name)
    assert "going on after update 2" in capsys.readouterr().out
    for found in (again, Artefact.load(tmp_path / name / "teacher")):
        jax.tree.map(np.testing.assert_array_equal, found.params, first.params)


def test_folders_whose_names_are_patterns_do_not_mix(tmp_path: Path) -> None:
    """Orbax looks for its files by a pattern: 'a?b' also matches 'axb'."""
    for value, name in enumerate(("axb", "a?b", "a*b", "a[x]b")):
        checkpoint.save_params(tmp_path / name / "params", {"a": jnp.full(3, float(value))})
    for value, name in enumerate(("axb", "a?b", "a*b", "a[x]b")):
        found = checkpoint.load_params(tmp_path / name / "params", {"a": jnp.zeros(3)})
        np.testing.assert_array_equal(found["a"], np.full(3, value))


def test_a_tilde_is_the_home_directory_wherever_a_path_enters(
    teacher: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    source = toys.GaussianSource(toys.Gaussian(0.0, 0.5))
    api.train(teacher.model, source, Denoising(length=8), api.Settings(batch_size=8), "~/run")
    assert Artefact.load("~/run/teacher").steps == 0
    teacher.save("~/teacher")
    api.export_weights(teacher, "~/teacher.safetensors")
    api.import_weights("~/teacher.safetensors", "~/imported")
    api.fit_solver(teacher, "ddim", 2, api.FitSettings(scale=2, batch_size=4)).save("~/solver.json")
    assert FittedSolver.load("~/solver.json").solver == "ddim"
    assert api.sample(teacher, 2, fitted="~/solver.json").shape == (2, 2, 2, 1)
    save_images(np.zeros((2, 2, 2, 1), np.uint8), "~/out", "png")
    assert len(data.folder("~/out/samples")) == 2
    save_images(np.zeros((2, 2, 2, 1), np.uint8), "~/out", "npz")
    assert len(data.npz("~/out/samples.npz", images="arr_0")) == 2
    np.savez(home / "reference.npz", pool_3=np.eye(4))
    assert evaluation.read_reference("~/reference.npz").layout == "features"
    config = build.config_of(None, None, None, {"name": "digits"}, {"name": "digits"})
    config.artefact = "~/teacher,~/run/teacher"
    assert list(build.artefacts(config)) == ["~/teacher", "~/run/teacher"]
    with pytest.raises(FileNotFoundError, match=str(home)):
        features_named("~/classifier", (2, 2, 1))
    assert not list(here.iterdir())
    assert "~" not in os.listdir(home)


@pytest.mark.parametrize("path", ["", "a\0b", os.fsdecode(b"\xff")])
def test_paths_that_no_message_could_show_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path"):
        user_path(path)
    with pytest.raises(TypeError, match="must be text or a pathlib"):
        user_path(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("there", "text", "expected"),
    [
        (["a", "b"], "a,b", ["a", "b"]),
        (["a", "b"], "a, b", ["a", "b"]),
        (["a", "b", "a,b"], "a,b", ["a,b"]),  # a folder of the whole name is one folder
        (["lr=1,bs=2/teacher", "b"], "lr=1,bs=2/teacher,b", ["lr=1,bs=2/teacher", "b"]),
        (["b", "x,y"], "b,x,y,b", ["b", "x,y", "b"]),
        ([], "a,b", ["a", "b"]),
        ([], "", []),
    ],
)
def test_commas_separate_folders_or_belong_to_them(
    there: list[str], text: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in there:
        Path(name).mkdir(parents=True)
        (Path(name) / "model.json").write_text("{}")
    assert build.folders_in(text) == expected


def test_colons_belong_to_folders_unless_a_rule_follows(tmp_path: Path) -> None:
    folder = tmp_path / "2024-01-01_10:30:00" / "features"
    for name in (folder, f"{folder}:tensorflow"):  # not there yet: the whole path is named, without the rule
        with pytest.raises(FileNotFoundError, match=r"10:30:00/features holds no features"):
            features_named(str(name), (4, 4, 1))
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Unknown input rule 'tensorfow'.*Did you mean 'tensorflow'"):
        features_named(f"{folder}:tensorfow", (4, 4, 1))


def test_a_folder_that_cannot_be_written_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/sub/folder"):
        with pytest.raises(ValueError, match=r"Cannot write to .*file.*Choose another folder"):
            writable(tmp_path / place)
    (tmp_path / "samples.png").mkdir()
    with pytest.raises(ValueError, match=r"samples\.png: there is a folder of that name"):
        writable(tmp_path, "samples.png")
    assert writable(tmp_path / "new" / "folder", "samples.png").is_dir()
    assert not list((tmp_path / "new" / "folder").iterdir())


MODES = {
    "train": "api.train", "distill": "api.distill", "sample": "api.sample", "fit": "api.fit_solver",
    "evaluate": "build.reference", "solvers": "build.source", "trajectories": "build.subject",
    "similarity": "build.subject", "lambdas": "lambdas_study.fits_in", "classifier": "build.source",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_modes_try_their_workdir_before_they_work(
    mode: str, teacher: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build.config_of(
        teacher.model,
        Denoising(length=8),
        api.Settings(),
        {"name": "digits"},
        {"name": "digits"},
        fitted="solver.json" if mode == "lambdas" else "",
    )
    config.artefact = config.teacher = str(teacher.save(tmp_path / "teacher"))
    (tmp_path / "file").write_text("not a folder")
    holder, name = MODES[mode].split(".")
    monkeypatch.setattr(getattr(modes, holder, modes), name, lambda *_, **__: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match=r"Cannot write to .*file/out: Not a directory"):
        modes.MODES[mode](config, tmp_path / "file" / "out")


def test_an_import_that_cannot_be_kept_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params").write_text("notes")
    monkeypatch.setattr(exchange, "_foreign", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match=r"Cannot write the folder .*params: there is a file of that name"):
        api.import_weights("cifar_original_cond", tmp_path)


def test_a_second_draw_replaces_the_first_and_nothing_else(tmp_path: Path) -> None:
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1)
    for form, count in (("png", 5), ("png", 2), ("zip", 5), ("zip", 2)):
        place = save_images(images[:count], tmp_path, form)
        source = data.folder(place)
        np.testing.assert_array_equal(np.rint(127.5 * (source.gather(np.arange(count))["x"] + 1)), images[:count])
        assert len(source) == count
    assert [path.name for path in tmp_path.iterdir()] == ["samples.zip"], "one form, the last"


@pytest.mark.parametrize("form", ["npz", "png", "zip"])
def test_a_draw_that_is_cut_off_keeps_the_one_before(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2, 1)
    place = save_images(images[:2], tmp_path, form)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(image_writer, "_encoded", full)
        patch.setattr(np, "savez_compressed", full)
        with pytest.raises(OSError, match="No space"):
            save_images(images, tmp_path, form)
    read = (lambda: data.npz(place, images="arr_0")) if form == "npz" else (lambda: data.folder(place))
    assert len(read()) == 2
    save_images(images, tmp_path, form)
    assert len(read()) == 3
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_a_draw_that_dies_between_two_renames_is_found_again(tmp_path: Path) -> None:
    images = np.zeros((2, 2, 2, 1), np.uint8)
    place = save_images(images, tmp_path, "png")
    place.rename(replaced(place))
    assert image_writer.check_place(tmp_path, "png", 1) == place
    assert len(data.folder(place)) == 2


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    """WORKDIR/samples of a training run holds its pictures."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00000100.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"samples would be replaced, but holds .*00000100\.png. Move it away"):
        image_writer.check_place(tmp_path, "png", 1)
    (tmp_path / "samples.npz").mkdir()
    with pytest.raises(ValueError, match=r"samples\.npz would be replaced"):
        image_writer.check_place(tmp_path, "npz", 1)
    with pytest.raises(ValueError, match="form='npz'"):
        image_writer.check_place(tmp_path, "zip", 2)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotADirectoryError(20, "Not a directory", "/a/b"), r"/a/b: Not a directory\. A part of the path is a file"),
        (PermissionError(13, "Permission denied", "/a"), r"/a: Permission denied\. Change its permissions"),
        (IsADirectoryError(21, "Is a directory", "/a"), r"/a: Is a directory\. It is a folder, where a file"),
        (OSError(28, "No space left on device"), r"No space left on device\. Free some space"),
    ],
)
def test_errors_of_the_system_end_the_program_in_words(
    error: OSError, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: object, workdir: Path) -> None:
        raise error

    monkeypatch.setitem(modes.MODES, "export", fails)
    monkeypatch.setattr(main.interrupts, "listen", lambda: None)
    with flagsaver.flagsaver(mode="export", workdir=str(tmp_path)), pytest.raises(SystemExit, match=said) as ended:
        main.main(["program"])
    assert "Errno" not in str(ended.value)


HTML, LFS = b"<!DOCTYPE html><html>404</html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


READERS = {
    "npz": (data.npz, ".npz"),
    "reference": (evaluation.read_reference, ".npz"),
    "tract": (evaluation.read_reference, "_mean.npy"),
    "zip": (data.folder, ".zip"),
    "edm": (weights.edm.read, ".pkl"),
    "inception": (weights.inception.read, ".pth"),
    "torch": (torch_save.read, ".pth"),
    "flax": (flax_file.read, ""),
    "safetensors": (weights.exchange.load, ".safetensors"),
    "fitted": (FittedSolver.load, ".json"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("content", "said"), [(HTML, "an HTML page"), (LFS, "git lfs pull"), (b"", "empty")], ids=["html", "lfs", "empty"]
)
def test_readers_say_what_stands_in_a_files_place(reader: str, content: bytes, said: str, tmp_path: Path) -> None:
    read, ending = READERS[reader]
    path = tmp_path / f"name{ending}"
    path.write_bytes(content)
    if ending.endswith(".npy"):
        (tmp_path / "name_std.npy").write_bytes(content)
    with pytest.raises(ValueError, match=rf"name{ending}.*{said}") as raised:
        read(path)
    assert not re.search("unsafely|opcode|Errno", str(raised.value))


#: Readers of JSON that people edit, and what each takes.
EDITED: dict[str, tuple[Callable[[Path], object], str]] = {
    "model.json": (partial(read_json, advice=""), '{"steps": 4}'),
    "metrics.jsonl": (logs.read_figures, '{"update": 1}\n{"update": 2}\n'),
    "config.json": (lambda path: strict_json.loads(memoryview(path.read_bytes()), 100), '{"in_channels": 3}'),
    "edm.npz.facts.json": (lambda path: read_reference(path.with_name("edm.npz")).facts, '{"images": 50}'),
}


@pytest.mark.parametrize("name", EDITED)
def test_a_byte_order_mark_changes_nothing(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2), sigma=np.eye(2))
    read, content = EDITED[name]
    (tmp_path / name).write_text(content, encoding="utf-8")
    wanted = read(tmp_path / name)
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read(tmp_path / name) == wanted
    (tmp_path / name).write_text(content.replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    assert read(tmp_path / name) == wanted and not recwarn.list


def test_images_say_what_stands_in_their_place(tmp_path: Path) -> None:
    for name, content in (("a", HTML), ("b", LFS), ("c", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.png cannot be read .*\((an HTML page|a pointer of|empty)"):
            data.folder(tmp_path / name)
    (tmp_path / "a" / "x.png").unlink()
    (tmp_path / "a" / "x.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"x\.png is a link to .*nowhere\.png, which does not exist\. Re"):
        data.folder(tmp_path / "a")


def test_files_that_were_cut_short_are_told(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.savez(stream, images=np.zeros((2, 2, 2, 1), np.uint8), mu=np.zeros(64))
    whole = stream.getvalue()
    (tmp_path / "a.npz").write_bytes(whole[:-30])
    (tmp_path / "a.zip").write_bytes(whole[:-30])
    for read in (data.npz, evaluation.read_reference):
        with pytest.raises(ValueError, match=r"a\.npz .*cut short"):
            read(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.zip .*cut short"):
        data.folder(tmp_path / "a.zip")


def test_edm2s_statistics_are_recognised_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fid": {"mu": np.zeros(4), "sigma": np.eye(4)}}))
    with pytest.raises(ValueError, match=r"edm2\.pkl .*a pickle, which is a program.*numpy\.savez"):
        evaluation.read_reference(tmp_path / "edm2.pkl")
    (tmp_path / "dict.pkl").write_bytes(pickle.dumps({"ema": 1}))
    with pytest.raises(ValueError, match=r"no network as its entry 'ema'.*'ema': 1"):
        api.import_weights(tmp_path / "dict.pkl", tmp_path / "imported")


@pytest.mark.parametrize("part", ["model.json", "provenance.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no"), (b"", "empty"), (b'{"mod', "damaged or cut short"), (b"[1]", "a list where"), (HTML, "HTML page"),
        (LFS, "git lfs pull"),
    ],
    ids=["missing", "empty", "cut", "list", "html", "lfs"],
)  # fmt: skip
def test_parts_of_artefacts_are_named(
    part: str, content: bytes | None, said: str, teacher: Artefact, tmp_path: Path
) -> None:
    path = teacher.save(tmp_path / "artefact") / part
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"(?s){said}.*{part}|{part}.*{said}") as raised:
        Artefact.load(tmp_path / "artefact")
    assert "Errno" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": "two"}, r"model\.json: 'steps' must be a whole number"),
        ({"model": None}, r"model\.json: The description of a model must be a mapping"),
        ({"model": {"network": 1}}, r"model\.json: The description of a model lacks process, prediction"),
    ],
)
def test_fields_of_artefacts_are_named(change: dict, said: str, teacher: Artefact, tmp_path: Path) -> None:
    path = teacher.save(tmp_path) / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((ValueError, TypeError), match=said):
        Artefact.load(tmp_path)


def test_parameters_that_are_missing_or_damaged_are_named(teacher: Artefact, tmp_path: Path) -> None:
    folder = teacher.save(tmp_path)
    for file in (folder / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ValueError, match=r"The parameters in .*params are damaged.*Copy the whole folder again"):
        Artefact.load(folder)
    shutil.rmtree(folder / "params")
    with pytest.raises(FileNotFoundError, match=r"no folder .*params with parameters"):
        Artefact.load(folder)


def test_misspelt_keys_are_refused(teacher: Artefact) -> None:
    labelled = Artefact(Model(toys.Perceptron(1, num_classes=3), (2, 2, 1), prediction="v"), ())
    for guidance, error, said in (
        ({"scal": 4.0}, ValueError, "Unknown key of guidance 'scal'.*Did you mean 'scale'"),
        ({"guidance_scale": 4.0}, ValueError, "Unknown key of guidance"),
        ({"scale": 4.0, "nul": 0}, ValueError, "Did you mean 'null'"),
        ({"null": 0}, ValueError, "guidance needs a scale"),
        ({"scale": None}, TypeError, "scale of guidance must be a number, got None"),
        ({"scale": "2"}, TypeError, "scale of guidance must be a number, got '2'"),
        (2.0, TypeError, "guidance must be a mapping"),
    ):
        with pytest.raises(error, match=said):
            api.denoiser_of(labelled, guidance=guidance)  # type: ignore[arg-type]
    described = teacher.model.to_dict()
    renamed = {("predicton" if name == "prediction" else name): value for name, value in described.items()}
    for description in (renamed, {**described, "predicton": "eps"}):
        with pytest.raises(ValueError, match=r"Unknown field of a model: 'predicton'.*Did you mean 'prediction'"):
            Model.from_dict(description)
    with pytest.raises(ValueError, match="lacks prediction"):
        Model.from_dict({name: value for name, value in described.items() if name != "prediction"})
    for part, said in (
        ({"name": "folder", "pth": "x"}, "Unknown argument of the data set 'folder': 'pth'.*Did you mean 'path'"),
        ({"name": "folder"}, r"config\.data: the data set 'folder' needs path"),
        ({"nam": "folder"}, "Unknown data set None"),
    ):
        with pytest.raises(ValueError, match=said):
            build.source({"data": part})
    with pytest.raises(ValueError, match=r"Unknown field of config\.sample: 'stepz'.*Did you mean 'steps'"):
        build.config_of(None, None, None, {"name": "digits"}, {"name": "digits"}, stepz=4)
