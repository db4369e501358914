"""Distances against closed forms, which always run, and against recorded numbers, where they are at hand.

The recorded numbers are those of 40-digit arithmetic and of published programs; they lie in an optional
sibling folder `../shared/golden/eval`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conventions import consecutive_blocks, frechet_bias, population, write_reference, write_tract
from pca import principal_components

from diffusion_distill.data import digits
from diffusion_distill.evaluation import (
    Accumulator,
    Moments,
    extrapolated,
    frechet_distance,
    frechet_terms,
    inception_score,
    kid,
    memberships,
    merge,
    moments,
    pixel_features,
    precision_recall,
    random_subsets,
    read_reference,
)
from diffusion_distill.evaluation import frechet as frechet_module
from diffusion_distill.evaluation.precision_recall import squared_distances, squared_radii

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


# Moments in batches


def accumulated(batches: list[np.ndarray]) -> Accumulator:
    accumulator = Accumulator()
    for batch in batches:
        accumulator.add(batch)
    return accumulator


@pytest.mark.parametrize("sizes", [(1, 1, 48), (50,), (7,) * 7 + (1,)])
def test_accumulated_moments_are_those_of_the_whole(sizes: tuple[int, ...]) -> None:
    features = normal(1, 50, 3) + 1e6
    found = accumulated(np.split(features, np.cumsum(sizes)[:-1])).moments()
    assert found.count == 50
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.cov, np.cov(features, rowvar=False), rtol=1e-8)


def test_an_interrupted_accumulation_gives_the_same_bits(tmp_path: Path) -> None:
    batches = [normal(seed, 16, 5).astype(np.float32) for seed in range(6)]
    whole, stopped = accumulated(batches), accumulated(batches[:2])
    state = stopped.to_arrays()
    stopped.add(batches[5])  # what is saved does not follow
    np.savez(tmp_path / "state.npz", **state)  # type: ignore[arg-type]
    with np.load(tmp_path / "state.npz") as saved:
        resumed = Accumulator.from_arrays(saved)
    for batch in batches[2:]:
        resumed.add(batch)
    for name, array in whole.to_arrays().items():
        np.testing.assert_array_equal(resumed.to_arrays()[name], array)


@pytest.mark.parametrize("cut", [0, 1, 40, 50])
def test_merged_accumulators_have_seen_both(cut: int) -> None:
    features = normal(2, 50, 4) * [1, 2, 3, 4] - 7
    one, other = (accumulated([part] if len(part) else []) for part in (features[:cut], features[cut:]))
    one.merge(other)
    one.add(features[:5])
    expected = moments(np.concatenate([features, features[:5]]))
    assert one.count == 55
    np.testing.assert_allclose(one.moments().cov, expected.cov, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(one.moments().mean, expected.mean, rtol=1e-13)


def test_a_bad_batch_is_not_added() -> None:
    accumulator = accumulated([np.eye(3)])
    before = accumulator.to_arrays()
    for bad, said in ((np.full((2, 3), np.nan), "2 of 2 rows"), (np.eye(4), "3 features per image.* 4")):
        with pytest.raises(ValueError, match=said):
            accumulator.add(bad)
    for name, array in before.items():
        np.testing.assert_array_equal(accumulator.to_arrays()[name], array)


BAD_STATES: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"sum": None}, r"lacks \['sum'\]"),
    "shape": ({"outer": np.eye(2)}, "does not fit together"),
    "count": ({"count": np.asarray(0)}, "does not fit together"),
    "NaN": ({"sum": np.full(3, np.nan)}, "does not fit together"),
}


@pytest.mark.parametrize(("change", "said"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_damaged_state_is_refused(change: dict[str, Any], said: str) -> None:
    state = {**accumulated([np.eye(3)]).to_arrays(), **change}
    with pytest.raises(ValueError, match=said):
        Accumulator.from_arrays({name: array for name, array in state.items() if array is not None})


def test_nothing_added_gives_no_moments() -> None:
    with pytest.raises(ValueError, match="No features were added"):
        Accumulator().moments()


# Principal components


def test_principal_components_of_known_directions() -> None:
    turn, variances = rotation(30, 6), np.array([9.0, 4, 1, 0.5, 0.1, 1e-4])
    reference = Moments(MANY, normal(31, 6), turn * variances @ turn.T)
    pca = principal_components(reference, 3)
    np.testing.assert_allclose(pca.variances, [9, 4, 1], rtol=1e-12)
    assert pca.explained == pytest.approx(14 / variances.sum(), rel=1e-12)
    moved = Moments(MANY, reference.mean + 2 * turn[:, 1] + 5 * turn[:, 4], reference.cov)  # the second is not seen
    assert frechet_distance(pca.moments(reference), pca.moments(moved)) == pytest.approx(4, rel=1e-10)
    white = principal_components(reference).whiten()
    assert len(white.variances) == 5
    np.testing.assert_allclose(white.moments(reference).cov, np.eye(5), atol=1e-12)
    assert frechet_distance(white.moments(reference), white.moments(moved)) == pytest.approx(4 / 4 + 25 / 0.1, rel=1e-9)


def test_components_of_features_have_the_components_moments() -> None:
    reference, features = moments(normal(32, 60, 5)), normal(33, 40, 5)
    for pca in (principal_components(reference, 3), principal_components(reference, 3).whiten()):
        found, expected = pca.moments(moments(features)), moments(pca.features(features))
        np.testing.assert_allclose(found.cov, expected.cov, atol=1e-12)
        np.testing.assert_allclose(found.mean, expected.mean, atol=1e-12)
    with pytest.raises(ValueError, match="no variance"):
        principal_components(Moments(5, np.zeros(2), np.zeros((2, 2))))
    with pytest.raises(ValueError, match="5 features per image, the samples 4"):
        principal_components(reference).features(np.eye(4))


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


def test_blocks_of_rows_do_not_change_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = normal(42, 50, 6)
    whole = inception_score(logits).mean
    monkeypatch.setattr(sys.modules[inception_score.__module__], "ROWS", 7)
    assert inception_score(logits).mean == pytest.approx(whole, rel=1e-14)


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


# Reference statistics on disk


@pytest.fixture
def stated() -> Moments:
    return moments(normal(60, 30, 4))


def test_published_layouts_are_told_apart_by_their_arrays(tmp_path: Path, stated: Moments) -> None:
    mean, cov, images = stated.mean, stated.cov, np.zeros((2, 4, 4, 3), np.uint8)
    features = normal(61, 20, 4).astype(np.float32)
    files: dict[str, tuple[dict[str, np.ndarray], str]] = {
        "edm": ({"mu": mean, "sigma": cov}, "moments"),
        "openai": ({"mu": mean, "sigma": cov, "mu_s": mean[:2], "sigma_s": cov[:2, :2], "arr_0": images}, "openai"),
        "in training": ({"mu": mean, "sigma": cov, "mu_clip": mean, "sigma_clip": cov}, "moments"),
        "batch": ({"arr_0": images, "arr_1": np.arange(2)}, "images"),
        "score_sde": ({"pool_3": features}, "features"),
    }
    for name, (arrays, layout) in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        found = read_reference(tmp_path / f"{name}.npz", count=17)
        assert found.layout == layout
        assert (found.spatial is not None) == ("mu_s" in arrays)
        assert found.sha256 == hashlib.sha256((tmp_path / f"{name}.npz").read_bytes()).hexdigest()
        if "mu" in arrays:
            assert found.moments is not None and found.moments.count == 17
            np.testing.assert_array_equal(found.moments.cov, cov)
    batch, sde = read_reference(tmp_path / "batch.npz"), read_reference(tmp_path / "score_sde.npz")
    assert batch.moments is None and batch.images().shape == images.shape
    np.testing.assert_array_equal(batch.labels(), [0, 1])
    np.testing.assert_array_equal(sde.features(), features)
    assert sde.moments is not None and sde.moments.count == 20
    np.testing.assert_allclose(sde.moments.cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)
    with pytest.raises(ValueError, match=r"holds no images.*`arr_0`"):
        sde.images()


def test_what_is_written_is_read_back_and_by_the_other_programs_keys(tmp_path: Path, stated: Moments) -> None:
    spatial, images = moments(normal(62, 30, 3)), np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    facts = {
        "network": "inception-2015-12-05",
        "resize": "legacy",
        "dataset": "digits",
        "quantisation": "round_half_up",
    }
    others = {"mu_s": spatial.mean, "sigma_s": spatial.cov, "arr_0": images, "arr_1": [3, 4], "pool_3": np.eye(4)}
    path = write_reference(tmp_path / "ref.npz", stated, facts, **others)
    found = read_reference(path)
    assert found.facts == {"images": 30, **facts} and found.layout == "openai"
    for got, expected in ((found.moments, stated), (found.spatial, spatial)):
        assert got is not None and got.count == 30
        np.testing.assert_array_equal(got.mean, expected.mean)
        np.testing.assert_array_equal(got.cov, expected.cov)
    np.testing.assert_array_equal(found.images(), images)
    np.testing.assert_array_equal(found.labels(), [3, 4])


def test_two_files_of_tract(tmp_path: Path, stated: Moments) -> None:
    mean, cov = write_tract(tmp_path / "cifar10_activation", stated, {"resize": "half_pixel"})
    assert (mean.name, cov.name) == ("cifar10_activation_mean.npy", "cifar10_activation_std.npy")
    for path in (mean, cov):
        found = read_reference(path)
        assert found.layout == "tract" and found.facts == {"images": 30, "resize": "half_pixel"}
        assert found.moments is not None and found.moments.count == 30
        np.testing.assert_array_equal(found.moments.cov, stated.cov)
    assert found.sha256 == hashlib.sha256(mean.read_bytes() + cov.read_bytes()).hexdigest()
    cov.unlink()
    with pytest.raises(FileNotFoundError, match="activation_std"):
        read_reference(mean)


def test_facts_beside_a_published_file(tmp_path: Path, stated: Moments) -> None:
    np.savez(tmp_path / "edm.npz", mu=stated.mean, sigma=stated.cov)
    assert read_reference(tmp_path / "edm.npz").facts == {}
    (tmp_path / "edm.npz.facts.json").write_text('{"images": 50000, "resize": "legacy"}')
    found = read_reference(tmp_path / "edm.npz")
    assert found.moments is not None and found.moments.count == 50_000 and found.facts["resize"] == "legacy"


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown arrays": ({"mean": np.zeros(2)}, r"\['mean'\], which is no known layout"),
    "shapes": ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"\(3,\) and cov \(2, 2\)"),
    "asymmetric": ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0, 1]])}, "not symmetric"),
    "not finite": ({"mu": np.array([np.nan, 0]), "sigma": np.eye(2)}, "NaN or infinity"),
    "negative": ({"mu": np.zeros(2), "sigma": np.diag([1.0, -1])}, "negative variances"),
    "integers": ({"mu": np.zeros(2, int), "sigma": np.eye(2)}, "mu is int64; need floats"),
    "half of the spatial": ({"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2)}, "no sigma_s"),
    "features": ({"pool_3": np.full((3, 2), np.inf)}, "3 of 3 rows of pool_3"),
    "pickled": ({"mu": np.array([{}], object), "sigma": np.eye(1)}, "not an .npz file of plain arrays"),
    "meta": ({"mu": np.zeros(1), "sigma": np.eye(1), "meta": np.asarray('{"images": -1}')}, "`images` > 0"),
}


@pytest.mark.parametrize(("arrays", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_cannot_be_right_are_refused(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=said) as caught:
        read_reference(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value)


def test_no_file_and_a_damaged_one(tmp_path: Path, stated: Moments) -> None:
    with pytest.raises(FileNotFoundError, match="No file"):
        read_reference(tmp_path / "none.npz")
    whole = write_reference(tmp_path / "whole.npz", stated).read_bytes()
    for name, content in {"cut.npz": whole[:200], "text.npz": b"no array", "text_mean.npy": b"no array"}.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / "text_std.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"may be damaged|cut short"):
            read_reference(tmp_path / name)
    acts: list[tuple[Callable[[], object], str]] = [
        (lambda: read_reference(tmp_path / "a.npy"), "not called NAME_mean.npy"),
    ]
    for act, said in acts:
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
    train, heldout = (source.gather(np.arange(len(source)))["x"] for source in (digits("train"), digits("heldout")))
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
