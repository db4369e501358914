"""The real library diffusers, as a program that answers with files: it runs in a Python that has it, and not ours.

    python tests/peer_diffusers.py FOLDER

FOLDER/question.json has {"loaded": names, "made": {name: [arguments of a network, of DDIMScheduler]}, "steps": n},
FOLDER/inputs.npz has x [batch, channels, height, width], times and labels [batch] by "NAME/...". The program loads the
pipelines in FOLDER/NAME, also as their model cards say, writes those that it makes there, and answers in
FOLDER/answers.npz. A network is a UNet2DModel, or of the class `_class_name` in its arguments.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers  # type: ignore[import-not-found]
import numpy as np
import torch  # type: ignore[import-not-found]
from diffusers import (  # type: ignore[import-not-found]
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
)


def outputs(unet: Any, x: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The network's outputs; labels are for those that take some."""
    return unet(x, times, labels if getattr(unet, "class_embedding", labels) is not None else None).sample


def sampled(unet: Any, scheduler: Any, steps: int, z: torch.Tensor, labels: torch.Tensor, **how: Any) -> torch.Tensor:
    """The samples of a scheduler from the noise z."""
    scheduler.set_timesteps(steps)
    z = scheduler.init_noise_sigma * z
    for t in scheduler.timesteps:
        raw = outputs(unet, scheduler.scale_model_input(z, t), t, labels)
        z = scheduler.step(raw, t, z, **how).prev_sample
    return z


def made(folder: Path, unet: dict[str, Any], scheduler: dict[str, Any]) -> Any:
    """A pipeline with random weights, of which none is zero, saved into the folder."""
    torch.manual_seed(0)
    network = getattr(diffusers, unet.pop("_class_name", "UNet2DModel"))(**unet)
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name and parameter.ndim == 1 and name.endswith("weight")), 0.1)
    if hasattr(network, "transformer_blocks"):
        return saved_transformer(folder, network, DDIMScheduler(**scheduler))
    pipeline = DDIMPipeline(network, DDIMScheduler(**scheduler))
    pipeline.save_pretrained(folder)
    return pipeline


def saved_transformer(folder: Path, network: Any, scheduler: Any) -> Any:
    """Saves what a DiTPipeline has beside its autoencoder; all blocks get the first one's embeddings, as converted."""
    first, *others = network.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    network.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    parts = {"transformer": ["diffusers", type(network).__name__], "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **parts}))
    return SimpleNamespace(unet=network, scheduler=scheduler)


def answers(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What each pipeline computes, by "NAME/..."."""
    question, stored = json.loads((folder / "question.json").read_text()), np.load(folder / "inputs.npz")
    pipelines = {name: made(folder / name, *how) for name, how in question["made"].items()}
    pipelines |= {name: DiffusionPipeline.from_pretrained(folder / name) for name in question["loaded"]}
    for name in question["loaded"]:  # as their model cards say
        code = re.findall(r"```python\n(.*?)```", (folder / name / "README.md").read_text(), re.DOTALL)[0]
        exec(code.replace("FOLDER", str(folder / name)).replace("50", "2"), {})
    for name, pipeline in pipelines.items():
        x, times, labels = (torch.from_numpy(stored[f"{name}/{what}"]) for what in ("x", "times", "labels"))
        unet, scheduler, steps = pipeline.unet.eval(), pipeline.scheduler, question["steps"]
        yield f"{name}/outputs", outputs(unet, x, times, labels)
        if name in question["loaded"] and isinstance(scheduler, DDIMScheduler):
            yield f"{name}/alpha2", scheduler.alphas_cumprod
            yield f"{name}/ddim", sampled(unet, scheduler, steps, x, labels, use_clipped_model_output=True)
            yield f"{name}/timesteps", scheduler.timesteps
            options = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
            solver = DPMSolverMultistepScheduler.from_config(scheduler.config, **options, final_sigmas_type="zero")
            yield f"{name}/dpm_solver++", sampled(unet, solver, steps, x, labels)
            assert torch.equal(solver.timesteps, scheduler.timesteps)
        elif name in question["loaded"]:
            yield f"{name}/one step", sampled(unet, scheduler, 1, x, labels)


if __name__ == "__main__":
    here = Path(sys.argv[1])
    torch.set_num_threads(1)
    with torch.no_grad():
        np.savez(here / "answers.npz", **{name: value.numpy() for name, value in answers(here)})
