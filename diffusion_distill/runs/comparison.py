"""Solvers beside each other: base and D-ODE, over numbers of evaluations, on one model and from the same noise.

WORKDIR/fits/<solver>_<nfe>.json    lambdas that were not there yet
WORKDIR/results.jsonl               one line per sampler, as it is done; an interrupted comparison goes on after it
WORKDIR/results.json                all of them, with what they were measured on
WORKDIR/quality.png                 Fréchet distance and error against evaluations and against seconds

The error is the root mean square distance of the samples from those of a fine solver of the same flow from the same
noise: it sees how well the flow is followed, the Fréchet distance what of that matters for the set of images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_distill.distillation.fitted import FittedSolver
from diffusion_distill.errors import positive_int
from diffusion_distill.report.lines import Line, Panel, line_plot
from diffusion_distill.runs.evaluation import evaluate, features_named
from diffusion_distill.runs.fitting import FitSettings, fit_solver
from diffusion_distill.runs.sampling import grid_for, sample
from diffusion_distill.solvers import spelled, steps_for, tabulate
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.checksum import fingerprint
from diffusion_distill.training.logs import read_json_lines
from diffusion_distill.training.workdir import Workdir


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
      solvers: names of `SOLVERS`, perhaps with options, as in 'dpm_solver++ order=3 method=singlestep'.
      nfe: numbers of evaluations; a solver leaves out those it cannot make.
      fit: also compare each solver's D-ODE variant, if it has one.
      features: of the distances, see `evaluation.features_named`: 'pixels', or the folder of a classifier.
      truth: the fine solver whose samples are the flow's, and its steps.

    Raises:
      ValueError: no solvers, an unknown one, no numbers of evaluations.
    """

    solvers: tuple[str, ...] = ("ddim", "ipndm", "deis", "dpm_solver", "dpm_solver++", "unipc")
    nfe: tuple[int, ...] = (2, 3, 5, 7, 10, 15, 20, 25)
    fit: bool = True
    features: str = "pixels"
    truth: str = "dpm_solver++ order=2"
    truth_steps: int = 200

    def __post_init__(self) -> None:
        if not self.solvers or not self.nfe:
            raise ValueError(f"A comparison needs solvers and numbers of evaluations, got {self.solvers}, {self.nfe}.")
        for name in (*self.solvers, self.truth):
            spelled(name)
        for count in (*self.nfe, self.truth_steps):
            positive_int("A number of evaluations", count)


@dataclass(frozen=True)
class Entry:
    """One sampler of a comparison."""

    solver: str
    nfe: int
    steps: int
    fitted: bool

    @property
    def label(self) -> str:
        """What pictures call it."""
        return f"D-{self.solver}" if self.fitted else self.solver


@dataclass
class Setting:
    """What all samplers of a comparison share; see `runs.sample`.

    Attributes:
      teacher: of a distilled student, the model it comes from, to which it is fitted and whose flow counts.
    """

    artefact: Artefact
    count: int
    seed: int = 0
    batch_size: int = 256
    spacing: str = "time"
    end: float = 0.0
    clip: bool = True
    guidance: Mapping[str, Any] = field(default_factory=dict)
    teacher: Artefact | None = None

    def draw(self, count: int, **sampler: Any) -> np.ndarray:
        """Samples of one sampler."""
        shared = {"seed": self.seed, "batch_size": self.batch_size, "clip": self.clip, "guidance": self.guidance}
        return sample(self.artefact, count, **shared, **sampler)

    def facts(self) -> dict[str, Any]:
        """What makes numbers comparable."""
        return {
            "model": fingerprint(self.artefact.params),
            "count": self.count,
            "seed": self.seed,
            "spacing": self.spacing,
            "end": self.end,
            "clip": self.clip,
            "guidance": dict(self.guidance),
        }


def compare_solvers(
    setting: Setting, comparison: Comparison, fit: FitSettings, reference: np.ndarray, workdir: Path, log: Any = print
) -> list[dict[str, Any]]:
    """Measures every sampler of a comparison that WORKDIR has not; returns one line for each.

    Args:
      reference: images [n, height, width, channels] in [-1, 1] to compare sets of samples with.
      log: is told each line of the table as it is done.

    Raises:
      ValueError: WORKDIR holds another comparison; or what sampling and fitting refuse.
      Interrupted: the program was asked to stop; what was done is in WORKDIR.
    """
    facts = {
        **setting.facts(),
        "fit": vars(fit),
        "features": comparison.features,
        "truth": comparison.truth,
        "truth steps": comparison.truth_steps,
    }
    path, truth, rows = workdir / "results.jsonl", None, []
    features = None if comparison.features == "pixels" else features_named(comparison.features, reference.shape[1:])
    measure = partial(evaluate, reference=reference, features=features)
    with closing(Workdir(workdir, facts, "comparison")):
        known = read_json_lines(path) if path.exists() else []
        done = {(row["solver"], row["nfe"], row["fitted"]): row for row in known}
        for entry in entries(setting, comparison):
            key = entry.solver, entry.nfe, entry.fitted
            if key not in done:
                truth = _truth(setting, comparison) if truth is None else truth
                done[key] = _measure(setting, entry, fit, measure, truth, workdir)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[key]) + "\n")
                log("  ".join(f"{name} {_short(value)}" for name, value in done[key].items()))
            rows.append(done[key])
        results = json.dumps({**facts, "rows": rows}, indent=2)
        (workdir / "results.json").write_text(results + "\n", encoding="utf-8")
        quality_plot(rows, workdir / "quality.png")
    return rows


def entries(setting: Setting, comparison: Comparison) -> Iterator[Entry]:
    """All samplers: each solver at each number of evaluations it can make, base and D-ODE."""
    for name in comparison.solvers:
        for nfe in comparison.nfe:
            steps = steps_for(name, nfe, clean=not setting.end)
            model = setting.artefact.on_grid(steps).model
            table = tabulate(name, grid_for(setting.artefact, steps, setting.spacing, setting.end), model.schedule)
            if table.nfe != nfe:
                continue
            yield Entry(name, nfe, steps, fitted=False)
            if comparison.fit and table.directions is not None and table.directions.weights.any():
                yield Entry(name, nfe, steps, fitted=True)


def quality_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Fréchet distance and error of all samplers against evaluations and against seconds; D-ODE dashed."""
    panels = []
    for measure, ylabel in (("frechet", "Fréchet distance"), ("error", "distance from the flow")):
        row = {}
        for x, xlabel in (("nfe", "evaluations"), ("seconds", "seconds per 1000 images")):
            lines = {}
            for name, fitted in dict.fromkeys((row["solver"], row["fitted"]) for row in rows):
                points = [(r[x], r[measure]) for r in rows if (r["solver"], r["fitted"]) == (name, fitted)]
                label, (xs, ys) = f"D-{name}" if fitted else name, zip(*points, strict=True)
                lines[label] = Line(xs, ys, "--" if fitted else "-", "o", name if fitted else None)
            row[f"{ylabel} by {'time' if x == 'seconds' else xlabel}"] = Panel(lines, xlabel, ylabel, "log", "log")
        panels.append(row)
    return line_plot(panels, path)


def _truth(setting: Setting, comparison: Comparison) -> np.ndarray:
    fine = {"solver": comparison.truth, "steps": comparison.truth_steps}
    model = replace(setting, artefact=setting.teacher or setting.artefact)
    return model.draw(setting.count, **fine, spacing=setting.spacing, end=setting.end)


def _measure(
    setting: Setting, entry: Entry, fit: FitSettings, measure: Any, truth: np.ndarray, workdir: Path
) -> dict[str, Any]:
    """One line of the table."""
    sampler: dict[str, Any] = {"solver": entry.solver, "steps": entry.steps}
    sampler |= {"spacing": setting.spacing, "end": setting.end}
    facts: dict[str, Any] = {}
    if entry.fitted:
        fitted = _fit(setting, entry, fit, workdir)
        sampler, facts = {"fitted": fitted}, {"fit seconds": fitted.provenance["seconds"]}
    setting.draw(setting.batch_size, **sampler)  # compiles what is not yet
    begun = time.monotonic()
    images = setting.draw(setting.count, **sampler)
    seconds = (time.monotonic() - begun) / setting.count * 1000
    error = float(np.sqrt(np.mean((images - truth) ** 2)))
    scores = measure(images)
    return {"solver": entry.solver, "fitted": entry.fitted, "nfe": entry.nfe, "seconds": seconds, **scores,
            "error": error, **facts}  # fmt: skip


def _fit(setting: Setting, entry: Entry, fit: FitSettings, workdir: Path) -> FittedSolver:
    """The entry's lambdas: from WORKDIR, or fitted now."""
    path = workdir / "fits" / f"{entry.solver.replace(' ', '_')}_{entry.nfe}.json"
    if path.is_file():
        return FittedSolver.load(path)
    shared = {"spacing": setting.spacing, "end": setting.end, "clip": setting.clip, "guidance": setting.guidance}
    fitted = fit_solver(setting.artefact, entry.solver, entry.steps, fit, teacher=setting.teacher, **shared)
    fitted.save(path)
    return fitted


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
