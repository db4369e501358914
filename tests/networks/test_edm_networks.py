"""EDM's networks: all that they are told reaches the output, constants have no gradient, initial values have limits."""

from __future__ import annotations

import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from small_networks import EDM_NETWORKS, evaluate, flatten

from diffusion_distill.base.registry import from_mapping, to_mapping
from diffusion_distill.networks import SongUNet, UNet, inputs, layers

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
