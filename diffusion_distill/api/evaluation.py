"""Measuring samples against reference samples: at once, or as a long evaluation that survives interruption.

A long evaluation draws `count` samples of each sampler, `repetitions` times (repetition r takes those numbered from
r·count), and takes their features, on all devices. Moments and the sums of the Inception Score are added up in float64,
on the host while the devices draw the next batch; of the first `kept` samples the features themselves are kept, for
precision, recall and KID. What is drawn is on disk every `SAVE_EVERY` seconds and when the program is asked to stop:

WORKDIR/parts/<sampler>_<repetition>.npz moments, sums, kept features, and how many samples are in them
WORKDIR/results.json                     every number with its conventions
WORKDIR/<sampler>.png                    the first samples, if they can be drawn
WORKDIR/reference-*.npz                  moments and kept features of the reference, named by its content

Batches do not move when a run goes on, so its numbers are those of a run that was never stopped, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_distill.api.features import weights_of
from diffusion_distill.api.sampling import Sampler
from diffusion_distill.base import interrupts
from diffusion_distill.base.files import user_path
from diffusion_distill.base.whole import write_json
from diffusion_distill.data.fingerprint import fingerprint
from diffusion_distill.data.prefetch import ahead
from diffusion_distill.data.sources import Source, from_arrays
from diffusion_distill.denoisers import conditions
from diffusion_distill.evaluation.meanwhile import Meanwhile
from diffusion_distill.evaluation.measuring import (
    IMAGES,
    EvaluationSettings,
    Measured,
    Part,
    Range,
    as_features,
    distances,
    in_words,
    outputs_of,
    scores,
    seen,
    summary,
)
from diffusion_distill.report.pictures import drawable, image_grid
from diffusion_distill.training.progress import Progress
from diffusion_distill.training.workdir import Workdir
from diffusion_distill.version import __version__

#: Seconds between savings of a part.
SAVE_EVERY = 30.0
SHOWN, COLUMNS = 64, 16


def evaluate(
    images: np.ndarray,
    reference: np.ndarray,
    k: int = 3,
    features: Measured | Callable[[np.ndarray], Any] | None = None,
    data_range: Range = IMAGES,
) -> dict[str, float]:
    """Fréchet distance, precision and recall of samples against reference samples.

    Args:
      images, reference: [n, *shape], of any shape. Those with a range are rounded to 8 bits first, or uint8 already.
      k: neighbours of precision and recall.
      features: a function [n, *shape] -> [n, width] of the 8-bit numbers (of data without a range, of the samples), or
        one of `evaluation.features`. By default the pixels themselves, whose distances see means, covariances and
        neighbourhoods of pixels, not what people see.
      data_range: what is black and what white, or (low, high) of other data; None for data without bounds.
    """
    features = as_features(features, np.shape(images)[1:], data_range)
    taken, real = (Part.of(features, part, data_range) for part in (images, reference))
    return distances(taken, real, k, limit=max(taken.count, real.count))


def evaluate_samplers(
    samplers: Mapping[str, Callable[[], Sampler]],
    features: Measured,
    reference: Part,
    settings: EvaluationSettings,
    facts: Mapping[str, Any],
    workdir: str | Path,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measures samplers and writes WORKDIR/results.json; goes on with what WORKDIR has.

    Args:
      samplers: label -> makes the sampler, when its turn comes.
      reference: of the images to compare with, see `reference_of`.
      facts: JSON-ready conventions that are written beside the numbers, and that WORKDIR must have been begun with.
      log: called with each result.

    Raises:
      ValueError: WORKDIR was begun with other settings, or another process works in it.
      Interrupted: the program was asked to stop; what was drawn is in WORKDIR.
    """
    workdir = user_path(workdir)
    facts, rows = {**facts, **vars(settings), **facts_of(features, reference)}, []
    with closing(Workdir(workdir, facts, "evaluation")):
        for label, make in samplers.items():
            sampler, found = make(), []
            for repetition in range(settings.repetitions):
                path = workdir / "parts" / f"{_file_name(label)}_{repetition}.npz"
                part = _drawn(sampler, features, settings, repetition, path, label, workdir)
                found.append(scores(part, reference, settings))
            row = {"sampler": label, **sampler.about, **summary(found), "repetitions": found}
            rows.append(row)
            log("  ".join(f"{name} {value}" for name, value in in_short(row).items()))
            write_json(workdir / "results.json", {**facts, "rows": rows})
    return rows


def in_short(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of results as a line of a table: mean, standard deviation and least value of each number as text."""
    return {"sampler": row["sampler"], "nfe": row["nfe"], **in_words(row)}


def reference_of(
    source: Source | np.ndarray | Part,
    features: Measured,
    settings: EvaluationSettings,
    folder: str | Path | None = None,
) -> Part:
    """The features of all images of a source, taken batch by batch.

    Args:
      source: or images as `data.from_arrays` takes them, or a part, such as published statistics, which is passed on.
      folder: where they are remembered, if the source and the features have fingerprints: FOLDER/reference-*.npz is of
        these images and of these weights, whatever they are called and wherever they lie.

    Raises:
      Interrupted: the program was asked to stop.
    """
    if isinstance(source, Part):
        return source
    source = from_arrays(source) if isinstance(source, np.ndarray) else source
    data_range = None if getattr(source, "value_range", IMAGES) is None else IMAGES
    path = _remembered(source, features, settings, user_path(folder)) if folder else None
    part = Part.load(path) if path is not None else Part.empty()
    if part.count:
        return part
    batch, count = settings.batch_size, len(source)

    def read(begin: int) -> np.ndarray:
        images = source.gather(np.arange(begin, min(begin + batch, count)))["x"]
        return seen(images, data_range, settings.quantisation)

    progress = Progress("reference", -(-count // batch), batch)
    with closing(ahead(read, range(0, count, batch), depth=1)) as images, Meanwhile(part.add) as add:
        for done, here in enumerate(images, start=1):
            add(outputs_of(features, here), settings.kept)
            progress.update(done)
            interrupts.check()
    progress.close()
    if path is not None:
        part.save(path)
    return part


def facts_of(features: Measured, reference: Part) -> dict[str, Any]:
    """The facts that must be equal for distances to be comparable, JSON-ready."""
    measured = {"features": features.name, "weights of the features": weights_of(features)}
    return {**measured, "reference images": reference.count, "reference hash": reference.digest()}


def _remembered(source: Source, features: Measured, settings: EvaluationSettings, folder: Path) -> Path | None:
    """Where the reference of these images and features is or would be; None if their contents cannot be told."""
    weights = weights_of(features)
    images = fingerprint(source) if weights else ""
    if not images:
        return None
    what = [images, len(source), features.name, weights, settings.quantisation, settings.kept, __version__]
    return folder / f"reference-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.npz"


def _drawn(
    sampler: Sampler,
    features: Measured,
    settings: EvaluationSettings,
    repetition: int,
    path: Path,
    label: str,
    workdir: Path,
) -> Part:
    """The part of one repetition: read, or drawn from where it stopped."""
    part, count, batch = Part.load(path, settings.count), settings.count, settings.batch
    if part.count == count:
        return part
    progress = Progress(f"{label}, {repetition + 1} of {settings.repetitions}", -(-count // batch), batch)
    progress.start_at(part.count // batch)
    saved, data_range = time.monotonic(), sampler.model.data_range
    try:
        with Meanwhile(part.add) as add:
            for begin, images in batches(sampler, settings, repetition, part.count):
                if not begin and not repetition and drawable(images.shape[1:], data_range):
                    _show(images, workdir / f"{_file_name(label)}.png")
                add(outputs_of(features, seen(images, data_range, settings.quantisation)), settings.kept)
                progress.update(begin // batch + 1)
                if time.monotonic() - saved > SAVE_EVERY:
                    add.wait()
                    part.save(path)
                    saved = time.monotonic()
                interrupts.check()
    except interrupts.Interrupted:
        part.save(path)
        raise
    progress.close()
    part.save(path)
    return part


def _show(images: np.ndarray, path: Path) -> None:
    """Writes a picture of the first images."""
    shown = {str(row): images[row : row + COLUMNS] for row in range(0, min(SHOWN, len(images)), COLUMNS)}
    image_grid(shown, path, columns=COLUMNS)


def batches(
    sampler: Sampler, settings: EvaluationSettings, repetition: int, begin: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """The images of a repetition from number `begin` on: (number of the first, images) of each batch."""
    count, batch = settings.count, settings.batch
    cond = conditions.for_samples(sampler.model, settings.repetitions * count, None, sampler.seed)
    for start in range(begin, count, batch):
        first, size = repetition * count + start, min(batch, count - start)
        here = jax.tree.map(lambda a, first=first, size=size: a[first : first + size], cond)
        yield start, sampler.draw(first, batch, here)[:size]


def _file_name(label: str) -> str:
    """A label as the name of a file, distinct for distinct labels."""
    plain = "".join(c if c.isalnum() or c in "-+=." else "_" for c in label)
    return plain if plain == label else f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"
