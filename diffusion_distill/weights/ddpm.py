"""DDPM's network (Ho et al., arXiv:2006.11239) as its port to PyTorch stores it: settings, and where parameters are.

Names are almost ours: `down.0.block.1.conv1.weight` is `down_0.block_1/conv1/kernel`. Files of networks of the type
"bayesian" hold `logvar` too, which no forward pass uses: it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_distill.networks import UNet
from diffusion_distill.weights.arguments import REQUIRED, Arguments
from diffusion_distill.weights.matching import Shape
from diffusion_distill.weights.torch_layout import LEAVES, Place, count_of

ARGUMENTS = {
    "image_size": REQUIRED,
    "in_channels": 3,
    "out_ch": 3,
    "ch": REQUIRED,
    "ch_mult": (1, 2, 4, 8),
    "num_res_blocks": REQUIRED,
    "attn_resolutions": REQUIRED,
    "resamp_with_conv": True,
    "dropout": 0.0,  # has no parameters, and a teacher does not train
    "type": "simple",
    "num_diffusion_timesteps": 1000,  # the length of `logvar`
}
UNUSED = ("logvar",)
PRODUCTS = ("q", "k", "v", "proj_out", "nin_shortcut")  # stored as 1x1 convolutions


def network(arguments: Mapping[str, Any]) -> tuple[UNet, Shape]:
    """The network of constructor arguments, and the shape [height, width, channels] of its images.

    Raises:
      WeightsError: an argument is unknown, or has a value that the library does not compute with.
    """
    given = Arguments(arguments, ARGUMENTS, "DDPM's network")
    given.only("which is unknown", type=("simple", "bayesian"))
    size, ch = given.whole("image_size"), given.whole("ch")
    unet = UNet(
        ch=ch,
        emb_ch=4 * ch,
        out_ch=given.whole("out_ch"),
        ch_mult=given.numbers("ch_mult"),
        num_res_blocks=given.whole("num_res_blocks"),
        attn_resolutions=given.numbers("attn_resolutions"),
        num_heads=1,
        film=False,
        conv_resample=given.flag("resamp_with_conv"),
    )
    return unet, (size, size, given.whole("in_channels"))


def place(path: str) -> Place:
    """Where a parameter is stored."""
    module, *inner, leaf = path.split("/")
    if module in ("dense0", "dense1"):
        module = f"temb.dense.{module[-1]}"
    elif found := re.fullmatch(r"(down|up)_(\d+)\.(block|attn)_(\d+)", module):
        module = ".".join(found.groups())
    elif found := re.fullmatch(r"(down|up)_(\d+)\.((?:down|up)sample)", module):
        module = f"{'.'.join(found.groups())}.conv"
    product = leaf == "kernel" and bool(inner) and inner[-1] in PRODUCTS
    return Place(".".join((module, *inner, LEAVES[leaf])), ones=2 * product)


def inferred(tensors: Mapping[str, np.ndarray], image_size: int) -> dict[str, Any]:
    """The constructor arguments that tensors show; the size of the images is not among them.

    Raises:
      KeyError: they are not the tensors of such a network.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    ch, in_channels = shapes["conv_in.weight"][:2]
    levels = count_of(shapes, r"down\.(\d+)\.")
    widths = [shapes[f"down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
    return {
        "image_size": image_size,
        "in_channels": in_channels,
        "out_ch": shapes["conv_out.weight"][0],
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": count_of(shapes, r"down\.0\.block\.(\d+)\."),
        "attn_resolutions": tuple(image_size >> k for k in range(levels) if f"down.{k}.attn.0.q.weight" in shapes),
        "resamp_with_conv": levels == 1 or "down.0.downsample.conv.weight" in shapes,
    }
