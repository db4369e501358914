"""Fixtures of EDM's parameter trees (folder edm): manifests of published models, of other hyper-parameters, a registry.

A manifest has the names, shapes and kinds of a whole file's tensors, and their numbers. Which network it is of stands
in the entry itself or, for a published one, in published_models.json beside; the models come from the package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import edm_tensors
import flax.linen as nn
import numpy as np

from diffusion_distill import weights
from diffusion_distill.denoisers.model import Model
from diffusion_distill.weights import edm, edm_arguments
from golden_checks.common import FLOAT64, Fixture, Kind, Mode, exact, keys_like
from golden_checks.edm_networks import is_buffer, report

Tree = dict[str, tuple[tuple[int, ...], str]]  # {tensor: (shape, kind)}


def check_manifests(fixture: Fixture, mode: Mode) -> None:
    """Trees and counts: of the network that an entry describes, or else of a published one."""
    for place, entry in entries_of(fixture.meta):
        with fixture.attempt(place, mode):
            network = described_by(entry)
            if network is not None:
                take_arguments(fixture, place, entry)
            trees = published_trees(fixture, place, entry) if network is None else [tree_of(*network)]
            for tree in trees:
                compare_tree(fixture, place, tree, entry.get("tensors"))


def compare_tree(fixture: Fixture, place: str, tree: Tree, recorded: Mapping[str, Any] | None) -> None:
    """One line for all names, shapes and kinds, and one for each count."""
    if recorded is not None:
        prefix = f"{place}/tensors/"
        fixture.accounted |= {key: "compared" for key in fixture.arrays if key.startswith(prefix)}
        wrong = sorted(map(str, set(tree.items()) ^ set(as_tree(recorded, tree).items())))
        note = f" {wrong[:3] or ''}"
        fixture.report(f"{prefix}* ({len(recorded)} names, shapes, kinds)", len(wrong), FLOAT64, exact(), note)
    for fact, number in counts(tree).items():
        fixture.equal(f"{place}/{fact}", number)


def as_tree(recorded: Mapping[str, Any], like: Tree) -> Tree:
    """Recorded shapes, with or without kinds, as a tree; a kind that is not recorded is taken for right."""
    entries = {name: value if isinstance(value[0], list) else [value, None] for name, value in recorded.items()}
    kinds = {name: kind for name, (_, kind) in like.items()}
    return {name: (tuple(shape), kind or kinds.get(name, "")) for name, (shape, kind) in entries.items()}


def published_trees(fixture: Fixture, place: str, entry: Mapping[str, Any]) -> list[Tree]:
    """Of the models that published_models.json beside a file gives to a manifest; without it, those in the registry."""
    beside = fixture.path.parent / "published_models.json"
    if beside.is_file():
        models, name = json.loads(beside.read_text(encoding="utf-8")).values(), place.rpartition("/")[2]
        trees = [tree_of(model["precond_class"], model["init_kwargs"]) for model in models if model["manifest"] == name]
    else:
        known = [model_tree(model.model) for model in weights.PUBLISHED.values() if model.format == "edm"]
        trees = [tree for tree in known if as_tree(entry["tensors"], tree) == tree]
    if not trees:
        raise ValueError("no published model has this manifest")
    return trees


def entries_of(content: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, entry) of everything in a JSON file that has a tree, or arguments and counts."""
    if isinstance(content, list):
        content = {str(index): value for index, value in enumerate(content)}
    if not isinstance(content, dict):
        return
    tree = content.get("tensors")
    counted = bool({"num_params", "num_tensors"} & set(content)) and described_by(content) is not None
    listed = isinstance(tree, dict) and all(isinstance(value, list) for value in tree.values())
    if listed or (counted and tree is None):
        yield place, content
        return
    for name, value in content.items():
        yield from entries_of(value, f"{place}/{name}" if place else name)


def take_arguments(fixture: Fixture, place: str, entry: Mapping[str, Any]) -> None:
    """Accounts for what `described_by` reads."""
    known = {name for arguments in edm_arguments.ARGUMENTS.values() for name in arguments}
    known |= {"model_type", "img_channels", *edm_arguments.WRAPPER_ARGUMENTS}
    known |= {name for name, value in entry.items() if isinstance(value, dict) and "img_resolution" in value}
    known |= {name for name, value in entry.items() if value in (*edm_arguments.WRAPPERS, *edm_arguments.ARGUMENTS)}
    for key in fixture.arrays:
        inside = key.removeprefix(f"{place}/" if place else "")
        if (key != inside or not place) and inside.split("/")[0] in known:
            fixture.input(key)


def described_by(entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(class, arguments) that an entry names, at whatever depth; None if it names none."""
    inner = [entry, *(value for value in entry.values() if isinstance(value, dict))]
    names = [value for part in inner for value in part.values() if isinstance(value, str)]
    arguments = next((part for part in inner if "img_resolution" in part), None)
    known = [name for name in names if name in edm_arguments.WRAPPERS] or [
        n for n in names if n in edm_arguments.ARGUMENTS
    ]
    if arguments is None or not known:
        return None
    if arguments is entry:  # they stand beside what is not theirs
        named = ("model_type", "img_channels", *edm_arguments.WRAPPER_ARGUMENTS, *edm_arguments.ARGUMENTS["SongUNet"])
        arguments = {name: value for name, value in entry.items() if name in named}
    return known[0], dict(arguments)


def check_published(fixture: Fixture, mode: Mode) -> None:
    registry = {entry.url: entry for entry in weights.PUBLISHED.values() if entry.format == "edm"}
    beside = fixture.path.parent / "manifests.json"
    manifests = json.loads(beside.read_text(encoding="utf-8"))["manifests"] if beside.is_file() else {}
    for name, entry in fixture.meta.items():
        for key in fixture.arrays:
            if key.startswith((f"{name}/init_kwargs/", f"{name}/precond_class")):
                fixture.input(key)
        tree = tree_of(entry["precond_class"], entry["init_kwargs"])
        for fact, number in counts(tree).items():
            fixture.equal(f"{name}/{fact}", number)
        if manifests:
            same = set(manifests[entry["manifest"]]["tensors"]) == set(tree)
            fixture.equal(f"{name}/manifest", entry["manifest"] if same else "another one")
        else:
            fixture.skip([f"{name}/manifest"], "the name of a manifest in a file that is not in this folder")
        known = registry.get(entry["url"])
        fixture.equal(f"{name}/url", known.url if known else "not in the registry")
        model = edm.model_of(entry["precond_class"], entry["init_kwargs"])
        report(fixture, f"{name}: the registry's model", known is not None and known.model == model)


def tree_of(class_name: str, kwargs: Mapping[str, Any]) -> Tree:
    """The tree of a whole file, or of a network alone, from the arguments of its class."""
    if class_name in edm_arguments.WRAPPERS:
        return model_tree(edm.model_of(class_name, kwargs))
    return network_tree(edm_arguments.network_of(class_name, kwargs), edm_arguments.image_shape_of(class_name, kwargs))


@cache
def model_tree(model: Model) -> Tree:
    """A wrapper's: its network's tensors, and iDDPM's table of levels."""
    tree = {f"model.{name}": entry for name, entry in network_tree(model.network, model.shape).items()}
    if model.prediction == "eps_var":
        tree["u"] = ((len(model.time_input.sigmas),), "buffer")  # type: ignore[attr-defined]
    return tree


def network_tree(network: nn.Module, shape: tuple[int, ...]) -> Tree:
    shapes = edm_tensors.tensor_shapes(network, shape)
    return {name: (shape, "buffer" if is_buffer(name) else "param") for name, shape in shapes.items()}


def counts(tensors: Tree) -> dict[str, int]:
    """The file's words for how many numbers there are."""
    sizes = lambda kind: sum(int(np.prod(shape)) for shape, found in tensors.values() if found == kind)  # noqa: E731
    return {"num_params": sizes("param"), "num_buffer_values": sizes("buffer"), "num_tensors": len(tensors)}


# -------------------------------------------------------------------------------------------- what there is


def words(fixture: Fixture) -> list[tuple[list[str], str]]:
    """What stands beside them in words."""
    keys = ("note", "*/provenance", "*/named_in_readme")
    return [(keys_like(fixture, *keys), "words")]


def _is_published(fixture: Fixture) -> bool:
    entries = list(fixture.meta.values())
    return bool(entries) and all(isinstance(e, dict) and {"precond_class", "url"} <= set(e) for e in entries)


def _is_manifests(fixture: Fixture) -> bool:
    entries = [entry for _, entry in entries_of(fixture.meta)] if fixture.path.suffix == ".json" else []
    return bool(entries) and ("manifests" in fixture.meta or all(map(described_by, entries)))


KINDS = [
    Kind("edm published models", _is_published, check_published, words, modes=(FLOAT64,)),
    Kind("edm manifests", _is_manifests, check_manifests, words, modes=(FLOAT64,)),
]
