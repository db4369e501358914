"""Fingerprints of sources follow their images, not their names, places or labels."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_distill.data import LazySource, fingerprint, folder, from_arrays, from_dataset

pytestmark = pytest.mark.fast
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    """A BMP file: its size does not depend on what it shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of six images."""
    for number, pixels in enumerate(PIXELS):
        write(tmp_path / "images" / f"{number}.bmp", pixels)
    return tmp_path / "images"


def test_arrays() -> None:
    known = fingerprint(from_arrays(PIXELS))
    assert known == fingerprint(from_arrays(PIXELS.copy(), np.zeros(6, int))), "labels do not count"
    changed = PIXELS.copy()
    changed[3, 2, 1, 0] ^= 1
    others = [changed, PIXELS[::-1], PIXELS[:5], PIXELS.reshape(6, 4, 12, 1), np.float32(PIXELS / 127.5 - 1)]
    assert len({known, *(fingerprint(from_arrays(other)) for other in others)}) == 6


@pytest.mark.parametrize("memory", [2**20, 0], ids=["in memory", "on demand"])
def test_folders_and_zips(images: Path, tmp_path: Path, memory: int) -> None:
    known = fingerprint(folder(images, memory=memory))
    assert known and known == fingerprint(folder(images, memory=memory))
    shutil.copytree(images, tmp_path / "elsewhere", copy_function=shutil.copyfile)  # with other times
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in images.iterdir():
            archive.write(path, path.name)
    for same in (tmp_path / "elsewhere", tmp_path / "images.zip"):
        assert fingerprint(folder(same, memory=memory)) == known, same
    # One image is replaced by another of the same name, size and time.
    path, before = images / "4.bmp", (images / "4.bmp").stat()
    write(path, PIXELS[4] ^ 1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert fingerprint(folder(images, memory=memory)) != known


def test_what_is_done_to_images_counts(images: Path) -> None:
    ways = [{}, {"size": 2}, {"size": 2, "resample": "bilinear"}, {"channels": 1}]
    assert len({fingerprint(folder(images, memory=0, **way)) for way in ways}) == 4  # type: ignore[arg-type]


def test_sources_of_ones_own() -> None:
    assert isinstance(from_dataset(PIXELS, memory=0), LazySource)
    assert fingerprint(from_dataset(PIXELS, memory=0)) == "", "nothing is known but by looking at all of them"
    assert fingerprint(from_dataset(PIXELS, memory=0, identity=lambda: "version 3")) == "version 3"
    assert fingerprint(from_dataset(PIXELS)) == fingerprint(from_arrays(PIXELS)), "in memory all is known"

    class Own:
        shape, num_classes = (4, 4, 3), 0

        def __len__(self) -> int:
            return 6

        def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            return {"x": (PIXELS[indices] / 127.5 - 1).astype(np.float32)}

    assert fingerprint(Own()) == ""
    Own.fingerprint = lambda self: "mine"  # type: ignore[attr-defined]
    assert fingerprint(Own()) == "mine"
