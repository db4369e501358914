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
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.base.errors import positive_int
from diffusion_distill.evaluation.pixels import as_features

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
    count = len(logits)
    if chunk is not None and splits is not None:
        raise ValueError(f"chunk is {chunk} and splits {splits}; give one of them, or neither for one score of all.")
    if chunk is not None:
        borders = [*range(0, count, positive_int("chunk", chunk)), count]
    else:
        parts = positive_int("splits", 1 if splits is None else splits)
        if parts > count:
            raise ValueError(f"There are {count} images for {parts} splits. Use more images or fewer splits.")
        borders = [part * count // parts for part in range(parts + 1)]
    scores = np.array([_score(logits[a:b]) for a, b in pairwise(borders)])
    return InceptionScore(float(scores.mean()), float(scores.std()), scores)


def _score(logits: NDArray[np.floating]) -> float:
    """The score of one part: exp(entropy of the mean - mean of the entropies)."""
    total, negentropy = np.zeros(logits.shape[1]), 0.0
    for start in range(0, len(logits), ROWS):
        log_prob = _log_softmax(logits[start : start + ROWS].astype(np.float64))
        prob = np.exp(log_prob)
        total += prob.sum(axis=0)
        negentropy += float((prob * log_prob).sum())
    mean = total[total > 0] / len(logits)
    return float(np.exp(negentropy / len(logits) - (mean * np.log(mean)).sum()))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of the probabilities, row by row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
