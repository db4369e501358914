"""The demo: a teacher of 8x8 digits, distilled to 4, 2 and 1 steps by TRACT and by BTD, on any machine.

    python experiments/digits.py [--teacher=vp|edm] [--out=runs/digits] [--seed=0] [--scale=1.0]

scikit-learn's 1,797 digits, 900 to train on and 897 held out. From one VP teacher, sampled with DDIM:

- TRACT 64→8→1, and its last phase also to 2 and to 4 steps from the same 8-step student;
- BTD 64→32→...→1 with as many training images as TRACT 64→8→1; its 4- and 2-step students are on the way.

From one EDM teacher, sampled with Heun's method: TRACT 32→1, 32→2 and 32→4 in one phase each, and BTD 32→16→...→1.

On a CPU a second process trains the classifier beside the teacher, and then BTD's students and the last of TRACT's
beside the others: two programs of half the cores are faster than one of all, which keeps waiting for its slowest core.
All are sampled from the same noise. The run folder gets report.html, picture.png, loss.png, results.json and the
artefacts; an interrupted demo goes on where it was. Distances are between pixels, in which a Gaussian scores well
without drawing a digit, and between the features of the classifier, which was trained on the same digits: look at the
picture too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np

import diffusion_distill as dd
from diffusion_distill.api.classifier import ClassifierSettings, train_classifier
from diffusion_distill.api.sampling import sampler_of
from diffusion_distill.base.compilation import keep_compiled
from diffusion_distill.evaluation.features import FromFunction
from diffusion_distill.studies.folder_report import folder_report
from diffusion_distill.training.logs import read_json_lines
from diffusion_distill.training.sharding import use_cpu_devices

CORES = 2 ** min(3, (os.cpu_count() or 1).bit_length() - 1)  # a power of two, so that it divides the batch
BATCH = 64
TEACHER_UPDATES = 1200
DISTILL_UPDATES = 704  # TRACT's phases to one step together, and all of BTD's
TO_TWO_OR_FOUR_UPDATES = 150
EDM_UPDATES = 1100  # of the students of an EDM teacher to one step, which learn more slowly
CLASSIFIER_UPDATES = 800
SAMPLES, SAMPLE_BATCH = 897, 300
SEEN = (
    "What you see: digits of 8x8 pixels, enlarged. The first row of the picture is real; below it, each column begins "
    "with the same noise. The teacher needs many network calls (NFE) to draw a digit. Its students, of BTD and of "
    "TRACT, draw nearly the same one with 4, 2 or 1. The classifier's Fréchet distance says how far samples are from "
    "real digits; less is better."
)
LOSS_NOTE = "losses are means over the 64 pixels, but for TRACT's with a VP teacher: a sum"
COLUMNS = 16
# In trainings of a few hundred updates an average over a thousand squared gradients is dominated by the first ones.
OPTIMIZER = dd.OptimizerSettings(b2=0.95)
#: What a second process can train: functions of `Trainings` -> what they train.
PARTS = {"judge": "a classifier to judge by", "others": "BTD's students, and the last of TRACT's"}

NETWORK = dd.UNet(
    ch=32, emb_ch=64, out_ch=1, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), num_heads=1,
    resblock_resample=True,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The models and methods to train, and the teacher's solver.

    Attributes:
      tract: distillations by their steps; the first is from the teacher, the others from its student `between`, or from
        the teacher too if that is 0. Of several processes the second one runs the last.
      solver: of the teacher; `shown` are its steps.
    """

    model: dd.Model
    teacher: dd.Denoising
    tract: Mapping[int, dd.Tract]
    between: int
    btd: dd.Progressive
    solver: str
    shown: Sequence[int]


def images(updates: float, scale: float) -> int:
    """Training images of a number of updates, shortened by `scale`."""
    return max(4, round(updates * scale)) * BATCH


def halving(start: int, updates: int, scale: float) -> int:
    """Training images of one of BTD's phases, which have so many updates together; the last two are twice as long."""
    return images(updates / (start.bit_length() + 1), scale)


def teacher(scale: float, **others: Any) -> dd.Denoising:
    """The training of a teacher; others are fields of `Denoising`."""
    rule = {"learning_rate": 3e-3, "warmup": 100, "anneal": True, "residual": 1e-3, **others}
    return dd.Denoising(images(TEACHER_UPDATES, scale), **rule)


def vp(scale: float) -> Recipe:
    """A VP teacher that predicts v: all are trained on the error of v, weighting SNR + 1."""
    v: dict[str, Any] = {"weighting": "snr_plus_one"}

    # Most pixels are exactly -1: clipping x_hat in TRACT's target would rectify the teacher's errors there into a
    # kink that no network fits.
    def tract(*schedule: int, updates: float, shares: tuple[int, ...] = ()) -> dd.Tract:
        rule = {"learning_rate": 3e-3, "anneal": True, "clip": "none", **v}
        return dd.Tract(schedule, images(updates, scale), shares, **rule)

    return Recipe(
        model=dd.Model(NETWORK, shape=(8, 8, 1), prediction="v"),
        teacher=teacher(scale, **v),
        tract={
            1: tract(64, 8, 1, updates=DISTILL_UPDATES, shares=(1, 3)),
            2: tract(8, 2, updates=TO_TWO_OR_FOUR_UPDATES),
            4: tract(8, 4, updates=TO_TWO_OR_FOUR_UPDATES),
        },
        between=8,
        btd=dd.Progressive(64, 1, phase_length=halving(64, DISTILL_UPDATES, scale), learning_rate=1e-3, **v),
        solver="ddim",
        shown=(64, 4, 2, 1),
    )


def edm(scale: float) -> Recipe:
    """An EDM teacher: its noise levels, preconditioning, weighting and sampler (arXiv:2206.00364)."""
    f: dict[str, Any] = {"weighting": "edm"}

    def tract(end: int, updates: float) -> dd.Tract:
        rule = {"learning_rate": 3e-3, "anneal": True, "clip": "none"}
        return dd.Tract.edm((32, end), length=images(updates, scale), **rule)

    model = dd.Model(NETWORK, (8, 8, 1), dd.VE(20.0), prediction="edm", time_input=dd.EDMInput(sigma_data=0.75))
    return Recipe(
        model=model,
        teacher=teacher(scale, noise="lognormal", **f),
        tract={1: tract(1, EDM_UPDATES), 2: tract(2, EDM_UPDATES / 2), 4: tract(4, EDM_UPDATES / 2)},
        between=0,
        btd=dd.Progressive(
            32, 1, phase_length=halving(32, EDM_UPDATES, scale), learning_rate=1e-3, teacher_solver="heun", **f
        ),
        solver="heun",
        shown=(32, 4, 2, 1),
    )


RECIPES = {"vp": vp, "edm": edm}


@dataclass(frozen=True)
class Sampler:
    """An artefact with its steps and solver."""

    method: str
    artefact: dd.Artefact
    steps: int
    solver: str = "ddim"

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return dd.table_for(self.artefact, self.steps, self.solver).nfe


@dataclass(frozen=True)
class Trainings:
    """The demo's trainings. Each goes on where it was, whichever process began it; a finished one only reads it."""

    recipe: Recipe
    seed: int
    scale: float
    folder: Path

    @property
    def settings(self) -> dd.Settings:
        """Of all but the classifier."""
        return dd.Settings(batch_size=BATCH, seed=self.seed, checkpoint_every=500, optimizer=OPTIMIZER)

    def teacher(self) -> dd.Artefact:
        """The teacher."""
        model, method = self.recipe.model, self.recipe.teacher
        return dd.train(model, dd.data.digits("train"), method, self.settings, self.folder / "teacher")

    def tract(self, steps: int) -> dd.Artefact:
        """TRACT's student of so many steps; what it begins with must be there."""
        first, between = next(iter(self.recipe.tract)), self.recipe.between
        from_teacher = steps == first or not between
        start = self.folder / ("teacher/teacher" if from_teacher else f"tract_{first}/student_{between}")
        method, folder = self.recipe.tract[steps], self.folder / f"tract_{steps}"
        return dd.distill(dd.Artefact.load(start), dd.data.digits("train"), method, self.settings, folder)[steps]

    def btd(self) -> dict[int, dd.Artefact]:
        """BTD's students by their steps; the teacher must be there."""
        teacher = dd.Artefact.load(self.folder / "teacher" / "teacher")
        return dd.distill(teacher, dd.data.digits("train"), self.recipe.btd, self.settings, self.folder / "btd")

    def others(self) -> None:
        """What the second process trains beside the first of TRACT's students."""
        self.btd()
        self.tract(list(self.recipe.tract)[-1])

    def judge(self) -> FromFunction:
        """A classifier's features, which are nearer to what people see than pixels are."""
        settings = ClassifierSettings(images(CLASSIFIER_UPDATES, self.scale), batch_size=BATCH, seed=self.seed)
        train, heldout = map(dd.data.digits, ("train", "heldout"))
        judge = train_classifier(train, heldout, settings, self.folder / "classifier")
        print(f"The classifier is right about {judge.about['accuracy']:.1%} of the held-out digits.")
        return FromFunction(judge.features, "classifier", judge.network.width)


def train_all(trainings: Trainings, stage: Stages) -> tuple[list[Sampler], FromFunction]:
    """The teacher (with every number of steps it is shown with) and the students; and what judges them."""
    recipe = trainings.recipe
    stage.begin("teacher")
    with beside("judge", trainings.folder):
        teacher = trainings.teacher()

    def tract_of(steps: int) -> dd.Artefact:
        stage.begin(f"TRACT {'→'.join(map(str, recipe.tract[steps].schedule))}")
        return trainings.tract(steps)

    *first, last = recipe.tract
    with beside("others", trainings.folder):
        tract = {steps: tract_of(steps) for steps in first}
    stage.begin(f"BTD {recipe.btd.start_steps}→1")
    halved = trainings.btd()
    tract[last] = tract_of(last)
    stage.begin("a classifier to judge by")
    judge = trainings.judge()
    name = f"teacher, {'DDIM' if recipe.solver == 'ddim' else recipe.solver.capitalize()}"
    samplers = [
        *(Sampler(name, teacher, steps, recipe.solver) for steps in recipe.shown),
        *(Sampler("BTD", halved[steps], steps) for steps in (4, 2, 1)),
        *(Sampler("TRACT", tract[steps], steps) for steps in (4, 2, 1)),
    ]
    return samplers, judge


@contextmanager
def beside(part: str, folder: Path) -> Iterator[None]:
    """Trains one of `PARTS` in a second process meanwhile, on a CPU only; its output goes to FOLDER/PART.log.

    What it does not finish is left to the same training in this process, which comes later. It ends with this process.
    """
    if CORES == 1 or jax.default_backend() != "cpu":
        yield
        return
    path = folder / f"{part}.log"
    print(f"Meanwhile a second process trains {PARTS[part]}; what it prints is in {path}.", flush=True)
    with path.open("a") as log:
        command = [sys.executable, *sys.argv, f"--out={folder}", f"--part={part}"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
            if status := process.wait():
                print(f"The second process ended with status {status}; this one goes on with its work.", flush=True)
        finally:
            process.communicate()  # closes its standard input, which ends it


def end_with_parent() -> None:
    """Ends this process when its standard input is closed: as soon as the one that started it ends, in whatever way."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def sample_all(samplers: Sequence[Sampler], seed: int) -> list[tuple[np.ndarray, float]]:
    """Images of every sampler from the same noise, with images per second of all batches but the first: it compiles."""
    drawn = []
    for s in samplers:
        sampler = sampler_of(s.artefact, seed=seed, steps=s.steps, solver=s.solver)
        found = [sampler.draw(0, SAMPLE_BATCH)]
        begun = time.monotonic()
        found += [sampler.draw(first, SAMPLE_BATCH) for first in range(SAMPLE_BATCH, SAMPLES, SAMPLE_BATCH)]
        speed = (len(found) - 1) * SAMPLE_BATCH / (time.monotonic() - begun)
        print(f"{s.method}, {s.steps} steps: {speed:.0f} images/s", flush=True)
        drawn.append((np.concatenate(found)[:SAMPLES], speed))
    return drawn


def scores(
    samplers: Sequence[Sampler], drawn: Sequence[tuple[np.ndarray, float]], judge: FromFunction
) -> list[dict[str, Any]]:
    """One line per sampler: speed, and distances from the training images; the first is real data, the floor."""
    train, heldout = (s.gather(np.arange(len(s)))["x"] for s in map(dd.data.digits, ("train", "heldout")))

    def of(found: np.ndarray) -> dict[str, float]:
        judged = dd.evaluate(found, train, features=judge)
        return {**dd.evaluate(found, train), "classifier frechet": judged["frechet"]}

    rows: list[dict[str, Any]] = [{"method": "real, held out", "nfe": "", "samples/s": "", **of(heldout)}]
    for s, (found, speed) in zip(samplers, drawn, strict=True):
        rows.append({"method": s.method, "nfe": s.nfe, "samples/s": round(speed), **of(found)})
    return rows


class Stages:
    """Announces the parts of the demo."""

    def __init__(self, total: int):
        self.begun, self._total, self._done = time.monotonic(), total, 0

    def begin(self, name: str) -> None:
        """Says which part begins, and how long the demo has run."""
        self._done += 1
        print(f"\n[{self._done}/{self._total}] {name} ({time.monotonic() - self.begun:.0f} s so far)", flush=True)


def run_folder(out: Path) -> Path:
    """The first of out, out-2, out-3, ... that holds no finished demo."""
    names = (out if n == 1 else out.with_name(f"{out.name}-{n}") for n in count(1))
    return next(folder for folder in names if not (folder / "results.json").exists())


def loss_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Loss by training images of every run in the folder."""
    return {
        path.parent.name: [(record["samples"], record["loss"]) for record in read_json_lines(path)]
        for path in sorted(folder.glob("*/metrics.jsonl"))
        if path.parent.name != "classifier"
    }


def main() -> None:
    """Runs the demo and says where its results are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=RECIPES, default="vp", help="kind of diffusion model")
    parser.add_argument("--out", type=Path, help="run folder (runs/digits, runs/digits_edm)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="length of all trainings, 1 = the full demo")
    parser.add_argument("--part", choices=PARTS, help="of the second process; the demo starts it itself")
    arguments = parser.parse_args()
    use_cpu_devices(max(1, CORES // 2))  # the other half is a second process's
    default = Path("runs") / ("digits" if arguments.teacher == "vp" else f"digits_{arguments.teacher}")
    keep_compiled()
    recipe = RECIPES[arguments.teacher](arguments.scale)
    if arguments.part:
        end_with_parent()
        getattr(Trainings(recipe, arguments.seed, arguments.scale, arguments.out or default), arguments.part)()
        return
    folder = run_folder(arguments.out or default)
    folder.mkdir(parents=True, exist_ok=True)
    stage = Stages(8)
    devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
    print(f"A teacher of digits and its students, on {devices}, into {folder}")

    samplers, judge = train_all(Trainings(recipe, arguments.seed, arguments.scale, folder), stage)
    stage.begin("sampling")
    drawn = sample_all(samplers, arguments.seed)
    stage.begin("scores and pictures")
    rows = scores(samplers, drawn, judge)
    real = dd.data.digits("train").gather(np.arange(COLUMNS))["x"]
    pictures = {f"{s.method}, {s.nfe} NFE": found[:COLUMNS] for s, (found, _) in zip(samplers, drawn, strict=True)}
    dd.report.image_grid({"real": real, **pictures}, folder / "picture.png", columns=COLUMNS)
    dd.report.loss_plot(loss_curves(folder), folder / "loss.png", "training images", title=LOSS_NOTE)

    seconds, memory = time.monotonic() - stage.begun, peak_memory()
    asked = {"seed": arguments.seed, "scale": arguments.scale}
    results = {"rows": rows, **asked, "seconds": seconds, "peak GB": memory}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n" + dd.report.format_table(rows, ["method", "nfe", "samples/s", "classifier frechet"]))
    print(
        f"\nFréchet distance between a classifier's features of {SAMPLES} samples and of the 900 training images: less"
        f"\nis better. Open {folder_report([folder], folder / 'report.html', SEEN)} in a browser: pictures, curves, all"
        "\nnumbers. Beside it are picture.png, loss.png, results.json and the artefacts."
        f"\n{seconds:.0f} s, peak memory {memory:.1f} GB."
    )


def peak_memory() -> float:
    """The most resident memory of this process and of a second one, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(who).ru_maxrss for who in both) * unit / 1e9


if __name__ == "__main__":
    main()
