"""Cells, the parts of an experiment that are run once each: a distillation, or solvers on a teacher, and their numbers.

A cell gives rows for the experiment's table: each is told its line ('row') and its column, and has the numbers of an
evaluation. Teachers and the classifier that judges are made once and shared by all experiments of a scale. All
distillations of a scale start from the same teacher; seeds are those of the distillations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import diffusion_distill as dd
from diffusion_distill.api.classifier import train_classifier
from diffusion_distill.api.evaluation import evaluate_samplers, reference_of
from diffusion_distill.api.features import features_named
from diffusion_distill.api.sampling import sampler_of
from diffusion_distill.methods.method import Method, student_of
from diffusion_distill.studies.comparison import Comparison, Setting, compare_solvers

from .scales import Scale

Row = dict[str, Any]
#: Samples are numbered from here on: teachers and students are measured from noise that nothing else has seen.
NOISE_SEED = 1234
NUMBERS = ("frechet", "precision", "recall", "kid", "inception_score", "error", "seconds", "fit seconds")


class Work(NamedTuple):
    """What a cell has to do for one seed, from which its cost follows.

    Attributes:
      model: the one that is sampled, and trained if there is a method.
      calls: network calls for each image of the evaluation, all samplers together.
      method: of the training; None trains nothing.
      teacher: the model that is distilled; None in other trainings.
      running: fields of the settings that differ from those of the scale and teacher.
    """

    model: dd.Model
    calls: int
    method: Method | None = None
    teacher: dd.Model | None = None
    running: Mapping[str, Any] = MappingProxyType({})


class Cell(Protocol):
    """A part of an experiment."""

    @property
    def name(self) -> str:
        """What --only names; a file's name."""
        ...

    @property
    def teacher(self) -> str:
        """The name of its teacher in the scale."""
        ...

    def work(self, scale: Scale) -> Work:
        """What there is to do."""
        ...

    def run(self, place: Place, seed: int) -> list[Row]:
        """Does the work, or what is left of it, and returns the table's rows."""
        ...


@dataclass(frozen=True)
class Place:
    """A scale, and the folder that everything of it is in: teachers, classifiers, one folder for each cell.

    Attributes:
      data: data set -> path of its images, in place of TensorFlow Datasets; see `Scale.source`.
    """

    scale: Scale
    folder: Path
    experiment: str
    data: Mapping[str, str] = field(default_factory=dict)

    def cell(self, name: str, seed: int) -> Path:
        """The folder of a cell."""
        return self.folder / self.experiment / f"{name}_{seed}"

    def teacher(self, name: str) -> dd.Artefact:
        """A teacher, imported or trained now if it is not there."""
        described, folder = self.scale.teachers[name], self.folder / "teachers" / name
        place = folder if described.published else folder / "teacher"
        if (place / "model.json").is_file():
            return dd.Artefact.load(place)
        print(f"The teacher '{name}' is made first, in {folder}.", flush=True)
        if described.published:
            return dd.import_weights(described.published, folder)
        assert described.model is not None
        return dd.train(described.model, self.source(name), described.method, described.settings, folder)

    def features(self, teacher: str) -> str:
        """What a teacher's images are compared by, as `features_named` takes it: InceptionV3, or a classifier.

        A classifier is trained now if it is not there; a trial without InceptionV3 takes pixels.
        """
        inception = self.folder.parent / "inception"
        if self.scale.judge is None:
            return "pixels" if self.scale.trial and not inception.is_dir() else str(inception)
        name = self.scale.teachers[teacher].images["dataset"]
        folder = self.folder / ("classifier" if name == "digits" else f"classifier_{name}")
        if not (folder / "classifier" / "classifier.json").is_file():
            print(f"A classifier to judge by is trained first, in {folder}.", flush=True)
            train_classifier(self.source(teacher), self.source(teacher, "test"), self.scale.judge, folder)
        return str(folder / "classifier")

    def source(self, teacher: str, split: str = "train") -> dd.data.Source:
        """The images of a teacher, which samples are compared with too."""
        described = self.scale.teachers[teacher]
        return self.scale.source(described, split, self.data.get(described.images["dataset"], ""))

    def measured(self, teacher: str, artefact: dd.Artefact, folder: Path, **options: Any) -> Row:
        """The numbers of a student, or of a model with a solver and steps as options, against a teacher's images."""
        model, settings = artefact.model, self.scale.evaluation
        features = features_named(self.features(teacher), model.shape, model.data_range)
        reference = reference_of(self.source(teacher), features, settings, self.folder / "reference")
        samplers = {folder.parent.name: lambda: sampler_of(artefact, dd.SamplerSpec(**options), seed=NOISE_SEED)}
        [row] = evaluate_samplers(samplers, features, reference, settings, {"seed": NOISE_SEED}, folder)
        return numbers_of(row)


@dataclass(frozen=True)
class Distilled:
    """A distillation; its students are measured.

    Attributes:
      row: the line in the table; of the columns, a student's is its number of steps.
      method: with lengths of the scale.
      ends: steps of the students that are measured.
      column: another column than the number of steps, of a single student.
      teacher: a name in the scale.
      after: the distillation whose student of `method`'s first number of steps is the teacher here.
      student: another model than the teacher's: its network's fields that differ.
      running: fields of the settings that differ, such as low_rank.
    """

    row: str
    method: Method
    ends: tuple[int, ...] = (1,)
    column: Any = None
    teacher: str = "vp"
    after: Distilled | None = None
    student: Mapping[str, Any] = field(default_factory=dict)
    running: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As `Cell` says."""
        column = "-".join(map(str, self.ends)) if self.column is None else self.column
        return file_name(f"{self.row} {column}")

    def run(self, place: Place, seed: int) -> list[Row]:
        """As `Cell` says."""
        begun = time.monotonic()
        students = self.students(place, seed)
        took = round(time.monotonic() - begun)
        rows = []
        for steps in self.ends:
            column = steps if self.column is None else self.column
            numbers = place.measured(self.teacher, students[steps], place.cell(self.name, seed) / str(steps))
            rows.append({"row": self.row, "column": column, **numbers, "training seconds": took})
        return rows

    def work(self, scale: Scale) -> Work:
        """As `Cell` says; without the distillation that comes before."""
        teacher = self.after.work(scale).model if self.after else scale.teachers[self.teacher].described
        student = student_of(self.method, teacher, teacher.with_network(**self.student))
        return Work(student, sum(self.ends), self.method, teacher, self.running)

    def students(self, place: Place, seed: int) -> dict[int, dd.Artefact]:
        """The students by steps, trained as far as they are not there."""
        settings = replace(place.scale.running(self.teacher, seed), **self.running)
        teacher = place.teacher(self.teacher)
        if self.after:
            before = self.after.students(place, seed)
            first = self.method.phases(teacher.model, settings.batch_size)[0].teacher_steps
            teacher = before[first] if first in before else before[0]  # a guided one takes any number of steps
        student = teacher.model.with_network(**self.student) if self.student else None
        folder = place.cell(self.name, seed)
        return dd.distill(teacher, place.source(self.teacher), self.method, settings, folder, student)


@dataclass(frozen=True)
class Trained:
    """A model that is trained as a teacher is, and measured.

    Attributes:
      row, column: in the table.
      model, method: what is trained, with a length of the scale.
      solver, steps: how it is sampled.
    """

    row: str
    column: Any
    model: dd.Model
    method: dd.Denoising
    solver: str = "ddim"
    steps: int = 64
    teacher: str = "vp"

    @property
    def name(self) -> str:
        """As `Cell` says."""
        return file_name(f"{self.row} {self.column}")

    def work(self, scale: Scale) -> Work:
        """As `Cell` says."""
        return Work(self.model, self.steps, self.method)

    def run(self, place: Place, seed: int) -> list[Row]:
        """As `Cell` says."""
        folder, settings = place.cell(self.name, seed), replace(place.scale.settings, seed=seed)
        found = dd.train(self.model, place.source(self.teacher), self.method, settings, folder)
        numbers = place.measured(self.teacher, found, folder / "measured", solver=self.solver, steps=self.steps)
        return [{"row": self.row, "column": self.column, **numbers}]


@dataclass(frozen=True)
class Sampled:
    """A teacher, sampled with solvers as they are and fitted.

    Attributes:
      label: the cell's name.
      solvers: row in the table -> solver.
      nfe: numbers of network calls, the columns.
      fit: settings of D-ODE fits; the fitted solvers are rows too. None fits nothing.
      truth: a fine solver and its steps; the error is the distance from its samples from the same noise.
      options: fields of `SamplerSpec`.
      base: whether the solvers as they are are in the table too.
      prefix: of the rows of fitted solvers.
    """

    label: str
    solvers: Mapping[str, str]
    nfe: tuple[int, ...]
    fit: dd.FitSettings | None = None
    teacher: str = "vp"
    truth: tuple[str, int] = ("dpm_solver++ order=2", 100)
    options: Mapping[str, Any] = field(default_factory=dict)
    base: bool = True
    prefix: str = "D-"

    @property
    def name(self) -> str:
        """As `Cell` says."""
        return file_name(self.label)

    def work(self, scale: Scale) -> Work:
        """As `Cell` says; fits cost little and are left out."""
        each = sum(self.nfe) * (2 if self.fit else 1)
        return Work(scale.teachers[self.teacher].described, each * len(self.solvers) + self.truth[1])

    def run(self, place: Place, seed: int) -> list[Row]:
        """As `Cell` says; the seed is that of the fits."""
        artefact, how = place.teacher(self.teacher), place.scale.evaluation
        spec = dd.SamplerSpec(**self.options)
        setting = Setting(artefact, how.count, NOISE_SEED, how.batch_size, spec)
        comparison = Comparison(
            tuple(self.solvers.values()),
            self.nfe,
            fit=self.fit is not None,
            features=place.features(self.teacher),
            repetitions=how.repetitions,
            truth=self.truth[0],
            truth_steps=self.truth[1],
        )
        fit, folder = replace(self.fit or dd.FitSettings(), seed=seed), place.cell(self.name, seed)
        found = compare_solvers(setting, comparison, fit, place.source(self.teacher), folder)
        titles = {name: title for title, name in self.solvers.items()}
        return [
            {
                "row": (self.prefix if line["fitted"] else "") + titles[line["solver"]],
                "column": line["nfe"],
                **numbers_of(line),
            }
            for line in found
            if self.base or line["fitted"]
        ]


@dataclass(frozen=True)
class Pictured:
    """Pictures of a teacher's solvers or of students; the rows name their files.

    Attributes:
      label: the cell's name.
      draw: (place, seed, folder) -> caption by file, PNGs in the folder.
    """

    label: str
    draw: Callable[[Place, int, Path], Mapping[str, str]]
    teacher: str = "vp"

    @property
    def name(self) -> str:
        """As `Cell` says."""
        return file_name(self.label)

    def work(self, scale: Scale) -> Work:
        """As `Cell` says; a few images cost nothing, and students that are drawn are another cell's."""
        return Work(scale.teachers[self.teacher].described, 0)

    def run(self, place: Place, seed: int) -> list[Row]:
        """As `Cell` says."""
        folder = place.cell(self.name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        captions = self.draw(place, seed, folder)
        return [{"picture": str(folder / file), "caption": caption} for file, caption in captions.items()]


def numbers_of(row: Mapping[str, Any]) -> Row:
    """The numbers of a line of results."""
    return {"nfe": row["nfe"], **{name: row[name] for name in NUMBERS if name in row}}


def file_name(label: str) -> str:
    """A label as a file's name."""
    return "".join(c if c.isalnum() or c in "-+=." else "_" for c in label).strip("_").lower()
