"""Guided students in two stages, after Meng et al., arXiv:2210.03142: of digits by class, of CIFAR-10 or ImageNet 64.

Stage one learns the guided estimates of a conditional teacher, for a range of scales, in one call. Stage two is TRACT
on that student. Columns are scales of guidance. At the scale of digits each row also has the accuracy: the share of
samples that the classifier takes for what they were asked to be.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import diffusion_distill as dd
from diffusion_distill.api.classifier import TrainedClassifier
from experiments.common.cells import NOISE_SEED, Cell, Distilled, Place, Row, Work, file_name
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

SCALES = (1.0, 2.0, 4.0)
#: DDIM steps of what takes any number, and of the students of stage two.
STEPS, FEW = 64, (4, 2, 1)
#: Samples whose labels are looked at.
ASKED = 1000


@dataclass(frozen=True)
class AtScales:
    """The teacher or students, sampled at scales of guidance.

    Attributes:
      row: in the table, before the number of steps.
      distilled: whose students are sampled; None for the teacher, guided in two calls per step.
      steps: a row for each.
    """

    row: str
    distilled: Distilled | None
    steps: tuple[int, ...]
    teacher: str = "labelled"

    @property
    def name(self) -> str:
        """As `Cell` says."""
        return file_name(self.row)

    def work(self, scale: Scale) -> Work:
        """As `Cell` says."""
        calls = len(SCALES) * sum(self.steps)
        if self.distilled is None:
            return Work(scale.teachers[self.teacher].described, 2 * calls)
        return self.distilled.work(scale)._replace(calls=calls)

    def run(self, place: Place, seed: int) -> list[Row]:
        """As `Cell` says."""
        made = {0: place.teacher(self.teacher)} if self.distilled is None else self.distilled.students(place, seed)
        rows = []
        for steps in self.steps:
            artefact = made[steps] if steps in made else made[0]
            row = f"{self.row}, {steps} step{'s' * (steps > 1)}"
            for scale in SCALES:
                how = {"steps": steps, "guidance": {"scale": scale}}
                folder = place.cell(self.name, seed) / f"{steps}_{scale:g}"
                numbers = place.measured(self.teacher, artefact, folder, **how)
                rows.append({"row": row, "column": scale, **numbers, **right(place, self.teacher, artefact, **how)})
        return rows


def right(place: Place, teacher: str, artefact: dd.Artefact, **how: object) -> Row:
    """The accuracy of the classifier's labels, where a classifier judges."""
    folder = Path(place.features(teacher))
    if not (folder / "classifier.json").is_file():
        return {}
    cond = np.arange(ASKED) % artefact.model.num_classes
    images = dd.sample(artefact, ASKED, cond=cond, seed=NOISE_SEED, spec=dd.SamplerSpec(**how))  # type: ignore[arg-type]
    return {"accuracy": float((TrainedClassifier.load(folder).logits(images).argmax(axis=1) == cond).mean())}


def cells(scale: Scale) -> list[Cell]:
    """The guided teacher, the student of stage one, and those of stage two."""
    start, length = scale.teachers["labelled"].steps, scale.length("96M")
    rule = {k: v for k, v in scale.teachers["labelled"].distilling.items() if k != "clip"}
    method = dd.Guided((min(SCALES), max(SCALES)), length, **rule)
    one = Distilled("stage one", method, (0,), column="any", teacher="labelled")
    two = Distilled("stage two", scale.tract("labelled", (start, *FEW), "96M"), FEW, teacher="labelled", after=one)
    return [
        AtScales("guided teacher", None, (STEPS,)),
        AtScales("guided student", one, (STEPS,)),
        AtScales("TRACT of the guided student", two, FEW),
    ]


EXPERIMENT = Experiment(
    name="guided_students",
    title="Guided students (after arXiv:2210.03142)",
    says="with as few as 4 steps, images are visually comparable to those of the guided teacher.",
    cells=cells,
    column="scale of guidance",
)

if __name__ == "__main__":
    EXPERIMENT.main()
