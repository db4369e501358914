"""Distances against closed forms, which always run, and against recorded numbers, where they are at hand.

The recorded numbers are those of 40-digit arithmetic and of published programs; they lie in an optional
sibling folder `../shared/golden/eval`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_distill.data import digits
from diffusion_distill.metrics import (
    Moments,
    frechet_distance,
    memberships,
    merge,
    moments,
    pixel_features,
    precision_recall,
)
from diffusion_distill.metrics.precision_recall import squared_distances, squared_radii

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "eval"
MANY = 10**6  # a count for moments that are known, not estimated

singular_on_purpose = pytest.mark.filterwarnings("ignore:.*covariance is singular:UserWarning")


def golden(name: str) -> Any:
    """A recorded file: arrays of an .npz, or the tree of a .json."""
    path = GOLDEN / name
    if not path.is_file():
        pytest.skip(f"needs {name} in the optional sibling folder ../shared/golden/eval")
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def rotation(seed: int, width: int) -> np.ndarray:
    return np.linalg.qr(normal(seed, width, width))[0]


# Moments


def test_moments_are_numpys() -> None:
    features = normal(0, 50, 4)
    found = moments(features)
    assert (found.count, found.width) == (50, 4)
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(features, rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("sizes", [(1, 1, 48), (20, 30), (7,) * 7 + (1,)])
def test_moments_in_batches_are_those_of_the_whole(sizes: tuple[int, ...]) -> None:
    # An offset a million times the spread: sums of squares would keep four digits.
    features = normal(1, 50, 3) + 1e6
    first, *rest = np.split(features, np.cumsum(sizes)[:-1])
    found = moments(first)
    for batch in rest:
        found = found.update(batch)
    assert found.count == 50
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.cov, np.cov(features, rowvar=False), rtol=1e-8)


def test_merging_does_not_depend_on_the_order() -> None:
    a, b = moments(normal(2, 9, 3)), moments(normal(3, 30, 3) + 5)
    np.testing.assert_allclose(merge(a, b).cov, merge(b, a).cov, rtol=1e-12)


# Fréchet distance: closed forms


def test_distance_of_gaussians_that_share_eigenvectors() -> None:
    width = 6
    basis, shift = rotation(0, width), normal(1, width)
    s1, s2 = np.random.default_rng(2).uniform(0.1, 3, (2, width))
    a = Moments(MANY, np.zeros(width), basis * s1**2 @ basis.T)
    b = Moments(MANY, shift, basis * s2**2 @ basis.T)
    expected = (shift**2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_distance_in_one_dimension_and_of_disjoint_supports() -> None:
    def gaussian(mean: list[float], variances: list[float]) -> Moments:
        return Moments(MANY, np.array(mean), np.diag(variances))

    assert frechet_distance(gaussian([1.0], [4.0]), gaussian([-2.0], [0.25])) == pytest.approx(9 + 1.5**2, rel=1e-14)
    apart = gaussian([0, 0, 0], [2, 1, 0]), gaussian([0, 0, 0], [0, 0, 3.5])
    assert frechet_distance(*apart) == pytest.approx(6.5, rel=1e-14)  # the roots are orthogonal: only the traces stay
    point = gaussian([0, 3], [0, 0])
    assert frechet_distance(point, gaussian([4, 0], [0, 0])) == pytest.approx(25, rel=1e-14)


def test_distance_of_samples() -> None:
    features, turn = normal(4, 200, 5), rotation(5, 5)
    a = moments(features)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, moments(features + np.eye(5)[0] / 2)) == pytest.approx(0.25, rel=1e-10)
    other = normal(6, 150, 5) * [1, 2, 3, 1, 1]
    distance = frechet_distance(a, moments(other))
    assert frechet_distance(moments(10 * features), moments(10 * other)) == pytest.approx(100 * distance, rel=1e-12)
    assert frechet_distance(moments(features @ turn), moments(other @ turn)) == pytest.approx(distance, rel=1e-12)


def test_a_singular_covariance_keeps_all_digits() -> None:
    # Fewer images than features: compare with the form that works on the centred features themselves.
    a, b = normal(7, 10, 40), normal(8, 12, 40) + 0.3
    with pytest.warns(UserWarning, match="10 images for 40 features"):
        found = frechet_distance(moments(a), moments(b))
    centred_a, centred_b = (x - x.mean(0) for x in (a, b))
    cross = np.linalg.svd(centred_a @ centred_b.T, compute_uv=False).sum() / np.sqrt(9 * 11)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (centred_a**2).sum() / 9 + (centred_b**2).sum() / 11 - 2 * cross
    assert found == pytest.approx(expected, rel=1e-12)


BAD_MOMENTS: dict[str, tuple[Callable[[], object], str]] = {
    "NaN": (lambda: moments([[0.0, 1.0], [np.nan, 1.0], [np.inf, 0.0]]), "2 of 3 rows of Features hold NaN"),
    "no rows": (lambda: moments(np.zeros((0, 3))), r"shape \(0, 3\)"),
    "images": (lambda: moments(np.zeros((3, 8, 8, 1))), r"need \[n, width\]"),
    "one image": (
        lambda: frechet_distance(moments([[1.0]]), moments([[1.0], [2.0]])),
        "has 1 image.* at least 2",
    ),
    "widths": (lambda: frechet_distance(moments(np.eye(2)), moments(np.eye(3))), "2 features per image.* 3"),
    "widths of batches": (lambda: moments(np.eye(2)).update(np.eye(3)), "2 features per image.* 3"),
    "shape of cov": (lambda: Moments(5, np.zeros(3), np.eye(2)), r"\(3,\) and cov \(2, 2\)"),
    "count": (lambda: Moments(0, np.zeros(1), np.eye(1)), "count is 0"),
    "NaN in cov": (lambda: Moments(5, np.zeros(1), np.full((1, 1), np.nan)), "holds NaN"),
    "asymmetric": (lambda: Moments(5, np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]])), "not symmetric"),
}


@pytest.mark.parametrize(("act", "said"), BAD_MOMENTS.values(), ids=BAD_MOMENTS)
def test_moments_that_cannot_be_right_are_refused(act: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        act()


# Pixels as features


def test_pixels_are_flattened_in_order_and_clipped() -> None:
    images = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3) / 24
    np.testing.assert_array_equal(pixel_features(images).ravel(), images.ravel())
    assert pixel_features(images).shape == (2, 12)
    np.testing.assert_array_equal(pixel_features(images * 200 - 100)[:, [0, -1]], [[-1, -1], [0, 1]])
    with pytest.raises(TypeError, match="uint8"):
        pixel_features(images.astype(np.uint8))
    with pytest.raises(ValueError, match=r"\(2, 12\)"):
        pixel_features(images.reshape(2, 12))


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


# Recorded numbers


def without_columns(features: np.ndarray) -> np.ndarray:
    return np.where(np.arange(features.shape[1]) < 5, 0, features)


def shifted(features: np.ndarray) -> np.ndarray:
    return features + np.float64(0.5) * (np.arange(features.shape[1]) == 0)


def in_their_span(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in coordinates of an orthonormal basis of all rows: distances stay, 2048 features become 112."""
    basis = np.linalg.qr(np.concatenate([a, b]).T)[0]
    return a @ basis, b @ basis


#: name -> (what to compare of the recorded features, relative tolerance)
FRECHET: dict[str, tuple[Callable[[dict], tuple[np.ndarray, np.ndarray]], float]] = {
    "full_rank": (lambda f: (f["a64"], f["b64"]), 1e-9),
    "swapped": (lambda f: (f["b64"], f["a64"]), 1e-9),
    "n_less_than_d": (lambda f: (f["a64"][:20], f["b64"][:40]), 1e-9),
    "one_side_singular": (lambda f: (f["a64"][:20], f["b64"]), 1e-9),
    "dead_columns": (lambda f: (without_columns(f["a64"]), without_columns(f["b64"])), 1e-9),
    "one_dim": (lambda f: (f["a64"][:, :1], f["b64"][:, :1]), 1e-9),
    "mean_shift_only": (lambda f: (f["a64"], shifted(f["a64"])), 1e-9),
    "scaled_1e3": (lambda f: (1e3 * f["a64"], 1e3 * f["b64"]), 1e-9),
    "scaled_1em4": (lambda f: (1e-4 * f["a64"], 1e-4 * f["b64"]), 1e-6),
    "two_samples": (lambda f: (f["a64"][:2], f["b64"]), 1e-9),
    "dim2048_n_less_than_d": (lambda f: in_their_span(f["a2048"], f["b2048"]), 1e-9),
}


@singular_on_purpose
@pytest.mark.parametrize("case", FRECHET)
def test_recorded_frechet(case: str) -> None:
    features = {name: array.astype(np.float64) for name, array in golden("features.npz").items()}
    select, tolerance = FRECHET[case]
    a, b = select(features)
    expected = golden("metrics.json")["frechet"][case]["fd"]
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=tolerance, abs=0)


def test_recorded_frechet_of_identical_sets() -> None:
    a = moments(golden("features.npz")["a64"])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_every_recorded_frechet_case_is_compared() -> None:
    refused = {"one_sample", "nan_feature", "inf_feature"}  # the closed forms above test that we refuse these
    assert golden("metrics.json")["frechet"].keys() == {*FRECHET, *refused, "identical"}


@pytest.mark.parametrize(
    "case",
    ["d1", "d4_diagonal", "d8_commuting", "d8_general", "d8_rank3_vs_rank5", "d4_orthogonal_supports",
     "d64_general", "d16_ill_conditioned"],
)  # fmt: skip
def test_recorded_frechet_of_known_moments(case: str) -> None:
    arrays, pairs = golden("analytic.npz"), golden("analytic.json")["pairs"]
    a, b = (Moments(MANY, arrays[f"{case}_mu{i}"], arrays[f"{case}_sigma{i}"]) for i in (1, 2))
    expected = pairs[case]["fd"]
    tolerance = {"d8_rank3_vs_rank5": 1e-6, "d16_ill_conditioned": 1e-8 * expected}.get(case, 1e-10 * expected)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=tolerance)


def test_recorded_distance_of_the_digits_splits() -> None:
    expected = golden("real_data.json")["digits"]["random_900_897_splits_seeds_100_to_104"]["pixel_fd"][0]
    train, heldout = (source.gather(np.arange(len(source)))["image"] for source in (digits("train"), digits("heldout")))
    found = frechet_distance(moments(pixel_features(train)), moments(pixel_features(heldout)))
    assert found == pytest.approx(expected, rel=1e-6)


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
