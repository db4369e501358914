"""Fixtures of Google's progressive distillation (folder btd): tables, losses, targets, samplers, U-Nets.

Keys: in/... inputs, f64/... outputs, f32/... the same run in float32 by the original, whose own error
meta["f32_deviation"] holds. Tolerances: 1e-8·max(1, max|f64|) in float64, in float32 five times that error
plus 1e-6·max(1, max|f64|).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion_distill.base.arrays import log1mexp, namespace
from diffusion_distill.denoisers.clipping import Clipped
from diffusion_distill.denoisers.model import Denoiser
from diffusion_distill.methods import Denoising, Progressive, progressive, targets
from diffusion_distill.networks.layers import sinusoidal_features
from diffusion_distill.process import grids, likelihood, noising, predictions
from diffusion_distill.process.levels import Level, from_logsnr
from diffusion_distill.process.processes import Cosine
from diffusion_distill.solvers import ancestral, ddim, engine
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
    keys_like,
    losses_at,
    of_largest,
    process_of,
)
from golden_checks.networks import outputs, stored_params, unet_of

#: The fixtures' words for the package's weightings: what is trained, and plain errors that equal one of them.
WEIGHTINGS = {"constant": "constant", "snr": "snr", "snr_trunc": "snr_trunc", "v_mse": "snr_plus_one"}
ERRORS = {"x_mse": "constant", "eps_mse": "snr", "v_mse": "snr_plus_one"}


# ------------------------------------------------------------------------------------------------- checks


def check_processes(fixture: Fixture, mode: Mode) -> None:
    u = mode.array(fixture.input("in/u"))
    for description in fixture.meta["schedules"]:
        compare(fixture, mode, description["key"], process_of(description).level(u).logsnr)


def check_dpm(fixture: Fixture, mode: Mode) -> None:
    given = lambda name: mode.array(fixture.input(f"in/{name}"))  # noqa: E731
    z, x, eps, v, x_logvar = map(given, ("z", "x", "eps", "v", "x_logvar"))
    level = from_logsnr(given("logsnr"))
    # Coefficients of the reverse step are tables made on the host: float64 levels, images on the device.
    # (In float32 the levels themselves are too coarse for the variance of a step of 1e-3 in logsnr.)
    level_t, level_s = (from_logsnr(FLOAT64.array(fixture.input(f"in/{key}"))) for key in ("logsnr", "logsnr_s"))
    heads = namespace(x).concatenate([given("both_x"), given("both_eps")], axis=-1)
    raw = {"x": x, "eps": eps, "v": v, "both": heads}

    logvar = x_logvar[:, 0, 0, 0]
    results = {
        "predict_x_from_eps": predictions.to_x("eps", eps, z, level),
        "predict_eps_from_x": predictions.eps_from_x(z, x, level),
        "predict_x_from_v": predictions.to_x("v", v, z, level),
        "predict_v_from_x_and_eps": predictions.raw_of("v", x, eps, level),
        "predict_xlogvar_from_epslogvar": logvar - level.logsnr,
        "predict_epslogvar_from_xlogvar": logvar + level.logsnr,
        "log1mexp": log1mexp(given("log1mexp_x")),
    }
    marginal = noising.marginal(x, level)
    for (part,) in (match.groups() for match in fixture.matches("f64/forward/(.*)")):
        results[f"forward/{part}"] = getattr(marginal, part)
    for variance, part in (match.groups() for match in fixture.matches("f64/reverse/(.*)/(.*)")):
        if mode is FLOAT32 and variance != "array" and part != "mean":
            continue  # a number of the host-side table alone, compared in float64
        choice = {"x_logvar": x_logvar} if variance == "array" else {"gamma": gamma_of(variance)}
        results[f"reverse/{variance}/{part}"] = getattr(noising.posterior(z, x, level_t, level_s, **choice), part)
    for kind, clip, what in (match.groups() for match in fixture.matches("f64/run/(.*)/(.*)/model_(.*)")):
        results[f"run/{kind}/{clip}/model_{what}"] = read(what, kind, raw[kind], z, level, clip == "clip")
    for kind, variance in (match.groups() for match in fixture.matches("f64/vb_bits/(.*)/(.*)")):
        x_hat = predictions.to_x(kind, raw[kind], z, level)
        bits = likelihood.posterior_kl_bits(z, x, x_hat, level_t, level_s, gamma_of(variance))
        results[f"vb_bits/{kind}/{variance}"] = bits
    for key, got in results.items():
        compare(fixture, mode, key, got)


def read(what: str, kind: str, raw: Any, z: Any, level: Level, clip: bool) -> Any:
    """x, eps or v of a network's output, which itself is kept as it is unless x_hat is clipped."""
    if what == kind and not clip:
        return raw
    x_hat = predictions.to_x(kind, raw, z, level)
    x_hat = namespace(z).clip(x_hat, -1, 1) if clip else x_hat
    eps = raw if kind == "eps" and not clip else predictions.eps_from_x(z, x_hat, level)
    return {"x": x_hat, "eps": eps, "v": predictions.raw_of("v", x_hat, eps, level)}[what]


def check_losses(fixture: Fixture, mode: Mode) -> None:
    process = process_of(fixture.meta["schedule"])
    x, eps = mode.array(fixture.input("in/x")), mode.array(fixture.input("in/eps"))
    for tag in tags(fixture, "f64/(continuous|N[0-9]+)/.*"):
        u = mode.array(fixture.input("in/u") if tag == "continuous" else discrete_times(fixture, tag))
        level = process.level(u)
        compare(fixture, mode, f"{tag}/u", u)
        compare(fixture, mode, f"{tag}/logsnr", level.logsnr)
        compare(fixture, mode, f"{tag}/z", noising.diffuse(x, eps, level))
        compare(fixture, mode, f"{tag}/v_target", predictions.raw_of("v", x, eps, level))
        for match in fixture.matches("in/model_output/(.*)"):
            student = recorded(fixture, mode, match[0], match[1])
            for name, weighting in (WEIGHTINGS | ERRORS).items():
                key = f"{tag}/{match[1]}/{name}"
                if f"f64/{key}" in fixture:
                    method = Denoising(weighting=weighting, reduction="mean")
                    compare(fixture, mode, key, losses_at(method, student, level, x, eps, None))


def check_distill(fixture: Fixture, mode: Mode) -> None:
    process = process_of(fixture.meta["schedule"])
    x, eps = mode.array(fixture.input("in/x")), mode.array(fixture.input("in/eps"))
    for tag in tags(fixture, "f64/(N[0-9]+)/.*"):
        rows = mode.tree(progressive.rows(grids.make_grid(process, 2 * int(tag[1:]))).at(fixture.input(f"in/i/{tag}")))
        z = noising.diffuse(x, eps, rows.t)
        compare(fixture, mode, f"{tag}/u", discrete_times(fixture, tag))
        compare(fixture, mode, f"{tag}/logsnr_t", rows.t.logsnr)
        compare(fixture, mode, f"{tag}/logsnr_mid", rows.m.logsnr)
        compare(fixture, mode, f"{tag}/z_t", z)
        for match in fixture.matches("in/student_output/(.*)"):
            kind = match[1]
            teacher, student = analytic(fixture, mode, kind), recorded(fixture, mode, match[0], kind)
            x_target = targets.target(rows, z, *Progressive().estimators({"teacher": teacher}, rows))
            eps_target = predictions.eps_from_x(z, x_target, rows.t)
            v_target = predictions.raw_of("v", x_target, eps_target, rows.t)
            z_mid = noising.ddim_step(z, teacher(z, rows.t), rows.t, rows.m)
            compare(fixture, mode, f"{tag}/{kind}/z_mid", z_mid)
            compare(fixture, mode, f"{tag}/{kind}/x_target", x_target)
            compare(fixture, mode, f"{tag}/{kind}/eps_target", eps_target)
            compare(fixture, mode, f"{tag}/{kind}/v_target", v_target)
            for name, weighting in WEIGHTINGS.items():
                key = f"{tag}/{kind}/loss/{name}"
                if f"f64/{key}" in fixture:
                    method = Progressive(weighting=weighting, reduction="mean", zero_noise="reconciled")
                    denoisers = {"teacher": teacher, "student": student}
                    compare(fixture, mode, key, losses_at(method, denoisers, rows, x, eps, None))


def check_samplers(fixture: Fixture, mode: Mode) -> None:
    process = process_of(fixture.meta["schedule"])
    start = mode.array(fixture.input("in/init"))
    for match in fixture.matches("f64/ddim/N([0-9]+)/(.*)/(noclip|clip)/(final|traj)"):
        steps, kind, clip, what = match.groups()
        grid = grids.clean_end(grids.make_grid(process, int(steps)))
        denoise = analytic(fixture, mode, kind, clip == "clip")
        states = ddim_states(denoise, grid, start, mode)
        compare(fixture, mode, match[0].removeprefix("f64/"), states[-1] if what == "final" else states)
    for match in fixture.matches("f64/noisy/N([0-9]+)/(.*)/(.*)/(noclip|clip)/final"):
        steps, kind, variance, clip = match.groups()
        table = ancestral(grids.make_grid(process, int(steps)), gamma_of(variance))
        denoise = analytic(fixture, mode, kind, clip == "clip")
        # Row i of the recorded noise belongs to step i, which counts down. The package adds the noise of a
        # step at the start of the next row of its table, so that of step 0 has no row; row 0 adds none.
        noise = np.roll(fixture.input(f"in/noise/N{steps}")[::-1], 1, axis=0)
        if mode is FLOAT32:
            final = engine.integrate(denoise, table, start, row_noise=mode.array(noise))
            compare(fixture, mode, match[0].removeprefix("f64/"), final)


def check_unet(fixture: Fixture, mode: Mode) -> None:
    net = unet_of(fixture.meta["config"])
    x, logsnr = fixture.input("in/x"), fixture.input("in/logsnr")
    level = from_logsnr(mode.array(logsnr))
    compare(fixture, mode, "logsnr_input", net.time_input.fraction(level))
    if mode is FLOAT64:
        return  # networks are float32
    steep = net.time_input.kind == "linear" and net.time_input.high - net.time_input.low <= 20
    rule = absolute(2e-3 if steep else 5e-4)
    labels = fixture.input("in/y") if "in/y" in fixture else None
    out, _ = outputs(net, stored_params(fixture, net, "params/", x), x, logsnr, labels)
    temb = sinusoidal_features(net.time_input.time(level, Cosine()), net.network.ch)
    fixture.compare("f64/out", out, mode, rule)
    fixture.compare("f32/temb", temb, mode, rule._replace(text=" absolute (none in the README: the output's)"))


# ------------------------------------------------------------------------------------------------- parts


def compare(fixture: Fixture, mode: Mode, key: str, got: Any) -> None:
    """Compares with f64/<key> at the README's tolerance."""
    fixture.compare(f"f64/{key}", got, mode, tolerance(fixture, mode, key))


def tolerance(fixture: Fixture, mode: Mode, key: str) -> Rule:
    """1e-8 in float64; in float32 five times the original's own float32 error, plus 1e-6."""
    if mode is FLOAT64:
        return of_largest(1e-8)
    deviation = fixture.meta.get("f32_deviation", {}).get(key)
    if deviation is None or f"f64/{key}" not in fixture:
        return DEFAULT_FLOAT32
    largest = np.max(np.abs(fixture.arrays[f"f64/{key}"]), initial=1.0)
    return absolute(5 * deviation + 1e-6 * float(largest), " absolute (5·f32_deviation + 1e-6·max(1, max|ref|))")


def tags(fixture: Fixture, pattern: str) -> list[str]:
    """The distinct first groups of a pattern, in the file's order."""
    return list(dict.fromkeys(match[1] for match in fixture.matches(pattern)))


def discrete_times(fixture: Fixture, tag: str) -> np.ndarray:
    """The times of the indices in/i/N<n>, which count from the clean end: index 0 is the last step."""
    steps = int(tag[1:])
    return (np.arange(1, steps + 1) / steps)[fixture.input(f"in/i/{tag}")]


def gamma_of(variance: str) -> float:
    """The package's gamma of 'small', 'large' or 'medium:<gamma>', with or without 'fixed_'."""
    name, _, fraction = variance.removeprefix("fixed_").partition(":")
    return {"small": 0.0, "large": 1.0}[name] if name != "medium" else float(fraction)


def ddim_states(denoise: Any, grid: Level, start: Any, mode: Mode) -> Any:
    """All states of DDIM: by the engine in float32; in float64, which it does not run in, step by step."""
    if mode is FLOAT32:
        return engine.integrate(denoise, ddim(grid), start, states=True)
    states = [start]
    for k in range(len(grid.sigma) - 1):
        level, level_s = (Level(*(np.full(len(start), a) for a in grid.at(j))) for j in (k, k + 1))
        states.append(noising.ddim_step(states[-1], denoise(states[-1], level), level, level_s))
    return np.stack(states)


def recorded(fixture: Fixture, mode: Mode, key: str, prediction: str) -> Denoiser:
    """A network that returns a recorded output whatever its input."""
    return Denoiser(params=mode.array(fixture.input(key)), model=Formula(_recorded, prediction))


def _recorded(prediction: str, params: Any, z: Any, level: Level, labels: Any) -> Any:
    return params


def analytic(fixture: Fixture, mode: Mode, prediction: str, clip: bool = False) -> Any:
    """The README's teacher for this file's mu, s and kappa."""
    mu, s, kappa = (mode.array(fixture.input(f"in/{name}")) for name in ("mu", "s", "kappa"))
    params = (mu[None], s, kappa[None])  # the same for every image of a batch
    denoiser = Denoiser(params=params, model=Formula(_analytic, prediction))
    return Clipped(denoiser) if clip else denoiser


def _analytic(prediction: str, params: Any, z: Any, level: Level, labels: Any) -> Any:
    xp, (mu, s, kappa), (alpha, sigma) = namespace(z), params, level.expand(z)
    x_hat = (alpha * s**2 * z + sigma**2 * mu) / (alpha**2 * s**2 + sigma**2) + sigma**2 * kappa * xp.tanh(z)
    e_hat = (z - alpha * x_hat) / sigma
    if prediction == "both":
        return xp.concatenate([x_hat + 0.1 * xp.cos(z), e_hat - 0.05 * xp.sin(z)], axis=-1)
    return {"x": x_hat, "eps": e_hat, "v": alpha * e_hat - sigma * x_hat}[prediction]


# -------------------------------------------------------------------------------------------- what there is


def has(*keys: str) -> Any:
    """Recognises files that have an array for each of these shell patterns."""
    return lambda fixture: all(keys_like(fixture, key) for key in keys)


def twins(fixture: Fixture) -> list[tuple[list[str], str]]:
    """The original's own float32 results beside float64 ones."""
    keys = [m[0] for m in fixture.matches("f32/(.*)") if f"f64/{m[1]}" in fixture]
    return [(keys, "the original's float32 twin of the f64 array")]


def _is_schedules(fixture: Fixture) -> bool:
    return "in/u" in fixture and "schedules" in fixture.meta


def _is_unet(fixture: Fixture) -> bool:
    return "config" in fixture.meta and has("params/*", "f64/out")(fixture)


KINDS = [
    Kind("btd schedules", _is_schedules, check_processes, twins),
    Kind("btd dpm", has("in/logsnr_s", "in/z", "f64/reverse/*"), check_dpm, twins),
    Kind("btd losses", has("in/model_output/*", "in/u"), check_losses, twins),
    Kind("btd distill", has("in/student_output/*", "in/mu"), check_distill, twins),
    Kind("btd samplers", has("in/init", "in/mu"), check_samplers, twins),
    Kind("btd unet", _is_unet, check_unet, twins),
]
