"""DiT (Peebles & Xie, arXiv:2212.09748) as its program stores it: the settings, and where parameters are.

    x_embedder.proj                        patch_emb, a convolution of the patches there
    t_embedder.mlp.0, .2                   dense0, dense1
    y_embedder.embedding_table             class_emb: one row for each class and one for none, which is our bias
    blocks.k.attn.qkv, .proj               block_k/q, k, v, proj_out
    blocks.k.mlp.fc1, .fc2                 block_k/mlp0, mlp1
    blocks.k.adaLN_modulation.1            block_k/modulation
    final_layer.adaLN_modulation.1         modulation_out
    final_layer.linear                     dense_out

`pos_embed`, the sinusoids of the places, is compared with ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_distill.networks import DiT
from diffusion_distill.networks.dit import place_features
from diffusion_distill.weights.arguments import REQUIRED, Arguments
from diffusion_distill.weights.matching import Shape, WeightsError
from diffusion_distill.weights.torch_layout import LEAVES, Place, count_of

ARGUMENTS: dict[str, Any] = {
    "image_size": REQUIRED,  # of the latents
    "in_channels": 4,
    "out_channels": REQUIRED,
    "hidden_size": REQUIRED,
    "depth": REQUIRED,
    "num_heads": REQUIRED,
    "patch_size": 2,
    "mlp_ratio": 4,
    "num_classes": 1000,
}
PLACES, TABLE = "pos_embed", "y_embedder.embedding_table.weight"
#: The names of the two parts that the table of labels is taken apart into.
CLASSES, NO_CLASS = "y_embedder.classes", "y_embedder.no_class"
PLACE_TOLERANCE = 1e-4


def network(arguments: Mapping[str, Any]) -> tuple[DiT, Shape]:
    """The network of constructor arguments, and the shape [height, width, channels] of its latents.

    Raises:
      WeightsError: an argument is unknown, or has a value that the library does not compute with.
    """
    given = Arguments(arguments, ARGUMENTS, "DiT")
    size = given.whole("image_size")
    transformer = DiT(
        width=given.whole("hidden_size"),
        depth=given.whole("depth"),
        num_heads=given.whole("num_heads"),
        out_ch=given.whole("out_channels"),
        patch=given.whole("patch_size"),
        mlp_ratio=given.whole("mlp_ratio"),
        num_classes=given.classes("num_classes"),
    )
    return transformer, (size, size, given.whole("in_channels"))


def inferred(tensors: Mapping[str, np.ndarray], image_size: int) -> dict[str, Any]:
    """The constructor arguments that tensors show: not the size of the latents, and the heads.

    Raises:
      KeyError: they are not the tensors of such a network.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    width, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
    return {
        "image_size": image_size,
        "in_channels": in_channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "hidden_size": width,
        "depth": count_of(shapes, r"blocks\.(\d+)\."),
        "patch_size": patch,
        "mlp_ratio": shapes["blocks.0.mlp.fc1.weight"][0] // width,
        "num_classes": shapes[TABLE][0] - 1,
    }


def renamed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with the table of labels taken apart, and without the places.

    Raises:
      WeightsError: the places are not the sinusoids that the network here adds.
    """
    found = dict(tensors)
    places, table = found.pop(PLACES, None), found.pop(TABLE, None)
    if places is not None:
        side = math.isqrt(places.shape[1]) if places.ndim == 3 else 0
        ours = place_features(side, side, places.shape[-1]) if side and places.shape[-1] % 4 == 0 else np.zeros(0)
        if places.shape != (1, *ours.shape) or not np.allclose(places[0], ours, atol=PLACE_TOLERANCE):
            raise WeightsError(f"{PLACES} is not the fixed sinusoids of a square of patches, which the network adds.")
    return found if table is None else found | labels_apart(TABLE, table)


def labels_apart(name: str, table: np.ndarray) -> dict[str, np.ndarray]:
    """The two parts of a table of labels, whose last row is that of none; what is no table stays as it is."""
    if table.ndim != 2:
        return {name: table}
    table = np.asarray(table, np.float32)
    return {CLASSES: table[:-1] - table[-1:], NO_CLASS: table[-1]}


#: Modules here -> there.
NAMES = {
    "block": "blocks",
    "patch_emb": "x_embedder.proj",
    "dense0": "t_embedder.mlp.0",
    "dense1": "t_embedder.mlp.2",
    "modulation_out": "final_layer.adaLN_modulation.1",
    "dense_out": "final_layer.linear",
    "q": "attn.qkv",
    "k": "attn.qkv",
    "v": "attn.qkv",
    "proj_out": "attn.proj",
    "mlp0": "mlp.fc1",
    "mlp1": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}


def place(path: str, patch: int, names: Mapping[str, str] = NAMES, order: str = "qhc") -> Place:
    """Where a parameter is stored.

    Args:
      patch: height and width of a patch.
      names: of the modules.
      order: of q, k and v in one tensor, see `torch_layout`; empty if each has its own.
    """
    *modules, leaf = path.split("/")
    if modules == ["class_emb"]:
        return Place(CLASSES, "table") if leaf == "kernel" else Place(NO_CLASS)
    there = [names.get(name) or re.sub(r"^block_", f"{names['block']}.", name) for name in modules]
    order = order if modules[-1] in ("q", "k", "v") else ""
    places = (patch, patch) if modules == ["patch_emb"] and leaf == "kernel" else ()
    return Place(".".join((*there, LEAVES[leaf])), order, places=places)
