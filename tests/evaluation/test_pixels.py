"""Pixels as features."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_distill.evaluation import (
    pixel_features,
)

# Pixels as features


def test_pixels_are_flattened_in_order_and_clipped() -> None:
    images = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3) / 24
    np.testing.assert_array_equal(pixel_features(images).ravel(), images.ravel())
    assert pixel_features(images).shape == (2, 12)
    np.testing.assert_array_equal(pixel_features(images * 200 - 100)[:, [0, -1]], [[-1, -1], [0, 1]])
    with pytest.raises(TypeError, match="uint8"):
        pixel_features(images.astype(np.uint8))
    with pytest.raises(ValueError, match=r"\(2, 12\)"):
        pixel_features(images.reshape(2, 12))
