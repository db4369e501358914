"""The layout of EDM's files against its manifests and fact sheet, and its inverse.

Golden numbers: full-size state dicts of the published models (`edm/manifests.json`), read from the optional sibling
folder `../shared/golden`, and the numbers of parameters in the fact sheet there. Recorded outputs of networks are
compared by the golden check (`golden_checks/edm_networks`).
"""

from __future__ import annotations

import json
from typing import Any

import edm_tensors
import numpy as np
import places
import pytest

from diffusion_distill.networks import ADM, SongUNet, UNet
from diffusion_distill.weights import WeightsError, edm_arguments, edm_layout, flatten

GOLDEN = places.GOLDEN / "edm"

VP: dict[str, Any] = {"model_type": "SongUNet", "img_channels": 3, "use_fp16": False}
VE = {
    **VP,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
CIFAR = {"img_resolution": 32, "channel_mult": [2, 2, 2], "augment_dim": 9}
SIZE_64 = {"img_resolution": 64, "augment_dim": 9}
IMAGENET = {"model_type": "DhariwalUNet", "img_resolution": 64, "img_channels": 3, "label_dim": 1000}
#: wrapper, its arguments, parameters by the fact sheet
COUNTS = {
    "cifar10 cond vp": ("EDMPrecond", VP | CIFAR | {"label_dim": 10}, 55_735_299),
    "cifar10 uncond vp": ("EDMPrecond", VP | CIFAR, 55_733_891),
    "cifar10 cond ve": ("EDMPrecond", VE | CIFAR | {"label_dim": 10}, 56_400_643),
    "cifar10 uncond ve": ("EDMPrecond", VE | CIFAR, 56_397_827),
    "ffhq vp": ("EDMPrecond", VP | SIZE_64, 61_805_571),
    "ffhq ve": ("EDMPrecond", VE | SIZE_64, 62_761_091),
    "imagenet": ("EDMPrecond", IMAGENET, 295_899_267),
    "baseline cifar10 vp": ("VPPrecond", VP | {"img_resolution": 32}, 61_804_419),
    "baseline cifar10 ve": ("VEPrecond", VE | {"img_resolution": 32}, 62_758_787),
    "baseline imagenet": ("iDDPMPrecond", IMAGENET, 295_904_454),
}
SONG = {
    "img_resolution": 8,
    "in_channels": 2,
    "out_channels": 2,
    "label_dim": 3,
    "augment_dim": 9,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
SMALL = {
    "ddpmpp": ("SongUNet", SONG),
    "ncsnpp": ("SongUNet", SONG | {k: v for k, v in VE.items() if k not in VP}),
    "skips": ("SongUNet", SONG | {"encoder_type": "skip", "decoder_type": "skip"}),
    "adm": ("DhariwalUNet", SONG | {"model_channels": 32, "channel_mult": [1, 4]}),
}


def network(name: str) -> tuple[Any, tuple[int, int, int]]:
    return edm_arguments.network_of(*SMALL[name]), edm_arguments.image_shape_of(*SMALL[name])


def tensors(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {
        n: rng.normal(size=shape).astype(np.float32) for n, shape in edm_tensors.tensor_shapes(*network(name)).items()
    }
    box = np.full((1, 1, 2, 2), 0.25, np.float32)
    return {n: box if name == "adm" and n.endswith("resample_filter") else a for n, a in made.items()}


@pytest.mark.parametrize("name", COUNTS)
def test_a_published_model_has_as_many_parameters_as_the_fact_sheet_says(name: str) -> None:
    wrapper, kwargs, count = COUNTS[name]
    class_name, inner = edm_arguments.network_arguments(wrapper, kwargs)
    net, shape = edm_arguments.network_of(class_name, inner), edm_arguments.image_shape_of(class_name, inner)
    shapes = edm_tensors.tensor_shapes(net, shape)
    trained = [shape for n, shape in shapes.items() if not n.endswith(("resample_filter", "freqs"))]
    assert sum(int(np.prod(shape)) for shape in trained) == count
    if GOLDEN.is_dir():
        manifests = json.loads((GOLDEN / "manifests.json").read_text())["manifests"].values()
        expected = [
            {n.removeprefix("model."): tuple(shape) for n, (shape, _) in manifest["tensors"].items() if n != "u"}
            for manifest in manifests
        ]
        assert shapes in expected


@pytest.mark.parametrize("name", SMALL)
def test_there_and_back(name: str) -> None:
    given = tensors(name)
    params = edm_layout.to_params(*network(name), given)
    back = edm_tensors.to_state_dict(*network(name), params)
    assert set(back) == set(given)
    assert all(np.array_equal(back[n], given[n]) for n in given)
    stored = sum(a.size for a in given.values()) - (name == "adm") * 4 * sum("filter" in n for n in given)
    assert sum(a.size for a in flatten(params).values()) == stored
    assert all(a.dtype == np.float32 for a in flatten(params).values())


def test_outputs_of_an_attention_are_heads_then_channels_then_q_k_v() -> None:
    """Output o = (head·(C/heads) + c)·3 + j of 128 channels with two heads, by the fact sheet."""
    given = tensors("adm")
    given["dec.4x4_in0.qkv.bias"][:] = np.arange(384)
    given["dec.4x4_in0.qkv.weight"][:, :, 0, 0] = np.arange(384)[:, None] + 1000 * np.arange(128)
    attention = edm_layout.to_params(*network("adm"), given)["mid.attn_1"]
    for j, part in enumerate("qkv"):
        assert attention[part]["bias"][1, 5] == (1 * 64 + 5) * 3 + j
        assert attention[part]["kernel"][7, 1, 5] == (1 * 64 + 5) * 3 + j + 7000


def test_parameters_are_views_where_they_can_be() -> None:
    given = tensors("ncsnpp")
    params = flatten(edm_layout.to_params(*network("ncsnpp"), given))
    assert all(any(np.shares_memory(a, b) for b in given.values()) for a in params.values())


REFUSED = {
    "missing": ({"enc.8x8_conv.bias": None}, r"missing \(1\): enc.8x8_conv.bias"),
    "left over": ({"enc.8x8_conv.extra": np.zeros(1, np.float32)}, "unknown to the model .*enc.8x8_conv.extra"),
    "transposed": ({"map_layer1.weight": np.zeros((32, 8), np.float32).T[:, ::2]}, "another shape .*map_layer1"),
    "no numbers": ({"map_layer1.bias": np.zeros(128, np.int32)}, "another type .*map_layer1.bias"),
    "infinite": ({"map_layer1.bias": np.full(128, np.inf, np.float32)}, "not finite .*map_layer1.bias"),
    "a filter": (
        {"dec.8x8_up.skip.resample_filter": np.full((1, 1, 2, 2), 0.26, np.float32)},
        "1 filters differ .*dec.8x8_up.skip.resample_filter",
    ),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_tensors_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    given = {n: a for n, a in (tensors("adm") | changes).items() if a is not None}
    with pytest.raises(WeightsError, match=said):
        edm_layout.to_params(*network("adm"), given)


UNFIT = {
    "class": ("SongUnet", SONG, "Did you mean 'SongUNet'"),
    "argument": ("SongUNet", SONG | {"embeding_type": "fourier"}, "Did you mean 'embedding_type'"),
    "argument of the other": ("DhariwalUNet", SONG | {"encoder_type": "skip"}, "encoder_type"),
    "missing": ("SongUNet", {k: v for k, v in SONG.items() if k != "in_channels"}, "missing arguments: in_channels"),
    "choice": ("SongUNet", SONG | {"decoder_type": "residual"}, "Unknown decoder"),
    "text": ("SongUNet", SONG | {"model_channels": "8"}, "model_channels must be a number"),
    "huge": ("SongUNet", SONG | {"model_channels": 10**12}, "model_channels must be a number"),
    "deep": ("SongUNet", SONG | {"num_blocks": 10**6}, "num_blocks must be a whole number"),
    "long": ("SongUNet", SONG | {"channel_mult": [1] * 1000}, "channel_mult must be a list"),
    "odd": ("SongUNet", SONG | {"resample_filter": [1, 2, 1]}, "even number"),
    "one class": ("SongUNet", SONG | {"label_dim": 1}, "single class"),
    "width": ("DhariwalUNet", SONG | {"model_channels": 3}, "3 channels"),
}


@pytest.mark.parametrize(("class_name", "kwargs", "said"), UNFIT.values(), ids=UNFIT)
def test_arguments_of_no_network_are_refused_by_name(class_name: str, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        edm_arguments.network_of(class_name, kwargs)


def test_what_shapes_tell_only_late_is_refused_too() -> None:
    with pytest.raises(WeightsError, match="cannot be halved"):
        edm_tensors.tensor_shapes(network("ddpmpp")[0], (9, 9, 2))
    deep = edm_arguments.network_of("SongUNet", SONG | {"num_blocks": 64})
    with pytest.raises(WeightsError, match="network with 128 blocks"):
        edm_layout.to_params(deep, (8, 8, 2), {})
    with pytest.raises(WeightsError, match="not understood"):
        edm_arguments.network_arguments("EDMPrecond2", VP)


def test_the_class_decides_the_network() -> None:
    adm, song = network("adm")[0], network("ncsnpp")[0]
    assert isinstance(adm, UNet) and all(getattr(adm, name) == value for name, value in ADM.items())
    assert isinstance(song, SongUNet)
    assert (song.embedding, song.encoder, song.noise_mult) == ("fourier", "residual", 2)
