"""Precision and recall of cases that can be counted by hand, and against recorded numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
from metric_data import golden, normal

from diffusion_distill.evaluation import (
    memberships,
    precision_recall,
)
from diffusion_distill.evaluation.precision_recall import squared_distances, squared_radii

# Precision and recall: cases that can be counted by hand


def test_precision_and_recall_of_points_on_a_line() -> None:
    reference = np.array([[0.0], [1.0], [2.0], [10.0]])  # radii at k = 1: 1, 1, 1, 8
    samples = np.array([[-1.0], [18.5], [19.5]])  # radii at k = 1: 19.5, 1, 1
    sample_is_in, reference_is_in = memberships(reference, samples, k=1)
    np.testing.assert_array_equal(sample_is_in, [True, False, False])  # -1 is at distance 1 of 0: on the border is in
    np.testing.assert_array_equal(reference_is_in, [True, True, True, True])
    assert precision_recall(reference, samples, k=1) == (pytest.approx(1 / 3), 1.0)


def test_identical_and_disjoint_sets() -> None:
    points = normal(0, 60, 5)
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points + 100) == (0.0, 0.0)


def test_equal_points_are_at_distance_zero_whatever_the_offset() -> None:
    # Every point four times: all radii are 0 and only equal points are in, if no digit is lost.
    points = np.repeat(normal(1, 15, 7) * 0.1 + 1e3, 4, axis=0)
    assert precision_recall(points, points) == (1.0, 1.0)
    moved = points.copy()
    moved[:8] += 1e-9
    assert precision_recall(points, moved) == (pytest.approx(52 / 60), pytest.approx(52 / 60))


def test_distances_are_those_by_subtraction() -> None:
    a, b = normal(2, 30, 6) * 1e-3 + 50, normal(3, 20, 6) * 1e-3 + 50
    expected = ((a[:, None] - b) ** 2).sum(-1)
    np.testing.assert_allclose(squared_distances(a, b), expected, rtol=1e-8)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, samples = normal(4, 70, 3), normal(5, 50, 3) * 0.7
    whole = memberships(reference, samples)
    monkeypatch.setattr(sys.modules[memberships.__module__], "BLOCK", 64)
    for blocked, expected in zip(memberships(reference, samples), whole, strict=True):
        assert 0 < expected.sum() < len(expected)
        np.testing.assert_array_equal(blocked, expected)


BAD_SETS: dict[str, tuple[Callable[[], object], str]] = {
    "too few": (lambda: precision_recall(np.eye(3), np.eye(3), k=3), "3 points, too few for neighbour 3"),
    "k": (lambda: precision_recall(np.eye(3), np.eye(3), k=0), "k is 0"),
    "widths": (
        lambda: precision_recall(np.zeros((9, 2)), np.zeros((9, 3))),
        "2 features per image, the samples 3",
    ),
    "NaN": (lambda: precision_recall(np.eye(9), np.eye(9) * np.nan), "9 of 9 rows of Sample features"),
}


@pytest.mark.parametrize(("act", "said"), BAD_SETS.values(), ids=BAD_SETS)
def test_sets_that_cannot_be_right_are_refused(act: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        act()


MANIFOLDS: dict[str, Callable[[dict], tuple[np.ndarray, np.ndarray]]] = {
    "main": lambda f: (f["a64"], f["b64"]),
    "swapped": lambda f: (f["b64"], f["a64"]),
    "identical": lambda f: (f["a64"][:100], f["a64"][:100]),
    "disjoint": lambda f: (f["a64"][:100], f["b64"][:80] + 50),
    "duplicated_ref": lambda f: (np.tile(f["a64"][:60], (4, 1)), f["b64"][:80]),
    "dim2048": lambda f: (f["a2048"], f["b2048"]),
}


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("case", MANIFOLDS)
def test_recorded_precision_and_recall(case: str, k: int) -> None:
    reference, samples = MANIFOLDS[case](golden("features.npz"))
    expected = golden("metrics.json")["precision_recall"][case][f"k{k}"]
    found = precision_recall(reference, samples, k)
    assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-12)


def test_recorded_memberships_and_radii() -> None:
    features, expected = golden("features.npz"), golden("pr_arrays.npz")
    reference, samples = features["a64"], features["b64"]
    sample_is_in, reference_is_in = memberships(reference, samples, k=3)
    np.testing.assert_array_equal(sample_is_in, expected["pr_main_k3_sample_in_ref"])
    np.testing.assert_array_equal(reference_is_in, expected["pr_main_k3_ref_in_sample"])
    for points, name in ((reference, "ref"), (samples, "sample")):
        found = squared_radii(points.astype(np.float64), 3)
        np.testing.assert_allclose(found, expected[f"pr_main_k3_radius2_{name}"], rtol=1e-10)
