"""Published files of PyTorch, with what their tensors do not show.

Names, addresses and settings are those in the publishers' READMEs and scripts. Sizes and hashes were not published;
the hash is recorded at the first download. ADM writes attention as image sizes ("32,16,8"), here they are factors.

    ddpm-*                  Ho et al., arXiv:2006.11239, converted to PyTorch by P. Esser; averages of the weights
    google/ddpm-*           the same networks in diffusers' form
    iddpm-*                 Nichol & Dhariwal, arXiv:2102.09672
    adm-*                   Dhariwal & Nichol, arXiv:2105.05233
    cd-*, ct-*, cm-edm-*    Song et al., arXiv:2303.01469: distilled, trained alone, and the teachers
    dit-xl-2-*              Peebles & Xie, arXiv:2212.09748
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_distill.base.errors import WeightsError
from diffusion_distill.formats import strict_json
from diffusion_distill.weights import torch_models
from diffusion_distill.weights.published import Published

OPENAI = "https://openaipublic.blob.core.windows.net/"
HEIBOX = "https://heibox.uni-heidelberg.de/f/"
HUB = "https://huggingface.co/"
#: ch_mult of improved DDPM and ADM by the size of images.
MULTIPLES = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
IMAGES = "central square, resized to the network's size; pixels in [-1, 1]"


def _entry(
    name: str,
    family: str,
    arguments: Mapping[str, Any],
    dataset: str,
    url: str,
    source: str,
    schedule: Mapping[str, Any] | None = None,
) -> Published:
    schedule = schedule or {}
    model, steps, _ = torch_models.model_of(torch_models.Described(family, arguments, schedule))
    return Published(
        name, model, steps, dataset, url, source, "torch",
        family=family, arguments={**arguments, **schedule}, preprocessing=IMAGES,
    )  # fmt: skip


# ---------------------------------------------------------------- DDPM

DDPM_SOURCE = (
    "Ho, Jain & Abbeel, Denoising Diffusion Probabilistic Models, arXiv:2006.11239; converted to PyTorch by P. Esser. "
    "No licence of the files themselves is known to us: check before passing them on."
)
HUB_SOURCE = (
    "Ho, Jain & Abbeel, Denoising Diffusion Probabilistic Models, arXiv:2006.11239; published by Google for diffusers. "
    "The licence stands on the model's page."
)
#: data set in names -> (data set, image size)
DDPM_DATASETS = {
    "cifar10": ("CIFAR-10", 32),
    "celebahq": ("CelebA-HQ 256x256", 256),
    "bedroom": ("LSUN bedroom 256x256", 256),
    "cat": ("LSUN cat 256x256", 256),
    "church": ("LSUN church 256x256", 256),
}
DDPM_FILES = {
    "cifar10": "2e4f01e2d9ee49bab1d5",
    "bedroom": "b95206528f384185889b",
    "cat": "0701aac3aa69457bbe34",
    "church": "44ccb50ef3c6436db52e",
}


def _ddpm() -> Iterator[Published]:
    for short, (dataset, size) in DDPM_DATASETS.items():
        multiples = (1, 2, 2, 2) if size == 32 else (1, 1, 2, 2, 4, 4)
        arguments = {
            "image_size": size,
            "ch": 128,
            "ch_mult": multiples,
            "num_res_blocks": 2,
            "attn_resolutions": (16,),
        }
        if short in DDPM_FILES:
            url = f"{HEIBOX}{DDPM_FILES[short]}/?dl=1"
            yield _entry(f"ddpm-{short}", "ddpm", arguments, dataset, url, DDPM_SOURCE)
        hub = f"google/ddpm-{short}-{size}"
        url = f"{HUB}{hub}/resolve/main/diffusion_pytorch_model.bin"
        yield _entry(hub, "diffusers_unet2d", _diffusers(size, multiples), dataset, url, HUB_SOURCE)


def _diffusers(size: int, multiples: tuple[int, ...]) -> dict[str, Any]:
    """DDPM's network in the words of diffusers."""
    attention = [size >> level == 16 for level in range(len(multiples))]
    return {
        "sample_size": size,
        "block_out_channels": tuple(128 * mult for mult in multiples),
        "layers_per_block": 2,
        "down_block_types": tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        "up_block_types": tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
    }


# ---------------------------------------------------------------- improved DDPM and ADM

OPENAI_SOURCE = "Released by OpenAI with its code, which is under the MIT licence; see also the model card there."
IDDPM_SOURCE = (
    f"Nichol & Dhariwal, Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672. {OPENAI_SOURCE}"
)
ADM_SOURCE = f"Dhariwal & Nichol, Diffusion Models Beat GANs on Image Synthesis, arXiv:2105.05233. {OPENAI_SOURCE}"
COSINE = {"beta_schedule": "cosine", "num_diffusion_timesteps": 4000}
#: name -> (data set, file, what differs from `_improved`, schedule)
IDDPM_FILES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "iddpm-cifar10": ("CIFAR-10", "cifar10_uncond_50M_500K", {"image_size": 32}, COSINE),
    "iddpm-cifar10-vlb": ("CIFAR-10", "cifar10_uncond_vlb_50M_500K", {"image_size": 32}, COSINE),
    "iddpm-imagenet64": ("ImageNet 64x64", "imagenet64_uncond_100M_1500K", {}, COSINE),
    "iddpm-imagenet64-vlb": ("ImageNet 64x64", "imagenet64_uncond_vlb_100M_1500K", {}, COSINE),
    "iddpm-imagenet64-cond": (
        "ImageNet 64x64", "imagenet64_cond_270M_250K",
        {"model_channels": 192, "num_classes": 1000}, {**COSINE, "rescale_timesteps": False},
    ),
    "iddpm-lsun-bedroom": (
        "LSUN bedroom 256x256", "lsun_uncond_100M_2400K_bs64",
        {
            "image_size": 256, "num_res_blocks": 2, "num_heads": 1,
            "use_scale_shift_norm": False, "attention_resolutions": (16,),
        },
        {"rescale_timesteps": False},
    ),
}  # fmt: skip


def _improved(differing: Mapping[str, Any]) -> dict[str, Any]:
    size = differing.get("image_size", 64)
    return {
        "image_size": size,
        "model_channels": 128,
        "out_channels": 6,
        "num_res_blocks": 3,
        "attention_resolutions": (size // 16, size // 8),
        "channel_mult": MULTIPLES[size],
        "num_heads": 4,
        "use_scale_shift_norm": True,
        **differing,
    }


def _adm(size: int, **differing: Any) -> dict[str, Any]:
    return {
        "image_size": size,
        "model_channels": 256,
        "out_channels": 6,
        "num_res_blocks": 2,
        "attention_resolutions": (size // 32, size // 16, size // 8),
        "channel_mult": MULTIPLES[size],
        "num_head_channels": 64,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "use_new_attention_order": False,
        **differing,
    }


SMALL = {"model_channels": 192, "num_res_blocks": 3, "use_new_attention_order": True}  # of ImageNet 64x64
#: name -> (data set, file, arguments, schedule)
ADM_FILES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "adm-imagenet64": (
        "ImageNet 64x64", "64x64_diffusion", _adm(64, num_classes=1000, **SMALL), {"beta_schedule": "cosine"},
    ),
    "adm-imagenet128": (
        "ImageNet 128x128", "128x128_diffusion", _adm(128, num_classes=1000, num_heads=4, num_head_channels=-1), {},
    ),
    "adm-imagenet256": ("ImageNet 256x256", "256x256_diffusion", _adm(256, num_classes=1000), {}),
    "adm-imagenet256-uncond": ("ImageNet 256x256", "256x256_diffusion_uncond", _adm(256), {}),
    "adm-imagenet512": ("ImageNet 512x512", "512x512_diffusion", _adm(512, num_classes=1000), {}),
    "adm-lsun-bedroom": ("LSUN bedroom 256x256", "lsun_bedroom", _adm(256), {}),
    "adm-lsun-cat": ("LSUN cat 256x256", "lsun_cat", _adm(256), {}),
    "adm-lsun-horse": ("LSUN horse 256x256", "lsun_horse", _adm(256), {}),
    "adm-lsun-horse-nodropout": ("LSUN horse 256x256", "lsun_horse_nodropout", _adm(256), {}),
}  # fmt: skip


def _openai() -> Iterator[Published]:
    for name, (dataset, file, differing, schedule) in IDDPM_FILES.items():
        url = f"{OPENAI}diffusion/march-2021/{file}.pt"
        yield _entry(name, "improved_ddpm", _improved(differing), dataset, url, IDDPM_SOURCE, schedule)
    for name, (dataset, file, arguments, schedule) in ADM_FILES.items():
        url = f"{OPENAI}diffusion/jul-2021/{file}.pt"
        yield _entry(name, "guided_diffusion", arguments, dataset, url, ADM_SOURCE, schedule)


# ---------------------------------------------------------------- DiT

DIT_SOURCE = (
    "Peebles & Xie, Scalable Diffusion Models with Transformers, arXiv:2212.09748. Released by Meta under CC BY-NC "
    "4.0: not for commercial use. Its images are latents of Stable Diffusion's autoencoder, times 0.18215."
)


def _dit() -> Iterator[Published]:
    for size in (256, 512):
        arguments = {
            "image_size": size // 8,
            "out_channels": 8,
            "hidden_size": 1152,
            "depth": 28,
            "num_heads": 16,
        }
        url = f"https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{size}x{size}.pt"
        yield _entry(f"dit-xl-2-{size}", "dit", arguments, f"ImageNet {size}x{size}", url, DIT_SOURCE)


# ---------------------------------------------------------------- classifiers of noisy images


def _classifier(size: int, depth: int = 2, **schedule: Any) -> dict[str, Any]:
    return {
        "image_size": size,
        "model_channels": 128,
        "out_channels": 1000,
        "num_res_blocks": depth,
        "attention_resolutions": (size // 32, size // 16, size // 8),
        "channel_mult": MULTIPLES[size],
        "num_head_channels": 64,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "pool": "attention",
        **schedule,
    }


MOST_ARGUMENTS = 2**16  # bytes
#: Address of a classifier of ImageNet -> its arguments, for `torch_models.read_classifier`. The first goes with
#: adm-imagenet64, and so on.
CLASSIFIERS: dict[str, dict[str, Any]] = {
    f"{OPENAI}diffusion/jul-2021/64x64_classifier.pt": _classifier(64, 4, beta_schedule="cosine"),
    f"{OPENAI}diffusion/jul-2021/128x128_classifier.pt": _classifier(128),
    f"{OPENAI}diffusion/jul-2021/256x256_classifier.pt": _classifier(256),
    f"{OPENAI}diffusion/jul-2021/512x512_classifier.pt": _classifier(512),
}


def arguments_of_classifier(path: Path) -> dict[str, Any]:
    """The arguments of a classifier's file: those published under its name, or those in a JSON file beside it.

    Raises:
      WeightsError: there are neither.
    """
    for address, arguments in CLASSIFIERS.items():
        if address.endswith(f"/{path.name}"):
            return arguments
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise WeightsError(
            f"The classifier {path} has none of the published names "
            f"({', '.join(address.rpartition('/')[2] for address in CLASSIFIERS)}). Write the arguments of its network "
            f"and its schedule, as weights.published_torch.CLASSIFIERS has them, as a JSON object into {beside}."
        )
    try:
        return strict_json.loads(beside.read_bytes(), MOST_ARGUMENTS)
    except WeightsError as error:
        raise WeightsError(f"{beside}: {error}.") from error


# ---------------------------------------------------------------- consistency models

CM_SOURCE = f"Song, Dhariwal, Chen & Sutskever, Consistency Models, arXiv:2303.01469. {OPENAI_SOURCE}"
#: data set in names -> (data set, arguments)
CM_DATASETS: dict[str, tuple[str, dict[str, Any]]] = {
    "imagenet64": ("ImageNet 64x64", _adm(64, out_channels=3, num_classes=1000, **SMALL)),
    "bedroom256": (
        "LSUN bedroom 256x256",
        _adm(256, out_channels=3, use_scale_shift_norm=False, use_new_attention_order=True),
    ),
    "cat256": (
        "LSUN cat 256x256",
        _adm(256, out_channels=3, use_scale_shift_norm=False, use_new_attention_order=True),
    ),
}


def _consistency() -> Iterator[Published]:
    for short, (dataset, arguments) in CM_DATASETS.items():
        for name, file in {
            f"cd-{short}-l2": f"cd_{short}_l2",
            f"cd-{short}-lpips": f"cd_{short}_lpips",
            f"ct-{short}": f"ct_{short}",
            f"cm-edm-{short}": f"edm_{short}_ema",
        }.items():
            family = "consistency_models_edm" if name.startswith("cm-edm") else "consistency_models"
            yield _entry(name, family, arguments, dataset, f"{OPENAI}consistency/{file}.pt", CM_SOURCE)


FILES: tuple[Published, ...] = (*_ddpm(), *_openai(), *_consistency(), *_dit())
