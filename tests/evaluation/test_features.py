"""Features: the input rules of InceptionV3, pixels, and functions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distill.evaluation import features
from diffusion_distill.evaluation.features import FromFunction, Inception, Pixels, network_input
from diffusion_distill.evaluation.inception_network import SIZE
from diffusion_distill.training.sharding import data_mesh, replicated

Flat = dict[str, np.ndarray]

# ---------------------------------------------------------------- its input


@pytest.mark.fast
@pytest.mark.parametrize("length", [1, 2, 32, 64, 299, 300, 1000])
def test_a_ramp_shows_where_each_pixel_comes_from(length: int) -> None:
    i = np.arange(SIZE)
    places = {"pytorch_fid": (i + 0.5) * length / SIZE - 0.5, "tensorflow": i * length / SIZE}
    for rule, place in places.items():
        weights = features.interpolation(length, rule)
        expected = np.clip(place, 0, length - 1)
        np.testing.assert_allclose(weights @ np.arange(length), expected, rtol=0, atol=1e-4 * max(1, length / 300))
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-6)
        for row, at in zip(weights, expected, strict=True):
            assert set(np.flatnonzero(row)) <= {int(np.floor(at)), int(np.ceil(at))}


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(32, 32), (40, 17), (400, 320)])
def test_half_pixel_rule_is_that_of_jax_without_antialiasing(shape: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), np.uint8)
    with jax.numpy_rank_promotion("allow"):
        resized = jax.image.resize(images.astype(np.float32), (1, SIZE, SIZE, 3), "bilinear", antialias=False)
    found = network_input(images, "pytorch_fid")
    # jax.image computes the places in float32: 400 of them have an error of 2e-5 pixels.
    np.testing.assert_allclose(found, resized / 127.5 - 1, rtol=0, atol=1e-4)


@pytest.mark.fast
def test_ranges_and_grey() -> None:
    greys = np.stack([np.full((4, 6, 1), value, np.uint8) for value in (0, 127, 128, 255)])
    for rule, expected in {
        "pytorch_fid": [-1, 127 / 127.5 - 1, 128 / 127.5 - 1, 1],
        "tensorflow": [-1, -1 / 128, 0, 127 / 128],
    }.items():
        found = np.asarray(network_input(greys, rule))
        assert found.shape == (4, SIZE, SIZE, 3)
        assert found.dtype == np.float32
        wanted = np.broadcast_to(np.array(expected)[:, None, None, None], found.shape)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
        colours = jnp.asarray(np.repeat(greys, 3, axis=-1))
        np.testing.assert_allclose(found, network_input(colours, rule), rtol=0, atol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("images", "error", "said"),
    [
        (np.zeros((1, 4, 4, 3), np.float32), TypeError, "dtype float32; need uint8"),
        (np.zeros((4, 4, 3), np.uint8), ValueError, r"shape \(4, 4, 3\); need \[n, height, width, channels\]"),
        (np.zeros((1, 4, 4, 2), np.uint8), ValueError, r"\[n, h, w, 1\] for grey"),
        (np.zeros((0, 4, 4, 3), np.uint8), ValueError, r"shape \(0, 4, 4, 3\)"),
    ],
)
def test_other_images_are_refused(images: np.ndarray, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Inception({})(images)


# ---------------------------------------------------------------- other features


@pytest.mark.fast
def test_pixels_and_functions_are_features() -> None:
    images = np.arange(2 * 2 * 3 * 1, dtype=np.uint8).reshape(2, 2, 3, 1) * 20
    own = FromFunction(lambda images: images.reshape(len(images), -1).mean(axis=1, keepdims=True), "mean", 1)
    every: list[features.Features] = [Pixels((2, 3, 1)), own]
    assert [(f.name, f.width) for f in every] == [("pixels", 6), ("mean", 1)]
    found = every[0](images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images.reshape(2, 6) / 127.5 - 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(every[1](images), [[50], [170]])
    with pytest.raises(ValueError, match=r"need \[n, 2, 3, 1\]"):
        every[0](images[:, :1])
    with pytest.raises(TypeError, match="need uint8"):
        every[0](images / 255)
    with pytest.raises(ValueError, match=r"'mean' of 2 images have shape \(2, 1\); need \[2, 4\]"):
        dataclasses.replace(own, width=4)(images)


@pytest.mark.fast
def test_inception_splits_images_over_the_devices_that_have_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is replaced by channel means, so that nothing large is compiled."""
    places = []

    def means(params: Any, x: jax.Array, dtype: str) -> features.Outputs:
        places.append([shard.data.shape[0] for shard in x.addressable_shards])
        return features.Outputs(*[jnp.asarray(params["scale"] * x.mean(axis=(1, 2)))] * 7)

    monkeypatch.setattr(features, "_outputs", means)
    images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
    params, mesh = {"scale": jnp.float32(2)}, data_mesh()
    one, all_devices = Inception(params), Inception(jax.device_put(params, replicated(mesh)))
    for found, expected in zip(all_devices(images), one(images), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert places == [[2] * mesh.size, [11]], "11 images on 8 devices are filled up to 16"
    with pytest.raises(TypeError, match="need uint8"):
        all_devices(images.astype(np.float32))
