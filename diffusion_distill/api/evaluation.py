"""Measuring images against reference images: at once, or as a long evaluation that survives interruption.

Images are always rounded to 8 bits before anything is measured, as published programs do, also for the features called
"pixels" (`features.Pixels`): whoever measures the same images gets the same number to the last digit.

A long evaluation draws `count` images of each sampler, `repetitions` times (repetition r takes the images numbered from
r·count), and takes their features. Moments are summed in float64; of the first `kept` images the features themselves
are kept, for precision, recall and KID, and of all images the logits. What is drawn is on disk every `SAVE_EVERY`
seconds and when the program is asked to stop:

WORKDIR/parts/<sampler>_<repetition>/    moments, kept features, logits, and how many images are in them
WORKDIR/results.json                     every number with its conventions
WORKDIR/<sampler>.png                    the first images
WORKDIR/reference-*.npz                  moments and kept features of the reference, named by its content

Batches do not move when a run goes on, so its numbers are those of a run that was never stopped, to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_distill.api.classifier import TrainedClassifier
from diffusion_distill.api.sampling import Sampler, labels_for
from diffusion_distill.base import interrupts
from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.base.files import user_path
from diffusion_distill.base.whole import whole, write_json
from diffusion_distill.data.fingerprint import fingerprint
from diffusion_distill.data.quantise import RULES, quantise
from diffusion_distill.data.sources import Source, from_arrays
from diffusion_distill.evaluation import (
    Blocks,
    Moments,
    extrapolated,
    frechet_distance,
    inception_score,
    kid,
    moments,
    precision_recall,
    random_subsets,
    read_reference,
)
from diffusion_distill.evaluation.features import RULES as INPUT_RULES
from diffusion_distill.evaluation.features import Features, FromFunction, Inception, InceptionFeatures, Pixels
from diffusion_distill.report.pictures import image_grid
from diffusion_distill.training import checksum
from diffusion_distill.training.progress import Progress
from diffusion_distill.training.workdir import Workdir
from diffusion_distill.version import __version__
from diffusion_distill.weights.inception import FACTS, load_inception

#: Seconds between savings of a part.
SAVE_EVERY = 30.0
SHOWN, COLUMNS = 64, 16
Measured = Features | Inception


def evaluate(
    images: np.ndarray, reference: np.ndarray, k: int = 3, features: Measured | None = None
) -> dict[str, float]:
    """Fréchet distance, precision and recall of images against reference images.

    Args:
      images, reference: [n, height, width, channels] in [-1, 1], which are rounded to 8 bits first, or uint8.
      k: neighbours of precision and recall.
      features: `features.Pixels` by default, whose distances see means, covariances and neighbourhoods of pixels, not
        what people see.
    """
    features = features or Pixels(np.shape(images)[1:])  # type: ignore[arg-type]  # it checks the shape itself
    taken, real = (Part.of(features, part) for part in (images, reference))
    return distances(taken, real, k, limit=max(taken.count, real.count))


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation.

    Attributes:
      count: images per repetition.
      repetitions: independent sets of images; their least, mean and standard deviation are reported.
      batch_size: images drawn together.
      kept: images whose features are kept for precision, recall and KID.
      neighbours: k of precision and recall.
      quantisation: one of `quantise.RULES`.
      extrapolate: also estimate the Fréchet distance that so many images would have, from the kept ones and five random
        halves of them (`metrics.extrapolated`); results call it extrapolated, since it is not measured. 0 for none.

    Raises:
      ValueError: counts that are not positive, an unknown rule.
    """

    count: int = 50_000
    repetitions: int = 3
    batch_size: int = 256
    kept: int = 10_000
    neighbours: int = 3
    quantisation: str = "round_half_up"
    extrapolate: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "repetitions", "batch_size", "kept", "neighbours"):
            positive_int(name, getattr(self, name))
        choose("rule of quantisation", self.quantisation, RULES)

    @property
    def batch(self) -> int:
        """Images drawn together: no more than there are."""
        return min(self.batch_size, self.count)


def features_named(name: str, shape: tuple[int, ...]) -> Measured:
    """The features that a config names.

    Args:
      name: 'pixels'; or the folder of a classifier or of imported Inception weights, behind which ':tensorflow' or
        ':pytorch_fid' names the input rule of the latter.

    Raises:
      FileNotFoundError: a folder that holds neither.
      ValueError: a classifier of images of another shape, or an unknown rule.
    """
    if name == "pixels":
        return Pixels(shape)
    folder, rule = user_path(name), ""
    if not folder.is_dir() and ":" in name:  # colons may belong to the folder's name
        before, _, after = name.rpartition(":")
        if after in INPUT_RULES or user_path(before).is_dir():
            choose("input rule", after, INPUT_RULES)
            folder, rule = user_path(before), after
    if (folder / "classifier.json").is_file():
        trained = TrainedClassifier.load(folder)
        if tuple(trained.shape) != tuple(shape):
            raise ValueError(f"The classifier {folder} takes images {trained.shape}; these are {shape}.")
        accuracy = trained.about.get("accuracy")
        title = f"classifier {trained.fingerprint}, held-out accuracy {accuracy}"
        return FromFunction(trained.features, title, int(trained.network.width), trained.fingerprint)
    if not (folder / FACTS).is_file():
        raise FileNotFoundError(
            f"{folder} holds no features: neither a classifier's classifier.json nor {FACTS}, which --mode=import "
            "writes for the weights of FID's InceptionV3. Give such a folder, or 'pixels'."
        )
    weights = load_inception(folder)
    return Inception(jax.device_put(weights.params), rule or weights.rule)


@dataclass
class Part:
    """The statistics of some images, in their order; identical for every division into batches.

    Attributes:
      count: images taken so far; 0 if that is not known.
      sums: of the features by name ('features', 'spatial').
      kept: features of the first images, [n, width].
      logits: of all images, [n, classes]; None without a classifier.
    """

    count: int
    sums: dict[str, Blocks]
    kept: np.ndarray
    logits: np.ndarray | None

    @classmethod
    def empty(cls) -> Part:
        """Nothing taken yet."""
        return cls(0, {}, np.zeros((0, 0), np.float32), None)

    @classmethod
    def of(cls, features: Measured, images: np.ndarray) -> Part:
        """Everything of images in [-1, 1], which are rounded to 8 bits first, or uint8."""
        part = cls.empty()
        part.add(outputs_of(features, quantise(images)), len(images))
        return part

    @property
    def moments(self) -> dict[str, Moments]:
        """Of the features by name."""
        return {name: found.moments() for name, found in self.sums.items()}

    def add(self, outputs: Mapping[str, np.ndarray], limit: int) -> None:
        """Takes the features of further images; keeps rows up to `limit`."""
        rows = outputs["features"]
        for name in ("features", "spatial"):
            if name in outputs:
                self.sums.setdefault(name, Blocks()).add(outputs[name])
        if len(self.kept) < limit:
            new = rows[: limit - len(self.kept)].astype(np.float32)
            self.kept = np.concatenate([self.kept, new]) if self.count else new
        if "logits" in outputs:
            logits = outputs["logits"].astype(np.float32)
            self.logits = logits if self.logits is None else np.concatenate([self.logits, logits])
        self.count += len(rows)

    def digest(self) -> str:
        """A short text that stands for the moments."""
        found = hashlib.sha256()
        for name in sorted(self.moments):
            found.update(np.ascontiguousarray(self.moments[name].mean).tobytes())
            found.update(np.ascontiguousarray(self.moments[name].cov).tobytes())
        return found.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        arrays: dict[str, Any] = {"count": self.count, "kept": self.kept}
        for name, found in self.sums.items():
            arrays |= {f"{name}.{key}": value for key, value in found.to_arrays().items()}
        if self.logits is not None:
            arrays["logits"] = self.logits
        with whole(path) as half, open(half, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Part:
        """Reads the file; an empty part if there is none."""
        if not path.is_file():
            return cls.empty()
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        sums: dict[str, dict[str, np.ndarray]] = {}
        for name, _, key in (full.partition(".") for full in arrays if "." in full):
            sums.setdefault(name, {})[key] = arrays[f"{name}.{key}"]
        found = {name: Blocks.from_arrays(state) for name, state in sums.items()}
        return cls(int(arrays["count"]), found, arrays["kept"], arrays.get("logits"))


def outputs_of(features: Measured, images: np.ndarray) -> dict[str, np.ndarray]:
    """The features of 8-bit images, by name."""
    found: Any = features(images)
    if isinstance(found, InceptionFeatures):
        named = {"features": found.pool3, "spatial": found.spatial, "logits": found.logits}
        return {name: np.asarray(value) for name, value in named.items()}
    return {"features": np.asarray(found)}


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
    return {"sampler": row["sampler"], "nfe": row["nfe"], **measured(row)}


def measured(row: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a row of results as text: each with standard deviation and least value, if there are several."""
    found = {}
    for name in row["repetitions"][0]:
        spread = f" ± {row[f'{name} std']:.2g} (min {row[f'{name} min']:.4g})" if f"{name} std" in row else ""
        found[name] = f"{row[name]:.4g}{spread}"
    return found


def distances(part: Part, reference: Part, k: int, limit: int) -> dict[str, float]:
    """Fréchet distances, and of the first `limit` images precision and recall among k neighbours."""
    taken, real = part.moments, reference.moments
    found = {"frechet": float(frechet_distance(taken["features"], real["features"]))}
    if "spatial" in taken and "spatial" in real:
        found["sfid"] = float(frechet_distance(taken["spatial"], real["spatial"]))
    if len(reference.kept):
        found["precision"], found["recall"] = map(
            float, precision_recall(reference.kept[:limit], part.kept[:limit], k=k)
        )
    return found


def scores(part: Part, reference: Part, settings: EvaluationSettings) -> dict[str, float]:
    """Every number that the features allow."""
    found = distances(part, reference, settings.neighbours, settings.kept)
    if len(reference.kept):
        real, fake = reference.kept[: settings.kept], part.kept[: settings.kept]
        size = min(1000, len(real), len(fake))
        found["kid"] = float(kid(real, fake, random_subsets(len(real), len(fake), size=size)).mean)
    if settings.extrapolate:
        name = f"frechet extrapolated from {len(part.kept)} to {settings.extrapolate}"
        found[name] = _extrapolated(part.kept, reference.moments["features"], settings.extrapolate)
    if part.logits is not None:
        found["inception_score"] = float(inception_score(part.logits, splits=min(10, len(part.logits))).mean)
    return found


def published_reference(path: str | Path) -> Part:
    """Published statistics as a reference, see `evaluation.references`: without precision, recall and KID.

    Raises:
      ValueError: a file that cannot be read, or that holds images only.
    """
    found = read_reference(path)
    if found.moments is None:
        raise ValueError(f"{path} holds images but no statistics: give it as config.reference, a source of images.")
    named = {"features": found.moments, "spatial": found.spatial}
    sums = {name: Blocks.of(known) for name, known in named.items() if known is not None}
    return Part(found.moments.count or 0, sums, np.zeros((0, 0)), None)


def _extrapolated(kept: np.ndarray, real: Moments, to: int) -> float:
    """By TRACT's rule, from all kept rows and the median of five halves."""
    state = np.random.RandomState(2020)
    halves = [state.permutation(len(kept))[: len(kept) // 2] for _ in range(5)]
    whole = frechet_distance(moments(kept), real)
    return float(extrapolated(whole, [frechet_distance(moments(kept[h]), real) for h in halves], len(kept), to))


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
    path = _remembered(source, features, settings, user_path(folder)) if folder else None
    if path is not None and path.is_file():
        return Part.load(path)
    part, progress = Part.empty(), Progress("reference", -(-len(source) // settings.batch_size), settings.batch_size)
    for done, begin in enumerate(range(0, len(source), settings.batch_size), start=1):
        indices = np.arange(begin, min(begin + settings.batch_size, len(source)))
        images = quantise(np.asarray(source.gather(indices)["x"]), settings.quantisation)
        part.add(outputs_of(features, images), settings.kept)
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


def weights_of(features: Measured) -> str:
    """A short text that stands for the weights behind features; empty if they are not known."""
    if isinstance(features, Inception):
        return checksum.fingerprint(features.params)
    return "none" if isinstance(features, Pixels) else str(getattr(features, "fingerprint", ""))


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
    part, count, batch = Part.load(path), settings.count, settings.batch
    if part.count == count:
        return part
    progress = Progress(f"{label}, {repetition + 1} of {settings.repetitions}", -(-count // batch), batch)
    progress.start_at(part.count // batch)
    saved = time.monotonic()
    try:
        for begin, images in batches(sampler, settings, repetition, part.count):
            if not begin and not repetition and images.shape[-1] in (1, 3):
                shown = {str(row): images[row : row + COLUMNS] for row in range(0, min(SHOWN, len(images)), COLUMNS)}
                image_grid(shown, workdir / f"{_file_name(label)}.png", columns=COLUMNS)
            part.add(outputs_of(features, quantise(images, settings.quantisation)), settings.kept)
            progress.update(begin // batch + 1)
            if time.monotonic() - saved > SAVE_EVERY:
                part.save(path)
                saved = time.monotonic()
            interrupts.check()
    except interrupts.Interrupted:
        part.save(path)
        raise
    progress.close()
    part.save(path)
    return part


def batches(
    sampler: Sampler, settings: EvaluationSettings, repetition: int, begin: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """The images of a repetition from number `begin` on: (number of the first, images) of each batch."""
    count, batch = settings.count, settings.batch
    labels = labels_for(sampler.model, settings.repetitions * count, None, sampler.seed)
    for start in range(begin, count, batch):
        first, size = repetition * count + start, min(batch, count - start)
        here = None if labels is None else np.resize(labels[first : first + size], batch)
        yield start, sampler.draw(first, batch, here)[:size]


def summary(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean, least and standard deviation over repetitions."""
    whole = {}
    for name in found[0]:
        values = np.array([scores[name] for scores in found])
        whole[name] = float(values.mean())
        if len(values) > 1:
            whole |= {f"{name} min": float(values.min()), f"{name} std": float(values.std(ddof=1))}
    return whole


def _file_name(label: str) -> str:
    """A label as the name of a file, distinct for distinct labels."""
    plain = "".join(c if c.isalnum() or c in "-+=." else "_" for c in label)
    return plain if plain == label else f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"
