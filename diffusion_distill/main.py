"""The command line.

    python -m diffusion_distill.main --mode=train    --config=configs/digits_teacher.py --workdir=runs/teacher
    python -m diffusion_distill.main --mode=distill  --config=configs/digits_tract.py   --workdir=runs/tract
    python -m diffusion_distill.main --mode=sample   --config=configs/digits_tract.py   --workdir=runs/tract
    python -m diffusion_distill.main --mode=evaluate --config=configs/digits_tract.py   --workdir=runs/tract

Every field of a config can be overridden: --config.run.batch_size=64 --config.method.schedule='(1024,8,1)'.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from diffusion_distill import build, runs
from diffusion_distill.report.pictures import image_grid
from diffusion_distill.report.tables import format_table
from diffusion_distill.training.sharding import use_cpu_devices

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, help_string="A file with get_config().")
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Split the CPU into so many devices; one per core is fastest.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, metrics, artefacts, results.")


def train(config: Any, workdir: Path) -> None:
    """Trains a teacher into WORKDIR/teacher."""
    runs.train(build.model(config), build.source(config), build.method(config), build.settings(config), workdir)
    print(f"The teacher is in {workdir / 'teacher'}")


def distill(config: Any, workdir: Path) -> None:
    """Distils config.teacher into WORKDIR/student_<steps>."""
    teacher = build.artefact(config, "teacher")
    students = runs.distill(teacher, build.source(config), build.method(config), build.settings(config), workdir)
    print(f"The students of {', '.join(map(str, students))} steps are in {workdir}/student_<steps>")


def sample(config: Any, workdir: Path) -> None:
    """Draws images of config.artefact into WORKDIR/samples.npz and samples.png."""
    workdir.mkdir(parents=True, exist_ok=True)
    artefact = build.artefact(config, "artefact")
    images = runs.sample(artefact, name="sampling", **build.sampling(config))
    np.savez(workdir / "samples.npz", images=images)
    image_grid({"": images[:16]}, workdir / "samples.png")
    print(f"{len(images)} images are in {workdir / 'samples.npz'}, the first of them in {workdir / 'samples.png'}")


def evaluate(config: Any, workdir: Path) -> None:
    """Measures samples of config.artefact against config.reference into WORKDIR/results.json."""
    workdir.mkdir(parents=True, exist_ok=True)
    artefact, reference = build.artefact(config, "artefact"), build.source(config, "reference")
    options = build.sampling(config)
    images = runs.sample(artefact, name="sampling", **options)
    scores = runs.evaluate(images, reference.gather(np.arange(len(reference)))["image"])
    results = {
        "artefact": config.artefact,
        "sample": {**options, "steps": options["steps"] or artefact.steps or runs.TEACHER_STEPS},
        "reference": {**config.reference.to_dict(), "images": len(reference)},
        "features": "pixels in [-1, 1]",
        "weights": "eval average",
        **scores,
    }
    (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(format_table([{"steps": results["sample"]["steps"], **scores}], ["steps", *scores]))


MODES: dict[str, Callable[[Any, Path], None]] = {
    "train": train,
    "distill": distill,
    "sample": sample,
    "evaluate": evaluate,
}
_MODE = flags.DEFINE_enum("mode", None, list(MODES), "What to do.")


def main(argv: Sequence[str]) -> None:
    """Runs a mode; errors in what was asked for end the program with their message."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    if _CPU_DEVICES.value:
        use_cpu_devices(_CPU_DEVICES.value)
    try:
        MODES[str(_MODE.value)](_CONFIG.value, Path(str(_WORKDIR.value)))
    except (ValueError, TypeError, FileNotFoundError) as error:
        if flags.FLAGS.only_check_args or flags.FLAGS.pdb:
            raise
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir", "mode"])
    app.run(main)
