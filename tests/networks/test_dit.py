"""The diffusion transformer: the numbers of its paper, the identity at first, and the same network in NumPy."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import places
import pytest
from flax import traverse_util
from scipy.special import expit, softmax
from small_networks import flatten

from diffusion_distill.networks import DiT, dit

SMALL = DiT(width=16, depth=2, num_heads=2, out_ch=2, patch=2, num_classes=3)


def flat_parameters(net: DiT, seed: int = 0, channels: int = 3) -> dict[str, Any]:
    """Random parameters by path, none of them zero."""
    x, time = jnp.zeros((1, 2 * net.patch, net.patch, channels)), jnp.zeros(1)
    tree = jax.eval_shape(net.init, jax.random.key(0), x, time)["params"]
    rng = np.random.default_rng(seed)
    leaves = flatten(tree)
    return {path: rng.normal(0, 0.2, leaf.shape).astype(np.float32) for path, leaf in leaves.items()}


def apply(net: DiT, flat: dict[str, Any], *arguments: Any) -> Any:
    return jax.jit(net.apply)({"params": traverse_util.unflatten_dict(flat, sep="/")}, *arguments)


def images(batch: int, height: int, width: int, channels: int = 3) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, height, width, channels))


# ---------------------------------------------------------------- numbers of the paper


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameter_counts_are_the_papers(size: str, millions: int) -> None:
    """Table 1, for patches of 2, 4 channels that become 8 and 1000 classes."""
    net = DiT(**dit.SIZES[size], out_ch=8, num_classes=1000)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6) == millions
    if size == "XL":
        assert count + 256 * net.width == 675_129_632  # the paper's program prints it with the fixed table of places


def test_places_are_sinusoids_of_column_and_row() -> None:
    found = dit.place_features(2, 3, 8)
    for number, (row, column) in enumerate(np.ndindex(2, 3)):
        wanted = [
            f(place * 10_000.0 ** (-k / 2)) for place in (column, row) for f in (math.sin, math.cos) for k in (0, 1)
        ]
        np.testing.assert_allclose(found[number], wanted, atol=1e-6)


# ---------------------------------------------------------------- the network in NumPy


def in_numpy(net: DiT, p: dict[str, Any], x: Any, time: Any, labels: Any) -> Any:
    """The formulas of the paper, image by image and head by head, in float64."""
    p = {path: np.asarray(value, np.float64) for path, value in p.items()}
    dense = lambda name, a: a @ p[f"{name}/kernel"] + p[f"{name}/bias"]  # noqa: E731
    swish = lambda a: a * expit(a)  # noqa: E731
    norm = lambda a: (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)  # noqa: E731
    gelu = lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))  # noqa: E731
    size, (rows, columns) = net.patch, (n // net.patch for n in x.shape[1:3])
    outputs = []
    for image, t, label in zip(x, time, labels, strict=True):
        angles = t * 10_000.0 ** (-np.arange(128) / 128)
        c = dense("dense1", swish(dense("dense0", np.concatenate([np.cos(angles), np.sin(angles)]))))
        c = swish(c + p["class_emb/bias"] + (p["class_emb/kernel"][label] if label < net.num_classes else 0))
        cut = [image[i * size :, j * size :][:size, :size].ravel() for i, j in np.ndindex(rows, columns)]
        h = dense("patch_emb", np.stack(cut)) + dit.place_features(rows, columns, net.width)
        for block in (f"block_{number}" for number in range(net.depth)):
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = np.split(dense(f"{block}/modulation", c), 6)
            a, attended = norm(h) * (1 + scale) + shift, 0
            for head in range(net.num_heads):
                q, k, v = (a @ p[f"{block}/{n}/kernel"][:, head] + p[f"{block}/{n}/bias"][head] for n in "qkv")
                weights = softmax(q @ k.T / np.sqrt(q.shape[-1]), axis=-1)
                attended = attended + weights @ v @ p[f"{block}/proj_out/kernel"][head]
            h = h + gate * (attended + p[f"{block}/proj_out/bias"])
            a = norm(h) * (1 + mlp_scale) + mlp_shift
            h = h + mlp_gate * dense(f"{block}/mlp1", gelu(dense(f"{block}/mlp0", a)))
        shift, scale = np.split(dense("modulation_out", c), 2)
        out = np.zeros((*image.shape[:2], net.out_ch))
        for (i, j), token in zip(
            np.ndindex(rows, columns), dense("dense_out", norm(h) * (1 + scale) + shift), strict=True
        ):
            out[i * size :, j * size :][:size, :size] = token.reshape(size, size, net.out_ch)
        outputs.append(out)
    return np.stack(outputs)


def test_output_is_that_of_the_same_network_in_numpy() -> None:
    params, x, time, labels = flat_parameters(SMALL), images(3, 4, 6), np.array([0.0, 0.7, 300.0]), np.array([2, 3, 0])
    with jax.default_matmul_precision("highest"):
        out = apply(SMALL, params, x, jnp.asarray(time, jnp.float32), jnp.asarray(labels, jnp.int32))
    wanted = in_numpy(SMALL, params, np.asarray(x, np.float64), time, labels)
    assert np.abs(wanted).max() > 1
    chex.assert_trees_all_close(out, wanted, rtol=1e-7, atol=1e-4)


# ---------------------------------------------------------------- invariances


def test_at_first_each_block_is_the_identity_so_that_a_patch_reaches_its_own_place_only() -> None:
    x, time = images(1, 8, 6), jnp.ones(1)
    params = flatten(jax.jit(SMALL.init)(jax.random.key(0), x, time)["params"])
    chex.assert_trees_all_equal(apply(SMALL, params, x, time), jnp.zeros((1, 8, 6, 2)))
    params["dense_out/kernel"] = jnp.asarray(flat_parameters(SMALL)["dense_out/kernel"])
    changed = apply(SMALL, params, x.at[0, 4, 3].add(1.0), time) != apply(SMALL, params, x, time)
    assert changed[0, 4:6, 2:4].all() and changed.sum() == changed[0, 4:6, 2:4].size


def test_no_parameter_depends_on_the_size_of_the_image() -> None:
    params, x, time = flat_parameters(SMALL), images(2, 4, 6), jnp.ones(2)
    out = apply(SMALL, params, jnp.pad(x, ((0, 0), (0, 6), (0, 0), (0, 0))), time)
    chex.assert_shape(out, (2, 10, 6, 2))


def test_a_block_does_not_know_the_order_of_its_tokens() -> None:
    h, condition = images(2, 1, 7, 16)[:, 0], images(2, 1, 1, 16)[:, 0, 0]
    block, order = dit._Block(2, 4, 0.0, 1e-6, "float32"), np.random.default_rng(0).permutation(7)
    tree = jax.eval_shape(partial(block.init, train=False), jax.random.key(0), h, condition)
    params = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), tree)
    evaluate = jax.jit(lambda tokens: block.apply(params, tokens, condition, False))
    straight, permuted = np.asarray(evaluate(h)), np.asarray(evaluate(h[:, order]))
    chex.assert_trees_all_close(permuted, straight[:, order], atol=1e-5)
    assert np.abs(permuted - straight).max() > 0.1


def test_patches_are_cut_and_put_together() -> None:
    x = images(2, 4, 6)
    cut = dit.patches(x, 2)
    chex.assert_trees_all_equal(cut[1, 5], x[1, 2:4, 4:6].ravel())  # row 1, column 2
    chex.assert_trees_all_equal(dit.image_of(cut, 2, 3, 2), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 18}, "multiple of 4"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"patch": 0}, "patch must be"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dtype": "float23"}, "Did you mean 'float32'"),
    ],
)
def test_contradicting_settings_of_a_dit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.clone(**change)


def test_images_that_patches_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"6x9 cannot be cut into patches: .* multiples of 2"):
        jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 6, 9, 3)), jnp.zeros(1))


# ---------------------------------------------------------------- as a rectified flow


@pytest.mark.slow
def test_students_of_a_rectified_flow_transformer_come_near_their_teacher(one_device: None) -> None:
    """The code of the page in docs/, as it is."""
    page = places.ROOT / "docs" / "models" / "rectified_flow_transformer.md"
    found: dict[str, Any] = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)), found)
    distance = found["distance"]
    assert distance["the student in two steps"] < 0.6 * distance["the teacher in two steps"]
    assert distance["the student in one step"] < 0.4 * distance["the teacher in one step"]
