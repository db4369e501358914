"""Fixtures of TRACT (folder tract): training steps of TRACT-VP and of its BTD baseline, samplers, averages,
phases, closure weights, U-Nets. Kinds are named in each file's meta.

Keys: inputs, f64_... outputs, pub_... the same with the published program's mixture of precisions. Where the
README has no tolerance for float64, that of its nearest row is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_distill.base.arrays import expand, namespace
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.denoisers.clipping import Clipped
from diffusion_distill.denoisers.model import Denoiser
from diffusion_distill.methods import Progressive, Tract, phases, progressive, targets, tract
from diffusion_distill.process import grids, noising, weighting
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import VE
from diffusion_distill.solvers import ddim, engine
from diffusion_distill.training import ema
from diffusion_distill.training.optimizers import OptimizerSettings, make_optimizer
from golden_checks.common import (
    DEFAULT_FLOAT32,
    FLOAT32,
    FLOAT64,
    Fixture,
    Formula,
    Kind,
    Mode,
    Rule,
    absolute,
    exact,
    keys_like,
    losses_at,
    of_each,
    of_scale,
    phase_at,
    process_of,
    relative,
)
from golden_checks.networks import outputs, stored_params, unet_of

#: README, 'Recommended tolerances': quantity -> (float64, float32).
STATE = (absolute(1e-9), absolute(5e-6))
LOSS = (relative(1e-8), relative(2e-5))
LOSS_PER_SAMPLE = (relative(1e-8), relative(5e-4))
SAMPLER = (absolute(1e-9), of_each(3e-6))
EMA = (absolute(1e-10), absolute(2e-6))
WEIGHT = (relative(1e-11), relative(2e-6))
TABLE = (of_each(1e-14), DEFAULT_FLOAT32)
#: No row of its own: levels, raw outputs, parameters (as states in float64; the general rule in float32).
OTHER = (of_each(1e-9), DEFAULT_FLOAT32)
#: No row either. The general rule knows no scale, but gradients have that of the loss: its tolerances.
GRADIENT = (
    of_scale(1e-8, "none in the README: the loss's"),
    of_scale(2e-5, "none in the README: the loss's"),
)


# ------------------------------------------------------------------------------------------------- checks


def check_tract_step(fixture: Fixture, mode: Mode) -> None:
    meta = fixture.meta
    index, semi_index = fixture.input("index"), fixture.input("semi_index")
    start, end = meta["time_schedule"][meta["phase"] :][:2]
    process = process_of(meta)
    table = tract.rows(grids.make_grid(process, start), end).at((index - semi_index) // meta["semi"] - 1)
    level_s = process.level((index - meta["step"]) / meta["timesteps"])
    roles = {"teacher": ("teacher", "coef_teacher"), "self_teacher": ("self", "coef_self")}
    check_step(fixture, mode, Tract(reduction="sum"), table, level_s, roles, ("teacher_out", "self_out"))
    if mode is FLOAT64:
        check_clip_counts(fixture, mode, Tract(), table, roles)


def check_btd_step(fixture: Fixture, mode: Mode) -> None:
    meta = fixture.meta
    index = fixture.input("index")
    process = process_of(meta)
    table = progressive.rows(grids.make_grid(process, 2 * meta["cur_step"])).at(index // meta["step"] - 1)
    level_s = process.level((index - meta["step"]) / meta["timesteps"])
    method = Progressive(reduction="sum", zero_noise="x_head")
    roles = {"teacher": ("teacher", "coef_teacher")}
    check_step(fixture, mode, method, table, level_s, roles, ("teacher_out0", "teacher_out1"))


def check_step(
    fixture: Fixture,
    mode: Mode,
    method: Any,
    table: targets.Rows,
    level_s: Level,
    roles: dict[str, tuple[str, str]],
    raw_keys: Sequence[str],
) -> None:
    """One training step: states z0 -> z1 -> z2 of the chain, target, loss, gradient, update."""
    compare = partial(compare_f64, fixture, mode)
    denoisers: dict[str, Any] = {name: network(fixture, mode, *role) for name, role in roles.items()}
    denoisers["student"] = student = network(fixture, mode, "student", "coef_student")
    x, noise = mode.array(fixture.input("x")), mode.array(fixture.input("noise"))
    labels, rows, level_s = labels_of(fixture), mode.tree(table), mode.tree(level_s)

    for j, level in enumerate((rows.t, rows.m, level_s)):
        compare(f"logsnr{j}", level.logsnr, OTHER)
        compare(f"g{j}", level.alpha**2, OTHER)

    z0 = noising.diffuse(x, noise, rows.t)
    first, second = estimators(method, denoisers)
    z1 = noising.ddim_step(z0, first(z0, rows.t, labels), rows.t, rows.m)
    z2 = noising.ddim_step(z1, second(z1, rows.m, labels), rows.m, level_s)
    raw = [d.raw for d in (denoisers["teacher"], denoisers.get("self_teacher", denoisers["teacher"]))]
    first, second = estimators(method, denoisers, rows)
    compare("xt0", z0, STATE)
    compare(raw_keys[0], raw[0](z0, rows.t, labels), OTHER)
    compare("xt1", z1, STATE)
    compare(raw_keys[1], raw[1](z1, rows.m, labels), OTHER)
    compare("xt2", z2, STATE)
    compare("target", targets.target(rows, z0, first, second, labels), STATE)
    compare("student_out", student.raw(z0, rows.t, labels), OTHER)
    compare("pred_x", student(z0, rows.t, labels), STATE)

    losses = losses_at(method, denoisers, rows, x, noise, labels)
    compare("weight", weighting.of(method.weighting, rows.t, 0.5), LOSS)
    compare("loss_per_sample", losses, LOSS_PER_SAMPLE)
    compare("loss", losses.mean(), LOSS)

    def mean_loss(coefficients: Any) -> Any:
        changed = denoisers | {"student": student.replace(params=coefficients)}
        return losses_at(method, changed, rows, x, noise, labels).mean()

    gradient = jax.grad(mean_loss)(jnp.asarray(student.params))
    compare("grad_coef_student", gradient, GRADIENT)
    optimizer = make_optimizer(OptimizerSettings(grad_clip=fixture.meta.get("grad_clip") or 0.0, clip_eps=1e-6))
    update, _ = optimizer.update(gradient, optimizer.init(student.params), student.params)
    step = optax.tree.scale(-fixture.meta["adam_lr"], update)
    compare("coef_student_after_adam", optax.apply_updates(student.params, step), OTHER)


def check_clip_counts(fixture: Fixture, mode: Mode, method: Tract, rows: Any, roles: Any) -> None:
    """How many values of each estimate clipping changes."""
    labels, z = labels_of(fixture), noising.diffuse(fixture.input("x"), fixture.input("noise"), rows.t)
    for (form, key), level in zip(roles.values(), (rows.t, rows.m), strict=True):
        denoiser = network(fixture, mode, form, key)
        x_hat, clipped = (estimate(z, level, labels) for estimate in (denoiser, Clipped(denoiser)))
        count = (x_hat != clipped).sum(axis=tuple(range(1, z.ndim)))
        fixture.compare(f"clip_count_{form}", count, mode, exact())
        z = noising.ddim_step(z, clipped, rows.t, rows.m)


def check_sampler(fixture: Fixture, mode: Mode) -> None:
    process = process_of(fixture.meta)
    denoiser = network(fixture, mode, "self", "coef_eval")
    start, labels = mode.array(fixture.input("noise")), labels_of(fixture)
    for steps in sorted({int(match[1]) for match in fixture.matches("f64_n([0-9]+)_.*")}):
        grid = grids.make_grid(process, steps)
        table = ddim(grid)
        if mode is FLOAT32:
            states = engine.integrate(Clipped(denoiser), table, start, labels, states=True)
        else:
            states = [start]
        raw = []
        for k in range(steps):
            level, level_s = (Level(*(np.full(len(start), a) for a in grid.at(j))) for j in (k, k + 1))
            level = mode.tree(level)
            raw.append(denoiser.raw(states[k], level, labels))
            if mode is FLOAT64:  # the engine runs in float32: here the same steps one by one
                states.append(noising.ddim_step(states[k], Clipped(denoiser)(states[k], level, labels), level, level_s))
        compare = partial(compare_f64, fixture, mode)
        compare(f"n{steps}_cond", mode.tree(table.level).logsnr, OTHER)
        compare(f"n{steps}_net_out", jnp.stack(raw), OTHER)
        compare(f"n{steps}_xs", jnp.stack([*states[1:]]), SAMPLER)
        compare(f"n{steps}_final", states[-1], SAMPLER)


def check_ema_and_heuristics(fixture: Fixture, mode: Mode) -> None:
    compare = partial(compare_f64, fixture, mode)
    if "momenta" in fixture and "seq" in fixture:
        init, values = mode.array(fixture.input("init")), mode.array(fixture.input("seq"))
        for j, momentum in enumerate(fixture.input("momenta")):
            rule = ema.rule("corrected", float(momentum))
            weights = mode.array([rule(k) for k in range(1, len(values) + 1)])
            compare(f"ema_{j}", averages(init, values, weights), EMA)
            compare(f"decay_{j}", weights, EMA)
            for match in fixture.matches(f"f64_ema_{j}_reset([0-9]+)"):
                reset_after = int(match[1])
                compare(f"ema_{j}_reset{reset_after}", averages(init, values, weights, reset_after), EMA)
    if mode is FLOAT32:
        return  # the rest never leaves the host
    if "int_str_in" in fixture:
        lengths = [parse_length(str(text)) for text in fixture.input("int_str_in")]
        fixture.compare("int_str_out", lengths, mode, exact())
    if "heuristic_table" in fixture:
        fixture.compare("heuristic_table", heuristic_table(fixture), mode, TABLE[0])
    for match in fixture.matches("phase_(tract_n|btd_)([0-9]+)"):
        size = int(match[2])
        count = size if match[1] == "tract_n" else len(progressive.halvings(size, 1))
        at = [phase_at(float(progress), count) for progress in fixture.input("progress")]
        fixture.compare(match[0], at, mode, exact())


def check_closure_weights(fixture: Fixture, mode: Mode) -> None:
    vp = process_of(fixture.meta)
    rule = partial(choose_rule, mode)
    for name, grid in fixture.meta["grids"].items():
        if f"{name}_t" not in fixture:
            continue
        t, m, s = (fixture.input(f"{name}_{which}").astype(np.int64) for which in "tms")
        start, end = grid["schedule"][:2]
        if mode is FLOAT64:
            weights = targets.chain_weights(vp.level(np.stack([t, m, s]) / grid["timesteps"]))
            fixture.compare(f"{name}_w", weights[0], mode, WEIGHT[0])
        rows = mode.tree(tract.rows(grids.make_grid(vp, start), end).at(t // (grid["timesteps"] // start) - 1))
        fixture.compare(f"{name}_w", rows.first, mode, rule(WEIGHT))
    for match in fixture.matches("(.*)_chain_index"):
        name, index = match[1], fixture.input(match[0])
        if name == "ve":
            process, times, steps = VE(1.0), fixture.input("ve_sigma_grid")[index], 1
        else:
            process, times, steps = vp, index, fixture.meta[f"chain_{name}_timesteps"]
        levels = process.level(times / steps)
        weights, levels = mode.array(targets.chain_weights(levels)), mode.tree(levels)
        x_hats = mode.array(fixture.input(f"{name}_chain_xhat"))
        z = mode.array(fixture.input(f"{name}_chain_z0"))
        target = targets.weighted_mean(weights, x_hats)
        for k, x_hat in enumerate(x_hats):
            z = noising.ddim_step(z, x_hat, levels.at(k), levels.at(k + 1))
        fixture.compare(f"{name}_chain_w", weights, mode, rule(WEIGHT))
        fixture.compare(f"{name}_chain_z_end", z, mode, rule(STATE))
        fixture.compare(f"{name}_chain_target", target, mode, rule(STATE))


def check_unet(fixture: Fixture, mode: Mode) -> None:
    x, logsnr, labels = fixture.input("x"), fixture.input("logsnr"), fixture.input("label")
    net = unet_of({"norm_groups": fixture.meta.get("group_norm_groups", 32), **fixture.meta["config"]})
    out, temb = outputs(net, stored_params(fixture, net, "param:", x), x, logsnr, labels)
    nearly_constant = x.reshape(len(x), -1).std(axis=1) < 1e-2  # group norm amplifies the rounding of such images
    scale = np.where(nearly_constant, 4, 1).reshape(-1, 1, 1, 1)
    rule = Rule(5e-4, " absolute, 4 times that for nearly constant images", lambda ref: scale)
    fixture.compare("out_eps1e6_f64", out, mode, rule)
    fixture.compare("temb_f64", temb, mode, absolute(5e-4, " absolute (none in the README: the output's)"))


# ------------------------------------------------------------------------------------------------- parts


def choose_rule(mode: Mode, rules: tuple[Rule, Rule]) -> Rule:
    """The rule of a precision."""
    return rules[mode is FLOAT32]


def compare_f64(fixture: Fixture, mode: Mode, key: str, got: Any, rules: tuple[Rule, Rule]) -> None:
    """Compares with f64_<key>."""
    fixture.compare(f"f64_{key}", got, mode, choose_rule(mode, rules))


def labels_of(fixture: Fixture) -> np.ndarray | None:
    """The labels [batch], if the file is conditional."""
    labels = fixture.input("label").reshape(-1).astype(np.int32)
    return labels if fixture.meta.get("num_classes", 0) > 1 else None


def estimators(method: Any, denoisers: dict[str, Any], rows: Any = None) -> tuple[Any, Any]:
    """The two estimators of a method's target; without rows, those that move the state.

    BTD's rule at zero noise changes the target only.
    """
    if rows is None and isinstance(method, Progressive):
        return denoisers["teacher"], denoisers["teacher"]
    return method.estimators(denoisers, rows)


def averages(init: Any, values: Any, weights: Any, reset_after: int | None = None) -> Any:
    """The average after each value; its count restarts after `reset_after` of them."""
    average, seen = ema.init(init), []
    for k, value in enumerate(values):
        average = ema.reset(average) if k == reset_after else average
        average = ema.update(average, value, weights[average.count])
        seen.append(average.params)
    return jnp.stack(seen)


def heuristic_table(fixture: Fixture) -> np.ndarray:
    """The table with the columns that the package computes in place of the recorded ones."""
    table, columns = fixture.arrays["heuristic_table"].copy(), fixture.meta["columns"]
    at = {name: table[:, k] for k, name in enumerate(columns)}
    for row in range(len(table)):
        total, batch, count = (int(at[name][row]) for name in ("train_len_samples", "batch", "phases"))
        steps = phases.updates_per_phase(total, batch, count)
        at["steps_per_phase"][row] = steps
        at["momentum"][row] = phases.momentum_for(float(at["residual"][row]), steps)
    return table


def network(fixture: Fixture, mode: Mode, form: str, key: str) -> Denoiser:
    """One of the README's analytic networks ('teacher', 'self', 'student') with a file's coefficients."""
    model = Formula(FORMS[form], fixture.meta["prediction"])
    return Denoiser(params=mode.array(fixture.input(key)), model=model)


def _form(x_head: Any, eps_head: Any) -> Any:
    """A network of pointwise heads (xp, c, u, v, k) with u = z, v = logsnr / 20, k = label mod 7."""

    def raw(prediction: str, c: Any, z: Any, level: Level, labels: Any) -> Any:
        xp = namespace(z, *level, c)
        v = level.expand(z).logsnr / 20
        k = 0.0 if labels is None else expand(labels % 7, z)
        x = x_head(xp, c, z, v) + c[5] * k
        return x if prediction == "x" else xp.concatenate([x, eps_head(xp, c, z, v)], axis=-1)

    return raw


HEADS = {
    "teacher": (
        lambda xp, c, u, v: c[0] * xp.tanh(c[1] * u + c[2] * xp.sin(c[3] * u) + c[4] * v),
        lambda xp, c, u, v: c[6] * u + c[7] * xp.cos(c[8] * u) + c[9] * v,
    ),
    "self": (
        lambda xp, c, u, v: c[0] * xp.tanh(c[1] * u + c[4] * v) + c[2] * xp.sin(c[3] * u),
        lambda xp, c, u, v: c[6] * xp.tanh(c[8] * u) + c[7] * u + c[9] * v,
    ),
    "student": (
        lambda xp, c, u, v: c[0] * u / xp.sqrt(1 + (c[1] * u) ** 2) + c[2] * xp.tanh(c[3] * u + c[4] * v),
        lambda xp, c, u, v: c[6] * u + c[7] * xp.sin(c[8] * u) + c[9] * v,
    ),
}
FORMS = {name: _form(*heads) for name, heads in HEADS.items()}


# -------------------------------------------------------------------------------------------- what there is


def published(fixture: Fixture) -> list[tuple[list[str], str]]:
    """The published program's results beside float64 ones."""
    keys = [m[0] for m in fixture.matches("pub_(.*)") if f"f64_{m[1]}" in fixture]
    return [(keys, "the published mixture of precisions beside the f64_ array")]


def other_networks(fixture: Fixture) -> list[tuple[list[str], str]]:
    """Outputs of a U-Net that is not the original one, and float32 twins."""
    port = keys_like(fixture, "out_eps1e5_*")
    twins = [m[0] for m in fixture.matches("(.*)_f32") if f"{m[1]}_f64" in fixture and m[0] not in port]
    return [
        (port, "group norm epsilon 1e-5 of the PyTorch port; the original's and the library's is 1e-6"),
        (twins, "the float32 twin of the f64 array"),
    ]


def of_kind(*kinds: str) -> Any:
    """Recognises files by the kind in their meta."""
    return lambda fixture: fixture.meta.get("kind") in kinds


KINDS = [
    Kind("tract step", of_kind("tract_vp"), check_tract_step, published),
    Kind("tract's btd step", of_kind("btd"), check_btd_step, published),
    Kind("tract sampler", of_kind("sampler_tract_vp", "sampler_btd"), check_sampler, published),
    Kind("tract averages", of_kind("ema"), check_ema_and_heuristics, published),
    Kind("closure weights", of_kind("closure_weights"), check_closure_weights),
    Kind("tract unet", of_kind("unet"), check_unet, other_networks, modes=(FLOAT32,)),
]
