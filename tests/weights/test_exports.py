"""Exports hold the same weights and say the same of them; what another program cannot compute is refused by name.

The tests that ask the library diffusers itself need the extra [bench], in this Python or in that of PEER_PYTHON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import places
import pytest
from small_networks import parameters

from diffusion_distill import api
from diffusion_distill.denoisers.model import Model
from diffusion_distill.formats import safetensors_file
from diffusion_distill.networks import DiT, UNet
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import DiscreteBetas, LinearBeta, LinearBetaDiscrete, RectifiedFlow
from diffusion_distill.process.time_input import EDMInput, LogsnrInput, TimeOfProcess
from diffusion_distill.process.ve import VE
from diffusion_distill.process.vp_discrete import NEXT_TO_NONE
from diffusion_distill.solvers import engine, tabulate
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.weights import FAMILIES, PUBLISHED, WeightsError, adm, diffusers, flatten, torch_models

INDEX = TimeOfProcess(1000, -1)  # what networks of 1000 betas are told
SMALL: dict[str, Any] = dict(ch=32, emb_ch=128, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
ADM: dict[str, Any] = {**SMALL, **adm.SETTINGS, "head_dim": 16, "resblock_resample": True}
DDPM = UNet(**SMALL, num_heads=1, film=False)
MODELS = {
    "ddpm": Model(DDPM, (8, 8, 3), LinearBetaDiscrete(), "eps", INDEX),
    "adm": Model(
        UNet(**{**ADM, "out_ch": 6, "num_classes": 5}), (8, 8, 3), DiscreteBetas("cosine", 1000), "eps_var", INDEX
    ),
    "v": Model(
        UNet(**{**SMALL, "emb_ch": 64}, num_heads=1, down_padding=(1, 1)), (8, 8, 3),
        DiscreteBetas("cosine", 4000), "v", TimeOfProcess(1000, -0.25),
    ),
    "x": Model(
        UNet(**{**SMALL, "attn_resolutions": (8, 4)}, head_dim=32), (8, 8, 3), LinearBeta(), "x", TimeOfProcess()
    ),
    "zero SNR": Model(
        UNet(**{**SMALL, "emb_ch": 64}, num_heads=1, down_padding=(1, 1)), (8, 8, 3),
        DiscreteBetas("scaled_linear", 1000, 8.5e-4, 0.012, zero_snr=True), "v", INDEX,
    ),
    "consistency": Model(UNet(**ADM), (8, 8, 3), VE(), "consistency", EDMInput(factor=1000.0)),
}  # fmt: skip
PYTORCH = ("adm", "consistency")
#: What importers are told of folders of diffusers, where these can be read as models: of betas without a rule, it.
TOLD: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "adm": {},
    "zero SNR": {},
    "v": {"beta_schedule": "cosine", "num_diffusion_timesteps": 4000, "rescale_timesteps": True},
}
PEER = os.environ.get("PEER_PYTHON", sys.executable)
HAS_DIFFUSERS = "import sys; from importlib.util import find_spec; sys.exit(find_spec('diffusers') is None)"
STEPS = 8


def artefact_of(name: str) -> Artefact:
    model = MODELS[name]
    return Artefact(model, parameters(model.network, channels=3), provenance={"method": "none", "updates": 3})


def raw(model: Model, params: Any, inputs: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The network's outputs, channels first, as diffusers has them."""
    x, times, labels = (inputs[f"{name}/{what}"] for what in ("x", "times", "labels"))
    cond = jnp.asarray(labels, jnp.int32) if model.num_classes > 1 else None
    found = model.adapter.apply(params, jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(times, jnp.float32), cond)
    return np.asarray(found).transpose(0, 3, 1, 2)


def inputs_of(names: list[str]) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(0), {}
    for name in names:
        found[f"{name}/x"] = rng.normal(size=(3, 3, 8, 8)).astype(np.float32)
        found |= {f"{name}/times": np.array([3, 250, 990]), f"{name}/labels": np.array([0, 4, 2])}
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_diffusers_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    artefact = artefact_of(name)
    found = api.exported(artefact, tmp_path / "out", "diffusers")
    assert found.difference <= 1e-6
    stored = {path.relative_to(found.place).as_posix() for path in found.place.rglob("*") if path.is_file()}
    weights = "unet/diffusion_pytorch_model.safetensors"
    config, scheduler = "unet/config.json", "scheduler/scheduler_config.json"
    assert stored == {"README.md", "model_index.json", config, weights, scheduler}
    if name in TOLD:
        again = api.import_weights(found.place, tmp_path / "again", arguments=TOLD[name])
        model, inputs = artefact.model, inputs_of([name])
        assert (again.model.process, again.model.time_input) == (model.process, model.time_input)
        assert again.model.prediction == ("eps" if model.prediction == "eps_var" else model.prediction)
        ours, theirs = raw(model, artefact.params, inputs, name), raw(again.model, again.params, inputs, name)
        np.testing.assert_allclose(theirs, ours[:, :3], atol=1e-6)
    assert set(os.listdir(tmp_path)) <= {"out", "again"}


@pytest.mark.parametrize("name", PYTORCH)
def test_a_state_dict_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    artefact = artefact_of(name)
    found = api.exported(artefact, tmp_path / "out", "pytorch")
    assert found.difference == 0
    said, tensors = json.loads((found.place / "arguments.json").read_text()), found.place / "model.safetensors"
    if said["schedule"] is None:
        params = FAMILIES["guided_diffusion"].to_params(said["network"], safetensors_file.read(tensors))
    else:
        arguments = {**said["network"], **said["schedule"]}
        read = torch_models.read(tensors, artefact.model, family="guided_diffusion", arguments=arguments)
        params = read.params
        assert said["schedule"]["beta_schedule"] == "cosine"
    wanted = flatten(artefact.params)
    assert all(np.array_equal(value, wanted[path]) for path, value in flatten(params).items())


def changed(name: str, network: Any = None, **fields: Any) -> Model:
    model = MODELS[name]
    return dataclasses.replace(model, network=network or model.network, **fields)


#: model, format, what the error says
REFUSED = {
    "another network": (changed("x", DiT(width=32, depth=1, num_heads=2, out_ch=3, patch=2)), "diffusers", "kind DiT"),
    "another with a variance": (
        changed("adm", DiT(width=32, depth=1, num_heads=2, out_ch=6, patch=2)),
        "diffusers",
        "kind DiT",
    ),
    "heads of the way up": (changed("x", UNet(**SMALL, num_heads=1, num_heads_up=2)), "diffusers", "on the way up"),
    "few groups": (changed("x", UNet(**SMALL, num_heads=1, norm_fewest=4)), "diffusers", "norm_fewest is 4, there 0"),
    "labels with a bias": (changed("x", UNet(**SMALL, num_heads=1, num_classes=3)), "diffusers", "label_bias is True"),
    "augmentation": (changed("x", UNet(**SMALL, num_heads=1, augment_dim=9)), "diffusers", "augment_dim is 9"),
    "a shift between": (changed("x", UNet(**SMALL, num_heads=1, frequency_shift=0.5)), "diffusers", "shift is 0.5"),
    "no convolution": (changed("x", UNet(**SMALL, num_heads=1, conv_resample=False)), "diffusers", "conv_resample"),
    "two outputs": (
        changed("x", UNet(**{**SMALL, "out_ch": 6}, num_heads=1), prediction="both"),
        "diffusers",
        "'both'",
    ),
    "logsnr": (changed("x", time_input=LogsnrInput()), "diffusers", "the index of a step"),
    "EDM": (changed("consistency", prediction="edm"), "diffusers", "predicts 'edm'"),
    "a flow": (changed("x", process=RectifiedFlow()), "diffusers", r"alpha² \+ sigma² = 1"),
    "times between": (changed("ddpm", process=LinearBetaDiscrete(100)), "diffusers", "the 100 times"),
    "DDPM's norms": (MODELS["ddpm"], "pytorch", "norm_epsilon is 1e-06, there 1e-05"),
    "norms in other groups": (
        changed("x", UNet(**{**SMALL, "ch": 8, "norm_groups": 4}, num_heads=1)),
        "pytorch",
        "be built",
    ),
    "an unknown format": (MODELS["ddpm"], "onyx", "Unknown format of exports 'onyx'"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", REFUSED)
def test_what_others_cannot_compute_is_refused_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    model, form, said = REFUSED[name]
    with pytest.raises((WeightsError, ValueError), match=said):
        api.export_weights(Artefact(model, {}), tmp_path / "out", form)
    assert os.listdir(tmp_path) == []


@pytest.mark.fast
@pytest.mark.parametrize("form", ["safetensors", "stablehlo", "onnx"])
def test_an_export_in_a_file_does_not_replace_a_folder(form: str, tmp_path: Path) -> None:
    place = tmp_path / f"out.{form}"
    place.mkdir()
    with pytest.raises(ValueError, match="is a folder; an export"):
        api.export_weights(Artefact(MODELS["ddpm"], {}), place, form)


@pytest.mark.fast
def test_published_networks_keep_their_arguments() -> None:
    """What an export says of a published network builds it again: all of the two programs, at their real sizes."""
    families = {"diffusers_unet2d": diffusers, "guided_diffusion": adm, "improved_ddpm": adm, "consistency_models": adm}
    found = [entry for entry in PUBLISHED.values() if entry.family in families]
    assert len(found) > 20
    for entry in found:
        program, network, shape = families[str(entry.family)], entry.model.network, entry.model.shape
        build = program.network if program is diffusers else program.guided
        assert build(program.arguments_of(network, shape)) == (network, shape), entry.name


def test_a_function_in_stablehlo_takes_any_batch(teacher: Artefact, tmp_path: Path) -> None:
    found = api.exported(teacher, tmp_path / "teacher.stablehlo", "stablehlo")
    assert found.difference < 1e-5 and "calling convention" in found.note
    function = jax.export.deserialize(bytearray(found.place.read_bytes()))
    for batch in (1, 3):
        z, level = jnp.ones((batch, *teacher.model.shape)), Level(jnp.full(batch, 0.6), jnp.full(batch, 0.8))
        wanted = teacher.denoiser(clip=False)(z, level)
        np.testing.assert_allclose(function.call(z, *level), wanted, atol=1e-5)


ONNX = {
    "ddpm": MODELS["ddpm"],
    "dit": changed("x", DiT(width=32, depth=1, num_heads=2, out_ch=3, num_classes=5)),
    "dit in bfloat16": changed("x", DiT(width=32, depth=1, num_heads=2, out_ch=3, num_classes=5, dtype="bfloat16")),
}


@pytest.mark.parametrize("name", ONNX)
def test_onnxruntime_computes_what_we_do(name: str, tmp_path: Path) -> None:
    pytest.importorskip("jax2onnx")
    runtime, model = pytest.importorskip("onnxruntime"), ONNX[name]
    artefact = Artefact(model, parameters(model.network, channels=3))
    found = api.exported(artefact, tmp_path / "any.onnx", "onnx")
    assert found.difference < 1e-4
    labels = {} if model.num_classes == 1 else {"labels": np.array([3], np.int32)}
    level = Level(np.array([0.6], np.float32), np.array([0.8], np.float32))
    z = np.random.default_rng(1).normal(size=(1, *model.shape)).astype(np.float32)
    session = runtime.InferenceSession(found.place.read_bytes())
    [x_hat] = session.run(None, {"z": z, "alpha": level.alpha, "sigma": level.sigma, **labels})
    plain = dataclasses.replace(model, network=model.network.clone(dtype="float32"))
    denoise = dataclasses.replace(artefact, model=plain).denoiser(clip=False)
    wanted = denoise(z, Level(*map(jnp.asarray, level)), *map(jnp.asarray, labels.values()))
    assert_close(x_hat, np.asarray(wanted), 1e-5)


def test_a_student_is_exported_if_the_scheduler_has_its_levels(tmp_path: Path) -> None:
    artefact = artefact_of("ddpm")
    student = dataclasses.replace(artefact, steps=4)
    place = api.export_weights(student, tmp_path / "out", "diffusers")
    assert "num_inference_steps=4" in (place / "README.md").read_text(encoding="utf-8")
    other = grids.make_grid(artefact.model.process, 4, "logsnr")
    with pytest.raises(WeightsError, match="made for 4 levels that are not among"):
        api.export_weights(dataclasses.replace(student, grid=other), tmp_path / "no", "diffusers")


def test_nothing_but_an_export_is_replaced(tmp_path: Path) -> None:
    artefact = artefact_of("ddpm")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is no export"):
        api.export_weights(artefact, tmp_path / "mine", "diffusers")
    for _ in range(2):
        api.export_weights(artefact, tmp_path / "out", "diffusers")
    assert set(os.listdir(tmp_path)) == {"mine", "out"}


def test_the_card_says_where_the_weights_are_from(tmp_path: Path) -> None:
    imported = {"imported_from": {"name": "google/ddpm-cifar10-32", "program": "diffusers_unet2d"}}
    facts = {"method": {"name": "tract", "schedule": [4]}, "updates": 7, "teacher": imported}
    artefact = dataclasses.replace(artefact_of("ddpm"), provenance=facts)
    results = [{"sampler": "ddim", "fid": "3.17 ± 0.01"}, {"sampler": "unipc", "nfe": 5}]
    place = api.exported(artefact, tmp_path / "out", "diffusers", results).place
    card = (place / "README.md").read_text(encoding="utf-8")
    assert "| sampler | fid | nfe |\n| --- | --- | --- |\n| ddim | 3.17 ± 0.01 |  |\n| unipc |  | 5 |\n" in card
    for said in (
        "8 x 8 pixels",
        "method: name tract",
        "updates: 7",
        "teacher, imported from, name: google/ddpm-cifar10",
    ):
        assert said in card
    assert "The licence stands on the model's page." in card and "DDIMPipeline.from_pretrained" in card
    card = (api.export_weights(artefact_of("adm"), tmp_path / "adm", "diffusers") / "README.md").read_text(
        encoding="utf-8"
    )
    assert "The network's variance is left out" in card and "labels = torch.arange(16) % 5" in card
    assert "Not stated" in card


# ---------------------------------------------------------------- diffusers itself

_SHARED = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": [32, 64]}
_DIT = {
    "_class_name": "DiTTransformer2DModel", "sample_size": 8, "in_channels": 3, "num_attention_heads": 2,
    "attention_head_dim": 16, "num_layers": 2, "num_embeds_ada_norm": 5,
}  # fmt: skip
_PLAIN = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
#: name -> (arguments of UNet2DModel or another class, of DDIMScheduler)
MADE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "made ddpm": (
        {
            **_SHARED, **_PLAIN, "attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1,
            "downsample_padding": 0, "norm_eps": 1e-6,
        },
        {},
    ),
    "made adm": (
        {
            **_SHARED, "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"], "downsample_type": "resnet",
            "upsample_type": "resnet", "attention_head_dim": 16, "attn_norm_num_groups": 32, "num_class_embeds": 5,
            "resnet_time_scale_shift": "scale_shift",
        },
        {"beta_schedule": "squaredcos_cap_v2"},
    ),
    "made v": ({**_SHARED, **_PLAIN}, {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}),
    "made x": ({**_SHARED, **_PLAIN, "time_embedding_dim": 64}, {"prediction_type": "sample"}),
    "made dit": ({**_DIT, "out_channels": 6}, {"beta_schedule": "scaled_linear"}),
    "made dit, v": ({**_DIT, "patch_size": 4, "norm_eps": 1.0}, {"prediction_type": "v_prediction"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(folder, inputs, answers) of diffusers, see `peer_diffusers`."""
    if subprocess.run([PEER, "-c", HAS_DIFFUSERS], check=False).returncode:
        pytest.skip("needs the library diffusers, here or in the Python that PEER_PYTHON names")
    folder, inputs = tmp_path_factory.mktemp("peer"), inputs_of([*MODELS, *MADE])
    for name in MODELS:
        api.export_weights(artefact_of(name), folder / name, "diffusers")
    np.savez(folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
    question = {"loaded": list(MODELS), "made": MADE, "steps": STEPS}
    (folder / "question.json").write_text(json.dumps(question))
    command = [PEER, str(places.ROOT / "tests" / "peer_diffusers.py"), str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300)
    with np.load(folder / "answers.npz") as answers:
        return folder, inputs, dict(answers)


def assert_close(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("name", MADE)
def test_networks_of_diffusers_are_read(name: str, asked: Any) -> None:
    folder, inputs, answers = asked
    found = torch_models.read(folder / name)
    assert_close(raw(found.model, found.params, inputs, name), answers[f"{name}/outputs"], 1e-4)
    said = "eps_var" if "out_channels" in MADE[name][0] else MADE[name][1].get("prediction_type", "epsilon")
    assert torch_models.PREDICTED.get(said, said) == found.model.prediction


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_reads_our_networks(name: str, asked: Any) -> None:
    _, inputs, answers = asked
    artefact = artefact_of(name)
    assert_close(answers[f"{name}/outputs"], raw(artefact.model, artefact.params, inputs, name)[:, :3], 1e-4)


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver++"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "consistency"])
def test_diffusers_samples_as_we_do(name: str, solver: str, asked: Any) -> None:
    _, inputs, answers = asked
    artefact, alpha2 = artefact_of(name), np.append(answers[f"{name}/alpha2"][answers[f"{name}/timesteps"]], 1.0)
    if solver != "ddim":  # with zero SNR diffusers' DDIM has no signal at all, its DPM-Solver next to none
        alpha2 = np.where(alpha2 == 0, NEXT_TO_NONE, alpha2)
    grid = Level(np.sqrt(alpha2.astype(np.float64)), np.sqrt(1 - alpha2.astype(np.float64)))
    assert_close(alpha2[:-1], artefact.model.process.level(np.arange(STEPS, 0, -1) / STEPS).alpha ** 2, 1e-2)
    table = tabulate(solver, grid, artefact.model.process).plain()
    clip = solver == "ddim"  # DPMSolverMultistepScheduler does not clip
    cond = jnp.asarray(inputs[f"{name}/labels"], jnp.int32) if artefact.model.num_classes > 1 else None
    noise = jnp.asarray(inputs[f"{name}/x"].transpose(0, 2, 3, 1))
    found = np.asarray(engine.integrate(artefact.denoiser(clip=clip), table, noise, cond)).transpose(0, 3, 1, 2)
    assert_close(answers[f"{name}/{solver}"], found, 1e-3)


def test_diffusers_samples_consistency_models_in_one_step(asked: Any) -> None:
    _, inputs, answers = asked
    artefact = artefact_of("consistency")
    table = tabulate("ddim", Level(np.ones(2), np.array([80.0, 0.0])), artefact.model.process).plain()
    noise = jnp.asarray(inputs["consistency/x"].transpose(0, 2, 3, 1))
    found = np.asarray(engine.integrate(artefact.denoiser(), table, noise)).transpose(0, 3, 1, 2)
    assert_close(answers["consistency/one step"], found, 1e-3)
