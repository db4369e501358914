"""Fixture of Google's released configurations (btd/configs.json) against the files in configs/."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from diffusion_distill import weights
from diffusion_distill.cli import build
from diffusion_distill.denoisers.model import Model
from diffusion_distill.networks.layers import GroupNorm
from diffusion_distill.process.time_input import LogsnrInput
from diffusion_distill.training.optimizers import OptimizerSettings
from golden_checks.btd_weights import FAMILIES
from golden_checks.common import FLOAT64, Fixture, Kind, Mode, keys_like

#: The original's configuration -> our file, its argument.
FILES = {
    "cifar_base": ("cifar10_teacher", ()),
    "cifar_distill": ("cifar10_btd", ()),
    "imagenet64_base": ("imagenet64_teacher", ()),
    "imagenet64_distill": ("imagenet64_btd", ()),
    "bedroom128_base": ("lsun128_teacher", ("bedroom",)),
    "bedroom128_distill": ("lsun128_btd", ("bedroom",)),
    "church128_base": ("lsun128_teacher", ("church",)),
    "church128_distill": ("lsun128_btd", ("church",)),
}
#: What the package has no counterpart of, and why.
SKIPPED = {
    "cadences of logs and checkpoints": ("train/*_every_*", "train/substeps"),
    "names of the original's classes": ("dataset/name", "model/name"),
    "never read by the released program": ("distillation/only_finetune_temb",),
    "an argument of the ancestral sampler here": ("model/logvar_type",),
    "updates that are not finite are always skipped here": ("train/enable_update_skip",),
}


def check_configs(fixture: Fixture, mode: Mode) -> None:
    for name in fixture.meta["configs"]:
        with fixture.attempt(f"configs/{name}", mode):
            file, arguments = FILES[name]
            config = importlib.import_module(f"configs.{file}").get_config(*arguments)
            published = weights.PUBLISHED[f"{FAMILIES[name.rpartition('_')[0]]}_original"]
            model = build.model(config) if "model" in config else published.model
            for path, value in settings(config, model, published).items():
                fixture.equal(f"configs/{name}/{path}", value)
    for path, value in defaults().items():
        fixture.equal(f"notes/defaults_not_in_configs/{path}", value)


def settings(config: Any, model: Model, published: weights.Published) -> Mapping[str, Any]:
    """What our config says, by the original's words."""
    method, run, network = build.method(config), build.settings(config), model.network
    trains = config.method.name == "denoising"
    [phase, *_] = method.phases(model, run.batch_size)
    process = model.to_dict()["process"]
    arguments = ("ch", "emb_ch", "ch_mult", "num_res_blocks", "attn_resolutions", "head_dim", "num_heads", "dropout")
    return {
        "dataset/args/class_conditional": model.num_classes > 1,
        "dataset/args/randflip": run.flip,
        "dataset/args/image_size": model.shape[0],
        "dataset/args/subset": config.data.dataset.removeprefix("lsun/").removesuffix("_outdoor"),
        **{f"model/args/{field}": getattr(network, field) for field in arguments},
        "model/args/resblock_resample": network.resblock_resample,
        "model/args/logsnr_input_type": model.to_dict()["time_input"]["kind"],
        "model/eval_clip_denoised": config.sample.clip,
        **{f"model/{use}_logsnr_schedule/{key}": v for use in ("train", "eval") for key, v in process.items()},
        "model/eval_sampling_num_steps": config.sample.steps if trains else method.end_steps,
        "model/mean_loss_weight_type": method.weighting,
        "model/mean_type": model.prediction,
        "model/train_num_steps": method.steps if trains else method.end_steps,
        "sampler": build.spec(config).complete(1).solver,
        "seed": run.seed,
        "train/batch_size": run.batch_size,
        "train/ema_decay": phase.momentum,
        "train/grad_clip": run.optimizer.grad_clip,
        "train/learning_rate": phase.learning_rate,
        "train/learning_rate_warmup_steps": phase.warmup,
        "train/learning_rate_anneal_type": "linear" if phase.anneal else "none",
        "train/learning_rate_anneal_steps": phase.updates,
        "train/optimizer": run.optimizer.rule,
        "train/weight_decay": run.optimizer.weight_decay,
        "distillation/start_num_steps": phase.teacher_steps,
        "distillation/end_num_steps": getattr(method, "end_steps", 0),
        "distillation/steps_per_iter": phase.updates,
        "distillation/teacher_checkpoint_path": published.url.replace("https://storage.googleapis.com/", "gs://"),
    }


def defaults() -> Mapping[str, Any]:
    """What the package does where a config is silent, by the original's words."""
    optimizer, norm, time = OptimizerSettings(), GroupNorm(), LogsnrInput()
    return {
        "adam_beta1": optimizer.b1,
        "adam_beta2": optimizer.b2,
        "adam_eps": optimizer.eps,
        "optimizer_beta": OptimizerSettings(rule="momentum").b1,
        "logsnr_scale_range": (time.low, time.high),
        "groupnorm_groups": norm.num_groups,
        "groupnorm_eps": norm.epsilon,
    }


def without_counterpart(fixture: Fixture) -> list[tuple[list[str], str]]:
    """What the package has no counterpart of."""
    listed = [
        (keys_like(fixture, *(f"configs/*/{pattern}" for pattern in patterns)), reason)
        for reason, patterns in SKIPPED.items()
    ]
    notes = keys_like(fixture, "notes/unused_by_released_code")
    others = keys_like(fixture, "notes/*/logvar_coeff", "notes/*/enable_update_skip")
    return [*listed, (notes, "words"), (others, "the default of something skipped above")]


def _is_configs(fixture: Fixture) -> bool:
    return set(fixture.meta) == {"configs", "notes"}


KINDS = [Kind("btd configs", _is_configs, check_configs, without_counterpart, modes=(FLOAT64,))]
