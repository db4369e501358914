"""The demo: a teacher of 8x8 digits, distilled to 4, 2 and 1 steps by TRACT and by BTD, on any machine.

    python experiments/digits.py [--out=runs/digits] [--seed=0] [--scale=1.0]

scikit-learn's 1,797 digits, 900 to train on and 897 held out. From one teacher:

- TRACT 1024→32→1, and its last phase also to 2 and to 4 steps from the same 32-step student;
- BTD 1024→512→...→1 with as many training images as TRACT 1024→32→1; its 4- and 2-step students are on the way.

All are sampled from the same noise. The run folder gets picture.png, loss.png, results.json and the artefacts; an
interrupted demo goes on where it was. Distances are between pixels, in which a Gaussian scores well without
drawing a digit: look at the picture.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np

import diffusion_distill as dd
from diffusion_distill.training.logs import read_json_lines
from diffusion_distill.training.sharding import use_cpu_devices

CORES = 2 ** min(3, (os.cpu_count() or 1).bit_length() - 1)  # a power of two, so that it divides the batch
START = 1024
BATCH = 64
TEACHER_UPDATES = 1200
DISTILL_UPDATES = 1100  # TRACT's two phases together, and all of BTD's
TO_TWO_OR_FOUR_UPDATES = 300
SAMPLES = 897
LOSS_NOTE = "TRACT's loss is a sum over the 64 pixels, the others' a mean"
COLUMNS = 16

MODEL = dd.Model(
    dd.UNet(
        ch=32,
        emb_ch=64,
        out_ch=1,
        ch_mult=(1, 1),
        num_res_blocks=1,
        attn_resolutions=(),
        num_heads=1,
        resblock_resample=True,
    ),
    image_shape=(8, 8, 1),
    prediction="v",
)


def methods(scale: float) -> dict[str, Any]:
    """The teacher's training and the distillations; `scale` shortens all of them."""

    def images(updates: float) -> int:
        return max(1, round(updates * scale)) * BATCH

    # The network predicts v, so all are trained on the error of v: weighting SNR + 1. Most pixels are exactly -1:
    # clipping x_hat in TRACT's target would rectify the teacher's errors there into a kink that no network fits.
    def tract(*schedule: int, updates: float, shares: tuple[int, ...] = ()) -> dd.Tract:
        length = max(images(updates), 4 * BATCH)
        return dd.Tract(schedule, length, shares, weighting="snr_plus_one", learning_rate=3e-3, anneal=True, clip=False)

    halvings = START.bit_length() - 1
    phase = images(DISTILL_UPDATES / (halvings + 2))  # the last two phases are twice as long
    return {
        "teacher": dd.Denoising(
            images(TEACHER_UPDATES),
            weighting="snr_plus_one",
            learning_rate=3e-3,
            warmup=100,
            anneal=True,
            residual=1e-3,
        ),
        f"TRACT {START}→32→1": tract(START, 32, 1, updates=DISTILL_UPDATES, shares=(1, 3)),
        "TRACT 32→2": tract(32, 2, updates=TO_TWO_OR_FOUR_UPDATES),
        "TRACT 32→4": tract(32, 4, updates=TO_TWO_OR_FOUR_UPDATES),
        f"BTD {START}→1": dd.Progressive(START, 1, phase_length=phase, weighting="snr_plus_one", learning_rate=1e-3),
    }


def train_all(scale: float, seed: int, folder: Path, stage: Stages) -> dict[tuple[str, int], dd.Artefact]:
    """The teacher (under every number of steps it is shown with) and the students, by (method, steps)."""
    source, settings = dd.data.digits("train"), dd.Settings(batch_size=BATCH, seed=seed, checkpoint_every=500)
    (name, denoising), (tract, to_one), to_two, to_four, (btd, halving) = methods(scale).items()
    stage.begin(name)
    teacher = dd.train(MODEL, source, denoising, settings, folder / "teacher")
    stage.begin(tract)
    students = dd.distill(teacher, source, to_one, settings, folder / "tract_1")
    made = {("TRACT", 1): students[1]}
    for steps, (name, method) in ((2, to_two), (4, to_four)):
        stage.begin(name)
        made["TRACT", steps] = dd.distill(students[32], source, method, settings, folder / f"tract_{steps}")[steps]
    stage.begin(btd)
    students = dd.distill(teacher, source, halving, settings, folder / "btd")
    made.update({("BTD", steps): students[steps] for steps in (4, 2, 1)})
    order = [("teacher, DDIM", n) for n in (64, 4, 2, 1)] + [(m, n) for m in ("BTD", "TRACT") for n in (4, 2, 1)]
    return {key: made.get(key, teacher) for key in order}


def sample_all(made: dict[tuple[str, int], dd.Artefact], seed: int) -> dict[tuple[str, int], tuple[np.ndarray, float]]:
    """Images of every artefact from the same noise, with images per second after compilation."""
    drawn = {}
    dd.sample(next(iter(made.values())), 300, 1, batch_size=300)  # compiles the one row that all share
    for (method, steps), artefact in made.items():
        begun = time.monotonic()
        images = dd.sample(artefact, SAMPLES, steps, seed=seed, batch_size=300, name=f"{method}, {steps} steps")
        drawn[method, steps] = images, SAMPLES / (time.monotonic() - begun)
    return drawn


def scores(drawn: dict[tuple[str, int], tuple[np.ndarray, float]]) -> list[dict[str, Any]]:
    """One line per sampler: speed, and distances from the training images; the first is real data, the floor."""
    train, heldout = (s.gather(np.arange(len(s)))["image"] for s in map(dd.data.digits, ("train", "heldout")))
    rows: list[dict[str, Any]] = [
        {"method": "real, held out", "nfe": "", "samples/s": "", **dd.evaluate(heldout, train)}
    ]
    for (method, steps), (images, speed) in drawn.items():
        rows.append({"method": method, "nfe": steps, "samples/s": round(speed), **dd.evaluate(images, train)})
    return rows


class Stages:
    """Announces the parts of the demo."""

    def __init__(self, total: int):
        self.begun, self._total, self._done = time.monotonic(), total, 0

    def begin(self, name: str) -> None:
        """Says which part begins, and how long the demo has run."""
        self._done += 1
        print(
            f"\n[{self._done}/{self._total}] {name} ({time.monotonic() - self.begun:.0f} s so far)",
            flush=True,
        )


def run_folder(out: Path) -> Path:
    """The first of out, out-2, out-3, ... that holds no finished demo."""
    names = (out if n == 1 else out.with_name(f"{out.name}-{n}") for n in count(1))
    return next(folder for folder in names if not (folder / "results.json").exists())


def loss_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Loss by training images of every run in the folder."""
    return {
        path.parent.name: [(record["samples"], record["loss"]) for record in read_json_lines(path)]
        for path in sorted(folder.glob("*/metrics.jsonl"))
    }


def main() -> None:
    """Runs the demo and says where its results are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="run folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="length of all trainings, 1 = the full demo")
    arguments = parser.parse_args()
    use_cpu_devices(CORES)
    folder = run_folder(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((folder / "compiled").resolve()))
    stage = Stages(7)
    devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
    print(f"A teacher of digits and its students, on {devices}, into {folder}")

    made = train_all(arguments.scale, arguments.seed, folder, stage)
    stage.begin("sampling")
    drawn = sample_all(made, arguments.seed)
    stage.begin("scores and pictures")
    rows = scores(drawn)
    real = dd.data.digits("train").gather(np.arange(COLUMNS))["image"]
    pictures = {f"{method}, {steps} NFE": images[:COLUMNS] for (method, steps), (images, _) in drawn.items()}
    dd.report.image_grid({"real": real, **pictures}, folder / "picture.png", columns=COLUMNS)
    dd.report.loss_plot(loss_curves(folder), folder / "loss.png", "training images", title=LOSS_NOTE)

    seconds, memory = time.monotonic() - stage.begun, peak_memory()
    results = {
        "rows": rows,
        "seed": arguments.seed,
        "scale": arguments.scale,
        "seconds": seconds,
        "peak GB": memory,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n" + dd.report.format_table(rows, list(rows[0])))
    print(
        f"\nPixel Fréchet distance, precision and recall (k = 3) of {SAMPLES} samples against the 900 training images."
        f"\nLook at {folder / 'picture.png'}; beside it are loss.png, results.json and the artefacts."
        f"\n{seconds:.0f} s, peak memory {memory:.1f} GB."
    )


def peak_memory() -> float:
    """Peak resident memory in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    main()
