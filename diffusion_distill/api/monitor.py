"""Looking at a student while it is trained: pictures from the same noise each time, and distances to the data.

The averaged parameters are compared with the raw ones: an average that lags behind, or a student that swings,
shows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_distill.api.features import features_named
from diffusion_distill.api.sampling import sample
from diffusion_distill.base.files import writable
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.base.typing import Cond
from diffusion_distill.data.sources import Source
from diffusion_distill.data.stream import Stream, first_batch
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.model import Model
from diffusion_distill.evaluation.measuring import Measured, Part, distances
from diffusion_distill.methods.phases import Phase
from diffusion_distill.report.pictures import drawable, image_grid
from diffusion_distill.training import loop
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.logs import Log, read_figures
from diffusion_distill.training.settings import Settings
from diffusion_distill.training.state import TrainState

#: Images of each kind in a picture.
SHOWN = 16


class Monitor:
    """Called between updates; writes WORKDIR/samples/<update>.png and figures such as 'frechet/eval'."""

    def __init__(
        self,
        model: Model,
        source: Source | Stream,
        settings: Settings,
        phases: Sequence[Phase],
        log: Log,
        folder: Path | None,
        mesh: Mesh | None = None,
    ):
        """Draws on the devices of the mesh, all by default: a run gives its own, over which its state is split."""
        self._model, self._source, self._settings = model, source, settings
        self._phases, self._log, self._folder, self._mesh = phases, log, folder, mesh
        if folder and parse_length(settings.evaluate_every):
            writable(folder / "samples")

    def __call__(self, update: int, phase: Phase, state: TrainState) -> None:
        """Draws from the average and from the raw parameters; measures both if images are to be measured."""
        count = self._settings.evaluate_count
        rows, figures = {}, {}
        for name, params in (("eval", state.averages["eval"].params), ("raw", state.params)):
            artefact = Artefact(self._model, state.whole(params), phase.student_steps, grid=phase.grid)
            how = {"cond": self._cond, "seed": self._settings.seed, "mesh": self._mesh}
            images = sample(artefact, max(SHOWN, count), **how)
            rows[name] = images[:SHOWN]
            if count:
                part = Part.of(self._features, images[:count], self._model.data_range)
                scores = distances(part, self._reference, k=3, limit=count)
                figures.update({f"{score}/{name}": value for score, value in scores.items()})
        if jax.process_index() == 0:
            self._write(update, phase, rows, figures)

    def catch_up(self, state: TrainState) -> None:
        """Makes up for an evaluation that was due at a restored state but interrupted."""
        done, ends = int(state.step), loop.ends(self._phases)
        if not loop.evaluation_due(
            done, self._phases, self._settings.batch_size, parse_length(self._settings.evaluate_every)
        ):
            return
        path = self._folder / "metrics.jsonl" if self._folder else None
        records = read_figures(path) if path and path.exists() else []
        if not any(record["update"] == done and record.get("evaluated") for record in records):
            self(done, self._phases[int(np.searchsorted(ends, done))], state)

    @cached_property
    def _cond(self) -> Cond | None:
        """The conditions of the first samples of the data; None for labels, which are drawn."""
        if self._model.cond is None:
            return None
        count = max(SHOWN, self._settings.evaluate_count)
        return conditions.repeated(first_batch(self._source, count)["cond"], count)

    @cached_property
    def _reference(self) -> Part:
        """Of the first images of the data, as many as are measured."""
        return Part.of(
            self._features, first_batch(self._source, self._settings.evaluate_count)["x"], self._model.data_range
        )

    @cached_property
    def _features(self) -> Measured:
        """The features on which images are measured."""
        return features_named(self._settings.evaluate_features, self._model.shape, self._model.data_range)

    def _write(self, update: int, phase: Phase, rows: dict[str, np.ndarray], figures: dict[str, float]) -> None:
        shown = drawable(self._model.shape, self._model.data_range)
        for name, images in rows.items() if shown else ():
            self._log.images(update, f"samples/{name}", images)
        if self._folder and shown:
            image_grid(rows, self._folder / "samples" / f"{update:08d}.png", title=f"{phase.name}, update {update}")
        # last, as a run that finds this record makes up for nothing
        self._log.scalars(update, {"phase": phase.name, "evaluated": True, **figures})
