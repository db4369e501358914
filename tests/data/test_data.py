"""Sources read, scale and check what they are given; batches are a pure function of seed and step."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import chex
import jax
import numpy as np
import pytest
from PIL import Image
from places import SHARED

from diffusion_distill.data import (
    SOURCES,
    ArraySource,
    Batches,
    LazySource,
    Source,
    digits,
    fingerprint,
    folder,
    from_arrays,
    from_batches,
    from_dataset,
    npz,
    prefetch,
    tfds,
)
from diffusion_distill.data.decode import decode
from diffusion_distill.data.resize import resize

pytestmark = pytest.mark.fast
PACK = SHARED / "data" / "mnist_t10k.npz"
CIFAR_TOOL = SHARED / "tools" / "expand_cifar10.py"


def numbered(count: int, **cond: Any) -> ArraySource:
    """Images 1x2 that carry their index: -1 + index / 1000 at the left, 0 at the right."""
    images = np.zeros((count, 1, 2, 1), np.float32)
    images[:, 0, 0, 0] = np.arange(count) / 1000 - 1
    return from_arrays(images, **cond)


def indices_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.rint((batch["x"].min(axis=(1, 2, 3)) + 1) * 1000).astype(int)


# Sources


def test_bytes_become_minus_one_to_one() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    batch = from_arrays(images).gather(np.array([0, 51, 255]))
    assert batch.keys() == {"x"}
    chex.assert_type(batch["x"], np.float32)
    chex.assert_shape(batch["x"], (3, 1, 1, 1))
    chex.assert_trees_all_equal(batch["x"].ravel(), np.array([-1, -0.6, 1], np.float32))


def test_floats_and_labels_pass_unchanged() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (5, 2, 3, 3)).astype(np.float32)
    source = from_arrays(images, np.array([2, 0, 1, 1, 0]))
    batch = source.gather(np.array([4, 0]))
    chex.assert_trees_all_equal(batch["x"], images[[4, 0]])
    chex.assert_trees_all_equal(batch["cond"], np.array([0, 2]))
    chex.assert_type(batch["cond"], np.int32)
    assert (len(source), source.shape, source.num_classes) == (5, (2, 3, 3), 3)


def test_digits_are_scikit_learns_and_the_splits_share_none() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    whole, train, heldout = digits("all"), digits("train"), digits("heldout")
    expected = images.reshape(-1, 8, 8, 1) / 8 - 1
    batch = whole.gather(np.arange(1797))
    chex.assert_trees_all_equal(batch["x"], expected.astype(np.float32))
    chex.assert_trees_all_equal(batch["cond"], labels)
    order = np.random.Generator(np.random.PCG64(100)).permutation(1797)
    chex.assert_trees_all_equal(train.x, whole.x[order[:900]])
    chex.assert_trees_all_equal(heldout.x, whole.x[order[900:]])
    assert (len(train), len(heldout), train.shape, train.num_classes) == (900, 897, (8, 8, 1), 10)


def test_digits_name_the_extra_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        digits()


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Did you mean 'heldout'"):
        digits("held_out")


GOOD = np.zeros((4, 2, 2, 1), np.float32)
BAD_ARRAYS = {
    "bytes of rank 3": ({"x": GOOD[..., 0].astype(np.uint8)}, ValueError, r"\(4, 2, 2\).*\[\.\.\., None\]"),
    "bytes of rank 2": ({"x": GOOD[..., 0, 0].astype(np.uint8)}, ValueError, r"need \[n, height, width, channels\]"),
    "rank 1": ({"x": GOOD[:, 0, 0, 0]}, ValueError, r"need \[n, \*shape\].*None"),
    "empty set": ({"x": GOOD[:0]}, ValueError, "at least one sample"),
    "dtype": ({"x": GOOD.astype(np.int64)}, TypeError, "dtype int64; allowed are uint8"),
    "NaN": (
        {"x": np.where(np.arange(4)[:, None, None, None] > 1, np.nan, GOOD)},
        ValueError,
        "2 of 4 samples",
    ),
    "infinity": ({"x": GOOD + np.inf}, ValueError, r"inf; need \[-1, 1\]"),
    "0..255 as floats": ({"x": GOOD + 200}, ValueError, r"200 to 200.*astype\(np.uint8\)"),
    "standardised": ({"x": GOOD - 2.5}, ValueError, r"2 \* \(x - low\).*value_range=None"),
    "label too large": (
        {"x": GOOD, "cond": [0, 1, 2, 3], "num_classes": 3},
        ValueError,
        "0 to 3; need 0..2",
    ),
    "label negative": ({"x": GOOD, "cond": [0, -1, 2, 3]}, ValueError, "-1 to 3; need 0..3"),
    "label of 64 bits": ({"x": GOOD, "cond": [0, 0, 0, -(2**32)]}, ValueError, "-4294967296 to 0"),
    "labels too few": ({"x": GOOD, "cond": [0, 1]}, ValueError, "2 labels for 4 images"),
    "labels of floats": ({"x": GOOD, "cond": [0.0, 1.0, 1.0, 0.0], "num_classes": 2}, TypeError, "dtype float64"),
    "labels one-hot": ({"x": GOOD, "cond": np.eye(4, dtype=int), "num_classes": 4}, ValueError, "argmax"),
    "classes without labels": ({"x": GOOD, "num_classes": 10}, ValueError, "no labels"),
}


@pytest.mark.parametrize(("arguments", "error", "said"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_that_cannot_be_right_are_refused(arguments: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        from_arrays(**arguments)


def test_other_ranges_become_minus_one_to_one() -> None:
    images = np.array([2, 4, 10], np.uint8).reshape(3, 1, 1, 1)
    for stored in (images, images.astype(np.float32)):
        source = ArraySource(stored, value_range=(2.0, 10.0))
        for _ in range(2):  # the stored images stay as they are
            chex.assert_trees_all_equal(source.gather(np.arange(3))["x"].ravel(), np.array([-1, -0.5, 1]))


def test_a_range_upside_down_is_refused() -> None:
    with pytest.raises(ValueError, match="low < high"):
        ArraySource(GOOD, value_range=(1.0, -1.0))


@pytest.mark.parametrize("channel_axis", [True, False])
def test_npz(tmp_path: Path, channel_axis: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1)).astype(np.uint8)
    stored = images if channel_axis else images[..., 0]
    np.savez(tmp_path / "set.npz", images=stored, labels=np.arange(6, dtype=np.uint8), other=np.ones(3))
    source = npz(tmp_path / "set.npz", num_classes=10)
    chex.assert_trees_all_equal(source.x, images)
    assert source.num_classes == 10 and source.gather(np.array([5]))["cond"] == 5
    np.savez(tmp_path / "unlabelled.npz", images=images)
    assert npz(str(tmp_path / "unlabelled.npz")).num_classes == 0


def test_the_mnist_pack_is_read() -> None:
    if not PACK.is_file():
        pytest.skip("needs mnist_t10k.npz in the optional sibling folder ../shared/data")
    source = npz(PACK)
    assert (len(source), source.shape, source.num_classes) == (10_000, (28, 28, 1), 10)
    padded = npz(PACK, size=32, crop="pad")
    chex.assert_trees_all_equal(padded.x, np.pad(source.x, ((0, 0), (2, 2), (2, 2), (0, 0))))


def test_npz_takes_arrays_of_other_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x_train=np.zeros((3, 2, 2), np.uint8), y_train=np.arange(3))
    assert npz(tmp_path / "set.npz", images="x_train", labels="y_train").num_classes == 3
    assert npz(tmp_path / "set.npz", images="x_train").num_classes == 0
    with pytest.raises(ValueError, match="no array `y_test`"):
        npz(tmp_path / "set.npz", images="x_train", labels="y_test")


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


# Resizing


def random_image(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """An image of coarse blocks: resampling it does not overshoot everywhere, as in noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 216, (-(-height // 4), -(-width // 4), channels), np.uint8)
    return coarse.repeat(4, 0).repeat(4, 1)[:height, :width]


@pytest.mark.parametrize(("length", "size"), [(6, 3), (7, 3), (3, 7), (10, 4), (1, 2)])
def test_area_is_the_mean_over_the_span_of_a_pixel(length: int, size: int) -> None:
    image = np.random.default_rng(0).uniform(-1, 1, (length, length, 2)).astype(np.float32)
    fine = image.astype(np.float64).repeat(size, 0).repeat(size, 1)  # whole pixels of both grids
    means = fine.reshape(size, length, size, length, 2).mean(axis=(1, 3))
    chex.assert_trees_all_close(resize(image, size, resample="area"), means, rtol=1e-7, atol=1e-6)
    rounded = resize(np.rint((image + 1) * 127.5).astype(np.uint8), size, resample="area")
    chex.assert_type(rounded, np.uint8)
    assert np.abs(rounded - (means + 1) * 127.5).max() <= 1.01


@pytest.mark.parametrize(("length", "size"), [(48, 16), (50, 16), (12, 20)])
@pytest.mark.parametrize(("resample", "method"), [("bilinear", "linear"), ("lanczos", "lanczos3")])
def test_antialiased_resampling_agrees_with_jax(length: int, size: int, resample: str, method: str) -> None:
    image = random_image(length, length)
    floats = image.astype(np.float32) / np.float32(127.5) - 1
    expected = np.asarray(jax.image.resize(floats, (size, size, 3), method, antialias=True))
    chex.assert_trees_all_close(resize(floats, size, resample=resample), np.clip(expected, -1, 1), rtol=1e-7, atol=2e-6)
    # Pillow rounds bytes after each axis, hence one level beside the rounding.
    assert np.abs(resize(image, size, resample=resample) - (expected + 1) * 127.5).max() < 1.6


def test_crops() -> None:
    image = np.arange(5 * 8, dtype=np.uint8).reshape(5, 8, 1)
    chex.assert_trees_all_equal(resize(image, 5, "center"), image[:, 1:6])  # columns (8 - 5) // 2 on
    chex.assert_trees_all_equal(resize(image, 8, "pad"), np.pad(image, ((1, 2), (0, 0), (0, 0))))
    chex.assert_trees_all_equal(resize(image, 10, "pad"), np.pad(image, ((2, 3), (1, 1), (0, 0))))
    black = resize(np.ones((1, 1, 1), np.float32), 3, "pad")
    assert black.sum() == 1 - 8 and black[1, 1] == 1
    halves = np.zeros((2, 8, 1), np.uint8)
    halves[:, 4:] = 200
    chex.assert_trees_all_equal(resize(halves, 2, "stretch")[..., 0], np.array([[0, 200]] * 2))


# Decoding


def encoded(image: np.ndarray | Image.Image, kind: str = "png", **options: Any) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    return image


def with_alpha(mode: str, *pixels: tuple[int, ...]) -> Image.Image:
    image = Image.new(mode, (len(pixels), 1))
    for column, pixel in enumerate(pixels):
        image.putpixel((column, 0), pixel)
    return image


RGB = [[10, 20, 30], [40, 50, 60]]
COLOURS = {  # image, its pixels by itself, as grey (None: refused); luma = (299 R + 587 G + 114 B) / 1000
    "grey": (encoded(np.array([[[7], [9]]], np.uint8)), [[7], [9]], [[7], [9]]),
    "black and white": (encoded(Image.new("1", (2, 1), 1)), [[255], [255]], [[255], [255]]),
    "grey and alpha": (encoded(with_alpha("LA", (7, 0), (9, 255))), [[7], [9]], [[7], [9]]),
    "RGB": (encoded(np.array([RGB], np.uint8)), RGB, [[18], [48]]),
    "RGB and alpha": (encoded(with_alpha("RGBA", (10, 20, 30, 0), (40, 50, 60, 255))), RGB, [[18], [48]]),
    "palette": (encoded(palette()), RGB, [[18], [48]]),
    "palette of a GIF, two frames": (
        encoded(palette(), "gif", save_all=True, append_images=[Image.new("P", (2, 1))]),
        RGB,
        [[18], [48]],
    ),
    "CMYK": (encoded(Image.new("CMYK", (2, 1)), "tiff"), [[255] * 3] * 2, [[255]] * 2),
}


@pytest.mark.parametrize(("data", "own", "grey"), COLOURS.values(), ids=COLOURS)
def test_colours_become_one_or_three_channels(data: bytes, own: list, grey: list) -> None:
    for channels, expected in ((None, own), (1, grey), (3, own if len(own[0]) == 3 else np.repeat(own, 3, 1))):
        pixels = decode(data, "it", channels)
        chex.assert_type(pixels, np.uint8)
        chex.assert_trees_all_equal(pixels, np.array([expected]))


def huge_png() -> bytes:
    """A PNG of 67 bytes that claims 20000 x 20000 pixels."""
    data = bytearray(encoded(np.zeros((1, 1, 1), np.uint8)))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BAD_FILES = {
    "cut short": (encoded(random_image(40, 40), "jpeg")[:-60], "cannot be read as an image .*truncated"),
    "no image": (b"<html>404</html>", "cannot be read as an image"),
    "empty": (b"", "cannot be read as an image"),
    "16 bits": (encoded(Image.fromarray(np.full((2, 2), 60_000, np.uint16))), "more than 8 bits"),
    "bomb": (huge_png(), "larger than any usual image"),
}


@pytest.mark.parametrize(("data", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, data: bytes, said: str) -> None:
    files = {"a.png": encoded(random_image(2, 2)), "b.png": data}
    for path in (write_folder(tmp_path / "set", files), write_zip(tmp_path / "set.zip", files)):
        with pytest.raises(ValueError, match=rf"{path.name}/b\.png .*{said}"):
            folder(path)
        lazy = folder(path, memory=0)  # only the first image is read at once
        chex.assert_shape(lazy.gather(np.array([0, 0]))["x"], (2, 2, 2, 3))
        with pytest.raises(ValueError, match=rf"{path.name}/b\.png .*{said}"):
            lazy.gather(np.array([0, 1]))


def test_images_between_the_limit_and_twice_the_limit_are_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="4 x 4 pixels, allowed are 15"):
        decode(encoded(random_image(4, 4)), "it")


# Folders and zips


def write_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path: Path, files: Mapping[str, bytes], **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


WRITERS = {
    "folder": write_folder,
    "zip": lambda path, files: write_zip(path.with_suffix(".zip"), files),
    "deflated zip": lambda path, files: write_zip(path.with_suffix(".zip"), files, compression=zipfile.ZIP_DEFLATED),
}


def flat(value: int) -> bytes:
    """A file of one grey pixel, by which it is known."""
    return encoded(np.full((1, 1, 1), value, np.uint8))


def values(source: Source) -> list[int]:
    """The grey values of a source of such files, in order."""
    images = source.gather(np.arange(len(source)))["x"].ravel()
    return np.rint((images + 1) * 127.5).astype(int).tolist()


def labels_of(source: Source) -> list[int] | None:
    batch = source.gather(np.arange(len(source)))
    return batch["cond"].tolist() if "cond" in batch else None


# Written out of order: names decide, and classes are numbered by name.
SPLITS = {
    "train/dog/2.png": 3, "train/cat/10.png": 0, "train/cat/9.png": 1, "train/dog/1.PNG": 2,
    "test/dog/1.png": 5, "test/ant/1.png": 4,
}  # fmt: skip
LAYOUTS = {  # files, arguments, values in order, labels, number of classes
    "no classes": ({"b.png": 1, "a.png": 2}, {}, [2, 1], None, 0),
    "classes": ({"y/a.png": 1, "x/c.png": 2, "x/b.png": 3}, {}, [3, 2, 1], [0, 0, 1], 2),
    "classes of deeper folders": ({"y/s/a.png": 1, "x/s/c.png": 2}, {}, [2, 1], [0, 1], 2),
    "classes not wanted": ({"y/a.png": 1, "x/c.png": 2}, {"labels": False}, [2, 1], None, 0),
    "a folder around everything": ({"set/y/a.png": 1, "set/x/c.png": 2}, {}, [2, 1], [0, 1], 2),
    "one class is none": ({"x/a.png": 1, "x/c.png": 2}, {}, [1, 2], None, 0),
    # ant is no class of train, but counts, so that cat and dog have one number in both splits
    "a split": (SPLITS, {"split": "train"}, [0, 1, 2, 3], [1, 1, 2, 2], 3),
    "another split": (SPLITS, {"split": "test"}, [4, 5], [0, 2], 3),
    "a split below a folder": ({f"all/{k}": v for k, v in SPLITS.items()}, {"split": "test"}, [4, 5], [0, 2], 3),
    "all splits": (SPLITS, {"labels": False}, [4, 5, 0, 1, 2, 3], None, 0),
    "named classes": (SPLITS, {"split": "test", "classes": ["dog", "emu", "ant"]}, [4, 5], [2, 0], 3),
    "more classes": ({"y/a.png": 1, "x/c.png": 2}, {"num_classes": 5}, [2, 1], [0, 1], 5),
}


@pytest.mark.parametrize("memory", [2**20, 0], ids=["in memory", "on demand"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(("files", "arguments", "order", "labels", "classes"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(
    tmp_path: Path,
    write: Callable[..., Path],
    memory: int,
    files: dict[str, int],
    arguments: dict[str, Any],
    order: list[int],
    labels: list[int] | None,
    classes: int,
) -> None:
    path = write(tmp_path / "set", {name: flat(value) for name, value in files.items()})
    source = SOURCES["folder"](path, memory=memory, **arguments)
    assert isinstance(source, ArraySource if memory else LazySource)
    assert (values(source), labels_of(source), source.num_classes) == (order, labels, classes)
    assert source.shape == (1, 1, 1)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_labels_of_edm(tmp_path: Path, write: Callable[..., Path]) -> None:
    names = ["00000/img0.png", "00000/img1.png", "00001/img2.png"]
    files = {name: flat(i) for i, name in enumerate(names)}
    listed = [[names[2], 0], [names[0], 6], [names[1], 3]]
    for described, labels, classes in ((listed, [6, 3, 0], 7), (None, None, 0)):
        described = json.dumps({"labels": described}).encode()
        source = folder(write(tmp_path / f"set{classes}", {**files, "dataset.json": described}))
        assert (values(source), labels_of(source), source.num_classes) == ([0, 1, 2], labels, classes)
    one = write(tmp_path / "one", {"0/a.png": flat(5), "dataset.json": b'{"labels": [["0/a.png", 2]]}'})
    assert labels_of(folder(one)) == [2]
    for bad, said in (
        ({"labels": listed[:2]}, "no label for 1 of 3 images, such as 00000/img1.png"),
        ({"labels": [[name, [0.0, 1.0]] for name in names]}, "no whole numbers"),
        ({"labels": [1, 2]}, "not of the form"),
        ([], "not of the form"),
    ):
        path = write(tmp_path / "bad", {**files, "dataset.json": json.dumps(bad).encode()})
        with pytest.raises(ValueError, match=said):
            folder(path)
        assert folder(path, labels=False).num_classes == 0


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    images = {"x/a.png": flat(1), "y/b.png": flat(2)}
    others = {"x/.DS_Store": b"", "x/._a.png": b"", ".thumbs/c.png": flat(3), "notes.txt": b"", "y/Thumbs.db": b""}
    path = write_folder(tmp_path / "set", {**images, **others})
    named = r"\.thumbs/c\.png, notes\.txt, x/\.DS_Store, \.\.\."
    with pytest.warns(UserWarning, match=rf"^5 of the files of .* left out: {named}$"):
        assert (values(source := folder(path)), labels_of(source)) == ([1, 2], [0, 1])
    with pytest.raises(ValueError, match=r"holds no images .*but 5 other files, such as \.thumbs"):
        folder(write_folder(tmp_path / "none", others))
    with pytest.warns(UserWarning, match="1 of the files"):
        folder(write_zip(tmp_path / "mac.zip", {**images, "__MACOSX/x/a.png": b""}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder(write_folder(tmp_path / "clean", images))


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", {"b.png": flat(2)})
    write_folder(tmp_path / "set", {"x/a.png": flat(1)})
    (tmp_path / "set" / "y").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "x" / "up").symlink_to(tmp_path / "set")
    assert (values(source := folder(tmp_path / "set")), labels_of(source)) == ([1, 2], [0, 1])


def test_images_of_one_set_get_one_shape(tmp_path: Path) -> None:
    images = [random_image(5, 4), random_image(4, 6), random_image(4, 4, 1)]
    path = write_folder(tmp_path / "set", {f"{i}.png": encoded(image) for i, image in enumerate(images)})
    with pytest.raises(ValueError, match=r"set/1\.png has 4 x 6 pixels, but .*set/0\.png has 5 x 4. Pass size"):
        folder(path)
    expected = [images[0][:4], images[1][:, 1:5], images[2].repeat(3, 2)]
    for memory in (2**20, 0):
        batch = folder(path, size=4, memory=memory).gather(np.arange(3))["x"]
        chex.assert_trees_all_equal(np.rint((batch + 1) * 127.5), np.array(expected))
    assert folder(path, 2, resample="lanczos", crop="stretch", channels=1).shape == (2, 2, 1)
    mixed = {"0.png": encoded(images[2]), "1.png": encoded(images[2].repeat(3, 2))}
    grey_first = write_folder(tmp_path / "mixed", mixed)
    with pytest.raises(ValueError, match=r"mixed/1\.png has colours, but .*mixed/0\.png, the first image, is grey"):
        folder(grey_first)
    assert folder(grey_first, channels=3).shape == (4, 4, 3)


BAD_FOLDERS = {
    "no split": ({"x/a.png": 1, "y/b.png": 2}, {"split": "z"}, r"no images below 'z/'\..*Folders there: x, y"),
    "misspelt split": ({"train/a.png": 1, "test/b.png": 2}, {"split": "trian"}, "Did you mean 'train'"),
    "splits as classes": ({"train/a.png": 1, "Test/b.png": 2}, {}, "look like splits.*split='train'.*labels=False"),
    "images beside classes": ({"x/a.png": 1, "b.png": 2, "y/c.png": 3}, {}, "1 outside of them, such as b.png"),
    "classes wanted": ({"a.png": 1}, {"labels": True}, "has no classes"),
    "unnamed class": ({"x/a.png": 1, "y/b.png": 2}, {"classes": ["x", "z"]}, "does not name: y"),
    "too few classes": ({"x/a.png": 1, "y/b.png": 2}, {"num_classes": 1}, "0 to 1; need 0..0"),
    "classes of nothing": ({"a.png": 1}, {"num_classes": 4}, "num_classes is 4, but there are no labels"),
    "crop": ({"a.png": 1}, {"crop": "centre"}, "Unknown crop 'centre'. Did you mean 'center'"),
    "resampling": ({"a.png": 1}, {"resample": "box"}, "Unknown resampling 'box'.*area, bilinear, lanczos"),
    "size": ({"a.png": 1}, {"size": 0}, "size must be a whole number of at least 1"),
    "channels": ({"a.png": 1}, {"channels": 4}, "channels is 4; allowed are 1"),
    "threads": ({"a.png": 1}, {"threads": 0}, "threads must be"),
}


@pytest.mark.parametrize(("files", "arguments", "said"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_folders_that_are_unclear_are_refused(tmp_path: Path, files: dict, arguments: dict, said: str) -> None:
    path = write_folder(tmp_path / "set", {name: flat(value) for name, value in files.items()})
    with pytest.raises(ValueError, match=said):
        folder(path, **arguments)


def test_zips_that_are_no_sets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"No folder or zip .*none"):
        folder(tmp_path / "none")
    (tmp_path / "set.tar").write_bytes(b"tar")
    good = write_zip(tmp_path / "good.zip", {"a.png": flat(1)}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(good[:-10])
    for name in ("set.tar", "cut.zip"):
        with pytest.raises(ValueError, match=rf"{name} is neither a folder nor a whole zip"):
            folder(tmp_path / name)
    (tmp_path / "changed.zip").write_bytes(good.replace(flat(1)[-30:-20], b"0123456789"))
    with pytest.raises(ValueError, match=r"changed\.zip/a\.png cannot be unpacked .*CRC"):
        folder(tmp_path / "changed.zip")
    flags = good.index(b"PK\x01\x02") + 8  # of the entry in the zip's directory; bit 0 means encrypted
    (tmp_path / "secret.zip").write_bytes(good[:flags] + b"\x01" + good[flags + 1 :])
    with pytest.raises(ValueError, match=r"secret\.zip/a\.png cannot be unpacked .*encrypted"):
        folder(tmp_path / "secret.zip")
    monkeypatch.setattr("diffusion_distill.data.images.MAX_FILE_BYTES", 1000)
    bomb = write_zip(tmp_path / "bomb.zip", {"a.png": flat(1) + bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"a\.png claims 10000\d+ bytes, allowed are 1000"):
        folder(bomb)


def test_a_zip_is_read_by_one_thread_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(write_zip(tmp_path / "set.zip", {f"{i:02}.png": flat(i) for i in range(40)}), memory=0, threads=4)
    read, reading = zipfile.ZipFile.read, []

    def watched(archive: zipfile.ZipFile, entry: Any) -> bytes:
        reading.append(entry)
        time.sleep(1e-4)
        assert reading == [entry]
        return read(archive, reading.pop())

    monkeypatch.setattr(zipfile.ZipFile, "read", watched)
    assert values(source) == list(range(40))


def test_reading_into_memory_reports(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "set", {f"{i:03}.png": flat(i % 7) for i in range(50)})
    for threads in (1, 3):
        told: list[tuple[int, int]] = []
        source = folder(path, threads=threads, report=lambda *done: told.append(done))
        assert values(source) == [i % 7 for i in range(50)]
        assert told == sorted(told) and told[-1] == (50, 50) and len(told) >= threads


def test_the_cifar_pack_is_read(tmp_path: Path) -> None:
    if not CIFAR_TOOL.is_file():
        pytest.skip("needs expand_cifar10.py in the optional sibling folder ../shared/tools")
    for out in ("set.zip", "set"):
        subprocess.run([sys.executable, CIFAR_TOOL, tmp_path / out, "--limit", "120"], check=True)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        for split in ("train", "test"):
            entries = sorted(name for name in archive.namelist() if name.startswith(split))
            pixels = [np.asarray(Image.open(archive.open(entry))) for entry in entries]
            for path in (tmp_path / "set.zip", tmp_path / "set"):
                source = folder(path, split=split)
                assert isinstance(source, ArraySource) and source.cond is not None
                assert (len(source), source.shape, source.num_classes) == (120, (32, 32, 3), 10)
                chex.assert_trees_all_equal(source.x, np.array(pixels))
                assert [names[label] for label in source.cond] == [entry.split("/")[1] for entry in entries]


# Objects of the user's


class Items(list):
    """A data set that notes how many threads read it at once."""

    readers = most = 0

    def __getitem__(self, index: Any) -> Any:
        assert type(index) is int  # some data sets refuse NumPy's integers
        self.readers += 1
        self.most = max(self.most, self.readers)
        time.sleep(1e-4)
        self.readers -= 1
        return super().__getitem__(index)


BYTES = [random_image(4, 4, seed=i) for i in range(6)]
FLOATS = [image.astype(np.float32) / np.float32(127.5) - 1 for image in BYTES]
KINDS = {  # items, arguments
    "dicts": ([{"image": x, "label": i} for i, x in enumerate(BYTES)], {}),
    "dicts of other names": (
        [{"img": x, "fine": np.int64(i)} for i, x in enumerate(BYTES)],
        {"x": "img", "cond": "fine"},
    ),
    "tuples": ([(x, i) for i, x in enumerate(BYTES)], {}),
    "tuples the other way round": ([(np.array(i), x) for i, x in enumerate(BYTES)], {"x": 1, "cond": 0}),
    "floats": ([(x, i) for i, x in enumerate(FLOATS)], {}),
    "floats of 64 bits": ([(x.astype(np.float64), i) for i, x in enumerate(FLOATS)], {}),
    "Pillow's images": ([(Image.fromarray(x), i) for i, x in enumerate(BYTES)], {}),
    "encoded images": ([(encoded(x), i) for i, x in enumerate(BYTES)], {}),
    "JAX's arrays": ([(jax.numpy.asarray(x), jax.numpy.asarray(i)) for i, x in enumerate(BYTES)], {}),
}


@pytest.mark.parametrize("memory", [2**20, 0], ids=["in memory", "on demand"])
@pytest.mark.parametrize(("items", "arguments"), KINDS.values(), ids=KINDS)
def test_objects_of_the_users(items: list, arguments: dict, memory: int) -> None:
    source = from_dataset(items, num_classes=None if memory else 6, memory=memory, **arguments)
    assert isinstance(source, ArraySource if memory else LazySource)
    assert (len(source), source.shape, source.num_classes) == (6, (4, 4, 3), 6)
    batch = source.gather(np.array([5, 0, 5]))
    chex.assert_trees_all_equal(batch["x"], np.stack(FLOATS)[[5, 0, 5]])
    chex.assert_trees_all_equal(batch["cond"], np.array([5, 0, 5]))
    chex.assert_type(batch["x"], np.float32)
    chex.assert_type(batch["cond"], np.int32)
    unlabelled = from_dataset(items, memory=memory, **{**arguments, "cond": None})
    assert unlabelled.num_classes == 0 and unlabelled.gather(np.arange(2)).keys() == {"x"}


def test_objects_without_labels_or_of_several_sizes() -> None:
    for items in (BYTES, [(x,) for x in BYTES], [{"image": x} for x in BYTES]):
        source = from_dataset(items, size=2)
        assert source.shape == (2, 2, 3) and source.num_classes == 0
    assert from_dataset([x[..., 0] for x in BYTES]).shape == (4, 4, 1)
    wide, high = random_image(4, 9), random_image(6, 4)
    mixed = from_dataset([wide, high], size=4).gather(np.arange(2))["x"]
    chex.assert_trees_all_equal(np.rint((mixed + 1) * 127.5), np.array([wide[:, 2:6], high[1:5]]))


def test_one_thread_at_a_time_reads_a_data_set_that_may_not_be_safe() -> None:
    for threads, most in ((1, 1), (4, 2)):
        items = Items([(x, i) for i, x in enumerate(BYTES * 20)])
        source = from_dataset(items, num_classes=120, memory=0, threads=threads)
        batches = Batches(source, 30, seed=0)
        labels = [batch["cond"] for batch in prefetch(batches, 0, 8, depth=4, threads=4)]
        chex.assert_trees_all_equal(labels, [batches.indices(step) for step in range(8)])
        assert items.most == 1 if threads == 1 else items.most >= most


BAD_ITEMS = {
    "no such key": ([{"img": BYTES[0]}], {}, r"Item 0 has no 'x'\. It has \['img'\]"),
    "no such label": (
        [{"image": BYTES[0], "label": 0}],
        {"cond": "lable"},
        "Item 0 has no 'lable'. Did you mean 'label'",
    ),
    "label missing later": ([{"image": BYTES[0], "label": 0}, {"image": BYTES[0]}], {}, "Item 1 has no 'cond'"),
    "no such position": ([(BYTES[0], 1)], {"x": 2}, "Item 0 has 2 parts, no number 2"),
    "name for a tuple": ([(BYTES[0], 1)], {"x": "img"}, "which has no 'img'. Give a position"),
    "label of an image alone": ([BYTES[0]], {"cond": 1}, "ndarray alone, without a condition. Pass cond=None"),
    "channels first": (
        [BYTES[0], random_image(4, 4).transpose(2, 0, 1).repeat(2, 2)],
        {},
        r"Item 1 .*\(3, 4, 8\).*transpose\(1, 2, 0\)",
    ),
    "rank": ([BYTES[0].ravel()], {}, r"Item 0: uint8 samples have shape \(1, 48\); need \[n, height"),
    "0..255 as floats": ([FLOATS[0], BYTES[0].astype(np.float32)], {}, r"Item 1: .*to \d+; need \[-1, 1\].*uint8"),
    "NaN": ([FLOATS[0], FLOATS[0] * np.nan], {}, "Item 1: .*NaN"),
    "dtype": ([BYTES[0].astype(np.int64)], {}, "Item 0: Images have dtype int64"),
    "two kinds": ([FLOATS[0], BYTES[0]], {}, "Item 1 has 3 channels of uint8, but item 0 has 3 of float32"),
    "two depths": ([BYTES[0], BYTES[0][..., :1]], {}, "Item 1 has 1 channels of uint8, but item 0 has 3"),
    "two sizes": ([BYTES[0], BYTES[0][:3]], {}, r"Item 1 has shape \(3, 4, 3\), but item 0 has \(4, 4, 3\). Pass size"),
    "one-hot": (
        [(BYTES[0], np.eye(3, dtype=int)[1])],
        {"num_classes": 3},
        "Item 0 has the label .*need one whole number",
    ),
    "label of floats": ([(BYTES[0], 0.5)], {"num_classes": 3}, "Item 0 has the label 0.5"),
    "label too large": ([(BYTES[0], 0), (BYTES[0], 3)], {"num_classes": 3}, "Item 1 has the label 3; need 0..2"),
    "label negative": ([(BYTES[0], 0), (BYTES[0], -1)], {}, "Item 1 has the label -1; need at least 0"),
    "no file": ([b"nothing"], {}, "Item 0 cannot be read as an image"),
    "nothing": ([], {}, "data set is empty"),
    "classes without labels": (
        [BYTES[0]],
        {"num_classes": 3, "memory": 0},
        "num_classes is 3, but there are no labels",
    ),
    "classes unknown": ([(BYTES[0], 0)], {"memory": 0}, "more than memory=0 bytes.*Pass num_classes"),
}


@pytest.mark.parametrize(("items", "arguments", "said"), BAD_ITEMS.values(), ids=BAD_ITEMS)
def test_items_that_cannot_be_right_are_named(items: list, arguments: dict, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        from_dataset(items, **arguments)


# TensorFlow Datasets, of which sets are prepared here without TensorFlow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir with `shapes` (classes, two splits) and `scenes` (no classes, two configs)."""
    import tensorflow_datasets as library

    features = library.features

    def examples(images: list[np.ndarray], **more: Any) -> Any:
        for i, image in enumerate(images):
            yield i, {"image": io.BytesIO(encoded(image)), **{name: value(i) for name, value in more.items()}}

    class Shapes(library.core.GeneratorBasedBuilder):
        VERSION = library.core.Version("1.0.0")

        def _info(self) -> Any:
            parts = {"image": features.Image(shape=(None, None, 3)), "label": features.ClassLabel(num_classes=7)}
            return library.core.DatasetInfo(
                builder=self, features=features.FeaturesDict({**parts, "id": features.Text()})
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            train, test = ([random_image(6, 8, seed=s) for s in seeds] for seeds in (range(20), range(20, 25)))
            return {
                name: examples(images, label=lambda i: i % 5, id=str)
                for name, images in (("train", train), ("test", test))
            }

        def _generate_examples(self) -> Any: ...

    class Scenes(library.core.GeneratorBasedBuilder):
        BUILDER_CONFIGS: ClassVar[Any] = [
            library.core.BuilderConfig(name=name, version="3.0.0") for name in ("bedroom", "tower")
        ]

        def _info(self) -> Any:
            parts = {"image": features.Image(shape=(4, 4, 1))}
            return library.core.DatasetInfo(builder=self, features=features.FeaturesDict(parts))

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": examples([random_image(4, 4, 1, seed=s) for s in range(6)])}

        def _generate_examples(self) -> Any: ...

    data_dir = tmp_path_factory.mktemp("tfds")
    Shapes(data_dir=data_dir, file_format="array_record").download_and_prepare()
    for name in ("bedroom", "tower"):
        Scenes(data_dir=data_dir, config=name, file_format="array_record").download_and_prepare()
    return data_dir


def by_content(images: np.ndarray) -> np.ndarray:
    """Sorted by their bytes: TFDS shuffles what it writes."""
    return np.array(sorted(images, key=lambda image: image.tobytes()))


@pytest.mark.parametrize("memory", [2**20, 0], ids=["in memory", "on demand"])
def test_prepared_sets_are_read_by_name(prepared: Path, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # as a config gives them: "name" is the source's there
    source = SOURCES["tfds"](dataset="shapes", split="train", data_dir=str(prepared), size=4, memory=memory)
    assert isinstance(source, ArraySource if memory else LazySource)
    assert (len(source), source.shape, source.num_classes) == (20, (4, 4, 3), 7)
    batch = source.gather(np.arange(20))
    expected = {resize(random_image(6, 8, seed=i), 4).tobytes(): i % 5 for i in range(20)}
    found = np.rint((batch["x"] + 1) * 127.5).astype(np.uint8)
    assert {image.tobytes(): label for image, label in zip(found, batch["cond"], strict=True)} == expected
    assert len(tfds("shapes", "train[:25%]", prepared, memory=memory)) == 5
    assert tfds("shapes", "test", prepared, label=None, memory=memory).num_classes == 0
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    scenes = tfds("scenes/bedroom", memory=memory)
    assert (scenes.shape, scenes.num_classes) == ((4, 4, 1), 0)
    found = np.rint((scenes.gather(np.arange(6))["x"] + 1) * 127.5).astype(np.uint8)
    chex.assert_trees_all_equal(
        by_content(found), by_content(np.stack([random_image(4, 4, 1, seed=s) for s in range(6)]))
    )


def test_the_fingerprint_of_a_prepared_set(prepared: Path, tmp_path: Path) -> None:
    read = lambda split, place: fingerprint(tfds("shapes", split, place, memory=0))  # noqa: E731
    known = read("train", prepared)
    assert known == read("train", prepared) != read("test", prepared)
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)  # with the files' times
    assert read("train", tmp_path) == known
    shard = next((tmp_path / "shapes").rglob("*train*array_record*"))
    os.utime(shard, (0, 0))
    assert read("train", tmp_path) != known


def test_a_prepared_set_is_read_without_tensorflow_or_network(prepared: Path) -> None:
    script = (
        "import socket\n"
        "from importlib.machinery import PathFinder\n"
        "find, absent = PathFinder.find_spec, ('tensorflow', 'torch')\n"
        "PathFinder.find_spec = lambda name, *rest: None if name.split('.')[0] in absent else find(name, *rest)\n"
        "socket.socket.connect = None\n"
        "from diffusion_distill.data import Batches, tfds\n"
        f"source = tfds('shapes', 'train', {str(prepared)!r})\n"
        "print(Batches(source, 4, 0).at(3)['x'].shape)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "(4, 6, 8, 3)", run.stderr


def as_tfrecord(version: Path, place: Path) -> None:
    """A copy of a prepared set that says of itself to be TFRECORD, which cannot be written without TensorFlow."""
    for file in version.iterdir():
        data = file.read_bytes().replace(b'"array_record"', b'"tfrecord"')
        write_folder(place, {file.name.replace("array_record", "tfrecord"): data})


def test_versions_and_configs(prepared: Path, tmp_path: Path) -> None:
    as_tfrecord(prepared / "shapes" / "1.0.0", tmp_path / "shapes" / "1.9.0")
    shutil.copytree(prepared / "shapes" / "1.0.0", tmp_path / "shapes" / "1.10.0")
    assert len(tfds("shapes", "train", tmp_path)) == len(tfds("shapes:1.10.0", "train", tmp_path)) == 20
    with pytest.raises(ValueError, match="tfrecord"):
        tfds("shapes:1.9.0", "train", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'shapes:2\.0\.0' is not prepared"):
        tfds("shapes:2.0.0", "train", prepared)
    with pytest.raises(ValueError, match="name one: scenes/bedroom, scenes/tower"):
        tfds("scenes", "train", prepared)


def test_what_is_not_prepared_fails_with_the_command_and_without_the_network(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / "my data"
    monkeypatch.setattr("socket.socket.connect", None)
    for name in ("cifar10", "lsun/church_outdoor"):
        build = f"tfds build {name} --data_dir='{data_dir}' --file_format=array_record"
        command = rf"\n  pip install tensorflow-cpu\n  {build}\n"
        with pytest.raises(FileNotFoundError, match=rf"'{name}' is not prepared in {data_dir}\. .*{command}"):
            tfds(name, "train", data_dir)
        assert not data_dir.exists() and "tensorflow" not in sys.modules


def test_sets_are_prepared_when_asked(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tfds("shapes", "test", tmp_path, download=True)
    assert len(source) == 5
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Preparing 'cifar10' needs TensorFlow.*pip install tensorflow-cpu"):
        tfds("cifar10", "train", tmp_path, download=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "tset"}, "Unknown split 'tset'"),
        ({"image": "picture"}, "Unknown feature of shapes: 'picture'.*Known: id, image, label"),
        ({"label": "lable"}, "Did you mean 'label'"),
        ({"num_classes": 2}, "need 0..1"),
        ({"num_classes": 7, "label": None}, "there are no labels"),
        ({"resample": "box"}, "Unknown resampling 'box'"),
    ],
)
def test_what_a_prepared_set_does_not_have(prepared: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tfds("shapes", **{"split": "train", "data_dir": prepared, **arguments})


def test_a_format_without_random_access_is_refused(prepared: Path, tmp_path: Path) -> None:
    as_tfrecord(prepared / "shapes" / "1.0.0", tmp_path / "shapes" / "1.0.0")
    command = f"tfds build shapes --data_dir={tmp_path}_array_record --file_format=array_record"
    with pytest.raises(ValueError, match=rf"(?s)prepared as tfrecord.*\n  {command}$"):
        tfds("shapes", "train", tmp_path)


def test_tfds_names_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        tfds("cifar10")


# Batches


def test_every_epoch_visits_every_image_once_in_an_order_of_its_own() -> None:
    batches = Batches(numbered(10), batch_size=4, seed=3)
    seen = np.concatenate([indices_of(batches.at(step)) for step in range(5)])  # two epochs, one batch across
    chex.assert_trees_all_equal(np.sort(seen[:10]), np.arange(10))
    chex.assert_trees_all_equal(np.sort(seen[10:]), np.arange(10))
    assert (seen[:10] != seen[10:]).any()
    orders = [np.random.Generator(np.random.PCG64([3, epoch])).permutation(10) for epoch in (0, 1)]
    chex.assert_trees_all_equal(seen, np.concatenate(orders))


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    source = numbered(50, cond=np.arange(50))
    walked = Batches(source, batch_size=8, seed=1, flip=True)
    walk = [walked.at(step) for step in range(20)]
    resumed = Batches(source, batch_size=8, seed=1, flip=True).at(17)
    for name in ("x", "cond"):
        chex.assert_trees_all_equal(resumed[name], walk[17][name])
    other = Batches(source, batch_size=8, seed=2, flip=True).at(17)
    assert (other["cond"] != resumed["cond"]).any()


def test_images_and_labels_stay_together() -> None:
    batch = Batches(numbered(50, cond=np.arange(50)), batch_size=16, seed=0).at(5)
    chex.assert_trees_all_equal(indices_of(batch), batch["cond"])


def test_a_batch_may_exceed_the_source() -> None:
    indices = Batches(numbered(3), batch_size=20, seed=0).indices(0)
    chex.assert_trees_all_equal(np.bincount(indices[:18]), np.array([6, 6, 6]))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(count: int) -> None:
    source = numbered(10)
    whole = Batches(source, batch_size=8, seed=0, flip=True)
    shares = [Batches(source, 8, 0, flip=True, process_index=i, process_count=count) for i in range(count)]
    for step in (0, 1, 7):
        together = np.concatenate([share.at(step)["x"] for share in shares])
        chex.assert_trees_all_equal(together, whole.at(step)["x"])


def test_flips_mirror_half_of_the_images_left_to_right() -> None:
    source = numbered(1000)
    plain, flipped = (Batches(source, 1000, seed=0, flip=flip).at(0)["x"] for flip in (False, True))
    mirrored = (flipped == plain[:, :, ::-1]).all(axis=(1, 2, 3))
    chex.assert_trees_all_equal(flipped[~mirrored], plain[~mirrored])
    assert 420 < mirrored.sum() < 580  # five standard deviations of a fair coin
    again = Batches(source, 1000, seed=0, flip=True).at(1)["x"]
    assert ((again[:, 0, 0] == 0) != (flipped[:, 0, 0] == 0)).any()


def test_flipping_leaves_alone_what_the_source_gave() -> None:
    class Kept(ArraySource):
        """A source that gives the same array again and again."""

        @cached_property
        def all(self) -> np.ndarray:
            return super().gather(np.arange(len(self)))["x"]

        def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            return {"x": self.all}

    source = Kept(numbered(50).x)
    batches = Batches(source, 50, seed=0, flip=True)
    for _ in range(3):
        batches.at(0)
    chex.assert_trees_all_equal(source.gather(np.arange(50))["x"], numbered(50).x)


BAD_BATCHES = {
    "no batch": ({"batch_size": 0}, "batch_size is 0"),
    "negative seed": ({"seed": -1}, "seed must be a whole number from 0"),
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


# Prefetching


@pytest.mark.parametrize(("depth", "threads"), [(1, 1), (2, 1), (3, 4), (20, 2)])
def test_prefetched_batches_are_those_of_their_steps(tmp_path: Path, depth: int, threads: int) -> None:
    path = write_zip(
        tmp_path / "set.zip", {f"{c}/{i}.png": encoded(random_image(8, 8, seed=i)) for c in "ab" for i in range(9)}
    )
    batches = Batches(folder(path, memory=0, threads=2), 5, seed=1, flip=True)
    ahead = list(prefetch(batches, 3, 14, depth=depth, threads=threads))
    assert len(ahead) == 11
    for batch, step in zip(ahead, range(3, 14), strict=True):
        for name, expected in batches.at(step).items():
            chex.assert_trees_all_equal(batch[name], expected)
    assert list(prefetch(batches, 4, 4, depth=depth, threads=threads)) == []


class Counted(Batches):
    """Batches that note which steps were asked for and fail at step 6."""

    asked: list[int]

    def at(self, step: int) -> dict[str, np.ndarray]:
        self.asked.append(step)
        if step == 6:
            raise OSError("disk gone")
        return super().at(step)


def counted() -> Counted:
    batches = Counted(numbered(10), 4, seed=0)
    object.__setattr__(batches, "asked", [])
    return batches


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_failure_is_raised_at_its_step() -> None:
    stream = prefetch(counted(), 3, 20, depth=5, threads=2)
    assert len([next(stream) for _ in range(3)]) == 3
    with pytest.raises(OSError, match="disk gone"):
        next(stream)
    assert not prefetching()


def test_closing_ends_the_threads_and_computes_no_more() -> None:
    batches = counted()
    with closing(prefetch(batches, 10, 1000, depth=2, threads=2)) as stream:
        assert not batches.asked and not prefetching()  # nothing begins before the first batch is asked for
        for _ in range(3):
            next(stream)
        assert prefetching()
    assert not prefetching() and {10, 11, 12} <= {*batches.asked} <= {*range(10, 15)}
    stream = prefetch(batches, 10, 1000)
    next(stream)
    del stream
    gc.collect()
    assert not prefetching()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 5, 0, 1), "depth must be"),
        ((0, 5, 1, 0), "threads must be"),
        ((5, 4, 1, 1), "start is 5 and stop 4"),
        ((-1, 4, 1, 1), "start is -1"),
    ],
)
def test_prefetching_that_cannot_be_right_is_refused_at_once(arguments: tuple[int, ...], said: str) -> None:
    start, stop, depth, threads = arguments
    with pytest.raises(ValueError, match=said):
        prefetch(counted(), start, stop, depth=depth, threads=threads)


@pytest.mark.fast
def test_floats_that_look_like_another_range_are_asked_about() -> None:
    rng = np.random.default_rng(0)
    images = rng.random((64, 8, 8, 1))
    items = [(image, 0) for image in images]
    for kind in (np.float16, np.float32, np.float64):
        with pytest.warns(UserWarning, match=r"run from 0\..* to .*nothing here is darker than grey.*images \* 2 - 1"):
            from_arrays(images.astype(kind))
    for memory in (10**9, 0):  # in memory, and on demand
        with pytest.warns(UserWarning, match="nothing here is darker than grey"):
            from_dataset(items, num_classes=1, memory=memory)
    with pytest.warns(UserWarning, match=r"run from 0 to 1: bytes mean 0 \(black\) to 255.*images \* 255"):
        from_arrays(rng.integers(0, 2, (4, 8, 8, 1), dtype=np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_arrays(2 * images - 1)
        from_arrays(np.zeros((4, 8, 8, 1), np.float32))  # grey
        from_arrays(rng.integers(0, 256, (4, 8, 8, 1), dtype=np.uint8))


@pytest.mark.fast
def test_backslashes_in_a_zip_separate_folders(tmp_path: Path) -> None:
    files = {f"{split}/{name}/{i}.png": encoded(random_image(2, 2)) for split in ("train", "test") for name in "ab"
             for i in range(2)}  # fmt: skip
    labels = json.dumps({"labels": [["train\\a\\0.png", 4]]}).encode()
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as archive:
        for name, content in {"train/": b"", **files}.items():
            entry = zipfile.ZipInfo()
            entry.filename, entry.create_system = name.replace("/", "\\"), 0
            archive.writestr(entry, content)
    with zipfile.ZipFile(tmp_path / "labels.zip", "w") as archive:
        archive.writestr("train/a/0.png", encoded(random_image(2, 2)))
        archive.writestr("dataset.json", labels)
    found, plain = (
        folder(place, split="train") for place in (tmp_path / "windows.zip", write_folder(tmp_path / "a", files))
    )
    assert (len(found), found.num_classes) == (4, 2)
    np.testing.assert_array_equal(found.gather(np.arange(4))["x"], plain.gather(np.arange(4))["x"])
    np.testing.assert_array_equal(found.gather(np.arange(4))["cond"], [0, 0, 1, 1])
    assert folder(tmp_path / "labels.zip").gather(np.arange(1))["cond"] == [4]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 2, 2, 1), np.uint8), r"gave samples uint8 \(4, 2, 2, 1\); need float32 \(4, 2, 2, 1\)"),
        (np.zeros((4, 2, 2, 1), np.float64), "gave samples float64"),
        (np.zeros((4, 1, 2, 1), np.float32), r"gave samples float32 \(4, 1, 2, 1\)"),
        (np.zeros((3, 2, 2, 1), np.float32), r"gave samples float32 \(3, 2, 2, 1\)"),
        (None, "gave samples object"),
    ],
)
def test_a_source_that_gives_something_else_is_named(image: np.ndarray | None, said: str) -> None:
    class Other:
        shape, num_classes = (2, 2, 1), 0

        def __len__(self) -> int:
            return 8

        def gather(self, indices: np.ndarray) -> dict:
            return {"x": image}

    with pytest.raises(ValueError, match=rf"The source {said}.*Mend its `gather`"):
        Batches(Other(), 4, 0).at(0)


@pytest.mark.fast
def test_zips_of_other_programs_are_the_set_they_hold(tmp_path: Path) -> None:
    """Names that begin with "./", and what macOS adds at any depth."""
    files = {f"{name}/0.png": encoded(random_image(2, 2)) for name in "ab"}
    dotted = write_zip(tmp_path / "dotted.zip", {"./": b"", **{f"./{name}": data for name, data in files.items()}})
    inner = {f"set/{name}": data for name, data in files.items()}
    apple = write_zip(tmp_path / "apple.zip", {**inner, "set/__MACOSX/a/0.png": encoded(random_image(2, 2))})
    expected = folder(write_folder(tmp_path / "plain", files)).gather(np.arange(2))
    with pytest.warns(UserWarning, match="1 of the files .*__MACOSX"):
        found = [folder(dotted), folder(apple)]
    for source in found:
        assert (len(source), source.num_classes) == (2, 2)
        np.testing.assert_array_equal(source.gather(np.arange(2))["x"], expected["x"])


@pytest.mark.fast
def test_an_empty_split_is_the_whole_set(tmp_path: Path) -> None:
    """A command line cannot write None."""
    place = write_folder(tmp_path, {f"{i}.png": encoded(random_image(2, 2)) for i in range(3)})
    assert len(folder(place, split="")) == 3


# Data of every kind


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(5,), (4, 2), (2, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("memory", [2**20, 0], ids=["in memory", "on demand"])
def test_samples_of_every_rank_with_conditions_of_every_kind(shape: tuple[int, ...], memory: int) -> None:
    rng = np.random.default_rng(0)
    x, tokens, length = rng.normal(0, 5, (6, *shape)), rng.normal(0, 1, (6, 3, 4)), rng.integers(0, 9, (6, 2))
    items = [{"x": x[i], "cond": {"tokens": tokens[i], "length": length[i]}} for i in range(6)]
    lazy = from_dataset(items, value_range=None, memory=memory)
    assert isinstance(lazy, ArraySource if memory else LazySource)
    for source in (lazy, from_arrays(x, {"tokens": tokens, "length": length}, value_range=None)):
        assert (len(source), source.shape, source.num_classes) == (6, shape, 0)  # type: ignore[attr-defined]
        batches = Batches(source, 4, seed=0)
        batch, rows = batches.at(2), batches.indices(2)
        wanted = {"x": x[rows], "cond": {"tokens": tokens[rows], "length": length[rows]}}
        chex.assert_trees_all_equal(batch, jax.tree.map(lambda a: a.astype("i4" if a.dtype == int else "f4"), wanted))
        jax.tree.map(lambda a: chex.assert_type(a, np.int32 if a.dtype.kind == "i" else np.float32), batch)
    with pytest.raises(ValueError, match=r"flip mirrors images .* samples have shape"):
        Batches(lazy, 4, seed=0, flip=True)


@pytest.mark.fast
def test_numbers_are_conditions_unless_they_are_classes() -> None:
    cases: list[tuple[Any, dict[str, Any], int, Any]] = [
        (np.arange(4), {}, 4, np.int32), (np.arange(4), {"num_classes": 0}, 0, np.int32),
        (np.arange(4) / 4, {}, 0, np.float32), ([0, 1, 1, 0], {}, 2, np.int32), (np.eye(4) > 0, {}, 0, np.bool_),
    ]  # fmt: skip
    for cond, arguments, classes, kind in cases:
        source = from_arrays(GOOD, cond, **arguments)
        assert source.num_classes == classes
        np.testing.assert_array_equal(source.gather(np.arange(4))["cond"], cond)
        chex.assert_type(source.gather(np.arange(4))["cond"], kind)
        items = from_dataset([(GOOD[i], np.asarray(cond)[i]) for i in range(4)], **arguments)
        assert items.num_classes == classes
        np.testing.assert_array_equal(items.gather(np.arange(4))["cond"], cond)


class Counter:
    """An iterator with a position, as Grain's are."""

    def __init__(self) -> None:
        self.position = 0

    def __next__(self) -> dict[str, np.ndarray]:
        self.position += 1
        return numbers(self.position - 1)

    def get_state(self) -> dict[str, int]:
        """The position."""
        return {"position": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes there."""
        self.position = state["position"]


def numbers(step: int) -> dict[str, np.ndarray]:
    """Batch number `step` of a stream: four samples that carry it."""
    return {"x": np.full((4, 3), step, np.float32) + np.arange(4, dtype=np.float32)[:, None] / 8,
            "cond": np.full((4, 2), step, np.float32)}  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("make", [lambda: numbers, Counter], ids=["function", "iterator"])
def test_streams_give_the_batch_of_their_step(make: Callable[[], Any]) -> None:
    batches = Batches(from_batches(make(), (3,), value_range=None), 4, seed=0)
    for step in (0, 1, 5, 2, 2):
        chex.assert_trees_all_equal(batches.at(step), numbers(step))
    with closing(prefetch(batches, 3, 6)) as stream:
        chex.assert_trees_all_equal(list(stream), [numbers(step) for step in range(3, 6)])
    parts = [Batches(batches.source, 4, 0, process_index=p, process_count=2).at(7) for p in range(2)]
    chex.assert_trees_all_equal(jax.tree.map(lambda *a: np.concatenate(a), *parts), numbers(7))
    with pytest.raises(ValueError, match=r"gave samples float32 \(4, 3\); need float32 \(8, 3\)\. Mend its `at`"):
        Batches(batches.source, 8, seed=0).at(0)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: from_batches(iter([]), (3,)), "get_state and set_state"),
        (lambda: from_batches(numbers, (3, 0)), "A side of shape must be"),
        (lambda: from_arrays(GOOD, {"text": np.array(["a"] * 4)}), "array of <U1; need numbers. Embed"),
        (lambda: from_arrays(GOOD, {"a": np.zeros(3)}), r"shape \(3,\) for 4 samples"),
        (lambda: from_arrays(GOOD, np.full(4, np.nan)), "Conditions hold NaN"),
        (lambda: from_dataset([(GOOD[0], "a")]), "condition 'a'; need numbers"),
        (lambda: from_dataset([(GOOD[0], np.zeros(2)), (GOOD[0], np.zeros(3))]), "Item 1 has a condition of arrays"),
    ],
)
def test_data_that_cannot_be_right_are_told(make: Callable[[], Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        make()
