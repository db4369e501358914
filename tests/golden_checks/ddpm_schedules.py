"""Fixtures of discrete schedules (folder ddpm): schedules.npz, and the experiment files in configs.json.

Float64 at the README's tolerances. What the originals computed in float32 carries their own rounding near the clean
end, and is held at the README's 1e-5 and 1e-3; in float32 the package is also held against the float64 arrays, at 1e-5.
Of an experiment file the schedule is compared, that is its number of betas, their first and their last, and all of
them with schedules.npz beside the file where that has them. The rest, such as networks and data sets, is skipped.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import numpy as np

from diffusion_distill.process import variances
from diffusion_distill.process.grids import ddim_indices
from diffusion_distill.process.levels import from_logsnr
from diffusion_distill.process.predictions import split
from diffusion_distill.process.time_input import TimeOfProcess
from diffusion_distill.process.vp_discrete import DiscreteBetas
from golden_checks.common import FLOAT64, Fixture, Kind, Mode, Rule, exact, of_each, of_scale, relative

#: The logsnr below which DPM-Solver cuts trailing betas, and the time its networks are told at time 1.
CUT, TOLD = 2 * -5.1, 1000.0
#: The file's words for index lists -> the package's.
SEQUENCES = {
    "uniform": "uniform_all",
    "uniform_truncated": "uniform",
    "uniform_torch": "uniform_torch",
    "quad": "quad",
}
ONCE_ROUNDED = of_scale(1e-5, "the README's rel")
NEAR_CLEAN = of_each(1e-3)


def close(mode: Mode, bound: float, scale: Any = of_each) -> Rule:
    """The README's bound in float64, 1e-5 in float32."""
    return scale(bound if mode is FLOAT64 else 1e-5)


def check_schedules(fixture: Fixture, mode: Mode) -> None:
    schedules = {name: meta for name, meta in fixture.meta["schedules"].items() if "kind" in meta}
    for name, meta in schedules.items():
        process = partial(process_of, meta["kind"], meta["N"], meta.get("beta_start"), meta.get("beta_end"))
        with fixture.attempt(name, mode):
            check_betas(fixture, mode, name, process)
            check_variances(fixture, mode, name, process)
            check_continuous(fixture, mode, name, process, meta["N_after_clipping"])
            check_index_time(fixture, mode, name, process)
    with fixture.attempt("other", mode):
        check_others(fixture, mode, schedules)
    if "learned/net_out" in fixture:
        linear = next(meta for meta in schedules.values() if meta["kind"] == "linear")
        process = process_of("linear", linear["N"], linear["beta_start"], linear["beta_end"])
        check_learned(fixture, mode, process)
    if mode is FLOAT64:
        check_sequences(fixture)


def process_of(kind: str, steps: int, start: float | None, end: float | None, **fields: Any) -> DiscreteBetas:
    """The package's process of a schedule; its time 0 is zero noise unless the fields say otherwise."""
    ends = {name: value for name, value in {"beta_start": start, "beta_end": end}.items() if value is not None}
    return DiscreteBetas(kind, steps, **ends, **{"logsnr_max": math.inf, **fields})


def check_betas(fixture: Fixture, mode: Mode, name: str, process: Any) -> None:
    """The betas, which are made on the host, and the levels of their knots."""
    betas, found = process().betas, process()
    fixture.compare(f"{name}/betas", mode.array(betas), mode, close(mode, 1e-12, relative))
    fixture.compare(f"{name}/betas_f32", mode.array(betas), mode, ONCE_ROUNDED)
    alpha2 = found.level(mode.array(found.knots)).alpha ** 2
    fixture.compare(f"{name}/alphas_cumprod", alpha2[1:], mode, close(mode, 1e-12, relative))
    fixture.compare(f"{name}/alphas_cumprod_f32", alpha2[1:], mode, ONCE_ROUNDED)
    if f"{name}/index" in fixture:
        index = fixture.input(f"{name}/index")
        fixture.compare(f"{name}/alpha_at_index_f32", alpha2[index + 1], mode, ONCE_ROUNDED)
        first = float(abs(alpha2[0] - 1))
        fixture.report(f"{name}: alpha_bar at index -1", first, mode, exact())


def check_variances(fixture: Fixture, mode: Mode, name: str, process: Any) -> None:
    """Of the ancestral steps; tables on the host."""
    if mode is not FLOAT64:
        return
    tables = {
        "posterior_variance": variances.posterior_variance,
        "log_variance_fixed_large": variances.log_variance_fixed_large,
        "log_variance_fixed_small_runner": variances.log_variance_fixed_small,
        "posterior_log_variance_clipped": variances.posterior_log_variance,
    }
    for key, table in tables.items():
        fixture.compare(f"{name}/{key}", table(process().betas), mode, of_each(1e-12))


def check_continuous(fixture: Fixture, mode: Mode, name: str, process: Any, count: int) -> None:
    """DPM-Solver's view: betas beyond the cut are left out, and the line through the first two knots goes on."""
    if f"{name}/cont_t" not in fixture:
        return
    cut = process(logsnr_max=None, logsnr_min=CUT)
    fixture.report(f"{name}: N_after_clipping", abs(cut.count - count), mode, exact())
    times = fixture.input(f"{name}/cont_t")
    level = cut.level(mode.array(times))
    log_alpha = np.log(np.asarray(level.alpha))
    if mode is FLOAT64:
        fixture.compare(f"{name}/log_alpha_array", np.log(cut.level(cut.knots[1:]).alpha), mode, of_each(1e-10))
    found = {
        "log_alpha": log_alpha,
        "sigma": level.sigma,
        "lambda": level.logsnr / 2,
        "inverse_lambda": cut.time(from_logsnr(level.logsnr)),
        "model_time": TimeOfProcess(TOLD, -TOLD / cut.count).time(level, cut),
    }
    for key, value in found.items():
        fixture.compare(f"{name}/cont_{key}_f32", value, mode, NEAR_CLEAN)
        fixture.compare(f"{name}/cont_{key}_f64", value, mode, close(mode, 1e-10))


def check_index_time(fixture: Fixture, mode: Mode, name: str, process: Any) -> None:
    """DEIS's and iPNDM's view: alpha_bar linear over the index, which is count·t - 1."""
    if f"{name}/index_time" not in fixture:
        return
    linear = process(between="alpha2")
    t = mode.array((fixture.input(f"{name}/index_time") + 1) / linear.steps)
    fixture.compare(f"{name}/index_time_alpha_bar", linear.level(t).alpha ** 2, mode, close(mode, 1e-12))


def check_others(fixture: Fixture, mode: Mode, schedules: dict[str, Any]) -> None:
    """The remaining rules, all between the same two betas."""
    linear = next((meta for meta in schedules.values() if meta["kind"] == "linear"), {})
    start, end = linear.get("beta_start", 1e-4), linear.get("beta_end", 0.02)
    if "other/quad" in fixture:
        start, end = fixture.arrays["other/quad"][[0, -1]].tolist()
    for match in fixture.matches("other/(.*)"):
        betas = process_of(match[1], len(fixture.arrays[match[0]]), start, end).betas
        fixture.compare(match[0], mode.array(betas), mode, close(mode, 1e-12, relative))


def check_learned(fixture: Fixture, mode: Mode, process: DiscreteBetas) -> None:
    """A network's six channels, taken apart and read as noise and log-variance."""
    to_nhwc, to_nchw = (0, 2, 3, 1), (0, 3, 1, 2)
    raw = mode.array(fixture.input("learned/net_out")).transpose(to_nhwc)
    eps, v = split("eps_var", raw)
    found = variances.learned_log_variance(v, mode.array(fixture.input("learned/t")), process.betas)
    fixture.compare("learned/eps", eps.transpose(to_nchw), mode, exact())
    fixture.compare("learned/var_channels", v.transpose(to_nchw), mode, exact())
    fixture.compare("learned/log_variance", found.transpose(to_nchw), mode, close(mode, 1e-12))


def check_sequences(fixture: Fixture) -> None:
    """The index lists of the samplers of discrete models, called 'RULE N=... K=...'."""
    for name, wanted in fixture.meta.get("timestep_sequences", {}).items():
        with fixture.attempt(name, FLOAT64):
            rule, count, steps = re.fullmatch(r"(\w+) N=(\d+) K=(\d+)", name).groups()  # type: ignore[union-attr]
            found = ddim_indices(SEQUENCES[rule], int(steps), int(count))[::-1]
            fixture.report(name, 0.0 if found.tolist() == wanted else math.inf, FLOAT64, exact())


# ------------------------------------------------------------------------------------------- experiment files

#: Of an experiment file: the schedule, and how many of its times samplers may visit.
SCHEDULE = ("beta_schedule", "beta_start", "beta_end", "num_diffusion_timesteps")


def check_experiments(fixture: Fixture, mode: Mode) -> None:
    for name, experiment in fixture.meta.items():
        diffusion = experiment["diffusion"]
        kind, start, end, steps = (diffusion[field] for field in SCHEDULE)
        betas = process_of(kind, steps, start, end).betas
        fixture.equal(f"{name}/diffusion/beta_schedule", kind)
        fixture.compare(f"{name}/diffusion/num_diffusion_timesteps", len(betas), mode, exact())
        for field, beta in (("beta_start", betas[0]), ("beta_end", betas[-1])):
            key = f"{name}/diffusion/{field}"
            if diffusion[field] is None:
                fixture.skip([key], "this rule has no first or last beta")
            else:
                fixture.compare(key, beta, mode, relative(1e-12))
        fixture.compare(f"{name}/sampling/total_N", len(betas), mode, exact())
        for recorded in _recorded(fixture, kind, steps, start, end):
            error = float(np.max(np.abs(betas / recorded - 1)))
            fixture.report(f"{name}: betas of schedules.npz", error, mode, relative(1e-12))


def _recorded(fixture: Fixture, *wanted: Any) -> list[np.ndarray]:
    """The betas of the same schedule in the file beside this one."""
    path = fixture.path.parent / "schedules.npz"
    if not path.is_file():
        return []
    beside = Fixture(path, path.name, fixture.data, fixture.emit)
    fields = ("kind", "N", "beta_start", "beta_end")
    named = {name: [meta.get(f) for f in fields] for name, meta in beside.meta["schedules"].items() if "kind" in meta}
    return [beside.arrays[f"{name}/betas"] for name, values in named.items() if values == list(wanted)]


def _other_settings(fixture: Fixture) -> list[tuple[list[str], str]]:
    keys = [key for key in fixture.arrays if not re.fullmatch(r"[^/]+/(diffusion/.*|sampling/total_N)", key)]
    return [(keys, "settings of networks, data, training and evaluation: no schedule")]


# -------------------------------------------------------------------------------------------- what there is


def _is_schedules(fixture: Fixture) -> bool:
    return "schedules" in fixture.meta and bool(fixture.matches(".*/alphas_cumprod"))


def _is_experiments(fixture: Fixture) -> bool:
    entries = list(fixture.meta.values())
    return bool(entries) and all(isinstance(e, dict) and "beta_schedule" in e.get("diffusion", {}) for e in entries)


KINDS = [
    Kind("discrete schedules", _is_schedules, check_schedules),
    Kind("experiment files", _is_experiments, check_experiments, _other_settings, (FLOAT64,)),
]
