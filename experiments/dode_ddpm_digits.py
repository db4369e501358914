"""D-ODE on a teacher of 8x8 digits as DDPM trains them: one command trains it, fits every solver and prints the table.

    python experiments/dode_ddpm_digits.py [--teacher=FOLDER] [--seed=0] [--scale=1.0] [--nfe 5 10 ...]

The teacher predicts eps and is trained with the plain loss ||eps_hat - eps||² on the 1000 discrete times of DDPM's
linear betas (arXiv:2006.11239); its network is told the index, 0 to 999. The settings of the fits are the paper's
(arXiv:2309.16421): C = 10, B = 100, uniform times, nothing clipped, and a teacher of at most 1000 steps: DDIM, or for
iPNDM and DEIS the solver itself.

Cells are base → fitted. The distance is the root mean square over all pixels between the samples and those of 1000
steps of DDIM from the same noise. The Fréchet distance is between features of a classifier trained on the same digits,
of 897 samples and the 900 training images. The run folder gets table.md, the lambdas, results.json and the teacher; an
interrupted command goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from digits import BATCH, CORES, NETWORK, SAMPLES, images, train_judge

import diffusion_distill as dd
from diffusion_distill.api.features import features_named
from diffusion_distill.base.compilation import keep_compiled
from diffusion_distill.studies.comparison import Comparison, Setting, compare_solvers
from diffusion_distill.training.sharding import use_cpu_devices

UPDATES = 4000
STEPS = 1000
#: The paper's solvers; 'deis order=4' combines four outputs, which is its DEIS-3.
SOLVERS = {
    "DDIM": "ddim",
    "iPNDM": "ipndm",
    "DPM-Solver-3": "dpm_solver order=3 method=singlestep",
    "DPM-Solver++(2M)": "dpm_solver++ order=2",
    "DEIS-3": "deis order=4",
}
NFE = (4, 5, 6, 8, 10, 12, 15, 20, 25)
BETTER = 0.97  # in bold

MODEL = dd.Model(
    NETWORK,
    shape=(8, 8, 1),
    process=dd.LinearBetaDiscrete(STEPS),
    prediction="eps",
    time_input=dd.TimeOfProcess(STEPS, -1),
)


def method(scale: float) -> dd.Denoising:
    """Weighting x_hat's error by the SNR makes it that of eps."""
    return dd.Denoising(
        images(UPDATES, scale), steps=STEPS, weighting="snr", learning_rate=2e-3, warmup=100, anneal=True, residual=1e-3
    )


def compare(teacher: dd.Artefact, features: str, seed: int, count: int, nfe: Sequence[int], folder: Path) -> list[Any]:
    """Measures all solvers, base and fitted; one line for each."""
    setting = Setting(teacher, count, seed, batch_size=300, spec=dd.SamplerSpec(clip=False))
    solvers = Comparison(tuple(SOLVERS.values()), tuple(nfe), features=features, truth="ddim", truth_steps=STEPS)
    return compare_solvers(setting, solvers, dd.FitSettings(), dd.data.digits("train"), folder)


def floors(teacher: dd.Artefact, features: str, seed: int, count: int) -> dict[str, float]:
    """Fréchet distances from the training images that no solver is expected to pass."""
    train, heldout = (s.gather(np.arange(len(s)))["x"] for s in map(dd.data.digits, ("train", "heldout")))
    fine = dd.sample(teacher, count, STEPS, solver="ddim", clip=False, seed=seed, batch_size=300)
    judge = features_named(features, MODEL.shape)
    sets = {f"{STEPS} steps of DDIM": fine, "real digits, held out": heldout}
    return {name: dd.evaluate(images, train, features=judge)["frechet"] for name, images in sets.items()}


def table(rows: Sequence[Mapping[str, Any]], measure: str) -> str:
    """A measure in Markdown, a line per solver and a column per number of network calls."""
    found = {(row["solver"], row["nfe"], row["fitted"]): row[measure] for row in rows}
    columns = sorted({row["nfe"] for row in rows})
    lines = [["solver", *map(str, columns)], ["---"] * (len(columns) + 1)]
    for title, name in SOLVERS.items():
        pairs = [(found.get((name, nfe, False)), found.get((name, nfe, True))) for nfe in columns]
        lines.append([title, *(_cell(base, fitted) for base, fitted in pairs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(base: float | None, fitted: float | None) -> str:
    if base is None:
        return "–"
    if fitted is None:
        return f"{base:.3g}"
    return f"{base:.3g} → **{fitted:.3g}**" if fitted <= BETTER * base else f"{base:.3g} → {fitted:.3g}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="an artefact to take in place of training one")
    parser.add_argument("--features", help="a classifier's folder, or 'pixels', in place of training a classifier")
    parser.add_argument("--out", type=Path, default=Path("runs/dode_ddpm_digits"), help="run folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="length of the trainings, 1 = the full command")
    parser.add_argument("--count", type=int, default=SAMPLES, help="samples of every solver (%(default)s)")
    parser.add_argument("--nfe", type=int, nargs="+", default=NFE, help="numbers of network calls")
    arguments = parser.parse_args(argv)
    use_cpu_devices(CORES)
    keep_compiled()
    begun, folder, seed = time.monotonic(), arguments.out, arguments.seed
    if arguments.teacher:
        teacher = dd.Artefact.load(arguments.teacher)
    else:
        settings = dd.Settings(BATCH, seed=seed, checkpoint_every=500)
        teacher = dd.train(MODEL, dd.data.digits("train"), method(arguments.scale), settings, folder / "teacher")
    print(f"The teacher is there after {time.monotonic() - begun:.0f} s.", flush=True)
    features = arguments.features or str(folder / "classifier" / "classifier")
    if not arguments.features:
        train_judge(seed, arguments.scale, folder / "classifier")
    rows = compare(teacher, features, seed, arguments.count, arguments.nfe, folder / "comparison")
    seen = "pixels" if features == "pixels" else "a classifier's features"
    known = floors(teacher, features, seed, arguments.count)
    below = ", ".join(f"{name} {value:.3g}" for name, value in known.items())
    parts = {
        f"Distance from {STEPS} steps of DDIM from the same noise": table(rows, "error"),
        f"Fréchet distance of {seen} ({below})": table(rows, "frechet"),
    }
    text = "\n\n".join(f"{title}:\n\n{lines}" for title, lines in parts.items())
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{time.monotonic() - begun:.0f} s, into {folder}.")


if __name__ == "__main__":
    main()
