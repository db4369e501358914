"""What fitting a D-ODE solver costs beside the network calls that it needs, in the same run.

    python benchmarks/dode.py [--devices 2] [--net demo] [--steps 10] [--scale 10] [--batch 32] [--out FILE.json]

A fit calls the network for every evaluation of its teacher and of its student, (scale + 1) times the student's if both
are the same solver, on one batch. The bound is as many bare calls of the compiled denoiser. Teachers are those that
`fit_solver` takes.
"""

from __future__ import annotations

import jax
from _device_common import random_params
from _nets import NETS, model_of
from _options import parser_of
from _rounds import by_turns
from _verdicts import Verdict, compared, report
from sampling import bare_calls

from diffusion_distill.api import grid_for
from diffusion_distill.base.compilation import keep_compiled
from diffusion_distill.solvers import SOLVERS, dode, tabulate
from diffusion_distill.solvers.pairing import nested, teacher_of
from diffusion_distill.training.sharding import data_mesh, devices_for, replicated, split, use_cpu_devices

GOAL = 1 / 1.1  # of bare calls' speed
#: Solvers in other words.
AGAIN = ("euler",)


def fitted() -> list[str]:
    """All solvers that have directions, and what some of them do by options."""
    level = grid_for(model_of("demo"), 3)
    named = [*SOLVERS, "dpm_solver++ method=singlestep"]
    return [name for name in named if name not in AGAIN and tabulate(name, level, model_of("demo").process).directions]


def measure(name: str, solver: str, steps: int, scale: int, batch: int, rounds: int) -> Verdict:
    """The verdict of one solver."""
    model, mesh = model_of(name), data_mesh(devices_for(batch))
    denoise = jax.device_put(model.denoiser(random_params(model)), replicated(mesh))
    start = jax.device_put(jax.random.normal(jax.random.key(1), (batch, *model.shape)), split(mesh))
    student = tabulate(solver, grid_for(model, steps), model.process)
    own = teacher_of(solver)
    teacher = nested(student, model.process, scale, lambda grid: tabulate(own, grid, model.process))
    calls = teacher.table.nfe + student.nfe
    found = by_turns(
        {"network": bare_calls(denoise, start, None, calls), "fit": lambda: dode.fit(denoise, student, teacher, start)},
        rounds,
        calls=1,
    )
    where = f"with {name} on {mesh.size} devices"
    question = f"fit of D-{solver}, {steps} steps, scale {scale}, {where}, beside {calls} network calls"
    return compared(question, found["fit"], found["network"], GOAL)


def main() -> None:
    """Measures the chosen solvers."""
    parser = parser_of(__doc__, rounds=6)
    parser.add_argument("--net", choices=NETS, default="demo")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scale", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--solver", action="append", help="in place of all; may be repeated")
    options = parser.parse_args()
    use_cpu_devices(options.devices)
    keep_compiled()
    found = []
    for solver in options.solver or fitted():
        found.append(measure(options.net, solver, options.steps, options.scale, options.batch, options.rounds))
        print(found[-1], flush=True)
    report(found, options.out)


if __name__ == "__main__":
    main()
