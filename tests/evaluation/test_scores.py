"""Inception Score and kernel distance of cases that can be counted by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from conventions import consecutive_blocks
from metric_data import normal

from diffusion_distill.evaluation import (
    ScoreSums,
    inception_score,
    kid,
    random_subsets,
)
from diffusion_distill.evaluation.inception_score import borders

# Inception Score: cases that can be counted by hand


def test_scores_of_sure_and_of_unsure_answers() -> None:
    sure = 2000.0 * np.eye(7)[np.arange(21) % 7]  # probabilities underflow
    assert inception_score(sure) == (pytest.approx(7, rel=1e-14), 0.0, pytest.approx([7]))
    assert inception_score(np.full((9, 5), 3.0)).mean == pytest.approx(1, rel=1e-14)
    # Two images, p = (1/2, 1/2) and (1, 0): their mean is (3/4, 1/4).
    logits = np.array([[0.0, 0.0], [0.0, -1e6]])
    mean = np.array([0.75, 0.25])
    by_hand = np.exp(((0.5 * np.log(0.5 / mean)).sum() + np.log(1 / 0.75)) / 2)
    assert inception_score(logits).mean == pytest.approx(by_hand, rel=1e-14)


def test_parts_of_the_images() -> None:
    logits = normal(40, 23, 4)
    found = inception_score(logits, chunk=10)
    parts = [inception_score(part).mean for part in (logits[:10], logits[10:20], logits[20:])]
    np.testing.assert_allclose(found.scores, parts, rtol=1e-14)
    assert (found.mean, found.std) == (pytest.approx(np.mean(parts)), pytest.approx(np.std(parts)))
    borders = [0, 5, 11, 17, 23]  # i 23 // 4
    expected = [inception_score(logits[a:b]).mean for a, b in pairwise(borders)]
    np.testing.assert_allclose(inception_score(logits, splits=4).scores, expected, rtol=1e-14)
    shifted = logits + normal(41, 23, 1) * 100  # a constant per image changes no probability
    assert inception_score(shifted).mean == pytest.approx(inception_score(logits).mean, rel=1e-12)


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize("parts", [{"splits": 4}, {"chunk": 15}, {}])
def test_batches_do_not_change_a_bit_of_the_score(
    size: int, parts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = normal(42, 50, 6)
    whole, sums = inception_score(logits, **parts), ScoreSums(borders(50, **parts))
    monkeypatch.setattr(sys.modules[inception_score.__module__], "ROWS", 5)
    for begin in range(0, 50, size):
        sums = ScoreSums.from_arrays(sums.to_arrays())
        sums.add(logits[begin : begin + size])
    found = sums.score()
    assert (found.mean, found.std, found.scores.tolist()) == (whole.mean, whole.std, whole.scores.tolist())
    with pytest.raises(ValueError, match="51 images were added; the parts are of 50"):
        sums.add(logits[:1])


# Kernel distance


def kernel_distance_by_loops(x: np.ndarray, y: np.ndarray, estimator: str) -> float:
    """MMD^2 term by term, as its definition says."""

    def mean(a: np.ndarray, b: np.ndarray, without_diagonal: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (without_diagonal and i == j)]
        return float(np.mean([(a[i] @ b[j] / a.shape[1] + 1) ** 3 for i, j in pairs]))

    within, across = estimator != "biased", estimator == "u-statistic"
    return mean(x, x, within) + mean(y, y, within) - 2 * mean(x, y, across)


@pytest.mark.parametrize("block", [2**23, 20])
@pytest.mark.parametrize("estimator", ["unbiased", "biased", "u-statistic"])
def test_kernel_distance_by_loops(estimator: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[kid.__module__], "BLOCK", block)
    x, y = normal(50, 9, 4), normal(51, 9 if estimator == "u-statistic" else 7, 4) + 0.5
    found = kid(x, y, estimator=estimator)
    assert found.mean == pytest.approx(kernel_distance_by_loops(x, y, estimator), rel=1e-12)
    assert (found.std, len(found.values)) == (0, 1) and np.isnan(found.std_error)


def test_kernel_distance_over_subsets() -> None:
    x, y = normal(52, 40, 3), normal(53, 30, 3)
    subsets = random_subsets(40, 30, count=5, size=12)
    found = kid(x, y, subsets)
    each = [kid(x[rows], y[columns]).mean for rows, columns in subsets]
    np.testing.assert_allclose(found.values, each, rtol=1e-12)
    assert found.std_error == pytest.approx(np.std(each, ddof=1) / 5**0.5)
    assert kid(x, x, estimator="biased").mean == pytest.approx(0, abs=1e-13)
    assert kid(x, x).mean < 0  # the diagonal is left out within the sets only


@pytest.mark.parametrize(
    ("n", "m", "largest", "sizes"),
    [(10, 7, 4, [(3, 2), (3, 2), (4, 3)]), (5, 5, 1024, [(5, 5)]), (8, 8, 4, [(4, 4), (4, 4)])],
)
def test_consecutive_blocks_cover_every_row_once(n: int, m: int, largest: int, sizes: list[tuple[int, int]]) -> None:
    blocks = consecutive_blocks(n, m, largest)
    assert [(len(rows), len(columns)) for rows, columns in blocks] == sizes
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in blocks]), np.arange(n))
    np.testing.assert_array_equal(np.concatenate([columns for _, columns in blocks]), np.arange(m))


BAD_SCORES: dict[str, tuple[Callable[[], object], str]] = {
    "both parts": (lambda: inception_score(np.eye(3), chunk=1, splits=1), "give one of them"),
    "splits": (lambda: inception_score(np.eye(3), splits=4), "3 images for 4 splits"),
    "chunk": (lambda: inception_score(np.eye(3), chunk=0), "chunk must be"),
    "NaN logits": (lambda: inception_score([[0.0, np.nan]]), "1 of 1 rows of Logits"),
    "estimator": (lambda: kid(np.eye(3), np.eye(3), estimator="unbiassed"), "Did you mean 'unbiased'"),
    "one row": (lambda: kid(np.eye(3)[:1], np.eye(3)), "1 rows; the unbiased"),
    "unequal": (lambda: kid(np.eye(3)[:2], np.eye(3), estimator="u-statistic"), "2 and 3 rows"),
    "no subsets": (lambda: kid(np.eye(3), np.eye(3), []), "no subsets"),
    "NaN features": (lambda: kid(np.eye(3) * np.nan, np.eye(3)), "3 of 3 rows of Reference"),
    "subset size": (lambda: random_subsets(400, 320), "320 images, too few for subsets of 1000"),
    "blocks": (lambda: consecutive_blocks(9, 2, 3), "2 images for 3 blocks"),
}


@pytest.mark.parametrize(("act", "said"), BAD_SCORES.values(), ids=BAD_SCORES)
def test_scores_that_cannot_be_right_are_refused(act: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        act()
