"""The tensors of EDM's networks (Karras et al., arXiv:2206.00364): their names, shapes, and the parameters they become.

A tensor's name says where it is, with image sizes R_l = img_resolution / 2^l for levels:

    map_layer0, map_layer1, map_label, map_augment, map_noise   dense0, dense1, class_emb, augment_emb, fourier
    enc.R_0_conv, enc.R_l_block_i, enc.R_(l+1)_down             conv_in, down_l.block_i with attn_i, down_l.downsample
    dec.R_l_in0, dec.R_l_in1 (the coarsest l)                   mid.block_1 with mid.attn_1, mid.block_2
    dec.R_l_block_i, dec.R_(l-1)_up                             up_l.block_i with attn_i, up_l.upsample
    enc.R_(l+1)_aux_*, dec.R_(l-1)_aux_up                       down_l.aux_*, up_l.aux_up
    dec.R_l_aux_norm and _conv, or out_norm and out_conv        [up_l.]norm_out and [up_l.]conv_out

Kernels are (out, in[, height, width]) there and ([height, width,] in, out) here. The 3·C outputs of an attention's
`qkv` are (heads, C / heads, {q, k, v}). Constants ("buffers") are filters and Fourier frequencies; SongUNet takes
those of the file, DhariwalUNet resamples with a fixed filter and refuses another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import flax.linen as nn
import numpy as np

from diffusion_distill.networks import UNet
from diffusion_distill.networks.layers import filter_of
from diffusion_distill.weights import matching, torch_layout
from diffusion_distill.weights.matching import Shape, WeightsError
from diffusion_distill.weights.torch_layout import Entry


def to_params(
    network: nn.Module, shape: Shape, tensors: Mapping[str, np.ndarray], what: str = "The tensors"
) -> dict[str, Any]:
    """Parameters of a network from the tensors of EDM's program; every tensor is used once.

    Args:
      network: a `SongUNet`, or a `UNet` with the settings `ADM`.
      shape: (height, width, channels) of its images; names contain the height.
      tensors: {name: array} without the wrapper's prefix "model.".
      what: the name of the tensors in error messages.

    Returns:
      Nested dictionaries of float32 NumPy arrays, views of the given ones where these are float32.

    Raises:
      WeightsError: tensors missing, left over, of another shape or type or not finite, see `matching.match`; or a
        buffer with values the network cannot hold.
    """
    blocks = network.num_res_blocks * len(network.ch_mult)  # type: ignore[attr-defined]
    if blocks > len(tensors):  # before the network is traced, which takes as long as it claims to have blocks
        raise WeightsError(f"{what}: {len(tensors)} tensors cannot be those of a network with {blocks} blocks.")
    correspondence = entries(network, shape)
    filled = matching.match(tensors, {entry.name: entry.shape for entry in correspondence}, what)
    fixed = [entry.name for entry in correspondence if not entry.paths]
    foreign = [name for name in fixed if not np.array_equal(filled[name][0, 0], FIXED_FILTER)]
    if foreign:
        raise WeightsError(
            f"{what}: {len(foreign)} filters differ from the mean of 2x2 pixels, the only one that this network "
            f"resamples with: {', '.join(foreign[: matching.LISTED])}."
        )
    return torch_layout.filled_params(correspondence, filled)


# ---------------------------------------------------------------- correspondence


FIXED_FILTER = filter_of((1, 1))
#: Modules of a block, by the names of the program; q, k and v are parts of one.
_INNER = {
    "norm1": "norm0",
    "conv1": "conv0",
    "conv1_resample": "conv0",
    "temb_proj": "affine",
    "norm2": "norm1",
    "conv2": "conv1",
    "nin_shortcut": "skip",
    "shortcut_resample": "skip",
    "norm": "norm2",
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "proj_out": "proj",
}
_LEAVES = {**torch_layout.LEAVES, "filter": "resample_filter", "freqs": "freqs"}
_OUTER = {
    "dense0": "map_layer0",
    "dense1": "map_layer1",
    "class_emb": "map_label",
    "augment_emb": "map_augment",
    "fourier": "map_noise",
    "norm_out": "out_norm",
    "conv_out": "out_conv",
}
#: Where a module of a level stands: (half, levels from its own, the program's name).
_OF_LEVEL = {
    r"down_(\d+)\.(?:block|attn)_(\d+)": ("enc", 0, "block{}"),
    r"down_(\d+)\.downsample": ("enc", 1, "down"),
    r"down_(\d+)\.(aux_\w+)": ("enc", 1, "{}"),
    r"up_(\d+)\.(?:block|attn)_(\d+)": ("dec", 0, "block{}"),
    r"up_(\d+)\.upsample": ("dec", -1, "up"),
    r"up_(\d+)\.(aux_up)": ("dec", -1, "{}"),
    r"up_(\d+)\.(norm|conv)_out": ("dec", 0, "aux_{}"),
}
_MIDDLE = {"mid.block_1": "in0", "mid.attn_1": "in0", "mid.block_2": "in1"}


@lru_cache(maxsize=8)  # a network is traced for it, which takes a second
def entries(network: nn.Module, shape: Shape) -> tuple[Entry, ...]:
    """The correspondence for a network, every tensor once."""
    shapes, names = torch_layout.parameter_shapes(network, shape), {}
    for path in shapes:
        names.setdefault(_name(path, len(network.ch_mult), shape[0]), []).append(path)  # type: ignore[attr-defined]
    found = []
    for name, paths in names.items():
        paths = tuple(sorted(paths, key=lambda path: "qkv".find(path.split("/")[-2])))
        order = "hcq" if len(paths) == 3 else ""
        found.append(Entry(name, _shape(name, shapes[paths[0]]), paths, tuple(shapes[path] for path in paths), order))
    if isinstance(network, UNet):
        halves = sorted({name.split(".conv0.")[0] for name in names if re.search(r"_(down|up)\.conv0\.", name)})
        filters = [f"{half}.{conv}.resample_filter" for half in halves for conv in ("conv0", "skip")]
        found += [Entry(name, (1, 1, *FIXED_FILTER.shape), (), ()) for name in filters]
    return tuple(found)


def _name(path: str, levels: int, resolution: int) -> str:
    """The tensor that a parameter comes from."""
    module, *inner, leaf = path.split("/")
    return ".".join((module_name(module, levels, resolution), *(_INNER[name] for name in inner), _LEAVES[leaf]))


def module_name(module: str, levels: int, resolution: int) -> str:
    """The program's name of a part of a network, such as "enc.16x16_block0" for "down_1.block_0".

    Args:
      module: its name here.
      levels: of the network.
      resolution: height of its images.
    """
    size = lambda level: f"{resolution >> level}x{resolution >> level}"  # noqa: E731
    if module in _OUTER:
        return _OUTER[module]
    if module == "conv_in":
        return f"enc.{size(0)}_conv"
    if module in _MIDDLE:
        return f"dec.{size(levels - 1)}_{_MIDDLE[module]}"
    found = ((re.fullmatch(pattern, module), place) for pattern, place in _OF_LEVEL.items())
    match, (half, further, name) = next((match, place) for match, place in found if match)
    return f"{half}.{size(int(match[1]) + further)}_{name.format(*match.groups()[1:])}"


def _shape(name: str, shape: Shape) -> Shape:
    """The shape of a tensor, from that of a parameter in it."""
    *module, leaf = name.split(".")
    if leaf == "resample_filter":
        return (1, 1, *shape)
    if module[-1] == "qkv":
        outputs = 3 * shape[-2] * shape[-1]
        return (outputs,) if leaf == "bias" else (outputs, shape[0], 1, 1)
    if module[-1] == "proj" and leaf == "weight":
        return shape[-1], shape[0] * shape[1], 1, 1
    if module[-1] == "skip" and leaf == "weight":
        return *shape[::-1], 1, 1
    return shape if len(shape) == 1 else (*shape[:-3:-1], *shape[:-2])
