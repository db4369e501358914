"""Sources scale and check what they are given; batches are a pure function of seed and step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_distill.data import SOURCES, ArraySource, Batches, digits, from_arrays, npz

pytestmark = pytest.mark.fast
PACK = Path(__file__).parents[2] / "shared" / "data" / "mnist_t10k.npz"


def numbered(count: int, **labels: Any) -> ArraySource:
    """Images 1x2 that carry their index: -1 + index / 1000 at the left, 0 at the right."""
    images = np.zeros((count, 1, 2, 1), np.float32)
    images[:, 0, 0, 0] = np.arange(count) / 1000 - 1
    return from_arrays(images, **labels)


def indices_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.rint((batch["image"].min(axis=(1, 2, 3)) + 1) * 1000).astype(int)


# Sources


def test_bytes_become_minus_one_to_one() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    batch = from_arrays(images).gather(np.array([0, 51, 255]))
    assert batch.keys() == {"image"}
    assert batch["image"].dtype == np.float32 and batch["image"].shape == (3, 1, 1, 1)
    np.testing.assert_array_equal(batch["image"].ravel(), np.array([-1, -0.6, 1], np.float32))


def test_floats_and_labels_pass_unchanged() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (5, 2, 3, 3)).astype(np.float32)
    source = from_arrays(images, np.array([2, 0, 1, 1, 0]))
    batch = source.gather(np.array([4, 0]))
    np.testing.assert_array_equal(batch["image"], images[[4, 0]])
    np.testing.assert_array_equal(batch["label"], [0, 2])
    assert batch["label"].dtype == np.int32
    assert (len(source), source.image_shape, source.num_classes) == (5, (2, 3, 3), 3)


def test_digits_are_scikit_learns_and_the_splits_share_none() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    whole, train, heldout = digits("all"), digits("train"), digits("heldout")
    expected = images.reshape(-1, 8, 8, 1) / 8 - 1
    batch = whole.gather(np.arange(1797))
    np.testing.assert_array_equal(batch["image"], expected.astype(np.float32))
    np.testing.assert_array_equal(batch["label"], labels)
    order = np.random.Generator(np.random.PCG64(100)).permutation(1797)
    np.testing.assert_array_equal(train.images, whole.images[order[:900]])
    np.testing.assert_array_equal(heldout.images, whole.images[order[900:]])
    assert (len(train), len(heldout), train.image_shape, train.num_classes) == (900, 897, (8, 8, 1), 10)


def test_digits_name_the_extra_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install diffusion_distill\[demo\]"):
        digits()


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Did you mean 'heldout'"):
        digits("held_out")


GOOD = np.zeros((4, 2, 2, 1), np.float32)
BAD_ARRAYS = {
    "rank 3": ({"images": GOOD[..., 0]}, ValueError, r"\(4, 2, 2\).*\[\.\.\., None\]"),
    "rank 2": ({"images": GOOD[..., 0, 0]}, ValueError, r"need \[n, height, width, channels\]"),
    "empty set": ({"images": GOOD[:0]}, ValueError, "at least one image"),
    "dtype": ({"images": GOOD.astype(np.int64)}, TypeError, "dtype int64; allowed are uint8"),
    "NaN": (
        {"images": np.where(np.arange(4)[:, None, None, None] > 1, np.nan, GOOD)},
        ValueError,
        "2 of 4 images",
    ),
    "infinity": ({"images": GOOD + np.inf}, ValueError, r"inf; need \[-1, 1\]"),
    "0..255 as floats": ({"images": GOOD + 200}, ValueError, r"200 to 200.*astype\(np.uint8\)"),
    "standardised": ({"images": GOOD - 2.5}, ValueError, r"2 \* \(images - low\)"),
    "label too large": (
        {"images": GOOD, "labels": [0, 1, 2, 3], "num_classes": 3},
        ValueError,
        "0 to 3; need 0..2",
    ),
    "label negative": ({"images": GOOD, "labels": [0, -1, 2, 3]}, ValueError, "-1 to 3; need 0..3"),
    "label of 64 bits": ({"images": GOOD, "labels": [0, 0, 0, -(2**32)]}, ValueError, "-4294967296 to 0"),
    "labels too few": ({"images": GOOD, "labels": [0, 1]}, ValueError, "2 labels for 4 images"),
    "labels of floats": ({"images": GOOD, "labels": [0.0, 1.0, 1.0, 0.0]}, TypeError, "dtype float64"),
    "labels one-hot": ({"images": GOOD, "labels": np.eye(4, dtype=int)}, ValueError, "argmax"),
    "classes without labels": ({"images": GOOD, "num_classes": 10}, ValueError, "no labels"),
}


@pytest.mark.parametrize(("arguments", "error", "said"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_that_cannot_be_right_are_refused(arguments: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        from_arrays(**arguments)


def test_a_range_upside_down_is_refused() -> None:
    with pytest.raises(ValueError, match="low < high"):
        ArraySource(GOOD, value_range=(1.0, -1.0))


@pytest.mark.parametrize("channel_axis", [True, False])
def test_npz(tmp_path: Path, channel_axis: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1)).astype(np.uint8)
    stored = images if channel_axis else images[..., 0]
    np.savez(tmp_path / "set.npz", images=stored, labels=np.arange(6, dtype=np.uint8), other=np.ones(3))
    source = SOURCES["npz"](tmp_path / "set.npz", num_classes=10)
    np.testing.assert_array_equal(source.images, images)
    assert source.num_classes == 10 and source.gather(np.array([5]))["label"] == 5
    np.savez(tmp_path / "unlabelled.npz", images=images)
    assert npz(str(tmp_path / "unlabelled.npz")).num_classes == 0


def test_the_mnist_pack_is_read() -> None:
    if not PACK.is_file():
        pytest.skip("needs mnist_t10k.npz in the optional sibling folder ../shared/data")
    source = npz(PACK)
    assert (len(source), source.image_shape, source.num_classes) == (10_000, (28, 28, 1), 10)


def test_files_that_hold_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No file .*none\.npz"):
        npz(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds \['x'\], but no array `images`"):
        npz(tmp_path / "other.npz")
    np.save(tmp_path / "single.npy", GOOD)
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:-30])
    np.savez(tmp_path / "objects.npz", images=np.array([{}]))
    for name in ("single.npy", "text.npz", "empty.npz", "cut.npz", "objects.npz"):
        with pytest.raises(ValueError, match=r"not an \.npz file of plain arrays"):
            npz(tmp_path / name)


# Batches


def test_every_epoch_visits_every_image_once_in_an_order_of_its_own() -> None:
    batches = Batches(numbered(10), batch_size=4, seed=3)
    seen = np.concatenate([indices_of(batches.at(step)) for step in range(5)])  # two epochs, one batch across
    np.testing.assert_array_equal(np.sort(seen[:10]), np.arange(10))
    np.testing.assert_array_equal(np.sort(seen[10:]), np.arange(10))
    assert (seen[:10] != seen[10:]).any()
    orders = [np.random.Generator(np.random.PCG64([3, epoch])).permutation(10) for epoch in (0, 1)]
    np.testing.assert_array_equal(seen, np.concatenate(orders))


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    source = numbered(50, labels=np.arange(50))
    walked = Batches(source, batch_size=8, seed=1, flip=True)
    walk = [walked.at(step) for step in range(20)]
    resumed = Batches(source, batch_size=8, seed=1, flip=True).at(17)
    for name in ("image", "label"):
        np.testing.assert_array_equal(resumed[name], walk[17][name])
    other = Batches(source, batch_size=8, seed=2, flip=True).at(17)
    assert (other["label"] != resumed["label"]).any()


def test_images_and_labels_stay_together() -> None:
    batch = Batches(numbered(50, labels=np.arange(50)), batch_size=16, seed=0).at(5)
    np.testing.assert_array_equal(indices_of(batch), batch["label"])


def test_a_batch_may_exceed_the_source() -> None:
    indices = Batches(numbered(3), batch_size=20, seed=0).indices(0)
    np.testing.assert_array_equal(np.bincount(indices[:18]), [6, 6, 6])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(count: int) -> None:
    source = numbered(10)
    whole = Batches(source, batch_size=8, seed=0, flip=True)
    shares = [Batches(source, 8, 0, flip=True, process_index=i, process_count=count) for i in range(count)]
    for step in (0, 1, 7):
        together = np.concatenate([share.at(step)["image"] for share in shares])
        np.testing.assert_array_equal(together, whole.at(step)["image"])


def test_flips_mirror_half_of_the_images_left_to_right() -> None:
    source = numbered(1000)
    plain, flipped = (Batches(source, 1000, seed=0, flip=flip).at(0)["image"] for flip in (False, True))
    mirrored = (flipped == plain[:, :, ::-1]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(flipped[~mirrored], plain[~mirrored])
    assert 420 < mirrored.sum() < 580  # five standard deviations of a fair coin
    again = Batches(source, 1000, seed=0, flip=True).at(1)["image"]
    assert ((again[:, 0, 0] == 0) != (flipped[:, 0, 0] == 0)).any()


BAD_BATCHES = {
    "no batch": ({"batch_size": 0}, "batch_size is 0"),
    "negative seed": ({"seed": -1}, "seed is -1"),
    "indivisible": ({"process_count": 3}, "not divisible by the 3 processes. Use a multiple of 3"),
    "no such process": ({"process_index": 2, "process_count": 2}, "process_index is 2 of process_count 2"),
}


@pytest.mark.parametrize(("change", "said"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_settings_that_cannot_be_right_are_refused(change: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Batches(**{"source": numbered(5), "batch_size": 4, "seed": 0, **change})


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step is -1"):
        Batches(numbered(5), 4, 0).at(-1)
