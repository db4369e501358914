"""Families of networks whose published weights are files of PyTorch or safetensors, by the names of their programs.

A family knows the network that its program builds from constructor arguments, and which tensor each parameter is
stored in, both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import flax.linen as nn
import numpy as np

from diffusion_distill.weights import adm, ddpm, diffusers, diffusers_dit, dit, torch_layout
from diffusion_distill.weights.matching import Shape, WeightsError, check_places
from diffusion_distill.weights.torch_layout import Entry, Place

Places = Callable[[str], Place]
#: The least number of tensors that a block has: two norms or products of the condition, and its layers.
TENSORS_OF_A_BLOCK = 8


@dataclass(frozen=True)
class Family:
    """One program's networks.

    Attributes:
      make: constructor arguments -> (network, shape of its images), see `network`.
      places: (network, shapes of its parameters, constructor arguments) -> where each parameter is stored.
      mark: a tensor that all files of the family have.
      asked: what tensors do not show, alternatives together.
      inferred: (tensors, image size) -> the constructor arguments that tensors show.
      fixed: constructor arguments that are the same for the whole family.
      edm: of networks with EDM's levels, what they predict; empty for those of discrete betas.
      latent: whether its images are latents of an autoencoder, which have no bounds.
      unused: tensors of files that no forward pass uses.
      renamed: gives tensors that older versions named otherwise their names of today.
      classes: of networks of the library diffusers, what config.json calls them.
    """

    make: Callable[[Mapping[str, Any]], tuple[Any, Shape]]
    places: Callable[[Any, Mapping[str, Shape], Mapping[str, Any]], Places]
    mark: str
    asked: tuple[tuple[str, ...], ...] = ()
    inferred: Callable[[Mapping[str, np.ndarray], int], dict[str, Any]] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    edm: str = ""
    latent: bool = False
    unused: tuple[str, ...] = ()
    renamed: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] = dict
    classes: tuple[str, ...] = ()

    def network(self, arguments: Mapping[str, Any]) -> tuple[Any, Shape]:
        """The network of constructor arguments, and the shape [height, width, channels] of its images.

        Raises:
          WeightsError: an argument is unknown or missing, or they describe no network that the library has.
        """
        try:
            network, shape = self.make(arguments)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise WeightsError(str(error)) from error
        check_places(network, shape)
        return network, shape

    def entries(self, arguments: Mapping[str, Any]) -> tuple[Entry, ...]:
        """The tensors of a network of these arguments, and the parameters they become.

        Raises:
          WeightsError: the arguments are not those of this family, see `network`.
        """
        network, shape = self.network(arguments)
        shapes = torch_layout.parameter_shapes(network, shape)
        return torch_layout.entries(shapes, self.places(network, shapes, arguments))

    def to_params(
        self, arguments: Mapping[str, Any], tensors: Mapping[str, np.ndarray], what: str = "The tensors"
    ) -> dict[str, Any]:
        """Parameters of a network of these arguments from the tensors of a file, see `torch_layout.to_params`.

        Raises:
          WeightsError: the arguments are not those of this family, or the tensors are not those of its network.
        """
        used = {name: tensor for name, tensor in self.renamed(tensors).items() if name not in self.unused}
        network, _ = self.network(arguments)
        blocks = getattr(network, "depth", 0) or network.num_res_blocks * len(network.ch_mult)
        # Before the network is traced, which takes as long as it claims to have blocks:
        if TENSORS_OF_A_BLOCK * blocks > len(used):
            raise WeightsError(f"{what}: {len(used)} tensors cannot be those of a network with {blocks} blocks.")
        return torch_layout.to_params(self.entries(arguments), used, what)

    def to_tensors(self, arguments: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The tensors of parameters: the inverse of `to_params`."""
        return torch_layout.to_tensors(self.entries(arguments), params)


def _adm_places(network: nn.Module, shapes: Mapping[str, Shape], arguments: Mapping[str, Any]) -> Places:
    return adm.places(network, shapes, "qhc" if arguments.get("use_new_attention_order") else "hqc")  # type: ignore[arg-type]


SIZE = ("image_size",)
_ADM: dict[str, Any] = {
    "places": _adm_places,
    "mark": "input_blocks.0.0.weight",
    "asked": (SIZE, ("num_heads", "num_head_channels")),
    "inferred": adm.inferred,
}
_NEW_ORDER: dict[str, Any] = {**_ADM, "fixed": {"use_new_attention_order": True}}

FAMILIES: dict[str, Family] = {
    "ddpm": Family(
        ddpm.network,
        lambda network, shapes, arguments: ddpm.place,
        mark="temb.dense.0.weight",
        asked=(SIZE,),
        inferred=ddpm.inferred,
        unused=ddpm.UNUSED,
    ),
    "improved_ddpm": Family(adm.guided, **{**_ADM, "fixed": {"use_new_attention_order": False}}),
    "guided_diffusion": Family(adm.guided, **{**_ADM, "asked": (*_ADM["asked"], ("use_new_attention_order",))}),
    "consistency_models": Family(adm.guided, **_NEW_ORDER, edm="consistency"),
    "consistency_models_edm": Family(adm.guided, **_NEW_ORDER, edm="edm"),
    "guided_diffusion_classifier": Family(adm.classifier, **{**_ADM, "mark": "out.2.c_proj.weight", "inferred": None}),
    "dit": Family(
        dit.network,
        lambda network, shapes, arguments: partial(dit.place, patch=network.patch),
        mark="x_embedder.proj.weight",
        asked=(SIZE, ("num_heads",)),
        inferred=dit.inferred,
        renamed=dit.renamed,
        latent=True,
    ),
    "diffusers_unet2d": Family(
        diffusers.network,
        lambda network, shapes, arguments: diffusers.places(network),
        mark="time_embedding.linear_1.weight",
        asked=(("sample_size",),),
        renamed=diffusers.renamed,
        classes=(diffusers.NAME,),
    ),
    "diffusers_dit": Family(
        diffusers_dit.network,
        lambda network, shapes, arguments: partial(diffusers_dit.place, patch=network.patch),
        mark="transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
        asked=(("sample_size",),),
        renamed=diffusers_dit.renamed,
        latent=True,
        classes=diffusers_dit.CLASSES,
    ),
}
