"""Solvers as tables: pure functions grid -> table on the host; one engine (sampling.py) runs them all."""

from diffusion_distill.solvers.ablation import ablation
from diffusion_distill.solvers.ancestral import ancestral
from diffusion_distill.solvers.ddim import ddim
from diffusion_distill.solvers.heun import heun
from diffusion_distill.solvers.table import Table

SOLVERS = {"ddim": ddim, "euler": ddim, "ancestral": ancestral, "heun": heun, "ablation": ablation}

__all__ = ["SOLVERS", "Table", "ablation", "ancestral", "ddim", "heun"]
