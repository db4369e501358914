"""How samples are split into batches, and what drawing them compiles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from toys import equal

from diffusion_distill import Functions, Model, UNet, sample
from diffusion_distill.api.sampling import Sampler, denoiser_of, even_batch, grid_for, sampler_of
from diffusion_distill.base.seeds import key_of
from diffusion_distill.denoisers.guidance import NoisyLogProb
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Cosine
from diffusion_distill.process.time_input import LogsnrInput
from diffusion_distill.solvers import engine
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.registry import tabulate
from diffusion_distill.training import sharding
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


#: Ways to sample: multistep, of two stages, with noise, with a call of its own for the null condition, fitted.
WAYS: dict[str, dict[str, Any]] = {
    "ddim": {},
    "dpm_solver++": {"solver": "dpm_solver++ order=3"},
    "heun": {"solver": "heun"},
    "ancestral": {"solver": "ancestral"},
    "guided": {"guidance": {"scale": 2.0, "null": 2}},
    "fitted": {},
}


def lambdas_for(artefact: Artefact, solver: str, steps: int) -> FittedSolver:
    """A solver with lambdas that nobody fitted."""
    grid, process = grid_for(artefact, steps), artefact.model.process
    moves = tabulate(solver, grid, process).directions
    assert moves is not None
    lambdas = np.linspace(-0.02, 0.04, moves.weights[..., 0].size).reshape(moves.weights.shape[:2])
    return FittedSolver(solver, process, grid, lambdas, np.ones(len(lambdas)), np.ones(len(lambdas)))


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("way", WAYS)
def test_a_sampler_places_its_table_once(
    way: str, devices: int, toy_networks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two samplers with other numbers of steps take turns; each batch is that of a table placed for it, bit for bit."""
    model = Model(toys.Perceptron(1, num_classes=3), (2, 2, 1), prediction="v")
    artefact, mesh = Artefact(model, toys.parameters(model)), sharding.data_mesh(jax.devices()[:devices])
    placed, place = [], engine.place
    monkeypatch.setattr(engine, "place", lambda table, *where: placed.append(table.nfe) or place(table, *where))
    samplers = []
    for steps in (3, 5):
        how: dict[str, Any] = {"steps": steps, **WAYS[way]}
        if way == "fitted":
            how = {"fitted": lambdas_for(artefact, "ddim", steps)}
        samplers.append(sampler_of(artefact, seed=7, mesh=mesh, **how))
    conditions = {first: np.arange(first, first + 8, dtype=np.int32) % 2 for first in (0, 8, 16)}
    drawn = {(first, k): samplers[k].draw(first, 8, cond) for first, cond in conditions.items() for k in (0, 1)}
    assert placed == [sampler.table.nfe for sampler in samplers]
    for (first, k), images in drawn.items():
        by_itself, on_host = drawn_anew(samplers[k], first, 8, conditions[first])
        assert equal(images, by_itself), (first, k)
        np.testing.assert_allclose(images, on_host, atol=5e-5)  # in float32, with lambdas


def drawn_anew(drawn: Sampler, first: int, count: int, cond: np.ndarray) -> list[np.ndarray]:
    """The same samples by a table that is not placed before, and by one that stays on the host, in float64."""
    shape, place = drawn.model.shape, sharding.split(drawn.mesh)
    keys = jax.device_put(engine.sample_keys(key_of(drawn.seed), np.arange(first, first + count)), place)
    start, rows = engine.noise(keys, 0, shape), None if drawn.table.deterministic else keys
    here = engine.integrate(drawn.denoise, drawn.table, start, jax.device_put(cond, place), row_noise=rows)
    fresh = None if rows is None else np.stack([engine.noise(keys, k + 1, shape) for k in range(drawn.table.nfe)])

    def call(z: Any, level: Level, cond: Any = None) -> np.ndarray:
        return np.asarray(drawn.denoise(jnp.float32(z), Level(*map(jnp.float32, level)), cond))

    there = engine.run_host(drawn.table, call, np.asarray(start), cond, row_noise=fresh)
    return [np.asarray(images).clip(-1, 1) for images in (here, there)]


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
