"""Published models have the published parameter trees, and the golden check sees a tree or a file that differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import edm_tensors
import golden_check
import numpy as np
import pytest
from weight_files import BTD, FULL_EDM, needs_full, write

from diffusion_distill.denoisers.model import Model
from diffusion_distill.formats import flax_file
from diffusion_distill.weights import (
    PUBLISHED,
    WeightsError,
    digest,
    edm,
    matching,
    shapes_of,
)


@pytest.mark.fast
def test_flatten_and_back() -> None:
    tree = {"down_0.block_1": {"conv1": {"kernel": 1, "bias": 2}}, "scale": 3}
    flat = {"down_0.block_1/conv1/kernel": 1, "down_0.block_1/conv1/bias": 2, "scale": 3}
    assert matching.flatten(tree) == flat
    assert matching.unflatten(flat) == tree


@pytest.mark.fast
@pytest.mark.parametrize("tree", [{"a/b": 1}, {"": 1}, {"a": {"b/c": 1}}, {1: 2}])
def test_names_that_cannot_be_joined(tree: Any) -> None:
    with pytest.raises(WeightsError, match="is called"):
        matching.flatten(tree)


@pytest.mark.fast
@pytest.mark.parametrize("flat", [{"a": 1, "a/b": 2}, {"a/b": 1, "a": 2}, {"a//b": 1}, {"": 1}, {"a": 1, "a/b/c": 2}])
def test_paths_that_exclude_each_other(flat: Any) -> None:
    with pytest.raises(WeightsError, match="does not go with"):
        matching.unflatten(flat)


def test_published_models_have_the_published_trees() -> None:
    manifests = json.loads((BTD / "manifests.json").read_text())
    keys = {"cifar": "cifar", "imagenet": "imagenet64", "bedroom": "bedroom128", "church": "church128"}
    for family, key in keys.items():
        manifest = manifests[f"{key}_base"]
        model = PUBLISHED[f"{family}_original"].model
        shapes = shapes_of(model)
        assert digest(shapes) == manifest["digest"]
        assert sum(np.prod(shape) for shape in shapes.values()) == manifest["num_params"]
        assert (list(model.shape), model.num_classes) == (manifest["data_shape"], manifest["num_classes"])
        listed = manifests[manifest.get("same_params_as", f"{key}_base")]["params"]
        assert shapes == {path: tuple(shape) for path, shape in listed.items()}
        students = [entry for entry in PUBLISHED.values() if entry.name.startswith(f"{family}_")]
        assert [entry.model for entry in students] == [model] * 8
        assert [entry.steps for entry in students] == [0, 64, 32, 16, 8, 4, 2, 1]


@pytest.mark.fast
def test_published_names_are_the_released_ones_and_describe_themselves() -> None:
    released = json.loads((BTD / "released_checkpoints.json").read_text())
    published = {name: entry for name, entry in PUBLISHED.items() if entry.format == "progressive"}
    assert list(published) == released["names"]
    for name, entry in published.items():
        assert entry.name == name
        assert entry.url == f"https://storage.googleapis.com/{released['bucket'].removeprefix('gs://')}{name}"
        assert Model.from_dict(json.loads(json.dumps(entry.model.to_dict()))) == entry.model


# ---------------------------------------------------------------- EDM: published models


@pytest.mark.slow
@needs_full
def test_published_models_of_edm_have_the_published_trees() -> None:
    published = json.loads((FULL_EDM / "published_models.json").read_text())
    manifests = json.loads((FULL_EDM / "manifests.json").read_text())["manifests"]
    assert {f"{name}.pkl" for name, entry in PUBLISHED.items() if entry.format == "edm"} == published.keys()
    for name, facts in published.items():
        entry = PUBLISHED[name.removesuffix(".pkl")]
        assert entry.url == facts["url"]
        assert edm.model_of(facts["precond_class"], facts["init_kwargs"]) == entry.model
        shapes = edm_tensors.tensor_shapes(entry.model.network, entry.model.shape)
        manifest = {n.removeprefix("model."): tuple(s) for n, (s, _) in manifests[facts["manifest"]]["tensors"].items()}
        manifest.pop("u", None)
        assert shapes == manifest


@pytest.mark.fast
def test_published_models_of_edm_describe_themselves() -> None:
    entries = [entry for entry in PUBLISHED.values() if entry.format == "edm"]
    assert len(entries) == 12
    for entry in entries:
        assert entry.url.startswith("https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/")
        assert entry.url.endswith(f"/{entry.name}.pkl")
        assert "CC BY-NC-SA 4.0" in entry.source
        assert Model.from_dict(json.loads(json.dumps(entry.model.to_dict()))) == entry.model


# ---------------------------------------------------------------- the golden check of weights


def variants(layout: str) -> Any:
    """Published trees beside their hyper-parameters, in some layouts that a file of them may have."""
    manifests = json.loads((BTD / "manifests.json").read_text())
    tree = manifests["cifar_base"]
    arguments = {"ch": 256, "emb_ch": 1024, "ch_mult": [1, 1, 1], "num_res_blocks": 3, "attn_resolutions": [8, 16]}
    arguments |= {"num_heads": 1, "head_dim": None, "dropout": 0.2, "resblock_resample": True}
    arguments |= {"logsnr_input_type": "linear", "logsnr_scale_range": [-10.0, 10.0]}
    return {
        "flat": {"one": tree | arguments},
        "nested": {"one": tree | {"args": arguments}},
        "list": {
            "note": "words",
            "variants": [tree | {"name": "one", "config": {"mean_type": "x", "args": arguments}}],
        },
        "another width": {"one": tree | {"args": arguments | {"ch": 128}}},
    }[layout]


@pytest.mark.parametrize("layout", ["flat", "nested", "list", "another width"])
def test_golden_check_of_trees_with_hyper_parameters(tmp_path: Path, layout: str) -> None:
    (tmp_path / "manifest_variants.json").write_text(json.dumps(variants(layout)))
    tally = golden_check.check(tmp_path)
    assert tally.count("NOT HANDLED") == 0
    assert tally.count("PASS") >= 3
    assert bool(tally.count("FAIL")) == (layout == "another width")


def test_golden_check_of_checkpoints_can_fail(tmp_path: Path) -> None:
    good, bad = BTD / "checkpoints" / "old_layout.msgpack", tmp_path / "garbage.msgpack"
    (tmp_path / "expected.npz").write_bytes((BTD / "checkpoints" / "expected.npz").read_bytes())
    write(bad, good.read_bytes())  # listed as one that must be refused
    content = flax_file.read(good)
    params = matching.flatten(content["ema_params"])
    params["conv_out/bias"] = params["conv_out/bias"] + 1
    write(tmp_path / "old_layout.msgpack", {**content, "ema_params": matching.unflatten(params)})
    failed = {
        (line.file, line.array)
        for line in golden_check.check(tmp_path, only=["*.msgpack"]).lines
        if line.verdict == "FAIL"
    }
    assert ("garbage.msgpack", "garbage: refused") in failed
    assert ("old_layout.msgpack", "f64/out_ema") in failed
    assert ("old_layout.msgpack", "params/conv_out/bias") in failed
