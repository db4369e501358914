"""JAX's switches change no promise: images are float32, and the same seed gives the same images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import toys

from diffusion_distill import api, data
from diffusion_distill.base.seeds import key_of
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising, Tract
from diffusion_distill.networks import UNet
from diffusion_distill.training.artefact import Artefact

SWITCHES: dict[str, Any] = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_debug_nans": True,
    "jax_default_prng_impl": "rbg",
    "jax_disable_jit": True,
}
EVERY = [pytest.param(name, marks=[pytest.mark.slow] if name == "jax_disable_jit" else []) for name in SWITCHES]
UNET = UNet(
    ch=32, emb_ch=8, out_ch=1, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(2,), num_heads=1, num_classes=3
)


def drawn(*names: str) -> dict[str, np.ndarray]:
    """Images of fresh parameters and labels, drawn with noise in each row, guidance, more registers."""
    model = Model(UNET, (2, 2, 1), prediction="v")
    found = Artefact(model, model.init(key_of(0)))
    hows: dict[str, dict[str, Any]] = {
        "ddim": {}, "ancestral": {"solver": "ancestral"}, "guided": {"guidance": {"scale": 2.0}},
        "dpm": {"solver": "dpm_solver++"},
    }  # fmt: skip
    return {name: api.sample(found, 2, 2, seed=3, **hows[name]) for name in names or hows}


@pytest.fixture(scope="module")
def usual() -> dict[str, np.ndarray]:
    return drawn()


@pytest.fixture
def switched(request: pytest.FixtureRequest) -> Iterator[str]:
    before = getattr(jax.config, request.param)
    jax.config.update(request.param, SWITCHES[request.param])
    yield request.param
    jax.config.update(request.param, before)


@pytest.mark.parametrize("switched", EVERY, indirect=True)
def test_the_same_seed_draws_the_same_images(usual: dict[str, np.ndarray], switched: str) -> None:
    eager = switched == "jax_disable_jit"
    for name, images in drawn(*["guided"][:eager]).items():  # eager is slow: the most involved one
        assert images.dtype == np.float32
        if eager:  # operations are not fused
            np.testing.assert_allclose(images, usual[name], atol=1e-5)
        else:
            np.testing.assert_array_equal(images, usual[name], err_msg=name)


@pytest.mark.parametrize("switched", EVERY, indirect=True)
def test_training_and_distilling_stay_finite_and_float32(switched: str, toy_networks: None, one_device: None) -> None:
    model = Model(toys.Perceptron(1, dropout=0.1, num_classes=3), (2, 2, 1), prediction="v")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 2, 2, 1), dtype=np.uint8)
    source = data.from_arrays(images, rng.integers(0, 3, 16))
    settings = api.Settings(batch_size=16, parts=2, flip=True)
    teacher = api.train(model, source, Denoising(length=32), settings)
    students = api.distill(teacher, source, Tract((4, 2, 1), length=32), settings)
    for found in (teacher, *students.values()):
        assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype("float32")}
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params))
        assert found.provenance["skipped"] == 0
    assert api.sample(students[1], 2).dtype == np.float32
