"""Reference statistics on disk, in the layouts of published programs, told apart by the names of their arrays.

| layout   | arrays                                                            | programs                              |
|----------|-------------------------------------------------------------------|---------------------------------------|
| moments  | mu [w], sigma [w, w]                                              | EDM, pytorch-fid, TTUR                |
| openai   | also mu_s, sigma_s (spatial features, sFID), arr_0 (some images)  | guided-diffusion, consistency models  |
| images   | arr_0 uint8 [n, h, w, c], arr_1 labels [n]                        | OpenAI's sample batches               |
| features | pool_3 [n, w]                                                     | score_sde                             |
| tract    | two files: NAME_mean.npy [w], NAME_std.npy [w, w], the covariance | TRACT                                 |

Nothing in these files says which network, resize rule or images they are of: files of EDM and of pytorch-fid look alike
and must not be mixed. A file may say it in one more array, `meta` (JSON), which the other programs do not read; or a
file NAME.facts.json beside a published file NAME may say it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion_distill.base import npz_file
from diffusion_distill.base.files import EDITED, stand_in_of, user_path
from diffusion_distill.evaluation.frechet import Moments
from diffusion_distill.evaluation.pixels import as_features
from diffusion_distill.evaluation.statistics import Accumulator

#: What a reference should state about itself.
FACTS = ("dataset", "images", "network", "resize", "quantisation")
EDM2 = (
    'The statistics of EDM2 are such pickles. Where you trust the file, turn it into an .npz once: python -c "import '
    "numpy, pickle; d = pickle.load(open('FILE.pkl', 'rb'))['fid']; numpy.savez('FILE.npz', mu=d['mu'], "
    "sigma=d['sigma'])\" (its network is FID's InceptionV3, 'fd_dinov2' is of another)."
)
ROWS = 4096  # features converted to float64 at a time


@dataclass(frozen=True, eq=False)
class Reference:
    """A file of reference statistics.

    Attributes:
      path, sha256: the file (of TRACT's two, the mean; the hash is that of both, one after the other).
      layout: which of the table above.
      moments: of the features; None if the file holds images only.
      spatial: of the spatial features, for the sFID, if there are any.
      facts: what the file says about itself, with `FACTS` as keys.
    """

    path: Path
    sha256: str
    layout: str
    moments: Moments | None
    spatial: Moments | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def images(self) -> NDArray[np.uint8]:
        """The images [n, height, width, channels] in the file, read now.

        Raises:
          ValueError: there are none, or they are not uint8 of this rank.
        """
        images = self._array("arr_0", "images")
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            raise ValueError(f"{self.path}: arr_0 is {images.dtype} {images.shape}; need uint8 [n, h, w, channels].")
        return images

    def labels(self) -> NDArray[np.integer]:
        """The labels [n] of the images, read now.

        Raises:
          ValueError: there are none, or they are no integers [n].
        """
        labels = self._array("arr_1", "labels")
        if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
            raise ValueError(f"{self.path}: arr_1 is {labels.dtype} {labels.shape}; need integers [n].")
        return labels

    def features(self) -> NDArray[np.floating]:
        """The features [n, width] in the file, read now.

        Raises:
          ValueError: there are none, or they are not finite.
        """
        return as_features(f"{self.path}: pool_3", self._array("pool_3", "features"))

    def _array(self, key: str, what: str) -> np.ndarray:
        arrays = {} if self.layout == "tract" else _load(self.path, (key,))
        if key not in arrays:
            raise ValueError(f"{self.path} (layout {self.layout}) holds no {what}; they would be its array `{key}`.")
        return arrays[key]


def read_reference(path: str | Path, count: int | None = None) -> Reference:
    """Reads a file in one of the layouts above; pickles are refused.

    Args:
      path: an .npz, or TRACT's NAME_mean.npy with NAME_std.npy beside it.
      count: the number of images behind the moments, used if the file does not state it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, none of the layouts, or arrays whose shapes, symmetry or values cannot be right.
    """
    path = user_path(path)
    pair = _tract_files(path)
    for file in pair or (path,):
        if not file.is_file():
            raise FileNotFoundError(f"No file {file}. Give the path of reference statistics (.npz).")
    if pair:
        arrays = {"mu": _load_npy(pair[0]), "sigma": _load_npy(pair[1])}
        layout, facts = "tract", _facts_beside(path)
    else:
        arrays = _load(path, ("mu", "sigma", "mu_s", "sigma_s", "pool_3", "meta"))
        layout, facts = _layout(path, arrays), _facts_within(path, arrays) or _facts_beside(path)
    count = facts.get("images") or count
    sha256 = sha256_of(*(pair or (path,)))
    try:
        if layout == "features":
            found = _moments_of(arrays["pool_3"])
        else:
            found = _moments(arrays, "", count)
        spatial = _moments(arrays, "_s", count)
    except ValueError as error:
        raise ValueError(f"{path} (layout {layout}): {error}") from error
    return Reference(path, sha256, layout, found, spatial, facts)


def sha256_of(*paths: str | Path) -> str:
    """SHA-256 of files, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    return digest.hexdigest()


def _layout(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """The layout of an .npz by its keys."""
    if {"mu", "sigma"} <= arrays.keys():
        return "openai" if arrays.keys() & {"mu_s", "arr_0"} else "moments"
    for key, layout in (("pool_3", "features"), ("arr_0", "images")):
        if key in arrays:
            return layout
    raise ValueError(
        f"{path} holds {sorted(arrays)}, which is no known layout. "
        "Known: mu and sigma (EDM, pytorch-fid, OpenAI), pool_3 (score_sde), arr_0 (images)."
    )


def _moments(arrays: Mapping[str, np.ndarray], suffix: str, count: int | None) -> Moments | None:
    """Moments of mu and sigma, checked; None if there are none."""
    if f"mu{suffix}" not in arrays:
        return None
    if f"sigma{suffix}" not in arrays:
        raise ValueError(f"there is mu{suffix}, but no sigma{suffix}.")
    mean, cov = (arrays[f"{name}{suffix}"] for name in ("mu", "sigma"))
    for name, array in (("mu", mean), ("sigma", cov)):
        if array.dtype.kind != "f":
            raise ValueError(f"{name}{suffix} is {array.dtype}; need floats.")
    if mean.ndim == 1 and cov.shape == 2 * mean.shape:  # others are told by `Moments`, before any copy
        mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if cov.ndim == 2 and (cov.diagonal() < 0).any():
        raise ValueError(f"sigma{suffix} has negative variances, so it is no covariance.")
    return Moments(count, mean, cov)


def _moments_of(features: np.ndarray) -> Moments:
    """Moments of stored features, a block at a time."""
    accumulator = Accumulator()
    features = as_features("pool_3", features)
    for start in range(0, len(features), ROWS):
        accumulator.add(features[start : start + ROWS])
    return accumulator.moments()


def _tract_files(path: Path) -> tuple[Path, Path] | None:
    """TRACT's mean and covariance for either of their paths."""
    if path.suffix != ".npy":
        return None
    stem, _, part = path.stem.rpartition("_")
    if part not in ("mean", "std"):
        raise ValueError(f"{path} is no .npz and is not called NAME_mean.npy or NAME_std.npy as TRACT's files are.")
    return path.with_name(f"{stem}_mean.npy"), path.with_name(f"{stem}_std.npy")


def _load(path: Path, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The wanted arrays of an .npz; of any others only the names, with empty arrays."""
    try:
        return npz_file.read(path, wanted)
    except npz_file.UNREADABLE as error:
        raise ValueError(f"{path} is not an .npz file of plain arrays: {_reason(path, error)}.") from error


def _load_npy(path: Path) -> np.ndarray:
    try:
        return npz_file.read_npy(path)
    except npz_file.UNREADABLE as error:
        raise ValueError(f"{path} is not an .npy file of a plain array: {_reason(path, error)}.") from error


def _reason(path: Path, error: Exception) -> str:
    found = stand_in_of(path)
    return f"it is {found}. {EDM2}".removesuffix(".") if "pickle" in found else found or f"{error}; it may be damaged"


def _facts_within(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if "meta" not in arrays:
        return {}
    return _checked_facts(path, str(arrays["meta"]))


def _facts_beside(path: Path) -> dict[str, Any]:
    pair = _tract_files(path)
    beside = _beside(pair[0] if pair else path)
    return _checked_facts(beside, beside.read_text(encoding=EDITED)) if beside.is_file() else {}


def _checked_facts(path: Path, text: str) -> dict[str, Any]:
    """The facts of a JSON text."""
    try:
        facts = json.loads(text)
    except ValueError:
        facts = None
    images = facts.get("images") if isinstance(facts, dict) else None
    if not isinstance(facts, dict) or not (images is None or (type(images) is int and images > 0)):
        raise ValueError(f"{path} states {text[:80]!r} about its statistics; need a JSON object with `images` > 0.")
    return facts


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".facts.json")
