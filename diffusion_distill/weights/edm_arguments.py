"""Constructor arguments of EDM's networks and wrappers (Karras et al., arXiv:2206.00364), and the networks they make.

    SongUNet       `networks.SongUNet`
    DhariwalUNet   `networks.UNet` with the settings `ADM`

A file holds the arguments that its network was made with. They are checked one by one, in type and in size, before a
network is built from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from diffusion_distill.base.errors import WeightsError, choose
from diffusion_distill.networks import ADM, SongUNet, UNet

#: Constructor arguments with their defaults; None where there is none.
_COMMON: dict[str, Any] = {
    "img_resolution": None,
    "in_channels": None,
    "out_channels": None,
    "label_dim": 0,
    "augment_dim": 0,
    "channel_mult_emb": 4,
    "dropout": 0.10,
    "label_dropout": 0.0,
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        **_COMMON,
        "model_channels": 128,
        "channel_mult": (1, 2, 2, 2),
        "num_blocks": 4,
        "attn_resolutions": (16,),
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": (1, 1),
    },
    "DhariwalUNet": {
        **_COMMON,
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "num_blocks": 3,
        "attn_resolutions": (32, 16, 8),
    },
}
#: Arguments that may be zero, and the largest values taken: a file's claims cost memory and time before its tensors
#: are compared with them.
MAY_BE_ZERO = ("label_dim", "augment_dim")
LARGEST = {"num_blocks": 64, "channel_mult_emb": 64, "channel_mult_noise": 64, "label_dim": 2**20}
LARGEST_NUMBER, LONGEST_LIST = 2**14, 16

#: A wrapper's own arguments; all others are its network's.
WRAPPER_ARGUMENTS = (
    *("use_fp16", "sigma_min", "sigma_max", "sigma_data"),
    *("beta_d", "beta_min", "epsilon_t", "M", "C_1", "C_2"),
)
#: Image-sized outputs of a wrapper's network.
WRAPPERS = {"EDMPrecond": 1, "VPPrecond": 1, "VEPrecond": 1, "iDDPMPrecond": 2}


def network_of(class_name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The network that EDM's program builds from constructor arguments.

    Args:
      class_name: a key of `ARGUMENTS`.
      kwargs: arguments by name, lists or tuples for several; what is absent has the program's default.

    Raises:
      WeightsError: an unknown class or argument, a missing one, or values no network can be built from.
    """
    try:
        given = _arguments(class_name, kwargs)
        common: dict[str, Any] = dict(
            ch=given["model_channels"],
            emb_ch=given["model_channels"] * given["channel_mult_emb"],
            out_ch=given["out_channels"],
            ch_mult=given["channel_mult"],
            num_res_blocks=given["num_blocks"],
            attn_resolutions=given["attn_resolutions"],
            dropout=given["dropout"],
            num_classes=max(given["label_dim"], 1),
            label_dropout=given["label_dropout"],
            augment_dim=given["augment_dim"],
        )
        if class_name == "DhariwalUNet":
            return UNet(**common, **ADM)
        return SongUNet(
            **common,
            noise_mult=given["channel_mult_noise"],
            embedding=given["embedding_type"],
            encoder=given["encoder_type"],
            decoder=given["decoder_type"],
            resample_filter=given["resample_filter"],
        )
    except (ValueError, TypeError) as error:
        raise WeightsError(f"No network can be built from {class_name}({_shortened(kwargs)}): {error}") from error


def image_shape_of(class_name: str, kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
    """(height, width, channels) of the images that a network of these arguments takes.

    Raises:
      WeightsError: as `network_of`.
    """
    try:
        given = _arguments(class_name, kwargs)
    except ValueError as error:
        raise WeightsError(f"{class_name}({_shortened(kwargs)}): {error}") from error
    return given["img_resolution"], given["img_resolution"], given["in_channels"]


def network_arguments(wrapper: str, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(class_name, kwargs) of the network inside a wrapper (EDMPrecond, ...) with these arguments.

    Raises:
      WeightsError: unknown wrapper, or without model_type or img_channels.
    """
    if wrapper not in WRAPPERS or not {"model_type", "img_channels"} <= set(kwargs):
        raise WeightsError(
            f"{wrapper}({_shortened(kwargs)}) is not understood; known are {', '.join(WRAPPERS)} with model_type "
            "and img_channels among their arguments."
        )
    rest = {k: v for k, v in kwargs.items() if k not in (*WRAPPER_ARGUMENTS, "model_type", "img_channels")}
    channels = kwargs["img_channels"]
    return kwargs["model_type"], {"in_channels": channels, "out_channels": WRAPPERS[wrapper] * channels, **rest}


# ---------------------------------------------------------------- checks


def _arguments(class_name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a class, checked; ValueError names the wrong one."""
    known = choose("network class", class_name, ARGUMENTS)
    for name in kwargs:
        choose(f"argument of {class_name}:", name, known)
    missing = [name for name, default in known.items() if default is None and name not in kwargs]
    if missing:
        raise ValueError(f"missing arguments: {', '.join(missing)}.")
    given = {name: _checked(name, kwargs.get(name, default), default) for name, default in known.items()}
    if given["label_dim"] == 1:
        raise ValueError("label_dim=1: labels with a single class are not supported; 0 means none.")
    return given


def _checked(name: str, value: Any, default: Any) -> Any:
    """A value of the type and size that an argument may have."""
    if isinstance(default, str):
        if isinstance(value, str):
            return value
        raise ValueError(f"{name} must be text, got {str(value)[:40]!r}.")
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or len(value) > LONGEST_LIST:
            raise ValueError(f"{name} must be a list of at most {LONGEST_LIST} numbers, got {str(value)[:40]!r}.")
        floats = 0.0 if name == "resample_filter" else 0
        return tuple(_checked(name, item, floats) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST_NUMBER <= value < 2**20:
        raise ValueError(f"{name} must be a number of moderate size, got {str(value)[:40]!r}.")
    if isinstance(default, float):
        return value
    least, largest = int(name not in MAY_BE_ZERO), LARGEST.get(name, LARGEST_NUMBER)
    if not isinstance(value, int) or not least <= value <= largest:
        raise ValueError(f"{name} must be a whole number from {least} to {largest}, got {value!r}.")
    return value


def _shortened(kwargs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={str(value)[:40]}" for name, value in list(kwargs.items())[:20])
