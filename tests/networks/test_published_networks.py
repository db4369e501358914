"""Networks against the recorded outputs and parameter trees of the published programs.

Golden numbers: the U-Net of Salimans & Ho (2022) run with recorded parameters (`btd/unet`), and the same network in the
comparison with TRACT's port (`tract/unet_*`); read from the optional sibling folder `../shared/golden`. Those of EDM's
networks are compared by the golden check, `golden_checks/edm_networks`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from places import GOLDEN
from small_networks import evaluate, flatten, parameter_shapes

from diffusion_distill.networks import UNet

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the golden numbers in ../shared/golden")

CIFAR: dict[str, Any] = dict(
    ch=256, emb_ch=1024, out_ch=3, ch_mult=(1, 1, 1), num_res_blocks=3, attn_resolutions=(8, 16), num_heads=1,
    dropout=0.2, resblock_resample=True,
)  # fmt: skip
IMAGENET64: dict[str, Any] = dict(
    ch=192, emb_ch=768, out_ch=6, ch_mult=(1, 2, 3, 4), num_res_blocks=3, attn_resolutions=(8, 16, 32),
    head_dim=64, dropout=0.1, resblock_resample=True, num_classes=1000,
)  # fmt: skip
LSUN128: dict[str, Any] = dict(
    ch=64, emb_ch=768, out_ch=6, ch_mult=(1, 2, 4, 6, 8), num_res_blocks=3, attn_resolutions=(8, 16, 32),
    head_dim=64, dropout=0.1, resblock_resample=True,
)  # fmt: skip
# config of the program: (network, image size, parameters, tensors, sha256 of the sorted lines "path AxBxC")
PUBLISHED = {
    "cifar_base": (
        CIFAR,
        32,
        60_004_099,
        454,
        "5dc8f60027ccec998fa15beb66feb4e9b63428181e9845c4c947c9ce2888028c",
    ),
    "imagenet64_base": (
        IMAGENET64,
        64,
        295_905_222,
        630,
        "80389718961974f2d1acbc46055113ff993160fa9e0e524b7f3f334368e10914",
    ),
    "bedroom128_base": (
        LSUN128,
        128,
        139_578_502,
        728,
        "88e95c260299abda09cdd833af62c7c0fe1a38981b47a40e7f2cc0a9905f5cac",
    ),
}


@pytest.mark.parametrize("config", PUBLISHED)
def test_parameter_tree_is_the_published_one(config: str) -> None:
    settings, size, count, tensors, digest = PUBLISHED[config]
    shapes = parameter_shapes(UNet(**settings), size)
    assert len(shapes) == tensors
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
    lines = [f"{path} {'x'.join(map(str, shapes[path]))}" for path in sorted(shapes)]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


@needs_golden
@pytest.mark.parametrize("config", PUBLISHED)
def test_parameter_tree_equals_the_manifest(config: str) -> None:
    manifest = json.loads((GOLDEN / "btd" / "manifests.json").read_text())[config]
    expected = {path: tuple(shape) for path, shape in manifest["params"].items()}
    settings, size, *_ = PUBLISHED[config]
    assert parameter_shapes(UNet(**settings), size) == expected


def golden_network(meta: dict, flat: dict[str, np.ndarray]) -> tuple[UNet, dict]:
    settings = {name: value for name, value in meta["config"].items() if name != "logsnr_input_type"}
    params = {path: jnp.asarray(value, jnp.float32) for path, value in flat.items()}
    return UNet(**settings), traverse_util.unflatten_dict(params, sep="/")


@needs_golden
@pytest.mark.parametrize(("name", "tolerance"), [("a", 5e-4), ("b", 2e-3), ("c", 5e-4)])
def test_output_is_that_of_the_published_program(name: str, tolerance: float) -> None:
    record = np.load(GOLDEN / "btd" / "unet" / f"{name}.npz")
    meta = json.loads(str(record["meta"]))
    flat = {key.removeprefix("params/"): record[key] for key in record if key.startswith("params/")}
    net, params = golden_network(meta, flat)
    labels = jnp.asarray(record["in/y"]) if "in/y" in record else None
    with jax.default_matmul_precision("highest"):
        out, state = evaluate(
            net,
            params,
            jnp.asarray(record["in/x"]),
            1000 * jnp.asarray(record["f32/logsnr_input"]),
            labels,
            capture_intermediates=True,
        )
    # Module by module first: the earliest that differs is the one to look at.
    seen = flatten(state["intermediates"])
    for path, (mean, rms) in meta["intermediates"].items():
        if path in seen and not path.endswith("norm2/__call__"):  # norm2 here includes the FiLM
            value = np.asarray(seen[path][0], np.float64)
            chex.assert_trees_all_close(
                np.array([value.mean(), np.sqrt((value**2).mean())]), np.array([mean, rms]), rtol=1e-7, atol=tolerance
            )
    chex.assert_trees_all_close(out, record["f64/out"], atol=tolerance, rtol=0)


@needs_golden
@pytest.mark.parametrize("name", ["cifar_like", "imagenet_like"])
def test_output_is_that_of_the_tract_comparison(name: str) -> None:
    record = np.load(GOLDEN / "tract" / f"unet_{name}.npz")
    meta = json.loads(str(record["meta"]))
    flat = {key.removeprefix("param:"): record[key] for key in record if key.startswith("param:")}
    net, params = golden_network(meta, flat)
    logsnr = np.clip(record["logsnr"].astype(np.float64), -20, 20)
    time = 1000 * np.arctan(np.exp(-logsnr / 2)) / (np.pi / 2)
    with jax.default_matmul_precision("highest"):
        out = evaluate(
            net,
            params,
            jnp.asarray(record["x"]),
            jnp.asarray(time, jnp.float32),
            jnp.asarray(record["label"], jnp.int32),
        )
    error = np.abs(np.asarray(out) - record["out_eps1e6_f64"]).max(axis=(1, 2, 3))
    tolerance = np.full(len(error), 5e-4)
    tolerance[1] = 2e-3  # a nearly constant image: group variance is comparable to epsilon
    assert (error <= tolerance).all(), error
