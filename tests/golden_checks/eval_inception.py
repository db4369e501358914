"""Fixtures of FID's InceptionV3 (folder eval): outputs of random weights, the weights' manifest, their other names.

The weights are made by the rule of the README from the tag that the folder's manifest states, written to files in the
layouts and formats of the published ones, and read back; variant A is pytorch-fid's, B that of the original graph.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch_files

from diffusion_distill.base.typing import Params
from diffusion_distill.evaluation.features import InceptionFeatures, network_input
from diffusion_distill.evaluation.inception_network import EPSILON, InceptionV3, Outputs, max_pool
from diffusion_distill.weights import inception
from diffusion_distill.weights.matching import flatten
from golden_checks.common import FLOAT32, FLOAT64, Fixture, Kind, Mode, absolute, exact
from golden_checks.inception_weights import TAG, Arrays, random_weights, without_gamma

# The README's tolerances in float32: 5e-5, logits 2e-4. Probabilities and resized values are of size 1.
FEATURES, LOGITS = absolute(5e-5), absolute(2e-4)
#: Which images the README calls so.
RECORDED_IMAGES = {"first": 0, "noise": 5}


@cache
def weights(tag: str = TAG) -> Arrays:
    """pytorch-fid's state dict of variant A; the shapes are the network's, which the manifest's check compares."""
    shapes = {path.replace("/", "."): _torch_shape(shape) for path, shape in inception.shapes().items()}
    return random_weights(shapes, tag)


def tag_of(folder: Path) -> str:
    """The tag of the weights of a folder's fixtures: a manifest there states it, or else the README."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "weights_tag" in content:
            return str(content["weights_tag"])
    return TAG


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] if len(shape) == 1 else (*shape[:-3:-1], *shape[:-2])


def nvidia_layout(arrays: Arrays) -> Arrays:
    """The same in the right column of the name map; the gammas are lost."""
    names = {name: inception.nvidia_name(_path(name)) for name in arrays}
    return {other: arrays[name] for name, other in names.items() if other}


@jax.jit
def run_network(params: Params, x: jax.Array) -> tuple[Outputs, Any]:
    """Outputs, and the maps of all layers."""
    outputs, state = InceptionV3().apply({"params": params}, x, capture_intermediates=True, mutable=["intermediates"])
    return outputs, state["intermediates"]  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ the network


def check_outputs(fixture: Fixture, mode: Mode) -> None:
    """Both variants through the files that they are published in."""
    made = weights(tag_of(fixture.path.parent))
    with tempfile.TemporaryDirectory() as folder:
        a_file = torch_files.write_zip(Path(folder) / "a.pth", torch_files.state_dict(made))
        b_file = torch_files.write_zip(Path(folder) / "b.pt", torch_files.state_dict(nvidia_layout(made)))
        a, b = inception.read(a_file), inception.read(b_file)
    for match in fixture.matches("images_(.*)"):
        images = fixture.input(match[0])
        check_variant_a(fixture, mode, match[1], images, jax.tree.map(jnp.asarray, a.params), a.rule)
        check_variant_b(fixture, mode, match[1], images, jax.tree.map(jnp.asarray, b.params), b.rule)


def check_variant_a(fixture: Fixture, mode: Mode, size: str, images: np.ndarray, params: Params, rule: str) -> None:
    x = network_input(images, rule)
    check_input(fixture, mode, f"a_resize_{{}}_{{}}_{size}", x)
    outputs, layers = run_network(params, x)
    fixture.compare(f"a_pool3_{size}", outputs.pool3, mode, FEATURES)
    fixture.compare(f"a_logits_{size}", outputs.logits, mode, LOGITS)
    names = [str(name) for name in fixture.input("a_child_names")]
    maps = {name: np.asarray(layers[name]["__call__"][0]) for name in names}
    first, second = (max_pool(jnp.asarray(maps[name])) for name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"))
    for i, block in enumerate((first, second, maps["Mixed_6e"])):
        fixture.compare(f"a_b{i}_mean_{size}", getattr(outputs, f"block{i}"), mode, FEATURES)
        found = every(fixture, f"a_b{i}_sub_{size}", np.moveaxis(np.asarray(block[0]), -1, 0))
        fixture.compare(f"a_b{i}_sub_{size}", found, mode, FEATURES)
    of_all = [maps[name].astype(np.float64) for name in names]
    fixture.compare(f"a_child_mean_{size}", np.stack([m.mean((1, 2, 3)) for m in of_all], 1), mode, FEATURES)
    fixture.compare(f"a_child_std_{size}", np.stack([m.std((1, 2, 3)) for m in of_all], 1), mode, FEATURES)


def check_variant_b(fixture: Fixture, mode: Mode, size: str, images: np.ndarray, params: Params, rule: str) -> None:
    x = network_input(images, rule)
    check_input(fixture, mode, f"b_resize_{{}}_{{}}_{size}", x)
    outputs, _ = run_network(params, x)
    found = InceptionFeatures(outputs.pool3, outputs.spatial, outputs.logits_unbiased)
    fixture.compare(f"b_pool3_{size}", found.pool3, mode, FEATURES)
    fixture.compare(f"b_spatial_{size}", found.spatial, mode, FEATURES)
    fixture.compare(f"b_logits_nobias_{size}", found.logits, mode, LOGITS)
    shares = np.asarray(jax.nn.softmax(outputs.logits)).T  # of classes, as every second, third, … is recorded
    key = f"b_probs_bias_{size}"
    fixture.compare(key, every(fixture, key, shares, axis=1).T, mode, FEATURES)


def every(fixture: Fixture, key: str, planes: np.ndarray, axis: int = 0) -> np.ndarray:
    """The planes that an array has along an axis of its own: the first of equal shares of all."""
    kept = fixture.arrays[key].shape[axis] if key in fixture else len(planes)
    return planes[:: -(-len(planes) // kept)]


def check_input(fixture: Fixture, mode: Mode, key: str, x: jax.Array) -> None:
    """Corners of some images, as large as recorded."""
    planes = np.moveaxis(np.asarray(x), -1, 1)
    for name, image in RECORDED_IMAGES.items():
        for corner in ("tl", "br"):
            if (what := key.format(name, corner)) in fixture:
                height, width = fixture.arrays[what].shape[-2:]
                rows = slice(height) if corner == "tl" else slice(-height, None)
                columns = slice(width) if corner == "tl" else slice(-width, None)
                fixture.compare(what, planes[image, :, rows, columns], mode, FEATURES)


# ------------------------------------------------------------------------------------------------ the weights


def check_manifest(fixture: Fixture, mode: Mode) -> None:
    """Names and shapes of the network's tensors, and the rule of the weights."""
    made, facts = weights(str(fixture.input("weights_tag"))), fixture.meta["tensors"]
    fixture.compare("bn_eps", np.asarray(EPSILON), mode, exact())
    fixture.compare("n_tensors", np.asarray(len(made)), mode, exact())
    arrays = [made.get(tensor["name"], np.zeros((1, 1), np.float32)) for tensor in facts]
    pairs = list(zip(arrays, facts, strict=True))
    all_of(fixture, "name", sorted(made) == sorted(tensor["name"] for tensor in facts), "tensors/*/")
    all_of(fixture, "shape", all(list(array.shape) == tensor["shape"] for array, tensor in pairs), "tensors/*/")
    same = all(_sha256(array) == tensor["sha256"] for array, tensor in pairs if not _is_exp(tensor))
    all_of(fixture, "sha256", same, "tensors/*/")
    # Also of what is an exponential, which may differ in the last bit.
    first = [np.max(np.abs(array.reshape(-1)[:2] / tensor["first"] - 1)) for array, tensor in pairs]
    all_of(fixture, "first", max(first) <= BIT, "tensors/*/")
    sums = [abs(_sum(array) - tensor["sum"]) / _sum(np.abs(array)) for array, tensor in pairs]
    all_of(fixture, "sum", max(sums) <= BIT, "tensors/*/")


BIT = 2**-23  # the last of a float32


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:32]


def _sum(array: np.ndarray) -> float:
    return float(array.sum(dtype=np.float64))


def _is_exp(tensor: dict[str, Any]) -> bool:
    return tensor["name"].endswith("running_var")


def check_name_map(fixture: Fixture, mode: Mode) -> None:
    """The other layout's names and shapes; the other formats hold the same parameters."""
    mapped = {name: inception.nvidia_name(_path(name)) for name in weights()}
    fixture.compare("bn_eps", np.asarray(EPSILON), mode, exact())
    all_of(fixture, "map", mapped == fixture.meta["map"])
    shapes = {name: list(array.shape) for name, array in nvidia_layout(weights()).items()}
    all_of(fixture, "shapes_openai_layout", shapes == fixture.meta["shapes_openai_layout"])
    with tempfile.TemporaryDirectory() as folder:
        legacy = torch_files.write_legacy(Path(folder) / "a.pth", torch_files.state_dict(weights()))
        _same(fixture, mode, "legacy format", inception.read(legacy).params, weights())
        script = torch_files.write_script(Path(folder) / "b.pt", nvidia_layout(weights()))
        _same(fixture, mode, "TorchScript", inception.read(script).params, without_gamma(weights()))


def _same(fixture: Fixture, mode: Mode, what: str, params: Params, arrays: Arrays) -> None:
    found = {path.replace("/", "."): array for path, array in flatten(params).items()}
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    same = found.keys() == arrays.keys() and all(
        np.array_equal(array.transpose(order[array.ndim]), arrays[name]) for name, array in found.items()
    )
    fixture.report(what, float(not same), mode, exact())


def _path(name: str) -> str:
    return name.replace(".", "/")


def all_of(fixture: Fixture, what: str, same: bool, where: str = "") -> None:
    """One line for all values below a name, or so called in a list."""
    ends = [key for key in fixture.arrays if where and fnmatch.fnmatchcase(key, f"{where}{what}*")]
    keys = ends or [key for key in fixture.arrays if key.startswith(f"{what}/")]
    fixture.accounted |= dict.fromkeys(keys, "compared")
    fixture.report(f"{where}{what} ({len(keys)} values)", float(not same), FLOAT64, exact())


KINDS = [
    Kind("inception outputs", lambda fixture: "a_child_names" in fixture, check_outputs, modes=(FLOAT32,)),
    Kind(
        "inception manifest",
        lambda fixture: "weights_tag" in fixture.meta and "tensors" in fixture.meta,
        check_manifest,
        lambda fixture: [(["recipe"], "words")],
        modes=(FLOAT64,),
    ),
    Kind(
        "inception names",
        lambda fixture: "shapes_openai_layout" in fixture.meta,
        check_name_map,
        lambda fixture: [(["note"], "words")],
        modes=(FLOAT64,),
    ),
]
