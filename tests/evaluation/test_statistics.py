"""Moments in batches are those of the whole, whatever the batches; principal components have known moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metric_data import MANY, normal, rotation
from pca import principal_components

from diffusion_distill.evaluation import (
    Accumulator,
    Moments,
    frechet_distance,
    moments,
)

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
