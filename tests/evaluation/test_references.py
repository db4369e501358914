"""Files of reference statistics: layouts are told apart, and what cannot be right is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conventions import write_reference, write_tract
from metric_data import normal

from diffusion_distill.evaluation import (
    Moments,
    moments,
    read_reference,
)

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
