"""A fitted solver: what sampling with a D-ODE solver needs, in one small JSON file.

It holds the solver, its grid level by level, the process, the lambdas, how near each row came to the teacher
before and after them, where they come from, and the value of every candidate if lambda was searched. Nothing in it is
executed when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_distill.base.files import read_json, user_path
from diffusion_distill.base.registry import describe, rebuild
from diffusion_distill.base.whole import write_json
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import PROCESSES, Process
from diffusion_distill.solvers import Table, spelled, tabulate
from diffusion_distill.solvers.search import Search
from diffusion_distill.solvers.spec import SamplerSpec

FORMAT = 1


@dataclass(frozen=True)
class FittedSolver:
    """A solver on a grid with its lambdas.

    Attributes:
      solver: a name of `SOLVERS`, perhaps with options.
      process: the model's, for solvers that need it.
      grid: levels [steps + 1].
      lambdas: [rows, D] in the paper's convention.
      plain, fitted: root mean square distance from the teacher's states without and with them, [rows].
      provenance: JSON-ready facts about the fit.
      search: what became of every candidate, if lambda was searched; None if it was fitted.
    """

    solver: str
    process: Process
    grid: Level
    lambdas: np.ndarray
    plain: np.ndarray
    fitted: np.ndarray
    provenance: Mapping[str, Any] = field(default_factory=dict)
    search: Search | None = None

    @property
    def base(self) -> Table:
        """The solver's table with its directions."""
        return tabulate(self.solver, self.grid, self.process)

    def table(self) -> Table:
        """The plain table to sample with."""
        return self.base.distilled(self.lambdas)

    @property
    def steps(self) -> int:
        """Of the grid."""
        return len(self.grid.alpha) - 1

    def check_asked(self, spec: SamplerSpec) -> None:
        """Raises ValueError if a spec asks for a solver, a number of steps or a grid that is not this one's.

        The defaults of spacing and end ask for nothing: the fitted solver brings its own grid.
        """
        other_solver = spec.solver and spelled(spec.solver) != spelled(self.solver)
        if other_solver or (spec.steps and spec.steps != self.steps):
            asked = [f"solver {spec.solver!r}"] * bool(spec.solver) + [f"{spec.steps} steps"] * bool(spec.steps)
            raise ValueError(
                f"The fitted solver is {self.solver!r} with {self.steps} steps, but {' and '.join(asked)} were asked "
                "for beside it. Leave solver and steps out (on the command line --config.sample.solver='' "
                "--config.sample.steps=0), or fit another one with --mode=fit."
            )
        for name, asked in (("spacing", spec.spacing), ("end", spec.end)):
            own = self.provenance.get(name, type(asked)())
            if asked and asked != own:
                raise ValueError(
                    f"The solver was fitted on a grid with {name}={own!r}, but {name}={asked!r} was asked for beside "
                    f"it. Leave {name} out, or fit another solver with --mode=fit."
                )

    def to_dict(self) -> dict[str, Any]:
        """What the file holds, JSON-ready."""
        directions = self.base.directions
        return {
            "format": FORMAT,
            "solver": self.solver,
            "process": describe(self.process, PROCESSES),
            "grid": {"alpha": _numbers(self.grid.alpha), "sigma": _numbers(self.grid.sigma)},
            "lambdas": _numbers(self.lambdas),
            "lambdas in the published code's convention": _numbers(self.lambdas * directions.published),  # type: ignore[union-attr]
            "distance from the teacher": {"plain": _numbers(self.plain), "fitted": _numbers(self.fitted)},
            "provenance": dict(self.provenance),
            "search": None if self.search is None else _written(self.search),
        }

    def save(self, path: str | Path) -> Path:
        """Writes the file."""
        path = user_path(path)
        write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, path: str | Path) -> FittedSolver:
        """Reads a file that `save` wrote.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it is no fitted solver, or its parts do not fit each other.
        """
        path = user_path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no fitted solver {path}. --mode=fit writes one, and in PyTorch fit(...).save(...)."
            )
        return cls.from_dict(read_json(path, "Copy it again, or fit it again by --mode=fit."), str(path))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], name: str = "This") -> FittedSolver:
        """The solver of a file's content, as `to_dict` gives it; errors call it `name`.

        Raises:
          ValueError: it is no fitted solver, or its parts do not fit each other.
        """
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, this version reads {FORMAT}")
            distance = content["distance from the teacher"]
            found = cls(
                solver=content["solver"],
                process=rebuild("process", content["process"], PROCESSES),
                grid=grids.from_numbers(dict(content["grid"])),  # type: ignore[arg-type]  # None is of None alone
                lambdas=np.array(content["lambdas"]),
                plain=np.array(distance["plain"]),
                fitted=np.array(distance["fitted"]),
                provenance=content["provenance"],
                search=_read(content["search"]) if content.get("search") else None,
            )
            found.table()
        except (KeyError, TypeError, ValueError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{name} is no fitted solver: {what:.1000}") from error
        return found


def _numbers(values: Any) -> list:
    return np.asarray(values, np.float64).tolist()


def _written(search: Search) -> dict[str, Any]:
    """A search for JSON, which has no nan."""
    values = [value if math.isfinite(value) else None for value in _numbers(search.values)]
    return {**search._asdict(), "candidates": _numbers(search.candidates), "values": values}


def _read(search: Mapping[str, Any]) -> Search:
    values = [math.nan if value is None else value for value in search["values"]]
    return Search(search["metric"], np.array(search["candidates"]), np.array(values), search["best"])
