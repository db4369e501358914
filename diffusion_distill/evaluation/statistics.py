"""Statistics of features that arrive in batches: moments in constant memory, and raw features on disk.

`Accumulator` holds the sums of f - c and (f - c)(f - c)^T, with c the mean of the first batch. Near the mean nothing
cancels, so an offset common to all features costs no digits, and a batch costs one product of matrices. Its state is
saved and loaded without any change, so a run that is stopped and resumed gives identical numbers.

`Blocks` gives the same bits whatever the sizes of the batches too: two programs that measure the same images in other
batches agree to the last digit.

Kernel distance, precision and recall need the features themselves. `FeatureStore` keeps them in one file, addressed by
the number of the image; what was written before an interruption may be written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.base.errors import positive_int
from diffusion_distill.base.files import user_path
from diffusion_distill.evaluation.frechet import Moments, merge, moments
from diffusion_distill.evaluation.pixels import as_features, check_same_width, checked_features

#: Rows that `Blocks` sums together.
ROWS = 1024


class Accumulator:
    """Moments of features that arrive in batches, float64.

    Attributes:
        count: images seen so far.
        width: features per image, or None before the first batch.
    """

    def __init__(self) -> None:
        self.count = 0
        self._center = self._sum = np.zeros(0)
        self._outer = np.zeros((0, 0))

    @property
    def width(self) -> int | None:
        """Features per image, or None before the first batch."""
        return len(self._center) if self.count else None

    def add(self, features: ArrayLike) -> None:
        """Adds a batch [n, width].

        Raises:
            ValueError: another rank, another width than before, or rows that are not finite; nothing is added then.
        """
        features = checked_features("Features", features)
        if self.width is None:
            self._start(features.mean(axis=0))
        check_same_width(len(self._center), features.shape[1])
        shifted = features - self._center
        self.count += len(features)
        self._sum += shifted.sum(axis=0)
        self._outer += shifted.T @ shifted

    def merge(self, other: Accumulator) -> None:
        """Adds all that another one has seen, for instance on another host.

        Raises:
            ValueError: another width.
        """
        if not other.count:
            return
        both = merge(self.moments(), other.moments()) if self.count else other.moments()
        self._start(both.mean)
        self.count = other.count + self.count
        self._outer += both.cov * (self.count - 1)

    def moments(self) -> Moments:
        """Count, mean and covariance of everything added.

        Raises:
            ValueError: nothing was added.
        """
        if not self.count:
            raise ValueError("No features were added, so there are no moments. Add at least one batch.")
        shift = self._sum / self.count
        scatter = self._outer - np.outer(self._sum, shift)
        return Moments(self.count, self._center + shift, scatter / max(self.count - 1, 1))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state, for `numpy.savez`."""
        sums = {"center": self._center, "sum": self._sum, "outer": self._outer}
        return {"count": np.asarray(self.count), **{name: array.copy() for name, array in sums.items()}}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Accumulator:
        """An accumulator in a saved state; the arrays are copied.

        Raises:
            ValueError: arrays are missing, do not fit together or are not finite.
        """
        names = ("count", "center", "sum", "outer")
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"The state lacks {missing}; it has {sorted(arrays)}. Pass what `to_arrays` gave.")
        self = cls()
        self.count = int(arrays["count"])
        self._center, self._sum, self._outer = (np.array(arrays[name], np.float64) for name in names[1:])
        width = len(self._center) if self._center.ndim == 1 else -1
        fits = self._sum.shape == (width,) and self._outer.shape == (width, width) and (self.count > 0) == (width > 0)
        if not fits or self.count < 0 or not all(np.isfinite(arrays[name]).all() for name in names[1:]):
            shapes = {name: np.shape(arrays[name]) for name in names[1:]}
            raise ValueError(
                f"The state does not fit together: count {self.count}, shapes {shapes}, or values that are not finite. "
                "The file may be damaged: delete it and start this evaluation again."
            )
        return self

    def _start(self, center: NDArray[np.float64]) -> None:
        """Empty sums around a center."""
        self._center, self._sum = center.copy(), np.zeros_like(center)
        self._outer = np.zeros((len(center), len(center)))


class Blocks:
    """Moments of features that arrive in batches of any size: the same to the last bit however they are cut.

    Rows are summed in blocks of `ROWS`, or of as many as there are features if those are more, so that fewer images
    than features keep all digits (`Moments.centred`). Rows of a block that is not full yet are kept as they are.
    """

    def __init__(self) -> None:
        self._summed: Moments | None = None
        self._rest: NDArray[Any] | None = None
        self._found: Moments | None = None

    def add(self, features: ArrayLike) -> None:
        """Adds a batch [n, width].

        Raises:
            ValueError: another rank, another width than before, or rows that are not finite; nothing is added then.
        """
        rows = as_features("Features", features)
        if self._rest is not None:
            check_same_width(self._rest.shape[1], rows.shape[1])
            rows = np.concatenate([self._rest, rows])
        block = max(ROWS, rows.shape[1])
        while len(rows) > block:
            first, rows = moments(rows[:block]), rows[block:]
            self._summed = merge(self._summed, first) if self._summed else first
        self._rest, self._found = rows.copy(), None

    def moments(self) -> Moments:
        """Count, mean and covariance of everything added: the same object until more is added.

        Raises:
            ValueError: nothing was added.
        """
        if self._found is None:
            if self._rest is None:
                raise ValueError("No features were added, so there are no moments. Add at least one batch.")
            rest = moments(self._rest)
            self._found = merge(self._summed, rest) if self._summed else rest
        return self._found

    @classmethod
    def of(cls, known: Moments) -> Blocks:
        """Moments that came from elsewhere, such as published ones."""
        found = cls()
        found._summed = found._found = known
        return found

    def to_arrays(self) -> dict[str, Any]:
        """The state, for `numpy.savez`: count, mean and cov of the full blocks, and the rows of the rest."""
        summed, rest = self._summed, self._rest
        arrays = {"count": summed.count, "mean": summed.mean, "cov": summed.cov} if summed else {}
        return arrays if rest is None else {**arrays, "rest": rest}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Blocks:
        """The object whose state `to_arrays` saved."""
        known = "mean" in arrays
        found = cls.of(Moments(int(arrays["count"]), arrays["mean"], arrays["cov"])) if known else cls()
        if "rest" in arrays:
            found._rest, found._found = arrays["rest"], None
        return found


class FeatureStore:
    """Raw features of a known number of images in one .npy file, float32 [count, width], mapped into memory.

    Opens the file, or makes it if there is none; rows that have not been written hold NaN.

    Raises:
        ValueError: the file holds an array of another shape or type, or is no .npy file; sizes below 1.
    """

    def __init__(self, path: str | Path, count: int, width: int) -> None:
        self.path = user_path(path)
        shape = (positive_int("count", count), positive_int("width", width))
        if not self.path.exists():
            self._rows = np.lib.format.open_memmap(self.path, mode="w+", dtype=np.float32, shape=shape)
            self._rows[:] = np.nan
            return
        try:
            self._rows = np.lib.format.open_memmap(self.path, mode="r+")
        except ValueError as error:
            raise ValueError(f"{self.path} is no .npy file of numbers ({error}). Delete it or name another.") from error
        if self._rows.shape != shape or self._rows.dtype != np.float32:
            raise ValueError(
                f"{self.path} holds {self._rows.dtype} {self._rows.shape}; this run needs float32 {shape}. "
                "It is of other settings: delete it, or give this run a folder of its own."
            )

    def write(self, start: int, features: ArrayLike) -> None:
        """Writes the features [n, width] of the images start, start + 1, ...

        Raises:
            ValueError: another width, rows that are not finite, or images beyond the last.
        """
        features = as_features("Features", features)
        check_same_width(self._rows.shape[1], features.shape[1])
        if start < 0 or start + len(features) > len(self._rows):
            raise ValueError(
                f"Images {start} to {start + len(features) - 1} are outside of the store's 0 to {len(self._rows) - 1}."
            )
        self._rows[start : start + len(features)] = features

    def flush(self) -> None:
        """Returns when everything is on disk."""
        self._rows.flush()

    @property
    def missing(self) -> int:
        """The number of images whose features have not been written."""
        return int(np.isnan(self._rows[:, 0]).sum())

    def read(self) -> NDArray[np.float32]:
        """All features [count, width], mapped and read-only.

        Raises:
            ValueError: some are missing.
        """
        if self.missing:
            raise ValueError(f"{self.missing} of {len(self._rows)} images are not in {self.path} yet. Finish the run.")
        rows = self._rows.view()
        rows.flags.writeable = False
        return rows
