"""Seeds: whole numbers of 64 bits, each with random numbers of its own."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import toys

from diffusion_distill import api
from diffusion_distill.api.classifier import ClassifierSettings
from diffusion_distill.base.seeds import check_seed, generator_of, key_of
from diffusion_distill.data import Batches
from diffusion_distill.training.artefact import Artefact

pytestmark = pytest.mark.fast
SEEDS = (0, 5, 2**32 - 1, 2**32, 2**33 + 5, 2**63, 2**64 - 1)
BAD = (-1, 2**64, 1.0, 0.5, "3", None, True, np.array([3]))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_seeds_of_32_bits_are_those_of_the_libraries(seed: int) -> None:
    ours, theirs = key_of(seed), jax.random.key(seed, impl="threefry2x32")
    np.testing.assert_array_equal(jax.random.key_data(ours), jax.random.key_data(theirs))
    for number in (0, 3):
        theirs = np.random.Generator(np.random.PCG64([seed, number])).random(4)
        np.testing.assert_array_equal(generator_of(seed, number).random(4), theirs)
    theirs = np.random.Generator(np.random.PCG64([seed, 3, 1])).random(4)
    np.testing.assert_array_equal(generator_of(seed, 3, 1).random(4), theirs)


def test_every_seed_has_numbers_of_its_own() -> None:
    keys = {tuple(np.asarray(jax.random.key_data(key_of(seed))).tolist()) for seed in SEEDS}
    assert keys == {divmod(seed, 2**32) for seed in SEEDS}
    # PCG64([seed, number]) would give seed 5, number 2 to seed 5 + 2·2^32, number 0
    drawn = {generator_of(s, n, k).random() for s in (*SEEDS, 2**33 + 5, 2**32 + 5) for n in range(3) for k in (0, 1)}
    assert len(drawn) == len({*SEEDS, 2**33 + 5, 2**32 + 5}) * 6


def test_seeds_that_differ_above_32_bits_draw_different_images(teacher: Artefact) -> None:
    drawn = [api.sample(teacher, 2, 1, seed=seed) for seed in SEEDS]
    assert len({images.tobytes() for images in drawn}) == len(SEEDS)


@pytest.mark.parametrize("seed", BAD)
def test_other_seeds_are_refused_at_every_door(seed: Any, teacher: Artefact) -> None:
    source = toys.GaussianSource(toys.Gaussian(0.0, 0.5))
    doors = (
        lambda: check_seed(seed),
        lambda: key_of(seed),
        lambda: api.Settings(seed=seed),
        lambda: api.FitSettings(seed=seed),
        lambda: ClassifierSettings(seed=seed),
        lambda: Batches(source, 8, seed),
        lambda: api.sample(teacher, 2, 1, seed=seed),
    )
    for door in doors:
        with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 2\^64 - 1, got"):
            door()


def test_whole_numbers_of_numpy_are_seeds() -> None:
    assert check_seed(np.uint64(2**64 - 1)) == 2**64 - 1 and isinstance(check_seed(np.int32(3)), int)
