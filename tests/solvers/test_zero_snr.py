"""Networks whose last time has no signal (arXiv:2305.08891): every solver, DDIM by hand, and what is refused.

The paper's Algorithm 1 and DDIM (arXiv:2010.02502 Eq. 12) are written here once more, in float64 and in diffusers'
terms: alphas_cumprod by the index of a step, from which every (N/steps)-th is taken, the last first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

from diffusion_distill import Functions, sample
from diffusion_distill.base.arrays import namespace
from diffusion_distill.base.seeds import key_of
from diffusion_distill.denoisers.model import Denoiser, Model
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import PREDICTED
from diffusion_distill.process.time_input import TimeOfProcess
from diffusion_distill.process.vp_discrete import DiscreteBetas
from diffusion_distill.solvers import SOLVERS, Table, engine, tabulate
from diffusion_distill.torch import conventions
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.weights import exchange, torch_models

pytestmark = pytest.mark.fast

BETAS = ("scaled_linear", 1000, 8.5e-4, 0.012)  # Stable Diffusion's
PROCESS = DiscreteBetas(*BETAS, zero_snr=True)
INDEX = TimeOfProcess(1000.0, -1.0)


# --- DDIM by hand


def network(z: Any, index: Any) -> Any:
    """Something that depends on the sample and on the index of the step [batch]."""
    xp = namespace(z)
    index = index.reshape(-1, *[1] * (z.ndim - 1))
    return 0.7 * xp.tanh(z - 0.3) + 0.2 * xp.cos(index / 150)


def ddim_by_hand(z: np.ndarray, steps: int, prediction: str, last: float) -> np.ndarray:
    """Samples, where the last index has this alpha."""
    alpha = np.cumprod(1 - np.linspace(8.5e-4**0.5, 0.012**0.5, 1000) ** 2) ** 0.5
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha[-1] = last
    index = np.arange(999, -1, -1000 // steps)
    for here, there in zip(index, [*index[1:], None], strict=True):
        a, b = alpha[here], (1 - alpha[here] ** 2) ** 0.5
        raw = network(z, np.full(len(z), here))
        x = raw if prediction == "x" else a * z - b * raw
        eps = (z - a * x) / b
        z = x if there is None else alpha[there] * x + (1 - alpha[there] ** 2) ** 0.5 * eps
    return z


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
@pytest.mark.parametrize("prediction", ["v", "x"])
def test_ddim_is_the_papers(prediction: str, steps: int) -> None:
    """Ours begins with next to no signal, the paper's with none: so small an angle is between the two."""
    functions = Functions(lambda key, z, time, cond: (), lambda params, z, time, cond: network(z, time))
    artefact = Artefact(Model(functions, (3,), PROCESS, prediction, INDEX, data_range=None), ())
    start = np.asarray(engine.noise(engine.sample_keys(key_of(5), np.arange(8)), 0, (3,)), np.float64)
    images, last = sample(artefact, 8, steps, seed=5), float(PROCESS.level(np.float64(1.0)).alpha)
    assert 0 < last <= 2**-12
    np.testing.assert_allclose(images, ddim_by_hand(start, steps, prediction, last), atol=1e-5)  # float32
    np.testing.assert_allclose(images, ddim_by_hand(start, steps, prediction, 0.0), atol=4 * last)


# --- every solver


DATA = toys.Gaussian(0.2, 0.3)


@dataclass(frozen=True)
class Exact:
    """The optimal network of `DATA`, which predicts v or x."""

    prediction: str

    def raw(self, params: Any, z: Any, level: Level, labels: Any, dropout: Any) -> Any:
        """v = alpha·eps - sigma·x, or x."""
        x, level = DATA.raw(params, z, level, labels, dropout), level.expand(z)
        return x if self.prediction == "x" else level.alpha * (z - level.alpha * x) / level.sigma - level.sigma * x


def drawn(table: Table, prediction: str) -> tuple[np.ndarray, np.ndarray]:
    """64 samples in float32, and where the exact flow leads from their noise."""
    keys = engine.sample_keys(key_of(0), np.arange(64))
    start, rows = engine.noise(keys, 0, (2, 2, 1)), None if table.deterministic else keys
    images = engine.integrate(Denoiser((), Exact(prediction)), table, start, row_noise=rows)
    begin, end = PROCESS.level(np.float64(1.0)), Level(np.float64(1.0), np.float64(0.0))
    return np.asarray(images), DATA.flow(table.init * np.asarray(start), begin, end)


@pytest.mark.parametrize("prediction", ["v", "x"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_samples_networks_of_no_signal(solver: str, prediction: str) -> None:
    for steps in (1, 2, 10):
        table = table_of(solver, steps)
        assert np.isfinite(drawn(table.plain(), prediction)[0]).all()
        if table.directions is not None:
            lambdas = np.random.default_rng(0).uniform(-0.1, 0.1, table.directions.weights.shape[:2])
            assert np.isfinite(drawn(table.distilled(lambdas), prediction)[0]).all()
    images, truth = drawn(table_of(solver, 50).plain(), prediction)
    if table.deterministic:
        assert np.sqrt(np.mean((images - truth) ** 2)) < 0.05  # first order: 0.037
    else:
        np.testing.assert_allclose([images.mean(), images.std()], [0.2, 0.3], atol=0.06)


def table_of(solver: str, steps: int) -> Table:
    return tabulate(solver, grids.clean_end(grids.make_grid(PROCESS, steps)), PROCESS)


# --- a network of the noise

#: A model of x, saved in several forms, in each of which its prediction is then changed.
SAVED = Model(toys.Perceptron(1), (2, 2, 1), PROCESS, "x", INDEX)


def in_an_artefact(prediction: str, folder: Path) -> None:
    place = Artefact(SAVED, toys.parameters(SAVED)).save(folder) / "model.json"
    place.write_text(place.read_text().replace('"prediction": "x"', f'"prediction": "{prediction}"'))
    Artefact.load(folder)


def in_safetensors(prediction: str, folder: Path) -> None:
    about = {"model": {**SAVED.to_dict(), "prediction": prediction}, "steps": 0, "provenance": {}}
    exchange.read(exchange.save(folder / "model.safetensors", toys.parameters(SAVED), about))


def in_arguments(prediction: str, folder: Path) -> None:
    twice = 2 if prediction == "eps_var" else 1
    sizes = {"image_size": 8, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1]}
    told = {"beta_schedule": "scaled_linear", "zero_snr": True, "prediction": prediction if twice == 1 else None}
    arguments = {**sizes, "attention_resolutions": [], "out_channels": 3 * twice}
    torch_models.model_of(torch_models.Described("guided_diffusion", arguments, told))


def in_diffusers(prediction: str, folder: Path) -> None:
    config = dict(zip(("beta_schedule", "num_train_timesteps", "beta_start", "beta_end"), BETAS, strict=True))
    name = next(theirs for theirs, ours in PREDICTED.items() if ours == prediction)
    conventions.read({**config, "family": "betas", "rescale_betas_zero_snr": True, "prediction_type": name})


#: Ways in which a prediction comes to a process, and the predictions of noise that each knows.
WAYS: dict[str, tuple[Callable[[str, Path], Any], tuple[str, ...]]] = {
    "a model": (lambda prediction, _: dataclasses.replace(SAVED, prediction=prediction), ("eps", "score")),
    "a description": (lambda prediction, _: Model.from_dict({**SAVED.to_dict(), "prediction": prediction}), ("eps",)),
    "an artefact": (in_an_artefact, ("eps", "scaled_score")),
    "safetensors": (in_safetensors, ("eps",)),
    "arguments": (in_arguments, ("eps", "eps_var")),
    "diffusers": (in_diffusers, ("eps",)),
}


@pytest.mark.parametrize(("way", "prediction"), [(way, name) for way, (_, names) in WAYS.items() for name in names])
def test_noise_predicted_without_signal_is_refused(
    way: str, prediction: str, tmp_path: Path, toy_networks: None
) -> None:
    enter, _ = WAYS[way]
    with pytest.raises(ValueError, match=f"With zero SNR .* predicts '{prediction}' says nothing"):
        enter(prediction, tmp_path)
    enter("x", tmp_path)
