"""docs/from_google_btd.md: every name in it is there, nothing of the other program is missing, and its code runs.

What the other program has is recorded: its configs and checkpoints in tests/golden/btd, its functions below.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import places
import pytest
import toys
from flax import serialization
from PIL import Image
from places import ROOT

import diffusion_distill as dd
from diffusion_distill import solvers, weights
from diffusion_distill.cli.modes import MODES, WITHOUT_CONFIG
from diffusion_distill.methods.phases import AVERAGING
from diffusion_distill.networks import NETWORKS
from diffusion_distill.process.weighting import WEIGHTINGS
from diffusion_distill.solvers import engine
from diffusion_distill.training import sharding

PAGE = (ROOT / "docs" / "from_google_btd.md").read_text(encoding="utf-8")
BTD = places.SMALL / "btd"

#: Everything public of each file of the other program, and the methods of its classes.
THERE = {
    "dpm": """diffusion_reverse diffusion_forward predict_x_from_eps predict_xlogvar_from_epslogvar predict_eps_from_x
        predict_epslogvar_from_xlogvar predict_x_from_v predict_v_from_x_and_eps Model Model._run_model Model.predict
        Model.vb Model.training_losses Model.ddim_step Model.bwd_dif_step Model.sample_loop""",
    "model": """TrainState Model Model.current_num_steps Model.make_init_params Model.make_init_state
        Model.load_teacher_state Model.loss_fn Model.step_fn Model.samples_fn Model.make_optimizer_def""",
    "schedules": "_logsnr_schedule_cosine get_logsnr_schedule",
    "unet": "get_timestep_embedding nearest_neighbor_upsample ResnetBlock AttnBlock UNet",
    "datasets": """batch_dataset Dataset Dataset.get_shuffled_repeated_dataset Dataset.get_padded_one_shot_dataset
        CIFAR10 central_square_crop decode_and_central_square_crop ImageNet LSUN""",
    "checkpoints": """natural_sort save_checkpoint latest_checkpoint_path check_and_convert_gcs_filepath
        restore_from_path restore_checkpoint wait_for_new_checkpoint checkpoints_iterator""",
    "utils": """normalize_data unnormalize_data nearest_neighbor_upsample space_to_depth depth_to_space np_tile_imgs
        save_tiled_imgs assert_synced barrier allgather_and_reshape np_treecat dist tf_to_numpy numpy_iter sumflat
        meanflat flatten reverse_fori_loop normal_kl approx_normal_cdf normal_cdf discretized_gaussian_log_likelihood
        count_params copy_pytree global_norm clip_by_global_norm apply_ema scale_init RngGen jax_randint log1mexp
        broadcast_from_left""",
}
FILES = [
    *("README.md", "diffusion_distillation.ipynb", "fid_steps_graph.png", "requirements.txt", "config/__init__.py"),
    *(f"{name}.py" for name in ("__init__", *THERE)),
]
#: Fields that the other program reads with a default and no config has.
WITH_DEFAULTS = [
    *("model.logvar_coeff", "model.args.logsnr_scale_range", "train.avg_type", "train.avg_steps"),
    *("train.adam_beta1", "train.adam_beta2", "train.optimizer_beta"),
]


def section(title: str) -> str:
    """The text below a heading, to the next of its rank or above."""
    match = re.search(rf"^(#+) {re.escape(title)}$(.*?)(?=^(?!\1#)#+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert match, title
    return match[2]


def rows(text: str) -> list[list[str]]:
    """The cells of a text's tables, without their heads."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [line for line in cells if line[-1] != "here" and line[0] != "family"]


def names(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def listed(text: str) -> list[str]:
    return [name for row in rows(text) for name in names(row[0])]


# --- nothing of the other program is missing


@pytest.mark.fast
def test_every_file_is_listed() -> None:
    configs = json.loads((BTD / "configs.json").read_text())["configs"]
    assert sorted(listed(section("Files"))) == sorted([*FILES, *(f"config/{name}.py" for name in configs)])


@pytest.mark.fast
@pytest.mark.parametrize("module", THERE)
def test_every_function_is_listed(module: str) -> None:
    title = "schedules.py and unet.py" if module in ("schedules", "unet") else f"{module}.py"
    found = set(listed(section(title)))
    assert set(THERE[module].split()) <= found
    if module not in ("schedules", "unet"):
        assert found == set(THERE[module].split())


@pytest.mark.fast
def test_every_config_field_is_listed() -> None:
    configs = json.loads((BTD / "configs.json").read_text())["configs"]
    fields = {field for config in configs.values() for field in leaves(config)}
    assert sorted(listed(section("Config fields"))) == sorted([*fields, *WITH_DEFAULTS])


def leaves(config: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield above + name


@pytest.mark.fast
def test_every_checkpoint_is_listed_and_can_be_imported() -> None:
    released = json.loads((BTD / "released_checkpoints.json").read_text())
    text = section("Checkpoints")
    found = [name for row in rows(text)[:4] for cell in row[1:] for name in names(cell)]
    assert sorted(found) == sorted(released["names"])
    for name in found:
        assert weights.PUBLISHED[name].steps == (0 if name.endswith("original") else int(name.rpartition("_")[2]))
    assert listed(text) == list(dict.fromkeys(["ema_params", "num_sample_steps", "step", "optimizer"]))


# --- every name of ours is there

CONFIGS = [
    build_config
    for path in ("cifar10_teacher", "cifar10_btd", "imagenet64_teacher", "lsun128_btd")
    for build_config in [importlib.import_module(f"configs.{path}").get_config()]
]
OURS = sorted({name for row in rows(PAGE) for name in names(row[-1])} | {"--mode=import", "dd.main"})


@pytest.mark.fast
@pytest.mark.parametrize("name", [name for name in OURS if name == "dd" or name.startswith("dd.")])
def test_a_name_of_ours_can_be_imported(name: str) -> None:
    value: Any = dd
    path = "diffusion_distill"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        if isinstance(value, type) and part in {field.name for field in fields_of(value)}:
            continue  # a field of a dataclass without a default is no attribute of the class
        if not hasattr(value, part):
            importlib.import_module(path)
        value = getattr(value, part)


def fields_of(kind: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()


@pytest.mark.fast
@pytest.mark.parametrize("name", [name for name in OURS if name.startswith("config.")])
def test_a_field_of_ours_is_in_a_config(name: str) -> None:
    def has(config: Any) -> bool:
        for part in name.split(".")[1:]:
            if (not isinstance(config, Mapping) and not hasattr(config, "keys")) or part not in config:
                return False
            config = config[part]
        return True

    assert any(has(config) for config in CONFIGS)


@pytest.mark.fast
def test_other_names_of_ours_are_there() -> None:
    for name in OURS:
        if name.startswith("configs/") or name.endswith((".md", ".ipynb", ".py")):
            assert (ROOT / name).exists(), name
        if name.startswith("--mode="):
            assert name.removeprefix("--mode=") in {*MODES, *WITHOUT_CONFIG}


@pytest.mark.fast
def test_values_in_the_text() -> None:
    """Names of rules, predictions and options that stand in the page as what to write."""
    assert "snr_plus_one" in WEIGHTINGS
    assert {"window", "plain"} <= set(AVERAGING)
    assert solvers.spelled("ancestral gamma=1") == ("ancestral", {"gamma": 1})
    assert {"optimizer_target", "grad_ema", "grad_sq_ema"} <= set(weights.progressive.TREES)
    config = importlib.import_module("configs.lsun128_teacher").get_config("church")
    assert config.data.dataset == "lsun/church_outdoor" and config.data.resample == "bilinear"


# --- the code runs

#: What makes the page's code small; each text must stand in it.
SMALL = {"8192, 4": "8, 4", "50_000 * 128": "16", "batch_size=128": "batch_size=8"}


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_networks: None) -> None:
    monkeypatch.chdir(tmp_path)
    entry = weights.PUBLISHED["cifar_original"]
    model = dataclasses.replace(entry.model, network=NETWORKS["perceptron"](out_ch=3))
    monkeypatch.setitem(weights.PUBLISHED, entry.name, dataclasses.replace(entry, model=model))
    content = {"step": 7, "num_sample_steps": 0, "ema_params": toys.parameters(model), "optimizer": None}
    Path("cifar_original").write_bytes(serialization.msgpack_serialize(jax.tree.map(np.asarray, content)))
    write_images(Path("cifar10.zip"))
    one = sharding.data_mesh(jax.devices()[:1])  # is compiled faster than for all
    monkeypatch.setattr(sharding, "data_mesh", lambda devices=None: one)
    code = "".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    for old, new in SMALL.items():
        assert old in code
        code = code.replace(old, new)
    seen: dict[str, Any] = {}
    exec(compile(code, "from_google_btd.md", "exec"), seen)
    assert seen["teacher"].provenance["updates"] == 7 and list(seen["students"]) == [4]
    chex.assert_shape([seen["images"], seen["z"], seen["pixels"]], (16, 32, 32, 3))
    chex.assert_type([seen["images"], seen["z"], seen["pixels"]], [jnp.float32, jnp.float32, jnp.uint8])
    chex.assert_tree_all_finite([seen["images"], seen["z"], seen["value"], seen["gradient"]])
    chex.assert_trees_all_equal_shapes(seen["gradient"], seen["teacher"].params)
    chex.assert_trees_all_close(list(seen["again"]), list(seen["level"]), rtol=1e-12)
    table = dd.table_for(seen["students"][4].model, 4)
    same = engine.integrate(seen["denoise"], table, jax.random.normal(jax.random.key(0), (16, 32, 32, 3)))
    chex.assert_trees_all_close(seen["z"], same, rtol=1e-5, atol=1e-5)


def write_images(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(16):
            encoded, rng = io.BytesIO(), np.random.default_rng(number)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(encoded, "PNG")
            archive.writestr(f"train/{number}.png", encoded.getvalue())


@pytest.mark.fast
def test_commands_name_modes_and_configs() -> None:
    commands = "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    assert set(re.findall(r"--mode=(\w+)", commands)) <= {*MODES, *WITHOUT_CONFIG}
    assert all((ROOT / name).is_file() for name in re.findall(r"--config=(configs/\w+\.py)", commands))
    assert set(re.findall(r"--model=(\w+)", commands)) <= set(weights.PUBLISHED)
