"""Fixtures of distances on real images (folder eval): real_data.json.

The definitions are the README's: pixels in [-1, 1], 64 principal components of the reference, and these whitened. The
images come from the data packs; what is drawn comes from NumPy's PCG64 by the seeds that the file states. The README's
tolerance is 1e-4 with the same JPEG decoder. Whole sets are 3072 pixels wide: the CIFAR part takes minutes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pca import Pca, principal_components

from diffusion_distill.data import digits, npz
from diffusion_distill.data.decode import decode
from diffusion_distill.data.sources import to_unit_range
from diffusion_distill.evaluation import Accumulator, Moments, frechet_terms, merge, moments
from golden_checks.common import FLOAT64, Fixture, Kind, Mode, absolute, keys_like, relative

CLOSE = relative(1e-4)
ROWS = 4096
PACKS = {"mnist": "mnist_t10k.npz", "cifar10": "cifar10_jpeg_compact.npz"}


def check_real_data(fixture: Fixture, mode: Mode) -> None:
    for name in (name for name, block in fixture.meta.items() if "distances" in block):
        pack = next((file for start, file in PACKS.items() if name.startswith(start)), None)
        if pack and not (fixture.data / pack).is_file():
            fixture.skip(keys_like(fixture, f"{name}/*"), f"needs the data pack {pack}")
            continue
        check_block(fixture, mode, name, block_of(name, fixture))


@dataclass
class Block:
    """A reference set and where the sets that are compared with it come from.

    Images are whole levels 0..top, [n, height, width, channels].
    """

    reference: np.ndarray
    others: np.ndarray  # the rest of the same images
    top: int = 255
    fitted_every: int = 1  # every how many images of the reference the Gaussian is fitted to

    @cached_property
    def moments(self) -> Moments:
        """Of the reference's pixels."""
        return self.moments_of(self.reference)

    def moments_of(self, images: Any) -> Moments:
        """Moments of the pixels of images, or moments as they are."""
        if isinstance(images, Moments):
            return images
        width = images[0].size
        if len(images) <= width:
            return moments(self.pixels(images))
        accumulator = Accumulator()
        for start in range(0, len(images), ROWS):
            accumulator.add(self.pixels(images[start : start + ROWS]))
        return accumulator.moments()

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """float32 [n, width] in [-1, 1] of levels."""
        return to_unit_range(images.astype(np.float32), (0.0, float(self.top))).reshape(len(images), -1)

    def uniform_noise(self, n: int) -> np.ndarray:
        """Every level alike; the bytes' type decides how the generator draws them."""
        dtype = np.uint8 if self.top == 255 else np.int64
        return rng(2).integers(0, self.top + 1, (n, *self.reference.shape[1:]), dtype)

    def mean_image(self, n: int) -> Moments:
        """The mean, n times."""
        return Moments(n, self.moments.mean.astype(np.float32).astype(np.float64), np.zeros_like(self.moments.cov))

    def fitted_gaussian_quantised(self, n: int) -> np.ndarray:
        """Samples of a Gaussian of the reference's moments, by the symmetric root of the covariance."""
        of = self.moments if self.fitted_every == 1 else self.moments_of(self.reference[:: self.fitted_every])
        values, vectors = np.linalg.eigh(of.cov)
        root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
        x = of.mean + rng(1).standard_normal((n, of.width)) @ root
        return np.rint((np.clip(x, -1, 1) + 1) * (self.top / 2)).reshape(n, *self.reference.shape[1:])

    def random_subset(self, n: int) -> np.ndarray:
        """Images of the reference."""
        return self.reference[rng(100 + n).permutation(len(self.reference))[:n]]


@dataclass
class CifarTrain(Block):
    """All training images against, among others, the test images, which are the `others`."""

    fitted_every: int = 5

    @cached_property
    def moments(self) -> Moments:
        """Of both random halves, which another block needs too."""
        return merge(*(self.moments_of(half) for half in halves(self.reference)))

    def test_mirrored(self, n: int) -> np.ndarray:
        """Left and right exchanged."""
        return self.others[:n, :, ::-1]

    def test_box_blur2(self, n: int) -> np.ndarray:
        """Means of 2x2 blocks, not rounded."""
        blocks = self.others[:n].reshape(n, 16, 2, 16, 2, 3).mean(axis=(2, 4))
        return blocks.repeat(2, axis=1).repeat(2, axis=2)

    def test_jpeg_again_shifted_grid(self, n: int) -> np.ndarray:
        """Encoded again as JPEG of quality 75, with blocks that start 4 pixels earlier."""
        padded = np.pad(self.others[:n], ((0, 0), (4, 12), (4, 12), (0, 0)), mode="reflect")
        return np.stack([again(image) for image in padded])[:, 4:36, 4:36]

    def class_airplane_train(self, n: int) -> np.ndarray:
        """The first class."""
        return self.reference[:n]

    def test_random_subset(self, n: int) -> np.ndarray:
        """Test images."""
        return self.others[rng(5).permutation(len(self.others))[:n]]

    def train_random_subset(self, n: int) -> np.ndarray:
        """Training images."""
        return self.random_subset(n)


def rng(seed: int) -> np.random.Generator:
    """The generator of the README."""
    return np.random.Generator(np.random.PCG64(seed))


def halves(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Random halves by seed 100; the first is the reference."""
    order = rng(100).permutation(len(images))
    return images[order[: len(images) // 2]], images[order[len(images) // 2 :]]


def again(image: np.ndarray) -> np.ndarray:
    """An image after a turn through JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=75)
    return decode(buffer.getvalue(), "an image encoded again")


# ------------------------------------------------------------------------------------------------- blocks


def block_of(name: str, fixture: Fixture) -> Block:
    """The sets of a block, by its name."""
    count = int(fixture.input(f"{name}/n_ref"))
    if name == "digits":
        images = digits("all").x
        return Block(images[:count], images[count:], top=16)
    if name.startswith("mnist"):
        images = npz(fixture.data / PACKS["mnist"]).x
        first, second = halves(images)
        sets = {
            "mnist_first5000": (images[:count], images[count:]),
            "mnist_random_half": (first, second),
            "mnist_even_odd": (images[::2], images[1::2]),
            "mnist_full": (images, images[:0]),
        }
        return Block(*sets[name])
    train, test = cifar(fixture.data / PACKS["cifar10"])
    if name.endswith("random_half"):
        return Block(*halves(train))
    return CifarTrain(train, test)


def cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) images of the pack of JPEG files that share their header."""
    with np.load(path) as pack:
        header, body, offset, is_test = pack["header"].tobytes(), pack["body"], pack["offset"], pack["is_test"]
    pieces = (header + body[a:b].tobytes() for a, b in pairwise(offset))
    images = np.stack([decode(piece, f"image {i}") for i, piece in enumerate(pieces)])
    return images[~is_test], images[is_test]


# ------------------------------------------------------------------------------------------------- checks


def check_block(fixture: Fixture, mode: Mode, name: str, block: Block) -> None:
    reference = block.moments
    pca = principal_components(reference)
    white = pca.whiten()
    spaces = {"pca64": pca, "pca64_whitened": white}
    fixture.equal(f"{name}/n_ref", len(block.reference))
    fixture.equal(f"{name}/dim", reference.width)
    fixture.equal(f"{name}/pca_dims", len(pca.variances))
    fixture.equal(f"{name}/pca_dims_whitened", len(white.variances))
    fixture.compare(f"{name}/trace_cov", np.trace(reference.cov), mode, CLOSE)
    fixture.compare(f"{name}/pca_explained_fraction", pca.explained, mode, CLOSE)
    for match in fixture.matches(rf"{name}/eigenvalues_top(\d+)"):
        fixture.compare(match[0], pca.variances[: int(match[1])], mode, CLOSE)
    for match in fixture.matches(rf"({name}/distances/(\w+))/n"):
        count = int(fixture.input(match[0]))
        make = maker(block, match[2])
        if make is not None:
            compare_distances(fixture, mode, match[1], distances(reference, block.moments_of(make(count)), spaces))
    for match in fixture.matches(rf"({name}/random_(\d+)_\d+_splits_seeds_(\d+)_to_(\d+))/pixel_fd"):
        images = np.concatenate([block.reference, block.others])
        found = []
        for seed in range(int(match[3]), int(match[4]) + 1):
            order = rng(seed).permutation(len(images))
            one, other = (block.moments_of(images[part]) for part in np.split(order, [int(match[2])]))
            pca = principal_components(one)
            found.append(distances(one, other, {"pca64": pca, "pca64_whitened": pca.whiten()}))
        for key in found[0]:
            fixture.compare(f"{match[1]}/{key}", np.array([split[key] for split in found]), mode, CLOSE)


def maker(block: Block, name: str) -> Callable[[int], Any] | None:
    """What makes the set of a distance, or None if the README does not say how it was drawn."""
    if re.fullmatch(r"last_\d+|other_\w+|odd|test_\d+", name):
        return lambda n: block.others[:n]
    return getattr(block, re.sub(r"(_\d+)+$", "", name), None)


def distances(reference: Moments, other: Moments, spaces: Mapping[str, Pca]) -> dict[str, float]:
    """The distances of the README by their names, of pixels and in the reference's principal components."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*covariance is singular", UserWarning)
        terms = frechet_terms(reference, other)
        inside = {
            f"{name}_fd": sum(frechet_terms(p.moments(reference), p.moments(other))) for name, p in spaces.items()
        }
    return {"pixel_fd_mean_term": terms.mean, "pixel_fd": sum(terms), **inside}


def compare_distances(fixture: Fixture, mode: Mode, key: str, found: dict[str, float]) -> None:
    for name, value in found.items():
        rule = CLOSE
        if name == "pixel_fd_mean_term":  # where the means agree, their distance is rounding
            rule = absolute(1e-4 * float(fixture.arrays[f"{key}/pixel_fd"]), " absolute (1e-4 of the distance)")
        fixture.compare(f"{key}/{name}", value, mode, rule)


def skips(fixture: Fixture) -> list[tuple[list[str], str]]:
    return [
        (keys_like(fixture, "definitions/*"), "words"),
        (keys_like(fixture, "jpeg_proxy/*"), "describes the data pack"),
        (keys_like(fixture, "*/distances/independent_pixels_*"), "the file does not say how it was drawn"),
    ]


KINDS = [
    Kind(
        "distances of real images",
        lambda f: any(isinstance(block, dict) and {"n_ref", "distances"} <= block.keys() for block in f.meta.values()),
        check_real_data,
        skips,
        (FLOAT64,),
    )
]
