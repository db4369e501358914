"""DiTTransformer2DModel of the library diffusers (Hugging Face): its settings, as config.json has them, and its names.

    pos_embed.proj                                             patch_emb, a convolution of the patches there
    transformer_blocks.k.norm1.emb.timestep_embedder.linear_*  dense0, dense1
    transformer_blocks.k.norm1.emb.class_embedder              class_emb, see `dit`
    transformer_blocks.k.norm1.linear                          block_k/modulation
    transformer_blocks.k.attn1.to_q, to_k, to_v, to_out.0      block_k/q, k, v, proj_out
    transformer_blocks.k.ff.net.0.proj, .2                     block_k/mlp0, mlp1
    proj_out_1, proj_out_2                                     modulation_out, dense_out

Each block there has embeddings of time and label of its own. Networks that were converted from DiT's program have the
same in all of them; only these are read. Older versions of diffusers called the class Transformer2DModel.

The class differs from DiT's program in two numbers: its sinusoids of the time have `downscale_freq_shift` 1, not 0, and
the norms before its perceptrons add `norm_eps` 1e-5, not 1e-6. The network here computes what the class does. Weights
that DiT's program trained want DiT's numbers: give downscale_freq_shift=0, norm_eps=1e-6, or import DiT's own file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_distill.networks import DiT
from diffusion_distill.weights import dit
from diffusion_distill.weights.arguments import MOST_CLASSES, REQUIRED, Arguments
from diffusion_distill.weights.matching import Shape, WeightsError
from diffusion_distill.weights.torch_layout import Place, count_of

ARGUMENTS: dict[str, Any] = {
    "sample_size": REQUIRED,  # of the latents
    "in_channels": 4,
    "out_channels": None,
    "num_attention_heads": REQUIRED,
    "attention_head_dim": REQUIRED,
    "num_layers": REQUIRED,
    "patch_size": REQUIRED,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
    "downscale_freq_shift": 1,  # of the class's code, not of its constructor
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    # Of Transformer2DModel:
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "double_self_attention": False,
    "attention_type": "default",
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}
#: The class, today and before.
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
TABLE = "emb.class_embedder.embedding_table.weight"


def network(arguments: Mapping[str, Any]) -> tuple[DiT, Shape]:
    """The network of constructor arguments, and the shape [height, width, channels] of its latents.

    Raises:
      WeightsError: an argument is unknown, or has a value that the library does not compute with.
    """
    given = Arguments({k: v for k, v in arguments.items() if not k.startswith("_")}, ARGUMENTS, CLASSES[0])
    _check_fixed(given)
    size, channels, heads = given.whole("sample_size"), given.whole("in_channels"), given.whole("num_attention_heads")
    transformer = DiT(
        width=heads * given.whole("attention_head_dim"),
        depth=given.whole("num_layers"),
        num_heads=heads,
        out_ch=channels if given.values["out_channels"] is None else given.whole("out_channels"),
        patch=given.whole("patch_size"),
        num_classes=given.whole("num_embeds_ada_norm", 2, MOST_CLASSES),
        frequency_shift=float(given.whole("downscale_freq_shift", 0, 1)),
        mlp_norm_epsilon=given.number("norm_eps"),
    )
    return transformer, (size, size, channels)


def _check_fixed(given: Arguments) -> None:
    """Refuses what the network here does not do."""
    given.only(
        "which the library does not compute",
        attention_bias=(True,),
        activation_fn=("gelu-approximate",),
        norm_type=("ada_norm_zero",),
        norm_elementwise_affine=(False,),
        cross_attention_dim=(None,),
        num_vector_embeds=(None,),
        use_linear_projection=(False,),
        only_cross_attention=(False,),
        double_self_attention=(False,),
        attention_type=("default",),
        caption_channels=(None,),
        interpolation_scale=(None, 1, 1.0),
        use_additional_conditions=(None, False),
    )


def renamed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with the embeddings of the blocks once, and the table of labels taken apart.

    Raises:
      WeightsError: the blocks have not all the same embeddings.
    """
    found, copies = {}, {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"transformer_blocks\.\d+\.norm1\.(emb\..+)", name):
            copies.setdefault(match[1], []).append(tensor)
        else:
            found[name] = tensor
    blocks = count_of(tensors, r"transformer_blocks\.(\d+)\.")
    for name, (first, *others) in copies.items():
        if len(others) + 1 != blocks or not all(np.array_equal(first, other, equal_nan=True) for other in others):
            raise WeightsError(
                f"norm1.{name} is not the same in all {blocks} blocks. The network here embeds time and label once, as "
                "DiT's program does, and cannot compute blocks with embeddings of their own."
            )
        found |= dit.labels_apart(name, first) if name == TABLE else {name: first}
    return found


#: Modules here -> there.
NAMES = {
    "block": "transformer_blocks",
    "patch_emb": "pos_embed.proj",
    "dense0": "emb.timestep_embedder.linear_1",
    "dense1": "emb.timestep_embedder.linear_2",
    "modulation_out": "proj_out_1",
    "dense_out": "proj_out_2",
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "proj_out": "attn1.to_out.0",
    "mlp0": "ff.net.0.proj",
    "mlp1": "ff.net.2",
    "modulation": "norm1.linear",
}


def place(path: str, patch: int) -> Place:
    """Where a parameter is stored."""
    return dit.place(path, patch, NAMES, order="")
