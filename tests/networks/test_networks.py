"""Every network keeps the same contract; settings and arguments that do not fit are refused."""

from __future__ import annotations

import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import (
    LABELLED,
    NCSNPP,
    TINY,
    TINY_SONG,
    evaluate,
    flatten,
    images,
    parameter_shapes,
    parameters,
    with_changes,
)

from diffusion_distill.base.registry import from_mapping, to_mapping
from diffusion_distill.networks import ADM, NETWORKS, DiT, SongUNet, UNet

#: Every network with labels, in a size that compiles quickly.
CONTRACT = {
    "unet": UNet(**LABELLED),
    "song_unet": NCSNPP,
    "dit": DiT(width=16, depth=2, num_heads=2, out_ch=2, num_classes=5),
}
every_network = pytest.mark.parametrize("name", CONTRACT)


@every_network
def test_the_first_output_is_zero_and_has_the_shape_of_the_image(name: str) -> None:
    x, time = images()
    net, labels = CONTRACT[name], jnp.array([0, 3, 4])
    variables = jax.jit(net.init)(jax.random.key(0), x, time, labels)
    assert set(variables) == {"params"}
    out = evaluate(net, variables["params"], x, time, labels)
    chex.assert_shape(out, (3, 8, 8, 2))
    chex.assert_trees_all_close(out, jnp.zeros_like(out), atol=1e-3 if name == "song_unet" else 0.0)  # 1e-5 of a kernel


@every_network
def test_images_of_a_batch_do_not_see_each_other_and_time_and_label_matter(name: str) -> None:
    net, params = CONTRACT[name], parameters(CONTRACT[name])
    x, time = images()
    labels = jnp.array([0, 1, 2], jnp.int32)
    rows = {
        "base": (x, time, labels),
        "time": (x, time.at[2].add(30.0), labels),
        "label": (x, time, labels.at[2].set(3)),
    }
    rows["image"] = (x.at[2].add(1.0), time, labels)
    out = {row: evaluate(net, params, *arguments) for row, arguments in rows.items()}
    for row in ("time", "label", "image"):
        changed = jnp.abs(out[row] - out["base"]).max(axis=(1, 2, 3))
        assert (changed[:2] < 2e-5).all() and changed[2] > 1e-3, row


@every_network
def test_dropout_acts_only_in_training_and_follows_its_key(name: str) -> None:
    net, params = CONTRACT[name].clone(dropout=0.5), parameters(CONTRACT[name])
    arguments = (*images(), jnp.array([0, 1, 2], jnp.int32))
    apply = jax.jit(lambda key: net.apply({"params": params}, *arguments, train=True, rngs={"dropout": key}))
    first, second = jax.random.split(jax.random.key(0))
    evaluated = evaluate(net, params, *arguments)
    chex.assert_trees_all_equal(evaluated, evaluate(CONTRACT[name], params, *arguments))
    chex.assert_trees_all_equal(apply(first), apply(first))
    assert float(jnp.abs(apply(first) - apply(second)).max()) > 1e-3
    assert float(jnp.abs(apply(first) - evaluated).max()) > 1e-3


@every_network
def test_bfloat16_computes_coarsely_with_float32_parameters_and_output(name: str) -> None:
    net, arguments = CONTRACT[name].clone(dtype="bfloat16"), (*images(), jnp.array([0, 1, 2], jnp.int32))
    initial, params = jax.eval_shape(net.init, jax.random.key(0), *arguments), parameters(net)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(initial))
    coarse, fine = (evaluate(n, params, *arguments) for n in (net, CONTRACT[name]))
    chex.assert_type(coarse, jnp.float32)
    error = float(jnp.sqrt(jnp.mean((coarse - fine) ** 2)) / jnp.std(fine))
    assert 1e-5 < error < 0.05


@every_network
def test_a_network_is_a_value_and_ignores_labels_where_there_are_no_classes(name: str) -> None:
    net = CONTRACT[name]
    described = json.loads(json.dumps(to_mapping(net)))
    assert from_mapping(type(net), "network", described) == net and hash(net) == hash(net.clone())
    alone, arguments = net.clone(num_classes=1), images()
    params = parameters(alone)
    assert set(flatten(params)) < set(flatten(parameters(net)))
    labels = jnp.array([0, 1, 2], jnp.int32)
    chex.assert_trees_all_equal(evaluate(alone, params, *arguments), evaluate(alone, params, *arguments, labels))


def test_every_registered_network_is_tested() -> None:
    assert {type(net) for net in CONTRACT.values()} == {
        network for network in NETWORKS.values() if network.__module__.startswith("diffusion_distill.")
    }


def test_every_parameter_has_a_gradient() -> None:
    x, time = images()
    net, params = UNet(**LABELLED), parameters(UNet(**LABELLED))
    loss = lambda p: jnp.sum(jnp.sin(3 * evaluate(net, p, x, time, jnp.array([0, 3, 4]))))  # noqa: E731
    gradient = flatten(jax.jit(jax.grad(loss))(params))
    silent = {path for path, g in gradient.items() if float(jnp.abs(g).max()) < 1e-4}
    # The softmax does not see a bias of k, nor a norm with one channel per group the bias before it.
    assert {path.split("/")[-1] for path in silent} == {"bias"}
    assert {path for path in gradient if path.endswith("k/bias")} <= silent


def test_rectangular_images_and_more_levels() -> None:
    settings = with_changes(TINY, ch_mult=[1, 1, 1], attn_resolutions=[2], num_heads=None, head_dim=16)
    shapes = parameter_shapes(UNet(**settings), 8)
    assert shapes["down_2.attn_0/q/kernel"] == (32, 2, 16)
    assert "down_1.attn_0/q/kernel" not in shapes
    x = jnp.zeros((2, 8, 16, 2))
    out = evaluate(UNet(**settings), parameters(UNet(**settings)), x, jnp.zeros(2))
    chex.assert_shape(out, (2, 8, 16, 2))


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
    x, time = images()
    with pytest.raises(ValueError, match="augment_dim=0"):
        jax.eval_shape(UNet(**TINY).init, jax.random.key(0), x, time, None, False, jnp.zeros((3, 9)))
