"""Parameters of a small network and files that hold them, for the tests of weights."""

from __future__ import annotations

import contextlib
import hashlib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import places
import pytest
from flax import serialization

from diffusion_distill.denoisers.model import Model
from diffusion_distill.networks import UNet
from diffusion_distill.weights import (
    matching,
    shapes_of,
)

BTD = places.SMALL / "btd"
EDM = places.SMALL / "edm"
FULL_EDM = places.GOLDEN / "edm"
needs_full = pytest.mark.skipif(not FULL_EDM.is_dir(), reason="needs the optional sibling folder ../shared/golden")
UNET = {"ch": 32, "emb_ch": 8, "out_ch": 1, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()}
MODEL = Model(UNet(**UNET, num_heads=2), (4, 4, 1))
SHAPES = shapes_of(MODEL)
KERNEL = "mid.block_1/conv1/kernel"  # a 3x3 convolution, (3, 3, 32, 32)
DENSE = "dense0/kernel"  # (32, 8)
NORM = "norm_out/scale"  # (32,)
Flat = dict[str, Any]
MIB = 2**20


def random_arrays(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Flat:
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape, dtype=np.float32) for path, shape in shapes.items()}


def content_of(params: Flat, **others: Any) -> dict[str, Any]:
    """A checkpoint's content in the layout of the released files."""
    content = {"step": np.asarray(7, np.int32), "num_sample_steps": 8, "optimizer": None}
    return {**content, "ema_params": matching.unflatten(params), **others}


def write(path: Path, content: Any) -> Path:
    """Writes as the published program did."""
    path.write_bytes(content if isinstance(content, bytes) else serialization.msgpack_serialize(content))
    return path


def assert_same(tree: Any, flat: Flat) -> None:
    found = matching.flatten(tree)
    assert found.keys() == flat.keys()
    for path, array in flat.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], array)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def spoil(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[3] = value
    return array


class Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("something was executed",))


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def bounded(peak: int | None) -> Iterator[None]:
    """What happens inside takes no more memory; None does not ask, as asking takes several times longer.

    Work is bounded by `pickle_stream`'s own limits, of which "too many operations" below are tests.
    """
    if peak:
        tracemalloc.start()
    try:
        yield
        assert not peak or tracemalloc.get_traced_memory()[1] < peak
    finally:
        tracemalloc.stop()
