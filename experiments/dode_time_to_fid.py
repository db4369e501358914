"""D-ODE, Table 1: the time to a quality, of solvers, fitted solvers and distilled students of one teacher.

    time = before the first sample + drawing as many samples as the distance is measured on

Before the first sample there is a fit, or a training up to the student that is sampled. Both parts are counted, in
network calls and training images, and brought to seconds by the speed of a call and of an update on this machine.
Compiling is left out, and so is the teacher's training. Of every method the fastest way to the distance is taken: calls
and length of the training. Solvers, fits and students of 96M images are those of experiments/all_methods.py.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import diffusion_distill as dd
from diffusion_distill.api.sampling import sampler_of
from experiments import all_methods
from experiments.common.cells import NOISE_SEED, Cell, Distilled, Place, Row, Work
from experiments.common.costs import images_per_second
from experiments.common.runner import Experiment
from experiments.common.scales import Scale

#: Distances that are to be reached; the paper has FID 3.
TARGETS = {"paper": (10.0, 5.0, 3.0), "gpu": (20.0, 10.0, 5.0), "cpu": (1.0, 0.5, 0.35)}
SHORTER = ("24M", "48M")
STRETCHES = 8  # that are timed; the fastest counts, since other programs slow some of them down


class Way(NamedTuple):
    """A way to a quality.

    Attributes:
      before: seconds before the first sample.
      each: seconds of a sample.
    """

    method: str
    said: str
    frechet: float
    before: float
    each: float


@dataclass(frozen=True)
class Times:
    """The least time of each method to each distance; everything that it takes is made first where it is not there."""

    teacher: str = "vp"
    name: str = "times"

    def work(self, scale: Scale) -> Work:
        """As `Cell` says; what is timed costs little."""
        return Work(scale.teachers[self.teacher].described, 0)

    def run(self, place: Place, seed: int) -> list[Row]:
        """As `Cell` says."""
        call, rows = seconds_of_call(place, self.teacher), []
        ways = [*of_solvers(place, seed, call), *of_students(place, seed, call)]
        count = place.scale.evaluation.count
        for method in dict.fromkeys(way.method for way in ways):
            for target in TARGETS.get(place.scale.name, (float("inf"),)):
                there = [way for way in ways if way.method == method and way.frechet <= target]
                if there:
                    best = min(there, key=lambda way: way.before + count * way.each)
                    facts = {"column": target, "way": best.said, "frechet": best.frechet}
                    rows.append({"row": method, **facts, "seconds": best.before + count * best.each})
                    if best.before:
                        rows.append({"row": f"{method}, before the first sample", **facts, "seconds": best.before})
        return rows


def seconds_of_call(place: Place, teacher: str) -> float:
    """Seconds of a network call for one sample; a student has its teacher's network."""
    batch, calls = place.scale.evaluation.batch, 8
    sampler = sampler_of(place.teacher(teacher), dd.SamplerSpec(steps=calls), seed=NOISE_SEED)
    sampler.draw(0, batch)  # compiles
    taken = []
    for stretch in range(STRETCHES):
        begun = time.monotonic()
        sampler.draw(batch * stretch, batch)
        taken.append(time.monotonic() - begun)
    return min(taken) / (batch * calls)


def of_solvers(place: Place, seed: int, call: float) -> Iterator[Way]:
    """The teacher's solvers; a fit with n calls makes n of them and its teacher's C·n on a batch."""
    cell = all_methods.solvers()
    assert cell.fit
    for row in all_methods.EXPERIMENT.rows_of(cell, place, seed):
        fitted = "fit seconds" in row
        before = (cell.fit.scale + 1) * row["nfe"] * cell.fit.batch_size * call if fitted else 0.0
        yield Way(row["row"], f"{row['nfe']} calls", row["frechet"], before, row["nfe"] * call)


def of_students(place: Place, seed: int, call: float) -> Iterator[Way]:
    """The students of every distillation."""
    speeds: dict[type, float] = {}
    for experiment, cell in distillations(place.scale):
        work, settings = cell.work(place.scale), place.scale.running(cell.teacher)
        assert work.method
        kind = type(work.method)
        if kind not in speeds:
            speeds[kind] = images_per_second(work, settings, settings.batch_size, STRETCHES)
        phases = work.method.phases(work.model, settings.batch_size)
        for row in experiment.rows_of(cell, place, seed):
            earlier = takewhile(lambda phase, steps=row["nfe"]: phase.student_steps >= steps, phases)
            images = sum(phase.updates for phase in earlier) * settings.batch_size
            said = f"{row['nfe']} calls, {images:,} training images"
            yield Way(row["row"].split(",")[0], said, row["frechet"], images / speeds[kind], row["nfe"] * call)


def distillations(scale: Scale) -> Iterator[tuple[Experiment, Distilled]]:
    """All distillations, with the experiment that has their results."""
    yield from ((all_methods.EXPERIMENT, cell) for cell in all_methods.students(scale))
    yield from ((EXPERIMENT, cell) for cell in shorter(scale))


def shorter(scale: Scale) -> list[Distilled]:
    """The distillations of fewer images."""
    return [cell for length in SHORTER for cell in all_methods.students(scale, length, f", {length}")]


def cells(scale: Scale) -> list[Cell]:
    """Shorter trainings, and the times, which need all of them."""
    return [*shorter(scale), Times()]


EXPERIMENT = Experiment(
    name="dode_time_to_fid",
    title="D-ODE (arXiv:2309.16421), Table 1: seconds to a Fréchet distance",
    says="A fit takes minutes where a student is trained for days.",
    cells=cells,
    measure="seconds",
    column="distance to reach",
)

if __name__ == "__main__":
    EXPERIMENT.main()
