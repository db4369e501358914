"""The composition root: the one place that reads configs and turns them into objects.

A config has these parts, each read by one function below:

    model      network, process, prediction, time_input, shape        -> Model
    data       name of a source and its arguments                             -> Source
    student    as model: of a student with another network than its teacher's     -> Model
    method     name ('denoising', 'btd', 'tract', 'guided', ...) and its fields -> Denoising, Progressive, ...
    run        batch_size, seed, cadences, optimizer, the mesh                -> Settings
    teacher    folder of the artefact to distil
    artefact   folder of the artefact to sample or evaluate
    sample     the fields of `SamplerSpec`, an empty solver and 0 steps meaning those of the fitted solver, or else DDIM
               and the model's own number; of guidance, `guidance` is the scale (1 or nothing: none; of a guided
               student see `api.sampling.with_scale`), `null` the label of no class (-1: the model's own), `classifier`
               the file of one that guides in place of the model's null label; and count, seed, batch_size, form of what
               is drawn
    fit        how lambdas are fitted for the solver of `sample`: scale, batch_size, teacher_solver, ... -> FitSettings
    solvers    what --mode=solvers compares: solvers, nfe, ...                    -> Comparison
    evaluation how samplers are measured: count (0: that of `sample`), repetitions, ...; features, statistics (a file in
               place of `reference`), and the solvers and steps to measure -> EvaluationSettings
    classifier how a classifier is trained for its features                   -> ClassifierSettings
    reference  data to evaluate against, like `data`
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from diffusion_distill.api import FitSettings, Settings
from diffusion_distill.api.ahead import Ahead
from diffusion_distill.api.classifier import ClassifierSettings
from diffusion_distill.api.exchange import read_noisy_classifier
from diffusion_distill.api.features import features_named
from diffusion_distill.api.sampling import Sampler, guidance_used, sampler_of
from diffusion_distill.base.errors import choose
from diffusion_distill.base.files import user_path
from diffusion_distill.base.registry import from_mapping, to_mapping
from diffusion_distill.data import SOURCES, Source
from diffusion_distill.denoisers.model import Model
from diffusion_distill.evaluation.measuring import EvaluationSettings, Measured, Part, published_reference
from diffusion_distill.methods import DISTILLERS, Denoising
from diffusion_distill.solvers.fitted import FittedSolver
from diffusion_distill.solvers.spec import DEFAULT_SOLVER, SamplerSpec
from diffusion_distill.studies.comparison import Comparison, Setting
from diffusion_distill.studies.subject import Subject, subject
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.checksum import fingerprint
from diffusion_distill.training.optimizers import OptimizerSettings
from diffusion_distill.training.sharding import make_mesh
from diffusion_distill.training.topologies import devices_of
from diffusion_distill.weights import PUBLISHED

METHODS = {"denoising": Denoising, **DISTILLERS}
#: What config.sample says beside how a model is sampled.
DRAWN = {"count": 64, "seed": 0, "batch_size": 256, "form": "npz"}


def config_of(
    model: Model | None,
    method: Any | None,
    settings: Settings | None,
    data: Mapping[str, Any],
    reference: Mapping[str, Any],
    student: Model | None = None,
    comparison: Comparison | None = None,
    classifier: ClassifierSettings | None = None,
    **sample: Any,
) -> ConfigDict:
    """A complete config from objects: every field is there, with its value, to be overridden.

    Args:
      model: of a teacher to train; None for a distillation, whose model is its teacher's.
      method, settings: of a training run; None where nothing is trained.
      data, reference: {"name": one of SOURCES, ...its arguments}.
      student: of a distillation to another network.
      comparison: what --mode=solvers compares, if not the default.
      classifier: to train.
      sample: changes to the sampling defaults.
    """
    training = {}
    if method is not None and settings is not None:
        name = next(name for name, kind in METHODS.items() if kind is type(method))
        training = {
            "method": {"name": name, **_overridable(to_mapping(method))},
            "run": {**to_mapping(settings), "optimizer": to_mapping(settings.optimizer)},
        }
    sampling = {**to_mapping(SamplerSpec()), "guidance": placeholder(float), "null": -1, "classifier": "", **DRAWN}
    for name in sample:
        choose("field of config.sample:", name, sampling)
    return ConfigDict(
        {
            **({"model": model.to_dict()} if model else {}),
            **({"student": student.to_dict()} if student else {}),
            **training,
            **({"classifier": to_mapping(classifier)} if classifier else {}),
            "data": dict(data),
            "reference": dict(reference),
            "sample": {**sampling, **sample},
            "fit": to_mapping(FitSettings()),
            "solvers": to_mapping(comparison or Comparison()),
            "evaluation": {
                **to_mapping(EvaluationSettings(count=1, repetitions=1)),
                "count": 0,
                "features": "pixels",
                "statistics": "",
                "solvers": (),
                "steps": (),
            },
            "teacher": "",
            "artefact": "",
        }
    )


def _overridable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a method; None becomes an empty place for a number, which the command line could not fill else."""
    return {name: placeholder(float) if value is None else value for name, value in values.items()}


def images(dataset: str, path: str = "", split: str = "train", **arguments: Any) -> dict[str, Any]:
    """The part `data` of a config: the images at `path` (a folder, a zip, an .npz), or else the prepared TFDS set.

    Args:
      dataset: its name in TensorFlow Datasets; the folder of prepared sets is the config's field data_dir.
      split: of the set, and the sub-folder of the folder or zip.
      arguments: size, resample, ... of both.
    """
    if path.endswith(".npz"):
        return {"name": "npz", "path": path, **arguments}
    if path:
        return {"name": "folder", "path": path, "split": split, **arguments}
    return {"name": "tfds", "dataset": dataset, "data_dir": "", "split": split, **arguments}


def model(config: Any) -> Model:
    """The model described by config.model."""
    if "model" not in config:
        raise ValueError("This config describes no model to train. Use one with a part 'model'.")
    return Model.from_dict(config.model.to_dict())


def student(config: Any) -> Model | None:
    """The model described by config.student; None if the student has its teacher's."""
    return Model.from_dict(config.student.to_dict()) if "student" in config else None


def source(config: Any, part: str = "data") -> Source:
    """The data set named in config.data, or in another part of the same form."""
    arguments = dict(config[part])
    name = arguments.pop("name", None)
    make = choose("data set", name, SOURCES)  # type: ignore[arg-type]
    known = inspect.signature(make).parameters
    for argument in arguments:
        choose(f"argument of the data set {name!r}:", argument, known)
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ValueError(f"config.{part}: the data set {name!r} needs {', '.join(missing)}.")
    return make(**arguments)


def method(config: Any) -> Any:
    """The training method of config.method."""
    if "method" not in config:
        raise ValueError("This config describes no training. Use one with the parts 'method' and 'run'.")
    values = dict(config.method)
    name = values.pop("name")
    return from_mapping(choose("method", name, METHODS), f"method {name!r}", values)


def settings(config: Any) -> Settings:
    """The settings of a training run, from config.run."""
    values = config.run.to_dict()
    optimizer = from_mapping(OptimizerSettings, "run.optimizer", values.pop("optimizer", {}))
    return from_mapping(Settings, "run", {**values, "optimizer": optimizer})


def artefact(config: Any, part: str) -> Artefact:
    """The artefact whose folder config.teacher or config.artefact names."""
    folder = config[part]
    if not folder:
        raise ValueError(f"This mode needs an artefact: give its folder with --config.{part}=FOLDER.")
    return Artefact.load(folder)


def spec(config: Any) -> SamplerSpec:
    """How config.sample says that a model is sampled."""
    values = {name: value for name, value in config.sample.to_dict().items() if name not in DRAWN}
    scale, null, file = (values.pop(name) for name in ("guidance", "null", "classifier"))
    if file:
        if null >= 0:
            raise ValueError("config.sample.null belongs to classifier-free guidance. Leave it out, or the classifier.")
        guidance = {"scale": 1.0 if scale is None else scale, "classifier": read_noisy_classifier(file)}
    else:
        guidance = None if scale is None else {"scale": scale, **({} if null < 0 else {"null": null})}
    return SamplerSpec.from_dict({**values, "guidance": guidance})


def drawn(config: Any) -> dict[str, Any]:
    """Keyword arguments of `api.sample` that say how much is drawn: count, seed, batch_size."""
    return {name: config.sample[name] for name in ("count", "seed", "batch_size")}


def form(config: Any) -> str:
    """The form of files in which samples are written, one of `image_writer.FORMS`."""
    return config.sample.form


def looked_at(config: Any) -> Subject:
    """What --mode=trajectories and similarity look at: config.artefact, sampled as config.sample says."""
    how = {"count": config.sample.count, "seed": config.sample.seed, "mesh": mesh(config)}
    return subject(artefact(config, "artefact"), spec(config), **how)


def fits(config: Any) -> str:
    """The file or folder of fitted solvers that config.sample.fitted names.

    Raises:
      ValueError: it names none.
    """
    if not config.sample.fitted:
        raise ValueError("This mode needs fitted solvers: give a file or a folder with --config.sample.fitted=PATH.")
    return config.sample.fitted


def fitting(config: Any) -> FitSettings:
    """The settings of a fit, from config.fit."""
    return from_mapping(FitSettings, "fit", config.fit.to_dict())


def searched(config: Any, settings: FitSettings) -> dict[str, Any]:
    """Keyword arguments of `api.fit_solver` of a search: what it measures on and against; none without one."""
    if not settings.scored:
        return {}
    statistics = config.evaluation.statistics
    against = published_reference(statistics) if statistics else source(config, "reference")
    return {"features": features(config), "reference": against}


def evaluation(config: Any) -> EvaluationSettings:
    """The settings of an evaluation, from config.evaluation."""
    values = config.evaluation.to_dict()
    for name in ("features", "statistics", "solvers", "steps"):
        values.pop(name)
    return from_mapping(EvaluationSettings, "evaluation", {**values, "count": values["count"] or config.sample.count})


def artefacts(config: Any) -> dict[str, Artefact]:
    """The artefacts in the folders config.artefact, see `folders_in`."""
    folders = folders_in(config.artefact)
    return {folder: Artefact.load(folder) for folder in folders} or {"": artefact(config, "artefact")}


def folders_in(text: str) -> list[str]:
    """The artefacts' folders named in a text with commas between them.

    Commas may also belong to names. Of all ways to read the text as folders that are there, the one with the fewest is
    taken: a folder whose name is the whole text is one folder. If there is no such way, every comma separates.
    """
    parts = text.split(",")
    ways: list[list[str] | None] = [[]]  # how the first parts can be read, by their number
    for end in range(1, len(parts) + 1):
        names = {begin: ",".join(parts[begin:end]).strip() for begin in range(end)}
        found = [[*way, names[n]] for n, way in enumerate(ways) if way is not None and _is_artefact(names[n])]
        ways.append(min(found, key=len, default=None))
    return ways[-1] or [part.strip() for part in parts if part.strip()]


def _is_artefact(folder: str) -> bool:
    return bool(folder) and (user_path(folder) / "model.json").is_file()


def features(config: Any) -> Measured:
    """The features of config.evaluation."""
    model = next(iter(artefacts(config).values())).model
    return features_named(config.evaluation.features, model.shape, model.data_range)


def reference(config: Any) -> Source | Part:
    """The reference of an evaluation: published statistics (config.evaluation.statistics), or config.reference."""
    statistics = config.evaluation.statistics
    return published_reference(statistics) if statistics else source(config, "reference")


def conventions(config: Any) -> dict[str, Any]:
    """The facts written beside the numbers of an evaluation; facts about one sampler are in its row."""
    measured, fitted, how = artefacts(config), fitted_solver(config), spec(config)
    how = how.to_dict() | {"guidance": guidance_used(measured, how), "classifier": config.sample.classifier}
    how = {name: value for name, value in how.items() if name not in ("solver", "steps")} | {"seed": config.sample.seed}
    if fitted:
        how |= {name: fitted.provenance.get(name) for name in ("spacing", "end")} | {"lambdas": fitted.lambdas.tolist()}
    return {
        "reference": config.evaluation.statistics or config.reference.to_dict(),
        "artefacts": {
            folder: {"fingerprint": fingerprint(found.params), "steps": found.steps, "provenance": found.provenance}
            for folder, found in measured.items()
        },
        "weights": "eval average",
        "sample": how,
    }


def samplers(config: Any) -> dict[str, Callable[[], Sampler]]:
    """The samplers that config.evaluation measures: label -> function that makes the sampler.

    config.artefact may name several folders, see `folders_in`. Solvers and steps that config.evaluation leaves out
    are those of config.sample, or of its fitted solver.

    Raises:
      ValueError: a fitted solver beside other solvers or numbers of steps.
    """
    folders, fitted = folders_in(config.artefact), fitted_solver(config)
    distinct = len({Path(folder).name for folder in folders}) == len(folders)
    asked = spec(config)
    if fitted:
        chosen = {(f"D-{fitted.solver}", fitted.steps): SamplerSpec.of(asked, fitted=fitted)}
    else:
        names = config.evaluation.solvers or (asked.solver or DEFAULT_SOLVER,)
        pairs = product(names, config.evaluation.steps or (asked.steps,))
        chosen = {(name, steps): SamplerSpec.of(asked, solver=name, steps=steps) for name, steps in pairs}
    found = {}
    for folder in folders:
        title = Path(folder).name if distinct else folder
        for (name, steps), how in chosen.items():
            label = " ".join(filter(None, (title, name, f"{steps} steps" if steps else "")))
            found[label] = partial(_sampler, folder, how, config.sample.seed, mesh(config))
    return found


def fitted_solver(config: Any) -> FittedSolver | None:
    """The solver in the file config.sample.fitted, if that names one.

    Raises:
      ValueError: config.sample or config.evaluation asks for another solver or number of steps.
    """
    if not config.sample.fitted:
        return None
    found = FittedSolver.load(config.sample.fitted)
    found.check_asked(spec(config))
    asked = {name: tuple(config.evaluation[name]) for name in ("solvers", "steps") if config.evaluation[name]}
    if asked:
        raise ValueError(
            f"config.sample.fitted is {found.solver!r} with {found.steps} steps and nothing else, but config.evaluation"
            f" asks for {asked}. Leave these out, or measure without a fitted solver; --mode=solvers compares both."
        )
    return found


def _sampler(folder: str, how: SamplerSpec, seed: int, mesh: Mesh | None) -> Sampler:
    return sampler_of(Artefact.load(folder), how, seed=seed, mesh=mesh)


def mesh(config: Any) -> Mesh | None:
    """The mesh of config.run, on which samples are drawn and solvers fitted too; None for each one's own choice."""
    run = config.run if "run" in config else {}
    numbers = run.get("data_parallel", -1), run.get("params_parallel", 1)
    return None if numbers == (-1, 1) else make_mesh(*numbers)


def ahead(config: Any, topology: str) -> Ahead:
    """The training or distillation of a config before it begins, on TPUs by name or on the devices here.

    config.teacher may be the name of a published teacher too, whose weights are not needed.
    """
    how, devices = method(config), devices_of(topology) if topology else None
    if isinstance(how, Denoising):
        return Ahead.of(model(config), None, how, settings(config), devices)
    if config.teacher in PUBLISHED:
        return Ahead.of(student(config), PUBLISHED[config.teacher].model, how, settings(config), devices)
    teacher = artefact(config, "teacher")
    return Ahead(student(config) or teacher.model, how, settings(config), teacher, devices)


def classifier(config: Any) -> ClassifierSettings:
    """The settings of a classifier's training, from config.classifier."""
    if "classifier" not in config:
        raise ValueError(
            "This config describes no classifier. configs/digits_classifier.py and mnist_classifier.py do."
        )
    return from_mapping(ClassifierSettings, "classifier", config.classifier.to_dict())


def comparison(config: Any) -> tuple[Setting, Comparison]:
    """The comparison of config.solvers for config.artefact, sampled with the settings of config.sample."""
    how = {**drawn(config), "teacher": optional_artefact(config, "teacher"), "mesh": mesh(config)}
    how["spec"] = SamplerSpec.of(spec(config), solver="", steps=0, fitted="")
    return Setting(artefact(config, "artefact"), **how), from_mapping(Comparison, "solvers", config.solvers.to_dict())


def optional_artefact(config: Any, part: str) -> Artefact | None:
    """The artefact that config.teacher or config.artefact names, if it names one."""
    return artefact(config, part) if config[part] else None
