"""Runs: they stop and go on as the same run, are not mixed up, and leave what they should."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import places
import pytest
import toys
from toys import equal

from diffusion_distill import api
from diffusion_distill.api import monitor
from diffusion_distill.base import interrupts
from diffusion_distill.data import from_arrays
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising, Progressive, Tract
from diffusion_distill.methods.knowledge import Knowledge
from diffusion_distill.process import grids
from diffusion_distill.process.processes import VE, Cosine
from diffusion_distill.process.time_input import EDMInput
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.logs import read_json_lines
from diffusion_distill.training.workdir import Workdir

DATA = toys.Gaussian(mean=0.1, std=0.4)
SETTINGS = api.Settings(batch_size=8, log_every=1, checkpoint_every=1)
TRACT = Tract((4, 2, 1), length=4 * 8, warmup=2)  # two phases of two updates


class Stopped(Exception):
    """The power goes out."""


@dataclasses.dataclass(frozen=True, eq=False)
class Failing:
    """A source that fails at the batch of a given update."""

    inner: toys.GaussianSource
    at: int
    seen: list[int] = dataclasses.field(default_factory=list)
    num_classes: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """As the source's."""
        return self.inner.shape

    def __len__(self) -> int:
        return len(self.inner)

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As the source's, `at` times."""
        if len(self.seen) == self.at:
            raise Stopped
        self.seen.append(1)
        return self.inner.gather(indices)


@pytest.fixture(scope="module")
def source() -> toys.GaussianSource:
    """A few Gaussian images."""
    return toys.GaussianSource(DATA, size=20)


def test_a_run_that_stops_and_goes_on_is_the_same_run(
    teacher: Artefact, source: toys.GaussianSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = api.distill(teacher, source, TRACT, SETTINGS, tmp_path / "whole")
    for stop in (2, 3):  # at the border of the phases, inside the second
        folder = tmp_path / f"stopped_{stop}"
        with pytest.raises(Stopped):
            api.distill(teacher, Failing(source, stop), TRACT, SETTINGS, folder)
        rest = Failing(source, 99)
        resumed = api.distill(teacher, rest, TRACT, SETTINGS, folder)
        assert len(rest.seen) == 4 - stop, "only what was missing is trained"
        assert set(resumed) == {2, 1}
        for steps in (2, 1):
            assert equal(resumed[steps].params, whole[steps].params), (stop, steps)
        assert not equal(resumed[1].params, resumed[2].params)
        updates = [record["update"] for record in read_json_lines(folder / "metrics.jsonl")]
        assert updates == [1, 2, 3, 4], "each update is logged once"


def test_a_finished_run_is_not_trained_again(teacher: Artefact, source: toys.GaussianSource, tmp_path: Path) -> None:
    first = api.distill(teacher, source, TRACT, SETTINGS, tmp_path)
    again = api.distill(teacher, Failing(source, 0), TRACT, SETTINGS, tmp_path)
    assert set(again) == {2, 1}
    assert all(equal(again[n].params, first[n].params) and again[n].steps == n for n in again)


def test_a_run_that_dies_while_it_saves_a_student_has_it_after_the_restart(
    teacher: Artefact, source: toys.GaussianSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Artefact, folder: Path) -> Path:
        raise Stopped

    with monkeypatch.context() as broken:
        broken.setattr(Artefact, "save", dies)
        with pytest.raises(Stopped):
            api.distill(teacher, source, TRACT, SETTINGS, tmp_path)
    assert set(api.distill(teacher, source, TRACT, SETTINGS, tmp_path)) == {2, 1}
    assert Artefact.load(tmp_path / "student_2").steps == 2


def test_a_run_leaves_its_metrics_and_artefacts(tiny_model: Model, source: toys.GaussianSource, tmp_path: Path) -> None:
    method = Denoising(length=6 * 8, learning_rate=4e-3, warmup=2, anneal=True, momentum=0.9)
    settings = dataclasses.replace(SETTINGS, log_every=2, checkpoint_every=100)
    made = api.train(tiny_model, source, method, settings, tmp_path)
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert [record["update"] for record in records] == [2, 4, 6]
    assert [record["samples"] for record in records] == [16, 32, 48]
    np.testing.assert_allclose(
        [record["learning_rate"] for record in records], [4e-3 * r / 6 for r in (5, 3, 1)], rtol=1e-6
    )
    for record in records:
        assert record["phase"] == "teacher" and record["skipped"] == 0
        assert record["loss"] > 0 and record["grad_norm"] > 0 and record["images_per_second"] > 0
    found = Artefact.load(tmp_path / "teacher")
    assert equal(found.params, made.params) and found.model == tiny_model and found.steps == 0
    facts = found.provenance
    assert (facts["method"], facts["updates"], facts["skipped"]) == ("Denoising", 6, 0)
    assert facts["method_settings"]["learning_rate"] == 4e-3 and facts["settings"]["batch_size"] == 8
    assert {"jax", "diffusion_distill"} <= set(facts["versions"])


def test_a_skipped_update_does_not_hide_the_others_in_the_metrics(
    tiny_model: Model, source: toys.GaussianSource, tmp_path: Path
) -> None:
    class Spoilt(Failing):
        def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            self.seen.append(1)
            return {"x": self.inner.gather(indices)["x"] * (np.nan if len(self.seen) == self.at else 1)}

    settings = dataclasses.replace(SETTINGS, log_every=3)
    api.train(tiny_model, Spoilt(source, 2), Denoising(length=3 * 8, warmup=0), settings, tmp_path)
    [record] = read_json_lines(tmp_path / "metrics.jsonl")
    assert record["skipped"] == record["nonfinite"] == 1
    assert np.isfinite(record["loss"]) and np.isfinite(record["grad_norm"])


def test_a_workdir_that_cannot_serve_is_refused_before_training(
    teacher: Artefact, source: toys.GaussianSource, tmp_path: Path
) -> None:
    nothing = Failing(source, 0)  # raises Stopped as soon as a batch is asked for
    with pytest.raises(Stopped):
        api.distill(teacher, nothing, TRACT, SETTINGS, tmp_path / "run")
    other = dataclasses.replace(TRACT, learning_rate=1e-3)
    with pytest.raises(
        ValueError, match=r"another run.*method_settings\.learning_rate.*0\.0002.*0\.001.*Choose another"
    ):
        api.distill(teacher, nothing, other, SETTINGS, tmp_path / "run")
    with pytest.raises(ValueError, match=r"another run.*settings\.batch_size.*8.*16"):
        api.distill(teacher, nothing, TRACT, dataclasses.replace(SETTINGS, batch_size=16), tmp_path / "run")
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"Cannot write to .*Choose another folder"):
            api.distill(teacher, nothing, TRACT, SETTINGS, folder)


def _with_folders(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Makes the folders above it too."""
    return lambda path: (path.parent.mkdir(), make(path))


IN_THE_WAY: dict[str, tuple[Callable[[Path], Any], str]] = {
    "lock": (Path.mkdir, "there is a folder of that name"),
    "run.json": (Path.mkdir, "there is a folder of that name"),
    "metrics.jsonl": (Path.mkdir, "there is a folder of that name"),
    "checkpoints": (lambda path: path.write_text(""), "there is a file of that name"),
    "checkpoints/": (lambda path: path.symlink_to("a disk that is not mounted"), "or a link to nothing"),
    "student_1": (lambda path: path.write_text("notes"), "there is a file of that name"),
    "student_2": (lambda path: path.symlink_to("a disk that is not mounted"), "or a link to nothing"),
    "student_1/params": (_with_folders(lambda path: path.write_text("notes")), "there is a file of that name"),
    "student_1/model.json": (_with_folders(Path.mkdir), "there is a folder of that name"),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_files_in_the_place_of_folders_and_folders_of_files_are_named(
    name: str, teacher: Artefact, source: toys.GaussianSource, tmp_path: Path
) -> None:
    make, said = IN_THE_WAY[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"Cannot write .*{name.strip('/')}: .*{said}"):
        api.distill(teacher, Failing(source, 0), TRACT, SETTINGS, tmp_path)
    assert os.path.lexists(tmp_path / name), "nothing of the user's is deleted"
    assert not [path for path in tmp_path.glob("student_*") if path.name != name.partition("/")[0]], "or made too early"


def test_a_students_folder_may_be_a_link(
    teacher: Artefact, source: toys.GaussianSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "student_1").symlink_to(tmp_path / "disk")
    students = api.distill(teacher, source, TRACT, SETTINGS, tmp_path / "run")
    assert equal(Artefact.load(tmp_path / "disk").params, students[1].params)
    monkeypatch.setattr(Artefact, "check_place", lambda folder: pytest.fail("a finished run writes nothing"))
    assert set(api.distill(teacher, Failing(source, 0), TRACT, SETTINGS, tmp_path / "run")) == {2, 1}


@pytest.mark.fast
def test_a_file_system_without_locks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre answers ENOSYS where it is mounted without them, NFS ENOLCK; other errors are errors."""
    fcntl = pytest.importorskip("fcntl")

    def answers(number: int) -> None:
        def flock(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    for number in (errno.ENOSYS, errno.ENOLCK):
        answers(number)
        with pytest.warns(UserWarning, match=r"has no locks \(.*\): see to it that no other process"):
            Workdir(tmp_path, {"a": 1}).close()
    answers(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        Workdir(tmp_path, {"a": 1})


@pytest.mark.fast
def test_the_lock_of_another_user_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Any, *arguments: Any, **others: Any) -> int:
        if str(path).endswith("lock"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **others)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match=r"lock cannot be written: Permission denied\. Another user began this run"):
        Workdir(tmp_path, {"a": 1})


def test_a_teacher_from_disk_is_the_same_teacher(
    teacher: Artefact, source: toys.GaussianSource, tmp_path: Path
) -> None:
    """A program that trains and distils, killed while it distils, loads the teacher when it is started again."""
    with pytest.raises(Stopped):
        api.distill(teacher, Failing(source, 1), TRACT, SETTINGS, tmp_path / "run")
    loaded = Artefact.load(teacher.save(tmp_path / "teacher"))
    assert set(api.distill(loaded, source, TRACT, SETTINGS, tmp_path / "run")) == {2, 1}


def test_another_teacher_is_another_run(teacher: Artefact, source: toys.GaussianSource, tmp_path: Path) -> None:
    """Two teachers of one model and one provenance that differ in their parameters alone."""
    with pytest.raises(Stopped):
        api.distill(teacher, Failing(source, 1), TRACT, SETTINGS, tmp_path)
    other = dataclasses.replace(teacher, params=toys.parameters(teacher.model, 7))
    with pytest.raises(ValueError, match=r"another run.*teacher"):
        api.distill(other, Failing(source, 0), TRACT, SETTINGS, tmp_path)


@pytest.mark.fast
def test_what_does_not_fit_is_refused_before_training(teacher: Artefact, source: toys.GaussianSource) -> None:
    nothing = Failing(source, 0)
    with pytest.raises(ValueError, match=r"multiple of the number of devices \(8\), got 12"):
        api.distill(teacher, nothing, TRACT, dataclasses.replace(SETTINGS, batch_size=12))
    with pytest.raises(ValueError, match=r"student of 8 steps, but the method starts from 4"):
        api.distill(dataclasses.replace(teacher, steps=8), nothing, TRACT, SETTINGS)
    wide = dataclasses.replace(teacher.model, shape=(2, 4, 1))
    with pytest.raises(ValueError, match=r"shape \(2, 2, 1\).*takes \(2, 4, 1\)"):
        api.train(wide, nothing, Denoising(length="1K"), SETTINGS)
    labelled = dataclasses.replace(teacher.model, network=toys.Perceptron(1, num_classes=3))
    with pytest.raises(ValueError, match=r"conditioned on 3 classes, but the data have 0"):
        api.train(labelled, nothing, Denoising(length="1K"), SETTINGS)
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"steps must be .*at least 1, got {steps}"):
            api.sample(teacher, 4, steps=steps)


def test_a_network_of_the_callers_own_can_be_trained(source: toys.GaussianSource) -> None:
    """One that no registry knows: in memory at least."""
    model = Model(toys.Perceptron(1), (2, 2, 1), prediction="v")
    made = api.train(model, source, Denoising(length=8), SETTINGS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made.params))


# --- what a run leaves on its way


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(
    teacher: Artefact, source: toys.GaussianSource, tmp_path: Path, one_device: None
) -> None:
    """At every place: between updates, at the border of phases, and while it evaluates."""
    settings = dataclasses.replace(SETTINGS, checkpoint_every=100, evaluate_every=8)
    whole = api.distill(teacher, source, TRACT, settings, tmp_path / "whole")
    records = read_json_lines(tmp_path / "whole" / "metrics.jsonl")
    for stop in range(1, 5):
        folder = tmp_path / f"{stop}"
        with pytest.raises(interrupts.Interrupted):
            api.distill(teacher, Asking(source, stop), TRACT, settings, folder)
        interrupts.forget()
        resumed = api.distill(teacher, source, TRACT, settings, folder)
        assert all(equal(resumed[n].params, whole[n].params) for n in (2, 1)), stop
        again = read_json_lines(folder / "metrics.jsonl")
        timeless = lambda record: {k: v for k, v in record.items() if k not in ("images_per_second", "seconds")}  # noqa: E731
        assert [timeless(r) for r in again] == [timeless(r) for r in records], "nothing is logged twice or left out"


@dataclasses.dataclass(frozen=True, eq=False)
class Asking(Failing):
    """A source that asks the program to stop when a given number of batches has been read."""

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """As the source's."""
        self.seen.append(1)
        if len(self.seen) == self.at:
            interrupts.request("a test")
        return self.inner.gather(indices)


def test_two_processes_cannot_work_in_one_workdir(
    teacher: Artefact, source: toys.GaussianSource, tmp_path: Path
) -> None:
    inner = []

    @dataclasses.dataclass(frozen=True, eq=False)
    class Nosy(Failing):
        def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            if not inner:
                with pytest.raises(ValueError, match=r"Another process \(pid \d+ on .*\) works in .*another workdir"):
                    api.distill(teacher, source, TRACT, SETTINGS, tmp_path)
                inner.append("refused")
            return self.inner.gather(indices)

    api.distill(teacher, Nosy(source, 0), TRACT, SETTINGS, tmp_path)
    assert inner, "refused while the first was at work"
    api.distill(teacher, source, TRACT, SETTINGS, tmp_path)  # and free afterwards


def test_a_run_is_watched(teacher: Artefact, source: toys.GaussianSource, tmp_path: Path) -> None:
    # two phases of three updates, at a rate that moves pixels by whole grey levels
    method = Tract((4, 2, 1), length=6 * 8, learning_rate=0.02)
    settings = dataclasses.replace(SETTINGS, evaluate_every=16, evaluate_count=16, tensorboard=True)
    students = api.distill(teacher, source, method, settings, tmp_path)
    records = {r["update"]: r for r in read_json_lines(tmp_path / "metrics.jsonl") if r.get("evaluated")}
    assert set(records) == {2, 3, 4, 6}, "every 16 images and at the end of a phase"
    for update in records:
        assert (tmp_path / "samples" / f"{update:08d}.png").stat().st_size > 0
    images = api.sample(students[1], 16, seed=settings.seed)
    scores = api.evaluate(images, source.gather(np.arange(16))["x"])
    assert records[6]["frechet/eval"] == pytest.approx(scores["frechet"], rel=1e-4)
    assert records[6]["frechet/raw"] != records[6]["frechet/eval"]
    [events] = (tmp_path / "tensorboard").glob("events*")
    content = events.read_bytes()
    assert all(tag in content for tag in (b"loss", b"frechet/eval", b"samples/raw", b"grad_norm"))


def test_an_evaluation_that_ends_before_its_picture_is_made_up_for(
    teacher: Artefact, source: toys.GaussianSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS, evaluate_every=16)

    def stopped(rows: object, path: Path, title: str) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as killed:
        killed.setattr(monitor, "image_grid", stopped)
        with pytest.raises(RuntimeError, match="killed"):
            api.distill(teacher, source, TRACT, settings, tmp_path)
    assert not any(record.get("evaluated") for record in read_json_lines(tmp_path / "metrics.jsonl"))
    api.distill(teacher, source, TRACT, settings, tmp_path)
    evaluated = [r["update"] for r in read_json_lines(tmp_path / "metrics.jsonl") if r.get("evaluated")]
    assert evaluated and sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"{update:08d}.png" for update in evaluated
    ]


# --- other networks, conditions and processes


@pytest.mark.parametrize("method", [Tract((4, 2, 1), length="48"), Progressive(4, 1, "16"), Knowledge(4, length="48")])
def test_conditional_students_with_two_heads(method: Any, toy_networks: None, one_device: None) -> None:
    """Class labels and 'both' from data to samples, for every method."""
    model = Model(toys.Perceptron(2, num_classes=3), (2, 2, 1), prediction="both")
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=30)
    images = np.clip(labels[:, None, None, None] / 2 - 0.5 + 0.1 * rng.normal(size=(30, 2, 2, 1)), -1, 1)
    teacher = Artefact(model, toys.parameters(model))
    students = api.distill(teacher, from_arrays(images, labels), method, SETTINGS)
    drawn = [api.sample(students[min(students)], 8, cond=np.full(8, label)) for label in (0, 2)]
    assert all(np.isfinite(images).all() for images in drawn)
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3, "the label matters"


@pytest.mark.parametrize(
    "method",
    [
        Tract.edm((8, 4, 1), length="64"),
        Tract.edm((8, 2), length="64", warmup=2),
        Progressive(8, 1, "16", weighting="edm", teacher_solver="heun"),
    ],
    ids=["tract in two phases", "tract to two steps", "btd"],
)
def test_edm_teachers_are_distilled(
    method: Any, toy_networks: None, source: toys.GaussianSource, one_device: None
) -> None:
    """By Heun's steps on the grid the method asks for, which the students keep; later phases step by DDIM."""
    model = Model(toys.Perceptron(1), (2, 2, 1), VE(), prediction="edm", time_input=EDMInput())
    teacher = api.train(model, source, Denoising(64, noise="lognormal", weighting="edm"), SETTINGS)
    students = api.distill(teacher, source, method, SETTINGS)
    for steps, student in students.items():
        levels = grids.make_grid(VE(), 8).at(slice(None, None, 8 // steps))
        assert student.grid is not None
        np.testing.assert_array_equal(np.stack(student.grid), np.stack(levels))
        images = api.sample(student, 8)
        assert np.isfinite(images).all() and images.std() > 0
        table = api.table_for(student, steps)
        np.testing.assert_array_equal(table.level.sigma, levels.sigma[:-1])
    assert api.table_for(teacher, 5, "heun").nfe == 9
    first = students[max(students)]
    with pytest.raises(ValueError, match=r"A student steps by DDIM, not by heun"):
        api.distill(first, source, Tract.edm((first.steps, 1), length="64"), SETTINGS)


def test_distillation_to_a_smaller_network(
    teacher: Artefact, source: toys.GaussianSource, tmp_path: Path, one_device: None
) -> None:
    """In time, to the smaller network, in time again; each stage begins where the one before it ended."""
    small = dataclasses.replace(teacher.model, network=toys.Perceptron(1, width=6))
    settings = dataclasses.replace(SETTINGS, checkpoint_every=100)
    time = api.distill(teacher, source, Tract((4, 2), length="64"), settings)
    method = Knowledge(2, length="512", learning_rate=1e-2)
    knowledge = api.distill(time[2], source, method, settings, tmp_path, small)
    last = api.distill(knowledge[2], source, Tract((2, 1), length="64"), settings)
    assert last[1].model == knowledge[2].model == small and Artefact.load(tmp_path / "student_2").model == small
    losses = [record["loss"] for record in read_json_lines(tmp_path / "metrics.jsonl")]
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8]), "it learns"
    with pytest.raises(ValueError, match=r"takes one phase, but the method has 2.*Knowledge"):
        api.distill(teacher, source, TRACT, SETTINGS, student=small)
    elsewhere = dataclasses.replace(small, process=Cosine(-9, 9))
    with pytest.raises(ValueError, match=r"teacher's process is .* must be the same"):
        api.distill(teacher, source, Knowledge(4, length="512"), SETTINGS, student=elsewhere)


@pytest.mark.parametrize("method", [Tract((4, 2, 1), length=32), Progressive(4, 2, 16)], ids=["tract", "btd"])
def test_few_steps_of_an_eps_student_are_warned_of_once(
    method: Any, teacher: Artefact, source: toys.GaussianSource
) -> None:
    """At time 1 of the cosine process sigma/alpha is exp(10)."""
    eps = dataclasses.replace(teacher, model=dataclasses.replace(teacher.model, prediction="eps"))
    said = r"predicts 'eps'.*sigma/alpha = 2\.2e\+04.*predicts 'x', 'v' or 'both'.*Knowledge\(steps=4\)"
    with pytest.raises(Stopped), pytest.warns(UserWarning, match=said) as warned:
        api.distill(eps, Failing(source, 0), method, SETTINGS)
    assert len(warned) == 1


def test_what_the_warning_of_eps_advises_works(teacher: Artefact, source: toys.GaussianSource) -> None:
    eps = dataclasses.replace(teacher, model=dataclasses.replace(teacher.model, prediction="eps"))
    student = dataclasses.replace(eps.model, prediction="v")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        taught = api.distill(eps, source, Knowledge(4, length=16), SETTINGS, student=student)
        with pytest.raises(Stopped):
            api.distill(taught[4], Failing(source, 0), TRACT, SETTINGS)


TWO_PROCESSES = """
import sys, jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
number, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{{port}}", 2, number, initialization_timeout=600)
sys.path[:0] = {path!r}
import toys
from diffusion_distill import NETWORKS, Settings, Tract, api
from diffusion_distill.denoisers.model import Model
from diffusion_distill.training.artefact import Artefact
NETWORKS["perceptron"] = toys.Perceptron
model = Model(toys.Perceptron(1), (2, 2, 1), prediction="v")
source = toys.GaussianSource(toys.Gaussian(0.1, 0.4), size=20)
settings = Settings(batch_size=8, log_every=1, checkpoint_every=1, evaluate_every=16)
students = api.distill(Artefact(model, toys.parameters(model)), source, Tract((4, 2, 1), length=32), settings, folder)
np.savez(f"{{folder}}/drawn_{{number}}.npz", images=api.sample(students[1], 8))
"""


def test_two_processes_do_what_one_does(teacher: Artefact, source: toys.GaussianSource, tmp_path: Path) -> None:
    """Two processes of one device each and this one of eight: the same students, one set of files."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    code = TWO_PROCESSES.format(path=[str(places.TESTS), str(places.ROOT)])
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(number), port, str(tmp_path / "two")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    for process in begun:
        out, _ = process.communicate()
        assert process.returncode == 0, out
    settings = dataclasses.replace(SETTINGS, evaluate_every=16)
    students = api.distill(teacher, source, Tract((4, 2, 1), length=32), settings, tmp_path / "one")
    first, second = (np.load(tmp_path / "two" / f"drawn_{number}.npz")["images"] for number in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, api.sample(students[1], 8), rtol=0, atol=1e-4)
    records = [[r["update"] for r in read_json_lines(tmp_path / n / "metrics.jsonl")] for n in ("one", "two")]
    assert records[0] == records[1]
