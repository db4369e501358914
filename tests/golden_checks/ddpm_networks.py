"""Fixtures of noise-prediction networks (folder ddpm): tiny networks, parameter trees, and units of the layers.

A network's file names its family and constructor arguments; improved DDPM's have no image size, which is then that of
the recorded images. Arrays have PyTorch's layouts. Tolerances are the README's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.arrays import enable_x64
from diffusion_distill.denoisers.guidance import label_log_prob
from diffusion_distill.networks import layers
from diffusion_distill.weights import torch_layout
from diffusion_distill.weights.families import FAMILIES, Family
from golden_checks.common import DEFAULT_FLOAT32, FLOAT32, FLOAT64, Fixture, Kind, Mode, absolute, exact, of_scale

OUT = of_scale(1e-4, "the README's rel")
UNIT = absolute(1e-10)
#: What a part of the network is called here: (module, its last call's output).
PARTS = {"time_mlp": "dense1", "conv_in": "conv_in", "mid": "mid.block_2"}


def check_network(fixture: Fixture, mode: Mode) -> None:
    meta, family = fixture.meta, FAMILIES[fixture.meta["family"]]
    x = fixture.input("x")
    config = with_size(family, meta["config"], x.shape[-1])
    network, _ = family.network(config)
    tensors = {k.removeprefix("param/"): fixture.input(k) for k in fixture.arrays if k.startswith("param/")}
    check_tree(fixture, family, config, {name: tensor.shape for name, tensor in tensors.items()}, meta)
    params = family.to_params(config, tensors)
    back = family.to_tensors(config, params)
    used = {name: tensor for name, tensor in tensors.items() if name not in family.unused}
    changed = [name for name, tensor in used.items() if not np.array_equal(tensor, back[name])]
    fixture.report("written back", len(changed), mode, exact(), f" {changed[:3] or ''}")

    classifies = "log_prob" in fixture
    labels = jnp.asarray(fixture.input("y"), jnp.int32) if "y" in fixture else None
    given = () if classifies or labels is None else (labels,)
    x, t = jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(fixture.input("t"))
    run = jax.jit(lambda x: network.apply({"params": params}, x, t, *given, capture_intermediates=True))
    out, seen = run(x)
    for key in ("out", "out64"):
        fixture.compare(key, channels_first(out), mode, OUT)
    features = layers.sinusoidal_features(t, network.ch, shift=network.frequency_shift, cos_first=network.cos_first)
    fixture.compare("temb", features, mode, absolute(1e-4))
    for key, module in PARTS.items():
        fixture.compare(f"act/{key}", channels_first(seen["intermediates"][module]["__call__"][0]), mode, OUT)
    if classifies:
        log_prob = lambda x: label_log_prob(network.apply({"params": params}, x, t), labels)  # noqa: E731
        fixture.compare("log_prob", log_prob(x), mode, OUT)
        fixture.compare("grad_x", channels_first(jax.jit(jax.grad(lambda x: log_prob(x).sum()))(x)), mode, OUT)


def check_manifest(fixture: Fixture, mode: Mode) -> None:
    """Names and shapes of a published network's tensors."""
    meta, family = fixture.meta, FAMILIES[fixture.meta["family"]]
    fixture.accounted |= {key: "input" for key in fixture.arrays if not key.startswith("tensors/")}
    fixture.accounted |= {key: "compared" for key in fixture.arrays if key.startswith("tensors/")}
    config = with_size(family, meta["init_kwargs"], size_in(meta["name"]))
    check_tree(fixture, family, config, {name: tuple(shape) for name, shape in meta["tensors"].items()}, meta)


def check_tree(
    fixture: Fixture, family: Family, config: Mapping[str, Any], stored: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """One line for all names and shapes, and one for each count."""
    shapes = {entry.name: entry.shape for entry in family.entries(config)}
    used = {(name, tuple(shape)) for name, shape in stored.items() if name not in family.unused}
    wrong = sorted(map(str, set(shapes.items()) ^ used))
    fixture.report(f"{len(stored)} names and shapes", len(wrong), FLOAT32, exact(), f" {wrong[:3] or ''}")
    fixture.report(f"tensor_count {len(stored)}", abs(len(stored) - meta["tensor_count"]), FLOAT32, exact())
    numbers = sum(int(np.prod(shape)) for shape in stored.values())
    fixture.report(f"parameter_count {numbers}", abs(numbers - meta["parameter_count"]), FLOAT32, exact())


def check_index(fixture: Fixture, mode: Mode) -> None:
    """The list of manifests beside it: families, and counts of the networks that these describe."""
    for name, entry in fixture.meta.items():
        manifest = json.loads((fixture.path.parent / f"{name}.json").read_text())
        family = FAMILIES[entry["family"]]
        entries = family.entries(with_size(family, manifest["init_kwargs"], size_in(name)))
        fixture.equal(f"{name}/family", manifest["family"])
        fixture.equal(f"{name}/tensor_count", len(entries))
        fixture.equal(f"{name}/parameter_count", sum(int(np.prod(entry.shape)) for entry in entries))


def size_in(name: str) -> int:
    """The image size in a published network's name: improved DDPM's arguments lack it."""
    return int((re.findall(r"\d+", name) or ["64"])[-1])


def with_size(family: Family, config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The arguments, with an image size where the original has none among them."""
    needs = family is FAMILIES["improved_ddpm"] and "image_size" not in config
    return {**config, "image_size": size} if needs else dict(config)


def channels_first(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.transpose(0, 3, 1, 2) if array.ndim == 4 else array


# ------------------------------------------------------------------------------------------------- units


def check_units(fixture: Fixture, mode: Mode) -> None:
    t = jnp.asarray(fixture.input("emb/t"), jnp.float32)
    for key in [key for key in fixture.arrays if key.startswith("emb/") and key != "emb/t"]:
        check_features(fixture, mode, key, t)
    check_packing(fixture, mode)
    check_resampling(fixture, mode)
    x, weight, bias = (mode.array(fixture.input(f"groupnorm/{name}")) for name in ("x", "weight", "bias"))
    for match in fixture.matches(r"groupnorm/eps(.+)"):
        # The norm is float32 whatever it is given.
        out = layers.group_norm(
            jnp.asarray(np.transpose(x, (0, 2, 3, 1)), jnp.float32), jnp.asarray(weight, jnp.float32),
            jnp.asarray(bias, jnp.float32), num_groups=fixture.meta["groups"], epsilon=float(match[1]),
        )  # fmt: skip
        fixture.compare(match[0], channels_first(out), mode, absolute(2e-5, " absolute (float32)"))


def check_features(fixture: Fixture, mode: Mode, key: str, t: Any) -> None:
    """Sinusoidal features by their names: order of sines and cosines, and what the frequencies are divided by."""
    _, rule, width = key.split("/")
    if found := re.fullmatch(r"exact_(sin|cos)_half(_minus_1)?", rule):
        shift, half = (1.0 if found[2] else 0.0), int(width) // 2
        features = layers.sinusoidal_features(t, 2 * half if int(width) % 2 == 0 else int(width), shift=shift)
        fixture.compare(key, features[:, :half] if found[1] == "sin" else features[:, half : 2 * half], mode, ANGLE)
        return
    if found := re.fullmatch(r"diffusers_flip(\d)_shift(\d)", rule):
        cos_first, shift = found[1] == "1", float(found[2])
    else:
        cos_first, shift = rule.startswith("cos"), 1.0 if rule.endswith("minus_1") else 0.0
    features = layers.sinusoidal_features(t, int(width), shift=shift, cos_first=cos_first)
    fixture.compare(key, features, mode, ANGLE)


ANGLE = absolute(1e-4)


def check_packing(fixture: Fixture, mode: Mode) -> None:
    """Attention of packed q, k, v, unpacked as an importer unpacks a kernel's outputs."""
    heads, size = fixture.meta["qkv"]["heads"], fixture.meta["qkv"]["head_channels"]
    packed = fixture.input("qkv/in")  # [batch, 3·heads·size, length]
    for match in fixture.matches(r"qkv/(\w*_)?(head_qkv_channel|qkv_head_channel|head_channel_qkv|single_head)"):
        order = {"head_qkv_channel": "hqc", "qkv_head_channel": "qhc", "head_channel_qkv": "hcq"}.get(match[2], "qhc")
        count = 1 if match[2] == "single_head" else heads
        each = heads * size // count
        entry = torch_layout.Entry("qkv", packed.shape[1:], ("q", "k", "v"), 3 * ((-1, count, each),), order)
        with enable_x64(mode is FLOAT64):
            q, k, v = (mode.array(np.stack(part)) for part in zip(*(entry.parts(p) for p in packed), strict=True))
            out = layers.attend(q, k, v)  # [batch, length, heads, size]
        out = np.asarray(out).transpose(0, 2, 3, 1).reshape(fixture.arrays[match[0]].shape)
        fixture.compare(match[0], out, mode, DEFAULT_FLOAT32)


def check_resampling(fixture: Fixture, mode: Mode) -> None:
    kernel = np.transpose(fixture.input("resample/w"), (2, 3, 1, 0))
    with enable_x64(mode is FLOAT64):
        kernel, bias = mode.array(kernel), mode.array(fixture.input("resample/b"))
        rule = UNIT if mode is FLOAT64 else DEFAULT_FLOAT32
        for key, suffix in (("resample/x", ""), ("resample/x_odd", "_odd")):
            x = jnp.asarray(mode.array(np.transpose(fixture.input(key), (0, 2, 3, 1))))
            conv = lambda x, pads, stride=2: layers.convolution(x, kernel, stride, pads) + bias  # noqa: E731
            even = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]  # a pool leaves the last of an odd number out
            results = {
                "down_asymmetric": conv(x, (0, 1)),
                "down_symmetric": conv(x, (1, 1)),
                "avg_pool": layers.downsample(even),
                "up": layers.upsample(x),
                "up_conv": conv(layers.upsample(x), None, 1),
            }
            for name, got in results.items():
                fixture.compare(f"resample/{name}{suffix}", channels_first(got), mode, rule)


def is_network(fixture: Fixture) -> bool:
    return fixture.meta.get("family") in FAMILIES and "x" in fixture and "t" in fixture


def is_manifest(fixture: Fixture) -> bool:
    return fixture.meta.get("family") in FAMILIES and "init_kwargs" in fixture.meta and "tensors" in fixture.meta


KINDS = [
    Kind("ddpm network", is_network, check_network, modes=(FLOAT32,)),
    Kind("ddpm manifest", is_manifest, check_manifest, modes=(FLOAT32,)),
    Kind("ddpm manifests", lambda f: f.name.endswith("manifests/index.json"), check_index, modes=(FLOAT32,)),
    Kind("ddpm units", lambda f: "emb/t" in f and "qkv/in" in f, check_units),
]
