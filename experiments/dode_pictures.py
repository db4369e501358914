"""D-ODE, Figures 2, 5 to 7 and 11 to 15: what solvers and fits do, in pictures.

2           cosine similarities of the network's outputs between steps, as eps and as x_hat
5, 7, 11    norms and pixels along the way, of DDIM, its fitted variants and DDIM with ten times as many steps
6, 12-15    samples from the same noise, the base above the fitted solver
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import diffusion_distill as dd
from diffusion_distill.studies.similarity import similarity
from diffusion_distill.studies.subject import subject
from diffusion_distill.studies.trajectories import trajectories
from experiments.common.cells import NOISE_SEED, Cell, Pictured, Place
from experiments.common.runner import Experiment
from experiments.common.scales import Scale
from experiments.dode_solvers import AS_THEY_ARE, DATA, NOISE
from experiments.dode_variants import VARIANTS

CALLS = 10
SHOWN = 16
SOLVERS = {"eps": NOISE, "edm": DATA}


def outputs(place: Place, seed: int, folder: Path) -> Mapping[str, str]:
    """Figure 2."""
    look = subject(place.teacher("eps"), solver="ddim", steps=50, count=64, seed=NOISE_SEED, clip=False)
    captions = {}
    for output in ("eps", "x_hat"):
        similarity(look.denoise, look.tables, look.start, folder / output, look.cond, output)
        (folder / output / "similarity.png").replace(folder / f"{output}.png")
        captions[f"{output}.png"] = f"Figure 2: cosine similarity of the outputs between steps, read as {output}."
    return captions


def ways(place: Place, seed: int, folder: Path) -> Mapping[str, str]:
    """Figures 5, 7 and 11, with all variants in one picture."""
    teacher = place.teacher("eps")
    look = subject(teacher, solver="ddim", steps=CALLS, count=64, seed=NOISE_SEED, clip=False)
    tables, settings = dict(look.tables), dd.FitSettings(seed=seed)
    for title, solver in VARIANTS.items():
        fitted = dd.fit_solver(teacher, solver, CALLS, settings, spec=dd.SamplerSpec(**AS_THEY_ARE))
        tables[f"D-{title}, {CALLS} NFE"] = fitted.table()
    trajectories(look.denoise, tables, look.start, folder, look.cond)
    return {"trajectories.png": f"Figures 5, 7 and 11: norms and pixels along the way, {CALLS} calls."}


def samples(place: Place, seed: int, folder: Path, *, teacher: str, nfe: int) -> Mapping[str, str]:
    """Figures 6 and 12 to 15."""
    artefact, spec, rows = place.teacher(teacher), dd.SamplerSpec(**AS_THEY_ARE), {}
    for title, solver in SOLVERS[teacher].items():
        steps = (nfe + 1) // 2 if solver == "heun" else nfe
        fitted = dd.fit_solver(artefact, solver, steps, dd.FitSettings(seed=seed), spec=spec)
        for name, fields in {title: {"solver": solver, "steps": steps}, f"D-{title}": {"fitted": fitted}}.items():
            how = dd.SamplerSpec.of(spec, **fields)
            rows[name] = dd.sample(artefact, SHOWN, spec=how, seed=NOISE_SEED, batch_size=SHOWN)
    name = f"samples_{nfe}.png"
    dd.report.image_grid(rows, folder / name, columns=SHOWN)
    return {name: f"Figures 6 and 12 to 15: {nfe} calls from the same noise, base above fitted."}


def cells(scale: Scale) -> list[Cell]:
    """One for each kind of picture."""
    drawn = [
        Pictured(f"samples of {teacher} with {nfe}", partial(samples, teacher=teacher, nfe=nfe), teacher)
        for teacher, calls in (("eps", (5, CALLS)), ("edm", (5, 9)))
        for nfe in calls
    ]
    return [Pictured("outputs", outputs, "eps"), Pictured("ways", ways, "eps"), *drawn]


EXPERIMENT = Experiment(
    name="dode_pictures",
    title="D-ODE (arXiv:2309.16421), Figures 2, 5 to 7 and 11 to 15: pictures",
    says=(
        "Outputs of neighbouring steps are alike; fitted solvers follow the fine one more closely, but Sep and All do "
        "not; their samples are clearer."
    ),
    cells=cells,
)

if __name__ == "__main__":
    EXPERIMENT.main()
