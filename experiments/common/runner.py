"""The command line of an experiment.

    python -m experiments.NAME --scale=cpu                    runs what is not done yet, then collects
    python -m experiments.NAME --scale=cpu --seeds=3          with training seeds 0, 1, 2
    python -m experiments.NAME --scale=cpu --only=CELL ...    these cells only: they can be split over machines
    python -m experiments.NAME --scale=paper --dry_run        what it would cost, cell by cell
    python -m experiments.NAME --scale=cpu --collect          tables, figure and page of the cells that are done
    python -m experiments.NAME --scale=gpu --trial            a few updates and samples of each, to see that all works
    python -m experiments.NAME --data cifar10=cifar10.zip     images of a folder, zip or .npz in place of TFDS

A cell that is done is a small file, RESULTS/NAME/SCALE/<cell>_<seed>.json, and is not run again; an interrupted one
goes on where it was, in RUNS/SCALE/NAME/<cell>_<seed>.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from diffusion_distill.base import interrupts
from diffusion_distill.base.compilation import keep_compiled
from diffusion_distill.base.whole import write_json
from diffusion_distill.training.sharding import use_cpu_devices
from diffusion_distill.version import __version__

from .cells import Cell, Place, Row
from .scales import SCALES, Scale

RESULTS = Path(__file__).resolve().parent.parent / "results"
RUNS = Path("runs/experiments")


@dataclass(frozen=True)
class Experiment:
    """A table or figure of a paper.

    Attributes:
      name: of its file.
      title: the paper and its table or figure.
      cells: of a scale.
      paper: (row, column) -> the number that the paper prints; of those that are known here.
      says: what the paper says, in a sentence or two.
      measure: which number is compared.
      column: what the columns are.
      scales: those that it can run at.
      apart: whether the figure has a panel for each teacher; in the rows its name stands behind a comma.
    """

    name: str
    title: str
    says: str
    cells: Callable[[Scale], Sequence[Cell]]
    paper: Mapping[tuple[str, Any], float] = field(default_factory=dict)
    measure: str = "frechet"
    column: str = "steps"
    scales: tuple[str, ...] = ("paper", "gpu", "cpu")
    apart: bool = False

    def folder(self, scale: str) -> Path:
        """Where its results are."""
        return RESULTS / self.name / scale

    def main(self, argv: Sequence[str] | None = None) -> None:
        """The command line."""
        given = _arguments(self, argv)
        scale = SCALES[given.scale].tried() if given.trial else SCALES[given.scale]
        cells = _chosen(self.cells(scale), given.only)
        if given.dry_run:
            from .costs import print_costs  # which needs no result, and the others nothing of it

            print_costs(self.title, scale, cells, given.seeds, measure=given.measure)
            return
        if not given.collect:
            self.run(scale, cells, given)
        from .collect import collect

        collect(self, scale)

    def run(self, scale: Scale, cells: Sequence[Cell], given: argparse.Namespace) -> None:
        """Runs what is not done: the first seed of every cell, then the next."""
        use_cpu_devices(given.cpu_devices)
        keep_compiled()
        interrupts.listen()
        place = Place(scale, given.runs / scale.folder, self.name, dict(given.data))
        left = [(cell, seed) for seed in range(given.seeds) for cell in cells if not self.done(scale, cell, seed)]
        for number, (cell, seed) in enumerate(left, start=1):
            if not self.done(scale, cell, seed):  # else another process was faster
                print(f"\n[{number}/{len(left)}] {cell.name}, seed {seed}", flush=True)
                self.rows_of(cell, place, seed)

    def rows_of(self, cell: Cell, place: Place, seed: int) -> list[Row]:
        """The rows of a cell: those of its result, or of its run now, which leaves a result.

        Args:
          place: of this experiment or of another one that asks for a cell of this one.
        """
        path = self.result(place.scale, cell, seed)
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["rows"]
        begun = time.monotonic()
        rows = self._kept(place.scale, cell, seed, cell.run(replace(place, experiment=self.name), seed))
        facts = {
            "cell": cell.name,
            "seed": seed,
            "teacher": cell.teacher,
            "rows": rows,
            "seconds": round(time.monotonic() - begun),
            "version": __version__,
            "device": jax.devices()[0].device_kind,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, facts)
        return rows

    def _kept(self, scale: Scale, cell: Cell, seed: int, rows: Sequence[Row]) -> list[Row]:
        """The rows, with their pictures copied to the results."""
        kept = []
        for row in rows:
            if "picture" in row:
                source = Path(row["picture"])
                target = self.result(scale, cell, seed).with_suffix("") / source.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                row = {**row, "picture": f"{target.parent.name}/{target.name}"}
            kept.append(row)
        return kept

    def result(self, scale: Scale, cell: Cell, seed: int) -> Path:
        """The file of a cell that is done."""
        return self.folder(scale.folder) / f"{cell.name}_{seed}.json"

    def done(self, scale: Scale, cell: Cell, seed: int) -> bool:
        """Whether there is a result."""
        return self.result(scale, cell, seed).is_file()

    def rows(self, scale: str) -> list[dict[str, Any]]:
        """All rows of the cells that are done, each with its seed."""
        found = []
        for path in sorted(self.folder(scale).glob("*_*.json")):
            facts = json.loads(path.read_text(encoding="utf-8"))
            found += [{**row, **{name: facts[name] for name in ("seed", "cell", "teacher")}} for row in facts["rows"]]
        return found


def _arguments(experiment: Experiment, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment.name}", description=f"{experiment.title}. {experiment.says}"
    )
    parser.add_argument("--scale", choices=experiment.scales, default=experiment.scales[-1])
    parser.add_argument("--seeds", type=int, default=1, help="training seeds 0, 1, ... (%(default)s)")
    parser.add_argument("--only", nargs="+", default=(), metavar="CELL", help="run these cells only")
    parser.add_argument("--dry_run", action="store_true", help="say what it would cost")
    parser.add_argument("--measure", action="store_true", help="with --dry_run: time an update of each kind here")
    parser.add_argument("--trial", action="store_true", help="a few updates and samples of each, kept apart")
    parser.add_argument("--data", nargs="+", type=_named, default=(), metavar="SET=PATH", help="a data set's images")
    parser.add_argument("--collect", action="store_true", help="only collect what is done")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of checkpoints and students (%(default)s)")
    cores = 2 ** min(3, (os.cpu_count() or 1).bit_length() - 1)
    parser.add_argument("--cpu_devices", type=int, default=cores, help="split the CPU into so many (%(default)s)")
    given = parser.parse_args(argv)
    if given.seeds < 1:
        parser.error(f"--seeds={given.seeds}: at least one is needed.")
    return given


def _named(text: str) -> tuple[str, str]:
    """'mnist=train.npz,test.npz' as ('mnist', 'train.npz,test.npz').

    Raises:
      ArgumentTypeError: there is no '='.
    """
    name, found, path = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not SET=PATH.")
    return name, path


def _chosen(cells: Sequence[Cell], only: Sequence[str]) -> Sequence[Cell]:
    """The cells that are asked for; all if none is.

    Raises:
      SystemExit: there is no such cell.
    """
    names = [cell.name for cell in cells]
    if unknown := set(only) - set(names):
        raise SystemExit(f"No such cell: {', '.join(sorted(unknown))}. There are {', '.join(names)}.")
    return [cell for cell in cells if not only or cell.name in only]
