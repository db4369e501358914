"""Moments of features that arrive in batches, in constant memory.

`Accumulator` holds the sums of f - c and (f - c)(f - c)^T, with c the mean of the first batch. Near the mean nothing
cancels, so an offset common to all features costs no digits, and a batch costs one product of matrices. Its state is
saved and loaded without any change, so a run that is stopped and resumed gives identical numbers.

`Blocks` gives the same bits whatever the sizes of the batches too: two programs that measure the same images in other
batches agree to the last digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
