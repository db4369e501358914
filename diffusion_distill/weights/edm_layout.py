"""The layout of EDM's networks (Karras et al. 2022): constructor arguments, names and shapes of tensors.

    SongUNet       `networks.SongUNet`                 DhariwalUNet   `networks.UNet` with the settings `ADM`

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
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.errors import choose
from diffusion_distill.networks import ADM, SongUNet, UNet
from diffusion_distill.networks.layers import filter_of
from diffusion_distill.weights import matching
from diffusion_distill.weights.matching import Shape, WeightsError

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


# ---------------------------------------------------------------- networks


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


# ---------------------------------------------------------------- tensors


def tensor_shapes(network: nn.Module, shape: tuple[int, int, int]) -> dict[str, Shape]:
    """{tensor's name: shape}, buffers included, of a network for such images; nothing is allocated.

    Args:
      network: a `SongUNet`, or a `UNet` with the settings `ADM`.
      shape: (height, width, channels); names contain the height.

    Raises:
      WeightsError: the network does not take such images.
    """
    return {entry.name: entry.shape for entry in _entries(network, shape)}


def to_params(
    network: nn.Module, shape: tuple[int, int, int], tensors: Mapping[str, np.ndarray], what: str = "The tensors"
) -> dict[str, Any]:
    """Parameters of a network from the tensors of EDM's program; every tensor is used once.

    Args:
      network, shape: as for `tensor_shapes`.
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
    entries = _entries(network, shape)
    filled = matching.match(tensors, {entry.name: entry.shape for entry in entries}, what)
    fixed = [entry.name for entry in entries if not entry.paths]
    foreign = [name for name in fixed if not np.array_equal(filled[name][0, 0], FIXED_FILTER)]
    if foreign:
        raise WeightsError(
            f"{what}: {len(foreign)} filters differ from the mean of 2x2 pixels, the only one that this network "
            f"resamples with: {', '.join(foreign[: matching.LISTED])}."
        )
    flat = {
        path: part for entry in entries for path, part in zip(entry.paths, entry.parts(filled[entry.name]), strict=True)
    }
    return matching.unflatten(flat)


def to_state_dict(network: nn.Module, shape: tuple[int, int, int], params: Any) -> dict[str, np.ndarray]:
    """The inverse of `to_params`: {name: tensor}, buffers included.

    Raises:
      WeightsError: parameters missing, left over, or of another shape.
    """
    entries = _entries(network, shape)
    shapes = {path: shape for entry in entries for path, shape in zip(entry.paths, entry.path_shapes, strict=True)}
    stored = {path: np.asarray(leaf) for path, leaf in matching.flatten(params).items()}
    filled = matching.match(stored, shapes, "The parameters")
    return {entry.name: entry.joined([filled[path] for path in entry.paths]) for entry in entries}


# ---------------------------------------------------------------- correspondence


class _Entry(NamedTuple):
    """A tensor and the parameters it becomes: none (a fixed buffer), one, or q, k and v.

    Attributes:
      name, shape: of the tensor.
      paths, path_shapes: of the parameters.
    """

    name: str
    shape: Shape
    paths: tuple[str, ...] = ()
    path_shapes: tuple[Shape, ...] = ()

    def parts(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The parameters in a tensor, as views."""
        if not self.paths:
            return []
        if len(self.paths) == 3:  # (heads, C / heads, 3, inputs) -> inputs, heads, C / heads
            heads, size = self.path_shapes[0][-2:]
            split = tensor.reshape(heads, size, 3, -1)
            return [split[:, :, j].transpose(2, 0, 1).reshape(self.path_shapes[j]) for j in range(3)]
        return [_channels_last(tensor).reshape(self.path_shapes[0])]

    def joined(self, parts: list[np.ndarray]) -> np.ndarray:
        """The tensor from its parameters."""
        if not parts:
            return np.array(FIXED_FILTER[None, None])
        if len(parts) == 3:
            heads, size = self.path_shapes[0][-2:]
            stacked = np.stack([part.reshape(-1, heads, size) for part in parts], axis=-1)
            return np.ascontiguousarray(stacked.transpose(1, 2, 3, 0)).reshape(self.shape)
        [part] = parts
        if part.ndim < 2 or self.name.endswith(".resample_filter"):
            return np.array(part.reshape(self.shape))
        outputs, inputs, *places = self.shape
        return np.ascontiguousarray(np.moveaxis(part.reshape(*places, inputs, outputs), (-1, -2), (0, 1)))


def _channels_last(tensor: np.ndarray) -> np.ndarray:
    """(out, in, ...) -> (..., in, out); filters (1, 1, k, k) too."""
    return np.moveaxis(tensor, (0, 1), (-1, -2)) if tensor.ndim > 1 else tensor


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
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "filter": "resample_filter", "freqs": "freqs"}
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
def _entries(network: nn.Module, shape: tuple[int, int, int]) -> tuple[_Entry, ...]:
    """The correspondence for a network, every tensor once."""
    shapes, names = _parameter_shapes(network, shape), {}
    for path in shapes:
        names.setdefault(_name(path, len(network.ch_mult), shape[0]), []).append(path)  # type: ignore[attr-defined]
    entries = []
    for name, paths in names.items():
        paths = tuple(sorted(paths, key=lambda path: "qkv".find(path.split("/")[-2])))
        entries.append(_Entry(name, _shape(name, shapes[paths[0]]), paths, tuple(shapes[path] for path in paths)))
    if isinstance(network, UNet):
        halves = sorted({name.split(".conv0.")[0] for name in names if re.search(r"_(down|up)\.conv0\.", name)})
        filters = [f"{half}.{conv}.resample_filter" for half in halves for conv in ("conv0", "skip")]
        entries += [_Entry(name, (1, 1, *FIXED_FILTER.shape)) for name in filters]
    return tuple(entries)


def _parameter_shapes(network: nn.Module, shape: tuple[int, int, int]) -> dict[str, Shape]:
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        tree = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), x, time)["params"]
    except (ValueError, TypeError) as error:
        raise WeightsError(f"The network does not take images of shape {shape}: {error}") from error
    return {path: leaf.shape for path, leaf in matching.flatten(tree).items()}


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


# ---------------------------------------------------------------- arguments


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
