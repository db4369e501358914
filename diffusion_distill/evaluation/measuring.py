"""What is known of a set of samples, and the numbers that two such sets give.

A `Part` holds moments, kept features and the sums of the Inception Score, of as many samples as were taken so far; no
logits, and no other features than those kept. Data with a range are rounded
to 8 bits before anything is measured, as published programs do, also for the features called "pixels": whoever measures
the same images gets the same number to the last digit. Data without a range are measured as they are.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion_distill.base import npz_file
from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.base.whole import whole
from diffusion_distill.data.quantise import RULES, quantise
from diffusion_distill.evaluation.features import Features, FromFunction, Inception, InceptionFeatures, Pixels
from diffusion_distill.evaluation.frechet import extrapolated, frechet_distance
from diffusion_distill.evaluation.inception_score import ScoreSums, borders
from diffusion_distill.evaluation.kid import kid, random_subsets
from diffusion_distill.evaluation.precision_recall import precision_recall
from diffusion_distill.evaluation.references import read_reference
from diffusion_distill.evaluation.statistics import Blocks, Moments, moments

Measured = Features | Inception
Range = tuple[float, float] | None
IMAGES = (-1.0, 1.0)


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation.

    Attributes:
      count: images per repetition.
      repetitions: independent sets of images; their least, mean and standard deviation are reported.
      batch_size: samples drawn together.
      kept: images whose features are kept for precision, recall and KID.
      neighbours: k of precision and recall.
      quantisation: one of `quantise.RULES`.
      extrapolate: also estimate the Fréchet distance that so many images would have, from the kept ones and five random
        halves of them (`frechet.extrapolated`); results call it extrapolated, since it is not measured. 0 for none.

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
        if self.extrapolate != 0:
            positive_int("extrapolate, if not 0,", self.extrapolate)
        choose("rule of quantisation", self.quantisation, RULES)

    @property
    def batch(self) -> int:
        """Images drawn together: no more than there are."""
        return min(self.batch_size, self.count)


@dataclass
class Part:
    """The statistics of some images, in their order; identical for every division into batches.

    Attributes:
      count: images taken so far; 0 if that is not known.
      sums: of the features by name ('features', 'spatial').
      kept: features of the first images, [n, width].
      inception: sums of the Inception Score; None without logits, or where nobody asked for the score.
    """

    count: int
    sums: dict[str, Blocks]
    kept: np.ndarray
    inception: ScoreSums | None = None

    @classmethod
    def empty(cls, scored: int = 0) -> Part:
        """Nothing taken yet.

        Args:
          scored: images that will be taken and have an Inception Score, whose ten splits depend on it; 0 for no score.
        """
        inception = ScoreSums(borders(scored, splits=min(10, scored))) if scored else None
        return cls(0, {}, np.zeros((0, 0), np.float32), inception)

    @classmethod
    def of(cls, features: Measured, samples: np.ndarray, data_range: Range = IMAGES) -> Part:
        """Everything of some samples, see `seen`."""
        part = cls.empty()
        part.add(outputs_of(features, seen(samples, data_range)), len(samples))
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
        if self.inception and "logits" in outputs:
            self.inception.add(outputs["logits"])
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
        for name, found in {**self.sums, **({"inception": self.inception} if self.inception else {})}.items():
            arrays |= {f"{name}.{key}": value for key, value in found.to_arrays().items()}
        with whole(path) as half, open(half, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path, scored: int = 0) -> Part:
        """Reads the file; an empty part if there is none, or if it is damaged or of a former version."""
        if not path.is_file():
            return cls.empty(scored)
        try:
            arrays = npz_file.read(path)
            return cls.empty(scored) if "logits" in arrays else cls._of_arrays(arrays)
        except (*npz_file.UNREADABLE, KeyError) as error:
            warnings.warn(f"{path} is damaged ({str(error)[:200]}): its images are measured again.", stacklevel=2)
            return cls.empty(scored)

    @classmethod
    def _of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Part:
        """What `save` wrote."""
        sums: dict[str, dict[str, np.ndarray]] = {}
        for name, _, key in (full.partition(".") for full in arrays if "." in full):
            sums.setdefault(name, {})[key] = arrays[f"{name}.{key}"]
        inception = sums.pop("inception", None)
        found = {name: Blocks.from_arrays(state) for name, state in sums.items()}
        scores = ScoreSums.from_arrays(inception) if inception else None
        return cls(int(arrays["count"]), found, arrays["kept"], scores)


def seen(samples: np.ndarray, data_range: Range = IMAGES, rule: str = "round_half_up") -> np.ndarray:
    """What features see: samples with a range as 8-bit numbers (uint8 stay as they are), others as they are.

    Raises:
      TypeError, ValueError: samples of another type, NaN, or an unknown rule.
    """
    samples = np.asarray(samples)
    if data_range is None:
        return samples
    low, high = data_range
    if samples.dtype != np.uint8 and (low, high) != IMAGES:
        samples = (2 * samples - (high + low)) / (high - low)
    return quantise(samples, rule)


def as_features(
    features: Measured | Callable[[np.ndarray], Any] | None, shape: Sequence[int], data_range: Range = IMAGES
) -> Measured:
    """Features from whatever says them.

    Args:
      features: features; a plain function [n, *shape] -> [n, width] of what `seen` gives; or None for the numbers
        themselves: pixels, of data with a range.
    """
    if features is None:
        return Pixels(tuple(shape)) if data_range else FromFunction(_flat, "values", int(np.prod(shape)), "none")
    if hasattr(features, "name"):
        return features  # type: ignore[return-value]
    return FromFunction(features, getattr(features, "__name__", "a function"))


def _flat(samples: np.ndarray) -> np.ndarray:
    return np.asarray(samples, np.float32).reshape(len(samples), -1)


def outputs_of(features: Measured, images: np.ndarray) -> dict[str, np.ndarray]:
    """The features of what `seen` gives, by name."""
    found: Any = features(images)
    if isinstance(found, InceptionFeatures):
        named = {"features": found.pool3, "spatial": found.spatial, "logits": found.logits}
        return jax.device_get(named)
    return {"features": np.asarray(found)}


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
    if part.inception and part.inception.count:
        found["inception_score"] = float(part.inception.score().mean)
    return found


def _extrapolated(kept: np.ndarray, real: Moments, to: int) -> float:
    """By TRACT's rule, from all kept rows and the median of five halves."""
    state = np.random.RandomState(2020)
    halves = [state.permutation(len(kept))[: len(kept) // 2] for _ in range(5)]
    whole = frechet_distance(moments(kept), real)
    return float(extrapolated(whole, [frechet_distance(moments(kept[h]), real) for h in halves], len(kept), to))


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
    return Part(found.moments.count or 0, sums, np.zeros((0, 0)))


def summary(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean, least and standard deviation over repetitions."""
    whole = {}
    for name in found[0]:
        values = np.array([scores[name] for scores in found])
        whole[name] = float(values.mean())
        if len(values) > 1:
            whole |= {f"{name} min": float(values.min()), f"{name} std": float(values.std(ddof=1))}
    return whole


def in_words(row: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a row of results as text: each with standard deviation and least value, if there are several."""
    found = {}
    for name in row["repetitions"][0]:
        spread = f" ± {row[f'{name} std']:.2g} (min {row[f'{name} min']:.4g})" if f"{name} std" in row else ""
        found[name] = f"{row[name]:.4g}{spread}"
    return found
