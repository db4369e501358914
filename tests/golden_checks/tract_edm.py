"""Fixtures of TRACT for EDM teachers (folder tract) and of EDM's losses (folder edm).

Networks are the README's: u = z / sqrt(sigma² + 0.25), v = log(sigma), and they return the denoised image. The standard
deviation of the data is the one that a file's meta or parameters give.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_distill.base.arrays import expand, namespace
from diffusion_distill.denoisers.clipping import Clipped
from diffusion_distill.denoisers.model import Denoiser
from diffusion_distill.methods import Denoising, Tract, targets, tract
from diffusion_distill.process import edm_grids, noising, predictions, training_levels, weighting
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import SIGMA_DATA
from diffusion_distill.process.processes import VE, Cosine
from diffusion_distill.process.time_input import EDMInput
from diffusion_distill.solvers import ddim, engine
from diffusion_distill.training.optimizers import OptimizerSettings, make_optimizer
from golden_checks.common import (
    DEFAULT_FLOAT32,
    FLOAT32,
    FLOAT64,
    Fixture,
    Formula,
    Kind,
    Mode,
    exact,
    losses_at,
    of_each,
    relative,
)
from golden_checks.tract import GRADIENT, HEADS, compare_f64, labels_of, of_kind, published
from golden_checks.training import run_trajectory

#: README, 'Recommended tolerances': quantity -> (float64, float32).
STATE = (of_each(1e-11), of_each(2e-6))
PRECONDITIONED = (of_each(1e-11), of_each(2e-4))
LOSS = (relative(1e-11), relative(1e-5))
SAMPLER = (of_each(1e-11), of_each(3e-6))
OTHER = (of_each(1e-11), DEFAULT_FLOAT32)
#: README of edm, losses: recorded in float32, so no closer in float64; levels of the VP loss 2e-5.
RECORDED, SIGMA = of_each(1e-5), relative(2e-5)


# ------------------------------------------------------------------------------------------------- checks


def check_step(fixture: Fixture, mode: Mode) -> None:
    """One training step: two stages of the teacher, the self-teacher, target, loss, gradient, update."""
    meta, compare = fixture.meta, partial(compare_f64, fixture, mode)
    start, end = meta["time_schedule"][:2]
    grid, method = grid_of(meta), Tract.edm((start, end))
    index, semi_index = fixture.input("index"), fixture.input("semi_index")
    t = index - semi_index
    table = tract.rows(grid, end, method.teacher_solver).at(t - 1)
    rows, labels = mode.tree(table), labels_of(fixture)
    level_s = mode.tree(grid.at(start - (index - meta["step"])))
    teacher, self_teacher, student = (network(fixture, mode, form) for form in ("teacher", "self", "student"))
    x, noise = mode.array(fixture.input("x")), mode.array(fixture.input("noise"))
    if mode is FLOAT64:
        fixture.compare("sigma_grid", grid.sigma[::-1], mode, STATE[0])
    for j, level in enumerate((rows.t, rows.m, level_s)):
        compare(f"sigma{j}", level.sigma, STATE)
    check_preconditioning(compare, rows.t, student.sigma_data)

    z0 = noising.diffuse(x, noise, rows.t)
    seen, x_hats = targets.walk(rows.stages, z0, teacher, labels)
    # A step to zero noise has one stage; the published program then calls the network again in the same place.
    assert table.stages is not None
    single = expand(mode.array(table.stages.mix[:, 1] == 0), z0)
    xp = namespace(z0)
    z1 = expand(rows.r, z0) * z0 + expand(rows.d, z0) * targets.estimate(rows.stages, z0, rows.t, teacher, labels)
    first, second = method.estimators({"teacher": teacher, "self_teacher": self_teacher}, rows)
    target = targets.target(rows, z0, first, second, labels)
    compare("xt0", z0, STATE)
    compare("teacher_out0", x_hats[0], OTHER)
    compare("euler_x", xp.where(single, z0, seen[1]), STATE)
    compare("teacher_out1", xp.where(single, x_hats[0], x_hats[1]), OTHER)
    compare("xt1", z1, STATE)
    compare("self_out", self_teacher.raw(z1, rows.m, labels), OTHER)
    compare("target_x", target, STATE)
    compare("student_out", student.raw(z0, rows.t, labels), OTHER)
    for name, x_hat in (("target", target), ("pred", student(z0, rows.t, labels))):
        eps_hat = predictions.eps_from_x(z0, x_hat, rows.t)
        raw = predictions.raw_of("edm", x_hat, eps_hat, rows.t, student.sigma_data)
        compare(f"{name}_precond", raw, PRECONDITIONED)
    if mode is FLOAT64:
        x_hat = self_teacher(z1, rows.m, labels)
        clipped = Clipped(self_teacher)(z1, rows.m, labels)
        fixture.compare("clip_count_self", (x_hat != clipped).sum(axis=(1, 2, 3)), mode, exact())
    check_update(fixture, mode, method, {"teacher": teacher, "self_teacher": self_teacher, "student": student}, rows)


def check_preconditioning(compare: Any, level: Level, sigma_data: float) -> None:
    """EDM's four coefficients, and its weight, which is 1 for the error of F."""
    time_input, [head] = EDMInput(sigma_data), predictions.heads("edm", level, sigma_data)
    compare("c_in", time_input.scale(level), STATE)
    compare("c_noise", time_input.time(level, VE()), STATE)
    compare("c_skip", head.q, STATE)
    compare("c_out", head.p, STATE)
    compare("weight", weighting.of("edm", level, sigma_data) * head.p**2, LOSS)


def check_update(fixture: Fixture, mode: Mode, method: Tract, denoisers: dict[str, Any], rows: Any) -> None:
    """Losses, gradient and Adam's first update."""
    compare, student = partial(compare_f64, fixture, mode), denoisers["student"]
    x, noise, labels = mode.array(fixture.input("x")), mode.array(fixture.input("noise")), labels_of(fixture)
    losses = losses_at(method, denoisers, rows, x, noise, labels)
    compare("loss_per_sample", losses, LOSS)
    compare("loss", losses.mean(), LOSS)

    def mean_loss(coefficients: Any) -> Any:
        changed = denoisers | {"student": student.replace(params=coefficients)}
        return losses_at(method, changed, rows, x, noise, labels).mean()

    gradient = jax.grad(mean_loss)(jnp.asarray(student.params))
    compare("grad_coef_student", gradient, GRADIENT)
    optimizer = make_optimizer(OptimizerSettings(grad_clip=fixture.meta.get("grad_clip") or 0.0, clip_eps=1e-6))
    update, _ = optimizer.update(gradient, optimizer.init(student.params), student.params)
    moved = optax.apply_updates(student.params, optax.tree.scale(-fixture.meta["adam_lr"], update))
    compare("coef_student_after_adam", moved, OTHER)


def check_sampler(fixture: Fixture, mode: Mode) -> None:
    """Steps along every T/N-th level of the fine grid; the last is to zero noise and returns x_hat."""
    fine = grid_of(fixture.meta)
    if mode is FLOAT64:
        fixture.compare("sigma_grid", fine.sigma[::-1], mode, STATE[0])
    denoiser, labels = network(fixture, mode, "self", "coef_eval"), labels_of(fixture)
    compare = partial(compare_f64, fixture, mode)
    for steps in sorted({int(match[1]) for match in fixture.matches("f64_n([0-9]+)_.*")}):
        grid = fine.at(slice(None, None, fixture.meta["timesteps"] // steps))
        start = mode.array(fixture.input("noise"))
        levels = [Level(*(np.full(len(start), a) for a in grid.at(k))) for k in range(steps + 1)]
        if mode is FLOAT32:
            states = engine.integrate(Clipped(denoiser), ddim(grid), start, labels, states=True)
        else:
            states = [grid.sigma[0] * start]
            for level, level_s in pairwise(levels):
                x_hat = Clipped(denoiser)(states[-1], level, labels)
                states.append(noising.ddim_step(states[-1], x_hat, level, level_s))
        raw = [denoiser.raw(states[k], mode.tree(levels[k]), labels) for k in range(steps)]
        compare(f"n{steps}_cond", mode.array(grid.sigma[:-1]), STATE)
        compare(f"n{steps}_net_out", jnp.stack(raw), OTHER)
        compare(f"n{steps}_xs", jnp.stack([*states[1:]]), SAMPLER)
        compare(f"n{steps}_final", states[-1], SAMPLER)


def check_trajectory(fixture: Fixture, mode: Mode) -> None:
    """Updates with a rising learning rate; the teacher has its own network and coefficients."""
    meta = fixture.meta
    start, end = meta["time_schedule"][:2]
    batch = fixture.input("x").shape[1]
    method = Tract.edm(
        (start, end), length=batch * len(fixture.input("samples")), self_momentum=meta["sema"],
        learning_rate=meta["adam_lr"], warmup=meta["lr_warmup_samples"] // batch,
    )  # fmt: skip
    grid = grid_of(meta)
    if mode is FLOAT64:
        fixture.compare("sigma_grid", grid.sigma[::-1], mode, STATE[0])
    table = mode.tree(tract.rows(grid, end, method.teacher_solver))
    [phase] = method.phases(Formula(FORMS["student"], "x"), batch, grid)  # type: ignore[arg-type]
    teacher = Formula(FORMS["teacher"], "x"), mode.array(fixture.input("coef_teacher"))
    index = fixture.input("index") - fixture.input("semi_index") - 1
    student = Formula(FORMS["student"], "x", sigma_data=meta.get("sigma_data", SIGMA_DATA))
    history = run_trajectory(fixture, mode, method, student, teacher, [phase], [table], index, [0] * len(index))
    rates = [phase.rate(k) for k in range(len(index))]
    rules = {"loss": (of_each(1e-10), relative(1e-4))}
    for key in ("loss", "grad", "student", "self_teacher", "eval"):
        default = GRADIENT if key == "grad" else (of_each(1e-10), of_each(2e-5))
        compare_f64(fixture, mode, key, np.stack([record[key] for record in history]), rules.get(key, default))
    compare_f64(fixture, mode, "lr", rates, OTHER)


def check_losses(fixture: Fixture, mode: Mode) -> None:
    """EDM's, the VP and the VE loss of recorded network outputs."""
    for case, content in fixture.meta["cases"].items():
        with fixture.attempt(case, mode):
            check_loss(fixture, mode, case, content)


def check_loss(fixture: Fixture, mode: Mode, case: str, content: dict[str, Any]) -> None:
    """One of them."""
    kind, params = case.partition(".")[0], content["params"]
    level = drawn_level(kind, params, mode.array(fixture.input(f"{case}.rnd")).ravel())
    nhwc = lambda name: mode.array(np.moveaxis(fixture.input(f"{case}.{name}"), 1, -1))  # noqa: E731
    augmented = f"{case}.augmented_images" in fixture
    x, eps = nhwc("augmented_images" if augmented else "images"), nhwc("noise")
    if augmented:
        fixture.skip([f"{case}.images", f"{case}.augment_labels"], "the loss takes the augmented images")
    fixture.compare(f"{case}.sigma", level.sigma.reshape(-1, 1, 1, 1), mode, SIGMA)
    z = noising.diffuse(x, eps, level)
    fixture.compare(f"{case}.net_input", namespace(z).moveaxis(z, -1, 1), mode, RECORDED)
    student = recorded_output(nhwc("net_output"), params.get("sigma_data", SIGMA_DATA))
    method = Denoising(weighting={"EDM": "edm", "VP": "snr", "VE": "snr"}[kind], reduction="sum")
    of_pixels = weighting.of(method.weighting, level, student.sigma_data)
    fixture.compare(f"{case}.weight", of_pixels.reshape(-1, 1, 1, 1), mode, RECORDED)
    error = expand(of_pixels, x) * predictions.x_error("x", student.params, x, eps, level) ** 2
    fixture.compare(f"{case}.loss", namespace(error).moveaxis(error, -1, 1), mode, RECORDED)
    total = losses_at(method, student, level, x, eps, None).mean()
    whole = content["training_scalar_batch_mean_of_pixel_sums"]
    fixture.report(f"{case} loss", abs(float(total) / whole - 1), mode, RECORDED)


# ------------------------------------------------------------------------------------------------- parts


def drawn_level(kind: str, params: dict[str, float], rnd: Any) -> Level:
    """The level of a recorded random number."""
    if kind == "EDM":
        return training_levels.from_normal(rnd, params["P_mean"], params["P_std"])
    if kind == "VP":
        return training_levels.vp(Cosine(), rnd, params["beta_d"], params["beta_min"], params["epsilon_t"])
    return training_levels.loguniform(Cosine(), rnd, params["sigma_min"], params["sigma_max"])


def recorded_output(output: Any, sigma_data: float) -> Denoiser:
    """A network that returns a recorded output whatever its input."""
    model = Formula(lambda prediction, params, z, level, labels: params, "x", sigma_data=sigma_data)
    return Denoiser(params=output, model=model)


def grid_of(meta: dict[str, Any]) -> Level:
    """EDM's grid of a file's meta."""
    ends = {key: float(meta[key]) for key in ("sigma_min", "sigma_max", "rho") if key in meta}
    return edm_grids.edm(meta["timesteps"], **ends)


def network(fixture: Fixture, mode: Mode, form: str, key: str = "") -> Denoiser:
    """One of the README's analytic networks with a file's coefficients."""
    model = Formula(FORMS[form], "x", sigma_data=fixture.meta.get("sigma_data", SIGMA_DATA))
    return Denoiser(params=mode.array(fixture.input(key or f"coef_{form}")), model=model)


def _form(x_head: Any) -> Any:
    def raw(prediction: str, c: Any, z: Any, level: Level, labels: Any) -> Any:
        xp, sigma = namespace(z, *level, c), level.expand(z).sigma
        k = 0.0 if labels is None else expand(labels % 7, z)
        return x_head(xp, c, z / xp.sqrt(sigma**2 + 0.25), xp.log(sigma)) + c[5] * k

    return raw


FORMS = {name: _form(heads[0]) for name, heads in HEADS.items()}

KINDS = [
    Kind("tract-edm step", of_kind("tract_edm"), check_step, published),
    Kind("tract-edm sampler", of_kind("sampler_tract_edm"), check_sampler, published),
    Kind("tract-edm trajectory", of_kind("trajectory_edm"), check_trajectory, published),
    Kind("edm losses", lambda fixture: fixture.meta.get("fixture") == "losses", check_losses),
]
