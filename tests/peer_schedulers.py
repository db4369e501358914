"""Pipelines and schedulers of the library diffusers beside ours, as a program that answers with files.

    python tests/peer_schedulers.py FOLDER

It runs in a Python that has diffusers, and needs no JAX. FOLDER/answers.npz has NAME/ours and NAME/theirs of each
comparison NAME.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch_problems import CASES, PROCESSES, START, STEPS, denoise, grid_of, lambdas_of, table_of

from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import eps_from_x
from diffusion_distill.process.processes import DiscreteBetas
from diffusion_distill.process.time_input import TimeOfProcess
from diffusion_distill.process.vp_discrete import NEXT_TO_NONE
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.torch import Denoiser, DistilledODEScheduler, choose_levels, conventions, fit, run

Answer = tuple[str, Any, Any]


def sampled(network: Any, scheduler: Any, z: torch.Tensor, steps: int | None = 5, **how: Any) -> torch.Tensor:
    """A pipeline's loop."""
    scheduler.set_timesteps(steps, **how)
    scaled = getattr(scheduler, "scale_model_input", lambda z, t: z)
    for t in scheduler.timesteps:
        z = scheduler.step(network(scaled(z, t), t), t, z).prev_sample
    return z


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def unet() -> Any:
    """A U-Net with random weights, as a function of samples and a time."""
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    blocks: Any = {"down_block_types": down, "up_block_types": up}
    size: Any = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    network = diffusers.UNet2DModel(**size, **blocks, in_channels=3, out_channels=3).eval()
    return lambda z, t: network(z, t).sample


def betas() -> Iterator[Answer]:
    """DDIM and DPM-Solver++ of models of betas."""
    network, z = unet(), noise(2, 3, 8, 8)
    for rule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        for kind in ("epsilon", "sample", "v_prediction"):
            for where in ({"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}):
                how: Any = {"beta_schedule": rule, "prediction_type": kind, "clip_sample": False, **where}
                theirs = diffusers.DDIMScheduler(**how)
                ours = DistilledODEScheduler.from_config(theirs.config)
                yield f"ddim/{rule}/{kind}/{where}", sampled(network, ours, z), sampled(network, theirs, z)
    ddim = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    how = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(ddim.config, **how)
    ours = DistilledODEScheduler.from_config(theirs.config, solver="dpm_solver++ order=2")
    yield "dpm_solver++/trailing", sampled(network, ours, z), sampled(network, theirs, z)
    chosen = [901, 640, 333, 120, 17]
    yield "dpm_solver++/timesteps", *(sampled(network, one, z, None, timesteps=chosen) for one in (ours, theirs))
    how |= {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    how |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(ddim.config, **how)
    for solver in ("dpm_solver++ order=2", "ddim"):
        ours = DistilledODEScheduler.from_config(theirs.config, solver=solver)
        other = theirs if solver != "ddim" else diffusers.DDIMScheduler.from_config(theirs.config)
        other.alphas_cumprod[-1] = NEXT_TO_NONE  # DDIM's is 0
        yield f"zero SNR/{solver}", sampled(network, ours, z), sampled(network, other, z)
    end = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False)
    yield "ddim/end", sampled(network, DistilledODEScheduler.from_config(end.config), z), sampled(network, end, z)
    clipped = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample_range=0.5)
    expected = clipped_ddim(network, clipped, z)
    yield "ddim/clipped", sampled(network, DistilledODEScheduler.from_config(clipped.config), z), expected


def clipped_ddim(network: Any, scheduler: Any, z: torch.Tensor) -> torch.Tensor:
    """DDIM with eps that belongs to the clipped x_hat, as our tables have it."""
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, t), t, z, use_clipped_model_output=True).prev_sample
    return z


def euler() -> Iterator[Answer]:
    """Euler's method of models of betas, with its start and its times: it scales the noise and asks between indices."""
    network, z = unet(), noise(2, 3, 8, 8)
    for rule in ("linear", "scaled_linear"):
        for kind in ("epsilon", "v_prediction"):
            for where in ("trailing", "linspace"):
                how: Any = {"beta_schedule": rule, "prediction_type": kind, "timestep_spacing": where}
                theirs = diffusers.EulerDiscreteScheduler(**how)
                theirs.set_timesteps(5)
                ours, told = DistilledODEScheduler.from_config(theirs.config), theirs.timesteps.tolist()
                expected, sigma = sampled(network, theirs, theirs.init_noise_sigma * z), at(ours, told[0]).sigma
                yield f"euler/{rule}/{kind}/{where}", sampled(network, ours, sigma * z, None, timesteps=told), expected


def at(scheduler: Any, told: float) -> Level:
    """The level of a timestep."""
    return Level(*(float(part[0]) for part in scheduler.convention.levels_told([told])))


def levels() -> Iterator[Answer]:
    """Euler's method and DPM-Solver++ of EDM's models, and Euler's of flows."""
    network, z = unet(), noise(2, 3, 8, 8)
    for kind in ("epsilon", "v_prediction"):
        theirs = diffusers.EDMEulerScheduler(prediction_type=kind)
        ours = DistilledODEScheduler.from_config(theirs.config)
        yield f"edm/{kind}", sampled(network, ours, 80 * z), sampled(network, theirs, 80 * z)
    theirs = diffusers.EDMDPMSolverMultistepScheduler()
    ours = DistilledODEScheduler.from_config(theirs.config, solver="dpm_solver++ order=2")
    yield "edm/dpm_solver++", sampled(network, ours, 80 * z), sampled(network, theirs, 80 * z)
    for shift in (1.0, 3.0):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        ours = DistilledODEScheduler.from_config(theirs.config)
        yield f"flow/{shift}", sampled(network, ours, z), sampled(network, theirs, z)
        given = [1.0, 0.7, 0.2]
        yield f"flow/{shift}/sigmas", *(sampled(network, one, z, None, sigmas=given) for one in (ours, theirs))
    how: Any = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    theirs = diffusers.DPMSolverMultistepScheduler(**how, solver_order=2)
    config = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    ours = DistilledODEScheduler.from_config(config, solver="dpm_solver++ order=2")
    expected = sampled(network, theirs, z)
    given = theirs.sigmas[:-1].double().numpy()
    cut = lambda z, t: network(z, t.floor())  # noqa: E731  (theirs tells the network whole numbers)
    yield "flow/dpm_solver++", sampled(cut, ours, z, None, sigmas=given / (3 - 2 * given)), expected
    for kind in ("exponential", "linear"):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        ours = DistilledODEScheduler.from_config(theirs.config)
        yield f"flow/{kind}", *(sampled(network, one, z, mu=0.8) for one in (ours, theirs))


def engine() -> Iterator[Answer]:
    """The scheduler step by step beside the engine, for every solver, plain and with lambdas, in float64."""
    start = torch.tensor(START)
    for case in CASES:
        solver, name = case.split("|")
        process = PROCESSES[name]
        grid = grid_of(name)
        family: Any = {"discrete": "betas", "ve": "edm", "flow": "flow"}[name]
        kind = "flow_prediction" if name == "flow" else "epsilon"
        for fitted in (False, True):
            table = table_of(case, fitted)
            found: Any = {"grid": grids.to_numbers(grid), "solver": solver}
            if fitted and (lambdas := lambdas_of(case)) is not None:
                found = {"fitted": FittedSolver(solver, process, grid, lambdas, np.zeros(1), np.zeros(1))}
            scheduler = DistilledODEScheduler(family=family, prediction_type=kind, shift=3.0, **found)
            scheduler.set_timesteps(STEPS)
            z = scheduler.init_noise_sigma * start
            for k, t in enumerate(scheduler.timesteps):
                level = Level(*map(np.float64, table.level.at(k)))
                z = scheduler.step(output(name, z, level, scheduler), t, z, return_dict=False)[0]
            yield f"engine/{case}/{fitted}", z, run(table, denoise, start)


def output(name: str, z: torch.Tensor, level: Level, scheduler: Any) -> torch.Tensor:
    """What a network with the denoiser in closed form returns."""
    x_hat = denoise(z, level)
    eps = eps_from_x(z, x_hat, level)
    if name == "discrete":
        return eps
    if name == "flow":
        return eps - x_hat
    skip = 0.25 / (level.sigma**2 + 0.25)
    return (x_hat - skip * z) / (0.5 * level.sigma / np.hypot(level.sigma, 0.5))


#: Parts that the pipelines of text do without, as embeddings are given.
ABSENT = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")


def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    """A small pipeline with cross-attention to embeddings of text, random weights, and a call of it with guidance."""
    torch.manual_seed(0)
    size: Any = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    blocks: Any = {"down_block_types": down, "up_block_types": up, "cross_attention_dim": 8, "attention_head_dim": 4}
    network = diffusers.UNet2DConditionModel(**size, **blocks)
    where: Any = {"timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DDIMScheduler(**where, beta_start=0.00085, beta_end=0.012, clip_sample=False)
    parts: Any = dict.fromkeys(ABSENT)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=autoencoder(), unet=network, scheduler=scheduler, requires_safety_checker=False, **parts
    )
    text = {"prompt_embeds": noise(2, 3, 8), "negative_prompt_embeds": -noise(2, 3, 8), "guidance_scale": 3.0}
    return pipeline, {**text, "latents": noise(2, 4, 8, 8), "output_type": "latent"}


def autoencoder() -> Any:
    return diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)


def dit() -> tuple[Any, dict[str, Any]]:
    """A small DiT with class labels, guided."""
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    network.eval()  # in training, labels are dropped at random
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    pipeline = diffusers.DiTPipeline(transformer=network, vae=autoencoder(), scheduler=scheduler)
    return pipeline, {"class_labels": [1, 2], "guidance_scale": 2.0, "output_type": "np"}


def flow_transformer() -> tuple[Any, dict[str, Any]]:
    """A small transformer of Stable Diffusion 3 with embeddings of text, guided."""
    torch.manual_seed(0)
    heads: Any = {"num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "in_channels": 4}
    text: Any = {"joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 8}
    network = diffusers.SD3Transformer2DModel(**heads, **text, sample_size=8, patch_size=2, out_channels=4)
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=network, scheduler=scheduler, vae=autoencoder(), **dict.fromkeys(parts)
    )
    pooled = {"pooled_prompt_embeds": noise(2, 8), "negative_pooled_prompt_embeds": -noise(2, 8)}
    words = {"prompt_embeds": noise(2, 3, 8), "negative_prompt_embeds": -noise(2, 3, 8), **pooled}
    return pipeline, {**words, "latents": noise(2, 4, 8, 8), "guidance_scale": 3.0, "output_type": "latent"}


def flux() -> tuple[Any, dict[str, Any]]:
    """A small Flux: its pipeline hands its scheduler sigmas, not a number of steps, and a shift by the images' size."""
    torch.manual_seed(0)
    heads: Any = {"patch_size": 1, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    size: Any = {"in_channels": 16, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)}
    text: Any = {"joint_attention_dim": 8, "pooled_projection_dim": 8}
    network = diffusers.FluxTransformer2DModel(**heads, **size, **text)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = diffusers.FluxPipeline(
        transformer=network, scheduler=scheduler, vae=autoencoder(), **dict.fromkeys(parts)
    )
    words = {"prompt_embeds": noise(2, 3, 8), "pooled_prompt_embeds": noise(2, 8)}
    return pipeline, {**words, "height": 16, "width": 16, "output_type": "latent"}


MADE = {"text": stable_diffusion, "labels": dit, "flow": flow_transformer, "flux": flux}


def drawn(pipeline: Any, call: dict[str, Any], **how: Any) -> Any:
    """A pipeline's samples; always the same for the same call."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**call, **how, generator=torch.Generator().manual_seed(2)).images


def from_image() -> tuple[Any, dict[str, Any]]:
    """A pipeline that begins with an image, in the middle of the steps."""
    whole, call = stable_diffusion()
    parts = {name: part for name, part in whole.components.items() if name != "image_encoder"}
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    call = {name: value for name, value in call.items() if name != "latents"}
    return pipeline, {**call, "image": noise(2, 4, 8, 8), "strength": 0.6}


def left() -> tuple[Any, dict[str, Any]]:
    """A pipeline that is stopped after its first call."""
    pipeline, call = stable_diffusion()

    def stop(*_: Any) -> dict[str, Any]:
        pipeline._interrupt = True
        return {}

    return pipeline, {**call, "callback_on_step_end": stop}


def broken(z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A network whose outputs are numbers at the noisy end only."""
    return z if timestep > 500 else z / 0


def pipelines(folder: Path) -> Iterator[Answer]:
    """Whole pipelines with our scheduler in place of their own; one is saved and loaded."""
    for name, make in MADE.items():
        pipeline, call = make()
        theirs = drawn(pipeline, call, num_inference_steps=4)
        pipeline.scheduler = DistilledODEScheduler.from_config(pipeline.scheduler.config)
        yield f"pipeline/{name}", drawn(pipeline, call, num_inference_steps=4), theirs
        pipeline.scheduler.save_pretrained(folder)
        pipeline.scheduler = DistilledODEScheduler.from_pretrained(folder)
        yield f"pipeline/{name}/loaded", drawn(pipeline, call, num_inference_steps=4), theirs
    pipeline, call = stable_diffusion()
    own = {"solver": "heun", "timestep_spacing": "trailing"}
    pipeline.scheduler = DistilledODEScheduler.from_config(pipeline.scheduler.config, **own)
    first = drawn(pipeline, call, num_inference_steps=3)
    pipeline.save_pretrained(folder / "whole")
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder / "whole", **dict.fromkeys(ABSENT))
    assert type(loaded.scheduler).__name__ == "DistilledODEScheduler"
    yield "pipeline/whole", drawn(loaded, call, num_inference_steps=3), first
    pipeline, call = from_image()
    theirs = drawn(pipeline, call, num_inference_steps=5)
    pipeline.scheduler = DistilledODEScheduler.from_config(pipeline.scheduler.config)
    yield "pipeline/image", drawn(pipeline, call, num_inference_steps=5), theirs


def edges() -> Iterator[Answer]:
    """Half precision, samples that the pipeline changes, the way back to a scheduler of diffusers, and noise added."""
    network, z = unet(), noise(2, 3, 8, 8)
    for solver in ("ddim", "ipndm"):
        ours = DistilledODEScheduler(timestep_spacing="trailing", solver=solver)
        half = sampled(lambda z, t: network(z.float(), t).bfloat16(), ours, z.bfloat16(), 20)
        yield f"half/{solver}", half.float(), sampled(network, ours, z, 20)
    ours = DistilledODEScheduler(timestep_spacing="trailing")
    ours.set_timesteps(2)
    first = ours.step(0 * z, ours.timesteps[0], z).prev_sample
    changed = ours.step(0 * z, ours.timesteps[1], first + 1).prev_sample
    yield "changed", changed, (first + 1) / float(ours.convention.levels_told([499.0]).alpha[0])
    theirs = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample_range=3.0)
    ours = DistilledODEScheduler.from_config(theirs.config)
    back = diffusers.DDIMScheduler.from_config(ours.config)
    yield "back", *(sampled(network, one, z) for one in (back, theirs))
    yield "add_noise", *(one.add_noise(z, -z, torch.tensor([3, 700])) for one in (ours, theirs))
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    ours, at = DistilledODEScheduler.from_config(flow.config), flow.timesteps[1:2]
    yield "scale_noise", *(one.scale_noise(z, at, -z) for one in (ours, flow))


def refused() -> Iterator[Answer]:
    """The messages of what is refused, and what must be in them."""
    z = noise(1, 3, 8, 8)
    own: Any = {"grid": {"alpha": [0.6, 1.0], "sigma": [0.8, 0.0]}}
    linear = DiscreteBetas("linear", 1000, 1e-4, 0.02)
    fitted = FittedSolver("ddim", linear, grids.make_grid(linear, 2), np.zeros((2, 1)), np.zeros(2), np.zeros(2))
    ours, euler = DistilledODEScheduler, diffusers.EulerDiscreteScheduler(timestep_type="continuous")
    cosine: Any = {"sigma_data": 1.0, "prediction_type": "v_prediction", "solver_order": 2}
    moving: Any = {"family": "flow", "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    other = diffusers.DDIMScheduler(rescale_betas_zero_snr=True).config
    (image, image_call), (stopped, stopped_call) = from_image(), left()
    heun = ours(solver="heun")
    heun.set_timesteps(3)
    heun.set_begin_index(1)
    tried = {
        "draws noise": lambda: ours(solver="ancestral"),
        "Unknown solver": lambda: DistilledODEScheduler(solver="no"),
        "levels for 1 steps": lambda: DistilledODEScheduler(**own).set_timesteps(4),
        "levels of its own": lambda: DistilledODEScheduler(**own).set_timesteps(timesteps=[900, 3]),
        "no signal": lambda: DistilledODEScheduler.from_config(other),
        "predicts 'eps' says nothing": lambda: Denoiser(
            lambda z, t: z, "eps", DiscreteBetas(zero_snr=True), TimeOfProcess(1000.0, -1.0)
        ),
        "eta": lambda: DistilledODEScheduler().step(z, 1, z, eta=1.0),
        "give mu": lambda: DistilledODEScheduler(**moving).set_timesteps(4),
        "must decrease": lambda: DistilledODEScheduler().set_timesteps(timesteps=[5, 6]),
        "0 to 999": lambda: ours().set_timesteps(timesteps=[1500, 6]),
        "at most 1000": lambda: ours().set_timesteps(1001),
        "not both": lambda: ours().set_timesteps(timesteps=[6], sigmas=[1.0]),
        "set_timesteps first": lambda: ours().step(z, 1, z),
        "Did you mean 'solver'": lambda: ours.from_config(euler.config, solvr="deis"),
        "timestep_type": lambda: ours.from_config(euler.config),
        "give family": lambda: ours.from_config(diffusers.CMStochasticIterativeScheduler().config),
        "what its model takes": lambda: ours.from_config(cosine),
        "snr_shift_scale": lambda: ours.from_config(diffusers.CogVideoXDDIMScheduler().config),
        "give the config of FlowMatch": lambda: ours.from_config(
            diffusers.UniPCMultistepScheduler(use_flow_sigmas=True).config
        ),
        "fitted for": lambda: ours(beta_schedule="scaled_linear", fitted=fitted),
        "model with VE": lambda: ours(family="edm", **own),
        "The fit is one of 'ddim'": lambda: ours.from_config(ours().config, fitted=fitted, solver="deis"),
        "start= is for functions": lambda: fit(stable_diffusion()[0], 2, start=z),
        "takes no prompt": lambda: fit(unet(), 2, scheduler=ours(), start=z, prompt="a cat"),
        "Give the scheduler": lambda: choose_levels(unet(), 2, start=z),
        "must be a scheduler": lambda: fit(unet(), 2, scheduler="ddim", start=z),
        "got ndarray": lambda: fit(unet(), 2, scheduler=ours(), start=z.numpy()),
        "Leave num_inference_steps out": lambda: fit(stable_diffusion()[0], 2, num_inference_steps=3),
        "largest must be": lambda: fit(unet(), 2, scheduler=ours(), start=z, largest=-1.0),
        "power must be": lambda: choose_levels(unet(), 2, scheduler=ours(), start=z, power=0.0),
        "candidates must be": lambda: choose_levels(unet(), 2, scheduler=ours(), start=z, candidates=0),
        "Give the config": lambda: ours.from_config(euler),
        "Unknown spacing": lambda: ours(spacing="kerras"),
        "got tuple": lambda: fit(lambda z, t: (z,), 2, scheduler=ours(), start=z, progress=False),
        "got (1, 1, 8, 8)": lambda: fit(lambda z, t: z[:, :1], 2, scheduler=ours(), start=z, progress=False),
        "timestep 500 is not finite": lambda: fit(broken, 2, scheduler=ours(), start=z, scale=1, progress=False),
        "is not finite": lambda: choose_levels(broken, 2, scheduler=ours(), start=z, progress=False),
        "strength=1": lambda: fit(image, 4, progress=False, **image_call),
        "all steps": lambda: choose_levels(image, 4, progress=False, **image_call),
        "left after 1 of 9": lambda: choose_levels(stopped, 4, candidates=9, progress=False, **stopped_call),
        "middle of a step": lambda: heun.step(z, heun.timesteps[1], z),
    }
    for said, call in tried.items():
        message = "nothing was raised"
        try:
            call()
        except ValueError as error:
            message = str(error)
        yield f"refused/{said}", message, said


def warned() -> Iterator[Answer]:
    """What is said of options about the spacing of sigmas and of one step, and that nothing is said elsewhere."""
    for rule, steps in (("leading", 1), ("linspace", 1), ("trailing", 1), ("leading", 2)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            DistilledODEScheduler(timestep_spacing=rule).set_timesteps(steps)
        expected = int(steps == 1 and rule != "trailing")
        yield f"warned/{rule}/{steps}", ["mostly signal" in str(one.message) for one in caught], [True] * expected
    made: Any = (
        *(diffusers.EulerDiscreteScheduler(**{name: True}) for name in ("use_karras_sigmas", "use_beta_sigmas")),
        diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True),
        diffusers.FlowMatchEulerDiscreteScheduler(use_exponential_sigmas=True),
        diffusers.EulerDiscreteScheduler(interpolation_type="log_linear"),
        *(diffusers.EDMEulerScheduler(**{name: value}) for name, value in list(conventions.NOT_READ.items())[-3:-1]),
    )
    for scheduler in made:
        for how in ({}, {"spacing": "logsnr"}):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                DistilledODEScheduler.from_config(scheduler.config, **how)
            said = [str(one.message).split("=")[0] for one in caught if "is not read" in str(one.message)]
            options = [name for name, value in conventions.NOT_READ.items() if scheduler.config.get(name) == value]
            yield f"warned/{options}/{how}", said, [] if how else options


if __name__ == "__main__":
    here = Path(sys.argv[1])
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    answers: dict[str, Any] = {}
    with torch.no_grad():
        for part in (betas(), euler(), levels(), engine(), pipelines(here / "saved"), edges(), refused(), warned()):
            for name, ours, theirs in part:
                answers |= {f"{name}/ours": np.asarray(ours), f"{name}/theirs": np.asarray(theirs)}
    np.savez(here / "answers.npz", **answers)
