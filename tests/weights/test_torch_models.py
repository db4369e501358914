"""Models in files of PyTorch and folders of diffusers: what the tensors show, what must be said, what comes out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import places
import pytest
import safetensors_files
import torch_files

from diffusion_distill.api import import_weights
from diffusion_distill.cli import build
from diffusion_distill.cli.build import config_of
from diffusion_distill.denoisers.guidance import ClassifierGuided
from diffusion_distill.networks.dit import place_features
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import DiscreteBetas, LinearBetaDiscrete
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.weights import FAMILIES, PUBLISHED, WeightsError, torch_models
from diffusion_distill.weights.published_torch import CLASSIFIERS

#: Tiny networks of each family: constructor arguments.
DDPM = dict(image_size=8, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
ADM = dict(
    image_size=8, model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=(2,), channel_mult=(1, 2),
    num_head_channels=16, use_scale_shift_norm=True, resblock_updown=True, num_classes=3, use_new_attention_order=False,
)  # fmt: skip
PLAIN = {**ADM, "resblock_updown": False, "conv_resample": False, "num_classes": None, "channel_mult": (2, 1, 1)}
CONVOLUTIONS = {**ADM, "resblock_updown": False, "use_scale_shift_norm": False, "attention_resolutions": (1, 2)}
ONE_LEVEL = {**ADM, "channel_mult": (1,), "attention_resolutions": (), "resblock_updown": False}
CONSISTENCY = {**ADM, "out_channels": 3, "use_new_attention_order": True}
UNET2D = dict(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=None, freq_shift=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    flip_sin_to_cos=False, downsample_padding=0, norm_eps=1e-6,
)  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("ddpm", DDPM),
    "ddpm without convolutions": ("ddpm", {**DDPM, "resamp_with_conv": False}),
    "adm": ("guided_diffusion", ADM),
    "adm, new order": ("guided_diffusion", {**ADM, "use_new_attention_order": True}),
    "adm, means": ("guided_diffusion", PLAIN),
    "adm, convolutions": ("guided_diffusion", CONVOLUTIONS),
    "adm, fractions": ("guided_diffusion", {**ADM, "model_channels": 64, "channel_mult": (0.5, 0.5)}),
    "adm, one level": ("guided_diffusion", ONE_LEVEL),
    "improved ddpm": ("improved_ddpm", {**CONVOLUTIONS, "num_heads": 2, "num_head_channels": -1}),
    "consistency": ("consistency_models", CONSISTENCY),
    "consistency's teacher": ("consistency_models_edm", CONSISTENCY),
}


def tensors_of(family: str, arguments: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under the program's names."""
    rng = np.random.default_rng(seed)
    entries = FAMILIES[family].entries(arguments)
    return {entry.name: 0.1 * rng.standard_normal(entry.shape).astype(np.float32) for entry in entries}


def asked_of(family: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that tensors do not show."""
    names = [name for names in FAMILIES[family].asked for name in names]
    return {name: arguments[name] for name in names if name in arguments}


@pytest.mark.parametrize("name", CASES)
def test_a_file_becomes_its_model(name: str, tmp_path: Path) -> None:
    """Tensors show all that is not asked for; they become the artefact's parameters, and these become them again."""
    family, arguments = CASES[name]
    tensors = tensors_of(family, arguments)
    path = tmp_path / "any.pt"
    torch_files.write_zip(path, torch_files.state_dict(tensors))
    artefact = import_weights(path, tmp_path / "out", family=family, arguments=asked_of(family, arguments))
    network, shape = FAMILIES[family].network(arguments)
    assert artefact.model.network == network
    assert artefact.model.shape == shape
    loaded = Artefact.load(tmp_path / "out")
    chex.assert_trees_all_equal(loaded.params, FAMILIES[family].to_params(arguments, tensors))
    assert loaded.provenance["imported_from"]["family"] == family
    written = FAMILIES[family].to_tensors(arguments, loaded.params)
    chex.assert_trees_all_equal(written, tensors)


def test_a_published_file_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was downloaded by hand; what is said of it comes first."""
    entry = dataclasses.replace(PUBLISHED["adm-imagenet256"], arguments=ADM)
    monkeypatch.setitem(PUBLISHED, entry.name, entry)
    path = tmp_path / Path(entry.url).name
    torch_files.write_zip(path, torch_files.state_dict(tensors_of("guided_diffusion", ADM)))
    known = import_weights(path, tmp_path / "known")
    assert known.model.network == FAMILIES["guided_diffusion"].network(ADM)[0]
    said = {**asked_of("guided_diffusion", ADM), "use_new_attention_order": True}
    other = import_weights(path, tmp_path / "said", family="guided_diffusion", arguments=said)
    assert np.abs(other.params["mid.attn_1"]["q"]["kernel"] - known.params["mid.attn_1"]["q"]["kernel"]).max() > 0


#: One published name for each network: the others differ in the file alone.
DIFFERENT = {(entry.family, entry.model.network): name for name, entry in PUBLISHED.items() if entry.format == "torch"}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT.values())
def test_published_models_are_what_their_tensors_show(name: str) -> None:
    """No memory is taken: the tensors of full size are one number each."""
    entry = PUBLISHED[name]
    assert entry.family
    assert entry.source
    assert entry.preprocessing
    family = FAMILIES[entry.family]
    arguments = {k: v for k, v in entry.arguments.items() if k not in torch_models.SCHEDULE}
    assert family.network(arguments) == (entry.model.network, entry.model.shape)
    if family.inferred is not None:
        zero = np.zeros((), np.float32)
        tensors = {part.name: np.broadcast_to(zero, part.shape) for part in family.entries(arguments)}
        if entry.family == "dit":  # whose table of labels has a row for no label
            tensors["y_embedder.embedding_table.weight"] = np.broadcast_to(zero, (1001, 1152))
        shown = family.inferred(tensors, arguments["image_size"])
        told = {**shown, **family.fixed, **asked_of(entry.family, arguments)}
        assert family.network(told) == (entry.model.network, entry.model.shape)


#: Manifests of recorded networks -> names here.
MANIFESTS = {
    "cifar10": "ddpm-cifar10",
    "google_ddpm_cifar10_32": "google/ddpm-cifar10-32",
    "imagenet64": "iddpm-imagenet64",
    "imagenet128_guided": "adm-imagenet128",
    "imagenet256_guided": "adm-imagenet256",
    "bedroom_guided": "adm-lsun-bedroom",
}


@pytest.mark.slow
@pytest.mark.skipif(not (places.GOLDEN / "ddpm").is_dir(), reason="needs ../shared/golden")
@pytest.mark.parametrize("manifest", MANIFESTS)
def test_published_models_have_the_recorded_tensors(manifest: str) -> None:
    recorded = json.loads((places.GOLDEN / "ddpm" / "manifests" / f"{manifest}.json").read_text())["tensors"]
    entry = PUBLISHED[MANIFESTS[manifest]]
    arguments = {k: v for k, v in entry.arguments.items() if k not in torch_models.SCHEDULE}
    found = {part.name: list(part.shape) for part in FAMILIES[str(entry.family)].entries(arguments)}
    assert found == recorded


def test_dit_is_its_program(tmp_path: Path) -> None:
    """Its formulas, written with the program's names, against the network that the file becomes."""
    arguments = dict(
        image_size=4, in_channels=4, out_channels=8, hidden_size=16, depth=2, num_heads=2, patch_size=2, num_classes=5,
    )  # fmt: skip
    tensors = tensors_of("dit", arguments)
    classes, nothing = tensors.pop("y_embedder.classes"), tensors.pop("y_embedder.no_class")
    table = np.concatenate([classes + nothing, nothing[None]])
    tensors |= {"y_embedder.embedding_table.weight": table, "pos_embed": place_features(2, 2, 16)[None]}
    torch_files.write_zip(tmp_path / "dit.pt", torch_files.state_dict(tensors))
    found = torch_models.read(tmp_path / "dit.pt", family="dit", arguments={"image_size": 4, "num_heads": 2})
    x, time, labels = jax.random.normal(jax.random.key(0), (3, 4, 4, 4)), jnp.array([0.0, 7.0, 999.0]), [0, 4, 5]
    got = jax.jit(found.model.network.apply)({"params": found.params}, x, time, jnp.array(labels))
    np.testing.assert_allclose(got, dit_by_names(tensors, np.asarray(x), np.asarray(time), labels), atol=2e-5)
    assert found.model.data_range is None
    assert found.model.prediction == "eps_var"


def dit_by_names(
    tensors: Mapping[str, np.ndarray],
    x: np.ndarray,
    time: np.ndarray,
    labels: list[int],
    shift: int = 0,
    epsilon: float = 1e-6,
) -> np.ndarray:
    """DiT of patch 2 with two heads, in NumPy float64; shift of the frequencies, epsilon of the perceptrons' norms."""
    w = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    gelu = lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))  # noqa: E731
    linear = lambda a, name: a @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    norm = lambda a, e=1e-6: (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + e)  # noqa: E731
    kernel = w["x_embedder.proj.weight"]
    tokens = np.einsum("bhiwjc,dcij->bhwd", x.reshape(3, 2, 2, 2, 2, 4), kernel).reshape(3, 4, -1)
    h = tokens + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = time[:, None] * np.exp(-np.log(10_000) * np.arange(128) / (128 - shift))
    t = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    c = linear(silu(linear(t, "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = silu(c + w["y_embedder.embedding_table.weight"][labels])[:, None]
    for k in range(2):
        parts = np.split(linear(c, f"blocks.{k}.adaLN_modulation.1"), 6, axis=-1)
        offset, scale, gate, mlp_offset, mlp_scale, mlp_gate = parts
        qkv = linear(norm(h) * (1 + scale) + offset, f"blocks.{k}.attn.qkv").reshape(3, 4, 3, 2, 8)
        q, key, v = qkv.transpose(2, 0, 3, 1, 4)
        logits = q @ key.swapaxes(-1, -2) / np.sqrt(8)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(3, 4, 16)
        h = h + gate * linear(mixed, f"blocks.{k}.attn.proj")
        hidden = gelu(linear(norm(h, epsilon) * (1 + mlp_scale) + mlp_offset, f"blocks.{k}.mlp.fc1"))
        h = h + mlp_gate * linear(hidden, f"blocks.{k}.mlp.fc2")
    offset, scale = np.split(linear(c, "final_layer.adaLN_modulation.1"), 2, axis=-1)
    out = linear(norm(h) * (1 + scale) + offset, "final_layer.linear").reshape(3, 2, 2, 2, 2, 8)
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(3, 4, 4, 8)


#: Tensors of DiTTransformer2DModel with the arguments DIFFUSERS_DIT, as diffusers 0.42.1 names and shapes them, and
#: DiT's own names of them.
DIFFUSERS_DIT: dict[str, Any] = dict(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=4,
    patch_size=2, num_embeds_ada_norm=5,
)  # fmt: skip
OF_ALL = {
    "pos_embed.proj.weight": ((16, 4, 2, 2), "x_embedder.proj.weight"),
    "pos_embed.proj.bias": ((16,), "x_embedder.proj.bias"),
    "proj_out_1.weight": ((32, 16), "final_layer.adaLN_modulation.1.weight"),
    "proj_out_1.bias": ((32,), "final_layer.adaLN_modulation.1.bias"),
    "proj_out_2.weight": ((32, 16), "final_layer.linear.weight"),
    "proj_out_2.bias": ((32,), "final_layer.linear.bias"),
}
OF_A_BLOCK = {
    "norm1.linear.weight": ((96, 16), "adaLN_modulation.1.weight"),
    "norm1.linear.bias": ((96,), "adaLN_modulation.1.bias"),
    "attn1.to_q.weight": ((16, 16), "attn.qkv.weight"),
    "attn1.to_q.bias": ((16,), "attn.qkv.bias"),
    "attn1.to_k.weight": ((16, 16), "attn.qkv.weight"),
    "attn1.to_k.bias": ((16,), "attn.qkv.bias"),
    "attn1.to_v.weight": ((16, 16), "attn.qkv.weight"),
    "attn1.to_v.bias": ((16,), "attn.qkv.bias"),
    "attn1.to_out.0.weight": ((16, 16), "attn.proj.weight"),
    "attn1.to_out.0.bias": ((16,), "attn.proj.bias"),
    "ff.net.0.proj.weight": ((64, 16), "mlp.fc1.weight"),
    "ff.net.0.proj.bias": ((64,), "mlp.fc1.bias"),
    "ff.net.2.weight": ((16, 64), "mlp.fc2.weight"),
    "ff.net.2.bias": ((16,), "mlp.fc2.bias"),
}
OF_ALL_BLOCKS = {
    "norm1.emb.timestep_embedder.linear_1.weight": ((16, 256), "t_embedder.mlp.0.weight"),
    "norm1.emb.timestep_embedder.linear_1.bias": ((16,), "t_embedder.mlp.0.bias"),
    "norm1.emb.timestep_embedder.linear_2.weight": ((16, 16), "t_embedder.mlp.2.weight"),
    "norm1.emb.timestep_embedder.linear_2.bias": ((16,), "t_embedder.mlp.2.bias"),
    "norm1.emb.class_embedder.embedding_table.weight": ((6, 16), "y_embedder.embedding_table.weight"),
}


def diffusers_dit(path: Path, changes: Mapping[str, Any]) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of random weights, the second block's embeddings those of the first; and the weights by DiT's names."""
    rng, theirs, own = np.random.default_rng(0), {}, {"pos_embed": place_features(2, 2, 16)[None]}
    for name, (shape, known) in (OF_ALL | OF_ALL_BLOCKS).items():
        own[known] = 0.1 * rng.standard_normal(shape).astype(np.float32)
        blocks = [f"transformer_blocks.{k}." for k in range(2)] if name in OF_ALL_BLOCKS else [""]
        theirs |= {f"{block}{name}": own[known] for block in blocks}
    for k in range(2):
        parts: dict[str, list[np.ndarray]] = {}
        for name, (shape, known) in OF_A_BLOCK.items():
            theirs[f"transformer_blocks.{k}.{name}"] = tensor = 0.1 * rng.standard_normal(shape).astype(np.float32)
            parts.setdefault(f"blocks.{k}.{known}", []).append(tensor)
        own |= {name: np.concatenate(tensors) for name, tensors in parts.items()}
    path.mkdir()
    said = {"_class_name": "DiTTransformer2DModel", **DIFFUSERS_DIT, **changes}
    (path / "config.json").write_text(json.dumps(said))
    safetensors_files.write(path / "diffusion_pytorch_model.safetensors", theirs)
    return path, own


@pytest.mark.parametrize(("shift", "epsilon"), [(1, 0.5), (0, 1e-6)], ids=["as diffusers", "as DiT's program"])
def test_dit_of_diffusers_is_dit(shift: int, epsilon: float, tmp_path: Path) -> None:
    told = {} if shift else {"downscale_freq_shift": 0, "norm_eps": 1e-6}
    folder, own = diffusers_dit(tmp_path / "model", {"norm_eps": epsilon})
    found = torch_models.read(folder, arguments=told)
    x, time, labels = jax.random.normal(jax.random.key(0), (3, 4, 4, 4)), jnp.array([0.0, 7.0, 999.0]), [0, 4, 5]
    got = jax.jit(found.model.network.apply)({"params": found.params}, x, time, jnp.array(labels))
    wanted = dit_by_names(own, np.asarray(x), np.asarray(time), labels, shift, epsilon)
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    assert (found.model.prediction, found.model.data_range) == ("eps_var", None)


def test_older_folders_call_dit_a_transformer(tmp_path: Path) -> None:
    changes = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "only_cross_attention": False}
    older, newer = diffusers_dit(tmp_path / "older", changes)[0], diffusers_dit(tmp_path / "newer", {})[0]
    assert torch_models.read(older).model == torch_models.read(newer).model


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'"),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ({"_class_name": "Transformer2DModel", "cross_attention_dim": 768}, "cross_attention_dim is 768"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm is None"),
        ({"register_tokens": 4}, "Unknown argument.*'register_tokens'"),
        ({"num_layers": 3}, "missing"),
        ({"num_layers": 3000}, "cannot be those of a network with 3000 blocks"),
        ({"sample_size": 2**14}, "16384 by 16384 in patches of 2 .* not plausible"),
        ({"num_attention_heads": 2**14, "attention_head_dim": 2**14}, "268435456 channels.* not plausible"),
    ],
)
def test_a_dit_of_diffusers_that_cannot_be_computed_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=said):
        torch_models.read(diffusers_dit(tmp_path / "model", changes)[0])


@pytest.mark.fast
def test_blocks_with_embeddings_of_their_own_are_refused() -> None:
    name = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.bias"
    one, other = np.zeros(16, np.float32), np.full(16, 1e-3, np.float32)
    assert list(FAMILIES["diffusers_dit"].renamed({name.format(0): one, name.format(1): one})) == [
        name.split("norm1.")[1]
    ]
    for blocks in ({0: one, 1: other}, {1: one}):
        with pytest.raises(
            WeightsError, match=r"norm1\.emb\.timestep_embedder\.linear_1\.bias is not the same in all 2"
        ):
            FAMILIES["diffusers_dit"].renamed({name.format(k): tensor for k, tensor in blocks.items()})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("transformer_blocks." + 5000 * "9" + ".x", 0.0, "unknown to the model"),
        ("transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.bias", np.nan, "values that are not finite"),
    ],
    ids=["a number of 5000 digits", "no number in all blocks"],
)
def test_odd_tensors_of_a_dit_are_named(name: str, value: float, said: str, tmp_path: Path) -> None:
    folder, _ = diffusers_dit(tmp_path / "model", {})
    tensors = dict(torch_models.state_dict.read(folder).tensors)
    tensors |= {name.format(k): np.full(16, value, np.float32) for k in range(2)}
    safetensors_files.write(folder / "odd.safetensors", tensors).rename(folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsError, match=said):
        torch_models.read(folder)


def folder_of(path: Path, changes: Mapping[str, Any], scheduler: Mapping[str, Any] | None = None) -> Path:
    """A folder of diffusers; a change to None takes a field away."""
    path.mkdir()
    said = {"_class_name": "UNet2DModel", "_diffusers_version": "0.42.1", **UNET2D, "attention_head_dim": 32, **changes}
    said = {name: value for name, value in said.items() if value is not None}
    (path / "config.json").write_text(json.dumps(said))
    tensors = tensors_of("diffusers_unet2d", {**UNET2D, "attention_head_dim": 32})
    safetensors_files.write(path / "diffusion_pytorch_model.safetensors", tensors)
    if scheduler is not None:
        (path / "scheduler_config.json").write_text(json.dumps(scheduler))
    return path


def test_a_folder_of_diffusers_becomes_its_model(tmp_path: Path) -> None:
    scheduler = {
        "num_train_timesteps": 50,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "clip_sample": True,
    }
    found = torch_models.read(folder_of(tmp_path / "model", {}, scheduler))
    assert found.model.network == FAMILIES["diffusers_unet2d"].network({**UNET2D, "attention_head_dim": 32})[0]
    assert found.model.prediction == "v"
    assert found.model.process == DiscreteBetas("cosine", 50)
    level = found.model.process.level(np.arange(1, 51) / 50)
    np.testing.assert_allclose(found.model.time_input.time(level, found.model.process), np.arange(50), atol=1e-6)
    plain = torch_models.read(folder_of(tmp_path / "plain", {}))
    assert plain.model.process == LinearBetaDiscrete()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no family": ("guided_diffusion", {"family": None}, "several programs.*family=.*consistency_models"),
    "no size": ("ddpm", {"arguments": {}}, "do not show image_size.*arguments="),
    "no heads": ("guided_diffusion", {"arguments": {"image_size": 8}}, "num_heads or num_head_channels"),
    "another family": (
        "ddpm",
        {"family": "guided_diffusion", "arguments": asked_of("guided_diffusion", ADM)},
        "not those of guided_diffusion",
    ),
    "an unknown family": ("ddpm", {"family": "dpm"}, "Did you mean 'ddpm'"),
    "an unknown argument": ("ddpm", {"arguments": {"image_size": 8, "chanels": 3}}, "Unknown argument.*'chanels'"),
    "a wrong argument": ("ddpm", {"arguments": {"image_size": 8, "ch": 64}}, "do not fit"),
    "a text as a number": ("ddpm", {"arguments": {"image_size": "8"}}, "image_size|misshaped"),
    "an unknown schedule": (
        "ddpm",
        {"arguments": {"image_size": 8, "beta_schedule": "cosin"}},
        "Did you mean 'cosine'",
    ),
    "a huge schedule": (
        "ddpm",
        {"arguments": {"image_size": 8, "num_diffusion_timesteps": 2**19}},
        "num_diffusion_timesteps",
    ),
    "a huge network": ("ddpm", {"arguments": {"image_size": 8, "num_res_blocks": 2**13}}, "cannot be those of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_missing_or_wrong_is_said(name: str, tmp_path: Path) -> None:
    family, told, message = REFUSED[name]
    arguments = {"ddpm": DDPM, "guided_diffusion": ADM}[family]
    path = tmp_path / "any.pt"
    torch_files.write_zip(path, torch_files.state_dict(tensors_of(family, arguments)))
    told = {"family": family, "arguments": asked_of(family, arguments), **told}
    with pytest.raises((WeightsError, ValueError), match=message):
        torch_models.read(path, **told)


FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "another class": (
        {"_class_name": "UNet2DConditionModel"},
        None,
        "UNet2DConditionModel.*UNet2DModel, DiT.* are read",
    ),
    "no head width": ({"attention_head_dim": None}, None, "does not say attention_head_dim"),
    "fourier features": ({"time_embedding_type": "fourier"}, None, "time_embedding_type is 'fourier'"),
    "an unknown block": ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, None, "SkipDownBlock2D"),
    "a norm that ours always has": ({"resnet_time_scale_shift": "scale_shift"}, None, "middle attention has no norm"),
    "betas of its own": ({}, {"trained_betas": [0.1, 0.2]}, "trained_betas are not known"),
    "no signal for eps": ({}, {"rescale_betas_zero_snr": True}, "predicts 'eps' says nothing"),
    "an unknown prediction": ({}, {"prediction_type": "flow"}, "prediction_type is 'flow'"),
    "a list as a rule": ({}, {"beta_schedule": ["linear"]}, r"beta_schedule is \['linear'\]"),
    "a flow": (
        {},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        "FlowMatchEuler.* no beta_schedule",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_cannot_be_computed_are_refused(name: str, tmp_path: Path) -> None:
    changes, scheduler, message = FOLDERS[name]
    with pytest.raises(WeightsError, match=message):
        torch_models.read(folder_of(tmp_path / "model", changes, scheduler))


def test_consistency_models_are_students_of_one_step(tmp_path: Path) -> None:
    """c_skip and c_out of the paper (appendix C); one step from 80 is x_hat there."""
    path = tmp_path / "any.pt"
    torch_files.write_zip(path, torch_files.state_dict(tensors_of("consistency_models", CONSISTENCY)))
    told = asked_of("consistency_models", CONSISTENCY)
    found = torch_models.read(path, family="consistency_models", arguments=told)
    assert found.steps == 1
    model, labels = found.model, jnp.array([0, 1, 2, 1])
    sigma = np.array([80.0, 3.0, 0.1, 0.002], np.float32)
    z = sigma[:, None, None, None] * jax.random.normal(jax.random.key(0), (4, *model.shape))
    level = Level(jnp.ones(4), jnp.asarray(sigma))
    s = sigma.astype(np.float64)[:, None, None, None]
    c_in, c_skip = 1 / np.sqrt(s**2 + 0.25), 0.25 / ((s - 0.002) ** 2 + 0.25)
    c_out = (s - 0.002) * 0.5 / np.sqrt(s**2 + 0.25)
    time = 1000 * 0.25 * np.log(sigma)
    raw = jax.jit(model.network.apply)({"params": found.params}, (c_in * z).astype(jnp.float32), time, labels)
    x_hat = jax.jit(lambda z: model.denoiser(found.params)(z, level, labels))(z)
    np.testing.assert_allclose(x_hat, c_skip * z + c_out * raw, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(x_hat[3], z[3], atol=1e-5)
    grid = found.grid
    assert grid is not None
    np.testing.assert_array_equal(grid.sigma, [80.0, 0.0])


def test_a_classifier_of_noisy_images_guides(tmp_path: Path) -> None:
    arguments = {
        **{k: v for k, v in ADM.items() if k not in ("num_classes", "use_new_attention_order")},
        "out_channels": 5,
        "pool": "attention",
    }
    path = tmp_path / "classifier.pt"
    torch_files.write_zip(path, torch_files.state_dict(tensors_of("guided_diffusion_classifier", arguments)))
    log_prob = torch_models.read_classifier(path, {**arguments, "beta_schedule": "cosine"})
    z, labels = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([4, 0])
    level = log_prob.process.level(jnp.array([0.5, 0.25]))
    logits = jax.jit(log_prob.network.apply)({"params": log_prob.params}, z, jnp.array([499.0, 249.0]))
    expected = jax.nn.log_softmax(logits)[jnp.arange(2), labels]
    np.testing.assert_allclose(jax.jit(lambda z: log_prob(z, level, labels))(z), expected, rtol=1e-4)
    guided = ClassifierGuided(lambda z, level, cond=None: 0.5 * z, log_prob, scale=2.0)
    x_hat = jax.jit(lambda z: guided(z, level, labels))(z)
    assert jnp.abs(x_hat - 0.5 * z).max() > 0

    config = config_of(None, None, None, {"name": "digits"}, {"name": "digits"}, guidance=2.0)
    config.update_from_flattened_dict({"sample.classifier": str(path)})
    with pytest.raises(WeightsError, match=r"64x64_classifier.pt, .*classifier.json"):
        build.spec(config)
    path.with_suffix(".json").write_text(json.dumps({**arguments, "beta_schedule": "cosine"}), encoding="utf-8")
    guidance = build.spec(config).guidance
    path.with_suffix(".json").write_text("[]", encoding="utf-8")
    with pytest.raises(WeightsError, match=r"classifier\.json: the JSON is a list"):
        build.spec(config)
    path.with_suffix(".json").write_text(json.dumps(arguments), encoding="utf-8")
    assert guidance and guidance["scale"] == 2.0
    chex.assert_trees_all_equal(guidance["classifier"], log_prob)
    config.update_from_flattened_dict({"sample.null": 3})
    with pytest.raises(ValueError, match="classifier-free"):
        build.spec(config)


@pytest.mark.slow
@pytest.mark.parametrize("url", CLASSIFIERS)
def test_published_classifiers_can_be_built(url: str) -> None:
    arguments = {k: v for k, v in CLASSIFIERS[url].items() if k not in torch_models.SCHEDULE}
    assert FAMILIES["guided_diffusion_classifier"].entries(arguments)
