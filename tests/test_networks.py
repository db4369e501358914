"""Networks against the recorded outputs and parameter trees of the published programs, and their invariances.

Golden numbers: the U-Net of Salimans & Ho (2022) run with recorded parameters (`btd/unet`), and the same
network in the comparison with TRACT's port (`tract/unet_*`); read from the optional sibling folder
`../shared/golden`. Those of EDM's networks are compared by the golden check, `golden_checks/edm_networks`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from diffusion_distill.base.registry import from_mapping, to_mapping
from diffusion_distill.networks import ADM, NETWORKS, SongUNet, UNet, inputs, layers

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the golden numbers in ../shared/golden")

TINY: dict[str, Any] = dict(
    ch=32, emb_ch=16, out_ch=2, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), num_heads=1
)
LABELLED: dict[str, Any] = {**TINY, "num_classes": 5}
CONDITIONS: dict[str, Any] = {"num_classes": 5, "augment_dim": 9}
TINY_ADM = UNet(
    ch=16, emb_ch=16, out_ch=2, ch_mult=(1, 4), num_res_blocks=1, attn_resolutions=(8, 4), **CONDITIONS, **ADM
)
TINY_SONG: dict[str, Any] = dict(
    ch=8, emb_ch=16, out_ch=2, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), **CONDITIONS
)
NCSNPP = SongUNet(**TINY_SONG, noise_mult=2, embedding="fourier", encoder="residual", resample_filter=(1, 3, 3, 1))
SKIPS = SongUNet(**TINY_SONG, encoder="skip", decoder="skip", resample_filter=(1, 2, 3, 4))
EDM_NETWORKS = {"adm": TINY_ADM, "ncsnpp": NCSNPP, "skips": SKIPS}

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


def flatten(tree: Any) -> dict[str, Any]:
    return {path: leaf for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def with_changes(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**settings, **changes}


def parameter_shapes(settings: dict[str, Any], size: int, channels: int = 3) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a network, without computing anything."""
    net = UNet(**settings)
    arguments = (jnp.zeros((1, size, size, channels)), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32))
    tree = jax.eval_shape(net.init, jax.random.key(0), *arguments)["params"]
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def parameters(settings: dict[str, Any], size: int = 8, channels: int = 2, seed: int = 0) -> dict:
    """Random parameters, nothing zero, so that every branch reaches the output."""
    rng = np.random.default_rng(seed)
    flat = {
        path: jnp.asarray(rng.normal(path.endswith("scale"), 0.1, shape), jnp.float32)
        for path, shape in parameter_shapes(settings, size, channels).items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def images(batch: int = 3, size: int = 8, channels: int = 2) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(batch, size, size, channels)), jnp.float32)
    return x, jnp.linspace(3.0, 900.0, batch)


def evaluate(net: UNet | SongUNet, params: dict, *arguments, **options) -> Any:
    return jax.jit(lambda p, *a: net.apply({"params": p}, *a, **options), static_argnums=4)(params, *arguments)


# ------------------------------------------------------------- published networks


@pytest.mark.parametrize("config", PUBLISHED)
def test_parameter_tree_is_the_published_one(config: str) -> None:
    settings, size, count, tensors, digest = PUBLISHED[config]
    shapes = parameter_shapes(settings, size)
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
    assert parameter_shapes(settings, size) == expected


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
            jnp.asarray(record["cond"], jnp.int32),
        )
    error = np.abs(np.asarray(out) - record["out_eps1e6_f64"]).max(axis=(1, 2, 3))
    tolerance = np.full(len(error), 5e-4)
    tolerance[1] = 2e-3  # a nearly constant image: group variance is comparable to epsilon
    assert (error <= tolerance).all(), error


# ------------------------------------------------------------- layers against closed forms


@pytest.mark.parametrize("width", [8, 9])
def test_sinusoidal_features(width: int) -> None:
    time = np.array([0.0, 1.0, 700.0])
    features = layers.sinusoidal_features(jnp.asarray(time, jnp.float32), width)
    angles = time[:, None] * 10_000.0 ** (-np.arange(4) / 3)
    expected = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((3, width - 8))], axis=-1)
    chex.assert_trees_all_close(features, expected, rtol=1e-7, atol=1e-4)


def test_group_norm_with_film_is_the_formula_and_survives_a_large_mean() -> None:
    rng = np.random.default_rng(2)
    x = 300 + rng.normal(size=(2, 4, 4, 64)).astype(np.float32)
    scale, shift = rng.normal(size=(2, 2, 64))
    groups = x.astype(np.float64).reshape(2, 16, 32, 2)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    normal = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    expected = normal * scale[:, None, None] + shift[:, None, None]
    out = layers.group_norm(jnp.asarray(x), jnp.asarray(scale, jnp.float32), jnp.asarray(shift, jnp.float32))
    chex.assert_trees_all_close(out, expected, rtol=1e-7, atol=1e-3)  # float32 rounds x = 300 to 3e-5


def test_group_norm_gradient_is_that_of_the_plain_formula() -> None:
    rng = np.random.default_rng(3)
    x, cotangent = jnp.asarray(rng.normal(1.0, 1.0, (2, 2, 4, 4, 64)), jnp.float32)
    scale, shift = jnp.asarray(rng.normal(size=(2, 2, 64)), jnp.float32)

    def plain(x, scale, shift):
        groups = x.reshape(2, 16, 32, 2)
        mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (jnp.mean, jnp.var))
        normal = ((groups - mean) / jnp.sqrt(variance + 1e-6)).reshape(x.shape)
        return jnp.sum(cotangent * (normal * scale[:, None, None] + shift[:, None, None]))

    def ours(x, scale, shift):
        return jnp.sum(cotangent * layers.group_norm(x, scale, shift))

    gradients = (jax.grad(f, argnums=(0, 1, 2))(x, scale, shift) for f in (ours, plain))
    chex.assert_trees_all_close(*gradients, rtol=1e-3, atol=1e-5)


def test_upsample_then_downsample_is_the_identity() -> None:
    x, _ = images(size=4)
    chex.assert_trees_all_equal(layers.downsample(layers.upsample(x)), x)
    chex.assert_trees_all_equal(layers.upsample(x)[:, 2:4, 6:8], np.broadcast_to(x[:, 1:2, 3:4], (3, 2, 2, 2)))


def test_strided_convolution_pads_after_the_image() -> None:
    """Stride 2 at even sizes: the first window starts on the first pixel (BTD, DDPM), not before it."""
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)
    chex.assert_trees_all_equal(layers.convolution(x, kernel, stride=2)[0, :, :, 0], np.array([[0, 2], [8, 10]]))


def test_attention_heads_are_separate() -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8))
    both = layers.attend(q, k, v)
    single = [layers.attend(*(a[:, :, [head]] for a in (q, k, v))) for head in range(2)]
    chex.assert_trees_all_close(both, jnp.concatenate(single, axis=2), atol=1e-6)


FILTERS = {"box": (1, 1), "cubic": (1, 3, 3, 1), "asymmetric": (1, 2, 3, 4), "odd": (1, 2, 1), "single": (1,)}


@pytest.mark.parametrize("taps", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("padding", [None, 0])
def test_filters_are_their_definition(taps: tuple[int, ...], padding: int | None) -> None:
    """Every term of the sums one by one, with a filter that is no outer product."""
    rng = np.random.default_rng(5)
    filter = rng.normal(size=(len(taps), len(taps)))
    x: Any = rng.normal(size=(2, 4, 6, 3))
    p = (len(taps) - 1) // 2 if padding is None else padding
    down = np.zeros((2, *((n + 2 * p - len(taps)) // 2 + 1 for n in x.shape[1:3]), 3))
    up: Any = np.zeros((2, *(2 * n - 2 + len(taps) - 2 * p for n in x.shape[1:3]), 3))
    for j, k in np.ndindex(filter.shape):
        for a, b in np.ndindex(down.shape[1:3]):
            if 0 <= (y := 2 * a + j - p) < 4 and 0 <= (z := 2 * b + k - p) < 6:
                down[:, a, b] += filter[j, k] * x[:, y, z]
        for a, b in np.ndindex(4, 6):
            if 0 <= (y := 2 * a + j - p) < up.shape[1] and 0 <= (z := 2 * b + k - p) < up.shape[2]:
                up[:, y, z] += 4 * filter[j, k] * x[:, a, b]
    filter, x = jnp.asarray(filter, jnp.float32), jnp.asarray(x, jnp.float32)
    chex.assert_trees_all_close(layers.filter_down(x, filter, padding), down, rtol=1e-7, atol=1e-5)
    chex.assert_trees_all_close(layers.filter_up(x, filter, padding), up, rtol=1e-7, atol=1e-5)


def test_the_box_filter_is_the_mean_of_four_and_four_equal_pixels() -> None:
    x, box = images(size=4)[0], jnp.asarray(layers.filter_of((1, 1)))
    chex.assert_trees_all_close(layers.filter_down(x, box), layers.downsample(x), atol=1e-6)
    chex.assert_trees_all_equal(layers.filter_up(x, box), layers.upsample(x))


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_fused_convolution_differs_at_the_border_only(direction: Any) -> None:
    x = images(size=16)[0]
    taps = (1, 3, 3, 1)
    conv = layers.FusedConv(4, direction, taps)
    params = conv.init(jax.random.key(0), x)["params"]
    rest = {name: value for name, value in params.items() if name != "filter"}
    apart: Any = x
    for step in [layers.Resampling(direction, taps), layers.Conv(4)][:: 1 if direction == "up" else -1]:
        own = {"filter": params["filter"]} if isinstance(step, layers.Resampling) else rest
        apart = step.apply({"params": own}, apart)
    together: Any = conv.apply({"params": params}, x)
    difference = jnp.abs(together - apart).max(axis=(0, 3))
    assert float(difference[2:-2, 2:-2].max()) < 1e-6 < 1e-2 < float(difference.max())


def test_fourier_features() -> None:
    time, frequencies = np.array([0.0, 0.3, -1.1]), np.array([0.5, -20.0])
    angles = 2 * np.pi * time[:, None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    out = layers.fourier_features(*(jnp.asarray(a, jnp.float32) for a in (time, frequencies)))
    chex.assert_trees_all_close(out, expected, rtol=1e-7, atol=5e-5)


def test_groups_of_a_norm() -> None:
    groups = {width: layers.norm_groups(width, layers.NormSettings(32, 1e-5, 4)) for width in (4, 12, 128, 384)}
    assert groups == {4: 1, 12: 3, 128: 32, 384: 32}
    for width in (3, 130):
        with pytest.raises(ValueError, match=f"over {width} channels"):
            layers.norm_groups(width, layers.NormSettings(32, 1e-5, 4))


@pytest.mark.parametrize(
    ("rule", "role", "kernel", "bias"),
    [
        ("lecun", "layer", 1 / 40, 0.0),
        ("lecun", "last", 0.0, 0.0),
        ("uniform", "layer", 1 / 3 / 40, 1 / 3 / 40),
        ("uniform", "last", 0.0, 0.0),
        ("uniform", "augment", 0.0, 0.0),
        ("uniform", "cond", 1.0, 1.0),
        ("xavier", "layer", 2 / (40 + 60), 0.0),
        ("xavier", "qkv", 0.2 * 2 / (40 + 60), 0.0),
        ("xavier", "last", 1e-10 * 2 / (40 + 60), 0.0),
    ],
)
def test_initial_values_have_the_variance_of_their_rule(rule: str, role: Any, kernel: float, bias: float) -> None:
    """Variances from EDM's fact sheet: a uniform number within ±a has a²/3."""
    rules = layers.initial(rule, 40, 60, role)
    for name, variance in {"kernel_init": kernel, "bias_init": bias}.items():
        values = np.asarray(rules[name](jax.random.key(0), (40, 600), jnp.float32), np.float64)
        chex.assert_trees_all_close(values.var(), variance, rtol=0.05)
        chex.assert_trees_all_close(values.mean(), 0, rtol=1e-7, atol=0.03 * variance**0.5)


# ------------------------------------------------------------- EDM's networks

#: Rows of one batch: the first as it is, then with another time, other labels, no augment, no labels either.
ROWS = ("base", "time", "labels", "no augment", "nothing")
CONSTANTS = ("/filter", "/freqs")


def edm_rows() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Images, times, label vectors, augment vectors of `ROWS`."""
    rng = np.random.default_rng(6)
    x = np.repeat(rng.normal(size=(1, 8, 8, 2)), len(ROWS), axis=0)
    time, labels, augment = np.full(len(ROWS), -0.4), *(np.repeat(rng.normal(size=(1, n)), 5, axis=0) for n in (5, 9))
    time[1] += 0.3
    labels[2] += 1
    labels[4] = augment[3:] = 0
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, time, labels, augment))  # type: ignore[return-value]


def edm_parameters(net: UNet | SongUNet, seed: int = 0) -> Any:
    """Random parameters with the constants that the network starts with."""
    rng = np.random.default_rng(seed)
    x, time, labels, _ = edm_rows()
    flat = flatten(jax.eval_shape(net.init, jax.random.key(0), x, time, labels)["params"])
    made = {
        path: jnp.asarray(rng.normal(path.endswith("scale"), 0.2, leaf.shape), jnp.float32)
        for path, leaf in flat.items()
    }
    for path in made:
        if path.endswith("/filter"):
            made[path] = jnp.asarray(layers.filter_of(net.resample_filter))  # type: ignore[union-attr]
    return traverse_util.unflatten_dict(made, sep="/")


@pytest.fixture(scope="module", params=EDM_NETWORKS)
def told(request: pytest.FixtureRequest) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(network, parameters, outputs of the rows, gradients of a loss on them), compiled once for several tests."""
    net = EDM_NETWORKS[request.param]
    params, (x, time, labels, augment) = edm_parameters(net), edm_rows()

    def loss(params: Any) -> Any:
        out = net.apply({"params": params}, x, time, labels, False, augment)
        return jnp.sum(jnp.sin(out)), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    return net, params, out, flatten(gradient)


def test_an_edm_network_reads_all_it_is_told(told: Any) -> None:
    net, params, out, _ = told
    chex.assert_shape(out, (5, 8, 8, 2))
    changed = jnp.abs(out - out[:1]).max(axis=(1, 2, 3))
    assert changed[0] == 0 and (changed[1:] > 1e-4).all()
    x, time, *_ = edm_rows()
    without = evaluate(net, params, x[3:], time[3:])  # missing labels and augment are zero vectors
    chex.assert_trees_all_close(without[1], out[4], atol=2e-5)
    assert float(jnp.abs(without[0] - out[3]).max()) > 1e-4


def test_gradients_reach_all_but_constants(told: Any) -> None:
    gradient = told[3]
    silent = {path for path, g in gradient.items() if float(jnp.abs(g).max()) < 1e-6}
    constants = {path for path in gradient if path.endswith(CONSTANTS)}
    assert constants <= silent and all((gradient[path] == 0).all() for path in constants)
    assert all(path.endswith("k/bias") for path in silent - constants)  # which the softmax does not see


def test_an_edm_network_takes_the_null_label_for_none_and_computes_in_bfloat16(told: Any) -> None:
    net, params, out, _ = told
    x, time, _, augment = edm_rows()
    null = jnp.full(len(x[2:]), net.num_classes, jnp.int32)
    half = evaluate(net.clone(dtype="bfloat16"), params, x[2:], time[2:], null, True, 0 * augment[2:])
    assert half.dtype == jnp.float32
    error = jnp.abs(half - out[4:]).max(axis=(1, 2, 3)) / jnp.std(out[4])
    assert (error > 1e-5).all() and (error < 0.2).all()


def test_an_edm_network_is_a_value_and_checks_its_arguments(told: Any) -> None:
    net, params, *_ = told
    x, time, labels, augment = edm_rows()
    described = json.loads(json.dumps(to_mapping(net)))
    assert from_mapping(type(net), "network", described) == net and hash(net) == hash(net.clone())
    refused = [
        ((labels, False, augment[:, 1:]), ValueError, "augment has shape"),
        ((labels[:, 1:],), ValueError, r"labels have shape .* or \[batch, num_classes\]"),
        ((labels.astype(jnp.int16),), TypeError, "must be int32"),
    ]
    for arguments, error, message in refused:
        with pytest.raises(error, match=message):
            net.apply({"params": params}, x, time, *arguments)


def test_label_vectors() -> None:
    one_hot = inputs.label_vectors(jnp.array([2, 0, 7], jnp.int32), 3, 3)
    np.testing.assert_array_equal(one_hot, [[0, 0, 1], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(inputs.label_vectors(2.5 * one_hot, 3, 3), 2.5 * one_hot)
    np.testing.assert_array_equal(inputs.label_vectors(None, 2, 3), np.zeros((2, 3)))


@pytest.mark.parametrize("name", ["adm", "ncsnpp"])
def test_initial_values_of_an_edm_network(name: str) -> None:
    """Limits of uniform numbers, by path, as in EDM's fact sheet: section 5."""
    net, (x, time, labels, _) = EDM_NETWORKS[name], edm_rows()
    params = flatten(jax.jit(net.init)(jax.random.key(0), x, time, labels)["params"])
    for path, values in params.items():
        *_, module, leaf = path.split("/")
        if leaf not in ("kernel", "bias") or "norm" in module:
            continue
        last, qkv = module.split(".")[-1] in ("conv2", "proj_out", "conv_out"), module in "qkv"
        *fan_in, fan_out = params[path.replace("/bias", "/kernel")].shape
        places = int(np.prod(fan_in[:-1])) if len(fan_in) == 3 else 1  # of a convolution
        fan_in = fan_in[0] if qkv else int(np.prod(fan_in))
        fan_out = 3 * fan_in if qkv else places * fan_out
        if name == "adm":
            limit = 0.0 if last or module == "augment_emb" else 4.0 if module == "class_emb" else fan_in**-0.5
        else:
            gain = 0.0 if leaf == "bias" else 1e-5 if last else 0.2**0.5 if qkv else 1.0
            limit = gain * (6 / (fan_in + fan_out)) ** 0.5
        largest = float(jnp.abs(values).max())
        assert largest <= limit * 1.0001 and (values.size < 50 or largest >= 0.4 * limit), path
    assert {path for path in params if path.endswith("k/kernel")} == {
        f"{module}/k/kernel" for module in ("mid.attn_1", "down_1.attn_0", *ATTENTION_UP[name])
    }


#: ADM has attention after every block where there are 64 channels; SongUNet after the last one of a level.
ATTENTION_UP = {"adm": ("up_1.attn_0", "up_1.attn_1"), "ncsnpp": ("up_1.attn_1",)}


# ------------------------------------------------------------- the network


def test_initial_output_is_zero_and_of_the_right_shape() -> None:
    x, time = images()
    net = UNet(**TINY)
    variables = jax.jit(net.init)(jax.random.key(0), x, time)
    assert set(variables) == {"params"}
    out = evaluate(net, variables["params"], x, time)
    chex.assert_shape(out, (3, 8, 8, 2))
    chex.assert_trees_all_equal(out, jnp.zeros_like(out))


def test_every_parameter_has_a_gradient() -> None:
    x, time = images()
    net, params = UNet(**LABELLED), parameters(LABELLED)
    loss = lambda p: jnp.sum(jnp.sin(3 * evaluate(net, p, x, time, jnp.array([0, 3, 4]))))  # noqa: E731
    gradient = flatten(jax.jit(jax.grad(loss))(params))
    silent = {path for path, g in gradient.items() if float(jnp.abs(g).max()) < 1e-4}
    # The softmax does not see a bias of k, nor a norm with one channel per group the bias before it.
    assert {path.split("/")[-1] for path in silent} == {"bias"}
    assert {path for path in gradient if path.endswith("k/bias")} <= silent


def test_images_of_a_batch_do_not_see_each_other() -> None:
    x, time = images()
    net, params = UNet(**TINY), parameters(TINY)
    apply = jax.jit(lambda x, time: net.apply({"params": params}, x, time))
    one_by_one = jnp.concatenate([apply(x[i : i + 1], time[i : i + 1]) for i in range(3)])
    chex.assert_trees_all_close(apply(x, time), one_by_one, atol=2e-5)


def test_time_and_labels_matter_and_unconditional_networks_ignore_labels() -> None:
    x, time = images()
    params = parameters(LABELLED)
    apply = lambda time, labels: evaluate(UNet(**LABELLED), params, x, time, jnp.array(labels))  # noqa: E731
    out = apply(time, [0, 1, 2])
    assert float(jnp.abs(out - apply(time + 50, [0, 1, 2])).max()) > 1e-3
    changed = jnp.abs(out - apply(time, [0, 1, 3])).max(axis=(1, 2, 3))
    assert (changed[:2] == 0).all() and changed[2] > 1e-3

    net, params = UNet(**TINY), parameters(TINY)
    chex.assert_trees_all_equal(evaluate(net, params, x, time), evaluate(net, params, x, time, jnp.array([0, 1, 2])))


def test_dropout_acts_only_in_training_and_follows_its_key() -> None:
    x, time = images()
    params = parameters(TINY)
    net = UNet(**TINY, dropout=0.5)
    apply = jax.jit(lambda key: net.apply({"params": params}, x, time, train=True, rngs={"dropout": key}))
    first, second = jax.random.split(jax.random.key(0))
    evaluated = evaluate(net, params, x, time)
    chex.assert_trees_all_equal(evaluated, evaluate(UNet(**TINY), params, x, time))
    chex.assert_trees_all_equal(apply(first), apply(first))
    assert float(jnp.abs(apply(first) - apply(second)).max()) > 1e-3
    assert float(jnp.abs(apply(first) - evaluated).max()) > 1e-3


def test_bfloat16_computes_coarsely_with_float32_parameters_and_output() -> None:
    x, time = images()
    half = with_changes(TINY, dtype="bfloat16")
    net, params = UNet(**half), parameters(half)
    initial = jax.eval_shape(net.init, jax.random.key(0), x, time)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(initial))
    coarse, fine = (evaluate(n, params, x, time) for n in (net, UNet(**TINY)))
    chex.assert_type(coarse, jnp.float32)
    error = float(jnp.sqrt(jnp.mean((coarse - fine) ** 2)) / jnp.std(fine))
    assert 1e-5 < error < 0.05


def test_rectangular_images_and_more_levels() -> None:
    settings = with_changes(TINY, ch_mult=[1, 1, 1], attn_resolutions=[2], num_heads=None, head_dim=16)
    shapes = parameter_shapes(settings, 8)
    assert shapes["down_2.attn_0/q/kernel"] == (32, 2, 16)
    assert "down_1.attn_0/q/kernel" not in shapes
    x = jnp.zeros((2, 8, 16, 2))
    out = evaluate(UNet(**settings), parameters(settings), x, jnp.zeros(2))
    chex.assert_shape(out, (2, 8, 16, 2))


def test_a_network_is_a_value() -> None:
    assert UNet(**with_changes(TINY, ch_mult=[1, 2])) == UNet(**TINY) and hash(UNet(**TINY)) == hash(UNet(**TINY))
    assert {"unet": UNet, "song_unet": SongUNet} == NETWORKS


# ------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ch=48), "multiples of 32"),
        (dict(ch_mult=()), "ch_mult is empty"),
        (dict(num_heads=None), "exactly one"),
        (dict(head_dim=32), "exactly one"),
        (dict(num_heads=3), "num_heads=3 must divide the 64"),
        (dict(num_heads=None, head_dim=48), "head_dim=48 must divide the 64"),
        (dict(num_res_blocks=0), "num_res_blocks must be"),
        (dict(num_classes=0), "num_classes must be"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(dtype="float23"), "Did you mean 'float32'"),
    ],
)
def test_contradicting_settings_are_refused_at_construction(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**with_changes(TINY, **change))


@pytest.mark.parametrize(
    ("x", "time", "labels", "error", "message"),
    [
        ((2, 7, 8, 2), (2,), np.zeros(2, np.int32), ValueError, "multiples of 2"),
        ((8, 8, 2), (8,), np.zeros(8, np.int32), ValueError, r"must be \[batch, height, width, channels\]"),
        ((2, 8, 8, 2), (), np.zeros(2, np.int32), ValueError, "one number per image"),
        ((2, 8, 8, 2), (2,), None, ValueError, "labels are missing"),
        ((2, 8, 8, 2), (2,), np.zeros(2, np.float32), TypeError, "must be int32"),
        ((2, 8, 8, 2), (2,), np.zeros((2, 5), np.int32), ValueError, "labels have shape"),
    ],
)
def test_unfit_arguments_are_refused_before_computing(x, time, labels, error, message: str) -> None:
    labels = labels if labels is None else jnp.asarray(labels)
    with pytest.raises(error, match=message):
        jax.eval_shape(UNet(**LABELLED).init, jax.random.key(0), jnp.zeros(x), jnp.zeros(time), labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(embedding="positonal"), "Did you mean 'positional'"),
        (dict(encoder="residul"), "Did you mean 'residual'"),
        (dict(decoder="residual"), "Unknown decoder"),
        (dict(resample_filter=(1, 2, 1)), "even number of taps"),
        (dict(resample_filter=(1, -1)), "sum is not zero"),
        (dict(ch=3), "over 3 channels"),
        (dict(label_dropout=1.0), "label_dropout is 1.0"),
        (dict(augment_dim=-1), "augment_dim is -1"),
        (dict(noise_mult=0), "noise_mult must be"),
    ],
)
def test_contradicting_settings_of_a_song_unet_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SongUNet(**with_changes(TINY_SONG, **change))


def test_heads_that_do_not_divide_are_refused_and_a_network_without_augment_takes_none() -> None:
    with pytest.raises(ValueError, match="head_dim=64 must divide"):
        UNet(**with_changes(TINY, ch=96, ch_mult=(1,), num_heads=None, head_dim=64))
    with pytest.raises(ValueError, match="head_dim=64 must divide the 200"):  # by three heads
        UNet(**with_changes(TINY, ch=200, ch_mult=(1,), num_heads=None, norm_groups=8, **(ADM | {"norm_fewest": 0})))
    x, time, _, augment = edm_rows()
    with pytest.raises(ValueError, match="augment_dim=0"):
        jax.eval_shape(UNet(**TINY).init, jax.random.key(0), x, time, None, False, augment)
