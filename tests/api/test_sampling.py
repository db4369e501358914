"""How samples are split into batches, and what drawing them compiles."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from diffusion_distill import Functions, Model, sample
from diffusion_distill.api.sampling import even_batch
from diffusion_distill.training.artefact import Artefact

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("largest", [1, 8, 250])
@pytest.mark.parametrize("count", [1, 7, 250, 1000, 1001])
def test_batches_are_few_and_even(count: int, largest: int, devices: int) -> None:
    batch = even_batch(count, largest, devices)
    allowed = max(largest // devices, 1) * devices
    assert batch % devices == 0 and batch <= allowed
    fewest = -(-count // allowed)
    assert count <= fewest * batch < count + fewest * devices  # a batch has no more too many than the devices need


def test_batches_and_other_steps_are_traced_once() -> None:
    traced = []

    def apply(params: Any, z: jax.Array, time: jax.Array, cond: Any) -> jax.Array:
        traced.append(z.shape)
        return params * z

    network = Functions(lambda key, z, time, cond: np.float32(0.5), apply)
    artefact = Artefact(Model(network, (3,), data_range=None), np.float32(0.5))
    devices = jax.device_count()
    drawn = [sample(artefact, 3 * devices, steps, batch_size=2 * devices) for steps in (3, 8)]
    assert [images.shape for images in drawn] == 2 * [(3 * devices, 3)]
    assert traced == [(2 * devices, 3)]
