"""The part of `experiments/pipelines.py` that needs PyTorch and diffusers: it trains, fits, chooses and measures.

python experiments/common/pipeline_worker.py DIGITS.npy RESULT.json
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import diffusers  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from diffusion_distill.torch import DistilledODEScheduler, choose_levels, fit

UPDATES, BATCH, IMAGES, FITTED = 1000, 64, 100, 50
CALLS = (5, 10, 20)
SOLVERS = {"DDIM": "ddim", "DPM-Solver++": "dpm_solver++ order=2"}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def trained(digits: torch.Tensor) -> Any:
    """A small U-Net that predicts eps of the linear betas, as its exponential average."""
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    size: Any = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    blocks: Any = {"down_block_types": down, "up_block_types": up, "attention_head_dim": 16}
    network = diffusers.UNet2DModel(**size, **blocks, in_channels=1, out_channels=1)
    average = diffusers.training_utils.EMAModel(network.parameters(), decay=0.995)
    noisy, adam = diffusers.DDPMScheduler(), torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(UPDATES):
        x = digits[torch.randint(len(digits), (BATCH,))]
        eps, times = torch.randn_like(x), torch.randint(1000, (BATCH,))
        loss = (network(noisy.add_noise(x, eps, times), times).sample - eps).square().mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        average.step(network.parameters())
    average.copy_to(network.parameters())
    return network.eval()


def sampled(network: Any, scheduler: Any, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Samples [batch, 1, 8, 8], float32, of a network in its own precision."""
    dtype = next(network.parameters()).dtype
    scheduler.set_timesteps(steps)
    z = (scheduler.init_noise_sigma * noise).to(dtype)
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, t).sample, t, z).prev_sample
    return z.float()


def schedulers(network: Any, solver: str, calls: int, start: torch.Tensor) -> dict[str, Any]:
    """Ours as it is, fitted, on chosen levels, and both."""
    own = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    run = lambda z, t: network(z, t).sample  # noqa: E731
    how: Any = {"scheduler": own, "start": start, "progress": False}
    grid = choose_levels(run, calls, **how).grid
    here = DistilledODEScheduler.from_config(own.config, grid=grid)
    fits = {
        "fitted": fit(run, calls, solver=solver, **how),
        "both": fit(run, calls, solver=solver, **{**how, "scheduler": here}),
    }
    made = {"plain": {"solver": solver}, "levels": {"solver": solver, "grid": grid}}
    made |= {name: {"fitted": found} for name, found in fits.items()}
    return {name: DistilledODEScheduler.from_config(own.config, **one) for name, one in made.items()}


def measured(digits: torch.Tensor) -> dict[str, Any]:
    """Root mean square distances from samples of 1000 steps of DDIM, from noise that no fit has seen."""
    network, distances = trained(digits), {}
    generator = torch.Generator().manual_seed(1)
    fitting, noise = (torch.randn(count, 1, 8, 8, generator=generator) for count in (FITTED, IMAGES))
    with torch.no_grad():
        teacher = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
        target = sampled(network, teacher, noise, 1000)
        made = {
            (solver, calls): schedulers(network, name, calls, fitting)
            for solver, name in SOLVERS.items()
            for calls in CALLS
        }
        for precision, dtype in PRECISIONS.items():
            rounded = copy.deepcopy(network).to(dtype)
            for (solver, calls), every in made.items():
                for how, scheduler in every.items():
                    far = (sampled(rounded, scheduler, noise, calls) - target).square().mean().sqrt()
                    distances[f"{solver}|{calls}|{how}|{precision}"] = round(float(far), 5)
    return {"distances": distances, "updates": UPDATES, "images": IMAGES}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = measured(torch.tensor(np.load(sys.argv[1]))[:, None])
    Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
