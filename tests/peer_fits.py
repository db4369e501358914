"""Fits in PyTorch, as a program that answers with files; it needs diffusers and no JAX.

    python tests/peer_fits.py FOLDER

FOLDER/fitted.json is a solver that JAX's side has fitted, FOLDER/answers.npz and FOLDER/own.json the answers.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from peer_schedulers import MADE, drawn
from torch_problems import FITS, PROCESSES, START, denoise, grid_of

from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import eps_from_x
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.torch import DistilledODEScheduler, choose_levels, fit
from diffusion_distill.torch.command import main
from diffusion_distill.torch.levels import cheapest_path


def fits(folder: Path) -> Iterator[tuple[str, Any]]:
    """Lambdas of the model in closed form, and how many calls they took."""
    ddpm = DistilledODEScheduler(grid=grids.to_numbers(grid_of("discrete")))
    calls = []

    def network(z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        calls.append(float(timestep))
        level = Level(*map(np.float64, PROCESSES["discrete"].level((float(timestep) + 1) / 1000)))
        return eps_from_x(z, denoise(z, level), level)

    found: Any = None
    for solver, scale in FITS:
        calls.clear()
        found = fit(network, 5, solver=solver, scale=scale, scheduler=ddpm, start=torch.tensor(START), progress=False)
        yield f"fit/{solver}", found.lambdas
        yield f"distances/{solver}", [found.plain, found.fitted]
        yield f"calls/{solver}", len(calls)
    found.save(folder / "own.json")
    known = DistilledODEScheduler(fitted=folder / "fitted.json")
    known.set_timesteps(5)
    z = torch.tensor(START)
    for t in known.timesteps:
        z = known.step(network(z, t), t, z).prev_sample
    yield "known", z


def pipelines() -> Iterator[tuple[str, Any]]:
    """Distances from a teacher of 60 calls with DDIM's 3 steps, before and after a fit in a guided pipeline."""
    for name, make in MADE.items():
        pipeline, call = make()
        own = pipeline.scheduler
        fitted = fit(pipeline, 3, scale=20, progress=False, generator=torch.Generator().manual_seed(2), **call)
        assert pipeline.scheduler is own
        results = []
        teacher = {"grid": grids.to_numbers(teacher_grid(fitted))}
        for how in (teacher, {}, {"fitted": fitted}):
            steps = 60 if how is teacher else 3
            pipeline.scheduler = DistilledODEScheduler.from_config(own.config, **how)
            results.append(drawn(pipeline, call, num_inference_steps=steps))
        target, plain, better = map(np.asarray, results)
        yield f"pipeline/{name}", [np.abs(plain - target).mean(), np.abs(better - target).mean()]


def levels() -> Iterator[tuple[str, Any]]:
    """The cheapest path against all paths, and chosen levels in a scheduler of diffusers and in ours."""
    costs = np.where(np.tri(8, k=0, dtype=bool), np.inf, np.random.default_rng(0).random((8, 8)))
    paths = [[0, *inner, 7] for inner in itertools.combinations(range(1, 7), 3)]
    sums = [costs[path[:-1], path[1:]].sum() for path in paths]
    yield "paths/ours", cheapest_path(costs, 4)
    yield "paths/all", paths[int(np.argmin(sums))]
    pipeline, call = MADE["text"]()
    chosen = choose_levels(pipeline, 4, candidates=20, progress=False, generator=torch.Generator(), **call)
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, final_sigmas_type="zero")
    pipeline.scheduler = theirs
    expected = drawn(pipeline, call, timesteps=chosen.timesteps)
    how: Any = {"grid": chosen.grid, "solver": "dpm_solver++ order=2"}
    pipeline.scheduler = DistilledODEScheduler.from_config(theirs.config, **how)
    yield "chosen/ours", drawn(pipeline, call, num_inference_steps=4)
    yield "chosen/theirs", expected
    yield "chosen/timesteps", chosen.timesteps
    yield "chosen/sigmas", chosen.sigmas
    yield "chosen/cost", chosen.cost
    for name in ("flow", "flux"):
        pipeline, call = MADE[name]()
        chosen = choose_levels(pipeline, 4, candidates=20, progress=False, generator=torch.Generator(), **call)
        drawn(pipeline, call, sigmas=chosen.sigmas[:-1])
        yield f"{name}/sigmas", chosen.sigmas
        yield f"{name}/levels", chosen.grid["sigma"]
        yield f"{name}/theirs", pipeline.scheduler.sigmas


def command(folder: Path) -> Iterator[tuple[str, Any]]:
    """The command on a pipeline without prompts: what it writes."""
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
    size: Any = {"sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    network = diffusers.UNet2DModel(**size, down_block_types=down, up_block_types=up)
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(folder / "ddpm")
    common = [str(folder / "ddpm"), "--steps=3", "--call", '{"batch_size": 2}', "--device=cpu"]
    main([*common, "--scale=4", "--solver=dpm_solver++", f"--out={folder / 'command.json'}"])
    main([*common, "--levels", "--candidates=6", f"--out={folder / 'levels.json'}"])
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    wrong = (
        [f"--out={folder}"],
        ["--solver=ddim order=2", "--out=no.json"],
        [f"--prompts={folder / 'latin.txt'}", "--out=no.json"],
        ["--device=graphics", "--out=no.json"],
    )
    yield "command/refused", [refusal([*common, *arguments]) for arguments in wrong]
    facts = FittedSolver.load(folder / "command.json").provenance
    yield "command/facts", [facts["images"], facts["evaluations"], facts["teacher's evaluations"]]
    yield "command/timesteps", json.loads((folder / "levels.json").read_text())["timesteps"]


def refusal(arguments: list[str]) -> str:
    """What the command says when it stops."""
    try:
        main(arguments)
    except SystemExit as stop:
        return str(stop)
    return "nothing was refused"


def teacher_grid(fitted: Any) -> Level:
    return grids.refine(fitted.process, fitted.grid, 20)


if __name__ == "__main__":
    here = Path(sys.argv[1])
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    with torch.no_grad():
        parts = (fits(here), pipelines(), levels(), command(here))
        answers: dict[str, Any] = {name: np.asarray(value) for part in parts for name, value in part}
    np.savez(here / "answers.npz", **answers)
