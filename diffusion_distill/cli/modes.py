"""What each mode of the command line does: reads its part of the config, calls the door, says where things are."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diffusion_distill import api
from diffusion_distill.api import evaluation
from diffusion_distill.api.classifier import train_classifier
from diffusion_distill.base import errors
from diffusion_distill.base.files import read_json, user_path, writable
from diffusion_distill.base.whole import write_json
from diffusion_distill.cli import build
from diffusion_distill.data import image_writer
from diffusion_distill.denoisers import conditions
from diffusion_distill.report.pictures import drawable, image_grid
from diffusion_distill.report.tables import format_table
from diffusion_distill.solvers.spec import SamplerSpec
from diffusion_distill.studies import lambdas as lambdas_study
from diffusion_distill.studies import similarity as similarity_study
from diffusion_distill.studies import trajectories as trajectories_study
from diffusion_distill.studies.comparison import compare_solvers, in_short
from diffusion_distill.studies.folder_report import PAGE, folder_report
from diffusion_distill.studies.status import status
from diffusion_distill.training.artefact import Artefact


def train(config: Any, workdir: Path) -> None:
    """Trains a teacher into WORKDIR/teacher."""
    writable(workdir)
    api.train(build.model(config), build.source(config), build.method(config), build.settings(config), workdir)
    print(f"The teacher is in {workdir / 'teacher'}")


def distill(config: Any, workdir: Path) -> None:
    """Distils config.teacher into WORKDIR/student_<steps>, or WORKDIR/student for any number of steps."""
    teacher, student = build.artefact(config, "teacher"), build.student(config)
    writable(workdir)
    source, method, settings = build.source(config), build.method(config), build.settings(config)
    students = api.distill(teacher, source, method, settings, workdir, student)
    if any(students):
        print(f"The students of {', '.join(map(str, students))} steps are in {workdir}/student_<steps>")
    else:
        print(f"The student, for any number of steps, is in {workdir / 'student'}")


def compile_ahead(config: Any, workdir: Path, topology: str = "", alternatives: bool = True) -> None:
    """Compiles the update of config's training for devices that need not be there, into WORKDIR/compile.json.

    Args:
      topology: TPUs by name, such as v5e:4x4; empty for the devices here.
      alternatives: compiles it with remat and in parts too, and looks for the largest batch; each try is compiled.

    Raises:
      ValueError: the state alone does not fit.
    """
    writable(workdir, "compile.json")
    jax.config.update("jax_enable_compilation_cache", not topology)  # programs for others can be written, but not read
    figures = build.ahead(config, topology).figures(alternatives)
    print(format_table([{"what": name, "value": value} for name, value in figures.items()]))
    write_json(workdir / "compile.json", figures)


def sample(config: Any, workdir: Path) -> None:
    """Draws samples of config.artefact into WORKDIR/samples.npz (or .zip, or a folder of PNGs) and samples.png."""
    artefact, how, form = build.artefact(config, "artefact"), build.drawn(config), build.form(config)
    model = artefact.model
    writable(workdir, "samples.png")
    pictures, bounded = drawable(model.shape, model.data_range), model.data_range is not None
    image_writer.check_place(workdir, form, model.shape[-1] if bounded and len(model.shape) == 3 else 0)
    cond = conditions.for_samples(model, how["count"], None, how["seed"])
    drawn = api.sample(artefact, name="sampling", cond=cond, spec=build.spec(config), mesh=build.mesh(config), **how)
    if jax.process_index() > 0:
        return
    print(f"{len(drawn)} samples are in {image_writer.save_images(drawn, workdir, form, cond, bounded)}")
    if pictures:
        print(f"The first of them are drawn in {image_grid({'': drawn[:16]}, workdir / 'samples.png')}")


def evaluate(config: Any, workdir: Path) -> None:
    """Measures samples of config.artefact against config.reference into WORKDIR/results.json, with pictures.

    An interrupted evaluation goes on where it was.
    """
    settings, samplers, features = build.evaluation(config), build.samplers(config), build.features(config)
    writable(workdir, "results.json")
    reference = evaluation.reference_of(build.reference(config), features, settings, workdir)
    conventions = build.conventions(config)
    rows = evaluation.evaluate_samplers(samplers, features, reference, settings, conventions, workdir)
    print(format_table([evaluation.in_short(row) for row in rows]))


def fit(config: Any, workdir: Path) -> None:
    """Fits the lambdas of config.sample's solver to a teacher, into WORKDIR/solver.json for --config.sample.fitted.

    A search for one lambda (config.fit.candidates) is drawn into WORKDIR/candidates.png and .json.
    """
    artefact, teacher = build.artefact(config, "artefact"), build.optional_artefact(config, "teacher")
    settings, spec = build.fitting(config), SamplerSpec.of(build.spec(config), fitted="")
    writable(workdir, "solver.json")
    search, mesh = build.searched(config, settings), build.mesh(config)
    fitted = api.fit_solver(artefact, settings=settings, spec=spec, teacher=teacher, mesh=mesh, **search)
    path = fitted.save(workdir / "solver.json")
    if fitted.search:
        lambdas_study.candidates({fitted.solver: fitted.search}, workdir)
        pairs = zip(fitted.search.candidates, fitted.search.values, strict=True)
        print(format_table([{"lambda": candidate, fitted.search.metric: value} for candidate, value in pairs]))
    distances = zip(fitted.plain, fitted.fitted, strict=True)  # of each row, or of the result alone
    rows = [
        {
            "row": k,
            **{f"lambda_{j + 1}": value for j, value in enumerate(row)},
            "distance without": pair[0],
            "with": pair[1],
        }
        for k, (row, pair) in enumerate(zip_longest(fitted.lambdas, distances, fillvalue=(None, None)))
    ]
    print(format_table(rows))
    print(f"The solver is {path}: sample with --config.sample.fitted={path}")


def solvers(config: Any, workdir: Path) -> None:
    """Compares config.solvers, base and D-ODE, into WORKDIR/results.json and quality.png, fitting what is missing."""
    setting, comparison = build.comparison(config)
    writable(workdir, "results.json", "results.jsonl", "quality.png")
    rows = compare_solvers(setting, comparison, build.fitting(config), build.reference(config), workdir)
    print(format_table([in_short(row) for row in rows]))
    print(f"Seconds are per 1000 images. All is in {workdir / 'results.json'}, drawn in quality.png beside it.")


def trajectories(config: Any, workdir: Path) -> None:
    """Draws norms and pixels along trajectories of config.sample's solver into WORKDIR/trajectories.png and .json."""
    writable(workdir, "trajectories.json", "trajectories.png")
    looked = build.looked_at(config)
    trajectories_study.trajectories(looked.denoise, looked.tables, looked.start, workdir, looked.cond)
    print(f"The trajectories are drawn in {workdir / 'trajectories.png'}, their numbers are in trajectories.json")


def similarity(config: Any, workdir: Path) -> None:
    """Draws the similarities of the network's outputs between steps into WORKDIR/similarity.png and .json."""
    writable(workdir, "similarity.json", "similarity.png")
    looked = build.looked_at(config)
    similarity_study.similarity(looked.denoise, looked.tables, looked.start, workdir, looked.cond)
    print(f"The similarities are drawn in {workdir / 'similarity.png'}, their numbers are in similarity.json")


def lambdas(config: Any, workdir: Path) -> None:
    """Draws the lambdas in the file or folder config.sample.fitted into WORKDIR/lambdas.png and .json.

    Where lambdas were searched, the candidates are drawn into WORKDIR/candidates.png and .json.
    """
    fits = build.fits(config)
    writable(workdir, "lambdas.json", "lambdas.png")
    lambdas_study.lambdas(lambdas_study.fits_in(fits), workdir)
    if searches := lambdas_study.searches_in(fits):
        lambdas_study.candidates(searches, workdir)
    print(f"The lambdas are drawn in {workdir / 'lambdas.png'}, their numbers are in lambdas.json")


def classifier(config: Any, workdir: Path) -> None:
    """Trains a classifier on config.data into WORKDIR/classifier, whose features --mode=evaluate can use."""
    writable(workdir)
    found = train_classifier(build.source(config), build.source(config, "reference"), build.classifier(config), workdir)
    print(
        f"The classifier is in {workdir / 'classifier'}: {found.about['accuracy']:.2%} of the held-out images are right"
    )


class Asked(NamedTuple):
    """What --mode=import, --mode=export and --mode=report are told.

    Attributes:
      model: a published name, a file or a folder; of a report, folders with commas between them.
      family, arguments: what a file does not show; the arguments are JSON.
      format: of an export, a name in `api.EXPORTS`.
    """

    model: str
    family: str = ""
    arguments: str = ""
    format: str = "safetensors"


def import_weights(config: Any, workdir: Path, asked: Asked) -> None:
    """Turns the published weights or the file --model into the artefact WORKDIR, or FID's network into features."""
    name = _named(asked, "a published name or a file")
    if api.is_inception(name):
        weights = api.import_inception(name, workdir)
        print(f"FID's InceptionV3 ({weights.layout}, input rule {weights.rule}) is in {workdir}: measure with "
              f"--config.evaluation.features={workdir}")  # fmt: skip
        return
    described = build.model(config) if config is not None else None
    artefact = api.import_weights(
        name, workdir, described, family=asked.family or None, arguments=_arguments(asked.arguments)
    )
    print(f"The artefact is in {workdir}: {_in_words(artefact)}")


def export_weights(config: Any, workdir: Path, asked: Asked) -> None:
    """Writes the artefact in the folder --model into WORKDIR, as a file or folder called after it.

    Results of --mode=evaluate that stand in the artefact's folder are put on the model card.
    """
    folder = user_path(_named(asked, "an artefact's folder")).absolute()  # which has a name, be it '.'
    ending = errors.choose("format of exports", asked.format, api.EXPORTS)
    name = f"{folder.name}{ending}"
    writable(workdir, *[name] * ending.startswith("."))  # files; folders are looked at later
    measured = folder / "results.json"
    rows = read_json(measured, "Measure again.").get("rows", []) if measured.is_file() else []
    results = [evaluation.in_short(row) for row in rows]
    found = api.exported(Artefact.load(folder), workdir / name, asked.format, results)
    print(f"The export is {found.place}; read back: largest difference {found.difference:.3g}")
    if found.note:
        print(f"It has the {found.note}.")


def report(config: Any, workdir: Path, asked: Asked) -> None:
    """Writes WORKDIR/report.html, a page about what WORKDIR holds, or the folders --model=A,B,C beside each other."""
    folders = [name.strip() for name in asked.model.split(",") if name.strip()]
    if folders:
        writable(workdir, PAGE)
    page = folder_report(folders or [workdir], workdir / PAGE)
    print(f"The report is {page}: open it in a browser.")


def show_status(config: Any, workdir: Path, asked: Asked) -> None:
    """Prints how far the run in WORKDIR is; nothing in the folder is touched."""
    found = status(workdir)
    if not found:
        print(f"{workdir} holds no run: no run.json, metrics.jsonl or checkpoints.")
    for what, said in found.items():
        print(f"{what}: {said}")


def _named(asked: Asked, what: str) -> str:
    if not asked.model:
        raise ValueError(f"This mode needs --model: {what}.")
    return asked.model


def _arguments(text: str) -> dict[str, Any]:
    """The JSON object of --arguments; nothing is an empty one."""
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise ValueError(f"--arguments is {text!r:.80}, which is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--arguments is {text!r:.80}; it must be a JSON object, such as '{{\"image_size\": 64}}'.")
    return found


def _in_words(artefact: Artefact) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(artefact.params))
    return f"{count:,} parameters, {f'a student of {artefact.steps} steps' if artefact.steps else 'a teacher'}"


#: Modes by name, (config, workdir).
MODES: dict[str, Callable[[Any, Path], None]] = {
    "train": train,
    "distill": distill,
    "compile": compile_ahead,
    "sample": sample,
    "evaluate": evaluate,
    "fit": fit,
    "solvers": solvers,
    "trajectories": trajectories,
    "similarity": similarity,
    "lambdas": lambdas,
    "classifier": classifier,
}
#: Modes that are told all they need without a config: (config, workdir, what was asked for).
WITHOUT_CONFIG: dict[str, Callable[[Any, Path, Asked], None]] = {
    "import": import_weights,
    "export": export_weights,
    "report": report,
    "status": show_status,
}
