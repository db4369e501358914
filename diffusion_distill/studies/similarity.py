"""How alike the network's outputs of any two rows are.

A figure of the analysis in D-ODE's paper, arXiv:2309.16421:

FOLDER/similarity.png    a map for each solver
FOLDER/similarity.json   what is drawn, and what is what

    similarity   S_kl = mean over samples of <d_k, d_l> / (‖d_k‖·‖d_l‖), d = eps or x_hat
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import choose
from diffusion_distill.base.typing import Cond, Data
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.process.levels import Level
from diffusion_distill.process.predictions import eps_from_x
from diffusion_distill.report import heat_maps
from diffusion_distill.solvers.table import Table
from diffusion_distill.studies.subject import check, finite, lengths, numbers_of, run, told, write
from diffusion_distill.training import sharding

#: What the network's output can be read as.
OUTPUTS = {"eps": "eps", "x_hat": "x_hat"}
#: What the numbers of the file are.
WHAT = {
    "images": "how many are averaged, each from its own noise, the same for all tables",
    "output": "what the network's output is read as",
    "nfe": "network evaluations, one per row of the table",
    "logsnr": "2·log(alpha / sigma) of the level that the network is told in each row",
    "similarity": "mean cosine of the angle between the outputs of two rows",
}


def similarity(
    denoise: Denoise,
    tables: Mapping[str, Table],
    start: Data,
    folder: str | Path,
    cond: Cond | None = None,
    output: str = "eps",
) -> dict[str, Any]:
    """Cosine similarities between the network's outputs of all pairs of rows, averaged over the images.

    Args:
      tables, start, cond: as in `trajectories`.
      output: what the network's output is read as, 'eps' or 'x_hat'.

    Returns:
      What the JSON file holds; `tables` has for each label nfe, logsnr [nfe] and similarity [nfe][nfe].

    Raises:
      ValueError: an unknown output, no tables, one that draws noise, or values that are not finite.
      Interrupted: the program was asked to stop.
    """
    choose("output", output, OUTPUTS)
    check(tables, start)
    found = {}
    for label, table in tables.items():
        states, outputs = run(denoise, table, start, cond)
        matrix = sharding.fetch(_similarity(states, outputs, told(table), output))
        found[label] = {"similarity": finite(label, matrix)}
    numbers = numbers_of(WHAT, start, tables, found, output=output)
    maps = {label: table["similarity"] for label, table in numbers["tables"].items()}
    draw = partial(heat_maps, maps, axis="row", quantity=f"cosine similarity of {output}")
    write(folder, "similarity", numbers, draw)
    return numbers


@partial(jax.jit, static_argnames="output")
def _similarity(states: Data, outputs: Data, level: Level, output: str) -> Array:
    """[nfe, nfe]; an output that is 0 everywhere is like no other, and not like itself."""
    values = eps_from_x(states[:-1], outputs, level) if output == "eps" else outputs
    norms = lengths(values).reshape(*values.shape[:2], *(1,) * (values.ndim - 2))
    unit = values / jnp.where(norms == 0, 1.0, norms)
    # Accelerators round the operands of products unless they are told not to.
    sums = jnp.einsum("kbn,lbn->kl", *[unit.reshape(*unit.shape[:2], -1)] * 2, precision=jax.lax.Precision.HIGHEST)
    return sums / values.shape[1]
