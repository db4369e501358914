"""The command line.

    python -m diffusion_distill.main --mode=train    --config=configs/digits_teacher.py --workdir=runs/teacher
    python -m diffusion_distill.main --mode=distill  --config=configs/digits_tract.py   --workdir=runs/tract
    python -m diffusion_distill.main --mode=sample   --config=configs/digits_tract.py   --workdir=runs/tract
    python -m diffusion_distill.main --mode=evaluate --config=configs/digits_tract.py   --workdir=runs/tract
    python -m diffusion_distill.main --mode=fit      --config=configs/digits_solvers.py --workdir=runs/dode
    python -m diffusion_distill.main --mode=solvers  --config=configs/digits_solvers.py --workdir=runs/solvers
    python -m diffusion_distill.main --mode=similarity  (or trajectories, or lambdas; to look at solvers, as fit)
    python -m diffusion_distill.main --mode=import   --model=cifar_original             --workdir=runs/cifar_original
    python -m diffusion_distill.main --mode=export   --model=runs/tract/student_1       --workdir=runs/exports

Every field of a config can be overridden: --config.run.batch_size=64 --config.method.schedule='(1024,8,1)'.
SIGTERM and Ctrl-C save what a run has and end the program; the same command goes on with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from diffusion_distill import api
from diffusion_distill.api import evaluation
from diffusion_distill.api.classifier import train_classifier
from diffusion_distill.base import interrupts
from diffusion_distill.base.errors import in_words
from diffusion_distill.base.files import user_path, writable
from diffusion_distill.cli import build
from diffusion_distill.data import image_writer
from diffusion_distill.report.pictures import image_grid
from diffusion_distill.report.tables import format_table
from diffusion_distill.studies import analysis
from diffusion_distill.studies.comparison import compare_solvers, in_short
from diffusion_distill.training.artefact import Artefact
from diffusion_distill.training.sharding import use_cpu_devices

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, help_string="A file with get_config().")
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Split the CPU into so many devices; one per core is fastest.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a TPU pod or cluster first.")
_MODEL = flags.DEFINE_string("model", "", "import: a published name or a file. export: an artefact's folder.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, metrics, artefacts, results.")


def train(config: Any, workdir: Path) -> None:
    """Trains a teacher into WORKDIR/teacher."""
    writable(workdir)
    api.train(build.model(config), build.source(config), build.method(config), build.settings(config), workdir)
    print(f"The teacher is in {workdir / 'teacher'}")


def distill(config: Any, workdir: Path) -> None:
    """Distils config.teacher into WORKDIR/student_<steps>."""
    teacher, student = build.artefact(config, "teacher"), build.student(config)
    writable(workdir)
    source, method, settings = build.source(config), build.method(config), build.settings(config)
    students = api.distill(teacher, source, method, settings, workdir, student)
    print(f"The students of {', '.join(map(str, students))} steps are in {workdir}/student_<steps>")


def sample(config: Any, workdir: Path) -> None:
    """Draws images of config.artefact into WORKDIR/samples.npz (or .zip, or a folder of PNGs) and samples.png."""
    artefact, how, form = build.artefact(config, "artefact"), build.sampling(config), config.sample.form
    writable(workdir, "samples.png")
    image_writer.check_place(workdir, form, artefact.model.shape[-1])
    labels = api.labels_for(artefact.model, how["count"], None, how["seed"])
    images = api.sample(artefact, name="sampling", labels=labels, **how)
    if jax.process_index() > 0:
        return
    print(f"{len(images)} images are in {image_writer.save_images(images, workdir, form, labels)}")
    if images.shape[-1] in (1, 3):
        print(f"The first of them are drawn in {image_grid({'': images[:16]}, workdir / 'samples.png')}")


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
    settings, how = build.fitting(config), build.solver(config)
    writable(workdir, "solver.json")
    fitted = api.fit_solver(artefact, settings=settings, teacher=teacher, **how, **build.searched(config, settings))
    path = fitted.save(workdir / "solver.json")
    if fitted.search:
        analysis.candidates({fitted.solver: fitted.search}, workdir)
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
    looked = analysis.subject(build.artefact(config, "artefact"), **build.looked_at(config))
    analysis.trajectories(looked.denoise, looked.tables, looked.start, workdir, looked.labels)
    print(f"The trajectories are drawn in {workdir / 'trajectories.png'}, their numbers are in trajectories.json")


def similarity(config: Any, workdir: Path) -> None:
    """Draws the similarities of the network's outputs between steps into WORKDIR/similarity.png and .json."""
    writable(workdir, "similarity.json", "similarity.png")
    looked = analysis.subject(build.artefact(config, "artefact"), **build.looked_at(config))
    analysis.similarity(looked.denoise, looked.tables, looked.start, workdir, looked.labels)
    print(f"The similarities are drawn in {workdir / 'similarity.png'}, their numbers are in similarity.json")


def lambdas(config: Any, workdir: Path) -> None:
    """Draws the lambdas in the file or folder config.sample.fitted into WORKDIR/lambdas.png and .json.

    Where lambdas were searched, the candidates are drawn into WORKDIR/candidates.png and .json.
    """
    if not config.sample.fitted:
        raise ValueError("This mode needs fitted solvers: give a file or a folder with --config.sample.fitted=PATH.")
    writable(workdir, "lambdas.json", "lambdas.png")
    analysis.lambdas(analysis.fits_in(config.sample.fitted), workdir)
    if searches := analysis.searches_in(config.sample.fitted):
        analysis.candidates(searches, workdir)
    print(f"The lambdas are drawn in {workdir / 'lambdas.png'}, their numbers are in lambdas.json")


def classifier(config: Any, workdir: Path) -> None:
    """Trains a classifier on config.data into WORKDIR/classifier, whose features --mode=evaluate can use."""
    writable(workdir)
    found = train_classifier(build.source(config), build.source(config, "reference"), build.classifier(config), workdir)
    print(
        f"The classifier is in {workdir / 'classifier'}: {found.about['accuracy']:.2%} of the held-out images are right"
    )


def import_weights(config: Any, workdir: Path) -> None:
    """Turns the published weights or the file --model into the artefact WORKDIR, or FID's network into features."""
    name = _asked_model("a published name or a file")
    if api.is_inception(name):
        weights = api.import_inception(name, workdir)
        print(f"FID's InceptionV3 ({weights.layout}, input rule {weights.rule}) is in {workdir}: measure with "
              f"--config.evaluation.features={workdir}")  # fmt: skip
        return
    model = build.model(config) if config is not None else None
    artefact = api.import_weights(name, workdir, model)
    print(f"The artefact is in {workdir}: {_in_words(artefact)}")


def export_weights(config: Any, workdir: Path) -> None:
    """Writes the artefact in the folder --model as WORKDIR/<its name>.safetensors."""
    folder = user_path(_asked_model("an artefact's folder")).absolute()  # which has a name, be it '.'
    writable(workdir, f"{folder.name}.safetensors")
    path = api.export_weights(Artefact.load(folder), workdir / f"{folder.name}.safetensors")
    print(f"The export is {path}")


def _asked_model(what: str) -> str:
    if not _MODEL.value:
        raise ValueError(f"This mode needs --model: {what}.")
    return _MODEL.value


def _in_words(artefact: Artefact) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(artefact.params))
    return f"{count:,} parameters, {f'a student of {artefact.steps} steps' if artefact.steps else 'a teacher'}"


MODES: dict[str, Callable[[Any, Path], None]] = {
    "train": train,
    "distill": distill,
    "sample": sample,
    "evaluate": evaluate,
    "fit": fit,
    "solvers": solvers,
    "trajectories": trajectories,
    "similarity": similarity,
    "lambdas": lambdas,
    "classifier": classifier,
    "import": import_weights,
    "export": export_weights,
}
#: Modes that are told all they need without a config.
WITHOUT_CONFIG = ("import", "export")
_MODE = flags.DEFINE_enum("mode", None, list(MODES), "What to do.")


def main(argv: Sequence[str]) -> None:
    """Runs a mode; errors in what was asked for end the program with their message."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    mode = str(_MODE.value)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every file it opens; --verbosity=0 shows that
    if _CONFIG.value is None and mode not in WITHOUT_CONFIG:
        raise app.UsageError(f"The mode {mode} needs --config=FILE.")
    if _CPU_DEVICES.value:
        use_cpu_devices(_CPU_DEVICES.value)
    if _DISTRIBUTED.value:
        jax.distributed.initialize()  # from here on JAX itself listens for preemption
    else:
        interrupts.listen()
    try:
        MODES[mode](_CONFIG.value, user_path(str(_WORKDIR.value)))
    except interrupts.Interrupted as request:
        print(f"Stopped by {request}; what was done is saved. The same command goes on from here.", file=sys.stderr)
        sys.exit(interrupts.EXIT_STATUS)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if flags.FLAGS.only_check_args or flags.FLAGS.pdb:
            raise
        sys.exit(f"{type(error).__name__}: {in_words(error)}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "mode"])
    app.run(main)
