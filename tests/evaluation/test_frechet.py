"""Fréchet distance against closed forms, which always run, and against recorded numbers, where they are at hand.

The recorded numbers are those of 40-digit arithmetic and of published programs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from conventions import frechet_bias, population
from metric_data import MANY, golden, normal, rotation, singular_on_purpose

from diffusion_distill.data import digits
from diffusion_distill.evaluation import (
    Moments,
    extrapolated,
    frechet_distance,
    frechet_terms,
    merge,
    moments,
    pixel_features,
)
from diffusion_distill.evaluation import frechet as frechet_module

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


# Fréchet distance: its other forms


@pytest.mark.parametrize("narrow", [False, True])
def test_the_forms_for_wide_covariances_agree_with_the_exact_one(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = rotation(20, 30)
    spectrum = np.logspace(0, -5, 30)
    a = Moments(MANY, normal(21, 30), turn * spectrum @ turn.T)
    b = Moments(MANY, normal(22, 30), np.cov(normal(23, 200, 30), rowvar=False))
    flat = Moments(MANY, b.mean, b.cov * (np.arange(30) > 3) * (np.arange(30) > 3)[:, None])
    exact = [frechet_distance(a, b), frechet_distance(a, flat), frechet_distance(flat, flat)]
    monkeypatch.setattr(frechet_module, "WIDE", 4 if narrow else 29)
    a, b, flat = (Moments(m.count, m.mean, m.cov) for m in (a, b, flat))  # without the factors they have kept
    fast = [frechet_distance(a, b), frechet_distance(a, flat), frechet_distance(flat, flat)]
    np.testing.assert_allclose(fast, exact, rtol=1e-9, atol=1e-9)
    # The form was the fast one where the covariance allows it, and not where it does not.
    assert np.array_equal(b.factor, np.linalg.cholesky(b.cov))
    assert flat.factor.shape == (30, 26)


SPECTRA = {
    "regular": (np.linspace(0.5, 2, 30), np.linspace(3, 1, 30)),
    "one singular": (np.linspace(-0.5, 2, 30).clip(0), np.ones(30)),
    "both singular": (np.linspace(-0.5, 2, 30).clip(0), np.linspace(2, -0.5, 30).clip(0)),
    "nearly singular": (np.logspace(0, -11, 30), np.logspace(0, -11, 30)[::-1] + np.logspace(0, -11, 30)),
    "both nearly singular": (np.logspace(0, -9, 30), np.logspace(1, -9, 30)),
}


@pytest.mark.parametrize("wide", [4, 512])
@pytest.mark.parametrize("case", SPECTRA)
def test_every_form_finds_the_distance_of_shared_eigenvectors(
    case: str, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frechet_module, "WIDE", wide)
    turn, (one, other) = rotation(29, 30), SPECTRA[case]
    a, b = (Moments(MANY, np.zeros(30), turn * values @ turn.T) for values in (one, other))
    expected = np.square(np.sqrt(one) - np.sqrt(other)).sum()
    # What the products turn * values @ turn.T round, 1e-16 of 1, enters as its root where a variance is as small.
    tolerance = {"regular": 1e-12, "one singular": 1e-10}.get(case, 1e-9)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=tolerance)


def test_a_cholesky_factor_is_not_taken_of_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    # With one variance of 0 it goes through about every second time; the last pivot is 1e-16, hence an entry 1e-8.
    monkeypatch.setattr(frechet_module, "WIDE", 4)
    spectrum = np.arange(10.0)
    other = Moments(MANY, np.zeros(10), np.eye(10))
    for seed in range(12):
        turn = rotation(seed, 10)
        found = frechet_distance(Moments(MANY, np.zeros(10), turn * spectrum @ turn.T), other)
        assert found == pytest.approx(np.square(np.sqrt(spectrum) - 1).sum(), rel=1e-12)


def test_few_images_keep_their_own_factor_and_large_sets_do_not() -> None:
    few, many = moments(normal(24, 5, 9)), moments(normal(25, 50, 9))
    assert few.factor.shape == (9, 5) and many.centred is None
    np.testing.assert_allclose(few.factor @ few.factor.T, few.cov, atol=1e-14)
    assert merge(few, many).centred is None


def test_terms_and_divisor() -> None:
    features, other = normal(26, 40, 3), normal(27, 30, 3) + 2
    a, b = moments(features), moments(other)
    terms = frechet_terms(a, b)
    assert sum(terms) == frechet_distance(a, b)
    assert terms.mean == pytest.approx(((features.mean(0) - other.mean(0)) ** 2).sum(), rel=1e-12)
    np.testing.assert_allclose(population(a).cov, np.cov(features, rowvar=False, ddof=0), rtol=1e-12)
    few = moments(features[:2])
    np.testing.assert_allclose(population(few).factor @ population(few).factor.T, population(few).cov, atol=1e-14)


def test_a_count_that_nobody_knows() -> None:
    known, unknown = moments(normal(28, 40, 3)), Moments(None, np.zeros(3), np.eye(3))
    assert frechet_distance(known, unknown) == frechet_distance(known, Moments(MANY, np.zeros(3), np.eye(3)))
    with pytest.raises(ValueError, match="not known"):
        merge(known, unknown)
    with pytest.warns(UserWarning, match="Rank 2 for 3 features"):
        frechet_distance(known, Moments(None, np.zeros(3), np.diag([1.0, 1.0, 0.0])))


def test_bias_of_unit_variances_and_of_drawn_sets() -> None:
    # With equal eigenvalues the sum is (1/n + 1/m)(d + d (d + 1) / 4).
    assert frechet_bias(np.ones(8), 1000, 500) == pytest.approx(3e-3 * (8 + 18), rel=1e-12)
    variances = np.array([1.0, 0.5, 0.1])
    rng = np.random.default_rng(0)
    truth = Moments(MANY, np.zeros(3), np.diag(variances))
    drawn = [frechet_distance(truth, moments(rng.standard_normal((400, 3)) * variances**0.5)) for _ in range(300)]
    assert np.mean(drawn) == pytest.approx(frechet_bias(variances, 400), abs=4 * np.std(drawn) / 300**0.5)


def test_extrapolation_finds_the_constant_of_a_plus_b_over_n() -> None:
    def distance(n: float) -> float:
        return 3.0 + 700 / n

    halves = [distance(2048)] * 3 + [99.0, 0.0]  # the median ignores outliers
    assert extrapolated(distance(4096), halves, 4096, to=np.inf) == pytest.approx(3, rel=1e-12)
    assert extrapolated(distance(4096), halves, 4096) == pytest.approx(distance(50_000), rel=1e-12)
    with pytest.raises(ValueError, match="0 distances of halves"):
        extrapolated(1.0, [], 4096)


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
    train, heldout = (source.gather(np.arange(len(source)))["x"] for source in (digits("train"), digits("heldout")))
    found = frechet_distance(moments(pixel_features(train)), moments(pixel_features(heldout)))
    assert found == pytest.approx(expected, rel=1e-6)
