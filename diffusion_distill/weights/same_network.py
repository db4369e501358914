"""Whether another program's network computes what a U-Net of ours does.

An export chooses the arguments of the other program's network, builds ours from them again as an import would, and
compares the two. What the other program cannot compute shows as a difference, whatever it is.
"""

from __future__ import annotations

from typing import Any

from diffusion_distill.networks import UNet
from diffusion_distill.weights.matching import Shape, WeightsError


def unet_of(network: Any, what: str) -> UNet:
    """The network, if it is a U-Net.

    Raises:
      WeightsError: it is of another kind.
    """
    if type(network) is not UNet:
        raise WeightsError(
            f"The network is of the kind {type(network).__name__}; of the networks here, only UNet has the form of "
            f"{what}. Export it as safetensors."
        )
    return network


def heads(network: UNet, shape: Shape, up: bool = False) -> tuple[int, ...]:
    """The number of heads of each level's attention, finest first, for images of a shape; 0 where there is none."""
    there = [(shape[0] >> level) in network.attn_resolutions for level in range(len(network.ch_mult))]
    return tuple(network._heads(width, up) if has else 0 for width, has in zip(network.widths, there, strict=True))


def computed(network: UNet, shape: Shape) -> dict[str, Any]:
    """What a U-Net computes for images of a shape: equal for two networks if they compute the same."""
    many, labels = len(network.ch_mult) > 1, network.num_classes > 1
    convolves = many and network.conv_resample and not network.resblock_resample
    return {
        **{name: getattr(network, name) for name in ("ch", "emb_ch", "out_ch", "num_res_blocks", "film")},
        **{name: getattr(network, name) for name in ("num_classes", "augment_dim", "cos_first", "frequency_shift")},
        **{name: getattr(network, name) for name in ("norm_groups", "norm_epsilon", "norm_fewest")},
        "widths": network.widths,
        "width of the first convolution": network.widths[0] if network.wide_conv_in else network.ch,
        "heads": heads(network, shape),
        "heads on the way up": heads(network, shape, up=True),
        "heads in the middle": network._heads(network.widths[-1]),
        "resblock_resample": many and network.resblock_resample,
        "conv_resample": not many or network.conv_resample,
        "down_padding": network.down_padding if convolves else None,
        "label_bias": labels and network.label_bias,
    }


def check(network: UNet, built: UNet, shape: Shape, what: str) -> None:
    """Refuses a network that another program's network, rebuilt as `built`, does not compute.

    Raises:
      WeightsError: the settings that differ, with both values.
    """
    ours, theirs = computed(network, shape), computed(built, shape)
    differing = [f"{name} is {ours[name]}, there {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if differing:
        raise WeightsError(f"{what} cannot compute this network: {'; '.join(differing)}. Export it as safetensors.")
