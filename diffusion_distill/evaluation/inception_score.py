"""Inception Score: how sure a classifier is of each image, and how different its answers are.

    IS = exp( mean_i KL(p_i || p) ),      p = mean_i p_i

p_i: probabilities of image i; natural logarithm (Salimans et al., arXiv:1606.03498, Sec. 4). Between 1 and the number
of classes. It is computed on parts of the images and averaged; smaller parts give lower scores, and the published
programs cut differently, so the parts belong beside the number:

    chunk=5000     consecutive chunks, the last one shorter; the mean            OpenAI's evaluator
    splits=10      consecutive parts with borders i n // 10; mean and std        Salimans et al., NVIDIA, torch-fidelity
    neither        all images at once                                           TF-GAN, score_sde

torch-fidelity shuffles before by `numpy.random.RandomState(2020).permutation(n)`, which is the caller's to do. Logits
are those of all outputs of the network; OpenAI and NVIDIA leave out the bias of the last layer.

Everything is float64, from logarithms of probabilities that are never rounded to 0 first: programs that take the
logarithm of a probability print NaN as soon as one underflows.

Each part needs sum_i p_i and sum_i p_i·log p_i only. `ScoreSums` adds them up as logits arrive, image by image, so that
it holds as many numbers per part as there are classes, and the score has the same bits however the batches are cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.base.errors import positive_int
from diffusion_distill.evaluation.pixels import as_features, check_same_width

# Rows whose probabilities are held at a time, 16 MiB at Inception's 1008 classes.
ROWS = 2048


class InceptionScore(NamedTuple):
    """Mean and standard deviation (divisor: number of parts) of the scores of the parts, and these scores."""

    mean: float
    std: float
    scores: NDArray[np.float64]


def inception_score(logits: ArrayLike, *, chunk: int | None = None, splits: int | None = None) -> InceptionScore:
    """Inception Score of logits, in the order of the images.

    Args:
      logits: [n, classes], before the softmax.
      chunk: images per part, or
      splits: number of parts. At most one of the two.

    Raises:
      ValueError: NaN or infinite logits, another rank, both or non-positive arguments, more splits than images.
    """
    logits = as_features("Logits", logits)
    sums = ScoreSums(borders(len(logits), chunk=chunk, splits=splits))
    sums.add(logits)
    return sums.score()


def borders(count: int, *, chunk: int | None = None, splits: int | None = None) -> list[int]:
    """The borders [parts + 1] of the parts of `count` images; arguments and errors as `inception_score`."""
    if chunk is not None and splits is not None:
        raise ValueError(f"chunk is {chunk} and splits {splits}; give one of them, or neither for one score of all.")
    if chunk is not None:
        return [*range(0, count, positive_int("chunk", chunk)), count]
    parts = positive_int("splits", 1 if splits is None else splits)
    if parts > count:
        raise ValueError(f"There are {count} images for {parts} splits. Use more images or fewer splits.")
    return [part * count // parts for part in range(parts + 1)]


class ScoreSums:
    """The Inception Score of logits that arrive in batches.

    Args:
      borders: of the parts, as `borders` gives them; the last is the number of images that will be added.

    Attributes:
      count: images added so far.
    """

    def __init__(self, borders: ArrayLike) -> None:
        self.borders, self.count = np.asarray(borders, np.int64), 0
        self._sums = np.zeros((len(self.borders) - 1, 0))  # of each part: p, and p·log p summed over classes

    def add(self, logits: ArrayLike) -> None:
        """Adds a batch [n, classes].

        Raises:
          ValueError: NaN or infinite logits, another rank, another number of classes than before, or more images than
            there are in the parts; nothing is added then.
        """
        logits = as_features("Logits", logits)
        if not self.count:
            self._sums = np.zeros((len(self._sums), logits.shape[1] + 1))
        check_same_width(self._sums.shape[1] - 1, logits.shape[1])
        if self.count + len(logits) > self.borders[-1]:
            raise ValueError(f"{self.count + len(logits)} images were added; the parts are of {self.borders[-1]}.")
        for start in range(0, len(logits), ROWS):
            terms = _terms(logits[start : start + ROWS].astype(np.float64))
            parts = np.searchsorted(self.borders, self.count + np.arange(len(terms)), side="right") - 1
            for part, term in zip(parts, terms, strict=True):  # one by one: their order, and so the bits, never change
                self._sums[part] += term
            self.count += len(terms)

    def score(self) -> InceptionScore:
        """The score of all parts.

        Raises:
          ValueError: images are missing.
        """
        if self.count < self.borders[-1]:
            raise ValueError(f"{self.count} images were added; the parts are of {self.borders[-1]}. Add the others.")
        means = self._sums / np.diff(self.borders)[:, None]
        scores = np.array([np.exp(mean[-1] - _negentropy(mean[:-1])) for mean in means])
        return InceptionScore(float(scores.mean()), float(scores.std()), scores)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state, for `numpy.savez`."""
        return {"count": np.asarray(self.count), "borders": self.borders, "sums": self._sums}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ScoreSums:
        """The object whose state `to_arrays` saved."""
        found = cls(arrays["borders"])
        found.count, found._sums = int(arrays["count"]), arrays["sums"].copy()
        return found


def _terms(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row: the probabilities, and behind them the sum of p·log p: [n, classes + 1]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_prob = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    prob = np.exp(log_prob)
    return np.column_stack([prob, (prob * log_prob).sum(axis=1)])


def _negentropy(prob: NDArray[np.float64]) -> float:
    """The sum of p·log p of one distribution, in which 0·log 0 is 0."""
    some = prob[prob > 0]
    return float((some * np.log(some)).sum())
