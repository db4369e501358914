"""How samples are split into batches, and what drawing them compiles."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from diffusion_distill import Functions, Model, UNet, sample
from diffusion_distill.api.sampling import denoiser_of, even_batch
from diffusion_distill.denoisers.guidance import NoisyLogProb
from diffusion_distill.process.processes import Cosine
from diffusion_distill.process.time_input import LogsnrInput
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


class Logits:
    """A linear classifier."""

    def apply(self, variables: Any, z: jax.Array, time: jax.Array) -> jax.Array:
        """Logits of samples of as many numbers as the parameters have rows."""
        return z.reshape(len(z), -1) @ variables["params"]


@pytest.mark.parametrize(
    ("shape", "classes", "said"),
    [
        ((4, 4, 1), 5, None),
        ((4, 4, 1), 7, "knows 5 classes, the model 7"),
        ((8, 8, 1), 5, r"not for samples of shape \(8, 8, 1\)"),
        ((4, 4, 1), 1, "takes no labels.*ClassifierGuided"),
    ],
    ids=["fits", "other classes", "other images", "no labels"],
)
def test_a_classifier_guides_models_of_its_images_and_classes(
    shape: tuple[int, ...], classes: int, said: str | None
) -> None:
    classifier = NoisyLogProb(np.zeros((16, 5), np.float32), Logits(), Cosine(), LogsnrInput())
    sizes: dict[str, Any] = dict(ch=32, emb_ch=32, out_ch=1, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    network = UNet(**sizes, num_heads=1, num_classes=classes)
    artefact, guidance = Artefact(Model(network, shape), {}), {"scale": 1.0, "classifier": classifier}
    if said is None:
        denoiser_of(artefact, guidance=guidance)
        return
    with pytest.raises(ValueError, match=said):
        denoiser_of(artefact, guidance=guidance)
