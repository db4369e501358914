"""UNet2DModel of the library diffusers (Hugging Face): its settings, as config.json has them, and where parameters are.

The blocks are named in order of evaluation: `up_blocks.0` is our coarsest level. Before 2023 the parts of an attention
had other names; both are read (`renamed`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_distill.networks import UNet
from diffusion_distill.weights import same_network
from diffusion_distill.weights.arguments import REQUIRED, Arguments
from diffusion_distill.weights.matching import Shape
from diffusion_distill.weights.torch_layout import LEAVES, Place

ARGUMENTS: dict[str, Any] = {
    "sample_size": REQUIRED,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
#: Block -> (whether it has attention, how it resamples: None is as downsample_type and upsample_type say).
BLOCKS = {
    "down": {
        "DownBlock2D": (False, "conv"),
        "AttnDownBlock2D": (True, None),
        "ResnetDownsampleBlock2D": (False, "resnet"),
    },
    "up": {"UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, "resnet")},
}
#: The network, in messages.
NAME = "UNet2DModel"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def network(arguments: Mapping[str, Any]) -> tuple[UNet, Shape]:
    """The network of constructor arguments, and the shape [height, width, channels] of its images.

    Raises:
      WeightsError: an argument is unknown, or has a value that the library does not compute with.
    """
    given = Arguments({k: v for k, v in arguments.items() if not k.startswith("_")}, ARGUMENTS, NAME)
    _check_fixed(given)
    widths, (attention, residual) = given.numbers("block_out_channels"), _blocks(given)
    if len(widths) != len(attention):
        raise given.refuse("block_out_channels", f"but there are {len(attention)} blocks on the way down")
    size, ch, film = _size(given), widths[0], given.values["resnet_time_scale_shift"] == "scale_shift"
    head_dim, emb_ch = given.values["attention_head_dim"], given.values["time_embedding_dim"]
    unet = UNet(
        ch=ch,
        emb_ch=4 * ch if emb_ch is None else given.whole("time_embedding_dim"),
        out_ch=given.whole("out_channels"),
        ch_mult=tuple(width // ch if width % ch == 0 else width / ch for width in widths),
        num_res_blocks=given.whole("layers_per_block"),
        attn_resolutions=tuple(size[0] >> level for level, has in enumerate(attention) if has),
        num_heads=1 if head_dim is None else None,
        head_dim=None if head_dim is None else given.whole("attention_head_dim"),
        num_classes=given.classes("num_class_embeds"),
        cos_first=given.flag("flip_sin_to_cos"),
        frequency_shift=float(given.whole("freq_shift", 0)),
        norm_groups=given.whole("norm_num_groups"),
        norm_epsilon=given.number("norm_eps"),
        label_bias=False,
        init_rule="uniform",
        film=film,
        resblock_resample=residual,
        down_padding=(0, 1) if given.values["downsample_padding"] == 0 else (1, 1),
    )
    return unet, (*size, given.whole("in_channels"))


def arguments_of(unet: Any, shape: Shape) -> dict[str, Any]:
    """The constructor arguments of UNet2DModel for a U-Net: the inverse of `network`.

    Args:
      unet: a `UNet`.
      shape: of its images, [height, width, channels].

    Raises:
      WeightsError: UNet2DModel cannot compute what the network does; the message says which settings differ.
    """
    ours, (height, width, channels) = same_network.unet_of(unet, NAME), shape
    attention, residual = [bool(count) for count in same_network.heads(ours, shape)], ours.resblock_resample
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else ("DownBlock2D", "UpBlock2D")
    resample = "resnet" if residual else "conv"
    arguments = {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": ours.out_ch,
        "time_embedding_dim": None if ours.emb_ch == 4 * ours.ch else ours.emb_ch,
        "freq_shift": int(ours.frequency_shift),
        "flip_sin_to_cos": ours.cos_first,
        "down_block_types": ["AttnDownBlock2D" if has else plain[0] for has in attention],
        "up_block_types": ["AttnUpBlock2D" if has else plain[1] for has in reversed(attention)],
        "block_out_channels": list(ours.widths),
        "layers_per_block": ours.num_res_blocks,
        "downsample_padding": 0 if ours.down_padding == (0, 1) else 1,
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": ours.dropout,
        "attention_head_dim": _head_dim(ours, shape),
        "norm_num_groups": ours.norm_groups,
        "attn_norm_num_groups": ours.norm_groups if ours.film else None,
        "norm_eps": ours.norm_epsilon,
        "resnet_time_scale_shift": "scale_shift" if ours.film else "default",
        "num_class_embeds": ours.num_classes if ours.num_classes > 1 else None,
    }
    same_network.check(ours, network(arguments)[0], shape, NAME)
    return arguments


def _head_dim(network: UNet, shape: Shape) -> int | None:
    """The channels of a head, or None for one head on every level; the middle decides where levels differ."""
    counts = {count for count in same_network.heads(network, shape) if count} | {network._heads(network.widths[-1])}
    return None if counts == {1} else network.widths[-1] // max(network._heads(network.widths[-1]), 1)


def _check_fixed(given: Arguments) -> None:
    """Refuses what the network here does not do."""
    given.only(
        "which the library does not compute",
        center_input_sample=(False,),
        time_embedding_type=("positional",),
        mid_block_type=("UNetMidBlock2D",),
        mid_block_scale_factor=(1, 1.0),
        downsample_padding=(0, 1),
        downsample_type=("conv", "resnet"),
        upsample_type=("conv", "resnet"),
        act_fn=("silu", "swish"),
        resnet_time_scale_shift=("default", "scale_shift"),
        add_attention=(True,),
        class_embed_type=(None,),
    )
    groups = given.values["attn_norm_num_groups"]
    if given.values["resnet_time_scale_shift"] == "scale_shift" and groups is None:
        raise given.refuse("attn_norm_num_groups", "so that the middle attention has no norm, which ours always has")
    if groups not in (None, given.values["norm_num_groups"]):
        raise given.refuse("attn_norm_num_groups", "but all norms here have the same number of groups")


def _blocks(given: Arguments) -> tuple[list[bool], bool]:
    """Which levels have attention, and whether residual blocks resample."""
    down, up = (_named(given, f"{half}_block_types", known) for half, known in BLOCKS.items())
    attention = [has for has, _ in down]
    if attention != [has for has, _ in reversed(up)]:
        raise given.refuse("up_block_types", "with attention on other levels than down_block_types")
    # The last block of a half does not resample.
    ways = {way or given.values["downsample_type"] for _, way in down[:-1]}
    ways |= {way or given.values["upsample_type"] for _, way in up[:-1]}
    if len(ways) > 1:
        raise given.refuse("down_block_types", "which resample partly by convolutions, partly in residual blocks")
    return attention, ways == {"resnet"}


def _named(given: Arguments, name: str, known: Mapping[str, tuple[bool, str | None]]) -> list[tuple[bool, str | None]]:
    value = given.values[name]
    if not isinstance(value, Sequence) or not value or not all(type(each) is str and each in known for each in value):
        raise given.refuse(name, f"not a list of {', '.join(known)}")
    return [known[each] for each in value]


def _size(given: Arguments) -> tuple[int, int]:
    value = given.values["sample_size"]
    if not isinstance(value, list | tuple):
        size = given.whole("sample_size")
        return size, size
    sizes = given.numbers("sample_size")
    if len(sizes) != 2:
        raise given.refuse("sample_size", "not one number or two")
    return sizes[0], sizes[1]


# ---------------------------------------------------------------- where parameters are

_INNER = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
}
_OUTER = {
    "dense0": "time_embedding.linear_1",
    "dense1": "time_embedding.linear_2",
    "class_emb": "class_embedding",
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.attn_1": "mid_block.attentions.0",
    "mid.block_2": "mid_block.resnets.1",
}
_KINDS = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers", "upsample": "upsamplers"}


def places(network: UNet) -> Callable[[str], Place]:
    """Path of a parameter -> where it is stored."""

    def place(path: str) -> Place:
        module, *inner, leaf = path.split("/")
        if module == "class_emb":
            return Place("class_embedding.weight", "table")
        names = [_INNER.get(name, name) for name in inner]
        outer = _OUTER.get(module, module)
        if found := re.fullmatch(r"(down|up)_(\d+)\.(\w+?)(?:_(\d+))?", module):
            half, level, kind, index = found.groups()
            level = int(level) if half == "down" else len(network.ch_mult) - 1 - int(level)
            conv = ".conv" if "sample" in kind and not network.resblock_resample else ""
            outer = f"{half}_blocks.{level}.{_KINDS[kind]}.{index or 0}{conv}"
        ones = 2 * (leaf == "kernel" and inner[-1:] == ["nin_shortcut"])
        return Place(".".join((outer, *names, LEAVES[leaf])), ones=ones)

    return place


def renamed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with today's names of the parts of an attention."""
    pattern = re.compile(rf"(?<=\.)({'|'.join(OLD_NAMES)})(?=\.(?:weight|bias)$)")
    return {pattern.sub(lambda found: OLD_NAMES[found[1]], name): tensor for name, tensor in tensors.items()}
