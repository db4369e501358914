"""Solvers as tables: pure functions grid -> table on the host; one engine (solvers/engine.py) runs them all."""

from diffusion_distill.solvers.ancestral import ancestral
from diffusion_distill.solvers.ddim import ddim
from diffusion_distill.solvers.deis import deis
from diffusion_distill.solvers.dpm_solver import dpm_solver, dpm_solver_pp
from diffusion_distill.solvers.general.ablation import ablation
from diffusion_distill.solvers.general.two_stage import two_stage
from diffusion_distill.solvers.heun import heun
from diffusion_distill.solvers.ipndm import ipndm
from diffusion_distill.solvers.registry import SOLVERS, spelled, steps_for, tabulate
from diffusion_distill.solvers.table import Table
from diffusion_distill.solvers.unipc import unipc

__all__ = [
    "SOLVERS",
    "Table",
    "ablation",
    "ancestral",
    "ddim",
    "deis",
    "dpm_solver",
    "dpm_solver_pp",
    "heun",
    "ipndm",
    "spelled",
    "steps_for",
    "tabulate",
    "two_stage",
    "unipc",
]
