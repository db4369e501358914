"""The networks of improved DDPM (arXiv:2102.09672) and ADM (arXiv:2105.05233), and ADM's classifier.

Their programs number the blocks in order of evaluation:

    input_blocks.0.0           conv_in
    input_blocks.k.0, .1       residual block and attention, or what halves the image (`.0.op` if a convolution)
    middle_block.0, .1, .2     residual, attention, residual
    output_blocks.k.0, .1      residual block and attention
    output_blocks.k.1 or .2    what doubles the image, after a level's last block (`.conv` if a convolution)
    out.0, out.2               norm_out, conv_out

q, k and v are one kernel. Improved DDPM orders its outputs (heads, {q, k, v}, channels), as does ADM unless it was made
with use_new_attention_order: ({q, k, v}, heads, channels). The shapes are equal, so that no file shows which it is.
OpenAI's consistency models (arXiv:2303.01469) are ADM's network in the new order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any

import numpy as np

from diffusion_distill.networks import UNet
from diffusion_distill.networks.noisy_classifier import NoisyClassifier
from diffusion_distill.weights import same_network
from diffusion_distill.weights.arguments import REQUIRED, Arguments
from diffusion_distill.weights.matching import Shape, WeightsError
from diffusion_distill.weights.torch_layout import LEAVES, Place, count_of

_SHARED: dict[str, Any] = {
    "image_size": REQUIRED,
    "in_channels": 3,
    "model_channels": REQUIRED,
    "out_channels": REQUIRED,
    "num_res_blocks": REQUIRED,
    "attention_resolutions": REQUIRED,
    "dropout": 0.0,
    "channel_mult": (1, 2, 4, 8),
    "conv_resample": True,
    "dims": 2,
    "use_checkpoint": False,
    "use_fp16": False,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
GUIDED = {**_SHARED, "num_classes": None}
CLASSIFIER = {**_SHARED, "pool": "adaptive"}
#: The network, in messages.
NAME = "ADM's network"
#: What the three programs have in common, and progressive distillation's network has not.
SETTINGS: dict[str, Any] = {
    "cos_first": True,
    "frequency_shift": 0.0,
    "norm_epsilon": 1e-5,
    "wide_conv_in": True,
    "label_bias": False,
    "down_padding": (1, 1),
    "init_rule": "uniform",
}


def guided(arguments: Mapping[str, Any]) -> tuple[UNet, Shape]:
    """The network of ADM, or of improved DDPM, whose arguments are some of ADM's; and the shape of its images.

    Raises:
      WeightsError: an argument is unknown, or has a value that the library does not compute with.
    """
    given = Arguments(arguments, GUIDED, NAME)
    fields, shape = _fields(given)
    return UNet(**fields, num_classes=given.classes("num_classes")), shape


def arguments_of(unet: Any, shape: Shape) -> dict[str, Any]:
    """The constructor arguments of ADM's network for a U-Net: the inverse of `guided`.

    Args:
      unet: a `UNet`.
      shape: of its images, [height, width, channels].

    Raises:
      WeightsError: ADM's network cannot compute what the U-Net does; the message says which settings differ.
    """
    ours, (height, width, channels) = same_network.unet_of(unet, NAME), shape
    if height != width:
        raise WeightsError(
            f"{NAME} is for square images, not for images of {height} by {width}. Export as safetensors."
        )
    attention = same_network.heads(ours, shape)
    arguments = {
        "image_size": height,
        "in_channels": channels,
        "model_channels": ours.ch,
        "out_channels": ours.out_ch,
        "num_res_blocks": ours.num_res_blocks,
        "attention_resolutions": [2**level for level, count in enumerate(attention) if count],
        "dropout": ours.dropout,
        "channel_mult": list(ours.ch_mult),
        "num_classes": ours.num_classes if ours.num_classes > 1 else None,
        "conv_resample": ours.conv_resample,
        "num_heads": ours.num_heads or 1,
        "num_head_channels": ours.head_dim or -1,
        "num_heads_upsample": ours.num_heads_up or -1,
        "use_scale_shift_norm": ours.film,
        "resblock_updown": ours.resblock_resample,
        "use_new_attention_order": False,
    }
    try:
        built, _ = guided(arguments)
    except ValueError as error:
        raise WeightsError(f"{NAME} cannot be built with the settings of this network: {error}") from error
    same_network.check(ours, built, shape, NAME)
    return arguments


def classifier(arguments: Mapping[str, Any]) -> tuple[NoisyClassifier, Shape]:
    """ADM's classifier of noisy images, and the shape of its images.

    Raises:
      WeightsError: an argument is unknown, or has a value that the library does not compute with.
    """
    given = Arguments(arguments, CLASSIFIER, "ADM's classifier")
    given.only("which is unknown here", pool=("attention", "adaptive"))
    pool_head_dim = given.whole("num_head_channels") if given.values["pool"] == "attention" else 0
    fields, shape = _fields(given)
    return NoisyClassifier(**fields, pool=given.values["pool"], pool_head_dim=pool_head_dim), shape


def _fields(given: Arguments) -> tuple[dict[str, Any], Shape]:
    """The network's fields but for labels, and the shape of its images."""
    given.only("and only images are known here", dims=(2,))
    values = given.values
    size, ch = given.whole("image_size"), given.whole("model_channels")
    factors = given.numbers("attention_resolutions")
    if any(size % factor for factor in factors):
        raise given.refuse("attention_resolutions", f"which do not divide the image size {size}")
    by_width = values["num_head_channels"] != -1
    up = None if by_width or values["num_heads_upsample"] == -1 else given.whole("num_heads_upsample")
    updown = given.flag("resblock_updown")
    fields = {
        "ch": ch,
        "emb_ch": 4 * ch,
        "out_ch": given.whole("out_channels"),
        "ch_mult": given.numbers("channel_mult", whole=False),
        "num_res_blocks": given.whole("num_res_blocks"),
        "attn_resolutions": tuple(size // factor for factor in factors),
        "num_heads": None if by_width else given.whole("num_heads"),
        "head_dim": given.whole("num_head_channels") if by_width else None,
        "num_heads_up": up,
        "film": given.flag("use_scale_shift_norm"),
        "resblock_resample": updown,
        "conv_resample": updown or given.flag("conv_resample"),
        **SETTINGS,
    }
    return fields, (size, size, given.whole("in_channels"))


# ---------------------------------------------------------------- what tensors show


def inferred(tensors: Mapping[str, np.ndarray], image_size: int) -> dict[str, Any]:
    """The constructor arguments that tensors show: not the size of the images, heads, and order of q, k and v.

    Raises:
      KeyError: they are not the tensors of such a network.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    ch, blocks = shapes["time_embed.0.weight"][1], count_of(shapes, r"output_blocks\.(\d+)\.")
    per_level = _blocks_of_a_level(shapes, blocks)  # on the way up: one more than num_res_blocks
    levels = blocks // per_level
    firsts = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
    widths = [shapes[f"{first}.0.out_layers.3.weight"][0] for first in firsts]
    down = f"input_blocks.{per_level}.0"
    label = shapes.get("label_emb.weight")
    return {
        "image_size": image_size,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "model_channels": ch,
        "out_channels": shapes["out.2.weight"][0],
        "num_res_blocks": per_level - 1,
        "attention_resolutions": tuple(2**k for k, first in enumerate(firsts) if f"{first}.1.norm.weight" in shapes),
        "channel_mult": tuple(width // ch if width % ch == 0 else width / ch for width in widths),
        "conv_resample": levels == 1 or any(name.startswith(f"{down}.") for name in shapes),
        "resblock_updown": levels > 1 and f"{down}.in_layers.0.weight" in shapes,
        "use_scale_shift_norm": shapes[f"{firsts[0]}.0.emb_layers.1.weight"][0] == 2 * widths[0],
        "num_classes": label[0] if label else None,
    }


def _blocks_of_a_level(shapes: Mapping[str, Shape], blocks: int) -> int:
    """Blocks of a level on the way up. The last of them is followed by what doubles the image, if that has tensors.

    Without tensors, what halves the image leaves a gap in the numbers of the way down.
    """
    for k in range(blocks):
        parts = [
            f"output_blocks.{k}.{part}.{name}" for part in (1, 2) for name in ("conv.weight", "in_layers.0.weight")
        ]
        if any(part in shapes for part in parts):
            return k + 1
        if k and not any(name.startswith(f"input_blocks.{k}.") for name in shapes):
            return k
    return max(blocks, 1)


# ---------------------------------------------------------------- where parameters are

_INNER = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "temb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "nin_shortcut": "skip_connection",
    "norm": "norm",
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "proj_out": "proj_out",
}
_OUTER = {
    "dense0": "time_embed.0",
    "dense1": "time_embed.2",
    "class_emb": "label_emb",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
    "mid.block_1": "middle_block.0",
    "mid.attn_1": "middle_block.1",
    "mid.block_2": "middle_block.2",
    "pool_attention": "out.2",  # the classifier's
    "pool_conv": "out.3",
}
_POOL = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj", "proj_out": "c_proj"}


def places(network: UNet, paths: Iterable[str], order: str) -> Callable[[str], Place]:
    """Path of a parameter -> where it is stored.

    Args:
      paths: of all parameters; they show which blocks are followed by attention.
      order: of q, k and v, see `torch_layout`: 'hqc', or 'qhc' in the new order.
    """
    modules = _OUTER | _numbered(network, {path.split("/")[0] for path in paths})

    def place(path: str) -> Place:
        module, *inner, leaf = path.split("/")
        if module == "class_emb":
            return Place(f"{modules[module]}.weight", "table")
        if leaf == "positional_embedding":
            return Place(f"{modules[module]}.{leaf}")
        pool = module == "pool_attention"
        names = [(_POOL if pool else _INNER)[name] for name in inner]
        packed = bool(inner) and inner[-1] in ("q", "k", "v")
        one_axis = packed or inner[-1:] == ["proj_out"]
        ones = 1 if one_axis else 2 * (inner[-1:] == ["nin_shortcut"] or module == "pool_conv")
        packing = ("qhc" if pool else order) if packed else ""
        return Place(".".join((modules[module], *names, LEAVES[leaf])), packing, ones * (leaf == "kernel"))

    return place


def _numbered(network: UNet, there: set[str]) -> dict[str, str]:
    """Names of the numbered blocks; a block that resamples without parameters has a number too."""
    names, number = {}, count(1)
    suffix = "" if network.resblock_resample else ".op"
    for level in range(len(network.ch_mult)):
        for block in range(network.num_res_blocks):
            k = next(number)
            names[f"down_{level}.block_{block}"] = f"input_blocks.{k}.0"
            names[f"down_{level}.attn_{block}"] = f"input_blocks.{k}.1"
        if level < len(network.ch_mult) - 1:
            names[f"down_{level}.downsample"] = f"input_blocks.{next(number)}.0{suffix}"
    suffix, last = "" if network.resblock_resample else ".conv", network.num_res_blocks
    for i, level in enumerate(reversed(range(len(network.ch_mult)))):
        for block in range(last + 1):
            k = i * (last + 1) + block
            names[f"up_{level}.block_{block}"] = f"output_blocks.{k}.0"
            names[f"up_{level}.attn_{block}"] = f"output_blocks.{k}.1"
        after = 2 if f"up_{level}.attn_{last}" in there else 1
        names[f"up_{level}.upsample"] = f"output_blocks.{i * (last + 1) + last}.{after}{suffix}"
    return names
