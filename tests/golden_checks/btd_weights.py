"""Fixtures of Google's published weights (folder btd): checkpoint files, parameter trees, names of released files.

Files in `checkpoints/` have the layout of the released ones. `expected.npz` beside them says what the original
loader did with each (meta "original_loader") and what the network returns with the loaded parameters. Files that
it lists and that were not stored are made up here. Where the original loads wrong values silently, the package
must refuse. Published models come from the package's registry, other trees from their hyper-parameters.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization

from diffusion_distill import weights
from diffusion_distill.denoisers.model import Model
from diffusion_distill.formats import flax_file
from diffusion_distill.networks import UNet
from diffusion_distill.process import predictions
from diffusion_distill.weights import WeightsError, matching, progressive
from diffusion_distill.weights.registry import STUDENT_STEPS
from golden_checks.btd import has, twins
from golden_checks.common import FLOAT32, FLOAT64, Fixture, Kind, Line, Mode, absolute, exact
from golden_checks.networks import outputs, unet_of

# ------------------------------------------------------------------------------------------- checkpoint files

#: The file's names of our trees: outputs out_<name>, leaves <name>/<path>.
TREES = {"ema_params": ("ema", "params")} | {tree: (tree, tree) for tree in progressive.TREES if tree != "ema_params"}


def check_checkpoint(fixture: Fixture, mode: Mode) -> None:
    expected = expected_beside(fixture)
    assert expected is not None
    hashed = expected.meta.get("sha256", {}).get(fixture.path.name)
    if hashed:
        report(fixture, "sha256", hashlib.sha256(fixture.path.read_bytes()).hexdigest() == hashed)
    check_file(expected, fixture.path, fixture.path.stem, mode)


def check_expected(fixture: Fixture, mode: Mode) -> None:
    results = fixture.meta["original_loader"]
    stored = {name: fixture.path.with_name(f"{name}.msgpack") for name in results}
    good = [path for name, path in stored.items() if path.exists() and is_good(results[name])]
    good.sort(key=has_optimizer, reverse=True)
    if good:
        compare_trees(fixture, good[0], mode)
    for name in results:
        if good and not stored[name].exists():
            content = made_up(name.removeprefix("(not stored) "), good[0], fixture.meta)
            if content is None:
                fixture.skip([name], "a file that was not stored, and of unknown content")
                continue
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "made_up.msgpack"
                path.write_bytes(content)
                check_file(fixture, path, name, mode)


def check_file(expected: Fixture, path: Path, name: str, mode: Mode) -> None:
    """A good file gives the recorded numbers, a bad one is refused."""
    result = expected.meta["original_loader"].get(name)
    if result is None:
        expected.fail(name, "the expectations do not list this file")
    elif is_good(result):
        checkpoint = compare_trees(expected, path, mode)
        # A teacher stores no steps; the original then takes those of its configuration.
        steps = checkpoint.steps or expected.meta["start_num_steps_used"]
        report(expected, f"{name}: num_sample_steps", steps == result["num_sample_steps"], f"{steps}")
        if has_optimizer(path):
            report(expected, f"{name}: step", checkpoint.step == expected.meta["step"], f"{checkpoint.step}")
    else:
        try:
            progressive.read(path, model_of_checkpoint(expected))
            report(expected, f"{name}: refused", False, "was read")
        except WeightsError as error:
            report(expected, f"{name}: refused", True, " ".join(str(error).replace(str(path), "").split())[:120])


def compare_trees(expected: Fixture, path: Path, mode: Mode) -> progressive.Checkpoint:
    """Reads a good file and compares recorded leaves and outputs; returns what is sampled with."""
    model = model_of_checkpoint(expected)
    x, logsnr = expected.input("in/x"), expected.input("in/logsnr")
    labels = expected.input("in/y") if "in/y" in expected else None
    for tree, (output, leaves) in TREES.items():
        if tree != "ema_params" and not has_optimizer(path):
            continue
        params = progressive.read(path, model, tree).params
        flat = matching.flatten(params)
        for match in expected.matches(f"{leaves}/(.*)"):
            expected.compare(match[0], flat[match[1]], mode, exact())
        key = f"out_{output}"
        if f"f64/{key}" in expected:
            out, _ = outputs(unet_of(expected.meta["config"]), params, x, logsnr, labels)
            bound = max(1e-4, 5 * expected.meta.get("f32_deviation", {}).get(key, 0.0))
            expected.compare(f"f64/{key}", out, mode, absolute(bound))
    return progressive.read(path, model)


def made_up(name: str, good: Path, meta: Mapping[str, Any]) -> bytes | None:
    """The content of a file that was not stored, from a good one; None if it is not known how."""
    if name == "truncated":
        return good.read_bytes()[: good.stat().st_size // 10]
    if name == "garbage":
        return np.random.default_rng(0).bytes(3000)
    content = flax_file.read(good)
    if name == "student_no_optimizer":
        steps = meta["student_num_sample_steps"]
        return serialization.msgpack_serialize({**content, "optimizer": None, "num_sample_steps": steps})
    params = matching.flatten(content["ema_params"])
    if name == "transposed_same_size":
        path = next(path for path, array in sorted(params.items()) if array.shape != array.shape[::-1])
        params[path] = params[path].T
    elif name == "unexpected_extra_parameter":
        params["extra/kernel"] = np.zeros((2, 2), np.float32)
    elif name == "missing_parameter":
        del params[meta["missing_key"]]
    elif name == "wrong_size":
        params[meta["wrong_size_key"]] = np.zeros(meta["wrong_size_shape"], np.float32)
    else:
        return None
    return serialization.msgpack_serialize({**content, "ema_params": matching.unflatten(params)})


def is_good(result: Mapping[str, Any]) -> bool:
    """Whether the original loaded a file, and loaded it right."""
    return bool(result["loads"] and result.get("params_equal", True))


def has_optimizer(path: Path) -> bool:
    return flax_file.read(path, lambda location: location == ("optimizer",)).get("optimizer") is not None


def model_of_checkpoint(expected: Fixture) -> Model:
    return model_of(expected.meta["config"], tuple(expected.meta["image"]))


def expected_beside(fixture: Fixture) -> Fixture | None:
    """The expectations in a checkpoint's folder, whose results are reported as the checkpoint's."""
    for path in sorted(fixture.path.parent.glob("*.npz")):
        with np.load(path) as stored:
            known = "meta" in stored.files and "original_loader" in json.loads(str(stored["meta"]))
        if known:
            return Fixture(path, fixture.name, fixture.data, fixture.emit)
    return None


# -------------------------------------------------------------------------------------------- parameter trees

#: The registry's name for a configuration of the original.
FAMILIES = {"cifar": "cifar", "imagenet64": "imagenet", "bedroom128": "bedroom", "church128": "church"}
ENDINGS = {"base": "original", "distill": str(min(STUDENT_STEPS))}


def check_manifest(fixture: Fixture, mode: Mode) -> None:
    entries = {place.rpartition("/")[2]: (place, entry) for place, entry in entries_of(fixture.meta)}
    for name in entries:
        with fixture.attempt(name, mode):
            check_entry(fixture, name, entries)


def check_entry(fixture: Fixture, name: str, entries: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
    """The counts and the tree of one entry."""
    place, entry = entries[name]
    model = model_of_entry(fixture, name, place, entry)
    shapes = shapes_of(model)
    facts = {
        "num_params": sum(int(np.prod(shape)) for shape in shapes.values()),
        "num_tensors": len(shapes),
        "digest": weights.digest(shapes),
        "data_shape": model.shape,
        "num_classes": model.num_classes,
        "out_ch": predictions.output_channels(model.prediction, model.shape[-1]),
    }
    for fact, value in facts.items():
        fixture.equal(f"{place}/{fact}".strip("/"), value)
    if "same_params_as" in entry:
        other = entries[entry["same_params_as"]]
        same = shapes == shapes_of(model_of_entry(fixture, entry["same_params_as"], *other))
        fixture.equal(f"{place}/same_params_as", entry["same_params_as"] if same else "another tree")
    if "params" in entry:
        compare_tree(fixture, f"{place}/params/".lstrip("/"), shapes)


def compare_tree(fixture: Fixture, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """One line for all names and shapes below a prefix."""
    keys = [key for key in fixture.arrays if key.startswith(prefix)]
    stored = {key.removeprefix(prefix): tuple(fixture.arrays[key].tolist()) for key in keys}
    fixture.accounted |= dict.fromkeys(keys, "compared")
    wrong = sorted(set(stored.items()) ^ set(shapes.items()))
    fixture.report(f"{prefix}* ({len(keys)} names and shapes)", len(wrong), FLOAT64, exact(), f" {wrong[:3] or ''}")


def entries_of(content: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, entry) of every parameter tree in a JSON file, and of every network that is described and counted."""
    if isinstance(content, list):
        content = {str(index): value for index, value in enumerate(content)}
    if not isinstance(content, dict):
        return
    counted = any(map(_is_count, content.items())) and branch_of_arguments(content) is not None
    if isinstance(content.get("params"), dict) or "same_params_as" in content or counted:
        yield place, content
        return
    for name, value in content.items():
        yield from entries_of(value, f"{place}/{name}" if place else name)


def _is_count(item: tuple[str, Any]) -> bool:
    """Whether a value is one of the `COUNTS` of an entry; a digest is one word."""
    name, value = item
    return type(value) is COUNTS.get(name) and " " not in str(value)


def model_of_entry(fixture: Fixture, name: str, place: str, entry: Mapping[str, Any]) -> Model:
    """The model of an entry: built from its hyper-parameters if it has any, else a published one."""
    branch = branch_of_arguments(entry)
    if branch is None:
        family, _, role = name.rpartition("_")
        return weights.PUBLISHED[f"{FAMILIES[family]}_{ENDINGS[role]}"].model
    prefix = f"{place}/" if place else ""
    for key in (key for key in fixture.arrays if key.startswith(prefix)):
        inside = key.removeprefix(prefix).split("/")
        if inside[0] == branch or (inside[0] != "params" and inside[-1] in (*ARGUMENTS, *IMAGE_SHAPES)):
            fixture.input(key)
    given = {field: found(entry, field) for field in ARGUMENTS}
    image = next(tuple(shape) for shape in (found(entry, key) for key in IMAGE_SHAPES) if shape is not None)
    if given["out_ch"] is None:
        given["out_ch"] = predictions.output_channels(found(entry, "mean_type") or "x", image[-1])
    return model_of({field: value for field, value in given.items() if value is not None}, image)


COUNTS = {"num_params": int, "num_tensors": int, "digest": str}
ARGUMENTS = (*sorted(set(UNet.__dataclass_fields__) - {"parent", "name"}), "logsnr_input_type", "logsnr_scale_range")
IMAGE_SHAPES = ("data_shape", "shape", "image")


def branch_of_arguments(entry: Mapping[str, Any]) -> str | None:
    """The key of an entry below which the network's arguments lie, "" for the entry itself, None without any."""
    if {"ch", "ch_mult"} <= set(entry):
        return ""
    inner = {key: value for key, value in entry.items() if isinstance(value, dict)}
    return next((key for key, value in inner.items() if branch_of_arguments(value) is not None), None)


def found(entry: Mapping[str, Any], field: str) -> Any:
    """The value of a field, at whatever depth of an entry it stands."""
    if entry.get(field) is not None:
        return entry[field]
    inner = (found(value, field) for key, value in entry.items() if isinstance(value, dict) and key != "params")
    return next((value for value in inner if value is not None), None)


def model_of(config: Mapping[str, Any], image: tuple[int, int, int]) -> Model:
    """A model whose prediction fits the network's output channels; a tree of parameters does not tell which it is."""
    net = unet_of(config)
    fits = [p for p in ("x", "both") if predictions.output_channels(p, image[-1]) == net.network.out_ch]
    return Model(net.network, image, prediction=(fits or ["x"])[0], time_input=net.time_input)


@cache
def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    return weights.shapes_of(model)


# --------------------------------------------------------------------------------------------- released files


def check_released(fixture: Fixture, mode: Mode) -> None:
    published = {name: entry for name, entry in weights.PUBLISHED.items() if entry.format == "progressive"}
    address = fixture.meta["bucket"].replace("gs://", "https://storage.googleapis.com/")
    there = [name for name, entry in published.items() if entry.url == address + name]
    fixture.equal("names", there)
    fixture.equal("count", len(there))
    fixture.equal("bucket", fixture.meta["bucket"] if len(there) == len(published) else "another one")
    for match in fixture.matches("teacher_used_by/(.*)"):
        family = FAMILIES[match[1].rpartition("_")[0]]
        teacher = published[f"{family}_original"]
        fixture.equal(match[0], teacher.url.replace("https://storage.googleapis.com/", "gs://"))
    wrong = [name for name in there if (name.split("_")[1].replace("original", "0")) != str(published[name].steps)]
    report(fixture, "sampling steps", not wrong, f"{wrong or ''}")


# ----------------------------------------------------------------------------------------------------- parts


def report(fixture: Fixture, what: str, passed: bool, note: str = "") -> None:
    """A line about something that is so or is not."""
    fixture.emit(Line(fixture.name, what, "PASS" if passed else "FAIL", note, 0.0 if passed else np.inf))


def not_of_weights(fixture: Fixture) -> list[tuple[list[str], str]]:
    """What stands beside parameter trees and names."""
    sizes = [match[0] for match in fixture.matches("(?:.*/)?num_(?:train|eval)")]
    words = [key for key, value in fixture.arrays.items() if value.dtype.kind == "U" and not value.ndim]
    return [(sizes, "the size of a data set, which the data tell"), (words, "words")]


def _is_manifest(fixture: Fixture) -> bool:
    entries = list(entries_of(fixture.meta)) if fixture.path.suffix == ".json" else []
    known = {"data_shape", "same_params_as", *COUNTS}
    return bool(entries) and all(known & set(entry) or branch_of_arguments(entry) is not None for _, entry in entries)


KINDS = [
    Kind(
        "btd checkpoint",
        lambda fixture: fixture.path.suffix == ".msgpack" and expected_beside(fixture) is not None,
        check_checkpoint,
        modes=(FLOAT32,),
    ),
    Kind(
        "btd checkpoint expectations",
        lambda fixture: "original_loader" in fixture.meta and has("in/x", "in/logsnr", "f64/out_ema")(fixture),
        check_expected,
        twins,
        modes=(FLOAT32,),
    ),
    Kind("btd manifests", _is_manifest, check_manifest, not_of_weights, modes=(FLOAT64,)),
    Kind(
        "btd released files",
        lambda fixture: {"bucket", "names", "count"} <= set(fixture.meta),
        check_released,
        not_of_weights,
        modes=(FLOAT64,),
    ),
]
