"""Fixtures of whole updates in a row: BTD's train_step (btd), TRACT's trajectories (tract).

Both run the package's compiled step, its averages and its change of phase; the recorded noise, times and rows come
in with the batch in place of drawn ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from diffusion_distill import weights
from diffusion_distill.base.typing import Batch
from diffusion_distill.data import from_arrays
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising, Progressive, Tract, phases, progressive, tract
from diffusion_distill.process import grids
from diffusion_distill.training import ema, sharding
from diffusion_distill.training.optimizers import OptimizerSettings, make_clip, make_optimizer
from diffusion_distill.training.state import TrainState, create, next_phase
from diffusion_distill.training.step import StepInputs, make_step
from golden_checks.btd import WEIGHTINGS
from golden_checks.common import (
    FLOAT32,
    FLOAT64,
    Fixture,
    Formula,
    Kind,
    Mode,
    absolute,
    exact,
    keys_like,
    losses_at,
    of_each,
    phase_at,
    process_of,
    relative,
)
from golden_checks.networks import unet_of
from golden_checks.tract import FORMS, GRADIENT, compare_f64, published

# ------------------------------------------------------------------------------------- BTD's whole training step


def check_train_step(fixture: Fixture, mode: Mode) -> None:
    meta = fixture.meta
    net, params = checkpoint_beside(fixture.path)
    mesh = sharding.data_mesh(jax.devices()[: meta["shards"]])
    optimizer = OptimizerSettings(
        rule=meta["optimizer"], grad_clip=meta["grad_clip"], clip_scope="shard", weight_decay=meta["weight_decay"]
    )
    rule = ema.rule("plain", meta["ema_decay"])
    for name, settings in meta["modes"].items():
        process = process_of({**meta.get("schedule", {}), **settings.get("schedule", {})})
        model = Model(net.network, net.shape, process, settings["mean_type"], net.time_input)
        teacher, rows, losses = published_losses(model, settings)
        transformation = make_optimizer(optimizer)
        step = make_step(losses, model, teacher, transformation, mesh, shard_clip=make_clip(optimizer))
        state = jax.device_put(create(params, transformation, (), params if teacher else ()), sharding.replicated(mesh))
        for k in range(meta["steps"]):
            inputs = StepInputs(rows, np.float32(meta["learning_rate"]), {"eval": np.float32(rule(k + 1))})
            state, metrics = step(state, recorded_batch(fixture, k, mesh), inputs, jax.random.key(0))
            compare_step(fixture, mode, name, k, state, metrics)


def checkpoint_beside(path: Path) -> tuple[Model, Any]:
    """The model and the averaged parameters of a good file of the folder checkpoints beside a fixture."""
    folder = path.parent / "checkpoints"
    with np.load(folder / "expected.npz") as expected:
        meta = json.loads(str(expected["meta"]))
    net = unet_of(meta["config"])
    model = Model(net.network, tuple(meta["image"]), time_input=net.time_input, prediction="x")
    good = [
        name for name, did in meta["original_loader"].items() if did["loads"] and (folder / f"{name}.msgpack").exists()
    ]
    return model, jax.tree.map(jnp.asarray, weights.progressive.read(folder / f"{good[0]}.msgpack", model).params)


def published_losses(model: Model, settings: Mapping[str, Any]) -> tuple[Model | None, Any, Any]:
    """(teacher, table, per-image losses of a batch with recorded noise and times) of one of the file's modes."""
    weighting = WEIGHTINGS[settings["mean_loss_weight_type"]]
    steps = settings["student_num_steps"]
    if not steps:
        base = Denoising(weighting=weighting)

        def of_base(denoisers: Any, rows: Any, batch: Any, key: Any) -> Any:
            level = model.process.level(batch["u"])
            return base.losses_at(denoisers["student"], level, batch["x"], batch["eps"], batch.get("cond"))

        return None, (), of_base
    method = Progressive(2 * steps, steps, weighting=weighting)

    def of_student(denoisers: Any, rows: Any, batch: Any, key: Any) -> Any:
        return method.losses_at(denoisers, rows.at(batch["i"]), batch["x"], batch["eps"], batch.get("cond"))

    return model, FLOAT32.tree(progressive.rows(grids.make_grid(model.process, 2 * steps))), of_student


def recorded_batch(fixture: Fixture, k: int, mesh: Any) -> Batch:
    """Update k's images, noise, times and labels, the shards one after another."""
    shards_joined = lambda key: fixture.input(key)[k].reshape(-1, *fixture.arrays[key].shape[3:])  # noqa: E731
    images = shards_joined("in/images")
    spoilt = np.isnan(images)
    source = from_arrays(np.where(spoilt, 0, images).astype(np.uint8))
    clean = source.gather(np.arange(len(source)))["x"]
    batch = {"x": np.where(spoilt, np.float32(np.nan), clean), "eps": np.float32(shards_joined("in/eps"))}
    batch |= {"u": np.float32(shards_joined("in/u")), "i": np.int32(shards_joined("in/i"))}
    if "in/labels" in fixture:
        batch["cond"] = np.int32(shards_joined("in/labels"))
    return sharding.put_batch(batch, mesh)


def compare_step(fixture: Fixture, mode: Mode, name: str, k: int, state: TrainState, metrics: Any) -> None:
    """Compares an update with its record."""
    rate, first, distils = fixture.meta["learning_rate"], k == 0, bool(fixture.meta["modes"][name]["student_num_steps"])
    moved = absolute((0.02 if distils else 0.01 if first else 0.5) * rate, f" absolute ({name}, README)")
    figure = relative(1e-4 if distils else 1e-3 if first else 1e-2)
    fixture.compare(f"f32/{name}/train/loss/step{k}", metrics["loss"], mode, figure)
    fixture.compare(f"f32/{name}/train/gnorm/step{k}", metrics["grad_norm"], mode, figure)
    for role, params in (("target", state.params), ("ema", state.averages["eval"].params)):
        leaves = flatten_dict(params, sep="/")
        for match in fixture.matches(f"f32/{name}/step{k}/{role}/(.*)"):
            fixture.compare(match[0], leaves[match[1]], mode, moved)
        fixture.compare(f"f32/{name}/step{k}/{role}_norm", optax.tree.norm(params), mode, relative(1e-4))
    counters = {"step_counter": state.step, "optimizer_step": optax.tree.get(state.opt_state, "count")}
    for counter, value in counters.items():
        fixture.compare(f"f32/{name}/step{k}/{counter}", value, mode, exact())


# --------------------------------------------------------------------------------------- TRACT's trajectories

#: README, 'trajectories'. Gradients of losses of size 1e3 have no absolute tolerance in float32: those of one step.
COEFFICIENTS = (absolute(1e-10), absolute(2e-5))
LOSS = (of_each(1e-10), relative(1e-4))
GRADIENTS = (of_each(1e-10), GRADIENT[1])
EXACT, COUNTERS = (exact(), exact()), ("eval_step", "phase_buffer")


def check_trajectory(fixture: Fixture, mode: Mode) -> None:
    """Updates across phases by the published rule: all goes on but the teacher."""
    meta = fixture.meta
    process, steps = process_of(meta), tuple(meta["time_schedule"])
    method = Tract(steps, phase_start="continue", reset_average=meta["reset"] == "phase", self_momentum=meta["sema"])
    model = Formula(FORMS["student"], meta.get("prediction", "x"))
    count = len(steps) - 1
    rule: dict[str, Any] = {"restart": False, "reset_average": method.reset_average}
    plan = [phases.Phase(f"{k}", 1, meta["adam_lr"], **rule) for k in range(count)]
    tables = [mode.tree(tract.rows(grids.make_grid(process, steps[k]), steps[k + 1])) for k in range(count)]
    at: list[int] = []
    for progress in fixture.input("progress"):  # the stored phase advances by one at most
        now = phase_at(float(progress), count)
        at.append(min(now, at[-1] + 1) if at else now)
    strides = np.array([meta["timesteps"] // steps[k] for k in at])[:, None]
    row = (fixture.input("index") - fixture.input("semi_index")) // strides - 1
    teacher = model, mode.array(fixture.input("coef_init"))
    history = run_trajectory(fixture, mode, method, model, teacher, plan, tables, row, at)
    for key in history[0]:
        rules = {"loss": LOSS, "grad": GRADIENTS}.get(key, EXACT if key in COUNTERS else COEFFICIENTS)
        compare_f64(fixture, mode, key, np.stack([np.asarray(record[key]) for record in history]), rules)
    fixture.compare("phase", at, mode, exact())


def run_trajectory(
    fixture: Fixture,
    mode: Mode,
    method: Tract,
    student: Formula,
    teacher: tuple[Formula, Any],
    plan: Sequence[phases.Phase],
    tables: Sequence[Any],
    row: np.ndarray,
    at: Sequence[int],
) -> list[dict[str, Any]]:
    """All updates of a file with the package's step; what each leaves behind.

    `row` [updates, batch] are rows of the tables of the phases `at`; the plan gives rates and what is reset.
    """
    optimizer = make_optimizer(OptimizerSettings(grad_clip=fixture.meta["grad_clip"] or 0.0, clip_eps=1e-6))

    def losses(denoisers: Any, rows: Any, batch: Any, key: Any) -> Any:
        return method.losses_at(denoisers, rows.at(batch["row"]), batch["x"], batch["eps"], None)

    step = make_step(losses, student, teacher[0], optimizer, sharding.data_mesh(jax.devices()[:1]))  # type: ignore[arg-type]
    state = create(mode.array(fixture.input("coef_init")), optimizer, method.averages, teacher[1])
    history: list[dict[str, Any]] = []
    for k, phase in enumerate(at):
        if k and phase != at[k - 1]:
            state = next_phase(state, optimizer, plan[phase].restart, plan[phase].reset_average)
        batch = {
            "x": mode.array(fixture.input("x")[k]),
            "eps": mode.array(fixture.input("noise")[k]),
            "row": row[k],
        }
        inputs = inputs_of(plan[phase].rate(k), fixture.meta["ema"], method, state)._replace(rows=tables[phase])
        inputs = mode.tree(inputs)
        gradient = gradient_of(method, student, teacher[0], state, tables[phase].at(row[k]), batch)
        state, metrics = step(state, batch, inputs, jax.random.key(0))
        history.append({**summary(state), "grad": gradient, "loss": metrics["loss"], "phase_buffer": phase})
    return history


def inputs_of(rate: float, momentum: float, method: Tract, state: TrainState) -> StepInputs:
    """What the loop tells the step, but for the table."""
    counts = {name: int(average.count) + 1 for name, average in state.averages.items()}
    momenta = {"eval": momentum, **method.averages}
    return StepInputs((), rate, {name: ema.rule("corrected", mu)(counts[name]) for name, mu in momenta.items()})


def gradient_of(
    method: Tract, student: Any, teacher: Any, state: TrainState, rows: Any, batch: Mapping[str, Any]
) -> Any:
    """The gradient before clipping."""
    denoisers = {name: student.denoiser(average.params) for name, average in state.averages.items()}
    denoisers["teacher"] = teacher.denoiser(state.teacher)

    def mean_loss(coefficients: Any) -> Any:
        changed = denoisers | {"student": student.denoiser(coefficients)}
        return losses_at(method, changed, rows, batch["x"], batch["eps"], None).mean()

    return jax.grad(mean_loss)(state.params)


def summary(state: TrainState) -> dict[str, Any]:
    """The coefficients of every role; copied, because the next update donates them."""
    averages = state.averages
    found = {"student": state.params, "self_teacher": averages["self_teacher"].params, "eval": averages["eval"].params}
    return jax.tree.map(np.array, {**found, "teacher": state.teacher, "eval_step": averages["eval"].count})


# -------------------------------------------------------------------------------------------- what there is


def _is_train_step(fixture: Fixture) -> bool:
    return "shards" in fixture.meta and bool(keys_like(fixture, "f32/*/step0/target/*"))


KINDS = [
    Kind("btd train_step", _is_train_step, check_train_step, modes=(FLOAT32,)),
    Kind(
        "tract trajectory",
        lambda fixture: fixture.meta.get("kind") == "trajectory_vp",
        check_trajectory,
        published,
        modes=(FLOAT64, FLOAT32),
    ),
]
