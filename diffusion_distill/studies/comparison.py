"""Solvers beside each other: base and D-ODE, over numbers of evaluations, on one model and from the same noise.

WORKDIR/fits/<solver>_<nfe>.json    lambdas that were not there yet
WORKDIR/results.jsonl               one line per sampler, as it is done; an interrupted comparison goes on after it
WORKDIR/results.json                all of them, with what they were measured on
WORKDIR/quality.png                 Fréchet distance and error against evaluations and against seconds

Sets of samples are measured as in `api.evaluation`, batch by batch; each repetition is from other noise. The error is
the root mean square distance of the first samples (at most `EvaluationSettings.kept`) from those of a fine solver of
the same flow from the same noise: it sees how well the flow is followed, the Fréchet distance what of that matters for
the set of images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from diffusion_distill.api.evaluation import batches, facts_of, reference_of
from diffusion_distill.api.features import features_named
from diffusion_distill.api.fitting import FitSettings, fit_solver
from diffusion_distill.api.sampling import Sampler, grid_for, sampler_of, with_scale
from diffusion_distill.base import interrupts
from diffusion_distill.base.errors import positive_int
from diffusion_distill.base.files import user_path
from diffusion_distill.base.whole import write_json
from diffusion_distill.data.sources import Source
from diffusion_distill.evaluation.measuring import (
    EvaluationSettings,
    Measured,
    Part,
    in_words,
    outputs_of,
    scores,
    seen,
    summary,
)
from diffusion_distill.report.lines import Line, Panel, line_plot
from diffusion_distill.solvers import spelled, steps_for, tabulate
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.spec import SamplerSpec
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.checksum import fingerprint
from diffusion_distill.training.logs import read_json_lines
from diffusion_distill.training.workdir import Workdir


@dataclass(frozen=True)
class Comparison:
    """The solvers and step counts to compare.

    Attributes:
      solvers: names of `SOLVERS`, perhaps with options, as in 'dpm_solver++ order=3 method=singlestep'.
      nfe: numbers of evaluations; a solver leaves out those it cannot make.
      fit: also compare each solver's D-ODE variant, if it has one.
      features: of the distances, see `api.features_named`: 'pixels', or the folder of a classifier or Inception.
      repetitions: sets of samples, each from other noise; rows have the mean of their numbers, with least value and
        standard deviation beside it if there are several.
      truth: the fine solver whose samples are the flow's, and its steps.

    Raises:
      ValueError: no solvers, an unknown one, no numbers of evaluations, a count that is not positive.
    """

    solvers: tuple[str, ...] = ("ddim", "ipndm", "deis", "dpm_solver", "dpm_solver++", "unipc")
    nfe: tuple[int, ...] = (2, 3, 5, 7, 10, 15, 20, 25)
    fit: bool = True
    features: str = "pixels"
    repetitions: int = 1
    truth: str = "dpm_solver++ order=2"
    truth_steps: int = 200

    def __post_init__(self) -> None:
        if not self.solvers or not self.nfe:
            raise ValueError(f"A comparison needs solvers and numbers of evaluations, got {self.solvers}, {self.nfe}.")
        for name in (*self.solvers, self.truth):
            spelled(name)
        for count in (*self.nfe, self.truth_steps):
            positive_int("A number of evaluations", count)
        positive_int("repetitions", self.repetitions)


@dataclass(frozen=True)
class Entry:
    """One sampler of a comparison."""

    solver: str
    nfe: int
    steps: int
    fitted: bool

    @property
    def label(self) -> str:
        """The label in pictures."""
        return f"D-{self.solver}" if self.fitted else self.solver


@dataclass
class Setting:
    """The settings that all samplers of a comparison share.

    Attributes:
      count: samples of a repetition.
      spec: how the model is sampled, but for the solvers and steps that are compared.
      teacher: of a distilled student, the model it comes from, to which it is fitted and whose flow counts.
      mesh: the devices of all sampling and fitting, as in `api.sample`; None for each one's own choice.
    """

    artefact: Artefact
    count: int
    seed: int = 0
    batch_size: int = 256
    spec: SamplerSpec = field(default_factory=SamplerSpec)
    teacher: Artefact | None = None
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        self.spec = with_scale(self.artefact.model, self.spec)

    def sampler(self, **fields: Any) -> Sampler:
        """One of the samplers."""
        return sampler_of(self.artefact, self.spec, seed=self.seed, mesh=self.mesh, **fields)

    def facts(self) -> dict[str, Any]:
        """The settings that must be equal for numbers to be comparable."""
        shared = {name: value for name, value in self.spec.to_dict().items() if name not in ("solver", "steps")}
        guide = (self.spec.guidance or {}).get("classifier")
        guided = {} if guide is None else {"classifier": fingerprint(guide)}
        known = {"model": fingerprint(self.artefact.params), "count": self.count, "seed": self.seed}
        return {**known, **guided, **shared}


def compare_solvers(
    setting: Setting,
    comparison: Comparison,
    fit: FitSettings,
    reference: Source | np.ndarray | Part,
    workdir: str | Path,
    log: Any = print,
) -> list[dict[str, Any]]:
    """Measures every sampler of a comparison that WORKDIR has not; returns one line for each.

    Args:
      reference: what sets of samples are compared with: a source, samples [n, *shape], or published statistics; see
        `evaluation.reference_of`.
      log: called with each line of the table once it is measured.

    Raises:
      ValueError: WORKDIR holds another comparison; or what sampling and fitting refuse.
      Interrupted: the program was asked to stop; what was done is in WORKDIR.
    """
    workdir, model = user_path(workdir), setting.artefact.model
    how = EvaluationSettings(setting.count, comparison.repetitions, setting.batch_size)
    features = features_named(comparison.features, model.shape, model.data_range)
    real = reference_of(reference, features, how, workdir)
    facts = {
        **setting.facts(),
        "fit": vars(fit),
        **facts_of(features, real),
        **{name: getattr(how, name) for name in ("repetitions", "kept", "neighbours", "quantisation")},
        "truth": comparison.truth,
        "truth steps": comparison.truth_steps,
    }
    path, truth, rows = workdir / "results.jsonl", None, []
    with closing(Workdir(workdir, facts, "comparison")):
        known = read_json_lines(path) if path.exists() else []
        done = {(row["solver"], row["nfe"], row["fitted"]): row for row in known}
        for entry in entries(setting, comparison):
            key = entry.solver, entry.nfe, entry.fitted
            if key not in done:
                truth = _truth(setting, comparison, how) if truth is None else truth
                measured_on = {"features": features, "reference": real}  # by a search for lambdas
                sampler, took = _sampler(setting, entry, partial(fit_solver, settings=fit, **measured_on), workdir)
                done[key] = {**_measure(sampler, features, real, how, truth), **took}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done[key]) + "\n")
                log("  ".join(f"{name} {value}" for name, value in in_short(done[key]).items()))
            rows.append(done[key])
        write_json(workdir / "results.json", {**facts, "rows": rows})
        quality_plot(rows, workdir / "quality.png")
    return rows


def in_short(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of results as a line of a table; a fitted solver is called D-."""
    name = f"D-{row['solver']}" if row["fitted"] else row["solver"]
    numbers = {"nfe": row["nfe"], "seconds": f"{row['seconds']:.4g}", **in_words(row), "error": f"{row['error']:.4g}"}
    return {"solver": name, **numbers}


def entries(setting: Setting, comparison: Comparison) -> Iterator[Entry]:
    """All samplers: each solver at each number of evaluations it can make, base and D-ODE."""
    for name in comparison.solvers:
        for nfe in comparison.nfe:
            process, spec = setting.artefact.model.process, setting.spec
            steps = steps_for(name, nfe, clean=not spec.end, pure=not process.level(np.array(1.0)).alpha)
            table = tabulate(name, grid_for(setting.artefact, steps, spec.spacing, spec.end), process)
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


def _truth(setting: Setting, comparison: Comparison, how: EvaluationSettings) -> np.ndarray:
    """Where the flow leads from the noise of the first samples."""
    model, fine = replace(setting, artefact=setting.teacher or setting.artefact), comparison.truth_steps
    sampler = model.sampler(solver=comparison.truth, steps=fine)
    images, wanted = [], min(how.count, how.kept)
    for _, batch in islice(batches(sampler, how, 0), -(-wanted // how.batch)):
        images.append(batch)
        interrupts.check()
    return np.concatenate(images)[:wanted]


def _sampler(
    setting: Setting, entry: Entry, fit: Callable[..., FittedSolver], workdir: Path
) -> tuple[Sampler, dict[str, Any]]:
    """The entry's sampler, and what results say of its fit."""
    if not entry.fitted:
        return setting.sampler(solver=entry.solver, steps=entry.steps), {}
    fitted = _fit(setting, entry, fit, workdir)
    return setting.sampler(fitted=fitted), {"fit seconds": fitted.provenance["seconds"]}


def _measure(
    sampler: Sampler, features: Measured, reference: Part, how: EvaluationSettings, truth: np.ndarray
) -> dict[str, Any]:
    """One line of the table."""
    next(batches(sampler, how, 0))  # compiles what is not yet
    found, seconds, squares = [], 0.0, 0.0
    for repetition in range(how.repetitions):
        part, begun = Part.empty(how.count), time.monotonic()
        for first, images in batches(sampler, how, repetition):
            seconds += time.monotonic() - begun
            part.add(outputs_of(features, seen(images, sampler.model.data_range, how.quantisation)), how.kept)
            if not repetition:
                there = truth[first : first + len(images)]
                squares += float(np.sum(np.square(images[: len(there)] - there), dtype=np.float64))
            interrupts.check()
            begun = time.monotonic()
        found.append(scores(part, reference, how))
    speed = 1000 * seconds / (how.count * how.repetitions)
    error = (squares / truth.size) ** 0.5
    return {**sampler.about, "seconds": speed, **summary(found), "error": error, "repetitions": found}


def _fit(setting: Setting, entry: Entry, fit: Callable[..., FittedSolver], workdir: Path) -> FittedSolver:
    """The entry's lambdas: from WORKDIR, or fitted now."""
    path = workdir / "fits" / f"{entry.solver.replace(' ', '_')}_{entry.nfe}.json"
    if path.is_file():
        return FittedSolver.load(path)
    shared = {"teacher": setting.teacher, "spec": setting.spec, "mesh": setting.mesh}
    fitted = fit(setting.artefact, entry.solver, entry.steps, **shared)
    fitted.save(path)
    return fitted
