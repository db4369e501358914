"""Features and recorded numbers for the tests of metrics; the recorded ones lie in ../shared, where that is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import places
import pytest

GOLDEN = places.GOLDEN / "eval"
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
