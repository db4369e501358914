"""Fixtures of BTD's training utilities (btd/train_utils): clipping, optimizers, averages, pixels, likelihoods.

Recorded in float64 only. Tolerances: 1e-8·max(1, max|f64|) in float64, in float32 the general rule.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_distill.base.arrays import to_byte_range
from diffusion_distill.data import from_arrays
from diffusion_distill.process import likelihood
from diffusion_distill.process.noising import Gaussian
from diffusion_distill.training import ema, sharding
from diffusion_distill.training.gradients import gradient_of
from diffusion_distill.training.optimizers import OptimizerSettings, make_clip, make_optimizer
from golden_checks.btd import compare, has, tags
from golden_checks.common import FLOAT32, Fixture, Kind, Mode

#: What the inputs of clipping are scaled by.
SIZES = {"big": 1.0, "tiny": 0.01}


def check_train_utils(fixture: Fixture, mode: Mode) -> None:
    check_clipping(fixture, mode)
    check_optimizers(fixture, mode)
    check_averages(fixture, mode)
    check_pixels(fixture, mode)
    check_likelihoods(fixture, mode)


def check_clipping(fixture: Fixture, mode: Mode) -> None:
    """Clipping as one device does it with its share's gradient; over the whole batch it is the same function."""
    given = {m[1]: fixture.input(m[0]) for m in fixture.matches("in/clip/(.*)")}
    mesh = sharding.data_mesh(jax.devices()[:1])
    for largest in dict.fromkeys(m[1] for m in fixture.matches("f64/clip/.*/(.*)/norm")):
        clip = make_clip(OptimizerSettings(grad_clip=float(largest)))
        gradient = jax.jit(gradient_of(linear, 1, mesh, clip))
        for size in tags(fixture, f"f64/clip/(.*)/{largest}/norm"):
            tree = mode.tree({name: SIZES[size] * value for name, value in given.items()})
            _, clipped, norm = gradient(tree, tree, {}, (), jax.random.key(0))
            for name, got in {**clipped, "norm": norm}.items():
                compare(fixture, mode, f"clip/{size}/{largest}/{name}", got)


def linear(params: Any, gradient: Any, *_: Any) -> Any:
    """A mean loss with a given gradient."""
    return optax.tree.vdot(params, gradient)


def check_optimizers(fixture: Fixture, mode: Mode) -> None:
    meta = fixture.meta
    for rule in tags(fixture, "f64/opt/(.*)/.*"):
        name, _, decay = rule.partition("_")
        settings = OptimizerSettings(
            rule=name,
            grad_clip=0.0,
            weight_decay=meta["weight_decay"] if decay == "wd" else 0.0,
            b1=meta["adam"]["beta1"] if name == "adam" else meta["momentum"]["beta"],
            b2=meta["adam"]["beta2"],
            eps=meta["adam"]["eps"],
        )
        optimizer = make_optimizer(settings)
        leaves = [m[1] for m in fixture.matches("in/opt/grad_(.*)")]
        params = {leaf: mode.array(fixture.input(f"in/opt/{leaf}")) for leaf in leaves}
        gradients = {leaf: mode.array(fixture.input(f"in/opt/grad_{leaf}")) for leaf in leaves}
        state, seen = optimizer.init(params), []
        for k in range(meta["num_opt_steps"]):
            update, state = optimizer.update({leaf: g[k] for leaf, g in gradients.items()}, state, params)
            params = optax.apply_updates(params, optax.tree.scale(-meta["learning_rate"], update))
            seen.append(params)
        for leaf in leaves:
            compare(fixture, mode, f"opt/{rule}/{leaf}", jnp.stack([p[leaf] for p in seen]))


def check_averages(fixture: Fixture, mode: Mode) -> None:
    window = 1 - 1 / fixture.meta["avg_steps"]
    rules = {
        "ema_decay": ema.rule("plain", fixture.meta["ema_decay"]),
        "avg_type_ema": ema.rule("plain", window),
        "avg_type_aa": ema.rule("window", window),
    }
    for name, rule in rules.items():
        average, seen = ema.init(mode.array(fixture.input("in/avg/initial"))), []
        for k, value in enumerate(mode.array(fixture.input("in/avg/new")), start=1):
            average = ema.update(average, value, mode.array(rule(k)))
            seen.append(average.params)
        compare(fixture, mode, f"avg/{name}", jnp.stack(seen))


def check_pixels(fixture: Fixture, mode: Mode) -> None:
    x = mode.array(fixture.input("in/unnormalize_x"))
    compare(fixture, mode, "unnormalize_clip", to_byte_range(x))
    if mode is FLOAT32:  # a source gives float32
        stored = from_arrays(fixture.input("in/img_u8"))
        compare(fixture, mode, "normalize_data", stored.gather(np.arange(len(stored)))["x"])


def check_likelihoods(fixture: Fixture, mode: Mode) -> None:
    given = lambda *keys: [mode.array(fixture.input(f"in/{key}")) for key in keys]  # noqa: E731
    p, q = (Gaussian(*given(f"kl/mean{k}", f"kl/logvar{k}")) for k in (1, 2))
    compare(fixture, mode, "normal_kl", likelihood.gaussian_kl(p, q))
    log_p = likelihood.discretized_gaussian_log_likelihood(*given("dgll/x", "dgll/means", "dgll/log_scales"))
    compare(fixture, mode, "discretized_gaussian_log_likelihood", log_p)


KINDS = [Kind("btd train_utils", has("f64/clip/*", "f64/opt/*", "f64/avg/*"), check_train_utils)]
