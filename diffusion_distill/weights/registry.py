"""Published models by name: their network, data set, number of steps, and the address of the file.

Progressive distillation (Salimans & Ho, arXiv:2202.00512): for each of four data sets the teacher
(`cifar_original`) and the students of 64, 32, 16, 8, 4, 2 and 1 steps (`cifar_8`). Hyper-parameters are those
of the released configs. A student has its teacher's network.

EDM (Karras et al., arXiv:2206.00364): networks trained as in the paper's configuration F (`edm-...`, whose `vp` and
`ve` name the network, DDPM++ or NCSN++), and the networks it starts from (`baseline-...`, configuration A). The files
hold their hyper-parameters. For the baselines we list the defaults of their classes.

DDPM, improved DDPM, ADM, consistency models and diffusers' copies of DDPM: see `published_torch`.

Dropout, which has no parameters, is 0 here. Shapes of parameters are not listed, since they follow from the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusion_distill.denoisers.model import Model
from diffusion_distill.networks import UNet
from diffusion_distill.process.processes import Cosine
from diffusion_distill.process.time_input import LogsnrInput
from diffusion_distill.weights import edm, progressive, published_torch, torch_models
from diffusion_distill.weights.matching import Checkpoint
from diffusion_distill.weights.published import Published

#: format -> function(path, model) that reads such a file; files of EDM say what model they hold.
READERS: dict[str, Callable[..., Checkpoint]] = {
    "progressive": progressive.read,
    "edm": edm.read,
    "torch": torch_models.read,
}

# ---------------------------------------------------------------- progressive distillation

BUCKET = "https://storage.googleapis.com/gresearch/diffusion-distillation/"
SOURCE = (
    "Salimans & Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv:2202.00512. Released by "
    "Google with its research code; no licence of the files themselves is known to us: check before passing them on."
)
STUDENT_STEPS = (64, 32, 16, 8, 4, 2, 1)


def _model(shape: tuple[int, int, int], prediction: str, **network: object) -> Model:
    """The settings that the four models share; 'both' doubles the output channels."""
    out_ch = shape[-1] * (2 if prediction == "both" else 1)
    unet = UNet(out_ch=out_ch, num_res_blocks=3, resblock_resample=True, dropout=0.0, **network)  # type: ignore[arg-type]
    return Model(unet, shape, Cosine(-20.0, 20.0), prediction, LogsnrInput("inv_cos"))


def _lsun() -> Model:
    return _model(
        (128, 128, 3), "both",
        ch=64, emb_ch=768, ch_mult=(1, 2, 4, 6, 8), attn_resolutions=(8, 16, 32), head_dim=64,
    )  # fmt: skip


#: family -> (data set, model)
FAMILIES = {
    "cifar": (
        "CIFAR-10",
        _model((32, 32, 3), "x", ch=256, emb_ch=1024, ch_mult=(1, 1, 1), attn_resolutions=(8, 16), num_heads=1),
    ),
    "imagenet": (
        "ImageNet 64x64",
        _model(
            (64, 64, 3), "both", num_classes=1000,
            ch=192, emb_ch=768, ch_mult=(1, 2, 3, 4), attn_resolutions=(8, 16, 32), head_dim=64,
        ),
    ),
    "bedroom": ("LSUN bedroom 128x128", _lsun()),
    "church": ("LSUN church 128x128", _lsun()),
}  # fmt: skip


def _progressive() -> dict[str, Published]:
    entries = {}
    for family, (dataset, model) in FAMILIES.items():
        for ending, steps in {"original": 0, **{str(steps): steps for steps in STUDENT_STEPS}}.items():
            name = f"{family}_{ending}"
            entries[name] = Published(name, model, steps, dataset, BUCKET + name, SOURCE)
    return entries


# ---------------------------------------------------------------- EDM

EDM_SITE = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
EDM_SOURCE = (
    "Karras, Aittala, Aila & Laine, Elucidating the Design Space of Diffusion-Based Generative Models, "
    "arXiv:2206.00364. Released by NVIDIA under CC BY-NC-SA 4.0: not for commercial use, and whatever is made from "
    "it is under the same licence."
)

#: What the networks are made with, but for what depends on the data set (`_init_kwargs`).
EDM_NETWORKS: dict[str, dict[str, Any]] = {
    "vp": {
        "model_type": "SongUNet", "model_channels": 128, "embedding_type": "positional", "channel_mult_noise": 1,
        "encoder_type": "standard", "decoder_type": "standard", "resample_filter": [1, 1],
    },
    "ve": {
        "model_type": "SongUNet", "model_channels": 128, "embedding_type": "fourier", "channel_mult_noise": 2,
        "encoder_type": "residual", "decoder_type": "standard", "resample_filter": [1, 3, 3, 1],
    },
    "adm": {"model_type": "DhariwalUNet", "model_channels": 192, "channel_mult": [1, 2, 3, 4]},
}  # fmt: skip
#: data set in names -> (data set, image size, what networks for it are made with)
EDM_DATASETS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "cifar10-32x32": ("CIFAR-10", 32, {"channel_mult": [2, 2, 2], "augment_dim": 9}),
    "ffhq-64x64": ("FFHQ 64x64", 64, {"channel_mult": [1, 2, 2, 2], "augment_dim": 9}),
    "afhqv2-64x64": ("AFHQv2 64x64", 64, {"channel_mult": [1, 2, 2, 2], "augment_dim": 9}),
    "imagenet-64x64": ("ImageNet 64x64", 64, {}),
}
#: (data set, number of classes or 0, network): the files edm-DATASET-{cond,uncond}-NETWORK.pkl.
EDM_FILES: tuple[tuple[str, int, str], ...] = (
    *(("cifar10-32x32", classes, network) for classes in (10, 0) for network in ("vp", "ve")),
    *((dataset, 0, network) for dataset in ("ffhq-64x64", "afhqv2-64x64") for network in ("vp", "ve")),
    ("imagenet-64x64", 1000, "adm"),
)
#: (data set, number of classes or 0, network, wrapper, what else it is made with)
EDM_BASELINES: tuple[tuple[str, int, str, str, dict[str, Any]], ...] = (
    ("cifar10-32x32", 0, "vp", "VPPrecond", {"channel_mult": [1, 2, 2, 2]}),
    ("cifar10-32x32", 0, "ve", "VEPrecond", {"channel_mult": [1, 2, 2, 2]}),
    ("imagenet-64x64", 1000, "adm", "iDDPMPrecond", {}),
)


def _edm() -> dict[str, Published]:
    files = [_edm_file("edm", "", *file, "EDMPrecond", EDM_DATASETS[file[0]][2]) for file in EDM_FILES]
    files += [_edm_file("baseline", "baseline/", *file) for file in EDM_BASELINES]
    return {entry.name: entry for entry in files}


def _edm_file(
    family: str, folder: str, short: str, classes: int, network: str, wrapper: str, more: dict[str, Any]
) -> Published:
    dataset, size, _ = EDM_DATASETS[short]
    name = f"{family}-{short}-{'cond' if classes else 'uncond'}-{network}"
    kwargs = {"img_resolution": size, "img_channels": 3, "label_dim": classes, **EDM_NETWORKS[network], **more}
    model = edm.model_of(wrapper, kwargs)
    return Published(name, model, 0, dataset, f"{EDM_SITE}{folder}{name}.pkl", EDM_SOURCE, "edm")


PUBLISHED: dict[str, Published] = _progressive() | _edm() | {entry.name: entry for entry in published_torch.FILES}
