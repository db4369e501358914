"""What goes wrong around a run: data that fail, full disks, lost artefacts, figures of nothing, settings of nothing."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toys
from toys import equal

from diffusion_distill import api
from diffusion_distill.api import training
from diffusion_distill.api.classifier import ClassifierSettings
from diffusion_distill.api.fitting import FitSettings
from diffusion_distill.base.errors import in_words
from diffusion_distill.denoisers.model import Model
from diffusion_distill.evaluation.measuring import EvaluationSettings
from diffusion_distill.methods import Denoising, Progressive, Tract
from diffusion_distill.studies.status import status
from diffusion_distill.training import checkpoint
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.logs import read_figures
from diffusion_distill.training.optimizers import OptimizerSettings

SETTINGS = api.Settings(batch_size=8, log_every=2, checkpoint_every=100)
SOURCE = toys.GaussianSource(toys.Gaussian(0.0, 0.5), size=20)
EIGHT = Denoising(length=64)


@dataclasses.dataclass(frozen=True, eq=False)
class Changing(toys.GaussianSource):
    """A source that changes its batches by `change` from the fifth on."""

    change: Any = None
    seen: list = dataclasses.field(default_factory=list)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As the source's, or what `change` makes of it."""
        self.seen.append(1)
        batch = super().gather(indices)
        return self.change(batch) if len(self.seen) > 4 else batch


def fails(batch: dict) -> dict:
    raise OSError(errno.EIO, "Input/output error", "/data/images")


CHANGES = {
    "an error": (fails, OSError, "Input/output error"),
    "other shapes": (lambda batch: {"x": batch["x"][:, :1]}, ValueError, r"gave samples float32 \(8, 1, 2, 1\)"),
    "fewer samples": (lambda batch: {"x": batch["x"][:3]}, ValueError, r"gave samples float32 \(3, 2, 2, 1\)"),
    "bytes": (lambda batch: {"x": np.uint8(batch["x"] * 9 + 99)}, ValueError, r"gave samples uint8"),
    "bytes as floats": (lambda batch: {"x": batch["x"] * 9 + 99}, ValueError, r"values from .* need \[-1, 1\]"),
    "nothing": (lambda batch: {}, ValueError, "gave samples object"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_data_that_fail_cost_nothing_that_was_done(
    name: str, tiny_model: Model, tmp_path: Path, one_device: None
) -> None:
    change, error, said = CHANGES[name]
    source = Changing(SOURCE.data, size=20, change=change)
    with pytest.raises(error, match=said):
        api.train(tiny_model, source, EIGHT, SETTINGS, tmp_path / "run")
    assert checkpoint.latest_in(tmp_path / "run" / "checkpoints") == 4
    resumed = api.train(tiny_model, SOURCE, EIGHT, SETTINGS, tmp_path / "run")
    assert equal(resumed.params, api.train(tiny_model, SOURCE, EIGHT, SETTINGS).params)


def test_labels_of_no_class_are_refused() -> None:
    from diffusion_distill.data.pipeline import Batches

    @dataclasses.dataclass(frozen=True, eq=False)
    class Labelled(toys.GaussianSource):
        num_classes: int = 3
        label: int = 3

        def gather(self, indices: np.ndarray) -> dict[str, Any]:
            """With one label for all."""
            return {**super().gather(indices), "cond": np.full(len(indices), self.label, np.int32)}

    for label, refused in ((2, False), (3, True), (-1, True)):
        batches = Batches(Labelled(SOURCE.data, size=20, label=label), 4, 0)
        if refused:
            with pytest.raises(ValueError, match=rf"labels from {label} to {label}; need 0\.\.2"):
                batches.at(0)
        else:
            assert (batches.at(0)["cond"] == 2).all()


def test_a_disk_that_is_full_while_a_run_saves(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_device: None
) -> None:
    """The error is told, the checkpoints before it stay, and the run goes on when there is space again."""
    save = checkpoint.Checkpoints.save

    def full(self: checkpoint.Checkpoints, step: int, state: Any, **about: Any) -> None:
        if step > 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))
        save(self, step, state, **about)

    often = dataclasses.replace(SETTINGS, checkpoint_every=2)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint.Checkpoints, "save", full)
        with pytest.raises(OSError, match="No space left") as raised:
            api.train(tiny_model, SOURCE, EIGHT, often, tmp_path / "run")
    assert "Free some space" in in_words(raised.value)
    assert checkpoint.latest_in(tmp_path / "run" / "checkpoints") == 2
    resumed = api.train(tiny_model, SOURCE, EIGHT, often, tmp_path / "run")
    assert equal(resumed.params, api.train(tiny_model, SOURCE, EIGHT, SETTINGS).params)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB, where the machine allows to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("left", [0, 100_000], ids=["nothing is left", "a checkpoint does not fit"])
def test_a_real_disk_that_fills_up_while_a_run_is_under_way(
    left: int, tiny_model: Model, small_disk: Path, one_device: None
) -> None:
    often, ballast, run = dataclasses.replace(SETTINGS, checkpoint_every=2), small_disk / "other", small_disk / "run"

    def fills(batch: dict) -> dict:
        if not ballast.exists():
            ballast.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - left)))
        return batch

    with pytest.raises((OSError, ValueError)) as raised:
        api.train(tiny_model, Changing(SOURCE.data, size=20, change=fills), EIGHT, often, run)
    assert "No space left on device" in in_words(raised.value) and "Free some space" in in_words(raised.value)
    assert checkpoint.latest_in(run / "checkpoints") < 8
    ballast.unlink()
    resumed = api.train(tiny_model, SOURCE, EIGHT, often, run)
    assert equal(resumed.params, api.train(tiny_model, SOURCE, EIGHT, SETTINGS).params)
    assert [record["update"] for record in read_figures(run / "metrics.jsonl")] == [2, 4, 6, 8]


@pytest.mark.parametrize("used_up", [True, False])
def test_a_device_without_memory_for_an_update(
    used_up: bool, tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_device: None
) -> None:
    """Where the failed update has used up the state, the last checkpoint stays; else the state is saved."""
    make, often = training.step_of, dataclasses.replace(SETTINGS, checkpoint_every=2)

    def failing(*roles: Any) -> Any:
        step = make(*roles)

        def update(state: Any, *rest: Any) -> Any:
            if int(state.step) == 5:
                if used_up:
                    step(state, *rest)
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
            return step(state, *rest)

        return update

    with monkeypatch.context() as broken:
        broken.setattr(training, "step_of", failing)
        with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory") as raised:
            api.train(tiny_model, SOURCE, EIGHT, often, tmp_path / "run")
    for advice in ("run.parts", "run.remat", "run.params_parallel"):
        assert [advice in note for note in raised.value.__notes__] == [True]
    assert checkpoint.latest_in(tmp_path / "run" / "checkpoints") == (4 if used_up else 5)
    resumed = api.train(tiny_model, SOURCE, EIGHT, often, tmp_path / "run")
    assert equal(resumed.params, api.train(tiny_model, SOURCE, EIGHT, SETTINGS).params)


@pytest.mark.fast
def test_full_disks_and_memory_are_told_in_words() -> None:
    full = ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']")
    assert "Free some space" in in_words(full) and "memory" not in in_words(full)
    for error in (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), MemoryError()):
        assert "not enough memory" in in_words(error) and "run.parts" in in_words(error)
    assert in_words(ValueError("something else")) == "something else"


@pytest.mark.parametrize("part", ["", "params", "model.json", "provenance.json"])
def test_a_finished_run_writes_its_artefact_again(
    part: str, tiny_model: Model, tmp_path: Path, one_device: None
) -> None:
    made = api.train(tiny_model, SOURCE, EIGHT, SETTINGS, tmp_path)
    place = tmp_path / "teacher" / part
    if part.endswith("json"):
        place.write_text("{")
    else:
        shutil.rmtree(place)
    with pytest.warns(UserWarning, match="written again from the newest checkpoint"):
        again = api.train(tiny_model, SOURCE, EIGHT, SETTINGS, tmp_path)
    assert equal(made.params, again.params) and equal(made.params, Artefact.load(tmp_path / "teacher").params)


def test_a_damaged_artefact_of_an_earlier_phase(teacher: Artefact, tmp_path: Path, one_device: None) -> None:
    """A run whose kill came before its end writes the last two students again; an older one is named in the error."""
    distil = lambda length: api.distill(  # noqa: E731
        teacher, SOURCE, Tract((8, 4, 2, 1), length=length), SETTINGS, tmp_path / "run"
    )
    made = distil("96")
    before = (tmp_path / "run" / "student_2" / "model.json").read_bytes()
    shutil.rmtree(tmp_path / "run" / "student_2")
    with pytest.warns(UserWarning, match="student_2.*written again from the newest checkpoint"):
        again = distil("96")
    assert equal(made[2].params, again[2].params) and again[2].provenance["updates"] == 8
    assert (tmp_path / "run" / "student_2" / "model.json").read_bytes() == before
    (tmp_path / "run" / "student_4" / "model.json").write_text("{")
    with pytest.raises(ValueError, match="student_4") as raised:
        distil("96")
    assert any("only the last two again" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("line", ['{"update": "x"}', '{"update": null}', "{}", '{"update": [1]}', "\0\0"])
def test_figures_of_no_update_are_left_out(line: str, tiny_model: Model, tmp_path: Path, one_device: None) -> None:
    watched = dataclasses.replace(SETTINGS, evaluate_every=64)
    api.train(tiny_model, SOURCE, EIGHT, watched, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: 1 of"):
        api.train(tiny_model, SOURCE, EIGHT, watched, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


NAN, ENDLESS = float("nan"), float("inf")
WRONG: dict[str, Any] = {
    "warmup": lambda model: Denoising(length=64, warmup=-1).phases(model, 8),
    "momentum": lambda model: Denoising(length=64, momentum=NAN).phases(model, 8),
    "learning_rate": lambda model: Tract((4, 2), length=64, learning_rate=ENDLESS).phases(model, 8),
    "anneal": lambda model: Progressive(4, 2, 16, anneal="False").phases(model, 8),  # type: ignore[arg-type]
    "steps": lambda model: Denoising(length=64, steps=NAN),  # type: ignore[arg-type]
    "self_momentum": lambda model: Tract((4, 2), length=64, self_momentum="a"),  # type: ignore[arg-type]
    "last_two_longer": lambda model: Progressive(4, 2, 16, last_two_longer=ENDLESS),
    "flip": lambda model: api.Settings(flip="False"),  # type: ignore[arg-type]
    "evaluate_count": lambda model: api.Settings(evaluate_count=None),  # type: ignore[arg-type]
    "extrapolate": lambda model: EvaluationSettings(extrapolate=-1),
    "weight_decay": lambda model: OptimizerSettings(weight_decay=ENDLESS),
    "b1": lambda model: OptimizerSettings(b1=None),  # type: ignore[arg-type]
    "largest": lambda model: FitSettings(largest=NAN),
    "shift": lambda model: ClassifierSettings(shift=ENDLESS),  # type: ignore[arg-type]
}


@pytest.mark.fast
@pytest.mark.parametrize("name", WRONG)
def test_settings_of_nothing_are_refused(name: str, tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=name):
        WRONG[name](tiny_model)


# ---------------------------------------------------------------- time


def test_a_clock_that_goes_backwards(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_device: None
) -> None:
    """Each question for the time is answered with an hour less than the one before."""
    usual, asked = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: usual() - 3600 * next(asked))
    often, long = dataclasses.replace(SETTINGS, checkpoint_every=2), Denoising(length=128)
    api.train(tiny_model, SOURCE, EIGHT, often, tmp_path / "run")
    resumed = api.train(tiny_model, SOURCE, long, often, tmp_path / "run")
    assert next(asked) > 0 and "written 0:00 ago" in status(tmp_path / "run")["run"]
    assert equal(resumed.params, api.train(tiny_model, SOURCE, long, SETTINGS).params)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")) == ["14", "16"]
    records = read_figures(tmp_path / "run" / "metrics.jsonl")
    assert [record["update"] for record in records] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert all(record["images_per_second"] > 0 and min(record["seconds"].values()) >= 0 for record in records)


# ---------------------------------------------------------------- status


def test_the_status_of_a_run(tiny_model: Model, tmp_path: Path, one_device: None) -> None:
    run = tmp_path / "run"
    inside: dict[str, str] = {}

    def looks(batch: dict) -> dict:
        inside.update(status(run))
        return batch

    api.train(tiny_model, Changing(SOURCE.data, size=20, change=looks), EIGHT, SETTINGS, run)
    assert inside["run"].startswith("at work (pid ") and inside["artefacts"] == "none yet"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    found = status(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "nothing is touched"
    assert found["run"].startswith("not at work") and found["phase"] == "teacher" and found["update"] == "8 of 8"
    assert found["last checkpoint"] == "after update 8" and found["updates that were not finite"] == "0"
    assert found["time left"] == "0:00" and "restarting" in found["time spent"] and found["artefacts"] == "teacher"


@pytest.mark.fast
def test_the_status_of_folders_without_a_run(tmp_path: Path) -> None:
    assert status(tmp_path) == {}
    with pytest.raises(FileNotFoundError, match="no folder"):
        status(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_bytes(b'\0\0\n{"update": 3, "images_per_second": "fast"}\n{"update"')
    for name in ("7", "\u0669/full", "8 (copy)/full", "9.orbax-checkpoint-tmp-1/full"):  # the second is an Arabic 9
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "run.json").mkdir()
    found = status(tmp_path)
    assert found["update"] == "none is logged yet" and found["last checkpoint"] == "none"
    assert "1 of 2 lines are damaged" in found["trouble"] and found["run"] == "not at work"
