"""Training and distilling: from a model or a teacher and data to artefacts."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.api.beginning import begun, check_low_rank, first_params, state_shapes, step_of
from diffusion_distill.api.monitor import Monitor
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.base.registry import from_mapping
from diffusion_distill.base.seeds import key_of
from diffusion_distill.base.typing import Params
from diffusion_distill.data.pipeline import Batches
from diffusion_distill.data.sources import Source
from diffusion_distill.data.stream import Stream, first_batch
from diffusion_distill.denoisers import conditions
from diffusion_distill.denoisers.description import can_build
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import Denoising
from diffusion_distill.methods.method import Method, student_of
from diffusion_distill.methods.phases import Phase, describe
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import predicts_noise
from diffusion_distill.training import dropout, loop, sharding
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.checkpoint import Checkpoints
from diffusion_distill.training.checksum import fingerprint
from diffusion_distill.training.goodput import Goodput
from diffusion_distill.training.logs import JsonLines, Log, Logs, TensorBoard, WeightsAndBiases
from diffusion_distill.training.optimizers import make_optimizer
from diffusion_distill.training.resuming import LENGTHS, SameRun, defaults
from diffusion_distill.training.settings import WITHOUT_EFFECT, Settings
from diffusion_distill.training.state import TrainState
from diffusion_distill.training.utilisation import Meter, check_memory, described, meter
from diffusion_distill.training.workdir import Workdir

if TYPE_CHECKING:
    pass


def train(
    model: Model,
    source: Source | Stream,
    method: Denoising | None = None,
    settings: Settings | None = None,
    workdir: str | Path | None = None,
) -> Artefact:
    """Trains a teacher.

    Args:
      source: samples and their conditions, see `data`.
      workdir: where checkpoints, metrics and the artefact 'teacher' go; a run found there is resumed. None
        keeps everything in memory.

    Raises:
      ValueError: model, data and settings do not fit together, or workdir holds another run or is in use.
    """
    if model.guided:
        raise ValueError(
            "A guided student is distilled, with dd.Guided(...), not trained. Leave Model(guided=...) out."
        )
    settings, method = settings or Settings(), method or Denoising()
    params = model.init(key_of(settings.seed))
    artefacts = _fit(model, model, params, None, source, method, settings, workdir, lambda phase: "teacher")
    return artefacts[0]


def distill(
    teacher: Artefact,
    source: Source | Stream,
    method: Method,
    settings: Settings | None = None,
    workdir: str | Path | None = None,
    student: Model | None = None,
) -> dict[int, Artefact]:
    """Distils a teacher; returns the student of every phase by its number of steps.

    Args:
      method: `Tract(...)`, `Progressive(...)`, `Knowledge(...)` or another of `DISTILLERS`.
      workdir: as in `train`; students are saved as `student_<steps>`, one for any number of steps (0) as `student`.
      student: a model with another network than the teacher's, which begins with fresh parameters, or one that
        differs from the teacher's in rates of dropout only, which begins with its parameters; by default the
        teacher's model. It is trained with the method's rate of dropout, or else its own; the teacher's model is
        trained without dropout unless the method has a rate. A guided student (`Guided`) begins with the teacher's
        parameters if its network has a place for each of them.

    Raises:
      ValueError: as `train`; a student's teacher was made for fewer steps than the method starts with; another
        network in more than one phase, or one that does not fit the teacher.
    """
    settings = settings or Settings()
    phases = method.phases(teacher.model, settings.batch_size, teacher.grid)
    model, trained = student_models(teacher, method, student)
    _check_teacher(teacher, model, method, phases)
    _warn_of_eps(model, phases)
    params = first_params(model, teacher, settings)
    return _fit(model, trained, params, teacher, source, method, settings, workdir, _student_name)


def student_models(teacher: Artefact, method: Method, student: Model | None) -> tuple[Model, Model]:
    """A student's model, and the same with the rate of dropout that it is trained with; see `distill`."""
    model, rate = student_of(method, teacher.model, student), getattr(method, "dropout", None)
    return model, model if student and rate is None else dropout.with_dropout(model, rate or 0.0)


def _student_name(phase: Phase) -> str:
    return f"student_{phase.student_steps}" if phase.student_steps else "student"


def _fit(
    model: Model,
    trained: Model,
    params: Params,
    teacher: Artefact | None,
    source: Source | Stream,
    method: Method,
    settings: Settings,
    workdir: str | Path | None,
    name_of: Callable[[Phase], str],
) -> dict[int, Artefact]:
    """Runs a method's phases; returns and saves the eval average at the end of each.

    Args:
      trained: the model with the rate of dropout it is trained with; artefacts tell that of `model`.
    """
    clock, mesh = Goodput(), sharding.make_mesh(settings.data_parallel, settings.params_parallel)
    sharding.check_batch(settings.batch_size, mesh, settings.parts)
    _check_source(model, source, settings)
    own = None if teacher is None else teacher.grid
    phases = method.phases(model, settings.batch_size, own)
    provenance = _provenance(teacher, method, settings)
    description = _description(model, teacher, source, provenance) if workdir is not None else {}
    optimizer = make_optimizer(settings.optimizer)
    check_low_rank(model, teacher, settings)
    shapes = state_shapes(params, teacher, method, settings, optimizer)
    check_memory(shapes, mesh)
    step = step_of(model, trained, shapes, teacher, method, settings, optimizer, mesh)
    students: dict[int, Artefact] = {}
    with ExitStack() as cleanup:  # also when interrupted: a checkpoint under way would be lost
        home, checkpoints = None, None
        if workdir is not None:
            same = _same_run(model, method, settings, own)
            home = cleanup.enter_context(closing(Workdir(workdir, description, compare=same))).path
            checkpoints = Checkpoints(home / "checkpoints", settings.keep_checkpoints, description)
            cleanup.callback(checkpoints.close)
        state = begun(params, teacher, method, settings, optimizer, mesh)
        if checkpoints and checkpoints.latest is not None:
            state = checkpoints.restore(state)
        if home:
            _check_places(home, phases, int(state.step), name_of)
        if jax.process_index() == 0:
            print(describe(phases), described(shapes, mesh), sep="\n", flush=True)
        log = cleanup.enter_context(closing(_logs(home, settings, description, int(state.step))))
        monitor = Monitor(model, source, settings, phases, log, home, mesh)

        def phase_done(phase: Phase, state: TrainState) -> None:
            students[phase.student_steps] = _averaged(model, phase, state, provenance)
            if home:
                students[phase.student_steps].save(home / name_of(phase))

        monitor.catch_up(state)
        batches, key = _batches(source, settings), key_of(settings.seed)
        used = partial(meter, method.losses, trained, None if teacher is None else teacher.model)
        plan = _plan(settings, monitor, phase_done, used)
        state = loop.run(
            state, step, phases, batches, optimizer, key, mesh,
            momenta=method.averages, plan=plan, checkpoints=checkpoints, log=log, clock=cleanup.enter_context(clock),
        )  # fmt: skip
    for phase in phases:  # phases finished before a restart
        if phase.student_steps not in students and home:
            made = _held(model, phases, phase, state, provenance)
            students[phase.student_steps] = _found(home / name_of(phase), model, made)
    return students


def _check_places(home: Path, phases: Sequence[Phase], done: int, name_of: Callable[[Phase], str]) -> None:
    """Raises ValueError if the artefact of a phase that is still to be trained cannot be written."""
    for phase, end in zip(phases, loop.ends(phases), strict=True):
        if done < end:
            Artefact.check_place(home / name_of(phase))


def _held(
    model: Model, phases: Sequence[Phase], phase: Phase, state: TrainState, provenance: Mapping[str, Any]
) -> Artefact | None:
    """A phase's artefact, if the state at the end of the run holds it: the last one's, or that of its teacher."""
    if phase is phases[-1]:
        return _averaged(model, phase, state, provenance)
    if phase is not phases[-2]:
        return None
    made = {**provenance, "phase": phase.name, "updates": loop.ends(phases)[-2]}
    teacher = jax.tree.map(jnp.copy, state.whole(state.teacher))
    return Artefact(model, teacher, phase.student_steps, made, phase.grid)


def _found(folder: Path, model: Model, made: Artefact | None) -> Artefact:
    """The artefact in a folder; one that is missing or damaged is written again if the state still holds it."""
    try:
        return Artefact.load(folder, model.network)
    except (OSError, ValueError, TypeError) as error:
        if made is None:
            error.add_note("The run is finished; of its students it can write only the last two again.")
            raise
        warnings.warn(f"{error} It is written again from the newest checkpoint.", stacklevel=4)
        made.save(folder)
        return made


def _plan(
    settings: Settings,
    monitor: Monitor,
    phase_done: Callable[[Phase, TrainState], None],
    used: Callable[[TrainState, Any], Meter | None],
) -> loop.Plan:
    """What the loop does between updates."""
    return loop.Plan(
        log_every=settings.log_every,
        checkpoint_every=settings.checkpoint_every,
        evaluate_every=parse_length(settings.evaluate_every),
        evaluate=monitor,
        phase_done=phase_done,
        nonfinite_limit=settings.nonfinite_limit,
        meter=used,
        updates_per_dispatch=settings.updates_per_dispatch,
    )


def _averaged(model: Model, phase: Phase, state: TrainState, provenance: Mapping[str, Any]) -> Artefact:
    """The eval average at the end of a phase."""
    made = {**provenance, "phase": phase.name, "updates": int(state.step), "skipped": int(state.skipped)}
    average = jax.tree.map(jnp.copy, state.whole(state.averages["eval"].params))
    return Artefact(model, average, phase.student_steps, made, phase.grid)


def _provenance(teacher: Artefact | None, method: Method, settings: Settings) -> dict[str, Any]:
    """The history of the artefacts. Versions of the teacher are left out: only one loaded from disk has them."""
    return {
        "method": type(method).__name__,
        "method_settings": dataclasses.asdict(method),
        "settings": dataclasses.asdict(settings),
        "teacher": None if teacher is None else {k: v for k, v in teacher.provenance.items() if k != "versions"},
    }


def _description(
    model: Model, teacher: Artefact | None, source: Source | Stream, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The description that identifies a run."""
    return {
        "model": model.to_dict(),
        **provenance,
        "teacher_parameters": None if teacher is None else fingerprint(teacher.params),
        "data": {
            "images": None if isinstance(source, Stream) else len(source),
            "shape": source.shape,
            "classes": getattr(source, "num_classes", 0),
        },
    }


def _same_run(model: Model, method: Method, settings: Settings, own: Level | None = None) -> SameRun:
    """The fields that may change when a run is resumed."""

    def phases(description: Mapping[str, Any]) -> list[Phase]:
        stored = from_mapping(type(method), "method_settings of the run there", description["method_settings"])
        return stored.phases(model, settings.batch_size, own)

    parts = {"process": model.process, "time_input": model.time_input}
    if can_build(model.network):
        parts["network"] = model.network
    return SameRun(
        free=frozenset({"model.network.remat", *(f"settings.{name}" for name in WITHOUT_EFFECT)}),
        lengths=frozenset(f"method_settings.{name}" for name in LENGTHS),
        defaults=defaults(model=parts, method_settings=method, settings=settings),
        phases=phases,
        ignored=frozenset({"teacher"}),  # its parameters are compared
    )


def _logs(folder: Path | None, settings: Settings, description: Mapping[str, Any], resumed_at: int) -> Logs:
    """The logs of this process: the first one's are kept."""
    if jax.process_index() > 0:
        return Logs()
    if resumed_at:
        print(f"going on after update {resumed_at}", flush=True)
    logs: list[Log] = [JsonLines(folder / "metrics.jsonl" if folder else None, keep=resumed_at)]
    if settings.tensorboard and folder:
        logs.append(TensorBoard(folder / "tensorboard", keep=resumed_at))
    if settings.wandb and folder:
        logs.append(WeightsAndBiases(folder, settings.wandb, description))
    return Logs(logs)


def _batches(source: Source | Stream, settings: Settings) -> Batches:
    """This process's batches."""
    here, processes = jax.process_index(), jax.process_count()
    return Batches(source, settings.batch_size, settings.seed, settings.flip, here, processes)


def _check_teacher(teacher: Artefact, student: Model, method: Method, phases: Sequence[Phase]) -> None:
    solver = getattr(method, "teacher_solver", "ddim")
    if teacher.steps and solver != "ddim":
        raise ValueError(f"A student steps by DDIM, not by {solver}. Set teacher_solver='ddim'.")
    if dropout.same_but_for_dropout(student, teacher.model):
        return
    if len(phases) > 1:
        raise ValueError(
            f"A student with another network takes one phase, but the method has {len(phases)}. Distil to the other "
            "network first or last, with Knowledge(steps=...), and in time with the network as it is."
        )
    for name in ("shape", "process", "num_classes", "cond"):
        theirs, ours = getattr(teacher.model, name), getattr(student, name)
        if theirs != ours:
            raise ValueError(f"The teacher's {name} is {theirs}, the student's {ours}; they must be the same.")


def _warn_of_eps(student: Model, phases: Sequence[Phase]) -> None:
    """Warns of students that predict eps in fewer steps than their teacher."""
    if not predicts_noise(student.prediction) or all(phase.student_steps >= phase.teacher_steps for phase in phases):
        return
    noisiest = student.process.level(np.float64(1)).off_ends()
    warnings.warn(
        f"The student predicts {student.prediction!r}, which fails in one or few steps: where sampling begins, z "
        "carries almost no signal, and x_hat = (z - sigma·eps)/alpha multiplies the network's errors by sigma/alpha = "
        f"{noisiest.sigma / noisiest.alpha:.3g}, so that images saturate. Distil a teacher that predicts 'x', 'v' or "
        "'both'; or teach this one's estimates to such a student first, with "
        f"Knowledge(steps={phases[0].teacher_steps}) and "
        "student=dataclasses.replace(teacher.model, prediction='v').",
        stacklevel=3,
    )


def _check_source(model: Model, source: Source | Stream, settings: Settings) -> None:
    """Looks at the source and at its first samples before anything is compiled."""
    if tuple(source.shape) != model.shape:
        raise ValueError(
            f"The images have shape {tuple(source.shape)}, but the model takes {model.shape}. "
            "Resize the images or set the model's shape."
        )
    classes = getattr(source, "num_classes", 0)
    if model.num_classes > 1 and classes != model.num_classes:
        raise ValueError(f"The model is conditioned on {model.num_classes} classes, but the data have {classes}.")
    if getattr(source, "value_range", ()) is None and model.data_range is not None:
        raise ValueError(
            f"The data have no bounds (value_range=None), but the model clips estimates to {model.data_range}. Set "
            "Model(data_range=None), or data_range=(low, high) of the data."
        )
    if settings.evaluate_count and parse_length(settings.evaluate_every) and isinstance(source, Stream):
        raise ValueError(
            "Samples cannot be measured against a stream, which has no end. Set evaluate_count=0, and measure later."
        )
    if model.cond is not None:
        batch = first_batch(source)
        conditions.check(model, batch.get("cond"), len(batch["x"]), "the data's cond")
