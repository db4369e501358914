"""Fixtures of EDM's networks (folder edm): outputs, wrapped outputs, units, gradients.

A network's file names its class and constructor arguments; its weights are stored (`sd.*`, `sdi.*` for the wider
last convolution of iDDPM's wrapper) or follow a rule in its meta. Arrays have PyTorch's layouts. Tolerances are the
README's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import edm_tensors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.denoisers.model import Model
from diffusion_distill.networks import SongUNet, layers
from diffusion_distill.process import predictions
from diffusion_distill.process.levels import Level
from diffusion_distill.weights import edm, edm_arguments, edm_layout, flatten
from golden_checks.common import FLOAT32, FLOAT64, Fixture, Kind, Line, Mode, Rule, absolute, exact, of_each

OUT = absolute(5e-5)
FOURIER = absolute(5e-2)
DISCRETE = absolute(2e-4)
UNIT = absolute(2e-5)
HALF = absolute(2e-3)
LOOSE = absolute(2e-2)
#: Of discrete times up to 1000. The original's ln(1 + sigma²) without log1p errs by 6e-8, its time by 6e-4 near 0.
TIME = Rule(6e-4, "·max(1, |ref|/100)", lambda ref: np.maximum(1, np.abs(ref) / 100))

# ------------------------------------------------------------------------------------------------- networks


def check_network(fixture: Fixture, mode: Mode) -> None:
    class_name, kwargs = fixture.meta["class_name"], fixture.meta["init_kwargs"]
    network = edm_arguments.network_of(class_name, kwargs)
    shape = edm_arguments.image_shape_of(class_name, kwargs)
    tensors = tensors_of(fixture, network, shape)
    check_names(fixture, network, shape, tensors)
    params = to_device(edm_layout.to_params(network, shape, tensors))

    x, time = images(fixture, "x"), fixture.input("noise_labels")
    labels, augment = (given(fixture, name) for name in ("class_labels", "augment_labels"))
    out, seen = run(network, params, x, time, labels, augment)
    for key in ("out", "out_f64"):
        fixture.compare(key, channels_first(out), mode, OUT)
    if "out_noaug" in fixture:
        out, _ = run(network, params, x, time, labels, None)
        fixture.compare("out_noaug", channels_first(out), mode, OUT)
    for key, got in embeddings(network, seen, time).items():
        fixture.compare(f"emb.{key}", got, mode, OUT)
    for key, got in activations(network, seen, shape[0]).items():
        fixture.compare(f"act.{key}", got, mode, OUT)
    for name in dict.fromkeys(match[1] for match in fixture.matches(r"precond\.(\w+)\..*")):
        with fixture.attempt(f"precond.{name}", mode):
            check_wrapped(fixture, mode, name, tensors)


def check_names(fixture: Fixture, network: nn.Module, shape: tuple[int, ...], tensors: Any) -> None:
    """Names and shapes of the file's tensors, which of them are trained, how many numbers; and the way back."""
    meta, shapes = fixture.meta, edm_tensors.tensor_shapes(network, shape)
    stored = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = set(shapes.items()) ^ set(stored.items()) | set(shapes) ^ set(meta.get("state_dict_order", shapes))
    fixture.report(f"{len(stored)} names and shapes", len(wrong), FLOAT32, exact(), f" {sorted(map(str, wrong))[:3]}")
    if "trainable" in meta:
        trained = [name for name in shapes if not is_buffer(name)]
        numbers = sum(int(np.prod(shapes[name])) for name in trained)
        same = set(trained) == set(meta["trainable"]) and numbers == meta["num_params"]
        report(fixture, "trainable, num_params", same, f"{numbers}")
    params = edm_layout.to_params(network, shape, tensors)
    back = edm_tensors.to_state_dict(network, shape, params)
    changed = [name for name, tensor in tensors.items() if not np.array_equal(tensor, back[name])]
    fixture.report("written back", len(changed), FLOAT32, exact(), f" {changed[:3] or ''}")


def check_wrapped(fixture: Fixture, mode: Mode, name: str, tensors: Mapping[str, np.ndarray]) -> None:
    """A wrapper's outputs: by the package's denoiser, or with augment labels by its parts."""
    class_name, kwargs = fixture.meta["class_name"], fixture.meta["init_kwargs"]
    given_kwargs = {k: v for k, v in kwargs.items() if k not in ("in_channels", "out_channels")}
    arguments = {"model_type": class_name, "img_channels": kwargs["in_channels"], **given_kwargs}
    model = edm.model_of(fixture.meta["precond"][name]["class_name"], arguments)
    if model.prediction == "eps_var":
        tensors = {**tensors, **wide_tensors(fixture, model)}
    params = to_device(edm_layout.to_params(model.network, model.shape, tensors))

    array = lambda part: fixture.input(f"precond.{name}.{part}")  # noqa: E731
    x, sigma = images(fixture, f"precond.{name}.x"), jnp.asarray(array("sigma"))
    labels, augment = (given(fixture, f"precond.{name}.{part}") for part in ("class_labels", "augment_labels"))
    level, discrete = Level(jnp.ones_like(sigma), sigma), model.prediction in ("eps", "eps_var")
    time, time_rule = model.time_input.time(level, model.process), TIME if discrete else of_each(1e-6)
    fixture.compare(f"precond.{name}.c_noise", time, mode, time_rule)
    rule = scaled(model, sigma, array("c_noise"), discrete)
    results = {"D": (labels, augment), "D_nolabel": (None, augment), "D_noaug": (labels, None)}
    for part, conditions in results.items():
        if f"precond.{name}.{part}" in fixture:
            got = denoised(model, params, x, level, *conditions)
            fixture.compare(f"precond.{name}.{part}", channels_first(got), mode, rule)

    # As samplers do: one level for all, no augment labels; recorded for the first two images.
    sigma = jnp.full(len(x), array("scalar.sigma"), jnp.float32)
    level = Level(jnp.ones_like(sigma), sigma)
    time = model.time_input.time(level, model.process)[:1]
    fixture.compare(f"precond.{name}.scalar.c_noise", time, mode, time_rule)
    x = jnp.asarray((np.asarray(x, np.float64) * (1 + 1e-9)).astype(np.float32))
    got = denoised(model, params, x, level, labels, None)[:2]
    rule = scaled(model, sigma[:2], np.broadcast_to(array("scalar.c_noise"), 2), discrete)
    fixture.compare(f"precond.{name}.scalar.D", channels_first(got), mode, rule)


def denoised(model: Model, params: Any, x: Any, level: Level, labels: Any, augment: Any) -> Any:
    """x_hat by the package's denoiser, or by its parts where it is told, as in training, how images were augmented.

    Not compiled: these are many calls of small networks, and `out` is compared compiled.
    """
    if augment is None:
        return model.denoiser(params)(x, level, labels)
    scale = model.time_input.scale(level)
    scaled_x = x if scale is None else scale[:, None, None, None] * x
    time = model.time_input.time(level, model.process)
    raw = model.network.apply({"params": params}, scaled_x, time, labels, False, augment)
    return predictions.to_x(model.prediction, raw, x, level, model.sigma_data)  # type: ignore[arg-type]


def scaled(model: Model, sigma: Any, c_noise: np.ndarray, discrete: bool) -> Rule:
    """The README's tolerance of a wrapper's output, in units of max(1, |c_out|) for each image.

    Discrete times reach 1000, where the phases of Fourier features are 1e5 and rounding alone moves the result.
    """
    c_out = np.maximum(1, np.zeros(1) if model.prediction == "edm" else np.asarray(sigma))
    rule = OUT if not discrete else DISCRETE
    factor = np.ones_like(c_noise)
    if discrete and getattr(model.network, "embedding", "") == "fourier":
        factor = np.where(c_noise > 1, 1, DISCRETE.bound / FOURIER.bound)
        rule = FOURIER
    scale = np.broadcast_to(c_out * factor, c_noise.shape)[:, None, None, None]
    return Rule(rule.bound, "·max(1, |c_out|)", lambda ref: scale)


def embeddings(network: nn.Module, seen: Mapping[str, Any], time: Any) -> dict[str, Any]:
    """Outputs of the mapping's layers, by the program's names; its features are [cos, sin] in both classes."""
    names = {"dense0": "map_layer0", "dense1": "map_layer1", "class_emb": "map_label", "augment_emb": "map_augment"}
    found = {name: seen[module] for module, name in names.items() if module in seen}
    if "fourier" in seen:
        features = seen["fourier"]
    elif isinstance(network, SongUNet):
        features = layers.sinusoidal_features(jnp.asarray(time), network.ch * network.noise_mult)
    else:
        features = layers.sinusoidal_features(jnp.asarray(time), network.ch, shift=0.0, cos_first=True)  # type: ignore[attr-defined]
    if isinstance(network, SongUNet):
        features = np.roll(features, features.shape[-1] // 2, axis=-1)
    return {"map_noise": features, **found}


def activations(network: nn.Module, seen: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """The first image's outputs of the network's parts, by the program's names; a block ends with its attention."""
    levels, found = len(network.ch_mult), {}  # type: ignore[attr-defined]
    for module in sorted((name for name, value in seen.items() if value.ndim == 4), key=lambda name: "attn" in name):
        found[edm_layout.module_name(module, levels, resolution)] = channels_first(seen[module])[0]
    return found


# ---------------------------------------------------------------------------------------------------- units


def check_units(fixture: Fixture, mode: Mode) -> None:
    cases = fixture.meta["cases"]
    for name in cases:
        with fixture.attempt(name, mode):
            kind = next(kind for prefix, kind in UNITS.items() if name.startswith(prefix))
            kind(fixture, mode, name, cases[name])
    for match in fixture.matches(r"(att\w*)\.w"):
        half = fixture.arrays[f"{match[1]}.q"].dtype == np.float16
        check_attention(fixture, mode, match[1], HALF if half else UNIT)


def check_conv(fixture: Fixture, mode: Mode, name: str, case: Mapping[str, Any]) -> None:
    x, size, direction = images(fixture, f"{name}.x"), case["kernel"], cast(Any, case.get("mode"))
    weight, bias, filter = (given(fixture, f"{name}.{part}") for part in ("weight", "bias", "resample_filter"))
    params = {} if weight is None else {"kernel": kernel(weight), "bias": bias}
    features = 0 if weight is None else len(weight)
    if filter is None:
        got = layers.Conv(features, size).apply({"params": params}, x)
        fixture.compare(f"{name}.y", channels_first(got), mode, UNIT)
        return
    standard = layers.filter_of(case["filter"])
    report(fixture, f"{name}.resample_filter", bool(np.abs(standard - filter[0, 0]).max() < 1e-7))
    filters = {"filter": jnp.asarray(filter[0, 0])}
    if case["fused"]:
        conv = layers.FusedConv(features, direction, tuple(case["filter"]), size)
        got = conv.apply({"params": params | filters}, x)
    else:
        got = layers.Resampling(direction, tuple(case["filter"])).apply({"params": filters}, x)
        got = got if weight is None else layers.Conv(features, size).apply({"params": params}, got)
    fixture.compare(f"{name}.y", channels_first(got), mode, UNIT)


def check_norm(fixture: Fixture, mode: Mode, name: str, case: Mapping[str, Any]) -> None:
    settings = layers.NormSettings(32, case["eps"], 4)
    params = {"scale": fixture.input(f"{name}.weight"), "bias": fixture.input(f"{name}.bias")}
    got = layers.GroupNorm(*settings).apply({"params": params}, images(fixture, f"{name}.x"))
    report(fixture, f"{name}: groups", layers.norm_groups(case["channels"], settings) == case["num_groups"])
    fixture.compare(f"{name}.y", channels_first(got), mode, UNIT)


def check_positional(fixture: Fixture, mode: Mode, name: str, case: Mapping[str, Any]) -> None:
    time, shift = jnp.asarray(fixture.input(f"{name}.t")), float(case["endpoint"])
    got = layers.sinusoidal_features(
        time, case["channels"], max_period=case["max_positions"], shift=shift, cos_first=True
    )
    fixture.compare(f"{name}.y", got, mode, UNIT)


def check_fourier(fixture: Fixture, mode: Mode, name: str, case: Any) -> None:
    time, frequencies = (jnp.asarray(fixture.input(f"{name}.{part}")) for part in ("t", "freqs"))
    got = layers.fourier_features(time, frequencies)
    fixture.compare(f"{name}.y", np.roll(got, got.shape[-1] // 2, axis=-1), mode, UNIT)


def check_attention(fixture: Fixture, mode: Mode, name: str, rule: Rule) -> None:
    """Attention of unit vectors returns the weights: q, k are (n, channels, positions), w is (n, queries, keys)."""
    q, k = (jnp.asarray(fixture.input(f"{name}.{part}")).transpose(0, 2, 1)[:, :, None] for part in "qk")
    v = jnp.broadcast_to(jnp.eye(k.shape[1], dtype=k.dtype)[None, :, None], (*k.shape[:3], k.shape[1]))
    fixture.compare(f"{name}.w", layers.attend(q, k, v)[:, :, 0], mode, rule)


def check_block(fixture: Fixture, mode: Mode, name: str, case: Mapping[str, Any]) -> None:
    """A block of either network; what the program's constructor is not told has its defaults, as in EDM.md."""
    settings, tensors = case["kwargs"], stored(fixture, f"{name}.sd.")
    norm = layers.NormSettings(32, settings.get("eps", 1e-5), 4)
    scale = settings.get("skip_scale", 1.0)
    resample: Any = next((direction for direction in ("up", "down") if settings.get(direction)), "none")
    block = layers.ResidualBlock(
        case["out_channels"],
        resample=resample,
        taps=tuple(settings.get("resample_filter", (1, 1))),
        project=settings.get("resample_proj", False),
        film=settings.get("adaptive_scale", True),
        skip_scale=scale,
        norm=norm,
    )
    params, attention = block_params(tensors, case["num_heads"])
    x, emb = images(fixture, f"{name}.x"), jnp.asarray(fixture.input(f"{name}.emb"))
    # Flax ignores parameters that a module does not use: here they must be the block's, all of them.
    wanted = jax.eval_shape(partial(block.init, train=False), jax.random.key(0), x, emb)["params"]
    differ = {(k, v.shape) for k, v in flatten(wanted).items()} ^ {(k, v.shape) for k, v in flatten(params).items()}
    report(fixture, f"{name}: parameters", not differ, f"{sorted(differ)[:4] or ''}")
    h = block.apply({"params": params}, x, emb, False)
    if attention:
        h = layers.Attention(case["num_heads"], scale, norm).apply({"params": attention}, h)
    fixture.compare(f"{name}.y", channels_first(h), mode, UNIT)


def check_half(fixture: Fixture, mode: Mode, name: str, case: Mapping[str, Any]) -> None:
    network = edm_arguments.network_of(case["class_name"], case["init_kwargs"])
    shape = edm_arguments.image_shape_of(case["class_name"], case["init_kwargs"])
    params = to_device(edm_layout.to_params(network, shape, stored(fixture, f"{name}.sd.")))
    x, time = images(fixture, f"{name}.x"), fixture.input(f"{name}.noise_labels")
    labels = given(fixture, f"{name}.class_labels")
    for dtype, rules in {"float32": {"out32": OUT}, "float16": {"out16": LOOSE}}.items():
        out, _ = run(network.clone(dtype=dtype), params, x, time, labels, None)
        for part, rule in rules.items():
            fixture.compare(f"{name}.{part}", channels_first(out), mode, rule)


UNITS: dict[str, Callable[[Fixture, Mode, str, Any], None]] = {
    "conv": check_conv,
    "gn": check_norm,
    "pos": check_positional,
    "fourier": check_fourier,
    "block": check_block,
    "fp16": check_half,
}


def block_params(tensors: Mapping[str, np.ndarray], heads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of a residual block, and of its attention, from a block's tensors."""
    vector = lambda name: {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}  # noqa: E731
    conv = lambda name: {"kernel": kernel(tensors[f"{name}.weight"]), "bias": tensors[f"{name}.bias"]}  # noqa: E731
    params: dict[str, Any] = {"norm1": vector("norm0"), "norm2": vector("norm1")}
    params |= {"conv1": conv("conv0"), "conv2": conv("conv1")}
    params["temb_proj"] = {"kernel": tensors["affine.weight"].T, "bias": tensors["affine.bias"]}
    if "skip.weight" in tensors:
        shortcut = conv("skip")
        params["nin_shortcut"] = shortcut | {"kernel": shortcut["kernel"][0, 0]}
    for ours, name in {"conv1_resample": "conv0", "shortcut_resample": "skip"}.items():
        if f"{name}.resample_filter" in tensors:
            params[ours] = {"filter": tensors[f"{name}.resample_filter"][0, 0]}
    if not heads:
        return params, {}
    weight, bias = tensors["qkv.weight"][:, :, 0, 0], tensors["qkv.bias"]
    size, attention = len(bias) // (3 * heads), {"norm": vector("norm2")}
    for j, name in enumerate("qkv"):
        rows = [[(head * size + channel) * 3 + j for channel in range(size)] for head in range(heads)]
        attention[name] = {"kernel": weight[rows].transpose(2, 0, 1), "bias": bias[rows]}
    projection = tensors["proj.weight"][:, :, 0, 0].T
    attention["proj_out"] = {"kernel": projection.reshape(heads, size, -1), "bias": tensors["proj.bias"]}
    return params, attention


# ------------------------------------------------------------------------------------------------ gradients


def check_gradients(fixture: Fixture, mode: Mode) -> None:
    class_name, kwargs = fixture.meta["class_name"], fixture.meta["init_kwargs"]
    network = edm_arguments.network_of(class_name, kwargs)
    shape = edm_arguments.image_shape_of(class_name, kwargs)
    params = to_device(edm_layout.to_params(network, shape, stored(fixture, "sd.")))
    x, time, cotangent = images(fixture, "x"), fixture.input("noise_labels"), images(fixture, "cotangent")
    labels, augment = (given(fixture, name) for name in ("class_labels", "augment_labels"))

    def loss(params: Any, x: Any) -> Any:
        out = network.apply({"params": params}, x, time, labels, False, augment)
        return jnp.sum(out * cotangent), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    fixture.compare("out", channels_first(out), mode, OUT)
    by_norm = Rule(1e-3, "·|ref|₂", lambda ref: np.linalg.norm(ref) or 1.0)
    fixture.compare("grad_x", channels_first(gradients[1]), mode, by_norm)
    named = edm_tensors.to_state_dict(network, shape, gradients[0])
    for name, gradient in named.items():
        fixture.compare(f"grad.{name}", gradient, mode, by_norm)
    recorded = fixture.meta["grad_l2_and_sum"]
    error = lambda name, l2, total: max(abs(np.linalg.norm(named[name]) - l2), abs(named[name].sum() - total)) / l2  # noqa: E731
    worst = max(error(name, *numbers) for name, numbers in recorded.items())
    fixture.report(f"norms and sums of {len(recorded)} gradients", worst, mode, absolute(1e-3, "·|ref|₂"))
    moved = [name for name in named if is_buffer(name) and np.any(named[name])]
    report(fixture, "no gradient of buffers", not moved, f"{moved or ''}")
    report(fixture, "every parameter has one", set(recorded) == {name for name in named if not is_buffer(name)})


# ----------------------------------------------------------------------------------------------------- parts


def tensors_of(fixture: Fixture, network: nn.Module, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A network's tensors: stored ones, or by the rule for the shapes that the package expects."""
    if fixture.meta.get("weights") != "rule":
        return stored(fixture, "sd.")
    shapes = edm_tensors.tensor_shapes(network, shape)
    made = {name: by_rule(fixture.meta, name, shape) for name, shape in shapes.items()}
    checks = fixture.meta.get("weight_checks", {})
    wrong = [name for name, (shape, *sums) in checks.items() if not _agrees(made.get(name), tuple(shape), sums)]
    fixture.report(f"weights by rule ({len(checks)} checked)", len(wrong), FLOAT64, exact(), f" {wrong[:3] or ''}")
    return made


def by_rule(meta: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor by the rule of the README."""
    if name.endswith(".resample_filter"):
        return layers.filter_of(meta["init_kwargs"].get("resample_filter", (1, 1)))[None, None]
    generator = np.random.RandomState((zlib.crc32(name.encode()) ^ meta["weight_rule"]["seed"]) & 0xFFFFFFFF)
    z = generator.standard_normal(int(np.prod(shape))).reshape(shape)
    if name.endswith(".freqs"):
        z = 16 * z
    elif name.endswith(".bias"):
        z = 0.2 * z
    else:
        z = 1 + 0.3 * z if len(shape) == 1 else z / np.sqrt(np.prod(shape[1:]))
    return z.astype(np.float32)


def wide_tensors(fixture: Fixture, model: Model) -> dict[str, np.ndarray]:
    """The tensors of the last convolution with twice the channels."""
    if fixture.meta.get("weights") != "rule":
        return stored(fixture, "sdi.")
    shapes = edm_tensors.tensor_shapes(model.network, model.shape)
    return {name: by_rule(fixture.meta, name, shapes[name]) for name in fixture.meta["iddpm_final_params"]}


def stored(fixture: Fixture, prefix: str) -> dict[str, np.ndarray]:
    keys = [key for key in fixture.arrays if key.startswith(prefix)]
    return {key.removeprefix(prefix): fixture.input(key).astype(np.float32) for key in keys}


def run(network: nn.Module, params: Any, x: Any, time: Any, labels: Any, augment: Any) -> tuple[Any, dict[str, Any]]:
    """(a network's output, the outputs of its parts)."""
    outer = lambda module, method: method == "__call__" and len(module.path) == 1  # noqa: E731
    apply = jax.jit(
        lambda params, *inputs: network.apply(
            {"params": params}, *inputs[:3], False, inputs[3], capture_intermediates=outer
        )
    )
    out, state = apply(params, x, jnp.asarray(time), labels, augment)
    return out, {name: parts["__call__"][0] for name, parts in state["intermediates"].items()}


def given(fixture: Fixture, key: str) -> Any:
    """An input that the file may not have."""
    return jnp.asarray(fixture.input(key)) if key in fixture else None


def images(fixture: Fixture, key: str) -> Any:
    """(batch, channels, height, width) -> [batch, height, width, channels]."""
    return jnp.asarray(fixture.input(key).transpose(0, 2, 3, 1))


def channels_first(x: Any) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def kernel(weight: Any) -> Any:
    """(out, in, height, width) -> [height, width, in, out]."""
    return jnp.asarray(weight).transpose(2, 3, 1, 0)


def to_device(params: Any) -> Any:
    return jax.tree.map(jnp.asarray, params)


def is_buffer(name: str) -> bool:
    return name.endswith((".resample_filter", ".freqs"))


def report(fixture: Fixture, what: str, passed: bool, note: str = "") -> None:
    """A line about something that is so or is not."""
    fixture.emit(Line(fixture.name, what, "PASS" if passed else "FAIL", note, 0.0 if passed else np.inf))


def _agrees(tensor: np.ndarray | None, shape: tuple[int, ...], sums: list[float]) -> bool:
    if tensor is None or tensor.shape != shape:
        return False
    values = tensor.astype(np.float64)
    return bool(np.allclose([values.sum(), (values**2).sum()], sums, rtol=1e-9, atol=1e-9))


def of_kind(start: str) -> Callable[[Fixture], bool]:
    return lambda fixture: str(fixture.meta.get("fixture", "")).startswith(start)


KINDS = [
    Kind(
        "edm network",
        lambda fixture: fixture.meta.get("fixture") == "network" and "noise_labels" in fixture,
        check_network,
        modes=(FLOAT32,),
    ),
    Kind("edm units", of_kind("units"), check_units, modes=(FLOAT32,)),
    Kind("edm gradients", of_kind("gradients"), check_gradients, modes=(FLOAT32,)),
]
