"""PyTorch's side of the tests, as a program that answers with files: it runs in a Python that has it, and needs no JAX.

    python tests/peer_torch.py FOLDER

The answers are in FOLDER/answers.npz.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch_problems import CASES, PROCESSES, START, denoise, table_of

from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import eps_from_x, raw_of
from diffusion_distill.process.time_input import EDMInput, TimeOfProcess
from diffusion_distill.torch import Denoiser, run


def engine() -> Iterator[tuple[str, Any]]:
    """Every solver's result, plain and fitted, in float64 and in float32."""
    for case in CASES:
        for fitted in (False, True):
            for dtype in (torch.float64, torch.float32):
                start = torch.tensor(START, dtype=dtype)
                yield f"run/{case}/{fitted}/{dtype}", run(table_of(case, fitted), denoise, start)
    table, noise = table_of("ancestral|discrete"), np.random.default_rng(1).standard_normal((5, *START.shape))
    yield "ancestral", run(table, denoise, torch.tensor(START), row_noise=torch.tensor(noise), states=True)


def networks() -> Iterator[tuple[str, Any]]:
    """x_hat of networks by what they predict; each is told its level as models of its kind are."""
    for prediction in ("x", "eps", "v", "velocity", "edm"):
        for name, inputs in (("discrete", TimeOfProcess(1000, -1)), ("ve", EDMInput())):
            process = PROCESSES[name]
            level = Level(*map(np.float64, process.level(np.float64(0.3))))
            denoiser = Denoiser(network(prediction, name, level), prediction, process, inputs, dtype=torch.float64)
            yield f"network/{prediction}/{name}", denoiser(torch.tensor(START), level)


def network(prediction: str, name: str, level: Level) -> Any:
    """What a perfect network returns for z, whose inputs are those of one level."""

    def called(seen: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        z = seen * (1.0 if name == "discrete" else float(np.hypot(level.sigma, 0.5 * level.alpha)))
        told = 299.0 if name == "discrete" else float(np.log(level.sigma / level.alpha) / 4)
        assert time.shape == (len(seen),) and abs(float(time[0]) - told) < 1e-4 * abs(told)
        z = z.numpy()
        x_hat = denoise(z, level)
        return torch.tensor(raw_of(prediction, x_hat, eps_from_x(z, x_hat, level), level))

    return called


if __name__ == "__main__":
    here = Path(sys.argv[1])
    torch.set_num_threads(1)
    parts = (engine, networks)
    answers: dict[str, Any] = {name: np.asarray(value) for part in parts for name, value in part()}
    assert not {"flax", "jax", "ml_collections", "optax", "orbax"} & set(sys.modules)
    np.savez(here / "answers.npz", **answers)
